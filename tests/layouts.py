"""The same values in every kind of memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from .oracle import BF16

_FOLDER = tempfile.TemporaryDirectory()
_count = 0


def _misaligned(a: np.ndarray) -> np.ndarray:
    raw = np.zeros(a.nbytes + 1, np.uint8)
    result = raw[1:].view(a.dtype).reshape(a.shape)
    result[...] = a
    return result


def _mapped(a: np.ndarray) -> np.ndarray:
    global _count  # noqa: PLW0603
    _count += 1
    if not a.size or not a.ndim:
        return a
    result = np.memmap(Path(_FOLDER.name) / f"{_count}.bin", dtype=a.dtype, mode="w+", shape=a.shape)
    result[...] = a
    return result


def _padded(a: np.ndarray) -> np.ndarray:
    """Unit stride on the last axis, gaps between its rows."""
    if not a.ndim:
        return a
    wide = np.ones((*a.shape[:-1], a.shape[-1] + 3), a.dtype)
    wide[..., 1 : 1 + a.shape[-1]] = a
    return wide[..., 1 : 1 + a.shape[-1]]


def _strided(a: np.ndarray) -> np.ndarray:
    """Every second element of every axis."""
    wide = np.ones([2 * n + 1 for n in a.shape], a.dtype)
    view = wide[(..., *(slice(1, 2 * n, 2) for n in a.shape))]
    view[...] = a
    return view


def _reversed(a: np.ndarray) -> np.ndarray:
    flip = (..., *[slice(None, None, -1)] * a.ndim)
    return np.array(a[flip], order="C")[flip]


def _permuted(a: np.ndarray) -> np.ndarray:
    """The first axis fastest, the rest in C order."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0) if a.ndim else a


def _read_only(a: np.ndarray) -> np.ndarray:
    result = a.copy()
    result.flags.writeable = False
    return result


def _swapped(a: np.ndarray) -> np.ndarray:
    # A byte-swapped bfloat16 does not exist: NumPy makes raw bytes of it.
    return _misaligned(a) if a.dtype == BF16 else a.astype(a.dtype.newbyteorder())


def _broadcast(a: np.ndarray) -> np.ndarray:
    """Stride 0 on the axes along which nothing changes (see `flat_axis`)."""
    for axis in range(a.ndim):
        first = a[(slice(None),) * axis + (slice(0, 1),)]
        if a.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, a.shape), a):
            a = np.broadcast_to(first, a.shape)
    return a


INPUTS = {
    "C": lambda a: np.array(a, order="C"),
    "F": lambda a: np.array(a, order="F"),
    "strided": _strided,
    "padded rows": _padded,
    "reversed": _reversed,
    "permuted": _permuted,
    "broadcast": _broadcast,
    "read-only": _read_only,
    "byte-swapped": _swapped,
    "misaligned": _misaligned,
    "memory-mapped": _mapped,
}
OUTPUTS = ("C", "F", "strided", "padded rows", "reversed", "permuted", "memory-mapped")


def arrange(a: np.ndarray, layout: str) -> np.ndarray:
    result = INPUTS[layout](a)
    assert result.shape == a.shape
    return result


def flat_axis(a: np.ndarray, axis: int) -> np.ndarray:
    """The values of `a` made equal along one axis, so that the broadcast layout has something to broadcast."""
    return np.ascontiguousarray(np.broadcast_to(np.take(a, [0], axis), a.shape)) if a.shape[axis] else a
