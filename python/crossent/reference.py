"""The functions of crossent in plain float64 NumPy: the executable specification.

Every function has the name, arguments and meaning of its namesake in `crossent`, computes in float64 and returns float64. Nothing here is
fast, and nothing is shared with the compiled code: it is written to be read, and to test the compiled code against.

Notation: a *row* is one slice along the class axis and has C classes; u are the logits after softcap, temperature and mask; m is the
largest u of a row and k the first class that has it; R = Σ_{c≠k} exp(u_c − m), so that lse = m + log1p(R) and p_k = 1/(1 + R).
A_c is the *target mass* of a class: class weight times target probability, smoothing included. Then, for every kind of target,

    loss = Σ_c A_c·(m − u_c) + log1p(R)·ΣA,        ∂loss/∂u_c = p_c·ΣA − A_c.

Two things keep the digits of rows whose loss is tiny: R leaves the maximum out, and at class k the gradient is also available as
Σ_{c≠k}A_c − R/(1 + R)·ΣA, which does not subtract two numbers close to ΣA.
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "TokenScores",
    "cross_entropy",
    "cross_entropy_with_grad",
    "kl_divergence",
    "kl_divergence_with_grad",
    "log_softmax",
    "log_softmax_vjp",
    "logsumexp",
    "nll_loss",
    "nll_loss_with_grad",
    "score_tokens",
    "softmax",
    "softmax_vjp",
    "topk_logprobs",
]

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Out: TypeAlias = NDArray[Any]
Axes: TypeAlias = int | tuple[int, ...] | None


@runtime_checkable
class MixupLike(Protocol):
    """Two labels per row and the share of the first."""

    @property
    def y_a(self) -> ArrayLike: ...
    @property
    def y_b(self) -> ArrayLike: ...
    @property
    def lam(self) -> ArrayLike: ...


@runtime_checkable
class SparseProbsLike(Protocol):
    """A few classes per row and their probabilities."""

    @property
    def indices(self) -> ArrayLike: ...
    @property
    def probs(self) -> ArrayLike: ...


Target: TypeAlias = "ArrayLike | MixupLike | SparseProbsLike"


# --- arrays and axes --------------------------------------------------------------------------------------------------------------------


def _is_float(a: NDArray[Any]) -> bool:
    return a.dtype.name in ("float16", "bfloat16", "float32", "float64")


def _floats(name: str, value: ArrayLike) -> Floats:
    """Convert an array of any of the four float types to float64."""
    a = np.asarray(value)
    if not _is_float(a):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {a.dtype}")
    return a.astype(np.float64)


def _reals(name: str, value: ArrayLike) -> Floats:
    """Convert an array of any real type to float64."""
    a = np.asarray(value)
    if a.dtype.kind not in "biuf" and not np.can_cast(a.dtype, np.float64):
        raise TypeError(f"{name} must be real numbers, got {a.dtype}")
    return a.astype(np.float64)


def _axis(axis: int, ndim: int) -> int:
    axis = index(axis)
    if not -ndim <= axis < ndim:
        raise np.exceptions.AxisError(axis, ndim)
    return axis % ndim


def _axes(axis: Axes, ndim: int) -> tuple[int, ...]:
    given = tuple(range(ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(_axis(a, ndim) for a in given)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis {axis} names an axis twice")
    return axes


def _rows_of(x: Floats, axes: tuple[int, ...]) -> Floats:
    """Arrange the rows along the last axis: the other axes in their order, then all of `axes` as one."""
    others = [a for a in range(x.ndim) if a not in axes]
    shape = [x.shape[a] for a in others]
    classes = int(np.prod([x.shape[a] for a in axes], dtype=np.int64))
    return np.transpose(x, [*others, *axes]).reshape([*shape, classes])


def _rounding(a: Floats, b: Floats, total: Floats) -> Floats:
    """Give what `total`, the rounded a + b, lacks (Knuth's TwoSum); 0 where there is an infinity or nan."""
    v = total - a
    lost: Floats = (a - (total - v)) + (b - v)
    return np.where(np.isfinite(lost), lost, 0.0)


def _sum(terms: Floats) -> Floats:
    """Sum along the last axis, by halves, with the roundings added back at the end."""
    total, lost = terms, np.zeros(terms.shape)
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        odd = total[..., 2 * half :], lost[..., 2 * half :]
        a, b = total[..., :half], total[..., half : 2 * half]
        lost = np.concatenate([lost[..., :half] + lost[..., half : 2 * half] + _rounding(a, b, a + b), odd[1]], axis=-1)
        total = np.concatenate([a + b, odd[0]], axis=-1)
    result: Floats = np.sum(total, axis=-1) + np.sum(lost, axis=-1)
    return result


def _unrows(rows: Floats, axes: tuple[int, ...], shape: tuple[int, ...]) -> Floats:
    """Undo `_rows_of`."""
    others = [a for a in range(len(shape)) if a not in axes]
    order = [*others, *axes]
    return np.transpose(rows.reshape([shape[a] for a in order]), np.argsort(order))


def _deliver(result: Floats, out: Out | None) -> Out:
    if out is None:
        return result
    if out.shape != result.shape:
        raise ValueError(f"out must have shape {result.shape}, got {out.shape}")
    out[...] = result.astype(out.dtype)
    return out


# --- a row and its distribution ---------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """What is known of each row after one reading; rows without a finite maximum are nan throughout."""

    top: Bools  # (..., C) True at class k, the first that has the maximum
    below: Floats  # (..., C) m - u, at least 0
    rest: Floats  # (...) R
    probs: Floats  # (..., C) softmax
    logsumexp: Floats  # (...) by the convention of `logsumexp`: -inf and +inf stay


def _read(u: Floats) -> _Rows:
    highest = np.max(u, axis=-1, initial=-np.inf)
    m = np.where(np.isfinite(highest), highest, np.nan)[..., None]
    top = (u == m) & (np.cumsum(u == m, axis=-1) == 1)

    with np.errstate(all="ignore"):
        # u − m rounds, and exp(d + lost) = exp(d)·(1 + lost) to first order.
        d = u - m
        e = np.exp(d) * (1 + _rounding(u, -m, d))
        rest = _sum(np.where(top, 0.0, e))
        lse = np.where(np.isfinite(highest), highest + np.log1p(rest), highest)
        return _Rows(top=top, below=-d, rest=rest, probs=e / (1 + rest[..., None]), logsumexp=lse)


# --- row transforms ---------------------------------------------------------------------------------------------------------------------


def logsumexp(x: ArrayLike, /, axis: Axes = -1, *, keepdims: bool = False, out: Out | None = None) -> Out | float:
    """Logsumexp: m + log Σ exp(x − m); −inf without classes or with all −inf, +inf with a +inf.

    Parameters
    ----------
    x : array_like of float
    axis : int, tuple of int or None
        Axes to reduce; None is all of them.
    keepdims : bool
    out : ndarray, optional

    Returns
    -------
    ndarray of float64, or float when no axis is left
    """
    a = _floats("x", x)
    if a.ndim == 0 and axis in (0, -1):
        a, axis = a[None], 0
    axes = _axes(axis, a.ndim)
    result = _read(_rows_of(a, axes)).logsumexp
    if keepdims and np.ndim(x) > 0:
        result = np.expand_dims(result, axes)
    if out is None and result.ndim == 0:
        return float(result)
    return _deliver(result, out)


def _transform(x: ArrayLike, axis: Axes, out: Out | None, f: Callable[[_Rows], Floats]) -> Out:
    a = _floats("x", x)
    shape = a.shape
    if a.ndim == 0 and axis in (0, -1, None):
        a, axis = a[None], 0
    axes = _axes(axis, a.ndim)
    with np.errstate(all="ignore"):
        result = f(_read(_rows_of(a, axes)))
    return _deliver(_unrows(result, axes, a.shape).reshape(shape), out)


def softmax(x: ArrayLike, /, axis: Axes = -1, *, out: Out | None = None) -> Out:
    """Softmax: p_c = exp(x_c − m) / (1 + R).

    Parameters
    ----------
    x : array_like of float
    axis : int, tuple of int or None
    out : ndarray, optional

    Returns
    -------
    ndarray
        The shape of `x`; nan in rows that have a nan or +inf, or nothing but −inf.
    """
    return _transform(x, axis, out, lambda rows: rows.probs)


def log_softmax(x: ArrayLike, /, axis: Axes = -1, *, out: Out | None = None) -> Out:
    """Log-softmax: (x_c − m) − log1p(R).

    Parameters
    ----------
    x : array_like of float
    axis : int, tuple of int or None
    out : ndarray, optional

    Returns
    -------
    ndarray
        The shape of `x`; nan in rows that have a nan or +inf, or nothing but −inf.
    """
    return _transform(x, axis, out, lambda rows: -rows.below - np.log1p(rows.rest)[..., None])


def softmax_vjp(grad_output: ArrayLike, probs: ArrayLike, /, axis: int = -1, *, out: Out | None = None) -> Out:
    """Vector-Jacobian product p·(g − Σ g·p): the gradient for x of Σ g·softmax(x), from p = softmax(x).

    Parameters
    ----------
    grad_output, probs : array_like of float, same shape
    axis : int
    out : ndarray, optional

    Returns
    -------
    ndarray
    """
    g, p, along = _vjp_arguments(grad_output, probs, "probs", axis)
    with np.errstate(all="ignore"):
        result: Floats = p * (g - np.sum(g * p, axis=along, keepdims=True))
    return _deliver(result.reshape(np.shape(probs)), out)


def log_softmax_vjp(grad_output: ArrayLike, log_probs: ArrayLike, /, axis: int = -1, *, out: Out | None = None) -> Out:
    """Vector-Jacobian product g − exp(lp)·Σ g: the gradient for x of Σ g·log_softmax(x), from lp = log_softmax(x).

    Parameters
    ----------
    grad_output, log_probs : array_like of float, same shape
    axis : int
    out : ndarray, optional

    Returns
    -------
    ndarray
    """
    g, lp, along = _vjp_arguments(grad_output, log_probs, "log_probs", axis)
    with np.errstate(all="ignore"):
        result: Floats = g - np.exp(lp) * np.sum(g, axis=along, keepdims=True)
    return _deliver(result.reshape(np.shape(log_probs)), out)


def _vjp_arguments(grad_output: ArrayLike, second: ArrayLike, name: str, axis: int) -> tuple[Floats, Floats, int]:
    g, y = _floats("grad_output", grad_output), _floats(name, second)
    if g.shape != y.shape:
        raise ValueError(f"grad_output and {name} must have the same shape, got {g.shape} and {y.shape}")
    g, y = (a[None] if a.ndim == 0 else a for a in (g, y))
    return g, y, _axis(axis, y.ndim)


# --- targets ----------------------------------------------------------------------------------------------------------------------------


class _Mass(NamedTuple):
    """A target as the losses need it."""

    mass: Floats  # (..., C) A
    kept: Bools  # (...) False on ignored rows
    share: Floats  # (...) what the row adds to D, before the sample weight


def _labels(
    name: str, target: ArrayLike, *, shape: tuple[int, ...], classes: int, ignore_index: int | None, needed: Bools
) -> tuple[Ints, Bools]:
    """Class indices (0 on ignored rows) and which rows are kept."""
    y = np.asarray(target)
    if y.dtype.kind not in "iub" and np.can_cast(y.dtype, np.int64):
        y = y.astype(np.int64)  # int4 and the like
    if y.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {y.dtype}")
    if y.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {y.shape}")
    kept = needed & (np.ones(shape, np.bool_) if ignore_index is None else np.not_equal(y, ignore_index))
    for position in np.flatnonzero(kept & ~((y >= 0) & (y < classes)))[:1]:
        raise IndexError(f"{name}[{position}] = {y.flat[position]} is out of bounds for {classes} classes")
    return np.where(kept, y, 0).astype(np.int64), kept


def _one_hot(y: Ints, kept: Bools, classes: int) -> Bools:
    return np.equal(y[..., None], np.arange(classes)) & kept[..., None]


def _target_mass(target: Target, *, axis: int, w: Floats, mask: Bools, ignore_index: int | None, e: float, needed: Bools) -> _Mass:
    """Target mass A with weights, smoothing and mask, for all four kinds of target."""
    shape, classes = mask.shape[:-1], mask.shape[-1]
    with np.errstate(all="ignore"):
        # e·w/C on every class; under a mask on the C′ True classes only.
        spread = np.where(mask, e * w / np.sum(mask, axis=-1, keepdims=True), 0.0)

    def index_mass(name: str, labels: ArrayLike) -> _Mass:
        y, kept = _labels(name, labels, shape=shape, classes=classes, ignore_index=ignore_index, needed=needed)
        hit = _one_hot(y, kept, classes)
        mass = np.where(kept[..., None], np.where(hit, (1 - e) * w, 0.0) + spread, 0.0)
        return _Mass(mass, kept, np.sum(np.where(hit, w, 0.0), axis=-1))

    def probability_mass(probs: Floats) -> _Mass:
        if ignore_index is not None and ignore_index >= 0:
            raise ValueError(f"ignore_index={ignore_index} has no meaning with probability targets; use sample_weight=0")
        weighted = np.where(probs == 0, 0.0, w * probs)
        return _Mass((1 - e) * weighted + spread, needed, np.ones(shape))

    if isinstance(target, MixupLike):
        lam = _reals("lam", target.lam)
        if lam.shape not in ((), shape):
            raise ValueError(f"lam must be one number or have shape {shape}, got {lam.shape}")
        if not np.all((lam >= 0) & (lam <= 1)):
            raise ValueError("lam must lie in [0, 1]")
        a, b = index_mass("y_a", target.y_a), index_mass("y_b", target.y_b)
        lam = np.broadcast_to(lam, shape)
        mass = lam[..., None] * a.mass + (1 - lam[..., None]) * b.mass
        return _Mass(mass, a.kept | b.kept, lam * a.share + (1 - lam) * b.share)

    if isinstance(target, SparseProbsLike):
        indices, some = np.asarray(target.indices), _floats("probs", target.probs)
        if indices.ndim != len(shape) + 1 or indices.shape[:-1] != shape or some.shape != indices.shape:
            raise ValueError(f"indices and probs must have shape {shape} + (k,), got {indices.shape} and {some.shape}")
        read = np.broadcast_to(needed[..., None], indices.shape)
        y, kept = _labels("indices", indices, shape=indices.shape, classes=classes, ignore_index=None, needed=read)
        dense = np.zeros(mask.shape)
        for j in range(indices.shape[-1]):
            dense += np.where(_one_hot(y[..., j], kept[..., j], classes), some[..., j, None], 0.0)
        return probability_mass(dense)

    given = np.asarray(target)
    if _is_float(given) or given.dtype.kind == "f":
        if given.ndim != mask.ndim or np.moveaxis(given, axis, -1).shape != mask.shape:
            raise ValueError(f"float targets are class probabilities and must have the shape of the logits, got {given.shape}")
        return probability_mass(np.moveaxis(given, axis, -1).astype(np.float64))
    return index_mass("target", given)


# --- losses -----------------------------------------------------------------------------------------------------------------------------


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _class_weight(weight: ArrayLike | None, classes: int) -> Floats:
    if weight is None:
        return np.ones(classes)
    w = _reals("weight", weight)
    if w.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), got {w.shape}")
    return w


