"""crossent and its peers on one batch: each computes the loss and the gradient per row, and the three transforms.

Peers get 16-bit logits widened to float32, as autocast does, and their results are rounded once: no peer does better in 16 bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from families import Array

import crossent as ce

Results = dict[str, Array]


def crossent(x: Array, y: Array) -> Results:
    loss, gradient = ce.cross_entropy_with_grad(x, y, reduction="none")
    return {
        "loss": np.asarray(loss),
        "gradient": gradient,
        "logsumexp": np.asarray(ce.logsumexp(x)),
        "log_softmax": ce.log_softmax(x),
        "softmax": ce.softmax(x),
    }


def crossent_columns(x: Array, y: Array) -> Results:
    """The same with the classes on the first axis, which has kernels of its own."""
    x = np.ascontiguousarray(x.T)
    loss, gradient = ce.cross_entropy_with_grad(x, y, axis=0, reduction="none")
    return {
        "loss": np.asarray(loss),
        "gradient": gradient.T,
        "logsumexp": np.asarray(ce.logsumexp(x, 0)),
        "log_softmax": ce.log_softmax(x, 0).T,
        "softmax": ce.softmax(x, 0).T,
    }


def numpy(x: Array, y: Array) -> Results:
    label = (np.arange(len(y)), y)
    m = x.max(-1, keepdims=True)
    e = np.exp(x - m)
    total = e.sum(-1, keepdims=True)
    lse = m + np.log(total)
    softmax = e / total
    gradient = softmax.copy()
    gradient[label] -= 1
    log_softmax = (x - m) - np.log(total)
    return {"loss": -log_softmax[label], "gradient": gradient, "logsumexp": lse[:, 0], "log_softmax": log_softmax, "softmax": softmax}


def scipy(x: Array, y: Array) -> Results:
    from scipy import special

    label = (np.arange(len(y)), y)
    log_softmax, softmax = special.log_softmax(x, axis=-1), special.softmax(x, axis=-1)
    gradient = softmax.copy()
    gradient[label] -= 1
    lse = special.logsumexp(x, axis=-1)
    return {"loss": -log_softmax[label], "gradient": gradient, "logsumexp": lse, "log_softmax": log_softmax, "softmax": softmax}


def pytorch(x: Array, y: Array) -> Results:
    import torch
    from torch.nn import functional

    leaf = torch.from_numpy(x.copy()).requires_grad_()
    loss = functional.cross_entropy(leaf, torch.from_numpy(y), reduction="none")
    loss.sum().backward()
    logits = leaf.detach()
    tensors = {
        "loss": loss.detach(),
        "gradient": leaf.grad,
        "logsumexp": torch.logsumexp(logits, -1),
        "log_softmax": torch.log_softmax(logits, -1),
        "softmax": torch.softmax(logits, -1),
    }
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def jax(x: Array, y: Array) -> Results:
    import jax as library
    from jax import numpy as jnp

    library.config.update("jax_enable_x64", True)

    def losses(x: Any) -> Any:
        return -jnp.take_along_axis(library.nn.log_softmax(x), jnp.asarray(y)[:, None], axis=-1)[:, 0]

    def everything(x: Any) -> dict[str, Any]:
        return {
            "loss": losses(x),
            "gradient": library.grad(lambda x: losses(x).sum())(x),
            "logsumexp": library.nn.logsumexp(x, axis=-1),
            "log_softmax": library.nn.log_softmax(x),
            "softmax": library.nn.softmax(x),
        }

    return {name: np.asarray(array) for name, array in library.jit(everything)(jnp.asarray(x)).items()}


def widened(compute: Callable[[Array, Array], Results]) -> Callable[[Array, Array], Results]:
    def call(x: Array, y: Array) -> Results:
        if x.dtype.itemsize > 2:
            return compute(x, y)
        results = compute(x.astype(np.float32), y)
        return {name: value if value.ndim == 1 else value.astype(x.dtype) for name, value in results.items()}

    return call


PEERS = {"PyTorch": ("torch", pytorch), "JAX": ("jax", jax), "SciPy": ("scipy", scipy), "NumPy": ("numpy", numpy)}


def available() -> tuple[dict[str, Callable[[Array, Array], Results]], list[str], list[str]]:
    """The peers that can be imported, their versions, and those that cannot be with the reason."""
    peers, versions, absent = {}, [], []
    for name, (module, compute) in PEERS.items():
        try:
            versions.append(f"{name} {importlib.import_module(module).__version__}")
        except ImportError as error:
            absent.append(f"{name}: {error}")
            continue
        peers[name] = widened(compute)
    return peers, versions, absent
