"""Every error: its type, what its message names, and that nothing was written."""

from __future__ import annotations

import numpy as np
import pytest

import crossent as ce

from .oracle import BF16, DTYPES, F16, F32, F64, INDEX_DTYPES

X = np.random.default_rng(0).normal(0, 2, (6, 5)).astype(np.float32)
Y = np.array([0, 1, 2, 3, 4, 0])
LOSSES = ("cross_entropy", "cross_entropy_with_grad", "nll_loss", "nll_loss_with_grad")
TRANSFORMS = ("softmax", "log_softmax", "logsumexp")
VJPS = ("softmax_vjp", "log_softmax_vjp")


def loss(name):
    return pytest.mark.parametrize("f", [getattr(ce, n) for n in LOSSES], ids=LOSSES)(name)


def refuses(error, match, f, *args, **kwargs):
    """`f` raises, and has written to none of its arguments."""
    arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)]
    before = [a.tobytes() for a in arrays]
    with pytest.raises(error, match=match or None) as info:
        f(*args, **kwargs)
    assert [a.tobytes() for a in arrays] == before
    assert type(info.value) is error
    return str(info.value)


# --- labels ----------------------------------------------------------------------------------------------------------------------------


def test_the_message_of_a_label_out_of_range():
    x = np.zeros((512, 50257), np.float32)
    y = np.zeros(512, np.int64)
    y[17] = 50257
    message = refuses(IndexError, "", ce.cross_entropy, x, y)
    assert message == (
        "target[17] = 50257 is out of bounds for 50257 classes (axis -1 of logits with shape (512, 50257)); "
        "if it marks padding, pass ignore_index=50257"
    )


@pytest.mark.parametrize("index", INDEX_DTYPES, ids=lambda d: d.char)
@pytest.mark.parametrize("where", [0, 3, 5])
@loss
def test_labels_out_of_range(f, index, where):
    bad = [5, 6, int(np.iinfo(index).max)] + ([-1, -5, int(np.iinfo(index).min)] if index.kind == "i" else [])
    for value in bad:
        y = Y.astype(index)
        y[where] = value
        out = {"out": np.full(X.shape, 7, np.float32)} if f.__name__.endswith("grad") else {}
        for labels in (y, y.astype(index.newbyteorder())):
            message = refuses(IndexError, rf"^target\[{where}\] = {value} is out of bounds for 5 classes", f, X, labels, **out)
            assert "shape (6, 5)" in message
            assert "ignore_index" in message
        # In place the logits are as they were.
        if out:
            x = X.copy()
            refuses(IndexError, "out of bounds", f, x, y, out=x)
            np.testing.assert_array_equal(x, X)


def test_the_position_of_a_bad_label_in_many_dimensions():
    x = np.zeros((2, 5, 3, 4), np.float32)
    y = np.zeros((2, 3, 4), np.int64)
    y[1, 0, 2] = -3
    message = refuses(IndexError, r"target\[1, 0, 2\] = -3 ", ce.cross_entropy, x, y, axis=1)
    assert "axis 1 of logits with shape (2, 5, 3, 4)" in message
    message = refuses(IndexError, r"target = 9 ", ce.cross_entropy, x[0, :, 0, 0], np.array(9))
    assert "5 classes" in message


@pytest.mark.parametrize("n", [1, 100, 40_000])
def test_a_bad_label_anywhere_leaves_out_as_it_was(n):
    """Also when the work is shared by threads, and when the bad label is the last."""
    x = np.zeros((n, 10), np.float32)
    y = np.zeros(n, np.int64)
    y[-1] = 10
    out = np.full_like(x, 7)
    refuses(IndexError, rf"target\[{n - 1}\] = 10 ", ce.cross_entropy_with_grad, x, y, out=out)
    assert (out == 7).all()
    refuses(IndexError, rf"target\[{n - 1}\] = 10 ", ce.nll_loss_with_grad, x, y, out=out)
    assert (out == 7).all()