def _row_factor(grad_output: ArrayLike | None, shape: tuple[int, ...], reduction: str) -> Floats:
    if grad_output is None:
        return np.ones(shape)
    g = _reals("grad_output", grad_output)
    if g.shape != () and (reduction != "none" or g.shape != shape):
        raise ValueError(f"grad_output must be one number{f' or have shape {shape}' if reduction == 'none' else ''}, got {g.shape}")
    return np.broadcast_to(g, shape)


def _reduce(rows: Floats, divisor: float, reduction: str) -> Floats | float:
    if reduction == "none":
        return rows
    total = np.sum(rows)
    with np.errstate(all="ignore"):
        return float(total / divisor) if reduction == "mean" else float(total)


def _logits(name: str, value: ArrayLike, axis: int) -> tuple[Floats, int]:
    """Logits with the class axis last, and where it was."""
    x = _floats(name, value)
    if x.ndim == 0:
        raise ValueError(f"{name} must have a class axis, got a 0-d array")
    along = _axis(axis, x.ndim)
    return np.moveaxis(x, along, -1), along


def nll_loss(
    log_probs: ArrayLike,
    target: ArrayLike,
    /,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
) -> Floats | float:
    """Negative log-likelihood: l = −w[y]·log_probs[y], 0 on ignored rows; `mean` is Σ l / Σ w[y].

    Parameters
    ----------
    log_probs : array_like of float
    target : array_like of int
        The shape of `log_probs` without `axis`.
    axis : int
    weight : array_like, shape (C,), optional
    ignore_index : int or None
    reduction : {"mean", "sum", "none"}

    Returns
    -------
    float, or ndarray with the shape of `target`
    """
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    return _nll(log_probs, target, axis=axis, grad_output=None, **options)[0]


