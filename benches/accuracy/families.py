"""The inputs: rows of logits in families that are hard in one way each, with a label for every row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from oracle import BF16, F16, F32, F64, round_to

Array: TypeAlias = NDArray[Any]

DTYPES = (F64, F32, BF16, F16)
# Rows of one family, by number of classes: many where a row is short.
ROWS = {2: 2000, 3: 2000, 10: 1000, 64: 500, 1000: 100, 32000: 4, 128256: 2}
FAMILIES = {
    "N(0, 1)": "normal logits, any label",
    "N(0, 10)": "the same, ten times as far apart",
    "margins 0 … 88": "the maximum so far above the others, which spread below by 0 to 20 nats and more; half the labels are the maximum",
    "confident, right": "margins 8 … 88 (float64: 600), the label is the maximum",
    "confident, wrong": "the same, the label is the minimum",
    "equal below": "margins 0 … 30, all others the same number, so that the roundings of their sum add up; the label is the maximum",
    "ties": "2, 3, 17 or all classes share the maximum",
    "−inf classes": "N(0, 3), three classes of ten −inf, the label finite",
    "denormal differences": "logits that are multiples, 0 … 50, of the smallest number of the type",
    "shift ±1e4": "margins 0 … 20 about ±1e4",
    "shift ±1e30": "the same about ±1e30, where most types keep ties only (float16 cannot hold it)",
}


class Family(NamedTuple):
    name: str
    x: Array
    y: Array


def _below(classes: int, rows: int, low: float, high: float, rng: np.random.Generator) -> Array:
    """Rows with the maximum 0 in any class and the others at least a margin below; small margins more often."""
    margin = low + (high - low) * rng.random((rows, 1)) ** 2
    spread = rng.choice([0.0, 0.3, 3.0, 20.0], (rows, 1))
    x = -margin - spread * rng.exponential(1.0, (rows, classes))
    x[np.arange(rows), rng.integers(0, classes, rows)] = 0.0
    return x


def _values(name: str, dtype: np.dtype[Any], classes: int, rows: int, rng: np.random.Generator) -> Array:
    if name.startswith("N("):
        return rng.normal(0, 1 if name == "N(0, 1)" else 10, (rows, classes))
    if name.startswith("margins"):
        return _below(classes, rows, 0, 88, rng)
    if name.startswith("confident"):
        return _below(classes, rows, 8, 600 if dtype == F64 else 88, rng)
    if name == "equal below":
        x = np.zeros((rows, classes)) - rng.uniform(0, 30, (rows, 1))
        x[np.arange(rows), rng.integers(0, classes, rows)] = 0.0
        return x
    if name == "ties":
        x = rng.normal(-3, 1, (rows, classes))
        top = x.max(-1) + rng.exponential(5.0, rows)
        for row, many in enumerate(rng.choice([2, 3, 17, classes], rows)):
            x[row, rng.permutation(classes)[: min(many, classes)]] = top[row]
        return x
    if name == "−inf classes":
        x = rng.normal(0, 3, (rows, classes))
        gone = rng.random(x.shape) < 0.3
        gone[np.arange(rows), rng.integers(0, classes, rows)] = False
        return np.where(gone, -np.inf, x)
    if name == "denormal differences":
        smallest = {F64: 2.0**-1074, F32: 2.0**-149, BF16: 2.0**-133, F16: 2.0**-24}[dtype]
        return rng.integers(0, 51, (rows, classes)) * smallest
    shift = 1e30 if name.endswith("30") else 1e4
    return _below(classes, rows, 0, 20, rng) + np.where(np.arange(rows) % 2, -shift, shift)[:, None]


def families(dtype: np.dtype[Any], classes: int) -> Iterator[Family]:
    """Every family that the type can hold, always the same numbers."""
    for number, name in enumerate(FAMILIES):
        if dtype == F16 and name == "shift ±1e30":
            continue
        # Only some numbers round to the same side every time.
        rows = ROWS[classes] * (4 if name == "equal below" else 1)
        rng = np.random.default_rng([classes, number, dtype.num])
        values = _values(name, dtype, classes, rows, rng)
        # Denormal numbers are exact as they are; rounding would take them for multiples of a larger unit.
        x = values.astype(dtype) if name == "denormal differences" else round_to(values, dtype).astype(dtype)
        wide = x.astype(np.float64)
        y = rng.integers(0, classes, rows)
        if name.startswith("margins"):
            y[::2] = wide[::2].argmax(-1)
        elif name in {"confident, right", "equal below"}:
            y = wide.argmax(-1)
        elif name == "confident, wrong":
            y = wide.argmin(-1)
        elif name == "−inf classes":
            # Any class if it is finite, otherwise the first one that is.
            finite = np.isfinite(wide)
            y = np.where(finite[np.arange(rows), y], y, finite.argmax(-1))
        yield Family(name, x, y)
