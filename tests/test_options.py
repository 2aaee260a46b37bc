"""The options with each other and with everything else: against the reference, against their definitions, and what is not read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import crossent as ce
from crossent import reference

from .layouts import arrange
from .levels import each_level
from .oracle import BF16, DTYPES, F16, F32, F64, eps, row_dtype
from .pairwise import pairwise

NAN, INF = np.nan, np.inf

FACTORS = {
    "dtype": DTYPES,
    "classes": (1, 2, 5, 17, 128, 129, 513, 1030),
    "shape": ("row", "rows", "columns", "middle"),
    "layout": ("C", "F", "strided", "reversed"),
    "spread": (0.1, 3.0, 100.0),
    "special": (None, None, "-inf", "inf", "nan"),
    "target": ("index", "probs", "negative probs", "mixup", "mixup rows", "sparse", "sparse twice", "sparse none"),
    "ignored": (False, True),
    "reduction": ("mean", "sum", "none"),
    "label_smoothing": (0.0, 0.1, 1.0),
    "weight": (None, *DTYPES),
    "sample_weight": (None, *DTYPES),
    "normalizer": (None, 7.5),
    "z_loss": (0.0, 1e-4, -0.1),
    "softcap": (None, 1.0, 30.0, 1e3),
    "temperature": (1.0, 0.07, 0.5, 3.0, 100.0),
    "where": (None, "full", "classes", "rows", "one"),
    "grad_output": (None, "scalar", "rows"),
    "out": (None, "in place", "F", "strided"),
}
CASES = [case for seed in range(4) for case in pairwise(FACTORS, seed)]
SHAPES = {"row": ((), ()), "rows": ((9,), ()), "columns": ((), (130,)), "middle": ((2,), (3,))}


def build(case, seed):
    rng = np.random.default_rng(seed)
    before, after = SHAPES[case["shape"]]
    classes, dtype = case["classes"], case["dtype"]
    shape, rows, axis = (*before, classes, *after), before + after, len(before)
    x = rng.normal(0, case["spread"], shape)
    if case["special"]:
        x[rng.random(shape) < 0.05] = float(case["special"])
    x = x.astype(dtype)
    options = {k: case[k] for k in ("reduction", "label_smoothing", "normalizer", "z_loss", "softcap", "temperature")} | {"axis": axis}
    if case["weight"] is not None:
        options["weight"] = (rng.random(classes) * (rng.random(classes) < 0.8)).astype(case["weight"])
    if case["sample_weight"] is not None:
        options["sample_weight"] = np.asarray(rng.random(rows) * (rng.random(rows) < 0.7)).astype(case["sample_weight"])
    if case["where"] is not None:
        mask = rng.random(shape) < 0.8
        part = {
            "full": (...,),
            "classes": tuple(slice(None) if a == axis else slice(0, 1) for a in range(len(shape))),
            "one": (0,) * len(shape),
        }
        part["rows"] = tuple(slice(0, 1) if a == axis else slice(None) for a in range(len(shape)))
        options["where"] = mask[part[case["where"]]]

    def labels():
        y = np.asarray(rng.integers(0, classes, rows))
        return np.where(rng.random(rows) < 0.3, -100, y) if case["ignored"] else y

    kind = case["target"]
    if kind == "index":
        target = labels()
    elif kind.endswith("probs"):
        target = (rng.random(shape) * (rng.random(shape) < 0.5) - 0.2 * (kind != "probs")).astype(DTYPES[seed % 4])
    elif kind.startswith("mixup"):
        lam = np.asarray(rng.random(rows)).astype(F32) if kind == "mixup rows" else (0.0, 0.3, 1.0)[seed % 3]
        target = ce.Mixup(labels(), labels(), lam)
    else:
        k = {"sparse": 2, "sparse twice": 5, "sparse none": 0}[kind]
        indices = np.asarray(rng.integers(0, classes, (*rows, k)))
        if kind == "sparse twice":
            indices[..., 1] = indices[..., 0]
        target = ce.SparseProbs(indices, rng.random((*rows, k)).astype(DTYPES[seed % 4]))
    grad_output = None
    if case["grad_output"] == "rows" and case["reduction"] == "none":
        grad_output = rng.normal(0, 1, rows).astype(DTYPES[seed % 4]) if rows else -1.5
    elif case["grad_output"]:
        grad_output = -1.5
    return x, target, options, grad_output


def near(got, want, tolerance, what):
    got, want = np.asarray(got).astype(F64), np.asarray(want)
    assert got.shape == want.shape, what
    with np.errstate(all="ignore"):
        good = (got == want) | (np.isnan(got) & np.isnan(want)) | (np.abs(got - want) <= tolerance)
    if not good.all():
        at = np.unravel_index(np.argmin(good), good.shape)
        raise AssertionError(f"{what}: {(~good).sum()} of {good.size} differ, first at {at}: got {got[at]}, wanted {want[at]}")


@pytest.mark.parametrize("chunk", range(10))
def test_options_pairwise(chunk):
    for seed, case in list(enumerate(CASES))[chunk::10]:
        x, target, options, grad_output = build(case, seed)
        dtype, unit = x.dtype, eps(row_dtype(x.dtype))
        want, want_grad = reference.cross_entropy_with_grad(x, target, **options, grad_output=grad_output)
        want_rows = np.asarray(reference.cross_entropy(x, target, **{**options, "reduction": "none"}))
        # Softcap is computed in the logits' type; negative probabilities and z-losses may cancel.
        bent = 1000 if case["softcap"] or case["temperature"] != 1 else 100
        size = np.abs(want_rows) + 100 * abs(case["z_loss"]) * case["spread"] ** 2 / case["temperature"] ** 2
        size = size + (case["spread"] * case["classes"] / case["temperature"] if "probs" in case["target"] else case["spread"])
        for level in each_level():
            what = f"{level} case {seed} {case}"
            given = arrange(x.copy(), case["layout"])
            rows = ce.cross_entropy(given, target, **{**options, "reduction": "none"})
            with np.errstate(all="ignore"):
                near(rows, want_rows.astype(row_dtype(dtype)), unit * bent * size, f"{what} rows")
            only = ce.cross_entropy(given, target, **options)
            out = None
            if case["out"] == "in place":
                out = given
            elif case["out"]:
                out = arrange(np.full(x.shape, 7, dtype), case["out"])
            loss, grad = ce.cross_entropy_with_grad(given, target, **options, grad_output=grad_output, out=out)
            assert out is None or grad is out, what
            assert grad.dtype == dtype, what
            np.testing.assert_array_equal(loss, only, err_msg=what)
            if case["reduction"] != "none":
                assert type(loss) is float, what
                near(loss, np.float64(want), 2 * unit * bent * np.sum(size), f"{what} loss")
            with np.errstate(all="ignore"):
                rounded = want_grad.astype(dtype).astype(F64)
                largest = np.max(np.abs(want_grad[np.isfinite(want_grad)]), initial=0)
                slack = 2 * eps(dtype) * np.abs(rounded) + bent * unit * largest + (1e-7 if dtype == F16 else 0)
            near(grad, rounded, slack, f"{what} gradient")


def test_the_cases_are_whole():
    assert len(CASES) > 300
    for name, values in FACTORS.items():
        assert {str(c[name]) for c in CASES} == {str(v) for v in values}


# --- the definitions ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 40, 600])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_a_mixup_is_two_losses(level, classes, axis, masked):
    """Also where a side is ignored: it takes its part of the smoothing along."""
    rng = np.random.default_rng(classes)
    x = rng.normal(0, 3, (20, classes))
    a, b = rng.integers(0, classes, (2, 20))
    a[:7], b[5:12] = -100, -100
    lam = rng.random(20)
    lam[::4], lam[1::4] = 0, 1
    options = {"axis": axis, "label_smoothing": 0.2, "weight": rng.random(classes), "reduction": "none"}
    if masked:
        options["where"] = rng.random(classes) < 0.9 if axis else (rng.random(classes) < 0.9)[:, None]
        options["where"].flat[0] = True
        a, b = np.where(a < 0, a, 0), np.where(b < 0, b, 0)
    given = x if axis else np.ascontiguousarray(x.T)
    loss, grad = ce.cross_entropy_with_grad(given, ce.Mixup(a, b, lam), **options)
    (loss_a, grad_a), (loss_b, grad_b) = (ce.cross_entropy_with_grad(given, y, **options) for y in (a, b))
    np.testing.assert_allclose(loss, lam * loss_a + (1 - lam) * loss_b, rtol=1e-13, atol=0)
    wide = lam[:, None] if axis else lam
    np.testing.assert_allclose(grad, wide * grad_a + (1 - wide) * grad_b, rtol=1e-11, atol=1e-15)
    w = np.append(options["weight"], 0.0)
    divisor = np.sum(lam * w[np.maximum(a, -1)] + (1 - lam) * w[np.maximum(b, -1)])
    assert ce.cross_entropy(given, ce.Mixup(a, b, lam), **{**options, "reduction": "mean"}) == pytest.approx(
        loss.sum() / divisor, rel=1e-13
    )


@pytest.mark.parametrize("classes", [70, 300, 600, 1000, 2500, 5000])
def test_smoothing_of_reversed_rows(level, dtype, classes):
    rng = np.random.default_rng(classes)
    x = rng.normal(0, 4, (200, classes)).astype(dtype)
    x[:10, 0], x[10:20, -1] = 30, 30
    y = rng.integers(0, classes, len(x))
    options = {"label_smoothing": 0.1, "reduction": "none"}
    loss, grad = ce.cross_entropy_with_grad(np.ascontiguousarray(x[:, ::-1])[:, ::-1], y, **options)
    want, want_grad = ce.cross_entropy_with_grad(x, y, **options)
    np.testing.assert_array_equal(loss, want)
    np.testing.assert_array_equal(grad, want_grad)


def test_rows_of_a_mixup_do_not_depend_on_what_others_lack(level, dtype):
    rng = np.random.default_rng(1)
    for classes, axis in itertools.product((10, 600), (0, 1)):
        x = rng.normal(0, 3, (12, classes)).astype(dtype)
        x = x if axis else np.ascontiguousarray(x.T)
        a, b = rng.integers(0, classes, (2, 12))
        options = {"axis": axis, "label_smoothing": 0.1, "reduction": "none"}
        whole = ce.cross_entropy_with_grad(x, ce.Mixup(a, b, 0.3), **options)
        b[4] = -100
        loss, grad = ce.cross_entropy_with_grad(x, ce.Mixup(a, b, 0.3), **options)
        others = np.arange(12) != 4
        np.testing.assert_array_equal(loss[others], whole[0][others])
        np.testing.assert_array_equal(np.compress(others, grad, 1 - axis), np.compress(others, whole[1], 1 - axis))


def test_sparse_probabilities_are_dense_ones(level, dtype):
    """Classes named twice have the sum; also when the sum is of numbers of both signs, and for k = 0."""
    rng = np.random.default_rng(2)
    for k in (0, 1, 3):
        x = rng.normal(0, 3, (6, 9)).astype(dtype)
        indices = rng.integers(0, 9, (6, k))
        indices[:, -1:] = indices[:, :1]
        probs = rng.normal(0, 1, (6, k))
        dense = np.zeros((6, 9))
        np.add.at(dense, (np.arange(6)[:, None], indices), probs)
        options = {"label_smoothing": 0.1, "weight": rng.random(9), "sample_weight": rng.random(6)}
        loss, grad = ce.cross_entropy_with_grad(x, ce.SparseProbs(indices, probs), **options)
        want, want_grad = ce.cross_entropy_with_grad(x, dense, **options)
        assert loss == pytest.approx(want, rel=1e-5)
        np.testing.assert_allclose(grad.astype(F64), want_grad.astype(F64), rtol=4 * eps(dtype), atol=1e-6)


def test_softcap_of_any_size(level, dtype):
    """A cap that float32 cannot hold, or beside which x/cap would lose its digits there, is still a cap."""
    x = np.array([[1.0, 2.0, 3.0], [-4.0, 0.0, 6.0]], dtype)
    y = np.array([0, 2])
    for cap in (1e-310, 1e-46, 1e-30, 1e-3, 1e3, 1e15, 1e16, 1e38, 1e39, 1e300):
        want, want_grad = reference.cross_entropy_with_grad(x, y, softcap=cap)
        loss, grad = ce.cross_entropy_with_grad(x, y, softcap=cap)
        assert loss == pytest.approx(want, rel=32 * eps(row_dtype(dtype))), cap
        np.testing.assert_allclose(grad.astype(F64), want_grad, rtol=2 * eps(dtype), atol=32 * eps(row_dtype(dtype)), err_msg=str(cap))
    large = np.array([[3e38, 1e38, -3e38]], F32)
    assert ce.cross_entropy(large, [1], softcap=1e39) == pytest.approx(reference.cross_entropy(large, [1], softcap=1e39), rel=1e-6)


@pytest.mark.parametrize("cap", [1.5, 30.0, 2000.0])
@pytest.mark.parametrize("classes", [1040, 2048, 2500, 4111])
def test_softcap_of_long_rows(level, dtype, cap, classes):
    """Long rows are capped block by block, in another way where a block is near 0: rows of both kinds, mixed ones, every special value."""
    rng = np.random.default_rng(classes)
    near = rng.normal(0, 0.15 * cap, (14, classes)).clip(-0.6 * cap, 0.6 * cap)
    x = near.copy()
    x[1] *= 8
    x[2, -1] = 3 * cap  # far, and the maximum, in the last block
    x[3, 1030:] = -0.7 * cap
    x[3, 5] = 0.61 * cap
    x[4, ::7] = 0.62 * cap  # ties of the maximum in every block
    x[5, [0, -1]] = 0.625 * cap  # at the bound, or rounded to one of its sides
    x[6, 1024:] = -INF
    x[7, :1024] = -INF
    x[8, 1030] = INF
    x[9] = 20 * cap * np.sign(x[9])  # many have the cap itself
    x[10] = -0.05 * cap
    x[11, 1026] = NAN
    x[12] = -INF
    x = x.astype(dtype)
    y = rng.integers(0, classes, len(x))
    y[2], y[4] = classes - 1, 7
    sparse = ce.SparseProbs(np.stack([y, y[::-1], y], 1), np.array([0.5, 0.25, 0.25]) * np.ones((len(x), 1)))
    # An exponential has the error of its argument, which is as large as the cap; float16 ends at 6e-8.
    error = 4 * cap * eps(row_dtype(dtype))
    smallest = 2.0**-24 if dtype == F16 else eps(row_dtype(dtype)) ** 2
    more = {"temperature": 2.0, "z_loss": 1e-3, "sample_weight": rng.random(len(x)), "weight": rng.random(classes)}
    for target, others in ((y, {}), (y, more), (sparse, {})):
        options = {"softcap": cap, "reduction": "none"} | others
        loss, grad = ce.cross_entropy_with_grad(x, target, **options)
        want, slope = reference.cross_entropy_with_grad(x.astype(F64), target, **options)
        np.testing.assert_allclose(loss, want, rtol=error, atol=error)
        np.testing.assert_allclose(grad.astype(F64), slope, rtol=2 * eps(dtype) + 2 * error, atol=16 * smallest)
        np.testing.assert_array_equal(ce.cross_entropy(x, target, **options), loss)
        again = x.copy()
        np.testing.assert_array_equal(ce.cross_entropy_with_grad(again, target, out=again, **options)[0], loss)
        np.testing.assert_array_equal(again.astype(F64), grad.astype(F64))
    loss, grad = ce.cross_entropy_with_grad(x, y, softcap=cap, reduction="none")
    for i in range(len(x)):
        alone = ce.cross_entropy_with_grad(x[i : i + 1], y[i : i + 1], softcap=cap, reduction="none")
        np.testing.assert_array_equal(alone[0], loss[i : i + 1])
        np.testing.assert_array_equal(alone[1].astype(F64), grad[i : i + 1].astype(F64))


def same(a, b):
    """Equal, or both NaN."""
    np.testing.assert_array_equal(a.astype(F64), b.astype(F64))


# --- few classes, and rows that are bent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("classes", [2, 3, 10, 32])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_few_classes(level, classes, axis, smoothing):
    """Whatever the weights of the other rows, also those that leave the normal numbers; and with a gradient or without."""
    rng = np.random.default_rng(classes)
    rows = 300
    x = rng.normal(0, 3, (rows, classes)).astype(F32)
    y = rng.integers(0, classes, rows)
    x[7], x[11, y[11]] = NAN, -INF
    sample = rng.choice([1.0, 0.3, 7.0, 1e-25, 1e25, 0.0], rows)
    sample[[7, 11]] = 1.0
    upstream = rng.choice([1.0, -0.5, 0.0, 1e-20], rows)
    weight = rng.choice([1.0, 0.25, 0.0, 3.0], classes) if not smoothing else None
    options = {"reduction": "none", "label_smoothing": smoothing, "axis": axis}
    turned = x if axis == -1 else np.ascontiguousarray(x.T)
    loss, grad = ce.cross_entropy_with_grad(turned, y, sample_weight=sample, weight=weight, grad_output=upstream, **options)
    np.testing.assert_array_equal(loss, ce.cross_entropy(turned, y, sample_weight=sample, weight=weight, **options))
    plain = ce.cross_entropy(turned, y, **options).astype(F64)
    w = sample * (1.0 if weight is None else weight[y])
    with np.errstate(invalid="ignore", over="ignore"):
        expected = np.where((w == 0) & ~np.isnan(plain) | (sample == 0), 0.0, plain * w).astype(F32)
    if level == "scalar":
        np.testing.assert_allclose(loss, expected, rtol=2 * eps(F32))
    else:
        # That of float32 without weight, times the weight.
        np.testing.assert_array_equal(loss, expected)
    grad = grad if axis == -1 else grad.T
    for row in (0, 1, 2, 7, 11, 60, *np.flatnonzero(sample > 1e20)[:3], *np.flatnonzero(sample == 1e-25)[:3]):
        alone = {"sample_weight": sample[[row]], "weight": weight, "grad_output": upstream[[row]]}
        one, way = ce.cross_entropy_with_grad(x[[row]], y[[row]], **alone, **options | {"axis": -1})
        np.testing.assert_array_equal(one, loss[[row]])
        np.testing.assert_array_equal(way[0], grad[row])
    exact, slope = reference.cross_entropy_with_grad(
        x.astype(F64), y, sample_weight=sample, weight=weight, grad_output=upstream, reduction="none", label_smoothing=smoothing
    )
    finite = np.isfinite(slope).all(-1)
    size = np.abs(slope) + np.abs(w * upstream)[:, None]
    fine = np.abs(grad - slope)[finite] <= 8 * eps(F32) * size[finite] + 1e-38
    assert fine.all()
    np.testing.assert_array_equal(np.isnan(grad).any(-1), np.isnan(slope).any(-1))
    np.testing.assert_allclose(loss[np.isfinite(exact)], exact[np.isfinite(exact)], rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("classes", [2, 10, 32])
@pytest.mark.parametrize("cap", [None, 20.0, 1e20])
def test_bent_logits_of_few_classes(level, dtype, classes, axis, cap):
    """Whatever the mask of the other rows, wherever it stands, and however they were capped; with a gradient or without, and in place."""
    rng = np.random.default_rng(classes)
    rows = 300
    x = rng.normal(0, 8, (rows, classes)).astype(dtype)
    x[7, 1] = NAN
    y = rng.integers(0, classes, rows)
    each = rng.random((rows, classes)) < 0.7
    each[0] = False
    some = each[1:2] | (np.arange(classes) == 0)
    for where in (None, each, np.asfortranarray(each), each[::-1], some, each[:, :1]):
        full = np.broadcast_to(True if where is None else where, x.shape)
        options = {"reduction": "none", "softcap": cap, "axis": axis}
        options["where"] = where if axis == -1 or where is None else where.T
        given = x if axis == -1 else np.ascontiguousarray(x.T)
        loss, grad = ce.cross_entropy_with_grad(given, y, **options)
        same(loss, ce.cross_entropy(given, y, **options))
        own = given.copy()
        same(loss, ce.cross_entropy_with_grad(own, y, out=own, **options)[0])
        same(own, grad)
        grad = grad if axis == -1 else grad.T
        assert (grad[~full] == 0).all()
        for row in (0, 1, 7, 255, 256, rows - 1):
            alone = {"reduction": "none", "softcap": cap, "where": None if where is None else full[[row]]}
            one = ce.cross_entropy_with_grad(x[[row]], y[[row]], **alone)
            same(one[0], loss[[row]])
            same(one[1][0], grad[row])
        exact, slope = reference.cross_entropy_with_grad(x.astype(F64), y, where=where, reduction="none", softcap=cap)
        single = F64 if dtype == F64 else F32
        for got, true in ((loss, exact), (grad.astype(F64), slope)):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(true))
            np.testing.assert_array_equal(np.isinf(got), np.isinf(true))
        # A capped logit has a rounding of its own.
        fine, lost = np.isfinite(exact), 0.0 if cap is None else 8 * eps(single) * min(cap, 64.0)
        np.testing.assert_allclose(loss[fine], exact[fine], rtol=8 * eps(single), atol=lost)
        np.testing.assert_allclose(grad.astype(F64), slope, rtol=8 * eps(dtype), atol=8 * eps(single) + 8 * lost)


@pytest.mark.parametrize("classes", [33, 64, 65, 128, 129, 1000, 1025, 2100, 4100])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_smoothing_of_bent_rows(level, dtype, classes, cap):
    """Of one block and of several, whose maxima grow, fall, or stay the same; some of which take no part at all."""
    rng = np.random.default_rng(classes)
    x = rng.normal(0, 2, (12, classes))
    x[:4] += np.linspace(0, 5, classes)
    x[4:8] -= np.linspace(0, 5, classes)
    x = np.round(x * 8).clip(-60, 60) / 8 if dtype in (F16, BF16) else x
    x = x.astype(dtype)
    x[11, 3] = -INF
    y = rng.integers(0, classes, 12)
    y[2] = -100
    each = rng.random((12, classes)) < 0.8
    each[5, : classes // 2] = each[6, classes // 2 :] = False
    each[11, 3] = True
    single = F64 if dtype == F64 else F32
    for where in (None, each, each[:1]):
        options = {"reduction": "none", "label_smoothing": 0.1, "softcap": cap, "where": where}
        loss, grad = ce.cross_entropy_with_grad(x, y, **options)
        same(loss, ce.cross_entropy(x, y, **options))
        own = x.copy()
        same(loss, ce.cross_entropy_with_grad(own, y, out=own, **options)[0])
        same(own, grad)
        exact, slope = reference.cross_entropy_with_grad(x.astype(F64), y, **options)
        lost = 0.0 if cap is None else 8 * eps(single) * cap
        np.testing.assert_allclose(loss, exact, rtol=8 * eps(single), atol=lost)
        np.testing.assert_allclose(grad.astype(F64), slope, rtol=8 * eps(dtype), atol=8 * eps(single) + 8 * lost)


# --- what is not read ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_weight_0_are_not_read(level, dtype, axis):
    """Neither their logits nor their targets, which may be no classes at all."""
    rng = np.random.default_rng(3)
    s = np.array([1.0, 0.0, 2.0, 0.0, 0.5])
    out = s == 0
    x = rng.normal(0, 2, (5, 7)).astype(dtype)
    y = rng.integers(0, 7, 5)
    pairs = rng.integers(0, 7, (5, 2))
    probs = rng.random((5, 7))
    clean = (y, ce.Mixup(y, y[::-1].copy(), 0.25), ce.SparseProbs(pairs, np.ones((5, 2))), probs if axis else probs.T)
    results = []
    for bad in (False, True):
        given, label, indices, dense = x.copy(), y.copy(), pairs.copy(), probs.copy()
        if bad:
            given[out], label[out], indices[out], dense[out] = NAN, 10**12, -5, NAN
        other = np.where(out & bad, 7, y[::-1])
        targets = (label, ce.Mixup(label, other, 0.25), ce.SparseProbs(indices, np.ones((5, 2))), dense if axis else dense.T)
        given = given if axis else np.ascontiguousarray(given.T)
        results.append([ce.cross_entropy_with_grad(given, t, axis=axis, sample_weight=s, label_smoothing=0.1) for t in targets])
    for (loss, grad), (bad_loss, bad_grad) in zip(*results, strict=True):
        assert np.isfinite(loss)
        assert loss == bad_loss
        np.testing.assert_array_equal(grad, bad_grad)
        assert (np.compress(out, grad, 1 - axis) == 0).all()
    for target in clean[:3]:
        assert ce.cross_entropy(x, target, sample_weight=np.zeros(5), normalizer=3.0) == 0.0
        assert np.isnan(ce.cross_entropy(x, target, sample_weight=np.zeros(5)))
    with pytest.raises(IndexError, match=r"target\[2\]"):
        ce.cross_entropy(x, np.array([0, 99, 99, 0, 0]), sample_weight=s)
    with pytest.raises(IndexError, match=r"target\.indices\[2, 1\]"):
        ce.cross_entropy(x, ce.SparseProbs(np.array([[0, 0], [9, 9], [0, 9], [9, 9], [0, 0]]), np.ones((5, 2))), sample_weight=s)


def test_values_under_false_are_not_read(level, dtype):
    rng = np.random.default_rng(4)
    for axis, classes in itertools.product((0, 1), (5, 300)):
        x = rng.normal(0, 2, (6, classes)).astype(dtype)
        mask = rng.random((6, classes)) < 0.7
        mask[0] = False
        y = np.argmax(mask, 1)
        options = {"axis": axis, "label_smoothing": 0.1, "reduction": "none", "z_loss": 0.01}
        results = []
        for poison in (0.0, NAN, INF, -INF):
            given = np.where(mask, x, np.asarray(poison, dtype)).astype(dtype)
            turned = (given, mask) if axis else (np.ascontiguousarray(given.T), np.ascontiguousarray(mask.T))
            results.append(ce.cross_entropy_with_grad(turned[0], y, where=turned[1], **options))
        for loss, grad in results:
            np.testing.assert_array_equal(loss, results[0][0])
            np.testing.assert_array_equal(grad, results[0][1])
            assert (np.where(turned[1], 0, grad.astype(F64)) == 0).all()
        assert np.isnan(loss[0])
        assert np.isfinite(loss[1:]).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("classes", [3, 40, 70, 500, 1025, 2500])
def test_masks_of_any_layout_in_place(level, dtype, softcap, classes):
    """The same bits into a new array, in place, and whatever stands under False; zeros there."""
    rng = np.random.default_rng(classes)
    mask = rng.random((5, classes)) < 0.6
    y = rng.integers(0, classes, 5)
    mask[np.arange(5), y] = True
    for order in "CF":
        x = rng.normal(0, 3, (5, classes)).astype(dtype, order=order)
        for given in (mask, np.asfortranarray(mask), mask[:, ::-1].copy()[:, ::-1]):
            options = {"where": given, "softcap": softcap, "reduction": "none"}
            loss, grad = ce.cross_entropy_with_grad(x, y, **options)
            want, slope = reference.cross_entropy_with_grad(x.astype(F64), y, **options)
            np.testing.assert_allclose(loss, want, rtol=32 * eps(row_dtype(dtype)))
            np.testing.assert_allclose(grad.astype(F64), slope, rtol=64 * eps(dtype), atol=64 * eps(row_dtype(dtype)))
            assert (grad[~mask] == 0).all()
            for poison in (NAN, INF, -INF, 1e4):
                z = np.where(mask, x.astype(F64), poison).astype(dtype, order=order)
                for out in (None, z):
                    again = ce.cross_entropy_with_grad(z, y, out=out, **options)
                    np.testing.assert_array_equal(again[0], loss)
                    np.testing.assert_array_equal(again[1], grad)


def test_a_target_under_false(level, dtype):
    x = np.array([[0.0, 1.0, 2.0]], dtype)
    loss, grad = ce.cross_entropy_with_grad(x, [2], where=[True, True, False])
    assert loss == INF
    p = reference.softmax(x[:, :2])
    np.testing.assert_allclose(grad.astype(F64), np.append(p, [[0.0]], 1), rtol=4 * eps(dtype))


def test_options_that_are_small_types():
    """Numbers of NumPy and of ml_dtypes are numbers; also bool, as in PyTorch."""
    x, y = np.random.default_rng(5).normal(0, 1, (4, 3)), np.array([0, 1, 2, 0])
    want = ce.cross_entropy(x, y, label_smoothing=0.5, temperature=2.0, softcap=4.0, z_loss=0.25, normalizer=8.0)
    for kind in (F16.type, BF16.type, F32.type, F64.type, np.longdouble, np.array):
        numbers = {"label_smoothing": 0.5, "temperature": 2.0, "softcap": 4.0, "z_loss": 0.25, "normalizer": 8.0}
        assert ce.cross_entropy(x, y, **{k: kind(v) for k, v in numbers.items()}) == want
    assert ce.cross_entropy(x, y, label_smoothing=-0.0) == ce.cross_entropy(x, y)
    assert ce.cross_entropy(x, y, label_smoothing=True) == ce.cross_entropy(x, y, label_smoothing=1.0)


@pytest.mark.parametrize("softcap", [1e16, 1e20, 1e30])
def test_a_softcap_that_is_hardly_one(level, softcap):
    # Beyond what float32's powers of the cap can hold.
    rng = np.random.default_rng(4)
    for classes in (5, 100, 3000):
        x, y = rng.normal(0, 3, (4, classes)).astype(np.float32), rng.integers(0, classes, 4)
        want, gradient = ce.cross_entropy_with_grad(x, y)
        got, capped = ce.cross_entropy_with_grad(x, y, softcap=softcap)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(capped, gradient, rtol=2e-6, atol=1e-9)
