"""By-products of one reading of the logits: scores of tokens, the largest log-probabilities, divergences of distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crossent import _core

if TYPE_CHECKING:
    from typing import Literal, SupportsFloat, SupportsIndex, TypeAlias

    from numpy.typing import ArrayLike, NDArray

    _Array: TypeAlias = NDArray[Any]
    _Loss: TypeAlias = float | np.floating[Any] | NDArray[Any]
    _Reduction: TypeAlias = Literal["mean", "sum", "none"]


class _Fields(NamedTuple):
    logprob: Any
    logsumexp: Any
    argmax: Any
    entropy: Any | None
    rank: Any | None


class TokenScores(_Fields):
    """What `score_tokens` says of each position: a named tuple of arrays of the tokens' shape (NumPy scalars for a single token).

    Attributes
    ----------
    logprob : ndarray of float32 or float64
        log p of the token, in nats; 0 where ignored.
    logsumexp : ndarray of float32 or float64
        log Σ exp(x); 0 where ignored.
    argmax : ndarray of int64
        The most probable class, the first of equals (and the first nan, as `numpy.argmax` has it); −1 where ignored.
    entropy : ndarray of float32 or float64, or None
        −Σ p·log p in nats, if asked for; 0 where ignored.
    rank : ndarray of int64, or None
        How many classes have a larger logit than the token, if asked for: 0 for a greedy token; −1 where ignored.

    Examples
    --------
    >>> scores = ce.score_tokens([[0.0, 2.0], [1.0, 1.0]], [1, 1])
    >>> scores.is_greedy
    array([ True, False])
    >>> round(scores.perplexity, 4)
    1.5069
    """

    _greedy: Any = None

    @property
    def perplexity(self) -> float:
        """Exp of the mean of −logprob over the positions that are not ignored; nan without any."""
        logprob = np.asarray(self.logprob)[np.asarray(self.argmax) >= 0]
        with np.errstate(all="ignore"):
            return float(np.exp(-np.sum(logprob, dtype=np.float64) / np.float64(logprob.size)))

    @property
    def is_greedy(self) -> Any:
        """Whether each token is the argmax: one bool per position, False where ignored."""
        return self._greedy


def score_tokens(
    logits: ArrayLike,
    tokens: ArrayLike,
    /,
    *,
    axis: SupportsIndex = -1,
    ignore_index: SupportsIndex | None = None,
    shift: bool = False,
    entropy: bool = False,
    rank: bool = False,
) -> TokenScores:
    """Score given tokens under a model: log-probabilities and what else one reading of the logits gives.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float32 or float64
        x, any layout, with C classes on `axis`.
    tokens : array_like of int
        y, the class index of each row: the shape of the logits without `axis`, any integer dtype.
    axis : int, default -1
        The class axis.
    ignore_index : int or None, default None
        Positions with this token are left out and never read.
    shift : bool, default False
        Score ``tokens[..., t + 1]`` with the logits of t, as a language model predicts: the results have one position less on the last
        axis, and neither the first token nor the last logits are read.
    entropy : bool, default False
        Also the entropy of each row.
    rank : bool, default False
        Also the rank of each token: how many classes have a larger logit.

    Returns
    -------
    TokenScores
        A named tuple of logprob, logsumexp, argmax, entropy and rank, the last two None unless asked for, with the properties `perplexity`
        and `is_greedy`. Floats are float64 for float64 logits, else float32. Ignored positions have logprob, logsumexp and entropy 0,
        argmax and rank −1.

    Raises
    ------
    IndexError
        If a token is neither a class nor `ignore_index`.
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, or `shift` has no axis to shift along.
    AxisError
        If there is no such axis.

    See Also
    --------
    cross_entropy : the loss alone, with weights, smoothing and gradients.

    Notes
    -----
    logprob = (x[y] − m) − log S with m the largest x and S = Σ exp(x − m); entropy = log S + Σ p·(m − x), in which nothing cancels. Of the
    given float32 or float64 logits logprob is within 4 ULP of the exact value, logsumexp within 4 ULP of max(abs(m), abs(logsumexp)), the
    entropy within 8 ULP. No array of the logits' size is made, and memory-mapped logits are streamed. The same bits for every number of
    threads.

    A −inf logit has probability 0 and adds nothing to the entropy; at the token it gives logprob −inf. A row that is all −inf, or holds
    +inf or nan, has logprob and entropy nan; its logsumexp is −inf, +inf or nan.

    Examples
    --------
    >>> logits = np.array([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]], dtype=np.float32)
    >>> scores = ce.score_tokens(logits, [0, 1], entropy=True, rank=True)
    >>> scores.logprob.round(4), scores.argmax, scores.rank
    (array([-0.2413, -2.9096], dtype=float32), array([0, 2]), array([0, 1]))
    >>> round(scores.perplexity, 4)
    4.8329
    """
    *fields, greedy = _core.score_tokens(logits, tokens, axis, ignore_index, shift, entropy, rank)
    scores = TokenScores(*fields)
    scores._greedy = greedy  # noqa: SLF001
    return scores


def topk_logprobs(logits: ArrayLike, k: SupportsIndex, /, *, axis: SupportsIndex = -1) -> tuple[_Array, _Array]:
    """Find the k most probable classes of each row and their log-probabilities, without an array of all.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float32 or float64
        x, any layout, with C classes on `axis`.
    k : int
        How many, from 0 to C.
    axis : int, default -1
        The class axis.

    Returns
    -------
    logprobs : ndarray
        The k largest entries of ``log_softmax(logits, axis)``, in nats, in falling order: the shape of the logits with k in place of C,
        float64 for float64 logits, else float32.
    indices : ndarray of int64
        Their classes; of equal logits the lower class first.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If k is negative or more than C, or the logits have no axis.
    AxisError
        If there is no such axis.

    Notes
    -----
    One reading of the logits. Entries are within 4 ULP of the exact value for the given float32 or float64 logits. A −inf logit comes after
    all finite ones, with log-probability −inf; nan comes last. A row that is all −inf, or holds +inf or nan, has log-probabilities nan.

    Examples
    --------
    >>> logprobs, indices = ce.topk_logprobs([[0.0, 3.0, 1.0, 3.0]], 3)
    >>> logprobs.round(4)
    array([[-0.7817, -0.7817, -2.7817]])
    >>> indices
    array([[1, 3, 2]])
    """
    return _core.topk_logprobs(logits, k, axis)  # type: ignore[no-any-return]


def kl_divergence(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    /,
    *,
    axis: SupportsIndex = -1,
    temperature: SupportsFloat = 1.0,
    reduction: _Reduction = "none",
) -> _Loss:
    """Compute KL(P‖Q) = Σ p·(log p − log q) of two distributions given by logits, in nats.

    Parameters
    ----------
    p_logits : array_like of float16, bfloat16, float32 or float64
        P = softmax(p_logits/τ): the truth, or the teacher of a distillation.
    q_logits : array_like of float16, bfloat16, float32 or float64
        Q = softmax(q_logits/τ): the model, or the student. The same shape; the dtype may be another.
    axis : int, default -1
        The class axis.
    temperature : float, default 1
        τ > 0, not subnormal in the type of the computation; for both. The result is not multiplied by τ².
    reduction : {"none", "mean", "sum"}
        One divergence per row, their mean (over all rows), or their sum.

    Returns
    -------
    float or ndarray
        A `float` for "mean" and "sum", the float64 sum of the rows. For "none" an array of the rows' shape, float64 if either dtype is,
        else float32.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape, `temperature` or `reduction` does not fit.
    AxisError
        If there is no such axis.

    See Also
    --------
    kl_divergence_with_grad : with the gradient for the logits of Q.

    Notes
    -----
    Σ p·(e^(−t) − 1 + t) with t the difference of the logits less a constant, and a correction of the second order: no term is negative, so
    that the digits of a small divergence survive where Σ p·(log p − log q) cancels [1]_. Of the given float32 logits the result is within
    32 ULP of the exact value, of float64 logits within 128 (wherever it is a normal number), however close P and Q are; and never negative.

    0·log 0 = 0: a class with a −inf logit in P adds nothing; one in Q alone gives inf. A row that is all −inf in either, or holds +inf or
    nan, gives nan. No rows: mean nan, sum 0. The same bits for every number of threads.

    References
    ----------
    .. [1] J. Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html (the estimator (r − 1) − log r).

    Examples
    --------
    >>> ce.kl_divergence([[0.0, 1.0], [2.0, 2.0]], [[0.0, 0.0], [2.0, 2.0]]).round(4)
    array([0.1109, 0.    ])
    """
    return _core.kl_divergence(p_logits, q_logits, axis, temperature, reduction)  # type: ignore[no-any-return]


def kl_divergence_with_grad(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    /,
    *,
    axis: SupportsIndex = -1,
    temperature: SupportsFloat = 1.0,
    reduction: _Reduction = "none",
    grad_output: ArrayLike | None = None,
    out: _Array | None = None,
) -> tuple[_Loss, _Array]:
    """Compute `kl_divergence` and its gradient for `q_logits`.

    Parameters
    ----------
    p_logits, q_logits, axis, temperature, reduction
        As in `kl_divergence`.
    grad_output : float or array_like, default 1
        What the gradient is multiplied by: one number, or with reduction "none" also one per row.
    out : ndarray, optional
        Where to put the gradient: shape and dtype of `q_logits`. ``out=q_logits`` (the very same array) works in place; any other overlap
        is refused.

    Returns
    -------
    loss : float or ndarray
        As from `kl_divergence`.
    grad : ndarray
        (q − p)/τ, times `grad_output`, divided by the number of rows for "mean"; shape and dtype of `q_logits` (native byte order), in
        their memory order.

    Raises
    ------
    TypeError, ValueError, AxisError
        As `kl_divergence`; nothing has been written then.

    Notes
    -----
    Entries are within 8 ULP of the larger of p and q (times the factors), and rounded once to the dtype of `q_logits`; where the same class
    has nearly all the mass of both, its entry comes from the others' and keeps its digits. A row of nan loss has gradients nan, a row of
    loss inf finite ones.

    Examples
    --------
    >>> loss, grad = ce.kl_divergence_with_grad([[0.0, 1.0]], [[0.0, 0.0]])
    >>> grad.round(4)
    array([[ 0.2311, -0.2311]])
    """
    return _core.kl_divergence_with_grad(  # type: ignore[no-any-return]
        p_logits, q_logits, axis, temperature, reduction, grad_output, out
    )
