"""What the memory allows: plain loops over the same bytes, by the core's own instructions."""

from __future__ import annotations

import numpy as np
from cases import Array
from timing import Way

import crossent._core as core

# Read the array; copy it with ordinary stores; copy it past the cache; rewrite it in place.
KINDS = ("read", "copy", "stream", "rewrite")


def limit_ways(x: Array, scratch: Array) -> list[Way]:
    """One pass each over the bytes of `x`, by as many threads as are set; `scratch` is as large and is overwritten."""
    # As float32, whatever they are: the loops do not look at the values.
    src, dst = (a.reshape(-1).view(np.uint8)[: x.nbytes // 4 * 4].view(np.float32) for a in (x, scratch))
    return [Way("limit", kind, lambda kind=kind: core.bandwidth(kind, src, dst)) for kind in KINDS]  # type: ignore[misc]
