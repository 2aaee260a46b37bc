"""The oracles themselves: double-double against mpmath, the reference against mpmath, loops and differences."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from crossent import reference

from .oracle import (
    BF16,
    DD,
    DTYPES,
    F16,
    F32,
    F64,
    dd_log1p,
    eps,
    exact,
    exact_gradient,
    exact_loss,
    largest,
    round_to,
    spacing,
    target_mass,
    tiny,
)
from .test_gradients import numeric_gradient


def number(value) -> mpf:
    return mpf(float(value.hi)) + mpf(float(value.lo)) if isinstance(value, DD) else mpf(float(value))


def relative(got, want) -> float:
    return float(abs(number(got) / want - 1)) if want else float(abs(number(got)))


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(400):
        yield


def slow_row(row):
    """softmax, log_softmax and logsumexp of one row with 400 digits."""
    row = [mpf(float(v)) for v in row]
    e = [mpmath.exp(v) for v in row]
    s = mpmath.fsum(e)
    return [v / s for v in e], [v - mpmath.log(s) for v in row], mpmath.log(s)


ROWS = [
    np.array([0.0, -1.0, -0.3, 2.7]),
    np.array([20.0, 0.0]),
    np.array([0.0, 20.0, 20.0]),
    np.array([1e4 + 80, 1e4, 1e4 + 3]),
    np.array([5.0, 5.0, 5.0]),
    np.array([0.3, -88.0, -87.9, -40.0]),
    np.array([-700.0, 0.0, -300.0, -1e-3]),
    np.array([-3.3]),
    -(np.linspace(0, 30, 33) ** 1.5),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r[0]}…{len(r)}")
def test_double_double_against_mpmath(row):
    p, lp, lse = slow_row(row)
    got = exact(row[None])
    for c in range(len(row)):
        # Near the end of float64 the low part has few bits of its own.
        assert relative(got.probs[0, c], p[c]) < 1e-25 + 1e-323 / float(p[c])
        # Relative also where log p is tiny, as on the confident class.
        assert relative(got.log_probs[0, c], lp[c]) < 1e-25
        for smoothing in (0.0, 0.1):
            mass = target_mass(row[None], [c], None, smoothing)
            e, n = mpf(smoothing), len(row)
            a = [(1 - e) * (k == c) + e / n for k in range(n)]
            loss = mpmath.fsum(-x * y for x, y in zip(a, lp, strict=True))
            assert relative(exact_loss(got, mass)[0], loss) < 1e-25
            grad, size = exact_gradient(got, mass)
            for k in range(n):
                want = p[k] - a[k] if n > 1 else mpf(0)
                assert abs(number(grad[0, k]) - want) <= 1e-25 * size[0, k] + 1e-323
                if smoothing == 0 and n > 1:
                    assert relative(grad[0, k], want) < 1e-14 + 1e-323 / float(abs(want))
    assert float(abs(number(got.logsumexp[0]) - lse)) <= 1e-25 * max(abs(float(lse)), abs(row.max()))


def test_double_double_log1p():
    for value in (1e-40, 1e-12, 0.01, 0.049, 0.051, 0.7, 3.0, 32000.0, 1e7):
        assert relative(dd_log1p(DD.of([value]))[0], mpmath.log1p(mpf(value))) < 1e-27


def test_rounding_and_spacing():
    """Against NumPy's own casts, which round once for float16 and float32."""
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(0, 1, 1000) * 2.0 ** rng.integers(-30, 20, 1000), [0.0, 65519.999, 65520.0, 1e-8, 2.0**-25, 3 * 2.0**-25]]
    )
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(round_to(values, F16), values.astype(F16).astype(F64))
    np.testing.assert_array_equal(round_to(values, F32), values.astype(F32).astype(F64))
    # bfloat16 is the upper half of float32: one rounding, ties to even.
    half = np.float64(np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F7FFF], np.uint32).view(np.float32))
    want = np.array([0x3F800000, 0x3F820000, 0x3F810000, 0x7F7F0000], np.uint32).view(np.float32).astype(F64)
    np.testing.assert_array_equal(round_to(half, BF16), want)
    assert round_to(1 + 2.0**-9 * (1 + 2.0**-30) * 2, BF16) == 1 + 2.0**-7
    for d in (F32, F64):
        v = np.abs(values[np.abs(values) > tiny(d)]).astype(d)
        np.testing.assert_array_equal(spacing(v, d), np.spacing(v).astype(F64))
    assert largest(F16) == 65504
    assert [eps(d) for d in DTYPES] == [2.0**-11, 2.0**-8, 2.0**-24, 2.0**-53]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r[0]}…{len(r)}")