def test_labels_beyond_64_signed_bits_get_a_remedy_that_works():
    """ignore_index cannot be so large; such labels are negative ones that were cast."""
    for value in (-100, -1, -(2**63)):
        labels = np.where(np.arange(6) == 3, np.array(value).astype(np.uint64), Y.astype(np.uint64))
        message = refuses(IndexError, r"target\[3\]", ce.cross_entropy, X, labels)
        assert message.endswith(f"pass target.astype(numpy.int64) and ignore_index={value}")
        ce.cross_entropy(X, labels.astype(np.int64), ignore_index=value)


def test_zero_classes_have_no_label():
    refuses(IndexError, "0 classes", ce.cross_entropy, np.zeros((2, 0), np.float32), np.array([0, -100]))


# --- types -----------------------------------------------------------------------------------------------------------------------------


class Opaque:
    """Not an array."""


NOT_LOGITS = {
    "int64": np.zeros((6, 5), np.int64),
    "uint8": np.zeros((6, 5), np.uint8),
    "bool": np.zeros((6, 5), bool),
    "complex64": np.zeros((6, 5), np.complex64),
    "complex128": np.zeros((6, 5), np.complex128),
    "object": np.zeros((6, 5), object),
    "str": np.full((6, 5), "a"),
    "datetime64": np.zeros((6, 5), "M8[s]"),
}
if np.dtype(np.longdouble) != F64:
    NOT_LOGITS["longdouble"] = np.zeros((6, 5), np.longdouble)


@pytest.mark.parametrize("kind", NOT_LOGITS)
def test_logits_of_other_types(kind):
    x = NOT_LOGITS[kind]
    name = "float128|longdouble" if kind == "longdouble" else kind if kind not in ("str", "datetime64") else "str|<U1|datetime64"
    for f in LOSSES:
        argument = "log_probs" if f.startswith("nll") else "logits"
        message = refuses(TypeError, name, getattr(ce, f), x, Y)
        assert argument in message
        assert "float32" in message
    for f in TRANSFORMS:
        assert "float32" in refuses(TypeError, name, getattr(ce, f), x)
    for f in VJPS:
        refuses(TypeError, f"(?s)grad_output.*({name})", getattr(ce, f), x, X)
        refuses(TypeError, f"(?s)probs.*({name})", getattr(ce, f), X, x)


def test_python_numbers_as_logits_are_integers():
    refuses(TypeError, "int64", ce.softmax, [1, 2, 3])
    refuses(TypeError, "int64", ce.cross_entropy, [[1, 2, 3]], [0])
    refuses(TypeError, "bool", ce.softmax, [True, False])


@pytest.mark.parametrize("x", [Opaque(), None, "text", {1: 2}, [Opaque()], [None, 1.0]], ids=repr)
def test_objects_that_are_no_arrays(x):
    refuses(TypeError, "logits", ce.cross_entropy, x, 0)
    refuses(TypeError, "", ce.softmax, x)
    refuses(TypeError, "target", ce.cross_entropy, X, x)
    refuses(TypeError, "log_probs", ce.nll_loss, x, 0)


def test_ragged_lists():
    refuses(ValueError, "logits", ce.cross_entropy, [[1.0, 2.0], [1.0]], [0, 0])
    refuses(ValueError, "target", ce.cross_entropy, X, [[0, 1], [0]])


def test_saved_bfloat16_that_was_loaded_as_bytes():
    """np.save drops the type's name: an array of raw 2-byte items comes back."""
    x = np.zeros((6, 5), "V2")
    message = refuses(TypeError, "bfloat16", ce.cross_entropy, x, Y)
    assert ".view(ml_dtypes.bfloat16)" in message


@loss
def test_targets_of_other_types(f):
    for y in (Y.astype(bool), Y.astype(complex), Y.astype(object), Y.astype(str), np.array([2**70] * 6)):
        assert "integer" in refuses(TypeError, "target", f, X, y)
    message = refuses(TypeError, "target.*float32.*integer", f, X, Y.astype(np.float32))
    assert "astype" in message


def test_nll_loss_takes_no_probabilities():
    refuses(TypeError, "target", ce.nll_loss, X, np.ones_like(X))
    refuses(TypeError, "target", ce.nll_loss_with_grad, X, np.ones_like(X))


