"""Every layout, dtype, axis, target kind, option and way of output with every other, pairwise, against the reference.

The cases are the same in every run. Each runs at every level, and says its factors when it fails.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import crossent as ce
from crossent import reference

from .layouts import INPUTS, OUTPUTS, arrange, flat_axis
from .levels import each_level
from .oracle import DTYPES, F16, F64, INDEX_DTYPES, eps, round_to, row_dtype
from .pairwise import pairwise

# Shapes as (axes before the classes, axes after).
SHAPES = {
    "1-d": ((), ()),
    "rows": ((13,), ()),
    "columns": ((), (13,)),
    "one row": ((1,), ()),
    "NCHW": ((2,), (3, 5)),
    "3-d": ((4, 3), ()),
    "3-d first": ((), (3, 4)),
    "4-d middle": ((2, 3), (5,)),
    "wide inner": ((2,), (70,)),
    "no rows": ((0,), (3,)),
}
CLASSES = (1, 2, 3, 4, 7, 8, 10, 15, 16, 17, 33, 63, 64, 65, 100, 127, 511, 512, 513, 1030)
FACTORS = {
    "dtype": DTYPES,
    "layout": tuple(INPUTS),
    "shape": tuple(SHAPES),
    "classes": CLASSES,
    "negative_axis": (False, True),
    "target": (
        *(d.char for d in INDEX_DTYPES),
        "swapped",
        "strided",
        "read-only",
        *(f"probs {d.name}" for d in DTYPES),
        "probs F",
        "probs reversed",
    ),
    "reduction": ("mean", "sum", "none"),
    "weight": (None, "float32", "float64", "float16", "bfloat16", "int32", "bool", "strided"),
    "smoothing": (0.0, 0.1, 1.0),
    "ignored": ("none", "some", "all"),
    "out": (None, "in place", *OUTPUTS),
    "grad_output": (None, "scalar", "rows", "strided rows"),
}
CASES = pairwise(FACTORS, seed=1) + pairwise(FACTORS, seed=2)


def tolerance(dtype, want, size, units):
    """`units` of the computing type at `size`, then one rounding to `dtype`."""
    work = row_dtype(dtype)
    low = round_to(want - units * 2 * eps(work) * size, dtype)
    high = round_to(want + units * 2 * eps(work) * size, dtype)
    return low, high


def check_array(got, want, size, dtype, units, what):  # noqa: PLR0917
    assert got.shape == want.shape, what
    got = np.asarray(got).astype(np.float64)
    with np.errstate(all="ignore"):
        low, high = tolerance(dtype, want, np.where(np.isfinite(size), size, 0), units)
        good = ((got >= low) & (got <= high)) | ((got == want) | (np.isnan(got) & np.isnan(want)))
    if not good.all():
        at = np.unravel_index(np.argmin(good), good.shape)
        where = f"{(~good).sum()} of {good.size} differ, first at {tuple(map(int, at))}"
        raise AssertionError(f"{what}: {where}: got {got[at]}, wanted {want[at]}")


def gradient_size(x, want, mass_total, axis, scale):
    """|p·ΣA| + |A| entry by entry, times what multiplies the gradient: the terms that a gradient subtracts."""
    p = np.abs(reference.softmax(x, axis) * mass_total * scale)
    with np.errstate(all="ignore"):
        return p + np.abs(p - want) + np.abs(want)


def build(case, seed):
    rng = np.random.default_rng(seed)
    before, after = SHAPES[case["shape"]]
    classes, dtype = case["classes"], case["dtype"]
    if np.prod(before + after, dtype=int) * classes > 40_000:
        before, after = before[:1], after[:1]
    shape, axis = (*before, classes, *after), len(before)
    rows = before + after
    # Both narrow and wide rows; the narrow ones at an offset.
    x = (rng.normal(0, rng.choice([1.0, 6.0]), shape) + rng.choice([0.0, 30.0])).astype(dtype)
    if case["layout"] == "broadcast":
        flat = [a for a, n in enumerate(shape) if n > 1]
        if flat:
            x = flat_axis(x, flat[seed % len(flat)])
    options = {
        "axis": axis - len(shape) if case["negative_axis"] else axis,
        "reduction": case["reduction"],
        "label_smoothing": case["smoothing"],
    }
    if case["weight"] is not None:
        kind = case["weight"]
        w = rng.integers(0, 4, classes) / 2
        if kind == "strided":
            options["weight"] = np.repeat(w, 3)[::-3][::-1] if classes == 1 else np.repeat(w, 3)[::3]
        elif kind == "bool":
            options["weight"] = w > 0
        else:
            options["weight"] = (w * 2).astype(kind if kind != "bfloat16" else DTYPES[1])
    kind = case["target"]
    if kind.startswith("probs"):
        target = rng.random(shape)
        target[rng.random(shape) < 0.3] = 0
        name = kind.split()[1]
        if name in ("F", "reversed"):
            target = arrange(target.astype(np.float32), name)
        else:
            target = target.astype(next(d for d in DTYPES if d.name == name))
    else:
        target = rng.integers(0, min(classes, 100), rows)
        if case["ignored"] != "none":
            # Signed labels use the default, unsigned ones a class.
            signed = np.dtype(kind).kind == "i" if len(kind) == 1 else True
            marker = -100 if signed else int(rng.integers(0, min(classes, 100)))
            if not signed:
                options["ignore_index"] = marker
            target = np.where(rng.random(rows) < (0.4 if case["ignored"] == "some" else 2), marker, target)
        if kind == "swapped":
            target = np.asarray(target).astype(">i8" if np.little_endian else "<i8")
        elif kind in ("strided", "read-only"):
            target = arrange(np.asarray(target), kind)
        else:
            target = np.asarray(target).astype(kind)
    grad_output = None
    if case["grad_output"] == "scalar" or (case["grad_output"] is not None and case["reduction"] != "none"):
        grad_output = -1.5
    elif case["grad_output"] is not None:
        grad_output = rng.normal(0, 1, rows).astype(DTYPES[seed % 4])
        if case["grad_output"] == "strided rows":
            grad_output = arrange(grad_output, "strided")
    return x, target, options, grad_output, axis, rng


def run(case, seed, where):
    x, target, options, grad_output, axis, _ = build(case, seed)
    dtype = x.dtype
    want, want_grad = reference.cross_entropy_with_grad(x, target, **options, grad_output=grad_output)
    want_rows = np.asarray(reference.cross_entropy(x, target, **{**options, "reduction": "none"}))

    arranged = arrange(x, case["layout"])
    before = arranged.tobytes()
    loss = ce.cross_entropy(arranged, target, **options)
    rows = np.asarray(ce.cross_entropy(arranged, target, **{**options, "reduction": "none"}))
    out, given = None, arranged
    if case["out"] == "in place":
        if case["layout"] in ("read-only", "byte-swapped", "misaligned", "broadcast"):
            given = x.copy()
        out = given
    elif case["out"] is not None:
        out = arrange(np.full(x.shape, 7, dtype), case["out"])
    loss_too, grad = ce.cross_entropy_with_grad(given, target, **options, grad_output=grad_output, out=out)
    if out is None:
        assert arranged.tobytes() == before, "logits were written to"
    else:
        assert grad is out, where
    assert grad.dtype == dtype, where
    assert grad.dtype.isnative
    np.testing.assert_array_equal(np.asarray(loss_too), np.asarray(loss), err_msg=where)

    work = row_dtype(dtype)
    assert rows.dtype == work
    # Positive terms only: nothing cancels. The reference itself may be 2 ulp off in float64.
    check_array(rows, want_rows, np.abs(want_rows), work, 6, f"{where} rows")
    if case["reduction"] == "none":
        np.testing.assert_array_equal(loss, rows)
    else:
        assert type(loss) is float
        if np.isfinite(want):
            total = rows.astype(np.float64).sum()
            assert loss == pytest.approx(want, rel=8 * eps(work), abs=0), where
            if case["reduction"] == "sum":
                assert loss == pytest.approx(total, rel=1e-14, abs=0), where
        else:
            np.testing.assert_array_equal(loss, want, err_msg=where)

    # What multiplies p·ΣA: the gradient of reduction "sum" per row is known, so the factor is their ratio; simpler to bound it from above.
    w = np.asarray(options.get("weight", np.ones(x.shape[axis]))).astype(np.float64)
    e = options["label_smoothing"]
    t = np.asarray(target)
    if t.dtype.kind in "iu":
        safe = np.where((t >= 0) & (t < len(w)), t, 0).astype(np.int64)
        mass = (1 - e) * w[safe] + e * w.mean()
        divisor = np.sum(np.where(np.not_equal(t, options.get("ignore_index", -100)), w[safe], 0.0))
    else:
        wide = np.expand_dims(w, tuple(range(1, x.ndim - axis)))
        mass = np.sum(wide * ((1 - e) * t.astype(np.float64) + e / len(w)), axis)
        divisor = float(np.prod(mass.shape))
    scale = np.abs(np.ones(mass.shape) if grad_output is None else np.asarray(grad_output).astype(np.float64))
    with np.errstate(all="ignore"):
        scale = scale / divisor if options["reduction"] == "mean" else scale
        size = gradient_size(x, want_grad, np.expand_dims(mass, axis), axis, np.expand_dims(np.broadcast_to(scale, mass.shape), axis))
    check_array(grad, want_grad, size, dtype, 10, f"{where} gradient")


CHUNKS = 40


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_cross_entropy_pairwise(chunk):
    for seed, case in list(enumerate(CASES))[chunk::CHUNKS]:
        for level in each_level():
            run(case, seed, f"{level} case {seed} {case}:")


def test_the_matrix_is_whole():
    """The number of cases and that each factor value is there: so that a slip in the generator cannot empty the suite."""
    assert len(CASES) >= len(CLASSES) * len(FACTORS["target"])
    for name, values in FACTORS.items():
        assert {str(c[name]) for c in CASES} == {str(v) for v in values}
    seen = {(str(c["layout"]), str(c["dtype"]), str(c["out"])) for c in CASES}
    assert len(seen) > 250


# --- the other functions ---------------------------------------------------------------------------------------------------------------

TRANSFORM_CASES = pairwise(
    {
        "function": ("softmax", "log_softmax", "logsumexp", "softmax_vjp", "log_softmax_vjp", "nll_loss"),
        "dtype": DTYPES,
        "layout": tuple(INPUTS),
        "shape": tuple(SHAPES),
        "classes": CLASSES,
        "out": (None, "in place", *OUTPUTS),
        "other": (*(d.name for d in DTYPES), "F", "reversed", "strided", "misaligned", "byte-swapped"),
    },
    seed=2,
)


def run_transform(case, seed, where):
    rng = np.random.default_rng(seed)
    before, after = SHAPES[case["shape"]]
    shape, axis, dtype = (*before, case["classes"], *after), len(before), case["dtype"]
    x = rng.normal(0, 3, shape).astype(dtype)
    if case["layout"] == "broadcast" and np.size(x):
        x = flat_axis(x, seed % x.ndim)
    name = case["function"]
    f, ref = getattr(ce, name), getattr(reference, name)
    work = row_dtype(dtype)

    if name == "nll_loss":
        target = rng.integers(0, case["classes"], before + after)
        weight = rng.random(case["classes"])
        options = {"axis": axis, "weight": weight, "reduction": ("mean", "sum", "none")[seed % 3]}
        want, want_grad = reference.nll_loss_with_grad(x, target, **options)
        arranged = arrange(x, case["layout"])
        out = arrange(np.full(shape, 7, dtype), case["out"]) if case["out"] not in (None, "in place") else None
        loss, grad = ce.nll_loss_with_grad(arranged, target, **options, out=out)
        assert out is None or grad is out
        # The terms have both signs, so the sum may cancel.
        terms = np.abs(reference.nll_loss(x, target, **{**options, "reduction": "none"}))
        divisor = np.sum(weight[target]) if options["reduction"] == "mean" else 1.0
        size = np.asarray(terms if options["reduction"] == "none" else np.sum(terms) / (divisor or 1.0))
        check_array(np.asarray(loss), np.asarray(want), size, work, 2, where)
        check_array(grad, want_grad, np.abs(want_grad), dtype, 2, where)
        np.testing.assert_array_equal(ce.nll_loss(arranged, target, **options), loss)
        return

    if name.endswith("vjp"):
        y = getattr(reference, name[:-4])(x, axis).astype(dtype)
        if case["layout"] == "broadcast" and np.size(x):
            y = flat_axis(y, seed % y.ndim)
        kind = case["other"]
        g = rng.normal(0, 1, shape)
        g = g.astype(next(d for d in DTYPES if d.name == kind)) if kind in [d.name for d in DTYPES] else arrange(g.astype(np.float32), kind)
        want = np.asarray(ref(g, y, axis))
        out = arrange(np.full(shape, 7, dtype), case["out"]) if case["out"] not in (None, "in place") else None
        got = f(g, arrange(y, case["layout"]), axis, out=out)
        assert out is None or got is out
        assert got.dtype == dtype
        size = np.abs(g.astype(np.float64)) + np.sum(np.abs(g.astype(np.float64)), axis, keepdims=True)
        size = size * np.abs(y.astype(np.float64)) if name == "softmax_vjp" else size
        check_array(got, want, size, dtype, 6, where)
        return

    given = arranged = arrange(x, case["layout"])
    want = np.asarray(ref(x, axis))
    out = None
    result_dtype = work if name == "logsumexp" else dtype
    if case["out"] == "in place" and name != "logsumexp":
        given = x.copy() if case["layout"] in ("read-only", "byte-swapped", "misaligned", "broadcast") else arranged
        out = given
    elif case["out"] not in (None, "in place"):
        out = arrange(np.full(want.shape, 7, result_dtype), case["out"])
    bits = arranged.tobytes()
    got = f(given, axis, out=out)
    assert out is None or got is out
    assert out is given or arranged.tobytes() == bits
    got = np.asarray(got)
    assert got.dtype == result_dtype or (got.ndim == 0 and name == "logsumexp")
    size = np.maximum(np.abs(want), np.max(np.abs(x.astype(np.float64)), axis)) if name == "logsumexp" else np.abs(want)
    check_array(got, want, size, result_dtype, 9 if name == "softmax" else 5, where)


@pytest.mark.parametrize("chunk", range(10))
def test_transforms_pairwise(chunk):
    for seed, case in list(enumerate(TRANSFORM_CASES))[chunk::10]:
        for level in each_level():
            run_transform(case, seed, f"{level} case {seed} {case}:")


# --- complete in one direction ---------------------------------------------------------------------------------------------------------

LENGTHS = [*range(1, 71), 127, 128, 129, 255, 256, 257, *(n + d for n in (512, 1024, 1536, 2048, 4096) for d in (-1, 0, 1)), 3000]


@pytest.mark.parametrize("inner", [False, True], ids=["rows", "columns"])
def test_every_length(dtype, inner):
    """Rows and columns of every length to 70, and around the block sizes; three row counts around the width of a vector."""
    rng = np.random.default_rng(3)
    for classes in LENGTHS:
        n = (1, 16, 19)[classes % 3]
        x = rng.normal(0, 4, (n, classes)).astype(dtype)
        y = rng.integers(0, classes, n)
        want, want_grad = reference.cross_entropy_with_grad(x, y, reduction="none")
        want_soft, want_log = reference.softmax(x), reference.log_softmax(x)
        given, axis = (np.ascontiguousarray(x.T), 0) if inner else (x, 1)
        for level in each_level():
            where = f"{level} C={classes} N={n}"
            loss, grad = ce.cross_entropy_with_grad(given, y, axis=axis, reduction="none")
            grad = grad.T if inner else grad
            check_array(loss, want, np.abs(want), row_dtype(dtype), 6, f"{where} loss")
            check_array(grad, want_grad, np.abs(want_grad), dtype, 10, f"{where} gradient")
            soft, log = ce.softmax(given, axis), ce.log_softmax(given, axis)
            check_array(soft.T if inner else soft, want_soft, want_soft, dtype, 10, f"{where} softmax")
            check_array(log.T if inner else log, want_log, np.abs(want_log), dtype, 6, f"{where} log_softmax")
            np.testing.assert_array_equal(ce.cross_entropy(given, y, axis=axis, reduction="none"), loss)


def test_every_number_of_rows(dtype):
    """Few classes are computed several rows at a time."""
    rng = np.random.default_rng(4)
    for classes in (1, 2, 3, 5, 10, 16, 17, 40):
        x = rng.normal(0, 4, (70, classes)).astype(dtype)
        y = rng.integers(0, classes, 70)
        y[rng.random(70) < 0.2] = -100
        want, want_grad = reference.cross_entropy_with_grad(x, y, reduction="none")
        for _ in each_level():
            for n in range(1, 71):
                guard = np.full((n + 2, classes), 7, dtype)
                loss, grad = ce.cross_entropy_with_grad(x[:n], y[:n], reduction="none", out=guard[1:-1])
                check_array(loss, want[:n], np.abs(want[:n]), row_dtype(dtype), 6, f"{classes} {n}")
                check_array(grad, want_grad[:n], np.abs(want_grad[:n]), dtype, 10, f"{classes} {n}")
                assert (guard[[0, -1]].astype(float) == 7).all(), "written outside of out"


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_axis_none_and_tuples(level, dtype, name):
    rng = np.random.default_rng(5)
    x = rng.normal(0, 3, (2, 3, 4, 5)).astype(dtype)
    f, ref = getattr(ce, name), getattr(reference, name)
    axes = [None, *(c for n in (1, 2, 3, 4) for c in itertools.combinations(range(4), n)), (3, 1), (-1, 0), (-2, -3), (2, 0, 1)]
    for layout in ("C", "F", "strided", "reversed", "misaligned"):
        given = arrange(x, layout)
        for axis in axes:
            want = np.asarray(ref(x, axis))
            got = np.asarray(f(given, axis))
            target = row_dtype(dtype) if name == "logsumexp" else dtype
            size = np.maximum(np.abs(want), 12) if name == "logsumexp" else np.abs(want)
            check_array(got, want, size, target, 10, f"{layout} axis={axis}")
            if name == "logsumexp":
                kept = f(given, axis, keepdims=True)
                assert kept.shape == np.asarray(ref(x, axis, keepdims=True)).shape
                np.testing.assert_array_equal(kept.ravel(), got.ravel())
                out = np.zeros_like(kept)
                assert f(given, axis, keepdims=True, out=out) is out
                np.testing.assert_array_equal(out, kept)
            else:
                out = np.zeros(x.shape, dtype)
                assert f(given, axis, out=out) is out
                np.testing.assert_array_equal(out, got)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 2, 3), (2, 3, 0)])
def test_sizes_of_zero(level, dtype, shape):
    x = np.zeros(shape, dtype)
    for axis in range(len(shape)):
        for name in ("softmax", "log_softmax", "logsumexp"):
            want = np.asarray(getattr(reference, name)(x, axis))
            got = np.asarray(getattr(ce, name)(x, axis))
            assert got.shape == want.shape
            np.testing.assert_array_equal(got.astype(float), want)
        assert ce.softmax_vjp(x, x, axis).shape == shape
        assert ce.log_softmax_vjp(x, x, axis).shape == shape
        rows = shape[:axis] + shape[axis + 1 :]
        for target in (np.full(rows, -100), x):
            for reduction in ("mean", "sum", "none"):
                want, want_grad = reference.cross_entropy_with_grad(x, target, axis=axis, reduction=reduction)
                loss, grad = ce.cross_entropy_with_grad(x, target, axis=axis, reduction=reduction)
                np.testing.assert_array_equal(loss, want)
                np.testing.assert_array_equal(grad.astype(float), want_grad)
                assert grad.shape == shape
                np.testing.assert_array_equal(ce.cross_entropy(x, target, axis=axis, reduction=reduction), want)


@pytest.mark.parametrize("classes", [100_000, 262_144])
def test_huge_rows(level, dtype, classes):
    rng = np.random.default_rng(6)
    x = rng.normal(0, 3, (2, classes)).astype(dtype)
    y = rng.integers(0, classes, 2)
    want, want_grad = reference.cross_entropy_with_grad(x, y, reduction="none")
    loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
    check_array(loss, want, np.abs(want), row_dtype(dtype), 6, "loss")
    check_array(grad, want_grad, np.abs(want_grad), dtype, 10, "gradient")


@pytest.mark.parametrize("ndim", [5, 8, 16, 32])
def test_many_dimensions(dtype, ndim):
    rng = np.random.default_rng(7)
    shape = [1] * ndim
    shape[0], shape[ndim // 2], shape[-1] = 3, 4, 5
    x = rng.normal(0, 3, shape).astype(dtype)
    for axis in (0, ndim // 2, -1, 1):
        want = reference.softmax(x, axis)
        check_array(ce.softmax(x, axis), want, want, dtype, 10, f"axis {axis}")
        check_array(ce.softmax(x.T, axis), reference.softmax(x.T, axis), reference.softmax(x.T, axis), dtype, 10, f"axis {axis} transposed")
        y = rng.integers(0, x.shape[axis], np.delete(x.shape, axis))
        assert ce.cross_entropy(x, y, axis=axis) == pytest.approx(reference.cross_entropy(x, y, axis=axis), rel=16 * eps(row_dtype(dtype)))


def test_large_strided_inputs_across_threads(level, dtype):
    """Large enough that work is shared, in layouts that are gathered block by block."""
    rng = np.random.default_rng(8)
    x = rng.normal(0, 3, (600, 301)).astype(dtype)
    y = rng.integers(0, 301, 600)
    want, want_grad = reference.cross_entropy_with_grad(x, y)
    for layout in INPUTS:
        given = arrange(x, layout)
        loss, grad = ce.cross_entropy_with_grad(given, y)
        assert loss == pytest.approx(want, rel=8 * eps(row_dtype(dtype))), layout
        check_array(grad, want_grad, np.abs(want_grad), dtype, 10, layout)


def test_lists_tuples_and_scalars():
    want = reference.cross_entropy([[1.0, 2.0], [0.5, 0.25]], [0, 1])
    assert ce.cross_entropy([[1.0, 2.0], [0.5, 0.25]], [0, 1]) == pytest.approx(want, rel=1e-15)
    assert ce.cross_entropy(((1.0, 2.0), (0.5, 0.25)), (0, 1)) == pytest.approx(want, rel=1e-15)
    assert ce.softmax([1.0, 1.0]).dtype == F64
    np.testing.assert_array_equal(ce.softmax([1.0, 1.0]), [0.5, 0.5])
    assert float(ce.softmax(3.0)) == 1.0
    assert ce.logsumexp(3.0) == 3.0
    assert ce.logsumexp(F16.type(3.0)) == 3.0
