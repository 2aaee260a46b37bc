"""The ways that the other libraries offer, each called as its users call it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import Array, Case
from timing import Way


def as_float(x: object) -> Array:
    """A NumPy array of a type that NumPy computes with."""
    a: Array = np.asarray(x)
    return a if a.dtype.kind == "f" else a.astype(np.float32)


def loss_answer(result: Any) -> tuple[float, None, None]:
    return float(result), None, None


def grad_answer(result: Any) -> tuple[float, Array, None]:
    return float(result[0]), as_float(result[1]), None


def log_softmax_answer(result: Any) -> tuple[None, None, Array]:
    return None, None, as_float(result)


def numpy_ways(case: Case, threads: int) -> list[Way]:
    del threads
    x, axis = case.x, case.axis
    label = np.expand_dims(case.y, axis)
    rows = case.rows

    def widen() -> Array:
        # 16-bit arithmetic in NumPy is slow and poor: a person converts first.
        return x.astype(np.float32) if x.dtype.itemsize == 2 else x

    def log_softmax() -> Array:
        wide = widen()
        shifted: Array = wide - wide.max(axis=axis, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
        return shifted

    def loss() -> float:
        wide = widen()
        m = wide.max(axis=axis, keepdims=True)
        lse = m + np.log(np.exp(wide - m).sum(axis=axis, keepdims=True))
        return float((lse - np.take_along_axis(wide, label, axis)).mean())

    def grad() -> tuple[float, Array]:
        wide = widen()
        e = np.exp(wide - wide.max(axis=axis, keepdims=True))
        p = e / e.sum(axis=axis, keepdims=True)
        at_label = np.take_along_axis(p, label, axis)
        value = float(-np.log(at_label).mean())
        np.put_along_axis(p, label, at_label - 1, axis)
        p /= rows
        return value, p

    return [
        Way("NumPy", "loss", loss, loss_answer),
        Way("NumPy", "grad", grad, grad_answer),
        Way("NumPy", "log_softmax", log_softmax, log_softmax_answer),
    ]


def scipy_ways(case: Case, threads: int) -> list[Way]:
    del threads
    from scipy import special

    x, axis = case.x, case.axis
    if x.dtype.itemsize == 2:
        return []
    label = np.expand_dims(case.y, axis)

    def loss() -> float:
        picked = np.take_along_axis(x, label, axis)
        return float((special.logsumexp(x, axis=axis, keepdims=True) - picked).mean())

    def grad() -> tuple[float, Array]:
        p = special.log_softmax(x, axis=axis)
        value = float(-np.take_along_axis(p, label, axis).mean())
        np.exp(p, out=p)
        np.put_along_axis(p, label, np.take_along_axis(p, label, axis) - 1, axis)
        p /= case.rows
        return value, p

    return [
        Way("SciPy", "loss", loss, loss_answer),
        Way("SciPy", "grad", grad, grad_answer),
        Way("SciPy", "log_softmax", lambda: special.log_softmax(x, axis=axis), log_softmax_answer),
    ]


def sklearn_ways(case: Case, threads: int) -> list[Way]:
    from sklearn._loss.loss import HalfMultinomialLoss

    x = case.x
    if x.dtype.itemsize == 2 or x.ndim != 2 or case.classes < 3:
        return []
    y = case.y.astype(x.dtype)
    multinomial = HalfMultinomialLoss(n_classes=case.classes)

    def loss() -> float:
        return float(multinomial.loss(y, x, n_threads=threads).mean())

    def grad() -> tuple[float, Array]:
        rows, gradient = multinomial.loss_gradient(y, x, n_threads=threads)
        gradient /= len(y)
        return float(rows.mean()), gradient

    return [Way("scikit-learn", "loss", loss, loss_answer), Way("scikit-learn", "grad", grad, grad_answer)]


def torch_tensors(case: Case) -> tuple[Any, Any]:
    import torch

    if case.dtype == "bfloat16":
        x = torch.from_numpy(case.x.view(np.int16).copy()).view(torch.bfloat16)
    else:
        x = torch.from_numpy(case.x.copy())
    return x, torch.from_numpy(case.y)


def torch_ways(case: Case, threads: int, who: str = "PyTorch", wrap: Callable[[Any], Any] | None = None) -> list[Way]:
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    if case.axis != 1:
        return []
    x, y = torch_tensors(case)
    leaf = x.clone().requires_grad_()
    cross_entropy = functional.cross_entropy if wrap is None else wrap(functional.cross_entropy)
    log_softmax = torch.log_softmax if wrap is None else wrap(torch.log_softmax)

    def to_numpy(t: Any) -> Array:
        t = t.detach()
        return np.asarray((t.float() if t.dtype is torch.bfloat16 else t).numpy())

    def grad() -> tuple[Any, Any]:
        leaf.grad = None
        loss = cross_entropy(leaf, y)
        loss.backward()
        return loss, leaf.grad

    return [
        Way(who, "loss", lambda: cross_entropy(x, y), loss_answer),
        Way(who, "grad", grad, lambda result: (result[0].item(), to_numpy(result[1]), None)),
        Way(who, "log_softmax", lambda: log_softmax(x, 1), lambda result: (None, None, to_numpy(result))),
    ]


def torch_compile_ways(case: Case, threads: int) -> list[Way]:
    import torch

    torch.compiler.reset()
    return torch_ways(case, threads, "torch.compile", lambda f: torch.compile(f, dynamic=False))


def jax_ways(case: Case, threads: int) -> list[Way]:
    import jax
    from jax import numpy as jnp

    # XLA's pool is sized at its start, by the machine: it cannot be held to fewer.
    if threads == 1:
        return []
    jax.config.update("jax_enable_x64", True)
    x, y, axis = jnp.asarray(case.x), jnp.asarray(case.y), case.axis

    def mean_loss(x: Any, y: Any) -> Any:
        wide = x.astype(jnp.float32) if x.dtype.itemsize == 2 else x
        lp = jax.nn.log_softmax(wide, axis=axis)
        return -jnp.take_along_axis(lp, jnp.expand_dims(y, axis), axis=axis).mean()

    loss = jax.jit(mean_loss)
    grad = jax.jit(jax.value_and_grad(mean_loss))
    log_softmax = jax.jit(lambda x: jax.nn.log_softmax(x, axis=axis))
    return [
        Way("JAX jit", "loss", lambda: loss(x, y).block_until_ready(), loss_answer),
        Way("JAX jit", "grad", lambda: jax.block_until_ready(grad(x, y)), grad_answer),
        Way("JAX jit", "log_softmax", lambda: log_softmax(x).block_until_ready(), log_softmax_answer),
    ]


def onnxruntime_ways(case: Case, threads: int) -> list[Way]:
    import onnxruntime
    from onnx import TensorProto, helper

    if case.dtype not in {"float32", "float64"}:
        return []
    kind = TensorProto.FLOAT if case.dtype == "float32" else TensorProto.DOUBLE

    def session(node: Any, inputs: list[Any], output: Any) -> Any:
        graph = helper.make_graph([node], "g", inputs, [output])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    x_info = helper.make_tensor_value_info("x", kind, case.shape)
    y_info = helper.make_tensor_value_info("y", TensorProto.INT64, case.y.shape)
    ways = []
    softmax = session(
        helper.make_node("LogSoftmax", ["x"], ["z"], axis=case.axis), [x_info], helper.make_tensor_value_info("z", kind, case.shape)
    )
    ways.append(Way("ONNX Runtime", "log_softmax", lambda: softmax.run(None, {"x": case.x})[0], log_softmax_answer))
    if case.axis == 1:
        loss = session(
            helper.make_node("SoftmaxCrossEntropyLoss", ["x", "y"], ["l"], reduction="mean"),
            [x_info, y_info],
            helper.make_tensor_value_info("l", kind, []),
        )
        ways.append(Way("ONNX Runtime", "loss", lambda: loss.run(None, {"x": case.x, "y": case.y})[0], loss_answer))
    return ways


Maker = Callable[[Case, int], list[Way]]

# Name, module to import, ways.
PEERS: list[tuple[str, str, Maker]] = [
    ("NumPy", "numpy", numpy_ways),
    ("SciPy", "scipy", scipy_ways),
    ("scikit-learn", "sklearn", sklearn_ways),
    ("PyTorch", "torch", torch_ways),
    ("torch.compile", "torch", torch_compile_ways),
    ("JAX jit", "jax", jax_ways),
    ("ONNX Runtime", "onnxruntime", onnxruntime_ways),
]


def available(names: list[str] | None = None) -> tuple[dict[str, Maker], dict[str, str], list[str]]:
    """What can be imported, the versions, and what cannot with the reason."""
    makers: dict[str, Maker] = {}
    versions: dict[str, str] = {}
    absent = []
    for name, module, maker in PEERS:
        if names is not None and name not in names:
            continue
        try:
            versions[module] = importlib.import_module(module).__version__
        except ImportError as error:
            absent.append(f"{name}: {error}")
            continue
        makers[name] = maker
    return makers, versions, absent
