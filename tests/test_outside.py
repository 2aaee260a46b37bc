"""Others' results: the ONNX backend's node cases, PyTorch's golden values, PyTorch itself where it is installed; and random inputs."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import crossent as ce
from crossent import reference

from .levels import each_level
from .oracle import BF16, DTYPES, F16, F32, F64, eps, row_dtype

try:
    import torch
except ImportError:
    torch = None

# --- ONNX ------------------------------------------------------------------------------------------------------------------------------

# Floors: what onnx 1.23 collects. Fewer would mean that something was not collected, not that it passed.
OPS = {"SoftmaxCrossEntropyLoss": 34, "NegativeLogLikelihoodLoss": 18, "LogSoftmax": 7, "Softmax": 7, "ReduceLogSumExp": 9}


def onnx_cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        # The collection is one list for all operators, and grows with every call: it is made once.
        cases = collect_testcases(None)
    return [c for c in cases if len(c.model.graph.node) == 1 and c.model.graph.node[0].op_type in OPS]


ONNX_CASES = onnx_cases()


def run_node(node, inputs):
    """The outputs of one ONNX node, computed by crossent."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in ("Softmax", "LogSoftmax"):
        return [(ce.softmax if node.op_type == "Softmax" else ce.log_softmax)(inputs[0], attributes.get("axis", -1))]
    if node.op_type == "ReduceLogSumExp":
        axes = tuple(int(a) for a in inputs[1]) if len(inputs) > 1 else tuple(attributes.get("axes", ()))
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return [inputs[0]]
        result = ce.logsumexp(inputs[0], axes or None, keepdims=bool(attributes.get("keepdims", 1)))
        return [np.asarray(result, inputs[0].dtype)]
    # Losses: the class axis is 1, and there is an ignore_index only if one is given.
    x, target, *weight = inputs
    options = {
        "axis": 1,
        "weight": weight[0] if weight else None,
        "reduction": attributes.get("reduction", b"mean").decode(),
        "ignore_index": attributes.get("ignore_index"),
    }
    f = ce.nll_loss if node.op_type == "NegativeLogLikelihoodLoss" else ce.cross_entropy
    outputs = [np.asarray(f(x, target, **options), x.dtype)]
    return [*outputs, ce.log_softmax(x, 1)] if len(node.output) > 1 else outputs


@pytest.mark.parametrize("case", ONNX_CASES, ids=lambda c: c.name)
def test_onnx_node(level, case):
    node = case.model.graph.node[0]
    ran = 0
    for inputs, outputs in case.data_sets:
        got = run_node(node, [np.asarray(i) for i in inputs])
        assert len(got) == len(outputs)
        for g, want in zip(got, outputs, strict=True):
            assert g.shape == want.shape
            assert g.dtype == want.dtype
            # ONNX compares with rtol 1e-3; its expected values are float32 or float64 themselves.
            np.testing.assert_allclose(g, want, rtol=2e-6, atol=2e-6)
            ran += 1
    assert ran


def test_no_onnx_case_is_missing():
    counted = Counter(c.model.graph.node[0].op_type for c in ONNX_CASES)
    for op, floor in OPS.items():
        assert counted[op] >= floor, f"{op}: {counted[op]} cases collected, {floor} expected"
    assert len({c.name for c in ONNX_CASES}) == len(ONNX_CASES)


# --- PyTorch's golden values -----------------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "data" / "golden.npz"


def golden():
    with np.load(GOLDEN) as file:
        index, values = json.loads(file["index"].tobytes()), file["values"]
    cases = []
    for entry in index["cases"]:
        arrays = {}
        for name, at in entry["arrays"].items():
            array = values[at["at"] : at["at"] + int(np.prod(at["shape"]))].reshape(at["shape"])
            arrays[name] = array.astype(np.int64) if at["integer"] else array
        cases.append((entry["options"], arrays))
    return cases


