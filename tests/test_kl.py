"""KL divergence: reductions, outputs, two types, small divergences, gradients."""

from __future__ import annotations

import numpy as np
import pytest

import crossent as ce
from crossent import reference

from .layouts import OUTPUTS, arrange
from .oracle import DTYPES, F32, F64, eps, exact, row_dtype, tiny
from .test_matrix import check_array


def check_kl(got, want, grad, want_grad, p, q, options, what=""):  # noqa: PLR0917
    """Of float64 the reference itself has an absolute error: entries there are compared with the sizes that it subtracts."""
    work = F64 if F64 in (p.dtype, q.dtype) else F32
    axis, tau = options.get("axis", -1), options.get("temperature", 1.0)
    got, want = np.asarray(got), np.asarray(want)
    rows = p.size // max(1, p.shape[axis]) if want.ndim == 0 and p.ndim > 1 else 1
    slack = 64 * eps(F64) * (np.abs(p.astype(F64)).max(initial=1) + np.abs(q.astype(F64)).max(initial=1)) / tau * rows
    with np.errstate(all="ignore"):
        good = np.abs(got - want) <= 64 * eps(work) * np.abs(want) + slack
    assert (good | (got == want) | (np.isnan(got) & np.isnan(want))).all(), f"{what}: {got} {want}"
    assert not (got < 0).any(), what
    assert grad.dtype == q.dtype, what
    assert grad.shape == q.shape, what
    # Dividing by τ rounds the reference's own logits.
    units = 9 if q.dtype != F64 or np.frexp(tau)[0] == 0.5 else 9 + 4 * np.abs([p, q]).max(initial=0) / tau
    scale = np.abs(want_grad)
    with np.errstate(all="ignore"):
        largest = np.maximum(reference.softmax(p.astype(F64) / tau, axis), reference.softmax(q.astype(F64) / tau, axis))
        factor = np.nanmax(scale / np.maximum(largest, 1e-300), initial=0) if scale.size else 0
    check_array(grad, want_grad, np.maximum(scale, largest * max(factor, 1 / tau)), q.dtype, units, f"{what} gradient")


def test_kl_reductions(level, dtype, rng):
    p, q = rng.normal(0, 2, (2, 3, 5, 7)).astype(dtype)
    rows = ce.kl_divergence(p, q)
    assert rows.dtype == row_dtype(dtype)
    assert rows.shape == (3, 5)
    total = ce.kl_divergence(p, q, reduction="sum")
    assert type(total) is float
    assert total == pytest.approx(rows.astype(F64).sum(), rel=1e-14)
    assert ce.kl_divergence(p, q, reduction="mean") == pytest.approx(total / 15, rel=1e-14)
    for reduction in ("none", "sum", "mean"):
        for g in (None, -2.0, 3):
            loss, grad = ce.kl_divergence_with_grad(p, q, reduction=reduction, grad_output=g, temperature=2.0)
            want, want_grad = reference.kl_divergence_with_grad(p, q, reduction=reduction, grad_output=g, temperature=2.0)
            check_kl(loss, want, grad, want_grad, p, q, {"temperature": 2.0})
            np.testing.assert_array_equal(loss, ce.kl_divergence(p, q, reduction=reduction, temperature=2.0))
    g = rng.normal(0, 1, (3, 5))
    for kind in DTYPES:
        rows_g = g.astype(kind)
        loss, grad = ce.kl_divergence_with_grad(p, q, grad_output=rows_g)
        want, want_grad = reference.kl_divergence_with_grad(p, q, grad_output=rows_g)
        check_kl(loss, want, grad, want_grad, p, q, {})
    assert np.isnan(ce.kl_divergence(p[:0], q[:0], reduction="mean"))
    assert ce.kl_divergence(p[:0], q[:0], reduction="sum") == 0.0
    assert ce.kl_divergence(p[:0], q[:0]).shape == (0, 5)
    np.testing.assert_array_equal(ce.kl_divergence(p[..., :0], q[..., :0]), np.zeros((3, 5)))
    np.testing.assert_array_equal(ce.kl_divergence(p[..., :1], q[..., :1]), np.zeros((3, 5)))