@pytest.mark.parametrize("f", [ce.cross_entropy, ce.nll_loss])
def test_weights(f):
    refuses(TypeError, "weight.*complex", f, X, Y, weight=np.ones(5, complex))
    refuses(TypeError, "weight", f, X, Y, weight=np.ones(5, object))
    for shape in ((4,), (6,), (5, 1), (), (0,), (6, 5)):
        message = refuses(ValueError, r"weight.*\(5,\)", f, X, Y, weight=np.ones(shape))
        assert str(shape) in message


# --- shapes ----------------------------------------------------------------------------------------------------------------------------


@loss
@pytest.mark.parametrize("shape", [(), (5,), (7,), (6, 1), (1, 6), (0,), (6, 6)])
def test_shape_of_the_labels(f, shape):
    message = refuses(ValueError, "target", f, X, np.zeros(shape, np.int64))
    for part in (shape, "(6,)", "(6, 5)"):
        assert str(part) in message


def test_integer_labels_of_the_logits_shape():
    """One-hot integers: the remedy is a float type."""
    assert "astype" in refuses(ValueError, "target.*float", ce.cross_entropy, X, np.zeros((6, 5), np.int64))


@pytest.mark.parametrize("shape", [(5,), (6,), (5, 6), (6, 4), (1, 5), (6, 5, 1), ()])
def test_shape_of_the_probabilities(shape):
    error = TypeError if shape == (6,) else ValueError
    message = refuses(error, "target", ce.cross_entropy, X, np.zeros(shape, np.float32))
    assert "float32" in message or str(shape) in message


def test_shapes_that_look_like_the_other_convention():
    """(N, C, H, W) with labels (N, H, W): PyTorch's class axis."""
    for x, y in (
        (np.zeros((2, 5, 3, 4), np.float32), np.zeros((2, 3, 4), np.int64)),
        (np.zeros((2, 7, 9), np.float32), np.zeros((2, 9), np.int64)),
        (np.zeros((2, 7, 9), F16), np.zeros((2, 9), np.uint8)),
    ):
        for f in LOSSES:
            refuses(ValueError, r"pass axis=1", getattr(ce, f), x, y)
            getattr(ce, f)(x, y, axis=1)
    refuses(ValueError, r"pass axis=0", ce.cross_entropy, np.zeros((5, 6), np.float32), np.zeros(6, np.int64))


def test_zero_dimensional_logits():
    for f in LOSSES:
        refuses(ValueError, "log_probs" if f.startswith("nll") else "logits", getattr(ce, f), np.float32(1.0), 0)


def test_vjps_of_two_shapes():
    for f in VJPS:
        refuses(ValueError, r"(?s)\(6, 5\).*\(5, 6\)|\(5, 6\).*\(6, 5\)", getattr(ce, f), X, X.T)
        refuses(ValueError, "grad_output", getattr(ce, f), X[:1], X)
        refuses(ValueError, "grad_output", getattr(ce, f), np.float32(1), X)


# --- axis ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [2, -3, 100, -100, 2**31, -(2**31), 2**62, np.int64(2)])
def test_axis_out_of_range(axis):
    for f in LOSSES:
        refuses(np.exceptions.AxisError, str(axis), getattr(ce, f), X, Y, axis=axis)
    for f in TRANSFORMS:
        refuses(np.exceptions.AxisError, str(axis), getattr(ce, f), X, axis)
        refuses(np.exceptions.AxisError, str(axis), getattr(ce, f), X, (0, axis))
    for f in VJPS:
        refuses(np.exceptions.AxisError, str(axis), getattr(ce, f), X, X, axis)


def test_axis_of_other_types():
    for axis in (0.0, "0", 1.5, [0], np.array([0, 1])):
        for f in LOSSES:
            refuses(TypeError, "axis", getattr(ce, f), X, Y, axis=axis)
        for f in TRANSFORMS:
            refuses(TypeError, "axis", getattr(ce, f), X, axis)
    for f in LOSSES:
        for axis in (None, (0, 1), (1,)):
            refuses(TypeError, "axis", getattr(ce, f), X, Y, axis=axis)
    for f in VJPS:
        for axis in (None, (0, 1)):
            refuses(TypeError, "axis", getattr(ce, f), X, X, axis)