def compare(got, want, dtype, size=1.0, where=""):
    """Our rounding, at the size of the terms, and PyTorch's: its float64 loses an ulp of the logits (here up to 20) and of p − 1."""
    got = np.asarray(got)
    assert got.shape == want.shape
    unit = eps(got.dtype) if got.dtype in DTYPES else eps(F64)
    slack = 16 * eps(row_dtype(dtype)) * size + 5e-14 + (2.0**-25 if got.dtype == F16 else 0)
    np.testing.assert_allclose(
        got.astype(F64), want, rtol=1.01 * unit + 8 * eps(row_dtype(dtype)), atol=slack, equal_nan=True, err_msg=where
    )


def check_case(options, arrays, dtype, where=""):
    options = dict(options)
    function, axis = options.pop("function"), options.pop("axis")
    x = arrays["x"].astype(dtype)
    np.testing.assert_array_equal(x.astype(F64), arrays["x"])
    want = arrays["value"]
    if function == "logsumexp":
        compare(ce.logsumexp(x, axis), want, dtype, np.max(np.abs(np.where(np.isfinite(want), want, 0)), initial=1.0), where)
        return
    if function in ("softmax", "log_softmax"):
        compare(getattr(ce, function)(x, axis), want, dtype, 0, where)
        # The vjp's second argument is ours in float64, so that its rounding is not counted.
        y = getattr(ce, function)(x.astype(F64), axis)
        compare(getattr(ce, f"{function}_vjp")(arrays["grad_output"].astype(dtype), y, axis), arrays["grad"], F64, 10.0, where)
        return
    f = getattr(ce, f"{function}_with_grad")
    loss, grad = f(x, arrays["target"], axis=axis, weight=arrays.get("weight"), **options)
    assert grad.dtype == dtype
    if options["reduction"] == "none":
        compare(loss, want, dtype, 0, where)
    else:
        np.testing.assert_allclose(loss, want, rtol=16 * eps(row_dtype(dtype)), err_msg=where)
    size = np.max(np.abs(arrays["grad"]), initial=0.0, where=np.isfinite(arrays["grad"]))
    compare(grad, arrays["grad"], dtype, size, where)
    np.testing.assert_array_equal(getattr(ce, function)(x, arrays["target"], axis=axis, weight=arrays.get("weight"), **options), loss)


def test_golden_values_of_pytorch(level, dtype):
    cases = golden()
    assert len(cases) > 200
    functions = Counter(options["function"] for options, _ in cases)
    assert set(functions) == {"cross_entropy", "nll_loss", "softmax", "log_softmax", "logsumexp"}
    for number, (options, arrays) in enumerate(cases):
        check_case(options, arrays, dtype, f"golden case {number} {options}")


def test_reference_has_the_golden_values_too():
    for given_options, arrays in golden():
        options = dict(given_options)
        function, axis = options.pop("function"), options.pop("axis")
        rest = {}
        if function in ("softmax", "log_softmax", "logsumexp"):
            got = getattr(reference, function)(arrays["x"], axis)
        else:
            options["weight"] = arrays.get("weight")
            got, rest["grad"] = getattr(reference, f"{function}_with_grad")(arrays["x"], arrays["target"], axis=axis, **options)
        np.testing.assert_allclose(got, arrays["value"], rtol=1e-13, atol=1e-14)
        for name, value in rest.items():
            np.testing.assert_allclose(value, arrays[name], rtol=1e-12, atol=1e-14)


def test_the_golden_file_is_small():
    assert GOLDEN.stat().st_size < 300_000


# --- PyTorch side by side --------------------------------------------------------------------------------------------------------------

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed; golden values stand for it")