def test_kl_in_place_and_out(level, dtype, rng):
    for shape, axis in (((6, 700), 1), ((700, 6), 0), ((3, 10, 40), 1)):
        p, q = rng.normal(0, 2, (2, *shape)).astype(dtype)
        loss, want = ce.kl_divergence_with_grad(p, q, axis=axis)
        for layout in OUTPUTS:
            out = arrange(np.full(shape, 7, dtype), layout)
            got_loss, got = ce.kl_divergence_with_grad(p, q, axis=axis, out=out)
            assert got is out
            np.testing.assert_array_equal(got_loss, loss)
            np.testing.assert_array_equal(got, want)
            place = arrange(q, layout)
            got_loss, got = ce.kl_divergence_with_grad(p, place, axis=axis, out=place)
            assert got is place
            np.testing.assert_array_equal(got_loss, loss)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("p_dtype", DTYPES, ids=lambda d: d.name)
def test_kl_of_two_types(level, dtype, p_dtype, rng):
    p, q = rng.normal(0, 2, (4, 600)).astype(p_dtype), rng.normal(0, 2, (4, 600)).astype(dtype)
    for a, b, axis in ((p, q, 1), (np.asfortranarray(p), q, 1), (np.ascontiguousarray(p.T), np.asfortranarray(q.T), 0)):
        loss, grad = ce.kl_divergence_with_grad(a, b, axis=axis)
        assert loss.dtype == (F64 if F64 in (dtype, p_dtype) else F32)
        want, want_grad = reference.kl_divergence_with_grad(a, b, axis=axis)
        check_kl(loss, want, grad, want_grad, a, b, {"axis": axis})
        place = b.copy(order="K")
        np.testing.assert_array_equal(ce.kl_divergence_with_grad(a, place, axis=axis, out=place)[1], grad)


def test_kl_keeps_the_digits_of_small_divergences(level):
    """The exact values, from double-double arithmetic; in float32 Σ p·(log p − log q) has nothing left at 1e-14."""
    rng = np.random.default_rng(7)
    for dtype, bound in ((F32, 32), (F64, 128)):
        for classes in (2, 3, 10, 64, 513, 1100):
            for family in ("plain", "flat", "confident", "late", "offset", "rising", "outlier", "shuffled"):
                for distance in (1e-5, 1e-2, 0.3, 10):
                    p = rng.normal(0, 0.01 if family == "flat" else 3, (4, classes))
                    if family == "confident":
                        p[:, rng.integers(classes)] += rng.uniform(15, 40)
                    elif family == "late":
                        p[:, -1] += rng.uniform(5, 30)
                    elif family == "rising":
                        p.sort(-1)
                    p = p.astype(dtype)
                    q = p + rng.normal(0, distance, p.shape)
                    if family == "offset":
                        q += 100
                    elif family == "outlier":
                        q[np.arange(4), p.argmax(-1)] += rng.normal(0, 3)
                    elif family == "shuffled":
                        q = rng.permuted(q, axis=1)
                    q = q.astype(dtype)
                    a, b = exact(p), exact(q)
                    want = (a.probs * (a.log_probs - b.log_probs)).sum()
                    loss, grad = ce.kl_divergence_with_grad(p, q)
                    # The oracle's own error, relative to probabilities of 1.
                    slack = 2.0**-98
                    good = np.abs((loss - want.hi) - want.lo) <= bound * 2 * eps(dtype) * np.abs(want.hi) + slack + tiny(dtype)
                    assert good.all(), (dtype, classes, family, distance, loss, want.hi)
                    unit = 2 * eps(dtype) * np.maximum(a.probs.hi, b.probs.hi)
                    difference = b.probs - a.probs
                    assert (np.abs((grad - difference.hi) - difference.lo) <= 8 * unit + 2 * tiny(dtype)).all()


