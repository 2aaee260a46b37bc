"""Instruction sets: none is missed, and each can be chosen."""

from __future__ import annotations

import itertools
import platform
from pathlib import Path

import numpy as np
import pytest

import crossent as ce

from .oracle import eps
from .processes import linux, python


@linux
def test_no_level_of_this_machine_is_missing():
    """From the flags that the kernel reports: a level that is silently not found would be a level not tested."""
    flags = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.partition(":")[0].strip() in ("flags", "Features"):
            flags = set(line.partition(":")[2].split())
            break
    want = ["scalar"]
    if platform.machine() in ("x86_64", "AMD64"):
        assert flags
        if {"avx2", "fma", "f16c"} <= flags:
            want.insert(0, "avx2")
            if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
                want.insert(0, "avx512")
    elif platform.machine() in ("aarch64", "arm64"):
        want.insert(0, "neon")
    assert ce.simd_levels() == tuple(want)


def test_levels_can_be_set():
    before = ce.simd_level()
    assert before in ce.simd_levels()
    assert ce.simd_levels()[-1] == "scalar"
    try:
        for name in ce.simd_levels():
            ce.set_simd_level(name)
            assert ce.simd_level() == name
    finally:
        ce.set_simd_level(before)


def test_levels_differ_in_their_last_bits_only():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, (200, 1000)).astype(np.float32)
    before = ce.simd_level()
    results = {}
    try:
        for name in ce.simd_levels():
            ce.set_simd_level(name)
            results[name] = ce.softmax(x)
    finally:
        ce.set_simd_level(before)
    for a, b in itertools.combinations(results.values(), 2):
        np.testing.assert_allclose(a, b, rtol=20 * eps(x.dtype))


@pytest.mark.parametrize("name", ce.simd_levels())
def test_level_from_the_environment(name):
    code = "import crossent as ce; print(ce.simd_level())"
    assert python(code, env={"CROSSENT_SIMD": name}, args=["-W", "error"]).stdout.split() == [name]


def test_bad_level_in_the_environment():
    code = "import crossent as ce; print(ce.simd_level(), ce.simd_levels()[0])"
    for bad in ("avx1024", "AVX-2"):
        result = python(code, env={"CROSSENT_SIMD": bad})
        got, best = result.stdout.split()
        assert got == best
        assert "RuntimeWarning" in result.stderr
        assert "CROSSENT_SIMD" in result.stderr
        assert bad in result.stderr
