"""The instruction-set levels of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import crossent as ce

if TYPE_CHECKING:
    from collections.abc import Iterator


def each_level() -> Iterator[str]:
    """Sets one level after the other and restores the first: for tests whose exact values cost more than the computation tested."""
    before = ce.simd_level()
    try:
        for name in ce.simd_levels():
            ce.set_simd_level(name)
            assert ce.simd_level() == name
            yield name
    finally:
        ce.set_simd_level(before)
