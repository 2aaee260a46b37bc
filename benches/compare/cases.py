"""What is measured: shapes, element types, inputs, and the exact answers that every library must give before it is timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Every shape stands for a use: one decision, a small batch, two and few classes over many rows, a large batch of a small vocabulary, an
# image classifier, three language models (the last one with a single position), and per-pixel segmentation with the classes on axis 1.
GRID: list[tuple[tuple[int, ...], int]] = [
    ((1, 10), 1),
    ((32, 10), 1),
    ((65536, 2), 1),
    ((65536, 10), 1),
    ((65536, 100), 1),
    ((8192, 1000), 1),
    ((1024, 32000), 1),
    ((512, 128256), 1),
    ((1, 262144), 1),
    ((4, 21, 256, 256), 1),
]
QUICK: list[tuple[tuple[int, ...], int]] = [((1, 10), 1), ((65536, 10), 1), ((8192, 1000), 1), ((1024, 32000), 1)]
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class WrongAnswerError(Exception):
    """A library's answer is not the exact one within the tolerance of its type."""


@dataclass
class Case:
    """Logits of one shape and type, with labels."""

    shape: tuple[int, ...]
    axis: int
    dtype: str
    x: Array = field(init=False, repr=False)
    y: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(12345)
        draw = np.float64 if self.dtype == "float64" else np.float32
        self.x = (rng.standard_normal(self.shape, dtype=draw) * 3).astype(numpy_dtype(self.dtype))
        rows = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        self.y = rng.integers(0, self.classes, rows)

    @property
    def classes(self) -> int:
        return self.shape[self.axis]

    @property
    def rows(self) -> int:
        return self.x.size // self.classes

    @property
    def name(self) -> str:
        return shape_name(self.shape)

    @cached_property
    def _flat(self) -> Array:
        """Rows x classes."""
        return np.moveaxis(self.x, self.axis, -1).reshape(self.rows, self.classes)

    @cached_property
    def _logsumexp(self) -> Array:
        out = np.empty(self.rows)
        step = max(1, 2**22 // self.classes)
        for start in range(0, self.rows, step):
            block = self._flat[start : start + step].astype(np.float64)
            m = block.max(axis=1)
            out[start : start + step] = m + np.log(np.exp(block - m[:, None]).sum(axis=1))
        return out

    @cached_property
    def loss(self) -> float:
        """The mean, in float64."""
        picked = self._flat[np.arange(self.rows), self.y.ravel()].astype(np.float64)
        return float((self._logsumexp - picked).mean())

    def check(self, who: str, loss: float | None, gradient: Array | None, log_softmax: Array | None) -> None:
        """Raise `WrongAnswerError` if an answer is; some rows of an array are looked at, the last among them."""
        tolerance = {"float64": 1e-9, "float32": 2e-4, "float16": 4e-3, "bfloat16": 2e-2}[self.dtype]
        if loss is not None and not abs(loss / self.loss - 1) <= tolerance:
            raise WrongAnswerError(f"{who} on {self.name} {self.dtype}: loss {loss}, exactly {self.loss}")
        some = np.unique(np.linspace(0, self.rows - 1, 16).astype(int))
        log_p = self._flat[some].astype(np.float64) - self._logsumexp[some, None]
        for kind, actual in (("gradient", gradient), ("log_softmax", log_softmax)):
            if actual is None:
                continue
            if actual.shape != self.shape:
                raise WrongAnswerError(f"{who}: {kind} has shape {actual.shape}, not {self.shape}")
            got = np.moveaxis(actual, self.axis, -1).reshape(self.rows, self.classes)[some].astype(np.float64)
            expected = log_p
            floor = 1e-6 if self.x.dtype.itemsize > 2 else tolerance
            if kind == "gradient":
                expected = np.exp(log_p)
                expected[np.arange(len(some)), self.y.ravel()[some]] -= 1
                expected /= self.rows
                # Entries of 16-bit gradients may be subnormal, and peers round p before they subtract.
                floor = 1e-7 if self.dtype == "float16" else max(1e-6, 0.1 * tolerance) / self.rows
            worst = np.max(np.abs(got - expected) - tolerance * np.abs(expected))
            if not worst <= floor:
                raise WrongAnswerError(f"{who} on {self.name} {self.dtype}: {kind} is wrong by {worst:.3g}")
