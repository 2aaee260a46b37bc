"""`mean` and `sum` over ten million rows, beside the exact sum of the losses that the same library returns per row."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from families import Array
from levels import each_level
from oracle import round_to

import crossent as ce

ROWS, CLASSES = 10**7, 2


class Deviation(NamedTuple):
    dtype: str
    who: str
    mean: float
    sum: float


def exact_sum(losses: Array) -> float:
    """Rounded once."""
    wide = losses.astype(np.float64)
    return math.fsum(chain.from_iterable(part.tolist() for part in np.array_split(wide, 100)))


def _deviation(dtype: np.dtype[Any], who: str, losses: Array, mean: float, total: float) -> Deviation:
    want = exact_sum(losses)
    return Deviation(dtype.name, who, abs(mean - want / len(losses)) / (want / len(losses)), abs(total - want) / want)


def _pytorch(x: Array, y: Array) -> tuple[Array, float, float]:
    import torch
    from torch.nn import functional

    logits, labels = torch.from_numpy(x), torch.from_numpy(y)
    losses, mean, total = (functional.cross_entropy(logits, labels, reduction=how) for how in ("none", "mean", "sum"))
    return losses.numpy(), mean.item(), total.item()


def _jax(x: Array, y: Array) -> tuple[Array, float, float]:
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", True)

    def everything(x: Any, y: Any) -> tuple[Any, Any, Any]:
        losses = -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], axis=-1)[:, 0]
        return losses, losses.mean(), losses.sum()

    losses, mean, total = jax.jit(everything)(jnp.asarray(x), jnp.asarray(y))
    return np.asarray(losses), float(mean), float(total)


def _numpy(x: Array, y: Array) -> tuple[Array, float, float]:
    shifted = x - x.max(-1, keepdims=True)
    losses: Array = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(y)), y]
    return losses, float(losses.mean()), float(losses.sum())


PEERS = {"PyTorch": _pytorch, "JAX": _jax, "NumPy": _numpy}


def deviations(dtypes: list[np.dtype[Any]], peers: list[str]) -> list[Deviation]:
    """crossent's is the worst of the levels. Peers get 16-bit logits as float32, so that float32 shows theirs."""
    found = []
    for dtype in dtypes:
        rng = np.random.default_rng(1)
        x = round_to(rng.normal(0, 3, (ROWS, CLASSES)), dtype).astype(dtype)
        y = rng.integers(0, CLASSES, ROWS)
        ours = []
        for _ in each_level():
            losses = np.asarray(ce.cross_entropy(x, y, reduction="none"))
            mean, total = float(ce.cross_entropy(x, y)), float(ce.cross_entropy(x, y, reduction="sum"))
            ours.append(_deviation(dtype, "crossent", losses, mean, total))
        found.append(Deviation(dtype.name, "crossent", max(o.mean for o in ours), max(o.sum for o in ours)))
        if dtype.itemsize > 2:
            for name in peers:
                if name in PEERS:
                    losses, mean, total = PEERS[name](x, y)
                    found.append(_deviation(dtype, name, losses, mean, total))
    return found
