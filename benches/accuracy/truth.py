"""What is to be computed, in double-double arithmetic (`tests/oracle.py`), and the distance to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import mpmath
import numpy as np
from families import Array, Family
from oracle import DD, F64, exact, row_dtype, spacing, tiny, where

# Near the end of float64 the low part of a double-double has no bits left: what is smaller is not judged.
SMALLEST_F64 = 2.0**-1010
ROW_RESULTS = ("loss", "logsumexp")
QUANTITIES = (*ROW_RESULTS, "log_softmax", "softmax", "gradient, true class", "gradient, elsewhere")


class Want(NamedTuple):
    """Exact values, the unit in the last place at each, and which of them are judged."""

    value: DD
    unit: Array
    judged: Array


Truth = dict[str, Want]


def result_dtype(quantity: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Losses and logsumexp of 16-bit logits are float32; everything else has the type of the logits."""
    return np.dtype(row_dtype(dtype)) if quantity in ROW_RESULTS else dtype


def bound(quantity: str, dtype: np.dtype[Any]) -> float:
    """What is promised: 4 or 8 ULP of the type that is computed in, then one rounding if the result has 16 bits."""
    units = 4.0 if quantity in {*ROW_RESULTS, "log_softmax"} else 8.0
    if result_dtype(quantity, dtype).itemsize > 2:
        return units
    bits = {"float16": 11, "bfloat16": 8}[dtype.name]
    return 0.5 + units * 2.0 ** (bits - 24)


def truth(x: Array, y: Array, dtype: np.dtype[Any]) -> Truth:
    """Of rows of one number of classes."""
    wide = x.astype(np.float64)
    gone = np.isneginf(wide)
    # So far below that the exponential is 0; −inf itself has no exact difference.
    row = exact(np.where(gone, -1e5, wide))
    label = (np.arange(len(y)), y)
    one = DD.of(np.ones(len(y)))
    # At the maximum −Σ of the others, elsewhere p − 1 with p ≤ 1/2: nothing cancels.
    at_label = where(row.top[label], -(row.rest / (row.rest + one)), row.probs[label] - one)
    log_probs = DD(np.where(gone, -np.inf, row.log_probs.hi), np.where(gone, 0.0, row.log_probs.lo))
    values = (-log_probs[label], row.logsumexp, log_probs, row.probs, at_label, row.probs)
    wants = {}
    for quantity, value in zip(QUANTITIES, values, strict=True):
        result = result_dtype(quantity, dtype)
        judged = np.abs(value.hi) >= (SMALLEST_F64 if result == F64 else tiny(result))
        size = value.hi
        if quantity == "logsumexp":
            size = np.maximum(np.abs(row.m), np.abs(value.hi))
            judged = size >= tiny(result)
        if quantity == "gradient, elsewhere":
            judged[label] = False
        wants[quantity] = Want(value, spacing(size, result), judged)
    return wants


def in_parts(family: Family) -> Truth:
    """The same, a few rows at a time so that the many passes stay in the cache."""
    rows = max(1, 2**15 // family.x.shape[1])
    parts = [truth(family.x[i : i + rows], family.y[i : i + rows], family.x.dtype) for i in range(0, len(family.y), rows)]
    wants = {}
    for quantity in QUANTITIES:
        values, units, judged = zip(*(part[quantity] for part in parts), strict=True)
        value = DD(np.concatenate([v.hi for v in values]), np.concatenate([v.lo for v in values]))
        wants[quantity] = Want(value, np.concatenate(units), np.concatenate(judged))
    return wants


def errors(got: dict[str, Array], y: Array, wants: Truth) -> dict[str, Array]:
    """The errors of the judged entries, in ULP; ∞ for what is not finite and should be."""
    label = (np.arange(len(y)), y)
    gradient = got["gradient"]
    results = got | {"gradient, true class": gradient[label], "gradient, elsewhere": gradient}
    distances = {}
    for quantity, want in wants.items():
        value = results[quantity].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs((value - want.value.hi) - want.value.lo) / want.unit
        error = np.where(value == want.value.hi, np.abs(want.value.lo) / want.unit, error)
        judged = want.judged | ~np.isfinite(value)
        if quantity == "gradient, elsewhere":
            judged[label] = False
        distances[quantity] = np.where(np.isnan(error), np.inf, error)[judged]
    return distances


def check(family: Family, rows: int) -> float:
    """How far the double-double values are from mpmath's with 400 digits, in ULP of the results; of the first rows."""
    worst = mpmath.mpf(0)
    wants = truth(family.x[:rows], family.y[:rows], family.x.dtype)
    with mpmath.workdps(400):
        for r, label in enumerate(family.y[:rows]):
            x = [mpmath.mpf(float(v)) for v in family.x[r]]
            e = [mpmath.exp(v) for v in x]
            whole = mpmath.fsum(e)
            p, lse = [v / whole for v in e], mpmath.log(whole)
            for quantity, exact_values in (
                ("loss", [lse - x[label]]),
                ("logsumexp", [lse]),
                ("log_softmax", [v - lse for v in x]),
                ("softmax", p),
                ("gradient, true class", [p[label] - 1]),
                ("gradient, elsewhere", p),
            ):
                want = wants[quantity]
                hi, lo, unit, judged = (np.atleast_1d(a[r]) for a in (*want.value, want.unit, want.judged))
                for c, value in enumerate(exact_values):
                    if judged[c] and np.isfinite(hi[c]):
                        worst = max(worst, abs(mpmath.mpf(float(hi[c])) + mpmath.mpf(float(lo[c])) - value) / mpmath.mpf(float(unit[c])))
    return float(worst)