def test_axis_named_twice():
    for f in TRANSFORMS:
        for axis in ((0, 0), (1, -1), (0, -2), (1, 0, 1)):
            refuses(ValueError, "axis", getattr(ce, f), X, axis)


def test_axis_of_a_0d_array():
    for f in TRANSFORMS:
        for axis in (1, -2):
            refuses(np.exceptions.AxisError, str(axis), getattr(ce, f), np.float32(1), axis)


# --- numbers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [2**64, -(2**64), 2**100, -(2**63) - 1, 10**400])
def test_integers_beyond_64_bits(bad):
    for f in LOSSES:
        refuses(ValueError, "ignore_index", getattr(ce, f), X, Y, ignore_index=bad)
        refuses(ValueError, "axis", getattr(ce, f), X, Y, axis=bad)
    for f in TRANSFORMS:
        refuses(ValueError, "axis", getattr(ce, f), X, bad)
    for f in VJPS:
        refuses(ValueError, "axis", getattr(ce, f), X, X, bad)
    for f in (ce.set_num_threads, ce.threads, ce.set_cache_limit):
        with pytest.raises(ValueError, match="n "):
            f(bad)


@loss
def test_ignore_index_of_other_types(f):
    for bad in (1.5, "0", 0.0, [0], np.array([1, 2])):
        refuses(TypeError, "ignore_index", f, X, Y, ignore_index=bad)


@loss
@pytest.mark.parametrize("bad", ["avg", "MEAN", "", None, 0, True, b"mean", ["mean"], "mean\0", "\udc80"], ids=repr)
def test_reduction(f, bad):
    message = refuses(ValueError, "reduction", f, X, Y, reduction=bad)
    for name in ("mean", "sum", "none"):
        assert name in message


@pytest.mark.parametrize("f", [ce.cross_entropy, ce.cross_entropy_with_grad])
def test_label_smoothing(f):
    for bad in (-1e-9, 1.0000001, np.nan, np.inf, -np.inf, 2, -1, 10**400):
        refuses(ValueError, "label_smoothing", f, X, Y, label_smoothing=bad)
    for bad in ("0.1", None, 1j, [0.1, 0.2]):
        refuses(TypeError, "label_smoothing", f, X, Y, label_smoothing=bad)


def test_numbers_that_float_would_take_but_are_none():
    for bad in (
        np.complex128(0.1),
        np.array(0.1 + 0j),
        np.str_("0.1"),
        np.array("0.1"),
        np.array(b"0.1"),
        np.timedelta64(0),
        np.datetime64(0, "s"),
        np.void(b"1"),
    ):
        for option in ("label_smoothing", "normalizer", "z_loss", "softcap", "temperature"):
            refuses(TypeError, option, ce.cross_entropy, X, Y, **{option: bad})
        refuses(TypeError, "lam", ce.cross_entropy, X, ce.Mixup(Y, Y, bad))
        refuses(TypeError, "grad_output", ce.cross_entropy_with_grad, X, Y, grad_output=bad)


def test_keepdims():
    for bad in (np.ones(2), np.ones(0, bool)):
        refuses(TypeError, "keepdims must be True or False", ce.logsumexp, X, keepdims=bad)