def test_reference_against_mpmath(row):
    p, lp, lse = slow_row(row)
    n = len(row)
    assert float(abs(mpf(reference.logsumexp(row)) - lse)) <= 2e-16 * 2 * max(abs(float(lse)), abs(row.max()))
    for c in range(n):
        assert relative(reference.softmax(row)[c], p[c]) < 1e-15
        assert relative(reference.log_softmax(row)[c], lp[c]) < 1e-15
        loss, grad = reference.cross_entropy_with_grad(row, c)
        assert relative(loss, -lp[c]) < 1e-15
        for k in range(n):
            if n > 1:
                assert relative(grad[k], p[k] - (k == c)) < 1e-15
        w = np.arange(1.0, n + 1) / 3
        loss, grad = reference.cross_entropy_with_grad(row, c, weight=w, label_smoothing=0.1, reduction="sum")
        e = mpf(0.1)
        a = [((1 - e) * (k == c) + e / n) * mpf(w[k]) for k in range(n)]
        assert relative(loss, mpmath.fsum(-x * y for x, y in zip(a, lp, strict=True))) < 2e-15
        total = mpmath.fsum(a)
        for k in range(n):
            size = max(abs(p[k] * total), a[k])
            if k == int(np.argmax(row)):
                others = mpmath.fsum(x for j, x in enumerate(a) if j != k)
                size = min(size, max(others, (1 - p[k]) * total))
            assert abs(mpf(float(grad[k])) - (p[k] * total - a[k])) <= 2e-15 * max(size, mpf(1e-300))


def loop(x, target, weight, e, reduction):
    """Cross-entropy of (N, C) by its definition, one number at a time."""
    n, classes = x.shape
    w = np.ones(classes) if weight is None else weight
    losses, divisor = [], 0.0
    for i in range(n):
        lse = np.log(sum(np.exp(v) for v in x[i]))
        if target.ndim == 1:
            if target[i] == -100:
                losses.append(0.0)
                continue
            divisor += w[target[i]]
            l = (1 - e) * w[target[i]] * (lse - x[i, target[i]]) + e / classes * sum(w[c] * (lse - x[i, c]) for c in range(classes))
        else:
            divisor += 1
            l = sum(w[c] * (target[i, c] * (1 - e) + e / classes) * (lse - x[i, c]) for c in range(classes))
        losses.append(l)
    return np.array(losses) if reduction == "none" else sum(losses) / divisor if reduction == "mean" else sum(losses)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("e", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["index", "ignored", "probs"])
def test_reference_against_a_loop(reduction, weighted, e, kind):
    rng = np.random.default_rng(1)
    x = rng.normal(0, 2, (6, 5))
    target = rng.random((6, 5)) if kind == "probs" else rng.integers(0, 5, 6)
    if kind == "ignored":
        target[[1, 4]] = -100
    weight = rng.random(5) + 0.1 if weighted else None
    options = {"weight": weight, "label_smoothing": e, "reduction": reduction}
    loss, grad = reference.cross_entropy_with_grad(x, target, **options)
    np.testing.assert_allclose(loss, loop(x, target, weight, e, reduction), rtol=1e-14)
    np.testing.assert_allclose(reference.cross_entropy(x, target, **options), loss, rtol=0)
    want = numeric_gradient(lambda y: np.sum(loop(y, target, weight, e, reduction)), x)
    np.testing.assert_allclose(grad, want, rtol=1e-8, atol=1e-10)
    # The same on another axis of three dimensions.
    deep = np.stack([x, x + 1, x * 2])
    stacked = np.stack([target] * 3)
    for axis in (0, 1, 2):
        moved = np.moveaxis(deep, -1, axis)
        goal = np.moveaxis(stacked, -1, axis) if kind == "probs" else stacked
        got, got_grad = reference.cross_entropy_with_grad(moved, goal, axis=axis, **{**options, "reduction": "none"})
        for i in range(3):
            np.testing.assert_allclose(got[i], loop(deep[i], target, weight, e, "none"), rtol=1e-14)
        np.testing.assert_allclose(
            np.moveaxis(got_grad, axis, -1)[0], reference.cross_entropy_with_grad(x, target, **{**options, "reduction": "none"})[1]
        )


