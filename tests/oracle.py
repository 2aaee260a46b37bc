"""Exact values, and the distance to them in units in the last place.

The exact values come from double-double arithmetic (two float64 whose sum has about 106 bits), vectorised over arrays: fast enough for rows
of 32000 classes and 2⁴⁰ times finer than what is tested. `test_reference.py` checks it against mpmath.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

F16, BF16, F32, F64 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64)
DTYPES = (F16, BF16, F32, F64)
INDEX_DTYPES = tuple(np.dtype(d) for d in "bBhHiIlLqQ")

# Bits of the significand and exponent of the smallest normal number.
_FORMAT = {F16: (11, -14), BF16: (8, -126), F32: (24, -126), F64: (53, -1022)}


def row_dtype(dtype: np.dtype) -> np.dtype:
    """The type of losses and logsumexp."""
    return F64 if dtype == F64 else F32


def eps(dtype: np.dtype) -> float:
    """Half a unit in the last place, relative."""
    return 2.0 ** -_FORMAT[dtype][0]


def tiny(dtype: np.dtype) -> float:
    """The smallest normal number."""
    return 2.0 ** _FORMAT[dtype][1]


def largest(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def spacing(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The unit in the last place of `dtype` at `value`; below the normal numbers that of the smallest one."""
    bits, low = _FORMAT[dtype]
    magnitude = np.minimum(np.maximum(np.abs(np.asarray(value, np.float64)), 2.0**low), largest(dtype))
    return np.ldexp(1.0, np.frexp(magnitude)[1] - bits)


