"""What each special case means: one test per line of the contract's table and per item that is better than PyTorch on purpose."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import crossent as ce
from crossent import reference

from .oracle import DTYPES, F16, F64, INDEX_DTYPES, assert_ulps, eps, exact, exact_gradient, exact_loss, largest, row_dtype, target_mass

INF, NAN = np.inf, np.nan
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(autouse=True)
def _every_level(level):
    """All of this at every instruction-set level."""


def close(got, want, dtype, factor=8):
    """Relative, in the units of the type of `got`."""
    got = np.asarray(got)
    unit = max(eps(np.dtype(got.dtype)), eps(row_dtype(dtype)))
    # Below its normal numbers float16 rounds by up to half its smallest step.
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=factor * unit, atol=2.0**-25 if got.dtype == F16 else 0)


def is_float(value):
    assert type(value) is float, type(value)
    return value


# --- the plain meaning -----------------------------------------------------------------------------------------------------------------


def test_the_definition_on_a_known_example(dtype):
    x = np.array(
        [
            [0.9826, 1.0630, -0.4096],
            [-0.6213, 0.2511, 0.5659],
            [0.5662, 0.7360, -0.6783],
            [-0.4638, -1.4961, -1.0877],
            [1.8186, -0.2998, 0.1128],
        ]
    )
    target = np.array([1, 0, 1, 1, 1])
    x = x.astype(dtype)
    values = [
        ce.cross_entropy(x, target),
        ce.nll_loss(ce.log_softmax(x), target),
        float(np.mean(-np.log(ce.softmax(x).astype(np.float64))[np.arange(5), target])),
    ]
    for value in values:
        assert value == pytest.approx(1.4904, abs=6e-5 if dtype.itemsize >= 4 else 0.01)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_result_types(dtype, reduction):
    x = np.zeros((4, 3), dtype)
    target = np.array([0, 1, 2, -100])
    loss, grad = ce.cross_entropy_with_grad(x, target, reduction=reduction)
    for result in (loss, ce.cross_entropy(x, target, reduction=reduction), ce.nll_loss(x, target, reduction=reduction)):
        if reduction == "none":
            assert isinstance(result, np.ndarray)
            assert result.dtype == row_dtype(dtype)
            assert result.shape == (4,)
        else:
            is_float(result)
    assert grad.dtype == dtype
    assert grad.shape == x.shape


def test_results_without_an_axis(dtype):
    x = np.array([1.0, 2.0, 3.0]).astype(dtype)
    want = reference.logsumexp(x)
    close(is_float(ce.logsumexp(x)), want, dtype)
    close(is_float(ce.logsumexp(np.stack([x, x]), axis=None)), reference.logsumexp(np.stack([x, x]), axis=None), dtype)
    kept = ce.logsumexp(x, keepdims=True)
    assert kept.shape == (1,)
    assert kept.dtype == row_dtype(dtype)
    row = ce.cross_entropy(x, np.int64(1), reduction="none")
    assert np.shape(row) == ()
    assert row.dtype == row_dtype(dtype)
    loss, grad = ce.cross_entropy_with_grad(x, 1)
    close(is_float(loss), reference.cross_entropy(x, 1), dtype)
    assert grad.shape == (3,)
    close(ce.cross_entropy(x, np.array([0.25, 0.25, 0.5], dtype)), reference.cross_entropy(x, np.array([0.25, 0.25, 0.5])), dtype)


def test_zero_dimensional_transforms(dtype):
    """A 0-d array is one class."""
    x = np.array(2.5, dtype)
    for axis in (0, -1, None, ()):
        assert float(ce.log_softmax(x, axis)) == 0.0
        assert is_float(ce.logsumexp(x, axis)) == is_float(ce.logsumexp(x, axis, keepdims=True)) == 2.5
    for axis in (0, -1):
        assert float(ce.softmax(x, axis)) == 1.0
        assert float(ce.log_softmax(x, axis)) == 0.0
        assert ce.logsumexp(x, axis) == 2.5
        assert float(ce.softmax_vjp(x, ce.softmax(x, axis), axis)) == 0.0
        assert float(ce.log_softmax_vjp(x, ce.log_softmax(x, axis), axis)) == 0.0
    for result in (ce.softmax(x), ce.log_softmax(x), ce.softmax_vjp(x, x), ce.log_softmax_vjp(x, x)):
        assert np.shape(result) == ()
        assert result.dtype == dtype


def test_zero_dimensional_logits_have_no_loss(dtype):
    for f in (ce.cross_entropy, ce.cross_entropy_with_grad, ce.nll_loss, ce.nll_loss_with_grad):
        with pytest.raises(ValueError, match=r"0-d|class axis|dimension"):
            f(np.array(1.0, dtype), 0)


def test_mean_divides_by_the_target_weights_also_with_smoothing(dtype):
    x = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0], [1.0, 1.0, 0.0]]).astype(dtype)
    y, w = np.array([0, 2, -100]), np.array([0.5, 2.0, 4.0])
    for e in (0.0, 0.25):
        rows = ce.cross_entropy(x, y, weight=w, label_smoothing=e, reduction="none").astype(np.float64)
        assert ce.cross_entropy(x, y, weight=w, label_smoothing=e) == pytest.approx(rows.sum() / 4.5, rel=1e-14)
        assert ce.cross_entropy(x, y, weight=w, label_smoothing=e, reduction="sum") == pytest.approx(rows.sum(), rel=1e-14)


def test_probability_targets_divide_by_rows_not_by_weights(dtype):
    x = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]).astype(dtype)
    p, w = np.array([[0.25, 0.5, 0.5], [1.0, 0.0, 0.0]]).astype(dtype), np.array([0.5, 2.0, 4.0])
    rows = ce.cross_entropy(x, p, weight=w, label_smoothing=0.25, reduction="none").astype(np.float64)
    assert ce.cross_entropy(x, p, weight=w, label_smoothing=0.25) == pytest.approx(rows.sum() / 2, rel=1e-14)
    t = p.astype(np.float64) * 0.75 + 0.25 / 3
    close(rows, -(w * t * reference.log_softmax(x)).sum(-1), dtype, 16)


def test_nll_loss(dtype):
    lp = np.array([[-1.0, -2.0, -3.0], [-0.5, -4.0, -8.0], [NAN, NAN, NAN]]).astype(dtype)
    y, w = np.array([2, 0, 7]), np.array([2.0, 1.0, 0.5])
    loss, grad = ce.nll_loss_with_grad(lp, y, weight=w, ignore_index=7)
    assert loss == pytest.approx((1.5 + 1.0) / 2.5)
    close(grad, [[0, 0, -0.2], [-0.8, 0, 0], [0, 0, 0]], dtype)
    rows, grad = ce.nll_loss_with_grad(lp, y, weight=w, ignore_index=7, reduction="none", grad_output=np.array([3.0, 2.0, NAN]))
    np.testing.assert_array_equal(rows, [1.5, 1.0, 0.0])
    np.testing.assert_array_equal(grad.astype(float), [[0, 0, -1.5], [-4, 0, 0], [0, 0, 0]])


def test_grad_output(dtype):
    x = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]).astype(dtype)
    y = np.array([0, 2])
    for reduction in REDUCTIONS:
        _, want = reference.cross_entropy_with_grad(x, y, reduction=reduction, grad_output=-3.0)
        for g in (-3, -3.0, np.float32(-3), np.array(-3.0)):
            close(ce.cross_entropy_with_grad(x, y, reduction=reduction, grad_output=g)[1], want, dtype)
    g = np.array([0.5, -2.0])
    _, want = reference.cross_entropy_with_grad(x, y, reduction="none", grad_output=g)
    for d in DTYPES:
        close(ce.cross_entropy_with_grad(x, y, reduction="none", grad_output=g.astype(d))[1], want, dtype)


# --- the table -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 5, 0), (0, 5, 4)])
def test_no_rows(dtype, shape):
    axis = 1
    x = np.zeros(shape, dtype)
    y = np.zeros((shape[0], *shape[2:]), np.int64)
    for f in (ce.cross_entropy, ce.nll_loss):
        assert np.isnan(is_float(f(x, y, axis=axis)))
        assert is_float(f(x, y, axis=axis, reduction="sum")) == 0.0
        none = f(x, y, axis=axis, reduction="none")
        assert none.shape == y.shape
        assert none.dtype == row_dtype(dtype)
    for target in (y, x):
        loss, grad = ce.cross_entropy_with_grad(x, target, axis=axis)
        assert np.isnan(loss)
        assert grad.shape == shape
        assert grad.dtype == dtype


def test_every_row_ignored(dtype):
    x = np.full((3, 4), NAN, dtype)
    y = np.full(3, -100)
    for f, g in ((ce.cross_entropy, ce.cross_entropy_with_grad), (ce.nll_loss, ce.nll_loss_with_grad)):
        for reduction, want in (("mean", NAN), ("sum", 0.0), ("none", np.zeros(3))):
            np.testing.assert_array_equal(f(x, y, reduction=reduction), want)
            loss, grad = g(x, y, reduction=reduction)
            np.testing.assert_array_equal(loss, want)
            np.testing.assert_array_equal(grad.astype(float), np.zeros((3, 4)))


def test_all_target_weights_zero(dtype):
    x = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [0, 0, 0]]).astype(dtype)
    y, w = np.array([0, 0, -100]), np.array([0.0, 1.0, 1.0])
    loss, grad = ce.cross_entropy_with_grad(x, y, weight=w)
    assert np.isnan(loss)
    assert np.isnan(grad[:2].astype(float)).all()
    np.testing.assert_array_equal(grad[2].astype(float), 0)
    assert ce.cross_entropy(x, y, weight=w, reduction="sum") == 0.0
    for reduction in ("sum", "none"):
        loss, grad = ce.cross_entropy_with_grad(x, y, weight=w, reduction=reduction)
        np.testing.assert_array_equal(loss, 0 if reduction == "sum" else np.zeros(3))
        np.testing.assert_array_equal(grad.astype(float), 0)
    loss, grad = ce.nll_loss_with_grad(x, y, weight=w)
    assert np.isnan(loss)
    assert np.isnan(grad[:2, 0].astype(float)).all()


@pytest.mark.parametrize("classes", [2, 3, 10, 65, 1030])
def test_minus_infinity_off_target(dtype, classes):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 2, (5, classes)).astype(dtype)
    y = rng.integers(0, classes, 5)
    masked = (y + 1) % classes
    x[np.arange(5), masked] = -INF
    loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
    assert np.isfinite(loss).all()
    want_loss, want_grad = reference.cross_entropy_with_grad(x, y, reduction="none")
    close(loss, want_loss, dtype)
    close(grad, want_grad, dtype, 16)
    np.testing.assert_array_equal(grad[np.arange(5), masked].astype(float), 0)
    # With smoothing some of the target lies on the impossible class …
    assert np.isposinf(ce.cross_entropy(x, y, label_smoothing=0.1, reduction="none")).all()
    loss, grad = ce.cross_entropy_with_grad(x, y, label_smoothing=0.1, reduction="none")
    assert np.isposinf(loss).all()
    close(grad[np.arange(5), masked], -0.1 / classes, dtype)
    # … unless its weight is 0.
    same = np.full(5, masked[0])
    x[:] = rng.normal(0, 2, (5, classes)).astype(dtype)
    x[:, same[0]] = -INF
    w = np.ones(classes)
    w[same[0]] = 0
    y[:] = (same + 1) % classes
    loss, grad = ce.cross_entropy_with_grad(x, y, label_smoothing=0.1, weight=w, reduction="none")
    assert np.isfinite(loss).all()
    close(loss, reference.cross_entropy(x, y, label_smoothing=0.1, weight=w, reduction="none"), dtype)
    np.testing.assert_array_equal(grad[:, same[0]].astype(float), 0)


@pytest.mark.parametrize("classes", [2, 3, 10, 65, 1030])
def test_minus_infinity_at_the_target(dtype, classes):
    rng = np.random.default_rng(1)
    x = rng.normal(0, 2, (5, classes)).astype(dtype)
    y = rng.integers(0, classes, 5)
    x[np.arange(5), y] = -INF
    loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
    assert np.isposinf(loss).all()
    want = reference.softmax(x)
    want[np.arange(5), y] = -1
    close(grad, want, dtype)
    for reduction in ("mean", "sum"):
        assert np.isposinf(ce.cross_entropy(x, y, reduction=reduction))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("classes", [2, 10, 65, 1000, 1030, 5000, 140_000])
def test_classes_without_a_share_have_exactly_none(dtype, classes, order):
    """Whatever multiplies it: what is far below the maximum is 0, not something small."""
    large = {2: 6e4, 4: 1e37, 8: 1e150}[dtype.itemsize]
    rows = 3 if classes > 10_000 else 20
    x = np.full((rows, classes), -INF)
    x[1::2] = -65_000
    top = np.arange(rows) * 7 % classes
    x[np.arange(rows), top] = 1.5
    x = np.asarray(x.astype(dtype), order=order)
    onehot = np.arange(classes) == top[:, None]
    assert np.array_equal(ce.softmax(x).astype(np.float64), onehot)
    assert not ce.log_softmax(x)[onehot].any()
    for options in ({}, {"weight": np.full(classes, large)}, {"sample_weight": np.full(rows, large)}):
        loss, grad = ce.cross_entropy_with_grad(x, top, reduction="none", grad_output=large, **options)
        assert not loss.any(), options
        assert not grad.any(), options
        assert not ce.cross_entropy(x, top, reduction="none", **options).any(), options
        _, grad = ce.cross_entropy_with_grad(x, (top + 1) % classes, reduction="none", grad_output=large, **options)
        assert np.array_equal(grad != 0, onehot | np.roll(onehot, 1, axis=1)), options


@pytest.mark.parametrize("bad", ["all -inf", "inf", "two inf", "nan", "nan and inf", "nan and -inf"])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 65, 1030])
def test_rows_without_a_distribution(dtype, classes, bad):
    """Nan in that row of everything, and nothing in the others."""
    rng = np.random.default_rng(2)
    x = rng.normal(0, 2, (4, classes)).astype(dtype)
    at = rng.permutation(classes)
    if bad == "all -inf":
        x[1] = -INF
    x[1, at[0]] = {"all -inf": -INF, "inf": INF, "two inf": INF, "nan": NAN, "nan and inf": NAN, "nan and -inf": NAN}[bad]
    if classes > 1:
        x[1, at[1]] = {"two inf": INF, "nan and inf": INF, "nan and -inf": -INF}.get(bad, x[1, at[1]])
    y = rng.integers(0, classes, 4)
    good = [0, 2, 3]
    probs = rng.random((4, classes)).astype(row_dtype(dtype))
    for f in (ce.softmax, ce.log_softmax):
        result = f(x)
        assert np.isnan(result[1].astype(float)).all()
        np.testing.assert_array_equal(result[good], f(x[good]))
    for target in (y, probs):
        for options in ({}, {"label_smoothing": 0.1}, {"weight": np.zeros(classes)}):
            rows = ce.cross_entropy(x, target, reduction="none", **options)
            loss, grad = ce.cross_entropy_with_grad(x, target, reduction="none", **options)
            np.testing.assert_array_equal(rows, loss)
            assert np.isnan(loss[1])
            assert np.isnan(grad[1].astype(float)).all()
            want_loss, want_grad = ce.cross_entropy_with_grad(x[good], target[good], reduction="none", **options)
            np.testing.assert_array_equal(loss[good], want_loss)
            np.testing.assert_array_equal(grad[good], want_grad)
            assert np.isnan(ce.cross_entropy(x, target, **options))
            assert np.isnan(ce.cross_entropy(x, target, reduction="sum", **options))


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 65, 1030])
def test_logsumexp_of_infinities(dtype, classes):
    x = np.zeros((6, classes), dtype)
    x[0] = -INF
    x[1, -1] = INF
    x[2, classes // 2] = NAN
    x[3], x[3, 0] = -INF, 1.0
    x[4] = INF
    got = ce.logsumexp(x)
    np.testing.assert_array_equal(got[:3], [-INF, INF, NAN])
    np.testing.assert_array_equal(got[3:5], [1.0, INF])
    close(got[5], np.log(classes), dtype)


def test_logsumexp_without_classes(dtype):
    np.testing.assert_array_equal(ce.logsumexp(np.zeros((3, 0), dtype)), np.full(3, -INF))
    np.testing.assert_array_equal(ce.logsumexp(np.zeros((0, 3), dtype), axis=0), np.full(3, -INF))
    assert ce.logsumexp(np.zeros(0, dtype)) == -INF
    assert ce.logsumexp(np.zeros((3, 0), dtype), axis=None) == -INF
    assert ce.softmax(np.zeros((3, 0), dtype)).shape == (3, 0)
    assert ce.log_softmax(np.zeros((3, 0), dtype)).shape == (3, 0)


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 65, 1030])
def test_finite_logits_of_any_size(dtype, classes):
    big = largest(dtype) / 2 if dtype == F16 else 1e30
    at = np.arange(classes)
    rows = [np.full(classes, big), np.full(classes, -big), np.where(at == 0, big, -big), np.where(at == classes - 1, 0.0, -big)]
    x = np.stack(rows).astype(dtype)
    wide = largest(row_dtype(dtype))
    for y in (np.zeros(4, np.int64), np.full(4, classes - 1)):
        loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
        row, mass = exact(x), target_mass(x, y)
        assert_ulps(loss, exact_loss(row, mass), dtype, 4, what="loss")
        assert_ulps(grad, exact_gradient(row, mass)[0], dtype, 8, what="gradient")
        loss, grad = ce.cross_entropy_with_grad(x, y, label_smoothing=0.125, reduction="none")
        assert_ulps(loss, exact_loss(row, target_mass(x, y, None, 0.125)), dtype, 4, what="smoothed loss")
        assert np.isfinite(grad.astype(float)).all()
    for f in (ce.softmax, ce.log_softmax, ce.logsumexp):
        assert np.isfinite(np.asarray(f(x)).astype(float)).all()
    # The ends of the type: the loss may exceed it, nothing may be nan.
    x = np.stack([np.full(classes, wide), np.where(np.arange(classes) == 0, wide, -wide)]).astype(row_dtype(dtype))
    loss, grad = ce.cross_entropy_with_grad(x, [classes - 1] * 2, reduction="none")
    close(loss[0], np.log(classes), dtype) if classes > 1 else np.testing.assert_array_equal(loss[0], 0)
    np.testing.assert_array_equal(loss[1], INF if classes > 1 else 0)
    assert np.isfinite(grad).all()
    assert not np.isnan(ce.log_softmax(x)).any()
    np.testing.assert_array_equal(ce.logsumexp(x), [wide, wide])


def test_nan_payload_in_unread_classes_of_nll(dtype):
    """nll_loss reads the target classes only."""
    lp = np.full((2, 3), NAN, dtype)
    lp[0, 1], lp[1, 2] = -1, -2
    assert ce.nll_loss(lp, [1, 2], reduction="sum") == 3.0


# --- better than PyTorch on purpose -----------------------------------------------------------------------------------------------------


def test_item_0_accuracy_at_every_margin(dtype):
    """The suite in test_accuracy.py is the real one; this is its shortest form."""
    x = np.concatenate([[0.0], -np.arange(1, 85.0)])[None].astype(dtype)
    row = exact(x)
    assert_ulps(ce.log_softmax(x), row.log_probs, dtype, 4)
    assert_ulps(ce.softmax(x), row.probs, dtype, 8)


@pytest.mark.parametrize("rest", [1, 2, 9, 64, 700])
def test_item_1_confident_rows_keep_their_digits(dtype, rest):
    for shift in (0.0, 1e4) if dtype.itemsize >= 4 else (0.0,):
        x = np.zeros((3, rest + 1))
        x[0, 0], x[1, rest], x[2, rest // 2] = 20, 20, 20
        x = (x + shift).astype(dtype)
        y = np.array([0, rest, rest // 2])
        want = rest * np.exp(-20.0) / (1 + rest * np.exp(-20.0))
        # float16 holds nothing below 6e-8: there the gradient is scaled, as in mixed-precision training.
        scale = 2.0**20 if dtype == F16 else 1.0
        others = np.arange(rest + 1) != y[:, None]
        one_hot = (~others).astype(dtype)
        # Probability targets keep them too.
        for target in (y, one_hot):
            loss, grad = ce.cross_entropy_with_grad(x, target, reduction="none", grad_output=scale)
            close(loss, np.log1p(rest * np.exp(-20.0)), dtype)
            close(grad[np.arange(3), y], np.full(3, -want * scale), dtype)
            close(grad[others], want / rest * scale, dtype)
            assert (grad[others] != 0).all()


def test_item_1_in_numbers():
    loss, grad = ce.cross_entropy_with_grad(np.array([20, 0], np.float32), 0)
    assert loss == pytest.approx(2.0611536e-9, rel=1e-6)
    np.testing.assert_allclose(grad, [-2.0611536e-9, 2.0611536e-9], rtol=1e-6)
    loss, grad = ce.cross_entropy_with_grad(np.array([1e4 + 20, 1e4], np.float32), 0)
    assert loss == pytest.approx(2.0611536e-9, rel=1e-6)
    np.testing.assert_allclose(grad, [-2.0611536e-9, 2.0611536e-9], rtol=1e-6)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("classes", [1, 2, 10, 65, 1030])
def test_item_2_ignored_rows_are_never_read(dtype, classes, poison):
    rng = np.random.default_rng(3)
    x = rng.normal(0, 2, (40, classes)).astype(dtype)
    y = rng.integers(0, classes, 40)
    ignored = rng.random(40) < 0.5
    y[ignored] = -100
    clean = ce.cross_entropy_with_grad(x, y, label_smoothing=0.1)
    x[ignored] = poison
    loss, grad = ce.cross_entropy_with_grad(x, y, label_smoothing=0.1)
    assert np.isfinite(loss)
    assert loss == clean[0]
    np.testing.assert_array_equal(grad, clean[1])
    np.testing.assert_array_equal(grad[ignored].astype(float), 0)
    assert ce.cross_entropy(x, y, label_smoothing=0.1) == loss
    rows, grad = ce.cross_entropy_with_grad(x, y, reduction="none", grad_output=np.where(ignored, NAN, 1.0))
    np.testing.assert_array_equal(rows[ignored], 0)
    np.testing.assert_array_equal(grad[ignored].astype(float), 0)
    assert np.isfinite(rows).all()
    assert np.isfinite(grad.astype(float)).all()


def test_item_2_with_the_class_axis_strided(dtype):
    rng = np.random.default_rng(4)
    x = rng.normal(0, 2, (3, 7, 50)).astype(dtype)
    y = rng.integers(0, 7, (3, 50))
    ignored = rng.random((3, 50)) < 0.5
    y[ignored] = -100
    clean = ce.cross_entropy_with_grad(x, y, axis=1, reduction="none")
    np.moveaxis(x, 1, -1)[ignored] = NAN
    loss, grad = ce.cross_entropy_with_grad(x, y, axis=1, reduction="none")
    np.testing.assert_array_equal(loss, clean[0])
    np.testing.assert_array_equal(grad, clean[1])


@pytest.mark.parametrize("ignore_index", [0, 2, -1, 255, 10**6, -(2**63), 2**63 - 1, None])
def test_ignore_index_may_be_any_number(dtype, ignore_index):
    x = np.random.default_rng(5).normal(0, 2, (6, 3)).astype(dtype)
    y = np.array([0, 1, 2, 0, 1, 2], np.int64)
    if ignore_index is not None:
        y[1] = y[4] = ignore_index
    want_loss, want_grad = reference.cross_entropy_with_grad(x, y, ignore_index=ignore_index)
    loss, grad = ce.cross_entropy_with_grad(x, y, ignore_index=ignore_index)
    close(loss, want_loss, dtype)
    close(grad, want_grad, dtype, 16)


@pytest.mark.parametrize("index", INDEX_DTYPES, ids=lambda d: d.char)
def test_ignore_index_that_the_label_type_cannot_hold(index):
    """−100 does not alias 156 in uint8, nor 2⁶⁴ − 100 in uint64."""
    x = np.zeros((3, 3), np.float32)
    y = np.array([0, 1, 2], index)
    assert ce.cross_entropy(x, y, reduction="sum") == pytest.approx(3 * np.log(3))
    assert ce.cross_entropy(x, y, ignore_index=2**62, reduction="sum") == pytest.approx(3 * np.log(3))
    if index.kind == "u":
        y[1] = np.array(-100).astype(index)
        with pytest.raises(IndexError, match=str(y[1])):
            ce.cross_entropy(x, y)


def test_item_3_zero_times_log_zero_is_zero(dtype):
    x = np.array([[1.0, 2.0, -INF], [0.5, -INF, 0.0]]).astype(dtype)
    p = np.array([[0.25, 0.75, 0.0], [0.5, 0.0, 0.5]]).astype(dtype)
    loss, grad = ce.cross_entropy_with_grad(x, p, reduction="none")
    want_loss, want_grad = reference.cross_entropy_with_grad(x, p, reduction="none")
    assert np.isfinite(loss).all()
    close(loss, want_loss, dtype)
    close(grad[[0, 0, 1, 1], [0, 1, 0, 2]], want_grad[[0, 0, 1, 1], [0, 1, 0, 2]], dtype, 64)
    np.testing.assert_array_equal(grad[[0, 1], [2, 1]].astype(float), 0)
    # A weight of 0 on a −inf logit: index targets, probability targets, nll.
    w = np.array([1.0, 1.0, 0.0])
    full = np.full((1, 3), 1 / 3).astype(dtype)
    close(ce.cross_entropy(x[:1], full, weight=w, reduction="sum"), reference.cross_entropy(x[:1], full, weight=w, reduction="sum"), dtype)
    assert ce.cross_entropy(x[:1], [2], weight=w, reduction="sum") == 0.0
    assert ce.nll_loss(x[:1], [2], weight=w, reduction="sum") == 0.0
    loss, grad = ce.cross_entropy_with_grad(x[:1], [2], weight=w, reduction="sum")
    np.testing.assert_array_equal(grad.astype(float), 0)
    # All of the target mass smoothed away from a class of weight 0.
    assert np.isfinite(ce.cross_entropy(x[:1], [2], weight=w, reduction="sum", label_smoothing=1.0))


def test_item_4_sixteen_bit_logits_lose_nothing_on_the_way(dtype):
    rng = np.random.default_rng(6)
    x = rng.normal(0, 3, (200, 40)).astype(dtype)
    y = rng.integers(0, 40, 200)
    rows = ce.cross_entropy(x, y, reduction="none")
    row, mass = exact(x), target_mass(x, y)
    assert_ulps(rows, exact_loss(row, mass), dtype, 4)
    assert ce.logsumexp(x).dtype == row_dtype(dtype)
    want = rows.astype(np.float64).sum()
    assert ce.cross_entropy(x, y, reduction="sum") == pytest.approx(want, rel=1e-14)
    _, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
    assert_ulps(grad, exact_gradient(row, mass)[0], dtype, 8)


@pytest.mark.parametrize("index", INDEX_DTYPES, ids=lambda d: d.char)
def test_item_5_every_integer_label_type(dtype, index):
    rng = np.random.default_rng(7)
    x = rng.normal(0, 2, (30, 100)).astype(dtype)
    y = rng.integers(0, 100, 30)
    y[:2] = [0, 99]
    want_loss, want_grad = ce.cross_entropy_with_grad(x, y)
    for labels in (y.astype(index), y.astype(index.newbyteorder()), np.repeat(y.astype(index), 2)[::2], y.astype(index)[::-1][::-1]):
        loss, grad = ce.cross_entropy_with_grad(x, labels)
        assert loss == want_loss
        np.testing.assert_array_equal(grad, want_grad)
        assert ce.nll_loss(x, labels) == ce.nll_loss(x, y)
    assert ce.cross_entropy(x, y.tolist()) == want_loss


WEIGHT_DTYPES = [*INDEX_DTYPES, *DTYPES, np.dtype(bool)]


@pytest.mark.parametrize("weight", WEIGHT_DTYPES, ids=lambda d: d.name + d.char)
def test_item_5_class_weights_of_every_real_type(dtype, weight):
    rng = np.random.default_rng(8)
    x = rng.normal(0, 2, (30, 5)).astype(dtype)
    y = rng.integers(0, 5, 30)
    w = np.array([1, 2, 0, 3, 1]).astype(weight)
    want = ce.cross_entropy_with_grad(x, y, weight=w.astype(np.float64), label_smoothing=0.125)
    loss, grad = ce.cross_entropy_with_grad(x, y, weight=w, label_smoothing=0.125)
    assert loss == want[0]
    np.testing.assert_array_equal(grad, want[1])
    assert ce.nll_loss(x, y, weight=w) == ce.nll_loss(x, y, weight=w.astype(np.float64))
    assert ce.cross_entropy(x, y, weight=w[::-1][::-1].tolist(), label_smoothing=0.125) == loss


def test_item_5_the_small_types_of_ml_dtypes():
    """Integers are labels, and real numbers are weights, whoever defines them."""
    x = np.random.default_rng(8).normal(0, 2, (4, 5))
    y, s = np.array([0, 1, 3, 2]), np.array([1.0, 0.0, 2.0, 1.0])
    w = np.array([1, 2, 0, 4, 1.0])
    want = ce.cross_entropy_with_grad(x, y, weight=w, sample_weight=s)
    for name in ("int4", "uint4"):
        labels = y.astype(getattr(ml_dtypes, name))
        loss, grad = ce.cross_entropy_with_grad(x, labels, weight=w, sample_weight=s)
        assert loss == want[0]
        np.testing.assert_array_equal(grad, want[1])
        assert ce.nll_loss(x, labels) == ce.nll_loss(x, y)
    for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int4"):
        kind = getattr(ml_dtypes, name)
        loss, grad = ce.cross_entropy_with_grad(x, y, weight=w.astype(kind), sample_weight=s.astype(kind))
        assert loss == want[0]
        np.testing.assert_array_equal(grad, want[1])


@pytest.mark.parametrize("probs", DTYPES, ids=lambda d: d.name)
def test_probability_targets_of_every_float_type(dtype, probs):
    rng = np.random.default_rng(9)
    x = rng.normal(0, 2, (30, 5)).astype(dtype)
    p = rng.dirichlet(np.ones(5), 30).astype(probs)
    want_loss, want_grad = reference.cross_entropy_with_grad(x, p, label_smoothing=0.1)
    loss, grad = ce.cross_entropy_with_grad(x, p, label_smoothing=0.1)
    close(loss, want_loss, dtype)
    np.testing.assert_allclose(grad.astype(float), want_grad, rtol=2 * eps(dtype), atol=16 * eps(row_dtype(dtype)) / 30)


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN, INF, -INF, -5e-324])
def test_item_5_label_smoothing_outside_its_range(dtype, bad):
    x, y = np.zeros((2, 3), dtype), np.array([0, 1])
    for f in (ce.cross_entropy, ce.cross_entropy_with_grad):
        with pytest.raises(ValueError, match=r"label_smoothing.*\[0, 1\]"):
            f(x, y, label_smoothing=bad)


@pytest.mark.parametrize("e", [0.0, -0.0, 1.0, 5e-324, np.float32(0.5), 1, 0, True])
def test_item_5_label_smoothing_at_the_ends(dtype, e):
    x, y = np.array([[1.0, 2.0, 3.0]]).astype(dtype), np.array([1])
    loss, grad = ce.cross_entropy_with_grad(x, y, label_smoothing=e)
    want_loss, want_grad = reference.cross_entropy_with_grad(x, y, label_smoothing=float(e))
    close(loss, want_loss, dtype)
    np.testing.assert_allclose(grad.astype(float), want_grad, rtol=4 * eps(dtype), atol=16 * eps(row_dtype(dtype)))


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 65, 1030])
def test_item_6_a_row_does_not_depend_on_the_others(dtype, classes):
    """Threads and permutations are in test_determinism.py."""
    rng = np.random.default_rng(11)
    x = rng.normal(0, 2, (37, classes)).astype(dtype)
    y = rng.integers(0, classes, 37)
    loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
    for r in (0, 17, 36):
        one_loss, one_grad = ce.cross_entropy_with_grad(x[r], y[r], reduction="none")
        assert one_loss == loss[r]
        np.testing.assert_array_equal(one_grad, grad[r])


def test_zero_classes(dtype):
    x = np.zeros((2, 0), dtype)
    with pytest.raises(IndexError):
        ce.cross_entropy(x, [0, 0])
    assert ce.cross_entropy(x, [-100, -100], reduction="sum") == 0.0
    np.testing.assert_array_equal(ce.cross_entropy(x, x, reduction="none"), 0)
    np.testing.assert_array_equal(ce.cross_entropy_with_grad(x, x)[1].shape, (2, 0))
    np.testing.assert_array_equal(ce.cross_entropy(x, x, where=np.zeros((2, 0), bool), softcap=2.0, reduction="none"), 0)
    # The logsumexp of nothing is -inf.
    np.testing.assert_array_equal(ce.cross_entropy(x, x, z_loss=0.1, reduction="none"), INF)
    assert ce.cross_entropy(x, x, z_loss=0.1, sample_weight=[0, 1], reduction="sum") == INF


def test_one_class(dtype):
    x = np.array([[3.0], [-1e4], [0.0]]).astype(dtype)
    for target in ([0, 0, 0], np.ones((3, 1), dtype)):
        loss, grad = ce.cross_entropy_with_grad(x, target, reduction="none")
        np.testing.assert_array_equal(loss, 0)
        np.testing.assert_array_equal(grad.astype(float), 0)
    np.testing.assert_array_equal(ce.softmax(x).astype(float), 1)
    np.testing.assert_array_equal(ce.log_softmax(x).astype(float), 0)
    np.testing.assert_array_equal(ce.logsumexp(x), x[:, 0].astype(row_dtype(dtype)))


def test_vjps(dtype):
    rng = np.random.default_rng(10)
    for classes in (1, 2, 3, 17, 64, 65, 600):
        x = rng.normal(0, 2, (9, classes)).astype(dtype)
        for g_dtype in DTYPES:
            g = rng.normal(0, 1, (9, classes)).astype(g_dtype)
            for name, y in (("softmax_vjp", ce.softmax(x)), ("log_softmax_vjp", ce.log_softmax(x))):
                got = getattr(ce, name)(g, y)
                assert got.dtype == dtype
                want = getattr(reference, name)(g, y)
                size = np.abs(g.astype(float))
                bound = 1.01 * eps(dtype) * np.abs(want) + 16 * eps(row_dtype(dtype)) * (size + size.sum(-1, keepdims=True))
                assert (np.abs(got.astype(float) - want) <= bound).all()


def test_zero_probability_entries_of_the_vjp(dtype):
    """p = 0 gives 0, lp = −inf gives g."""
    p = np.array([[0.25, 0.75, 0.0]]).astype(dtype)
    g = np.array([[1.0, 2.0, 3.0]]).astype(dtype)
    assert float(ce.softmax_vjp(g, p)[0, 2]) == 0
    with np.errstate(divide="ignore"):
        lp = np.log(p.astype(np.float64)).astype(dtype)
    assert float(ce.log_softmax_vjp(g, lp)[0, 2]) == 3.0


def test_float64_rows_stay_float64():
    x = np.array([[0.1, 0.7, 0.3]], F64)
    assert ce.cross_entropy(x, [0]) == pytest.approx(reference.cross_entropy(x, [0]), rel=1e-15)
