"""The stated accuracy: 4 ulp for losses, log-probabilities and logsumexp, 8 ulp for probabilities and gradients, at every margin.

Every level, every dtype. 16-bit results may differ from the exact value by the float32 bound and then one rounding.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

import crossent as ce

from .levels import each_level
from .oracle import (
    BF16,
    DD,
    F16,
    F32,
    F64,
    assert_ulps,
    dd_log1p,
    exact,
    exact_gradient,
    exact_loss,
    round_to,
    row_dtype,
    target_mass,
    tiny,
    ulps,
)

LOSS, ENTRY = 4, 8
CLASSES = (2, 3, 10, 100, 1000, 32000)
SHIFTS = (0.0, 1e4, -1e4, 1e30, -1e30)


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return round_to(x, dtype).astype(dtype)


@functools.lru_cache(maxsize=4)
def family(classes: int, shift: float, dtype: np.dtype):
    """Rows whose largest logit stands 0 … 88 (float64: 700) above the others, which spread below; and the labels to ask for."""
    if dtype == F16:
        shift = float(np.clip(shift, -6e4, 6e4))
    rng = np.random.default_rng([classes, int(abs(shift)) % 2**32, shift < 0, dtype.num])
    margins = [0, 1e-3, 0.1, 0.5, 1, 2, 3, 5, 8, 12, 17, 20, 25, 33, 45, 60, 75, 88, *([88.5, 150, 400, 700] if dtype == F64 else [])]
    if classes > 1000:
        margins = margins[::5]
    x = -np.array(margins)[:, None] - rng.exponential(1.0, (len(margins), classes)) * rng.choice([0.0, 0.3, 3.0, 20.0], (len(margins), 1))
    top = rng.integers(0, classes, len(margins))
    x[np.arange(len(margins)), top] = 0.0
    near = rng.normal(0, 1, (2, classes)) * [[1], [10]]
    x = cast(np.concatenate([x, near, near[:1] * 0]) + shift, dtype)
    low, high = x.argmin(-1), x.argmax(-1)
    labels = np.stack([high, low, rng.integers(0, classes, len(x))])
    return x, labels, exact(x)


cases = pytest.mark.parametrize("classes", CLASSES)
shifts = pytest.mark.parametrize("shift", SHIFTS)


@cases
@shifts
def test_transforms(dtype, classes, shift):
    x, _, row = family(classes, shift, dtype)
    size = np.maximum(np.abs(row.m), np.abs(row.logsumexp.hi))
    for level in each_level():
        assert_ulps(ce.log_softmax(x), row.log_probs, dtype, LOSS, what=f"{level} log_softmax")
        assert_ulps(ce.softmax(x), row.probs, dtype, ENTRY, what=f"{level} softmax")
        assert_ulps(ce.logsumexp(x), row.logsumexp, dtype, LOSS, scale=size, what=f"{level} logsumexp")


@cases
@shifts
def test_index_targets(dtype, classes, shift):
    x, labels, row = family(classes, shift, dtype)
    for y in labels:
        mass = target_mass(x, y)
        want, (want_grad, _) = exact_loss(row, mass), exact_gradient(row, mass)
        for level in each_level():
            loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
            assert loss.dtype == row_dtype(dtype)
            assert grad.dtype == dtype
            assert_ulps(loss, want, dtype, LOSS, what=f"{level} loss")
            # No slack for cancellation: with one class per row each entry is a product or −Σ of the others.
            assert_ulps(grad, want_grad, dtype, ENTRY, what=f"{level} gradient")
            np.testing.assert_array_equal(ce.cross_entropy(x, y, reduction="none"), loss)


@pytest.mark.parametrize("axis", [-1, 0], ids=["rows", "columns"])
@pytest.mark.parametrize("classes", [64, 300, 1000])
def test_equal_classes_below_the_maximum(dtype, classes, axis):
    """Equal terms round the same way each time they are added: the hardest sums there are, and what blank or clipped classes look like."""
    rng = np.random.default_rng(classes)
    rows = 400
    y = rng.integers(0, classes, rows)
    x = np.zeros((rows, classes)) - rng.uniform(0.01, 30, (rows, 1))
    x[np.arange(rows), y] = 0.0
    x = cast(x, dtype)
    row = exact(x)
    size = np.maximum(np.abs(row.m), np.abs(row.logsumexp.hi))
    laid = np.ascontiguousarray(np.moveaxis(x, -1, axis))
    for level in each_level():
        assert_ulps(
            ce.cross_entropy(laid, y, axis=axis, reduction="none"), exact_loss(row, target_mass(x, y)), dtype, LOSS, what=f"{level} loss"
        )
        assert_ulps(ce.logsumexp(laid, axis=axis), row.logsumexp, dtype, LOSS, scale=size, what=f"{level} logsumexp")
        assert_ulps(ce.score_tokens(laid, y, axis=axis).logsumexp, row.logsumexp, dtype, LOSS, scale=size, what=f"{level} score")
        got = np.moveaxis(ce.softmax(laid, axis=axis), axis, -1)
        assert_ulps(got, row.probs, dtype, ENTRY, what=f"{level} softmax")


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
@pytest.mark.parametrize(("classes", "seed"), [(66, 12), (66, 50), (150, 54)])
def test_many_rows_of_one_rival(dtype, classes, seed):
    """One class has nearly all that the maximum leaves, so that errors do not average out: in some of these rows they once met."""
    rng = np.random.default_rng([classes, seed])
    x = (rng.standard_normal((6000, classes)) * 9).astype(dtype)
    row = exact(x)
    y, want = row.top.argmax(-1), dd_log1p(row.rest)
    for order in "CF":
        laid = np.asarray(x, order=order)
        for level in each_level():
            loss = ce.cross_entropy(laid, y, reduction="none")
            assert_ulps(loss, want, dtype, LOSS, what=f"{level} {order}")
            # 0.41 to 0.476; 0.48 to 0.6 without what sums and products lose on the way to the logarithm, which few rows show otherwise.
            assert dtype != F64 or ulps(loss, want, dtype).mean() < 0.48, f"{level} {order}"
            assert_ulps(-ce.log_softmax(laid)[np.arange(len(y)), y], want, dtype, LOSS, what=f"{level} {order} log_softmax")
            assert_ulps(-ce.score_tokens(laid, y).logprob, want, dtype, LOSS, what=f"{level} {order} score")
            assert_ulps(-ce.topk_logprobs(laid, 1)[0][:, 0], want, dtype, LOSS, what=f"{level} {order} top")


@cases
@pytest.mark.parametrize("shift", SHIFTS[:2])
@pytest.mark.parametrize("kind", ["smoothed", "weighted", "probs", "weighted probs"])
def test_dense_targets(dtype, classes, shift, kind):
    x, labels, row = family(classes, shift, dtype)
    rng = np.random.default_rng(classes)
    weight = (rng.random(classes) + 0.5).astype(row_dtype(dtype)) if "weighted" in kind else None
    # 2⁻³ is exact, so that 1 − e is too; probability targets leave the remainder to no class in particular.
    smoothing = 0.125 if kind == "smoothed" else 0.1 if dtype != F64 and kind == "weighted" else 0.0
    targets = [rng.random(x.shape).astype(row_dtype(dtype))] if "probs" in kind else labels
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    for target in targets:
        mass = target_mass(x, target, weight, smoothing)
        want, (want_grad, size) = exact_loss(row, mass), exact_gradient(row, mass)
        for level in each_level():
            loss, grad = ce.cross_entropy_with_grad(x, target, **options)
            assert_ulps(loss, want, dtype, LOSS, what=f"{level} loss")
            assert_ulps(grad, want_grad, dtype, ENTRY, scale=np.maximum(size, tiny(row_dtype(dtype))), what=f"{level} gradient")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_confident_rows_with_dense_targets_keep_their_digits(level, dtype, smoothing):
    """At the class of the maximum the gradient is Σ(other masses) − R/(1 + R)·ΣA: also when nearly all mass is there."""
    margins = np.array([20.0, 40.0, 60.0, 80.0])
    x = cast(np.stack([margins, margins * 0, margins * 0 - 1], -1), dtype)
    target = np.zeros(x.shape, row_dtype(dtype))
    target[:, 0] = 1
    row, mass = exact(x), target_mass(x, target, None, smoothing)
    loss, grad = ce.cross_entropy_with_grad(x, target, label_smoothing=smoothing, reduction="none")
    assert_ulps(loss, exact_loss(row, mass), dtype, LOSS, what="loss")
    want, size = exact_gradient(row, mass)
    assert_ulps(grad, want, dtype, ENTRY, scale=None if smoothing == 0 else size, what="gradient")
    assert np.all(grad[:, 0] != 0) or dtype == F16


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
def test_the_rounding_of_the_difference_is_not_lost(level, dtype):
    """exp(fl(x − m)) alone would be off by |x − m|/2 ulp: 40 ulp at 80 nats."""
    rng = np.random.default_rng(7)
    deep = 80 if dtype == F32 else 600
    x = np.concatenate([[[37.3]] * 64, 37.3 - deep + rng.random((64, 100))], -1).astype(dtype)
    row = exact(x)
    got = ce.softmax(x)
    assert ulps(got, row.probs, dtype).max() <= ENTRY
    # The family is a hard one: the naive way fails the bound on it.
    naive = np.exp(x - x.max(-1, keepdims=True))
    assert ulps(naive / naive.sum(-1, keepdims=True), row.probs, dtype).max() > ENTRY


@pytest.mark.parametrize("ties", [2, 3, 17, 64, 513])
def test_ties_of_the_maximum(level, dtype, ties):
    classes = ties + 3
    x = np.full((4, classes), -1.0)
    rng = np.random.default_rng(ties)
    for r in range(4):
        x[r, rng.permutation(classes)[:ties]] = [0.0, 2.5, 11.0, 60.0][r]
    x = cast(x, dtype)
    row = exact(x)
    assert_ulps(ce.softmax(x), row.probs, dtype, ENTRY, what="softmax")
    assert_ulps(ce.log_softmax(x), row.log_probs, dtype, LOSS, what="log_softmax")
    for y in (x.argmax(-1), x.argmin(-1), classes - 1 - x[:, ::-1].argmax(-1)):
        mass = target_mass(x, y)
        loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
        assert_ulps(loss, exact_loss(row, mass), dtype, LOSS, what="loss")
        assert_ulps(grad, exact_gradient(row, mass)[0], dtype, ENTRY, what="gradient")


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
@pytest.mark.parametrize("size", [1.0, 1e5, 2e5, 1e6, 1e8, 1e20, 1e37])
def test_large_logits_that_differ_by_a_few_ulp(level, dtype, size):
    """Around and beyond the grid of any rounding constant the differences are still exact."""
    steps = np.array([0, -1, -2, -3, -5, -8, -40, -1000])
    base = dtype.type(size)
    x = np.stack([s * (base + steps * np.spacing(base)) for s in (1, -1)]).astype(dtype)
    row = exact(x)
    assert_ulps(ce.softmax(x), row.probs, dtype, ENTRY, what="softmax")
    assert_ulps(ce.log_softmax(x), row.log_probs, dtype, LOSS, what="log_softmax")
    for y in range(len(steps)):
        mass = target_mass(x, np.full(2, y))
        loss, grad = ce.cross_entropy_with_grad(x, np.full(2, y), reduction="none")
        assert_ulps(loss, exact_loss(row, mass), dtype, LOSS, what="loss")
        assert_ulps(grad, exact_gradient(row, mass)[0], dtype, ENTRY, what="gradient")


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
def test_mixed_magnitudes_in_one_row(level, dtype):
    """Blocks on both sides of the rounding grid in one row, in every order."""
    rng = np.random.default_rng(3)
    for n in (5, 64, 1500, 4000):
        for giant in (3e5, 1e9, 1e30):
            x = rng.normal(0, 3, (6, n))
            x[0, 0], x[1, -1], x[2, n // 2] = -giant, -giant, -giant
            x[3, 0], x[4, -1], x[5, n // 2] = giant, giant, giant
            x = x.astype(dtype)
            row = exact(x)
            assert_ulps(ce.softmax(x), row.probs, dtype, ENTRY, what=f"softmax {n} {giant}")
            assert_ulps(ce.log_softmax(x), row.log_probs, dtype, LOSS, what=f"log_softmax {n} {giant}")
            mass = target_mass(x, np.arange(6) % n)
            _, grad = ce.cross_entropy_with_grad(x, np.arange(6) % n, reduction="none")
            assert_ulps(grad, exact_gradient(row, mass)[0], dtype, ENTRY, what=f"gradient {n} {giant}")


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
def test_axis_0_is_as_exact(level, dtype, classes):
    """The strided class axis has kernels of its own."""
    for shift in (0.0, 1e4):
        x, labels, row = family(classes, shift, dtype)
        assert_ulps(ce.softmax(np.ascontiguousarray(x.T), axis=0).T, row.probs, dtype, ENTRY, what="softmax")
        assert_ulps(ce.log_softmax(np.ascontiguousarray(x.T), axis=0).T, row.log_probs, dtype, LOSS, what="log_softmax")
        for y in labels:
            mass = target_mass(x, y)
            loss, grad = ce.cross_entropy_with_grad(np.ascontiguousarray(x.T), y, axis=0, reduction="none")
            assert_ulps(loss, exact_loss(row, mass), dtype, LOSS, what="loss")
            assert_ulps(grad.T, exact_gradient(row, mass)[0], dtype, ENTRY, what="gradient")


@pytest.mark.parametrize("dtype", [F16, BF16], ids=lambda d: d.name)
def test_sixteen_bit_gradients_are_rounded_once(level, dtype):
    """Including float16 results below its normal numbers, which matter in training."""
    rng = np.random.default_rng(11)
    x = cast(rng.normal(0, 4, (50, 300)), dtype)
    y = rng.integers(0, 300, 50)
    row = exact(x)
    _, grad = ce.cross_entropy_with_grad(x, y, reduction="none", grad_output=2.0**-6)
    want = exact_gradient(row, target_mass(x, y))[0].scaled(-6)
    assert_ulps(grad, want, dtype, ENTRY, what="gradient")
    below = (np.abs(want.hi) < tiny(F16)) & (np.abs(want.hi) > 2.0**-24)
    if dtype == F16:
        assert below.sum() > 100
        assert np.all(grad[below] != 0)


def test_mean_over_many_rows_is_a_float64_sum(level, dtype):
    rng = np.random.default_rng(5)
    x = cast(rng.normal(0, 3, (100_000, 3)), dtype)
    y = rng.integers(0, 3, len(x))
    rows = ce.cross_entropy(x, y, reduction="none").astype(np.float64)
    want = DD.of(rows).sum()
    assert abs(ce.cross_entropy(x, y, reduction="sum") - want.hi) <= 1e-15 * abs(want.hi) * 8
    assert abs(ce.cross_entropy(x, y) - want.hi / len(x)) <= 1e-15 * abs(want.hi / len(x)) * 8


@pytest.mark.parametrize("classes", [5, 100, 1000])
def test_tiny_upstream_gradients_keep_their_digits(level, classes):
    """As long as the entries are normal numbers: a loss scale, a temperature or a normalizer may be of any size."""
    rng = np.random.default_rng(classes)
    x = rng.normal(0, 3, (4, classes)).astype(F32)
    y = rng.integers(0, classes, 4)
    row = exact(x)
    gradient, _ = exact_gradient(row, target_mass(x, y))
    for exponent in (-60, -80, -100, -115):
        scale = 2.0**exponent
        _, grad = ce.cross_entropy_with_grad(x, y, reduction="none", grad_output=scale)
        assert_ulps(grad, gradient.scaled(exponent), F32, 8)
        _, grad = ce.cross_entropy_with_grad(x, y, reduction="sum", sample_weight=np.full(4, scale))
        assert_ulps(grad, gradient.scaled(exponent), F32, 8)


def test_no_probability_exceeds_1(level):
    """And the only class of a row has exactly 1."""
    rng = np.random.default_rng(7)
    for classes in (1, 2, 100, 1000):
        x = np.zeros((2000, classes), F32)
        x[:, 0] = rng.uniform(20, 200, 2000)
        x[:, 1:] = rng.normal(0, 1, (2000, classes - 1))
        for given, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
            assert ce.softmax(given, axis).max() == 1.0
    for dtype in (F32, F64):
        x = rng.normal(0, 10, (1000, 1)).astype(dtype)
        assert (ce.softmax(x, 1) == 1).all()
        assert (ce.softmax(x.T, 0) == 1).all()


@pytest.mark.parametrize("classes", [2, 10, 100, 3000])
def test_sure_rows_keep_the_digits_of_the_others(level, dtype, classes):
    """One class has everything, exactly; that takes nothing from what the others are known to."""
    rng = np.random.default_rng(classes)
    x = rng.normal(0, 3, (50, classes))
    best = rng.integers(0, classes, 50)
    margin = rng.uniform(25, 60, 50) if dtype != F64 else rng.uniform(50, 300, 50)
    x[np.arange(50), best] = x.max(1) + margin + np.log(classes)
    x = cast(x, dtype)
    want = exact(x).probs
    for given, axis in ((x, 1), (np.asfortranarray(x), 1), (np.ascontiguousarray(x.T), 0)):
        p = np.moveaxis(ce.softmax(given, axis), axis, 1)
        assert (p[np.arange(50), best] == 1).all()
        assert_ulps(p, want, dtype, 4, what="softmax")


def test_tied_maxima_cost_the_true_class_nothing(level):
    """Its probability is one over the sum, without the error of an exponential."""
    rng = np.random.default_rng(3)
    for classes in (2, 10, 100, 1000, 3000):
        for dtype in (F32, F64):
            x = rng.normal(0, 3, (50, classes)).astype(dtype)
            x[:, :2] = x.max(1)[:, None] + 1
            y = rng.integers(0, 2, 50)
            _, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
            want, _ = exact_gradient(exact(x), target_mass(x, y))
            at = np.arange(50), y
            assert_ulps(grad[at], DD(want.hi[at], want.lo[at]), dtype, 1.5, what="gradient")


@pytest.mark.parametrize("classes", [3, 4, 8, 10, 13, 15, 16, 21, 32])
def test_many_rows_of_few_classes(classes):
    """What one row in a million has: float32 sums in float32 are close to the bound, and few rows do not show it."""
    rng = np.random.default_rng(classes)
    for spread in (1.5, 2.5, 4.0):
        x = (rng.standard_normal((1_000_000 // classes, classes)) * spread).astype(np.float32)
        e = x.astype(np.float64)
        top = x.argmax(-1)
        rows = np.arange(len(x))
        e = np.exp(e - e[rows, top][:, None])
        p = e / e.sum(-1, keepdims=True)
        e[rows, top] = 0.0
        loss = np.log1p(e.sum(-1))
        for level in each_level():
            # The second one takes the general way, and changes no loss.
            for z_loss in (0.0, 1e-30):
                got = ce.cross_entropy(x, top, reduction="none", z_loss=z_loss)
                worst = (np.abs(got - loss) / np.spacing(loss.astype(np.float32))).max()
                assert worst <= LOSS, f"{level} loss, z_loss={z_loss}: {worst:.2f} ULP"
            worst = (np.abs(ce.softmax(x) - p) / np.spacing(p.astype(np.float32))).max()
            assert worst <= ENTRY, f"{level} softmax: {worst:.2f} ULP"
