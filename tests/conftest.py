"""What all suites share: the header line, the levels, the layouts."""

from __future__ import annotations

import numpy as np
import pytest

import crossent as ce

from .oracle import DTYPES


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [
        f"crossent {ce.__version__} from {ce.__file__}",
        f"SIMD levels: {', '.join(ce.simd_levels())} (default {ce.simd_level()}); threads: {ce.get_num_threads()}",
    ]


@pytest.fixture(params=ce.simd_levels())
def level(request):
    """Runs the test at every instruction-set level of this machine."""
    before = ce.simd_level()
    ce.set_simd_level(request.param)
    assert ce.simd_level() == request.param
    yield request.param
    ce.set_simd_level(before)


@pytest.fixture(params=DTYPES, ids=lambda d: d.name)
def dtype(request):
    """Every logits type."""
    return request.param


@pytest.fixture
def rng(request):
    """Random numbers that depend on the test's name only."""
    return np.random.default_rng(list(request.node.name.encode()))
