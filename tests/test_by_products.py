"""What scores of tokens, top-k and KL divergence share: special rows, every layout, properties, errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import crossent as ce
from crossent import reference

from .layouts import INPUTS, OUTPUTS, arrange, flat_axis
from .levels import each_level
from .oracle import BF16, DTYPES, F16, F64, eps, row_dtype
from .pairwise import pairwise
from .test_errors import refuses
from .test_kl import check_kl
from .test_matrix import CLASSES, LENGTHS, SHAPES, check_array
from .test_scores import check_scores

INF, NAN = np.inf, np.nan

# --- special rows ----------------------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "all -inf": lambda x: np.full_like(x, -INF),
    "+inf": lambda x: np.where(np.arange(x.size) == x.size // 2, INF, x).astype(x.dtype),
    "nan": lambda x: np.where(np.arange(x.size) == x.size // 2, NAN, x).astype(x.dtype),
    "nan and +inf": lambda x: np.where(np.arange(x.size) == x.size // 2, NAN, np.where(np.arange(x.size) == 0, INF, x)).astype(x.dtype),
    "all nan": lambda x: np.full_like(x, NAN),
}


@pytest.mark.parametrize("classes", [1, 3, 17, 600, 1100])
@pytest.mark.parametrize("bad", list(BAD_ROWS))
def test_rows_without_a_softmax(level, dtype, bad, classes, rng):
    good = rng.normal(0, 2, classes).astype(dtype)
    x = np.stack([good, BAD_ROWS[bad](good), good])
    for given_x, axis in ((x, 1), (np.asfortranarray(x), 1), (np.ascontiguousarray(x.T), 0)):
        y = np.array([0, classes // 2, 0])
        got = ce.score_tokens(given_x, y, axis=axis, entropy=True, rank=True)
        want = reference.score_tokens(given_x, y, axis=axis, entropy=True, rank=True)
        check_scores(got, want, dtype)
        assert np.isnan(got.logprob[1])
        assert np.isnan(got.entropy[1])
        for k in {1, min(4, classes), classes}:
            logprobs, indices = ce.topk_logprobs(given_x, k, axis=axis)
            best, order = reference.topk_logprobs(given_x, k, axis=axis)
            np.testing.assert_array_equal(indices, order)
            np.testing.assert_array_equal(np.isnan(logprobs), np.isnan(best))
        for p, q in ((x, np.stack([good] * 3)), (np.stack([good] * 3), x)):
            kl, grad = ce.kl_divergence_with_grad(p, q)
            assert np.isnan(kl[1])
            assert (kl[[0, 2]] == 0).all()
            assert np.isnan(grad[1].astype(F64)).all()
            assert (grad[[0, 2]].astype(F64) == 0).all()


@pytest.mark.parametrize("classes", [2, 17, 600, 1100])
def test_minus_infinity(level, dtype, classes, rng):
    x = rng.normal(0, 2, (6, classes)).astype(dtype)
    y = rng.integers(0, classes, 6)
    masked = (y + 1) % classes
    x[np.arange(6), masked] = -INF
    got = ce.score_tokens(x, y, entropy=True, rank=True)
    check_scores(got, reference.score_tokens(x, y, entropy=True, rank=True), dtype)
    assert np.isfinite(got.entropy).all()
    at = ce.score_tokens(x, masked, rank=True)
    assert np.isneginf(at.logprob).all()
    assert (at.rank == classes - 1).all()
    logprobs, indices = ce.topk_logprobs(x, classes)
    assert (indices[:, -1] == masked).all()
    assert np.isneginf(logprobs[:, -1]).all()
    # 0·log 0 = 0 in P; where Q alone excludes a class it is infinitely far, and the gradient is finite.
    q = rng.normal(0, 2, x.shape).astype(dtype)
    loss, grad = ce.kl_divergence_with_grad(x, q)
    want, want_grad = reference.kl_divergence_with_grad(x, q)
    assert np.isfinite(loss).all()
    check_kl(loss, want, grad, want_grad, x, q, {})
    both = q.copy()
    both[np.arange(6), masked] = -INF
    loss, grad = ce.kl_divergence_with_grad(x, both)
    want, want_grad = reference.kl_divergence_with_grad(x, both)
    check_kl(loss, want, grad, want_grad, x, both, {})
    assert (grad[np.arange(6), masked].astype(F64) == 0).all()
    loss, grad = ce.kl_divergence_with_grad(q, x)
    assert np.isposinf(loss).all()
    assert np.isfinite(grad.astype(F64)).all()
    for reduction in ("mean", "sum"):
        assert ce.kl_divergence(q, x, reduction=reduction) == INF
    # However little mass P has there.
    far = np.zeros((1, 3), dtype)
    far[0, 1] = -300
    assert np.isposinf(ce.kl_divergence(far, np.array([[0.0, -INF, 0.0]], dtype)))


def test_leading_blocks_of_minus_infinity(level, dtype, rng):
    """A maximum that is found late, in either."""
    for classes in (700, 1500, 2100):
        for where in range(0, classes, 171):
            p, q = rng.normal(0, 2, (2, 1, classes)).astype(dtype)
            for mask_p, mask_q in ((True, False), (True, True)):
                a, b = p.copy(), q.copy()
                if mask_p:
                    a[:, :where] = -INF
                if mask_q:
                    b[:, :where] = -INF
                loss, grad = ce.kl_divergence_with_grad(a, b)
                want, want_grad = reference.kl_divergence_with_grad(a, b)
                check_kl(loss, want, grad, want_grad, a, b, {}, f"{classes} {where} {mask_p} {mask_q}")
            check_scores(ce.score_tokens(a, [where], entropy=True), reference.score_tokens(a, [where], entropy=True), dtype)


def test_logits_of_any_size(level, dtype):
    largest = 6e4 if dtype == F16 else 1e30
    rows = [
        [largest, -largest, 0.0],
        [-largest, -largest, -largest],
        [largest, largest, 1.0],
        [0.0, -largest, 1.0],
        [largest, largest / 2, 0.0],
    ]
    x = np.array(rows).astype(dtype)
    y = np.array([0, 1, 2, 1, 1])
    check_scores(ce.score_tokens(x, y, entropy=True, rank=True), reference.score_tokens(x, y, entropy=True, rank=True), dtype)
    for tau in (1.0, 4.0):
        for p, q in ((x, x), (x, x[::-1].copy()), (np.zeros_like(x), x), (x, np.zeros_like(x)), (x, np.roll(x, 1, 1))):
            loss, grad = ce.kl_divergence_with_grad(p, q, temperature=tau)
            want, want_grad = reference.kl_divergence_with_grad(p, q, temperature=tau)
            assert not np.isnan(loss).any()
            np.testing.assert_allclose(loss, want, rtol=64 * eps(row_dtype(dtype)))
            np.testing.assert_allclose(grad.astype(F64), want_grad, rtol=0, atol=8 * eps(dtype))
    # The differences of two such rows do not overflow.
    if dtype != F64:
        top = float(ml_dtypes.finfo(dtype).max)
        assert ce.kl_divergence(np.full((1, 4), top, dtype), np.full((1, 4), -top, dtype)) == 0


# --- every layout ----------------------------------------------------------------------------------------------------------------------

FACTORS = {
    "function": ("score", "topk", "kl"),
    "dtype": DTYPES,
    "layout": tuple(INPUTS),
    "other": tuple(INPUTS),
    "shape": tuple(SHAPES),
    "classes": CLASSES,
    "negative_axis": (False, True),
    "ignored": (False, True),
    "options": (0, 1, 2, 3),
    "out": (None, "in place", *OUTPUTS),
}
CASES = pairwise(FACTORS, seed=5)


def run_case(case, seed, where):
    rng = np.random.default_rng(seed)
    before, after = SHAPES[case["shape"]]
    classes, dtype = case["classes"], case["dtype"]
    if np.prod(before + after, dtype=int) * classes > 40_000:
        before, after = before[:1], after[:1]
    shape, axis = (*before, classes, *after), len(before)
    x = (rng.normal(0, rng.choice([1.0, 6.0]), shape) + rng.choice([0.0, 30.0])).astype(dtype)
    if case["layout"] == "broadcast":
        flat = [a for a, n in enumerate(shape) if n > 1]
        if flat:
            x = flat_axis(x, flat[seed % len(flat)])
    given_x, along = arrange(x, case["layout"]), axis - len(shape) if case["negative_axis"] else axis
    bits = given_x.tobytes()
    option = case["options"]
    if case["function"] == "score":
        y = rng.integers(0, classes, before + after)
        ignore = 0 if case["ignored"] else None
        options = {"axis": along, "ignore_index": ignore, "entropy": option % 2 == 1, "rank": option >= 2}
        if y.ndim and seed % 2:
            options["shift"] = True
        got = ce.score_tokens(given_x, arrange(y, case["other"]), **options)
        check_scores(got, reference.score_tokens(x, y, **options), dtype, where)
    elif case["function"] == "topk":
        k = (1, min(3, classes), classes, classes // 2)[option]
        logprobs, indices = ce.topk_logprobs(given_x, k, axis=along)
        best, order = reference.topk_logprobs(x, k, axis=along)
        np.testing.assert_array_equal(indices, order, err_msg=where)
        check_array(logprobs, best, np.abs(best), row_dtype(dtype), 6, where)
    else:
        q = (x.astype(F64) + rng.normal(0, 10.0 ** rng.integers(-4, 1), shape)).astype(dtype)
        options = {"axis": along, "temperature": (1.0, 2.0, 0.7, 1.0)[option], "reduction": ("none", "none", "sum", "mean")[option]}
        given_q = arrange(q, case["other"])
        out = None
        if case["out"] == "in place":
            if case["other"] in ("read-only", "byte-swapped", "misaligned", "broadcast"):
                given_q = q.copy()
            out = given_q
        elif case["out"] is not None:
            out = arrange(np.full(shape, 7, dtype), case["out"])
        want, want_grad = reference.kl_divergence_with_grad(x, q, **options)
        loss, grad = ce.kl_divergence_with_grad(given_x, given_q, out=out, **options)
        assert out is None or grad is out
        check_kl(loss, want, grad, want_grad, x, q, options, where)
    assert given_x.tobytes() == bits, "logits were written to"


@pytest.mark.parametrize("chunk", range(6))
def test_pairwise(chunk):
    for seed, case in list(enumerate(CASES))[chunk::6]:
        for level in each_level():
            run_case(case, seed, f"{level} case {seed} {case}:")


@pytest.mark.parametrize("classes", [65, 1025, 3000])
def test_largest_of_rows_in_any_order(dtype, classes, rng):
    x = rng.normal(0, 3, (9, classes))
    x[1].sort()
    x[2] = np.sort(x[2])[::-1]
    x[3] = 1.5
    x[4] = rng.integers(0, 7, classes)
    x[5, rng.random(classes) < 0.99] = -INF
    x[6, classes // 2 :] += 40
    x[7] = np.repeat(np.arange(classes // 40 + 1), 40)[:classes]
    x[8, rng.random(classes) < 0.1] = NAN
    x = x.astype(dtype)
    by_rows = (np.argsort(-x.astype(F64), axis=-1, kind="stable"), x, -1)
    by_columns = (by_rows[0].T, np.ascontiguousarray(x.T), 0)
    for level in each_level():
        for k in (1, 2, 8, 20, 63, 64, 65, 129, classes):
            for order, given_x, axis in (by_rows, by_columns):
                if k <= classes:
                    indices = ce.topk_logprobs(given_x, k, axis=axis)[1]
                    np.testing.assert_array_equal(indices, order[:k] if axis == 0 else order[:, :k], err_msg=f"{level} k={k} axis={axis}")


@pytest.mark.parametrize("inner", [False, True], ids=["rows", "columns"])
def test_every_length(dtype, inner):
    rng = np.random.default_rng(3)
    for classes in LENGTHS:
        n = (1, 16, 35)[classes % 3]
        x = rng.normal(0, 4, (n, classes)).astype(dtype)
        q = (x.astype(F64) + rng.normal(0, 0.5, x.shape)).astype(dtype)
        y = rng.integers(0, classes, n)
        k = min(classes, 5)
        want = reference.score_tokens(x, y, entropy=True, rank=True)
        best, order = reference.topk_logprobs(x, k)
        want_kl, want_grad = reference.kl_divergence_with_grad(x, q)
        a, b, axis = (np.ascontiguousarray(x.T), np.ascontiguousarray(q.T), 0) if inner else (x, q, 1)
        for level in each_level():
            where = f"{level} C={classes} N={n}"
            check_scores(ce.score_tokens(a, y, axis=axis, entropy=True, rank=True), want, dtype, where)
            logprobs, indices = ce.topk_logprobs(a, k, axis=axis)
            np.testing.assert_array_equal(indices.T if inner else indices, order, err_msg=where)
            check_array(logprobs.T if inner else logprobs, best, np.abs(best), row_dtype(dtype), 6, where)
            kl, grad = ce.kl_divergence_with_grad(a, b, axis=axis)
            check_kl(kl, want_kl, grad.T if inner else grad, want_grad, x, q, {}, where)


def test_the_same_bits_for_threads_layouts_and_neighbours(level, dtype):
    rng = np.random.default_rng(4)
    x, q = rng.normal(0, 3, (2, 300, 601)).astype(dtype)
    y = rng.integers(0, 601, 300)

    def everything(x, q, y):
        loss, grad = ce.kl_divergence_with_grad(x, q)
        return [*ce.score_tokens(x, y, entropy=True, rank=True), *ce.topk_logprobs(x, 9), loss, grad]

    want = everything(x, q, y)
    total = ce.kl_divergence(x, q, reduction="sum")
    for threads in (1, 2, 3, 7):
        with ce.threads(threads):
            for a, b in zip(everything(x, q, y), want, strict=True):
                np.testing.assert_array_equal(a, b)
            assert ce.kl_divergence(x, q, reduction="sum") == total
    for layout in INPUTS:
        if layout != "broadcast":
            for a, b in zip(everything(arrange(x, layout), arrange(q, layout), y), want, strict=True):
                np.testing.assert_array_equal(a, b)
    for row in (0, 17, 299):
        one = slice(row, row + 1)
        for a, b in zip(everything(x[one], q[one], y[one]), want, strict=True):
            np.testing.assert_array_equal(a, b[one])


def test_dlpack_and_lists():
    scores = ce.score_tokens([[0.0, 1.0], [2.0, 0.0]], [1, 1])
    np.testing.assert_allclose(scores.logprob, reference.score_tokens([[0.0, 1.0], [2.0, 0.0]], [1, 1]).logprob)
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    y = torch.tensor([0, 7, 3])
    want = ce.score_tokens(x.float().numpy().astype(BF16), y.numpy())
    np.testing.assert_array_equal(ce.score_tokens(x, y).logprob, want.logprob)
    assert ce.topk_logprobs(x, 2)[0].shape == (3, 2)
    assert ce.kl_divergence(x, x).tolist() == [0, 0, 0]


# --- properties ------------------------------------------------------------------------------------------------------------------------

ELEMENTS = st.one_of(st.floats(-100, 100, width=32), st.sampled_from([0.0, -INF, 1e30, -1e30, 88.0, -150.0, -151.0]))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 40), st.sampled_from([np.float32, np.float64]))
def test_properties(data, classes, dtype):
    p = data.draw(hnp.arrays(dtype, (2, classes), elements=ELEMENTS))
    q = data.draw(hnp.arrays(dtype, (2, classes), elements=ELEMENTS))
    y = data.draw(hnp.arrays(np.int64, 2, elements=st.integers(0, classes - 1)))
    k = data.draw(st.integers(0, classes))
    scores = ce.score_tokens(p, y, entropy=True, rank=True)
    want = reference.score_tokens(p, y, entropy=True, rank=True)
    check_scores(scores, want, np.dtype(dtype))
    valid = ~np.isnan(scores.logprob)
    assert (scores.logprob[valid] <= 0).all()
    assert (scores.entropy[valid] >= 0).all()
    assert (scores.entropy[valid] <= np.log(classes) * (1 + 1e-6) + 1e-12).all()
    logprobs, indices = ce.topk_logprobs(p, k)
    np.testing.assert_array_equal(indices, reference.topk_logprobs(p, k)[1])
    assert (logprobs[valid, 1:] <= logprobs[valid, :-1]).all()
    with np.errstate(all="ignore"):
        loss, grad = ce.kl_divergence_with_grad(p, q)
        want_loss, want_grad = reference.kl_divergence_with_grad(p, q)
    assert not (loss < 0).any()
    np.testing.assert_array_equal(np.isnan(loss), np.isnan(want_loss))
    # The reference itself cancels, the more the larger the logits are.
    slack = 1e-13 if np.abs(p[np.isfinite(p)]).max(initial=0) < 1e3 else 1e-5
    np.testing.assert_allclose(loss, want_loss, rtol=64 * eps(np.dtype(dtype)), atol=slack)
    np.testing.assert_allclose(grad, want_grad, rtol=0, atol=8 * eps(np.dtype(dtype)))
    self_loss, self_grad = ce.kl_divergence_with_grad(p, p)
    assert ((self_loss == 0) | np.isnan(self_loss)).all()
    assert ((self_grad == 0) | np.isnan(self_grad)).all()


# --- errors ----------------------------------------------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(0, 2, (6, 5)).astype(np.float32)
Y = np.array([0, 1, 2, 3, 4, 0])


def test_tokens_out_of_range():
    y = Y.copy()
    y[3] = 5
    message = refuses(IndexError, "", ce.score_tokens, X, y)
    assert message == (
        "tokens[3] = 5 is out of bounds for 5 classes (axis -1 of logits with shape (6, 5)); if it marks padding, pass ignore_index=5"
    )
    assert ce.score_tokens(X, y, ignore_index=5).argmax[3] == -1
    refuses(IndexError, r"tokens\[3\] = 5 ", ce.score_tokens, X, y, ignore_index=-100)
    many = np.zeros((2, 3, 4), np.int64)
    many[1, 2, 3] = -1
    refuses(IndexError, r"tokens\[1, 2, 3\] = -1 ", ce.score_tokens, np.zeros((2, 3, 4, 5)), many)
    refuses(IndexError, r"tokens\[1, 2, 3\] = -1 ", ce.score_tokens, np.zeros((2, 3, 4, 5)), many, shift=True)
    refuses(IndexError, "0 classes", ce.score_tokens, np.zeros((2, 0)), [0, 0])


def test_shapes_and_axes():
    refuses(ValueError, r"tokens has shape \(5,\).*shape \(6,\).*pass axis=0", ce.score_tokens, X, np.zeros(5, int))
    refuses(ValueError, "pass axis=1", ce.score_tokens, np.zeros((2, 7, 3)), np.zeros((2, 3), int))
    refuses(ValueError, r"tokens has shape \(6, 5\)", ce.score_tokens, X, np.zeros((6, 5), int))
    refuses(ValueError, "shift=True", ce.score_tokens, X[0], 1, shift=True)
    refuses(ValueError, r"q_logits has shape \(6, 4\).*p_logits, \(6, 5\)", ce.kl_divergence, X, X[:, :4])
    for f, args in ((ce.score_tokens, (1,)), (ce.topk_logprobs, (1,)), (ce.kl_divergence, (2.0,)), (ce.kl_divergence_with_grad, (2.0,))):
        refuses(ValueError, "class axis", f, np.array(1.0), *args)
    for axis in (2, -3):
        refuses(np.exceptions.AxisError, "", ce.score_tokens, X, Y, axis=axis)
        refuses(np.exceptions.AxisError, "", ce.topk_logprobs, X, 1, axis=axis)
        refuses(np.exceptions.AxisError, "", ce.kl_divergence, X, X, axis=axis)
    for k in (-1, 6, 10**30):
        refuses(ValueError, "^k = ", ce.topk_logprobs, X, k)
    refuses(TypeError, "^k must be an integer", ce.topk_logprobs, X, 1.5)
    refuses(TypeError, "ignore_index must be an integer", ce.score_tokens, X, Y, ignore_index=1.5)
    refuses(ValueError, "ignore_index", ce.score_tokens, X, Y, ignore_index=2**63)


def test_types():
    for bad, name in ((X.astype(int), "int64"), (X > 0, "bool"), (X.astype(complex), "complex128"), (X.astype(object), "object")):
        refuses(TypeError, f"logits has dtype {name}", ce.score_tokens, bad, Y)
        refuses(TypeError, f"logits has dtype {name}", ce.topk_logprobs, bad, 1)
        refuses(TypeError, f"p_logits has dtype {name}", ce.kl_divergence, bad, X)
        refuses(TypeError, f"q_logits has dtype {name}", ce.kl_divergence_with_grad, X, bad)
    refuses(TypeError, r"tokens has dtype float64.*tokens\.astype", ce.score_tokens, X, Y.astype(float))
    refuses(TypeError, "tokens has dtype bool", ce.score_tokens, X, Y > 0)
    refuses(TypeError, "out must be a numpy.ndarray", ce.kl_divergence_with_grad, X, X, out=[1.0])


def test_options_and_outputs_of_kl():
    for tau in (0.0, -1.0, INF, NAN):
        refuses(ValueError, "temperature must be", ce.kl_divergence, X, X, temperature=tau)
    refuses(ValueError, "reduction must be", ce.kl_divergence, X, X, reduction="batchmean")
    q = X.copy()
    f = ce.kl_divergence_with_grad
    refuses(TypeError, "out has dtype", f, X, q, out=np.zeros((6, 5)))
    refuses(ValueError, "out has shape", f, X, q, out=np.zeros((5, 6), np.float32))
    refuses(ValueError, "out overlaps p_logits", f, X, q, out=X)
    refuses(ValueError, "only q_logits itself", f, X, q, out=q[::-1])
    refuses(ValueError, "grad_output has shape", f, X, q, grad_output=np.ones(5))
    refuses(ValueError, "reduction='none'", f, X, q, grad_output=np.ones(6), reduction="sum")
    locked = q.copy()
    locked.flags.writeable = False
    refuses(ValueError, "read-only", f, X, q, out=locked)