def test_domains_of_the_options():
    wrong = {
        "normalizer": (0, -1, np.nan, np.inf, 10**400),
        "z_loss": (np.nan, np.inf, -np.inf),
        "softcap": (0, -1.0, np.nan, np.inf),
        "temperature": (0, -1.0, np.nan, np.inf, 5e-324, 1e-310),
    }
    for option, values in wrong.items():
        for bad in values:
            message = refuses(ValueError, option, ce.cross_entropy, X, Y, **{option: bad})
            assert "must" in message or "fit" in message
        for bad in ("1", [1.0], 1j, object()):
            refuses(TypeError, option, ce.cross_entropy, X, Y, **{option: bad})
    # Where its inverse leaves the type of the computation nothing would be right.
    single, double = X.astype(np.float32), X.astype(np.float64)
    for bad in (1e-40, 1e-300):
        for x in (single, X.astype(np.float16)):
            assert "float32" in refuses(ValueError, "temperature", ce.cross_entropy, x, Y, temperature=bad)
            assert "float32" in refuses(ValueError, "temperature", ce.kl_divergence, x, single, temperature=bad)
        assert np.isfinite(ce.cross_entropy(double * bad, Y, temperature=bad))
        assert np.isfinite(ce.kl_divergence(double * bad, single * 0, temperature=bad)).all()
    assert np.isfinite(ce.cross_entropy(single * np.float32(1e-37), Y, temperature=1.2e-38))
    for bad in (-1e-300, -1.0, np.nan, -np.inf):
        s = np.ones(6)
        s[4] = bad
        assert "0 leaves the row out" in refuses(ValueError, r"sample_weight\[4\]", ce.cross_entropy, X, Y, sample_weight=s)
    for shape in ((), (5,), (6, 1), (6, 5), (1,)):
        refuses(ValueError, "sample_weight", ce.cross_entropy, X, Y, sample_weight=np.ones(shape))
    for bad in (np.ones((6, 5)), np.ones((6, 5), int), 1, ["a"] * 5):
        refuses(TypeError, "where", ce.cross_entropy, X, Y, where=bad)
    for shape in ((6,), (5, 6), (1, 6, 5), (6, 5, 1), (0,)):
        refuses(ValueError, "where", ce.cross_entropy, X, Y, where=np.ones(shape, bool))


def test_composite_targets():
    rows = np.full(6, 0.5)
    for bad in (-0.1, 1.1, np.nan, 2):
        refuses(ValueError, r"target\.lam", ce.cross_entropy, X, ce.Mixup(Y, Y, bad))
        lam = np.where(np.arange(6) == 5, bad, rows)
        refuses(ValueError, r"target\.lam\[5\]", ce.cross_entropy, X, ce.Mixup(Y, Y, lam))
    for bad in (rows[:5], rows[:, None], np.ones((6, 5))):
        refuses(ValueError, r"target\.lam", ce.cross_entropy, X, ce.Mixup(Y, Y, bad))
    refuses(IndexError, r"target\.y_b\[1\] = 5", ce.cross_entropy, X, ce.Mixup(Y, np.array([0, 5, 0, 0, 0, 0]), 0.5))
    refuses(TypeError, r"target\.y_a", ce.cross_entropy, X, ce.Mixup(X, Y, 0.5))
    refuses(ValueError, r"target\.y_a", ce.cross_entropy, X, ce.Mixup(Y[:5], Y, 0.5))
    pairs = np.zeros((6, 2), int)
    refuses(ValueError, r"target\.indices.*target\.probs", ce.cross_entropy, X, ce.SparseProbs(pairs, np.ones((6, 3))))
    refuses(ValueError, r"target\.indices", ce.cross_entropy, X, ce.SparseProbs(Y, rows))
    refuses(TypeError, r"target\.probs", ce.cross_entropy, X, ce.SparseProbs(pairs, pairs))
    refuses(TypeError, r"target\.indices", ce.cross_entropy, X, ce.SparseProbs(pairs * 1.0, pairs * 1.0))
    bad = pairs.copy()
    bad[5, 1] = -1
    refuses(IndexError, r"target\.indices\[5, 1\] = -1", ce.cross_entropy, X, ce.SparseProbs(bad, pairs * 1.0))
    refuses(ValueError, "ignore_index", ce.cross_entropy, X, ce.SparseProbs(pairs, pairs * 1.0), ignore_index=0)
    for f in (ce.nll_loss, ce.nll_loss_with_grad):
        refuses(TypeError, "target", f, X, ce.Mixup(Y, Y, 0.5))
        refuses(TypeError, "target", f, X, ce.SparseProbs(pairs, pairs * 1.0))
    # out may share no memory with any part.
    out = np.zeros(X.shape, F64)
    x = X.astype(F64)
    for target in (ce.Mixup(Y, Y, out[:, 0]), ce.SparseProbs(pairs, out[:, :2]), ce.Mixup(out.view(np.int64)[:, 0], Y, 0.5)):
        with pytest.raises(ValueError, match=r"(?i)out.*overlap.*target\."):
            ce.cross_entropy_with_grad(x, target, out=out)
    refuses(ValueError, "(?i)out.*overlap.*sample_weight", ce.cross_entropy_with_grad, x, Y, sample_weight=out[:, 0], out=out)
    refuses(ValueError, "(?i)out.*overlap.*where", ce.cross_entropy_with_grad, x, Y, where=out.view(bool)[:, :5], out=out)
    refuses(ValueError, "(?i)out.*overlap.*grad_output", ce.cross_entropy_with_grad, x, Y, reduction="none", grad_output=out[:, 0], out=out)
    refuses(ValueError, "(?i)out.*overlap.*target", ce.cross_entropy_with_grad, x, out, out=out)