def nll_loss_with_grad(
    log_probs: ArrayLike,
    target: ArrayLike,
    /,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    grad_output: ArrayLike | None = None,
    out: Out | None = None,
) -> tuple[Floats | float, Out]:
    """`nll_loss` and its gradient: −w[y] at class y, 0 elsewhere, times `grad_output`, divided by Σ w[y] for `mean`.

    Parameters
    ----------
    grad_output : array_like, optional
        One number, or with `reduction="none"` one per row.
    out : ndarray, optional

    Returns
    -------
    loss, grad
    """
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    loss, grad = _nll(log_probs, target, axis=axis, grad_output=grad_output, **options)
    return loss, _deliver(grad, out)


def _nll(
    log_probs: ArrayLike, target: ArrayLike, *, axis: int, weight: Any, ignore_index: Any, reduction: Any, grad_output: ArrayLike | None
) -> tuple[Floats | float, Floats]:
    _check_reduction(reduction)
    x, along = _logits("log_probs", log_probs, axis)
    shape, classes = x.shape[:-1], x.shape[-1]
    w = _class_weight(weight, classes)
    factor = _row_factor(grad_output, shape, reduction)
    y, kept = _labels("target", target, shape=shape, classes=classes, ignore_index=ignore_index, needed=np.ones(shape, np.bool_))

    mass = np.where(_one_hot(y, kept, classes), w, 0.0)
    divisor = np.sum(mass)
    with np.errstate(all="ignore"):
        rows: Floats = np.sum(np.where(mass == 0, 0.0, -mass * x), axis=-1)
        scale = factor / divisor if reduction == "mean" else factor
        grad = np.where(_one_hot(y, kept, classes), -mass * scale[..., None], 0.0)
    return _reduce(rows, float(divisor), reduction), np.moveaxis(grad, -1, along)


