"""The functions of the public API: names, defaults and documentation. The work is done in `crossent._core`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crossent import _core

if TYPE_CHECKING:
    from typing import Literal, SupportsFloat, SupportsIndex, TypeAlias

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from crossent._types import Mixup, SparseProbs

    _Array: TypeAlias = NDArray[Any]
    _Axes: TypeAlias = int | tuple[int, ...] | None
    _Loss: TypeAlias = float | np.floating[Any] | NDArray[Any]
    _Reduction: TypeAlias = Literal["mean", "sum", "none"]


def logsumexp(x: ArrayLike, /, axis: _Axes = -1, *, keepdims: bool = False, out: _Array | None = None) -> Any:
    """Compute log Σ exp(x) along an axis, in nats.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32 or float64
        Any layout; a 0-d array counts as one class.
    axis : int, tuple of int or None, default -1
        Axis or axes to sum over; None for all.
    keepdims : bool, default False
        Keep the axes that are summed over, with length 1.
    out : ndarray, optional
        Where to put the result: its shape and dtype, no overlap with `x`.

    Returns
    -------
    ndarray or float
        float64 for float64 input, else float32. A `float` when everything is summed (and neither `keepdims` nor `out` is given).

    Raises
    ------
    TypeError
        Unless `x` has one of the four float types.
    AxisError
        If `x` has no such axis.
    ValueError
        If an axis is named twice, or `out` does not fit.

    Notes
    -----
    m + log1p(R), with m the largest x and R the sum of exp(x − m) over the others: no overflow, and R keeps its digits beside a large
    maximum [1]_. Within 4 ULP of max(|m|, |result|). All −inf, or no classes: −inf. A +inf: +inf. A nan: nan.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and softmax functions",
       IMA J. Numer. Anal. 41 (2021) 2311–2330.

    Examples
    --------
    >>> ce.logsumexp([[1000.0, 1000.0], [0.0, -1000.0]]).round(4)
    array([1000.6931,    0.    ])
    >>> round(ce.logsumexp([0.0, 0.0]), 4)
    0.6931
    """
    return _core.logsumexp(x, axis, keepdims, out)


def softmax(x: ArrayLike, /, axis: _Axes = -1, *, out: _Array | None = None) -> Any:
    """Compute exp(x) / Σ exp(x) along an axis.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32 or float64
        Any layout; a 0-d array counts as one class.
    axis : int, tuple of int or None, default -1
        Axis or axes along which the result sums to 1; None for all.
    out : ndarray, optional
        Where to put the result: `x`'s shape and dtype. `x` itself works in place; any other overlap is refused.

    Returns
    -------
    ndarray
        Shape and dtype of `x` (native byte order), in its memory order.

    Raises
    ------
    TypeError
        Unless `x` has one of the four float types.
    AxisError
        If `x` has no such axis.
    ValueError
        If an axis is named twice, or `out` does not fit.

    Notes
    -----
    Computed in float32, in float64 for float64, and rounded once. Entries are within 8 ULP of the exact value wherever that is a normal
    number. A row that is all −inf, or holds +inf or nan, is nan.

    Examples
    --------
    >>> ce.softmax([[1.0, 1.0], [0.0, 1000.0]])
    array([[0.5, 0.5],
           [0. , 1. ]])
    """
    return _core.softmax(x, axis, out)


def log_softmax(x: ArrayLike, /, axis: _Axes = -1, *, out: _Array | None = None) -> Any:
    """Compute x − log Σ exp(x) along an axis: log-probabilities in nats.

    Parameters
    ----------
    x : array_like of float16, bfloat16, float32 or float64
        Any layout; a 0-d array counts as one class.
    axis : int, tuple of int or None, default -1
        Axis or axes of the classes; None for all.
    out : ndarray, optional
        Where to put the result: `x`'s shape and dtype. `x` itself works in place; any other overlap is refused.

    Returns
    -------
    ndarray
        Shape and dtype of `x` (native byte order), in its memory order.

    Raises
    ------
    TypeError
        Unless `x` has one of the four float types.
    AxisError
        If `x` has no such axis.
    ValueError
        If an axis is named twice, or `out` does not fit.

    Notes
    -----
    (x − m) − log1p(R), with m the largest x and R the sum of exp(x − m) over the others, so that the entry of a confident class keeps its
    digits. Computed in float32, in float64 for float64, and rounded once; float32 and float64 entries are within 4 ULP of the exact value
    wherever that is a normal number. A −inf logit gives −inf. A row that is all −inf, or holds +inf or nan, is nan.

    Examples
    --------
    >>> ce.log_softmax([20.0, 0.0])
    array([-2.06115362e-09, -2.00000000e+01])
    """
    return _core.log_softmax(x, axis, out)


def softmax_vjp(grad_output: ArrayLike, probs: ArrayLike, /, axis: SupportsIndex = -1, *, out: _Array | None = None) -> Any:
    """Compute the gradient through `softmax`: p·(g − Σ g·p).

    Parameters
    ----------
    grad_output : array_like of float16, bfloat16, float32 or float64
        g, the gradient for the probabilities.
    probs : array_like of float16, bfloat16, float32 or float64
        p, what `softmax` returned; the same shape.
    axis : int, default -1
        The class axis.
    out : ndarray, optional
        Where to put the result: shape and dtype of `probs`, no overlap with either.

    Returns
    -------
    ndarray
        The gradient for the logits, with the dtype of `probs`.

    Raises
    ------
    TypeError
        If a dtype is not one of the four float types.
    AxisError
        If there is no such axis.
    ValueError
        If the shapes differ, or `out` does not fit.

    Notes
    -----
    Σ g·p is carried in float64.

    Examples
    --------
    >>> ce.softmax_vjp([1.0, 0.0], [0.25, 0.75])
    array([ 0.1875, -0.1875])
    """
    return _core.softmax_vjp(grad_output, probs, axis, out)


def log_softmax_vjp(grad_output: ArrayLike, log_probs: ArrayLike, /, axis: SupportsIndex = -1, *, out: _Array | None = None) -> Any:
    """Compute the gradient through `log_softmax`: g − exp(lp)·Σ g.

    Parameters
    ----------
    grad_output : array_like of float16, bfloat16, float32 or float64
        g, the gradient for the log-probabilities.
    log_probs : array_like of float16, bfloat16, float32 or float64
        lp, what `log_softmax` returned; the same shape.
    axis : int, default -1
        The class axis.
    out : ndarray, optional
        Where to put the result: shape and dtype of `log_probs`, no overlap with either.

    Returns
    -------
    ndarray
        The gradient for the logits, with the dtype of `log_probs`.

    Raises
    ------
    TypeError
        If a dtype is not one of the four float types.
    AxisError
        If there is no such axis.
    ValueError
        If the shapes differ, or `out` does not fit.

    Notes
    -----
    Σ g is carried in float64.

    Examples
    --------
    >>> ce.log_softmax_vjp([1.0, 0.0], np.log([0.25, 0.75])).round(4)
    array([ 0.75, -0.75])
    """
    return _core.log_softmax_vjp(grad_output, log_probs, axis, out)


def nll_loss(
    log_probs: ArrayLike,
    target: ArrayLike,
    /,
    *,
    axis: SupportsIndex = -1,
    weight: ArrayLike | None = None,
    ignore_index: SupportsIndex | None = -100,
    reduction: _Reduction = "mean",
) -> _Loss:
    """Compute the negative log-likelihood −w[y]·lp[y] of class indices, in nats.

    Parameters
    ----------
    log_probs : array_like of float16, bfloat16, float32 or float64
        lp, for example from `log_softmax`; nothing is normalised here.
    target : array_like of int
        y, the class index of each row: the shape of `log_probs` without the class axis, any integer dtype.
    axis : int, default -1
        The class axis. PyTorch's layout (N, C, …) has ``axis=1``.
    weight : array_like of real numbers, shape (C,), optional
        w, a weight per class; 1 when absent.
    ignore_index : int or None, default -100
        Rows with this target are left out and never read.
    reduction : {"mean", "sum", "none"}
        Mean over the kept rows (divided by the sum of their w[y]), sum, or one loss per row.

    Returns
    -------
    float or ndarray
        A `float` for "mean" and "sum". For "none" an array of the target's shape, float64 for float64 input, else float32; 0 in ignored
        rows.

    Raises
    ------
    IndexError
        If a target is neither a class nor `ignore_index`.
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape or `reduction` does not fit.
    AxisError
        If there is no such axis.

    See Also
    --------
    cross_entropy : from logits, in one pass.

    Notes
    -----
    The mean is nan without rows or when every row is ignored, the sum is then 0.

    Examples
    --------
    >>> log_probs = np.log([[0.5, 0.5], [0.9, 0.1]])
    >>> ce.nll_loss(log_probs, [0, 1], reduction="none").round(4)
    array([0.6931, 2.3026])
    """
    return _core.nll_loss(log_probs, target, axis, weight, ignore_index, reduction)  # type: ignore[no-any-return]


def nll_loss_with_grad(
    log_probs: ArrayLike,
    target: ArrayLike,
    /,
    *,
    axis: SupportsIndex = -1,
    weight: ArrayLike | None = None,
    ignore_index: SupportsIndex | None = -100,
    reduction: _Reduction = "mean",
    grad_output: ArrayLike | None = None,
    out: _Array | None = None,
) -> tuple[_Loss, _Array]:
    """Compute `nll_loss` and its gradient for the log-probabilities.

    Parameters
    ----------
    log_probs, target, axis, weight, ignore_index, reduction
        As in `nll_loss`.
    grad_output : float or array_like, default 1
        What the gradient is multiplied by: one number, or with reduction "none" also one per row.
    out : ndarray, optional
        Where to put the gradient: shape and dtype of `log_probs`. `log_probs` itself is overwritten in place; any other overlap is refused.

    Returns
    -------
    loss : float or ndarray
        As from `nll_loss`.
    grad : ndarray
        −w[y]·grad_output (divided by Σ w[y] for "mean") at the target, 0 elsewhere; shape and dtype of `log_probs`.

    Raises
    ------
    IndexError, TypeError, ValueError, AxisError
        As `nll_loss`; nothing has been written then.

    Examples
    --------
    >>> loss, grad = ce.nll_loss_with_grad(np.log([[0.5, 0.5], [0.9, 0.1]]), [0, 1])
    >>> grad
    array([[-0.5,  0. ],
           [ 0. , -0.5]])
    """
    return _core.nll_loss_with_grad(  # type: ignore[no-any-return]
        log_probs, target, axis, weight, ignore_index, reduction, grad_output, out
    )


def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike | Mixup | SparseProbs,
    /,
    *,
    axis: SupportsIndex = -1,
    weight: ArrayLike | None = None,
    ignore_index: SupportsIndex | None = -100,
    reduction: _Reduction = "mean",
    label_smoothing: SupportsFloat = 0.0,
    sample_weight: ArrayLike | None = None,
    normalizer: SupportsFloat | None = None,
    z_loss: SupportsFloat = 0.0,
    softcap: SupportsFloat | None = None,
    temperature: SupportsFloat = 1.0,
    where: ArrayLike | None = None,
) -> _Loss:
    """Compute the cross-entropy of logits and targets, in nats, in one pass over the logits.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float32 or float64
        x, any layout, with C classes on `axis`.
    target : array_like, Mixup or SparseProbs
        Integers (any integer dtype) are class indices y and have the logits' shape without the class axis. Floats are class probabilities P
        and have the logits' shape. `Mixup` has two labels per row, `SparseProbs` a few classes with probabilities.
    axis : int, default -1
        The class axis. PyTorch's layout (N, C, …) has ``axis=1``.
    weight : array_like of real numbers, shape (C,), optional
        w, a weight per class; 1 when absent.
    ignore_index : int or None, default -100
        Rows with this target are left out and never read. With probabilities it must be negative (and has no effect).
    reduction : {"mean", "sum", "none"}
        Mean (divided by D, see Notes), sum, or one loss per row.
    label_smoothing : float, default 0
        e in [0, 1], the share of the target that is spread over all classes.
    sample_weight : array_like of real numbers, optional
        s ≥ 0, one per row: multiplies the row's loss and its part of D. 0 leaves the row out: it is never read.
    normalizer : float, optional
        Positive; replaces D, and acts on "mean" only: the token count of an accumulation window, for example.
    z_loss : float, default 0
        ζ; adds ζ·logsumexp(x)² to each kept row.
    softcap : float, optional
        c > 0; the logits become c·tanh(x/c), before `temperature`.
    temperature : float, default 1
        τ > 0, not subnormal in the type of the computation; the logits become x/τ.
    where : array_like of bool, optional
        Broadcasts to the logits. False entries have probability 0 and gradient 0, get no share of the smoothing, and are never read.

    Returns
    -------
    float or ndarray
        A `float` for "mean" and "sum", the float64 sum of the rows. For "none" an array of the rows' shape, float64 for float64 logits,
        else float32; 0 in ignored rows.

    Raises
    ------
    IndexError
        If a target is neither a class nor `ignore_index`.
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape or an option does not fit, or `ignore_index` ≥ 0 comes with probabilities.
    AxisError
        If there is no such axis.

    See Also
    --------
    cross_entropy_with_grad : with the gradient, for little more.

    Notes
    -----
    With lp = x − logsumexp(x), per kept row [1]_ [2]_::

        indices:        l = (1 − e)·w[y]·(−lp[y]) + (e/C)·Σ_c w[c]·(−lp[c]),    D = Σ w[y]
        probabilities:  T = P·(1 − e) + e/C,  l = −Σ_c w[c]·T[c]·lp[c],         D = number of rows

    as in PyTorch, on any axis. Float32 and float64 losses are within 4 ULP of the exact value for the given logits; with `softcap`, or a
    `temperature` of float64 logits, for logits bent that way to within a rounding each. Computed in float32, in float64 for float64. The
    same bits for every number of threads; a row's loss does not depend on other rows.

    ============================================  ===========  ====  =====
    case                                          mean         sum   none
    ============================================  ===========  ====  =====
    no rows                                       nan          0     empty
    every row ignored                             nan          0     0
    all target weights 0                          nan          0     0
    −inf logit at the target                      inf          inf   inf
    −inf logit elsewhere                          finite, with smoothing inf
    all −inf, or +inf or nan in a kept row        nan
    zero probability or weight on a −inf logit    adds 0
    ============================================  ===========  ====  =====

    With a `normalizer` the mean is 0 when every row is ignored. A target under a False of `where` gives inf, a row of only False gives nan.

    References
    ----------
    .. [1] https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    .. [2] C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016 (label smoothing).

    Examples
    --------
    >>> logits = np.array([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]])
    >>> round(ce.cross_entropy(logits, [0, 2]), 4)
    0.1755
    >>> ce.cross_entropy(logits, [0, -100], reduction="none").round(4)
    array([0.2413, 0.    ])
    """
    return _core.cross_entropy(  # type: ignore[no-any-return]
        logits,
        target,
        axis,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        sample_weight,
        normalizer,
        z_loss,
        softcap,
        temperature,
        where,
    )


def cross_entropy_with_grad(
    logits: ArrayLike,
    target: ArrayLike | Mixup | SparseProbs,
    /,
    *,
    axis: SupportsIndex = -1,
    weight: ArrayLike | None = None,
    ignore_index: SupportsIndex | None = -100,
    reduction: _Reduction = "mean",
    label_smoothing: SupportsFloat = 0.0,
    sample_weight: ArrayLike | None = None,
    normalizer: SupportsFloat | None = None,
    z_loss: SupportsFloat = 0.0,
    softcap: SupportsFloat | None = None,
    temperature: SupportsFloat = 1.0,
    where: ArrayLike | None = None,
    grad_output: ArrayLike | None = None,
    out: _Array | None = None,
) -> tuple[_Loss, _Array]:
    """Compute `cross_entropy` and its gradient for the logits.

    Parameters
    ----------
    logits, target, axis, weight, ignore_index, reduction, label_smoothing
        As in `cross_entropy`.
    sample_weight, normalizer, z_loss, softcap, temperature, where
        As in `cross_entropy`.
    grad_output : float or array_like, default 1
        What the gradient is multiplied by: one number, or with reduction "none" also one per row.
    out : ndarray, optional
        Where to put the gradient: shape and dtype of the logits. ``out=logits`` (the very same array) works in place; any other overlap is
        refused.

    Returns
    -------
    loss : float or ndarray
        As from `cross_entropy`.
    grad : ndarray
        Shape and dtype of the logits (native byte order), in their memory order; 0 in ignored rows.

    Raises
    ------
    IndexError, TypeError, ValueError, AxisError
        As `cross_entropy`; nothing has been written then.

    Notes
    -----
    With p = softmax(x), times `grad_output`, divided by D for "mean"::

        indices:        (1 − e)·w[y]·(p − onehot(y)) + (e/C)·(p·Σw − w)
        probabilities:  p·Σ_c(w·T) − w·T

    Entries are within 8 ULP of the exact value, also where it is tiny: the true class of a confident row has −Σ of the others, never p − 1.
    (Of smoothed targets and probabilities, where p and the target nearly cancel, of the larger of the two; options as for the loss.)
    Each is rounded once to the logits' dtype. A −inf logit has gradient 0, or −1 at the target; a row of nan loss has gradients nan.

    Examples
    --------
    >>> loss, grad = ce.cross_entropy_with_grad(np.array([[20.0, 0.0]], dtype=np.float32), [0])
    >>> print(f"{loss:.2e}", grad)
    2.06e-09 [[-2.0611537e-09  2.0611537e-09]]
    """
    return _core.cross_entropy_with_grad(  # type: ignore[no-any-return]
        logits,
        target,
        axis,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        sample_weight,
        normalizer,
        z_loss,
        softcap,
        temperature,
        where,
        grad_output,
        out,
    )