def torch_problems(count):
    rng = np.random.default_rng(99)
    for number in range(count):
        classes = int(rng.choice([1, 2, 3, 7, 10, 33, 64, 100, 513]))
        shape = [(int(rng.integers(1, 40)), classes), (int(rng.integers(1, 5)), classes, 6), (2, classes, 3, 4), (classes,)][number % 4]
        axis = 0 if len(shape) == 1 else 1
        rows = shape[:axis] + shape[axis + 1 :]
        x = rng.normal(0, 3, shape)
        target = rng.random(shape) if number % 3 == 0 else np.asarray(rng.integers(0, classes, rows))
        options = {"reduction": ("mean", "sum", "none")[number % 5 % 3], "label_smoothing": float(rng.choice([0, 0.1, 1.0]))}
        if target.dtype.kind == "i" and number % 2:
            options["ignore_index"] = int(rng.integers(0, classes)) if number % 4 == 1 else -100
            target = np.where(rng.random(rows) < 0.2, options["ignore_index"], target)
        weight = rng.random(classes) + 0.1 if rng.random() < 0.5 else None
        yield x, np.asarray(target), axis, weight, options


@needs_torch
def test_beside_pytorch(level, dtype):
    """Every option that it has, on the same numbers, its result in float64 as the truth."""
    for double, target, axis, weight, options in torch_problems(150):
        x = double.astype(dtype)
        t = torch.tensor(x.astype(F64), requires_grad=True)
        w = None if weight is None else torch.tensor(weight)
        want = torch.nn.functional.cross_entropy(t, torch.tensor(target), weight=w, **options)
        want.sum().backward()
        loss, grad = ce.cross_entropy_with_grad(x, target, axis=axis, weight=weight, **options)
        size = float(np.max(np.abs(t.grad.numpy())[np.isfinite(t.grad.numpy())], initial=0))
        if options["reduction"] == "none":
            compare(loss, want.detach().numpy(), dtype, 0)
        else:
            np.testing.assert_allclose(loss, float(want.detach()), rtol=16 * eps(row_dtype(dtype)))
        # PyTorch's own p − 1 is off by an ulp of 1.
        compare(grad, t.grad.numpy(), dtype, max(size, 1e-9))


@needs_torch
def test_beside_pytorch_in_its_own_types(level):
    """No worse than PyTorch at the same dtype against the float64 truth."""
    for dtype, name in ((F32, "float32"), (F16, "float16"), (BF16, "bfloat16")):
        rng = np.random.default_rng(3)
        x64 = rng.normal(0, 3, (64, 1000))
        y = rng.integers(0, 1000, 64)
        t = torch.tensor(x64, dtype=getattr(torch, name), requires_grad=True)
        x = t.detach().to(torch.float64).numpy().astype(dtype)
        truth, truth_grad = reference.cross_entropy_with_grad(x, y)
        theirs = torch.nn.functional.cross_entropy(t, torch.tensor(y))
        theirs.backward()
        loss, grad = ce.cross_entropy_with_grad(x, y)
        assert abs(loss - truth) <= abs(float(theirs.detach()) - truth) + 1e-7 * truth
        ours = np.abs(grad.astype(F64) - truth_grad).max()
        assert ours <= np.abs(t.grad.to(torch.float64).numpy() - truth_grad).max() * 1.01 + 1e-12


@needs_torch
def test_transforms_beside_pytorch(level):
    rng = np.random.default_rng(4)
    for shape in ((7,), (5, 33), (3, 4, 5), (2, 3, 4, 5)):
        x, g = rng.normal(0, 3, shape), rng.normal(0, 1, shape)
        for axis in range(-len(shape), len(shape)):
            for name in ("softmax", "log_softmax"):
                t = torch.tensor(x, requires_grad=True)
                y = getattr(torch, name)(t, axis)
                y.backward(torch.tensor(g))
                np.testing.assert_allclose(getattr(ce, name)(x, axis), y.detach().numpy(), rtol=1e-13, atol=1e-14)
                np.testing.assert_allclose(getattr(ce, f"{name}_vjp")(g, y.detach().numpy(), axis), t.grad.numpy(), rtol=1e-11, atol=1e-13)
            np.testing.assert_allclose(ce.logsumexp(x, axis), torch.logsumexp(torch.tensor(x), axis).numpy(), rtol=1e-13, atol=1e-14)