def test_ignore_index_with_probabilities():
    p = np.full(X.shape, 0.2, np.float32)
    for index in (0, 3, 100):
        assert "sample_weight" in refuses(ValueError, "ignore_index", ce.cross_entropy, X, p, ignore_index=index)
    for index in (-100, -1, None):
        ce.cross_entropy(X, p, ignore_index=index)


@pytest.mark.parametrize("f", [ce.cross_entropy_with_grad, ce.nll_loss_with_grad])
def test_grad_output(f):
    for reduction in ("mean", "sum"):
        refuses(ValueError, r"(?s)grad_output.*none", f, X, Y, reduction=reduction, grad_output=np.ones(6))
    for shape in ((5,), (6, 1), (6, 5), (1,), (0,)):
        refuses(ValueError, r"grad_output", f, X, Y, reduction="none", grad_output=np.ones(shape))
    for bad in ("1", 1j, np.ones(6, complex), np.ones(6, object), Opaque()):
        refuses(TypeError, "grad_output", f, X, Y, reduction="none", grad_output=bad)


@pytest.mark.parametrize("call", ["set_num_threads", "threads"])
def test_number_of_threads(call):
    for bad in (0, -1, -(2**62)):
        with pytest.raises(ValueError, match="n "):
            getattr(ce, call)(bad)
    for bad in (1.5, "2", None, [1]):
        with pytest.raises(TypeError, match="n "):
            getattr(ce, call)(bad)


def test_other_settings():
    with pytest.raises(ValueError, match="n "):
        ce.set_cache_limit(-1)
    with pytest.raises(TypeError, match="n "):
        ce.set_cache_limit("1")
    for name in ("avx1024", "", "AVX2 ", "neon" if "neon" not in ce.simd_levels() else "avx2"):
        with pytest.raises(ValueError, match="scalar"):
            ce.set_simd_level(name)
    with pytest.raises(TypeError, match="name"):
        ce.set_simd_level(2)


# --- out -------------------------------------------------------------------------------------------------------------------------------


def with_out():
    """Every function that takes out, its arguments and the shape and type of the result."""
    for dtype in DTYPES:
        x = X.astype(dtype)
        wide = F64 if dtype == F64 else F32
        yield "cross_entropy_with_grad", (x, Y), X.shape, dtype
        yield "nll_loss_with_grad", (x, Y), X.shape, dtype
        yield "softmax", (x,), X.shape, dtype
        yield "log_softmax", (x,), X.shape, dtype
        yield "softmax_vjp", (x, x.copy()), X.shape, dtype
        yield "log_softmax_vjp", (x, x.copy()), X.shape, dtype
        yield "logsumexp", (x,), (6,), wide


WITH_OUT = list(with_out())
each_out = pytest.mark.parametrize(("name", "args", "shape", "dtype"), WITH_OUT, ids=[f"{w[0]}-{w[3].name}" for w in WITH_OUT])


@each_out
def test_out_of_another_shape(name, args, shape, dtype):
    for other in ((5, 6), (6,), (6, 5, 1), (1, 6, 5), (), (6, 6), (5,), (6, 1)):
        if other != shape:
            message = refuses(ValueError, "out", getattr(ce, name), *args, out=np.zeros(other, dtype))
            assert str(shape) in message
            assert str(other) in message


@each_out
def test_out_of_another_type(name, args, shape, dtype):
    for other in (*DTYPES, np.dtype(np.int32), np.dtype(object), np.dtype(complex), np.dtype("V2")):
        if other != dtype:
            message = refuses(TypeError, "out", getattr(ce, name), *args, out=np.zeros(shape, other))
            assert dtype.name in message