def round_to(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`value` (float64) rounded once to `dtype`, as float64: `astype` goes through float32 for bfloat16."""
    value = np.asarray(value, np.float64)
    if dtype == F64:
        return value.copy()
    with np.errstate(all="ignore"):
        unit = spacing(value, dtype)
        rounded = np.rint(value / unit) * unit
        finite = np.where(np.abs(rounded) > largest(dtype), np.copysign(np.inf, value), rounded)
        return np.where(np.isfinite(value), finite, value)


# --- double-double ----------------------------------------------------------------------------------------------------------------------


def _two_sum(a, b):
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def _quick_two_sum(a, b):
    s = a + b
    return s, b - (s - a)


def _split(a):
    t = 134217729.0 * a
    high = t - (t - a)
    return high, a - high


def _two_prod(a, b):
    p = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


class DD(NamedTuple):
    """hi + lo with |lo| at most half a unit in the last place of hi."""

    hi: np.ndarray
    lo: np.ndarray

    @staticmethod
    def of(value) -> DD:
        value = np.asarray(value, np.float64)
        return DD(value, np.zeros_like(value))

    def __add__(self, other):
        s, e = _two_sum(self.hi, other.hi)
        t, f = _two_sum(self.lo, other.lo)
        s, e = _quick_two_sum(s, e + t)
        return DD(*_quick_two_sum(s, e + f))

    def __neg__(self):
        return DD(-self.hi, -self.lo)

    def __sub__(self, other):
        return self + (-other)

    def __mul__(self, other):
        p, e = _two_prod(self.hi, other.hi)
        return DD(*_quick_two_sum(p, e + (self.hi * other.lo + self.lo * other.hi)))

    def __truediv__(self, other):
        q1 = self.hi / other.hi
        rest = self - other * DD.of(q1)
        q2 = rest.hi / other.hi
        rest = rest - other * DD.of(q2)
        q3 = rest.hi / other.hi
        return DD(*_quick_two_sum(q1, q2)) + DD.of(q3)

    def __getitem__(self, index):
        return DD(self.hi[index], self.lo[index])

    @property
    def shape(self):
        return self.hi.shape

    def scaled(self, exponent) -> DD:
        """Times 2^exponent."""
        return DD(np.ldexp(self.hi, exponent), np.ldexp(self.lo, exponent))

    def sum(self) -> DD:
        """Along the last axis, by halves."""
        x = self
        while x.shape[-1] > 1:
            n = x.shape[-1]
            half = x[..., : n // 2] + x[..., n // 2 : n // 2 * 2]
            x = DD(np.append(half.hi, x.hi[..., n // 2 * 2 :], -1), np.append(half.lo, x.lo[..., n // 2 * 2 :], -1))
        return x[..., 0] if x.shape[-1] else DD.of(np.zeros(self.shape[:-1]))


def where(condition, a: DD, b: DD) -> DD:
    return DD(np.where(condition, a.hi, b.hi), np.where(condition, a.lo, b.lo))


_LN2 = DD(np.float64(0.6931471805599453), np.float64(2.3190468138462996e-17))


def dd_exp(x: DD) -> DD:
    """exp for x ≤ 0; 0 below −800. Taylor at x·2⁻⁹ reduced by ln 2, squared nine times as expm1."""
    with np.errstate(all="ignore"):
        gone = ~(x.hi > -800)
        x = where(gone, DD.of(np.zeros(x.shape)), x)
        k = np.rint(x.hi / _LN2.hi)
        r = (x - DD.of(k) * _LN2).scaled(-9)
        s = DD.of(np.zeros(x.shape))
        for n in range(9, 0, -1):
            s = (r + r * s) / DD.of(np.full(x.shape, float(n)))
        for _ in range(9):
            s = s.scaled(1) + s * s
        result = (s + DD.of(np.ones(x.shape))).scaled(k.astype(np.int64))
        return where(gone, DD.of(np.zeros(x.shape)), result)


def dd_log1p(x: DD) -> DD:
    """log(1 + x) for x ≥ 0: 2·atanh(x/(2 + x)) when small, else one Newton step on exp."""
    one = DD.of(np.ones(x.shape))
    s = x / (x + one + one)
    t = s * s
    series = DD.of(np.zeros(x.shape))
    for n in range(21, 0, -2):
        series = series * t + one / DD.of(np.full(x.shape, float(n)))
    small = (s * series).scaled(1)
    y = DD.of(np.log1p(x.hi))
    newton = y + ((x + one) * dd_exp(-y) - one)
    return where(x.hi < 0.05, small, newton)


# --- exact rows -------------------------------------------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """What is to be computed from a matrix of logits, classes last."""

    top: np.ndarray  # True at the first class with the maximum
    m: np.ndarray
    rest: DD  # Σ exp(x − m) without the maximum
    probs: DD
    log_probs: DD
    logsumexp: DD


def exact(x: np.ndarray) -> Exact:
    """Of finite logits of any of the four types, shape (rows, C)."""
    x = np.asarray(x).astype(np.float64)
    m = x.max(-1, keepdims=True)
    top = np.zeros(x.shape, bool)
    np.put_along_axis(top, x.argmax(-1)[:, None], True, -1)
    d = DD(*_two_sum(x, -m))
    e = dd_exp(d)
    rest = where(top, DD.of(np.zeros(x.shape)), e).sum()
    log_rest = dd_log1p(rest)
    whole = rest + DD.of(np.ones(rest.shape))
    wide = DD(whole.hi[:, None], whole.lo[:, None])
    return Exact(top, m[:, 0], rest, e / wide, d - log_rest[:, None], DD.of(m[:, 0]) + log_rest)


def target_mass(x, target, weight=None, label_smoothing=0.0) -> DD:
    """A: the target with class weights and smoothing, shape (rows, C)."""
    shape = np.shape(x)
    classes = shape[-1]
    w = DD.of(np.broadcast_to(np.ones(classes) if weight is None else np.asarray(weight).astype(np.float64), shape))
    e = DD.of(np.full(shape, float(label_smoothing)))
    kept = DD.of(np.ones(shape)) - e
    target = np.asarray(target)
    share = (target[..., None] == np.arange(classes)) if target.dtype.kind in "iu" else target.astype(np.float64)
    return w * (DD.of(np.asarray(share, np.float64)) * kept + e / DD.of(np.full(shape, float(classes))))


def exact_loss(row: Exact, mass: DD) -> DD:
    """−Σ A·log p per row; the terms have one sign."""
    lp = row.log_probs
    return -where(mass.hi == 0, DD.of(np.zeros(lp.shape)), mass * lp).sum()


def exact_gradient(row: Exact, mass: DD) -> tuple[DD, np.ndarray]:
    """p·ΣA − A, and the size of the terms that a good computation subtracts."""
    zeros = DD.of(np.zeros(mass.shape))
    total = mass.sum()
    wide = DD(np.broadcast_to(total.hi[:, None], mass.shape), np.broadcast_to(total.lo[:, None], mass.shape))
    spread = row.probs * wide
    direct = spread - mass
    size = np.maximum(np.abs(spread.hi), np.abs(mass.hi))
    others = where(row.top, zeros, mass).sum()
    p_others = where(row.top, zeros, row.probs).sum() * total
    at_top = others - p_others
    top_size = np.maximum(np.abs(others.hi), np.abs(p_others.hi))[:, None]
    return where(row.top, DD(at_top.hi[:, None], at_top.lo[:, None]), direct), np.where(row.top, np.minimum(top_size, size), size)


# --- comparing --------------------------------------------------------------------------------------------------------------------------


def ulps(got, want: DD, dtype: np.dtype, scale=None) -> np.ndarray:
    """|got − want| in units in the last place of `dtype` at `scale` (default: at the exact value)."""
    got = np.asarray(got).astype(np.float64)
    with np.errstate(all="ignore"):
        error = np.abs((got - want.hi) - want.lo)
        return error / spacing(want.hi if scale is None else scale, dtype)


def assert_ulps(got, want: DD, dtype: np.dtype, bound: float, *, scale=None, what: str = "result") -> None:
    """Within `bound` units of float32 (float64 for float64), then rounded once if `got` has 16 bits.

    `dtype` is the type of the logits. Where the exact value is below the normal numbers it may come as anything between 0 and there.
    """
    got_dtype = np.asarray(got).dtype
    got = np.asarray(got).astype(np.float64)
    work = row_dtype(dtype)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, wanted {want.shape}"
    unit = spacing(want.hi if scale is None else scale, work)
    with np.errstate(all="ignore"):
        if got_dtype == work:
            good = np.abs((got - want.hi) - want.lo) <= bound * unit
            good |= (np.abs(want.hi) > largest(work)) & (got == np.copysign(np.inf, want.hi))
        else:
            good = (got >= round_to(want.hi - bound * unit, got_dtype)) & (got <= round_to(want.hi + bound * unit, got_dtype))
        good |= (np.abs(want.hi) < tiny(work)) & (np.abs(got) <= tiny(work))
    if not good.all():
        at = np.unravel_index(np.argmin(good), good.shape) if good.ndim else ()
        error = ulps(got, want, work, scale)
        raise AssertionError(
            f"{what}: {(~good).sum()} of {good.size} entries beyond {bound} ulp of {work}; "
            f"first at {tuple(map(int, at))}: got {got[at]!r}, wanted {want.hi[at]!r} ({error[at]:.2f} ulp), "
            f"worst {np.nanmax(error):.2f} ulp"
        )