def cross_entropy(
    logits: ArrayLike,
    target: Target,
    /,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: ArrayLike | None = None,
    normalizer: float | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    where: ArrayLike | None = None,
) -> Floats | float:
    """Cross-entropy of logits: l = s·(Σ_c A_c·(−log_softmax(u)_c) + ζ·lse²) per kept row, with u = softcap·tanh(x/softcap)/temperature.

    Index targets have A = (1−e)·w[y]·onehot(y) + e·w/C and add s·w[y] to the divisor D of the mean; probability targets have
    A = w·((1−e)·P + e/C) and add s. Rows that are ignored (`ignore_index`, `sample_weight` 0) give 0 and are not read.

    Parameters
    ----------
    logits : array_like of float
    target : array_like of int, array_like of float, Mixup or SparseProbs
        Class indices (the shape of the logits without `axis`), class probabilities (the shape of the logits), two labels per row with
        l = λ·l_a + (1−λ)·l_b, or a few classes per row with their probabilities.
    axis : int
    weight : array_like, shape (C,), optional
        w, one weight per class.
    ignore_index : int or None
    reduction : {"mean", "sum", "none"}
    label_smoothing : float
        e, in [0, 1].
    sample_weight : array_like, the shape of the rows, optional
        s, at least 0.
    normalizer : float, optional
        Replaces D.
    z_loss : float
        ζ.
    softcap, temperature : float
    where : array_like of bool, broadcastable to the logits, optional
        Classes under False have p = 0 and gradient 0, and get no smoothing.

    Returns
    -------
    float, or ndarray with the shape of the rows
    """
    return _cross_entropy(
        logits,
        target,
        axis=axis,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        sample_weight=sample_weight,
        normalizer=normalizer,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        where=where,
        grad_output=None,
    )[0]