# --- random inputs ---------------------------------------------------------------------------------------------------------------------

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=False)
ROWS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40), elements=ANY_FLOAT)
TAME = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6), elements=st.floats(-100, 100, width=32))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ROWS, st.integers(0, 2**32 - 1))
def test_any_floats_against_the_reference(x, seed):
    """Infinities, nan and the ends of the type anywhere."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, x.shape[1], len(x))
    want, want_grad = reference.cross_entropy_with_grad(x, y, reduction="none")
    want_lse, want_soft = reference.logsumexp(x), reference.softmax(x)
    with np.errstate(all="ignore"):
        want32 = want.astype(F32)
    for level in each_level():
        loss, grad = ce.cross_entropy_with_grad(x, y, reduction="none")
        np.testing.assert_allclose(loss, want32, rtol=1e-6, atol=1e-37, err_msg=level)
        np.testing.assert_allclose(grad, want_grad, rtol=1e-6, atol=1e-37, err_msg=level)
        size = np.max(np.abs(np.where(np.isfinite(x), x, 0)), -1) + 4
        lse = ce.logsumexp(x)
        np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(want_lse))
        both = np.isfinite(want_lse)
        np.testing.assert_array_equal(lse[~both], want_lse[~both])
        assert (np.abs(lse[both] - want_lse[both]) <= 5e-7 * size[both]).all()
        np.testing.assert_allclose(ce.softmax(x), want_soft, rtol=1e-6, atol=1e-37, err_msg=level)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TAME, st.data())
def test_properties(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    p, lp, lse = ce.softmax(x, axis), ce.log_softmax(x, axis), np.asarray(ce.logsumexp(x, axis))
    assert p.shape == lp.shape == x.shape
    assert lse.shape == tuple(np.delete(x.shape, axis))
    if x.shape[axis] == 0:
        assert (lse == -np.inf).all()
        return
    if not x.size:
        return
    assert (p >= 0).all()
    assert (p <= 1).all()
    np.testing.assert_allclose(p.sum(axis, dtype=F64), 1, rtol=1e-6)
    assert (lp <= 0).all()
    np.testing.assert_allclose(np.exp(lp.astype(F64)), p, rtol=2e-5, atol=1e-37)
    assert (lse >= x.max(axis)).all()
    np.testing.assert_allclose(np.expand_dims(lse, axis) + lp, x, rtol=0, atol=5e-5)
    order = np.argsort(x, axis, kind="stable")
    assert (np.diff(np.take_along_axis(p, order, axis), axis=axis) >= 0).all(), "a larger logit has a smaller probability"
    # A permutation of the classes permutes the result, up to the order of the sum.
    flipped = np.flip(ce.softmax(np.flip(x, axis), axis), axis)
    np.testing.assert_allclose(flipped, p, rtol=2e-6, atol=1e-37)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-50, 50)), st.data())
def test_loss_properties(x, data):
    n, classes = x.shape
    y = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    rows = ce.cross_entropy(x, y, reduction="none")
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows, ce.logsumexp(x) - x[np.arange(n), y], rtol=1e-12, atol=1e-13)
    # Linear in the weights.
    w = np.array(data.draw(st.lists(st.floats(0, 4), min_size=classes, max_size=classes)))
    np.testing.assert_allclose(ce.cross_entropy(x, y, weight=w, reduction="none"), w[y] * rows, rtol=1e-14, atol=1e-300)
    # Smoothing mixes with the uniform target.
    uniform = ce.cross_entropy(x, np.full((n, classes), 1 / classes), reduction="none")
    smooth = ce.cross_entropy(x, y, label_smoothing=0.3, reduction="none")
    np.testing.assert_allclose(smooth, 0.7 * rows + 0.3 * uniform, rtol=1e-13, atol=1e-15)