def test_kl_off_the_grid(level):
    """Logits so large that classes are taken one by one, close to each other and not."""
    rng = np.random.default_rng(8)
    for shift in (2.0**18, -(2.0**20)):
        # On a grid that float32 has there.
        p = np.rint(rng.normal(0, 2, (20, 70)) * 8) / 8
        q = np.rint((p + rng.normal(0, 1.5, p.shape)) * 8) / 8
        want = reference.kl_divergence(p, q)
        for dtype in (F32, F64):
            got = ce.kl_divergence((p + shift).astype(dtype), (q + shift).astype(dtype))
            np.testing.assert_allclose(got, want, rtol=64 * eps(dtype) if dtype == F32 else 1e-12)
    # A class that P all but excludes, of which the quotient of the two exceeds float64 although neither does.
    got = ce.kl_divergence(2.0**31 + np.array([0.0, -600.0]), 2.0**31 + np.array([-200.0, 0.0]))
    assert got == pytest.approx(200.0, rel=1e-12)


def test_kl_where_differences_exceed_the_type(level):
    """Two maxima of P, of which Q all but excludes one: the sum of differences overflows, that of what is left of them need not."""
    for far in (3e38, 2e38, 1e38):
        for classes in (2, 3, 40, 1000):
            for first in (0, 1):
                p, q = np.zeros((2, classes), F32)
                p[2:] = -5
                q[first] = -far
                want, slope = reference.kl_divergence_with_grad(p.astype(F64), q.astype(F64))
                got, grad = ce.kl_divergence_with_grad(p, q)
                np.testing.assert_allclose(got, want, rtol=1e-6)
                np.testing.assert_allclose(grad, slope, rtol=1e-5, atol=1e-7)


def test_kl_gradient_of_confident_rows(level):
    p, q = np.array([[30.0, 0.0]], np.float32), np.array([[0.0, -25.0]], np.float32)
    _, grad = ce.kl_divergence_with_grad(p, q)
    np.testing.assert_allclose(grad, [[np.exp(-30) - np.exp(-25), np.exp(-25) - np.exp(-30)]], rtol=1e-6)


def test_kl_gradients_by_differences(level):
    rng = np.random.default_rng(8)
    p, q = rng.normal(0, 2, (2, 3, 6))
    for tau in (0.5, 1.0, 3.0):
        for reduction in ("sum", "mean"):
            grad = ce.kl_divergence_with_grad(p, q, temperature=tau, reduction=reduction)[1]
            h = 1e-3
            for i in range(q.size):
                step = np.zeros(q.size)
                step[i] = h
                step = step.reshape(q.shape)
                f = [ce.kl_divergence(p, q + n * step, temperature=tau, reduction=reduction) for n in (-2, -1, 1, 2)]
                want = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)
                assert grad.flat[i] == pytest.approx(want, abs=1e-10)


def test_kl_beside_pytorch(level, dtype, rng):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    p, q = rng.normal(0, 2, (2, 5, 40)).astype(dtype)
    tp, tq = (torch.tensor(a.astype(F64), requires_grad=True) for a in (p, q))
    for tau in (1.0, 2.0):
        lq, lp = functional.log_softmax(tq / tau, -1), functional.log_softmax(tp / tau, -1)
        want = functional.kl_div(lq, lp, log_target=True, reduction="sum")
        tq.grad = None
        want.backward()
        loss, grad = ce.kl_divergence_with_grad(p, q, temperature=tau, reduction="sum")
        assert loss == pytest.approx(want.item(), rel=64 * eps(row_dtype(dtype)))
        np.testing.assert_allclose(grad.astype(F64), tq.grad.numpy(), rtol=4 * eps(dtype), atol=8 * eps(dtype))
    best, order = torch.topk(torch.log_softmax(tp, -1), 7)
    logprobs, indices = ce.topk_logprobs(p, 7)
    np.testing.assert_allclose(logprobs, best.detach().numpy(), rtol=8 * eps(row_dtype(dtype)))
    if dtype in (F32, F64):  # no ties
        np.testing.assert_array_equal(indices, order.numpy())