def test_reference_vjps_against_differences():
    rng = np.random.default_rng(2)
    x, g = rng.normal(0, 1, (3, 4)), rng.normal(0, 1, (3, 4))
    for axis in (0, 1):
        for name in ("softmax", "log_softmax"):
            f, vjp = getattr(reference, name), getattr(reference, f"{name}_vjp")
            np.testing.assert_allclose(
                vjp(g, f(x, axis), axis), numeric_gradient(lambda y, f=f, axis=axis: np.sum(g * f(y, axis)), x), rtol=1e-8, atol=1e-10
            )


def test_reference_over_several_axes():
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1, (2, 3, 4))
    for axis in (None, (0, 1), (0, 2), (1, 2), (2, 0), 1, (-1,), (0, 1, 2)):
        with np.errstate(all="raise"):
            s = np.exp(x).sum(axis=axis, keepdims=True)
        np.testing.assert_allclose(reference.softmax(x, axis), np.exp(x) / s, rtol=1e-14)
        np.testing.assert_allclose(reference.log_softmax(x, axis), x - np.log(s), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(reference.logsumexp(x, axis, keepdims=True), np.log(s), rtol=1e-13, atol=1e-14)


OPTIONS = {
    "sample_weight": {"sample_weight": np.array([0.5, 2.0, 0.0, 1.0])},
    "normalizer": {"normalizer": 7.0},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 2.0},
    "temperature": {"temperature": 0.7},
    "where": {"where": np.array([[True, True, False], [True, True, True], [True, True, True], [True, True, False]])},
    "all": {
        "sample_weight": np.array([0.5, 2.0, 0.0, 1.0]),
        "normalizer": 7.0,
        "z_loss": 0.01,
        "softcap": 2.0,
        "temperature": 0.7,
        "where": np.array([[True, True, False], [True, True, True], [True, True, True], [True, True, False]]),
        "label_smoothing": 0.1,
        "weight": np.array([0.5, 1.0, 2.0]),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_options_by_their_formulas(name, reduction):
    """One dense formula, written again: l = s·(Σ A·(lse − u) + ζ·lse²)."""
    o = OPTIONS[name]
    x = np.array([[1.0, -2.0, 0.5], [0.3, 0.2, 4.0], [9.0, 9.0, 9.0], [-1.0, 2.0, 0.1]])
    y = np.array([0, 2, 1, 1])

    def total(x):
        c, tau = o.get("softcap"), o.get("temperature", 1.0)
        u = (x if c is None else c * np.tanh(x / c)) / tau
        keep = o.get("where", np.ones(x.shape, bool))
        lse = np.log(np.sum(np.where(keep, np.exp(u), 0), -1))
        w, e, s = o.get("weight", np.ones(3)), o.get("label_smoothing", 0.0), o.get("sample_weight", np.ones(4))
        rows = (1 - e) * w[y] * (lse - u[np.arange(4), y])
        rows = rows + e / keep.sum(-1) * np.sum(np.where(keep, w * (lse[:, None] - u), 0), -1)
        rows = s * (rows + o.get("z_loss", 0.0) * lse**2)
        if reduction == "none":
            return rows
        return np.sum(rows) / (o.get("normalizer") or np.sum(s * w[y])) if reduction == "mean" else np.sum(rows)

    loss, grad = reference.cross_entropy_with_grad(x, y, reduction=reduction, **o)
    np.testing.assert_allclose(loss, total(x), rtol=1e-13)
    np.testing.assert_allclose(grad, numeric_gradient(lambda v: np.sum(total(v)), x), rtol=1e-8, atol=1e-10)


def test_reference_composite_targets():
    from crossent import Mixup, SparseProbs

    rng = np.random.default_rng(4)
    x, a, b = rng.normal(0, 1, (5, 4)), rng.integers(0, 4, 5), rng.integers(0, 4, 5)
    w = rng.random(4)
    lam = rng.random(5)
    options = {"weight": w, "label_smoothing": 0.1, "reduction": "none"}
    left, right = (reference.cross_entropy_with_grad(x, t, **options) for t in (a, b))
    mixed = reference.cross_entropy_with_grad(x, Mixup(a, b, lam), **options)
    np.testing.assert_allclose(mixed[0], lam * left[0] + (1 - lam) * right[0])
    np.testing.assert_allclose(mixed[1], lam[:, None] * left[1] + (1 - lam[:, None]) * right[1], atol=1e-15)
    mean = reference.cross_entropy(x, Mixup(a, b, lam), weight=w)
    rows = reference.cross_entropy(x, Mixup(a, b, lam), weight=w, reduction="none")
    np.testing.assert_allclose(mean, rows.sum() / np.sum(lam * w[a] + (1 - lam) * w[b]))

    indices, probs = rng.integers(0, 4, (5, 3)), rng.random((5, 3))
    dense = np.zeros((5, 4))
    np.add.at(dense, (np.arange(5)[:, None], indices), probs)
    for reduction in ("mean", "sum", "none"):
        for got, want in zip(
            reference.cross_entropy_with_grad(x, SparseProbs(indices, probs), weight=w, reduction=reduction),
            reference.cross_entropy_with_grad(x, dense, weight=w, reduction=reduction),
            strict=True,
        ):
            np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-16)


def test_reference_by_products():
    rng = np.random.default_rng(5)
    x, y = rng.normal(0, 2, (2, 6, 9)), rng.integers(0, 9, (2, 6))
    lp = reference.log_softmax(x)
    scores = reference.score_tokens(x, y, entropy=True, rank=True)
    np.testing.assert_allclose(scores.logprob, np.take_along_axis(lp, y[..., None], -1)[..., 0])
    np.testing.assert_allclose(scores.logsumexp, np.log(np.exp(x).sum(-1)))
    np.testing.assert_array_equal(scores.argmax, x.argmax(-1))
    np.testing.assert_allclose(scores.entropy, -np.sum(np.exp(lp) * lp, -1))
    np.testing.assert_array_equal(scores.rank, np.sum(x > np.take_along_axis(x, y[..., None], -1), -1))
    np.testing.assert_array_equal(scores.is_greedy, x.argmax(-1) == y)
    assert scores.perplexity == pytest.approx(np.exp(-scores.logprob.mean()))
    shifted = reference.score_tokens(x, y, shift=True)
    np.testing.assert_array_equal(shifted.logprob, reference.score_tokens(x[:, :-1], y[:, 1:]).logprob)

    best, indices = reference.topk_logprobs(x, 4)
    np.testing.assert_allclose(best, np.sort(lp, -1)[..., ::-1][..., :4])
    np.testing.assert_array_equal(np.take_along_axis(lp, indices, -1), best)
    np.testing.assert_array_equal(reference.topk_logprobs(np.zeros((1, 5)), 3)[1], [[0, 1, 2]])

    q = rng.normal(0, 2, x.shape)
    p, lq = np.exp(reference.log_softmax(x / 2)), reference.log_softmax(q / 2)
    kl, grad = reference.kl_divergence_with_grad(x, q, temperature=2.0, reduction="sum")
    assert kl == pytest.approx(np.sum(p * (np.log(p) - lq)))
    small = q[:1, :2]
    _, grad = reference.kl_divergence_with_grad(x[:1, :2], small, temperature=2.0, reduction="mean")
    want = numeric_gradient(lambda v: reference.kl_divergence(x[:1, :2], v, temperature=2.0, reduction="mean"), small)
    np.testing.assert_allclose(grad, want, rtol=1e-8, atol=1e-10)
    assert reference.kl_divergence([0.0, -np.inf], [0.0, 0.0]) == pytest.approx(np.log(2))
    assert reference.kl_divergence([0.0, 0.0], [0.0, -np.inf]) == np.inf


def test_reference_takes_what_the_functions_take():
    for d in DTYPES:
        np.testing.assert_allclose(reference.softmax(np.array([0.0, 0.0], d)), 0.5)
    for bad in ([1, 2], np.zeros(2, complex), np.zeros(2, bool)):
        with pytest.raises(TypeError):
            reference.softmax(bad)
    with pytest.raises(IndexError):
        reference.cross_entropy([[0.0, 1.0]], [2])
    with pytest.raises(ValueError, match="shape"):
        reference.cross_entropy([[0.0, 1.0]], [0, 1])
    out = np.zeros(2, np.float32)
    assert reference.softmax([0.0, 0.0], out=out) is out
    np.testing.assert_array_equal(out, 0.5)