@each_out
def test_out_that_cannot_be_written_well(name, args, shape, dtype):
    f = getattr(ce, name)
    read_only = np.zeros(shape, dtype)
    read_only.flags.writeable = False
    refuses(ValueError, "(?i)read-only|writ", f, *args, out=read_only)
    raw = np.zeros(np.prod(shape) * dtype.itemsize + 1, np.uint8)
    refuses(ValueError, "(?i)align", f, *args, out=raw[1:].view(dtype).reshape(shape))
    if dtype != BF16:
        swapped = np.zeros(shape, dtype.newbyteorder())
        refuses(ValueError, "(?i)byte", f, *args, out=swapped)
    # Overlaps itself: stride 0, and windows.
    zero = np.lib.stride_tricks.as_strided(np.zeros(60, dtype), shape, [0] * len(shape))
    refuses(ValueError, "(?i)overlap|itself", f, *args, out=zero)
    if len(shape) == 2:
        windows = np.lib.stride_tricks.as_strided(np.zeros(60, dtype), shape, (2 * dtype.itemsize, dtype.itemsize))
        refuses(ValueError, "(?i)overlap|itself", f, *args, out=windows)
        rows = np.lib.stride_tricks.as_strided(np.zeros(60, dtype), shape, (0, dtype.itemsize))
        refuses(ValueError, "(?i)overlap|itself", f, *args, out=rows)


