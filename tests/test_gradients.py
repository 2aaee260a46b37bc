"""Gradients against differences of the losses, and against the algebra they obey."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crossent as ce
from crossent import reference

from .levels import each_level
from .oracle import eps, largest, row_dtype, tiny


def numeric_gradient(f, x, h=1e-3):
    """Fourth-order differences of a scalar function, entry by entry."""
    grad = np.zeros(x.shape)
    for index in np.ndindex(x.shape):

        def at(step, index=index):
            y = x.copy()
            y[index] += step
            return f(y)

        grad[index] = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    return grad


@st.composite
def problems(draw):
    """Random shapes, targets and options, in float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    before = draw(st.lists(st.integers(1, 3), max_size=2))
    after = draw(st.lists(st.integers(1, 3), max_size=1))
    classes = draw(st.integers(1, 6))
    shape, rows = (*before, classes, *after), (*before, *after)
    x = rng.normal(0, draw(st.sampled_from([0.5, 3.0])), shape)
    options = {
        "axis": len(before),
        "weight": draw(st.sampled_from([None, rng.random(classes) + 0.1])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if draw(st.booleans()):
        target = rng.random(shape) * draw(st.sampled_from([1.0, 3.0]))
    else:
        target = rng.integers(0, classes, rows)
        if draw(st.booleans()):
            target = np.where(rng.random(rows) < 0.3, -100, target)
    upstream = draw(st.sampled_from(["none", "scalar", "rows"]))
    grad_output = None
    if upstream == "scalar":
        grad_output = float(rng.normal())
    elif upstream == "rows" and options["reduction"] == "none":
        grad_output = rng.normal(0, 1, rows)
    return x, target, options, grad_output


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_cross_entropy_against_differences(problem):
    x, target, options, grad_output = problem

    def total(y):
        loss = ce.cross_entropy(y, target, **options)
        return float(np.sum(loss * (1.0 if grad_output is None else grad_output)))

    for level in each_level():
        loss, grad = ce.cross_entropy_with_grad(x, target, grad_output=grad_output, **options)
        if np.isnan(loss).any():
            np.testing.assert_array_equal(grad, 0)
            continue
        np.testing.assert_allclose(grad, numeric_gradient(total, x), rtol=1e-7, atol=1e-9, err_msg=level)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_nll_loss_against_differences(problem):
    x, target, options, grad_output = problem
    if target.dtype.kind == "f":
        target = np.argmax(target, options["axis"])
    options = {k: v for k, v in options.items() if k != "label_smoothing"}

    def total(y):
        return float(np.sum(ce.nll_loss(y, target, **options) * (1.0 if grad_output is None else grad_output)))

    loss, grad = ce.nll_loss_with_grad(x, target, grad_output=grad_output, **options)
    if np.isnan(loss).any():
        np.testing.assert_array_equal(grad, 0)
    else:
        np.testing.assert_allclose(grad, numeric_gradient(total, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 17, 33])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_vjps_against_differences(level, classes, axis, name):
    rng = np.random.default_rng(classes)
    shape = [2, 3, 2]
    shape[axis] = classes
    x, g = rng.normal(0, 1, shape), rng.normal(0, 1, shape)
    f = getattr(ce, name)
    got = getattr(ce, f"{name}_vjp")(g, f(x, axis), axis)
    np.testing.assert_allclose(got, numeric_gradient(lambda y: np.sum(g * f(y, axis)), x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 17, 64, 65, 513, 1030])
def test_gradients_of_index_targets_sum_to_zero(level, dtype, classes):
    """Per row, to the rounding of its entries."""
    rng = np.random.default_rng(classes)
    x = rng.normal(0, 3, (40, classes)).astype(dtype)
    y = rng.integers(0, classes, 40)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": rng.random(classes)}):
        _, grad = ce.cross_entropy_with_grad(x, y, reduction="none", **options)
        grad = grad.astype(np.float64)
        # Half a unit of the result per entry, and of float16 half its smallest step.
        slack = (eps(dtype) + 16 * eps(row_dtype(dtype))) * np.abs(grad).sum(-1) + classes * (2.0**-25 if dtype == np.float16 else 0)
        assert (np.abs(grad.sum(-1)) <= slack + 16 * eps(row_dtype(dtype))).all()


def test_gradient_is_linear_in_the_target(level):
    rng = np.random.default_rng(2)
    x = rng.normal(0, 2, (20, 7))
    p, q = rng.random((20, 7)), rng.random((20, 7))
    lam = 0.3
    mixed = ce.cross_entropy_with_grad(x, lam * p + (1 - lam) * q, reduction="none")
    a, b = (ce.cross_entropy_with_grad(x, t, reduction="none") for t in (p, q))
    for m, u, v in zip(mixed, a, b, strict=True):
        np.testing.assert_allclose(m, lam * u + (1 - lam) * v, rtol=1e-12, atol=1e-14)


def test_one_hot_probabilities_are_index_targets(level, dtype):
    rng = np.random.default_rng(3)
    for classes in (2, 10, 100):
        x = rng.normal(0, 2, (20, classes)).astype(dtype)
        y = rng.integers(0, classes, 20)
        p = np.eye(classes, dtype=dtype)[y]
        loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none", label_smoothing=0.1)
        soft_loss, soft_grad = ce.cross_entropy_with_grad(x, p, reduction="none", label_smoothing=0.1)
        np.testing.assert_allclose(soft_loss, loss, rtol=16 * eps(row_dtype(dtype)))
        np.testing.assert_allclose(soft_grad.astype(float), grad.astype(float), rtol=2 * eps(dtype), atol=16 * eps(row_dtype(dtype)))


def test_a_shift_of_the_logits_changes_nothing(level):
    """Exactly, when the shifted logits are exact."""
    rng = np.random.default_rng(4)
    x = np.round(rng.normal(0, 3, (50, 9)) * 16).astype(np.float32) / 16
    y = rng.integers(0, 9, 50)
    loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
    for shift in (-1000, 3, 4096):
        moved_loss, moved = ce.cross_entropy_with_grad(x + np.float32(shift), y, reduction="none")
        np.testing.assert_allclose(moved_loss, loss, rtol=8 * 2**-24)
        np.testing.assert_allclose(moved, grad, rtol=16 * 2**-24)


def test_nll_of_log_softmax_is_cross_entropy(level, dtype):
    rng = np.random.default_rng(5)
    x = rng.normal(0, 2, (30, 12)).astype(dtype)
    y = rng.integers(0, 12, 30)
    w = rng.random(12)
    log_probs = ce.log_softmax(x)
    loss, grad = ce.nll_loss_with_grad(log_probs, y, weight=w)
    want_loss, want = ce.cross_entropy_with_grad(x, y, weight=w)
    assert loss == pytest.approx(want_loss, rel=4 * eps(dtype))
    chained = ce.log_softmax_vjp(grad, log_probs)
    np.testing.assert_allclose(
        chained.astype(float), want.astype(float), rtol=0.02 if dtype.itemsize == 2 else 64 * eps(dtype), atol=4 * eps(dtype)
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(["softmax_vjp", "log_softmax_vjp"]))
def test_vjps_against_the_reference(seed, classes, name):
    rng = np.random.default_rng(seed)
    x, g = rng.normal(0, 3, (3, classes)), rng.normal(0, 1, (3, classes))
    y = reference.softmax(x) if name == "softmax_vjp" else reference.log_softmax(x)
    want = getattr(reference, name)(g, y)
    for level in each_level():
        np.testing.assert_allclose(getattr(ce, name)(g, y), want, rtol=1e-13, atol=1e-15 * np.abs(g).sum(), err_msg=level)


def test_vjps_keep_the_digits_of_a_float64_upstream(level):
    # In float32 what all of it has in common would leave nothing of the differences.
    rng = np.random.default_rng(6)
    x = rng.normal(0, 1, (3, 50)).astype(np.float32)
    g = 1e9 + rng.normal(0, 1, x.shape)
    p = ce.softmax(x)
    exact = p.astype(np.float64)
    want = exact * (g - (g * exact).sum(1, keepdims=True))
    got = ce.softmax_vjp(g, p)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("classes", [2, 4, 33, 70, 300, 1000, 5000])
def test_upstream_factors_beyond_the_type(level, dtype, classes, order):
    """What the factor takes beyond float32 may come back: infinities have the right sign, and nothing is NaN."""
    rng = np.random.default_rng(classes)
    n = 5
    x = np.asarray((rng.normal(0, 3, (n, classes))).astype(dtype), order=order)
    x[1, 0] = -np.inf
    target = rng.integers(1, classes, n)
    probs = rng.dirichlet(np.ones(classes), n)
    probs[1, 0] = 0
    # The last row has an ordinary factor: it is what it is without the others.
    for g in (1e37, 1e60, 1e300):
        factors = np.r_[np.full(n - 1, g), 1.0]
        for y, options in (
            (target, {}),
            (target, {"weight": rng.uniform(0.5, 2, classes)}),
            (target, {"label_smoothing": 0.25, "where": x != -np.inf}),
            (target, {"label_smoothing": 0.25, "weight": np.r_[0, rng.uniform(0.5, 2, classes - 1)]}),
            (probs, {}),
        ):
            out = np.empty_like(x)
            ce.cross_entropy_with_grad(x, y, reduction="none", grad_output=factors, out=out, **options)
            same = {k: v[-1:] if k == "where" else v for k, v in options.items()}
            alone = ce.cross_entropy_with_grad(x[-1:], y[-1:], reduction="none", **same)[1]
            assert np.array_equal(out[-1:], alone), (g, options.keys())
            _, want = reference.cross_entropy_with_grad(x, y, reduction="none", grad_output=factors, **options)
            got, most = out.astype(np.float64), largest(x.dtype)
            assert not np.isnan(got).any(), (g, options.keys())
            normal = np.abs(want) > max(1e-30, tiny(x.dtype))
            assert np.array_equal(np.sign(got[normal]), np.sign(want[normal])), (g, options.keys())
            beyond = np.abs(want) > 1.01 * most
            assert np.isinf(got[beyond]).all(), (g, options.keys())
            inside = normal & (np.abs(want) < 0.99 * most)
            # The reference loses digits where p·Σ and the target's share are about the same.
            np.testing.assert_allclose(got[inside], want[inside], rtol=max(1e-4, 8 * eps(x.dtype)), atol=1e-5 * min(g, most))
