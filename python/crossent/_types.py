"""Targets that are more than one array, and the names of types."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Mixup(NamedTuple):
    """Two labels per row and the share of the first: the target of MixUp and CutMix, never made dense.

    ``cross_entropy(logits, Mixup(y_a, y_b, lam))`` is ``lam·l(y_a) + (1 − lam)·l(y_b)`` per row. A side that equals ``ignore_index`` drops
    out.

    Attributes
    ----------
    y_a, y_b : array_like of int
        Class indices, each with the logits' shape without the class axis.
    lam : array_like of float
        Share of ``y_a`` in [0, 1]: one number, or one per row.

    Examples
    --------
    >>> ce.Mixup([0, 1], [1, 1], 0.25).lam
    0.25
    """

    y_a: ArrayLike
    y_b: ArrayLike
    lam: ArrayLike


class SparseProbs(NamedTuple):
    """A few classes per row with their probabilities: the target of top-k distillation, never made dense.

    Classes that are not named have probability 0; a class that is named twice has the sum.

    Attributes
    ----------
    indices : array_like of int
        Class indices with the rows' shape + (k,). Out of range: IndexError.
    probs : array_like of float
        Their probabilities, the same shape.

    Examples
    --------
    >>> ce.SparseProbs([[0, 2]], [[0.9, 0.1]]).indices
    [[0, 2]]
    """

    indices: ArrayLike
    probs: ArrayLike
