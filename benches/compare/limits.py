"""What the memory allows: plain loops over the same bytes, by the core's own instructions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cases import Array
from timing import Way

import crossent._core as core

# Read the array; copy it with ordinary stores; copy it past the cache; rewrite it in place.
KINDS = ("read", "copy", "stream", "rewrite")


def own_loops() -> bool:
    """Whether the core brings its loops; otherwise NumPy's stand in."""
    return hasattr(core, "_bandwidth")


def _stand_in(kind: str, src: Array, dst: Array) -> None:
    if kind == "read":
        np.bitwise_or.reduce(src)
    elif kind == "rewrite":
        np.bitwise_xor(dst, 1, out=dst)
    else:
        np.copyto(dst, src)


def limit_ways(x: Array, scratch: Array, threads: int) -> list[Way]:
    """One pass each over the bytes of `x`, which are multiples of 8; `scratch` is as large and is overwritten."""
    src, dst = x.reshape(-1).view(np.uint8), scratch.reshape(-1).view(np.uint8)
    bandwidth: Callable[[str, Array, Array], object] | None = getattr(core, "_bandwidth", None)
    if bandwidth is not None:
        return [Way("limit", kind, lambda kind=kind: bandwidth(kind, src, dst)) for kind in KINDS]  # type: ignore[misc]
    whole = src.size // 8 * 8
    sources = np.array_split(src[:whole].view(np.uint64), threads)
    targets = np.array_split(dst[:whole].view(np.uint64), threads)
    pool = ThreadPoolExecutor(threads)

    def run(kind: str) -> None:
        list(pool.map(lambda pair: _stand_in(kind, *pair), zip(sources, targets, strict=True)))

    return [Way("limit", kind, lambda kind=kind: run(kind)) for kind in KINDS]  # type: ignore[misc]