class Tensor:
    """Something that has memory but is no ndarray, like a tensor of another library."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@each_out
def test_out_that_is_no_ndarray(name, args, shape, dtype):
    for out in ([0.0] * 6, 1.0, bytearray(1000), memoryview(bytearray(1000)), object(), Tensor(np.zeros(shape, np.float32))):
        assert "t.numpy()" in refuses(TypeError, "(?s)out.*ndarray", getattr(ce, name), *args, out=out)


@each_out
def test_out_that_overlaps_an_input(name, args, shape, dtype):
    if name == "logsumexp":
        memory = np.zeros((6, 6), np.float64 if dtype == F64 else np.float32)
        refuses(ValueError, "(?i)out.*overlap", ce.logsumexp, memory, out=memory[:, 0])
        refuses(ValueError, "(?i)out.*overlap", ce.logsumexp, memory, out=memory[2])
        return
    f, others = getattr(ce, name), args[1:]
    memory = np.zeros((8, 5), dtype)
    for x, out in (
        (memory[:6], memory[1:7]),
        (memory[2:], memory[1:7]),
        (memory[:6], memory[:6][::-1]),
        (memory[:6], memory[:6][:, ::-1]),
        (memory.reshape(-1)[:30].reshape(6, 5), memory.reshape(-1)[1:31].reshape(6, 5)),
    ):
        if name.endswith("vjp"):
            refuses(ValueError, "(?i)out.*overlap", f, x, *others, out=out)
            refuses(ValueError, "(?i)out.*overlap", f, *others, x, out=out)
        else:
            refuses(ValueError, "(?i)out.*overlap", f, x, *others, out=out)
    square = np.zeros((5, 5), dtype)
    if not name.endswith("vjp"):
        refuses(ValueError, "(?i)out.*overlap", f, square, *(a[:5] for a in others), out=square.T)


def test_in_place_is_for_the_logits_only():
    """softmax, log_softmax and the gradients; not the vjps, not the target."""
    for dtype in DTYPES:
        x = X.astype(dtype)
        for name in VJPS:
            for position in (0, 1):
                args = [x.copy(), x.copy()]
                refuses(ValueError, "(?i)overlap", getattr(ce, name), *args, out=args[position])
        p = np.abs(x)
        refuses(ValueError, "(?i)out.*overlap.*target", ce.cross_entropy_with_grad, x, p, out=p)
        for name in ("softmax", "log_softmax"):
            y = x.copy()
            assert getattr(ce, name)(y, out=y) is y
            np.testing.assert_array_equal(y, getattr(ce, name)(x))
        for name in ("cross_entropy_with_grad", "nll_loss_with_grad"):
            y = x.copy()
            loss, grad = getattr(ce, name)(y, Y, out=y)
            assert grad is y
            want_loss, want = getattr(ce, name)(x, Y)
            assert loss == want_loss
            np.testing.assert_array_equal(grad, want)


def test_out_that_overlaps_other_arguments():
    out = np.zeros(X.shape, F32)
    labels = out.view(np.int32)[:, 0]
    refuses(ValueError, "(?i)out.*overlap.*target", ce.cross_entropy_with_grad, X, labels, out=out)
    refuses(ValueError, "(?i)out.*overlap.*target", ce.nll_loss_with_grad, X, labels, out=out)
    refuses(ValueError, "(?i)out.*overlap.*weight", ce.cross_entropy_with_grad, X, Y, weight=out[0], out=out)
    upstream = out.reshape(-1)[:6]
    refuses(ValueError, "(?i)out.*overlap.*grad_output", ce.cross_entropy_with_grad, X, Y, reduction="none", grad_output=upstream, out=out)
    # Interleaved without sharing a byte is no overlap.
    memory = np.zeros((6, 10), F32)
    memory[:, ::2] = X
    _, grad = ce.cross_entropy_with_grad(memory[:, ::2], Y, out=memory[:, 1::2])
    np.testing.assert_array_equal(memory[:, ::2], X)
    np.testing.assert_array_equal(grad, ce.cross_entropy_with_grad(X, Y)[1])


def test_logits_that_overlap_themselves_in_place():
    """A broadcast row cannot take a gradient."""
    x = np.broadcast_to(np.zeros((1, 5), F32), (6, 5))
    refuses(ValueError, "", ce.cross_entropy_with_grad, x, Y, out=x)
    windows = np.lib.stride_tricks.as_strided(np.zeros(60, F32), (6, 5), (4, 4))
    refuses(ValueError, "(?i)overlap|itself", ce.softmax, windows, out=windows)
    np.testing.assert_allclose(ce.softmax(windows), 0.2)


# --- calls -----------------------------------------------------------------------------------------------------------------------------


def test_arguments():
    for f in (ce.cross_entropy, ce.nll_loss):
        named = {"logits": X, "target": Y}
        for args, kwargs in (((), {}), ((X,), {}), ((X, Y, 1), {}), ((X, Y), {"nonsense": 1}), ((), named), ((X,), {"target": Y})):
            with pytest.raises(TypeError):
                f(*args, **kwargs)
    with pytest.raises(TypeError):
        ce.softmax(x=X)
    with pytest.raises(TypeError):
        ce.softmax(X, -1, None)
    with pytest.raises(TypeError):
        ce.cross_entropy(X, Y, out=np.zeros_like(X))
    with pytest.raises(TypeError):
        ce.cross_entropy(X, Y, grad_output=1.0)


def test_masked_arrays():
    """Their masked entries would silently count."""
    masked = np.ma.masked_array(X, X > 0)
    try:
        ce.softmax(masked)
    except TypeError as error:
        assert "mask" in str(error)  # noqa: PT017
    else:
        pytest.fail("a masked array was read as if it had no mask")


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_subclasses_give_plain_arrays():
    class Sub(np.ndarray):
        pass

    for x in (X.view(Sub), np.asmatrix(X)) if hasattr(np, "asmatrix") else (X.view(Sub),):
        assert type(ce.softmax(x)) is np.ndarray
        np.testing.assert_array_equal(ce.softmax(x), ce.softmax(X))
        np.testing.assert_array_equal(ce.cross_entropy_with_grad(x, Y)[1], ce.cross_entropy_with_grad(X, Y)[1])


def test_ten_thousand_errors_do_not_grow():
    import gc
    import tracemalloc

    bad = np.array([0, 1, 2, 3, 4, 99])
    out = np.zeros_like(X)

    calls = (
        lambda: ce.cross_entropy(X, bad),
        lambda: ce.cross_entropy_with_grad(X, Y, out=out[:3]),
        lambda: ce.softmax(None),
    )

    def errors(n):
        for _ in range(n):
            for call in calls:
                with pytest.raises((IndexError, ValueError, TypeError)):
                    call()

    errors(200)
    gc.collect()
    tracemalloc.start()
    errors(100)
    gc.collect()
    first = tracemalloc.get_traced_memory()[0]
    errors(3300)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 20_000, f"{grown} bytes more after 10 000 errors"