def cross_entropy_with_grad(
    logits: ArrayLike,
    target: Target,
    /,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: ArrayLike | None = None,
    normalizer: float | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    where: ArrayLike | None = None,
    grad_output: ArrayLike | None = None,
    out: Out | None = None,
) -> tuple[Floats | float, Out]:
    """`cross_entropy` and its gradient for the logits: s·(p·ΣA − A + 2ζ·lse·p)·∂u/∂x·grad_output, divided by D for `mean`.

    Parameters
    ----------
    grad_output : array_like, optional
        One number, or with `reduction="none"` one per row.
    out : ndarray, optional

    Returns
    -------
    loss, grad
    """
    loss, grad = _cross_entropy(
        logits,
        target,
        axis=axis,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        sample_weight=sample_weight,
        normalizer=normalizer,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        where=where,
        grad_output=grad_output,
    )
    return loss, _deliver(grad, out)


def _cross_entropy(
    logits: ArrayLike,
    target: Target,
    *,
    axis: int,
    weight: ArrayLike | None,
    ignore_index: int | None,
    reduction: str,
    label_smoothing: float,
    sample_weight: ArrayLike | None,
    normalizer: float | None,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    where: ArrayLike | None,
    grad_output: ArrayLike | None,
) -> tuple[Floats | float, Floats]:
    # Options are numbers, also where they came as arrays of none.
    label_smoothing, z_loss, temperature = float(label_smoothing), float(z_loss), float(temperature)
    normalizer, softcap = (None if option is None else float(option) for option in (normalizer, softcap))
    _check_reduction(reduction)
    _check_option("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "in [0, 1]")
    _check_option("normalizer", normalizer, normalizer is None or 0 < normalizer < np.inf, "positive and finite")
    _check_option("z_loss", z_loss, -np.inf < z_loss < np.inf, "finite")
    _check_option("softcap", softcap, softcap is None or 0 < softcap < np.inf, "positive and finite")
    _check_option("temperature", temperature, 2.0**-1022 <= temperature < np.inf, "positive, finite and not subnormal")

    x, along = _logits("logits", logits, axis)
    shape, classes = x.shape[:-1], x.shape[-1]
    w = _class_weight(weight, classes)
    factor = _row_factor(grad_output, shape, reduction)
    mask = _mask(where, x.shape, along)
    s = np.ones(shape) if sample_weight is None else _reals("sample_weight", sample_weight)
    if s.shape != shape:
        raise ValueError(f"sample_weight must have shape {shape}, got {s.shape}")
    if not np.all(s >= 0):
        raise ValueError("sample_weight must not be negative or nan")

    a = _target_mass(target, axis=along, w=w, mask=mask, ignore_index=ignore_index, e=label_smoothing, needed=s > 0)
    # What is not read may hold anything: replaced before any arithmetic, so that no nan can come from it.
    u, slope = _effective_logits(np.where(a.kept[..., None], x, 0.0), softcap, temperature)
    row = _read(np.where(mask, u, -np.inf))
    total = _sum(a.mass)
    divisor = float(np.sum(np.where(a.kept, s * a.share, 0.0)) if normalizer is None else normalizer)

    with np.errstate(all="ignore"):
        losses = _sum(np.where(a.mass == 0, 0.0, a.mass * row.below)) + np.log1p(row.rest) * total
        grad = _gradient(row, a.mass, total)
        if z_loss != 0:
            losses = losses + z_loss * row.logsumexp**2
            grad = grad + 2 * z_loss * row.logsumexp[..., None] * row.probs
        losses = np.where(a.kept, s * losses, 0.0)
        scale = s * factor / divisor if reduction == "mean" else s * factor
        grad = np.where(a.kept[..., None] & mask, grad * slope * scale[..., None], 0.0)
    return _reduce(losses, divisor, reduction), np.moveaxis(grad, -1, along)


def _gradient(row: _Rows, mass: Floats, total: Floats) -> Floats:
    """p·ΣA − A, at the class of the maximum in the form that cancels less."""
    grad: Floats = row.probs * total[..., None] - mass
    p_top = 1 / (1 + row.rest)
    p_others = row.rest / (1 + row.rest)
    mass_top = np.sum(np.where(row.top, mass, 0.0), axis=-1)
    mass_others = _sum(np.where(row.top, 0.0, mass))
    direct_size = np.maximum(np.abs(p_top * total), np.abs(mass_top))
    others_size = np.maximum(np.abs(p_others * total), np.abs(mass_others))
    at_top = np.where(direct_size < others_size, p_top * total - mass_top, mass_others - p_others * total)
    return np.where(row.top, at_top[..., None], grad)


def _check_option(name: str, value: float | None, good: bool, accepted: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {accepted}, got {value}")


def _mask(where: ArrayLike | None, shape: tuple[int, ...], along: int) -> Bools:
    """`where` with the shape of the rows and the class axis last."""
    if where is None:
        return np.ones(shape, np.bool_)
    given = np.asarray(where)
    if given.dtype != np.bool_:
        raise TypeError(f"where must be boolean, got {given.dtype}")
    full = list(shape[:-1])
    full.insert(along, shape[-1])
    return np.moveaxis(np.broadcast_to(given, full), along, -1)


def _effective_logits(x: Floats, softcap: float | None, temperature: float) -> tuple[Floats, Floats]:
    """Compute u = softcap·tanh(x/softcap)/temperature and ∂u/∂x."""
    with np.errstate(all="ignore"):
        if softcap is None:
            return x / temperature, np.full(x.shape, 1 / temperature)
        q = np.exp(-2 * np.abs(x / softcap))  # 1 − tanh²(t) = 4q/(1 + q)² with q = exp(−2|t|): no cancellation
        return softcap * np.tanh(x / softcap) / temperature, 4 * q / (1 + q) ** 2 / temperature


# --- by-products ------------------------------------------------------------------------------------------------------------------------


class _TokenScores(NamedTuple):
    logprob: Floats
    logsumexp: Floats
    argmax: Ints
    entropy: Floats | None
    rank: Ints | None


class TokenScores(_TokenScores):
    """The result of `score_tokens`."""

    tokens: Ints

    @property
    def perplexity(self) -> float:
        """exp(−mean of logprob over the kept tokens)."""
        kept = self.argmax >= 0
        with np.errstate(all="ignore"):
            return float(np.exp(-np.sum(self.logprob[kept]) / np.float64(np.count_nonzero(kept))))

    @property
    def is_greedy(self) -> Bools:
        """Whether each token is the argmax; False where ignored."""
        return np.equal(self.argmax, self.tokens) & (self.argmax >= 0)


def score_tokens(
    logits: ArrayLike,
    tokens: ArrayLike,
    /,
    *,
    axis: int = -1,
    ignore_index: int | None = None,
    shift: bool = False,
    entropy: bool = False,
    rank: bool = False,
) -> TokenScores:
    """Log-probability, logsumexp and argmax per token; entropy −Σ p·log p and rank (classes with a larger logit) if asked for.

    Parameters
    ----------
    logits : array_like of float
    tokens : array_like of int
        The shape of the logits without `axis`.
    axis : int
    ignore_index : int or None
    shift : bool
        Score tokens[..., t+1] with the logits of t.
    entropy, rank : bool

    Returns
    -------
    TokenScores
        Ignored positions have logprob, logsumexp and entropy 0, argmax and rank −1.
    """
    x, _ = _logits("logits", logits, axis)
    y = np.asarray(tokens)
    if y.shape != x.shape[:-1]:
        raise ValueError(f"tokens must have shape {x.shape[:-1]}, got {y.shape}")
    if shift:
        if y.ndim == 0:
            raise ValueError("shift=True needs an axis of tokens")
        x, y = x[..., :-1, :], y[..., 1:]
    labels, kept = _labels(
        "tokens", y, shape=x.shape[:-1], classes=x.shape[-1], ignore_index=ignore_index, needed=np.ones(y.shape, np.bool_)
    )
    x = np.where(kept[..., None], x, 0.0)
    row = _read(x)
    hit = _one_hot(labels, kept, x.shape[-1])
    with np.errstate(all="ignore"):
        below = np.sum(np.where(hit, row.below, 0.0), axis=-1)
        logprob = -below - np.log1p(row.rest)
        spread = np.log1p(row.rest) + _sum(np.where(row.probs == 0, 0.0, row.probs * row.below))
    larger = np.sum(x > np.max(np.where(hit, x, -np.inf), axis=-1, keepdims=True, initial=-np.inf), axis=-1)
    # As NumPy has it: the first of equals, and the first nan of a row that has one.
    first = np.argmax(x, axis=-1) if x.shape[-1] else np.zeros(labels.shape, np.int64)
    scores = TokenScores(
        logprob=np.where(kept, logprob, 0.0),
        logsumexp=np.where(kept, row.logsumexp, 0.0),
        argmax=np.where(kept, first, -1),
        entropy=np.where(kept, spread, 0.0) if entropy else None,
        rank=np.where(kept, larger, -1) if rank else None,
    )
    scores.tokens = labels
    return scores


def topk_logprobs(logits: ArrayLike, k: int, /, *, axis: int = -1) -> tuple[Floats, Ints]:
    """Find the k largest entries of log_softmax in falling order, ties by lower index, and their classes.

    Parameters
    ----------
    logits : array_like of float
    k : int
        Between 0 and C.
    axis : int

    Returns
    -------
    logprobs, indices : ndarray
        The shape of the logits with k in place of C.
    """
    x, along = _logits("logits", logits, axis)
    if not 0 <= k <= x.shape[-1]:
        raise ValueError(f"k must lie in [0, {x.shape[-1]}], got {k}")
    order = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    best = np.take_along_axis(np.asarray(log_softmax(x)), order, axis=-1)
    return np.moveaxis(best, -1, along), np.moveaxis(order, -1, along).astype(np.int64)


def kl_divergence(
    p_logits: ArrayLike, q_logits: ArrayLike, /, *, axis: int = -1, temperature: float = 1.0, reduction: str = "none"
) -> Floats | float:
    """KL(P‖Q) = Σ p·(log p − log q) with P = softmax(p_logits/τ), Q = softmax(q_logits/τ) and 0·log 0 = 0; `mean` divides by rows.

    Parameters
    ----------
    p_logits, q_logits : array_like of float, same shape
    axis : int
    temperature : float
    reduction : {"mean", "sum", "none"}

    Returns
    -------
    float, or ndarray with the shape of the rows
    """
    return _kl(p_logits, q_logits, axis=axis, temperature=temperature, reduction=reduction, grad_output=None)[0]


def kl_divergence_with_grad(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    /,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    reduction: str = "none",
    grad_output: ArrayLike | None = None,
    out: Out | None = None,
) -> tuple[Floats | float, Out]:
    """`kl_divergence` and its gradient for q_logits: (q − p)/τ, times `grad_output`, divided by the number of rows for `mean`.

    Parameters
    ----------
    grad_output : array_like, optional
        One number, or with `reduction="none"` one per row.
    out : ndarray, optional

    Returns
    -------
    loss, grad
    """
    loss, grad = _kl(p_logits, q_logits, axis=axis, temperature=temperature, reduction=reduction, grad_output=grad_output)
    return loss, _deliver(grad, out)


def _kl(
    p_logits: ArrayLike, q_logits: ArrayLike, *, axis: int, temperature: float, reduction: str, grad_output: ArrayLike | None
) -> tuple[Floats | float, Floats]:
    _check_reduction(reduction)
    _check_option("temperature", temperature, 0 < temperature < np.inf, "positive and finite")
    a, along = _logits("p_logits", p_logits, axis)
    b, _ = _logits("q_logits", q_logits, axis)
    if a.shape != b.shape:
        raise ValueError(f"p_logits and q_logits must have the same shape, got {a.shape} and {b.shape}")
    shape = a.shape[:-1]
    factor = _row_factor(grad_output, shape, reduction)
    p, q = _read(a / temperature), _read(b / temperature)
    rows_count = float(np.prod(shape, dtype=np.int64))
    with np.errstate(all="ignore"):
        log_ratio = (q.below - p.below) + (np.log1p(q.rest) - np.log1p(p.rest))[..., None]
        # A −inf logit of P has p = 0 and adds nothing; one of Q alone is infinitely far, however small p is.
        terms = np.where(np.isposinf(log_ratio), np.inf, p.probs * log_ratio)
        losses = _sum(np.where(np.isposinf(p.below), 0.0, terms))
        scale = factor / rows_count if reduction == "mean" else factor
        losses = np.where(np.isnan(p.rest) | np.isnan(q.rest), np.nan, losses)
        grad = (q.probs - p.probs) / temperature * scale[..., None]
    return _reduce(losses, rows_count, reduction), np.moveaxis(grad, -1, along)
