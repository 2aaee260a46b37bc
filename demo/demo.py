"""crossent on its main job: the loss of a classifier and its gradient, from logits in NumPy.

Run it with ``make demo``, or with any Python that has crossent and scikit-learn: ``python demo/demo.py [--epochs N]``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

import crossent as ce

Array = np.ndarray[Any, Any]


def title(number: int, text: str) -> None:
    line = f"{number}. {text}"
    print(f"\n{line}\n{'=' * len(line)}")


# --- 1. four ways to the same number ------------------------------------------------------------------------------------------------


def softmax_then_log(x: Array, y: Array) -> float:
    """Exponentials, their share, minus the logarithm."""
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    return float(-np.log(p[np.arange(len(y)), y]).mean())


def log_softmax_then_pick(x: Array, y: Array) -> float:
    """The logarithm of the share, written as a difference."""
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(y)), y].mean())


def ours_in_two_steps(x: Array, y: Array) -> float:
    return float(ce.nll_loss(ce.log_softmax(x), y))


def ours_in_one(x: Array, y: Array) -> float:
    return float(ce.cross_entropy(x, y))


FORMULATIONS: dict[str, Callable[[Array, Array], float]] = {
    "NumPy: softmax, then -log": softmax_then_log,
    "NumPy: log_softmax, then -log p[target]": log_softmax_then_pick,
    "crossent: log_softmax + nll_loss": ours_in_two_steps,
    "crossent: cross_entropy": ours_in_one,
}


def four_formulations() -> None:
    title(1, "Four formulations of one loss, and where the first two break")
    x = np.array(
        [
            [0.9826, 1.0630, -0.4096],
            [-0.6213, 0.2511, 0.5659],
            [0.5662, 0.7360, -0.6783],
            [-0.4638, -1.4961, -1.0877],
            [1.8186, -0.2998, 0.1128],
        ],
        dtype=np.float32,
    )
    y = np.array([1, 0, 1, 1, 1])
    shifted = x + np.float32(1000)
    confident, first = np.array([[20, 0]], dtype=np.float32), np.array([0])

    print(f"{'mean cross-entropy, float32 logits':<42}{'5 x 3 example':>15}{'the same + 1000':>18}{'row [20, 0]':>16}")
    for name, formulation in FORMULATIONS.items():
        with np.errstate(over="ignore", invalid="ignore"):  # the overflow is what this shows
            example, far, sure = formulation(x, y), formulation(shifted, y), formulation(confident, first)
        print(f"{name:<42}{example:>15.4f}{far:>18.4f}{sure + 0.0:>16.4e}")
        assert round(example, 4) == 1.4904, (name, example)
        if name.startswith("crossent"):
            assert math.isclose(far, 1.4904, abs_tol=2e-4), (name, far)
            assert math.isclose(sure, math.log1p(math.exp(-20)), rel_tol=1e-6), (name, sure)
    print(f"{'exact':<42}{'1.4904':>15}{'1.4904':>18}{math.log1p(math.exp(-20)):>16.4e}")

    loss, grad = ce.cross_entropy_with_grad(confident, first)
    rounded = np.float32(1 / (1 + math.exp(-20))) - 1
    print(f"\nGradient of the row [20, 0] at class 0: {grad[0, 0]:.6e} by crossent, {rounded:.1f} by p - 1; loss {loss:.6e}")
    assert math.isclose(grad[0, 0], -1 / (1 + math.exp(20)), rel_tol=1e-6), grad


# --- 2. a classifier trained on real data -------------------------------------------------------------------------------------------


def train_digits(epochs: int) -> None:
    title(2, "Softmax regression on scikit-learn's handwritten digits")
    images, labels = load_digits(return_X_y=True)
    pixels = np.hstack([images / 16, np.ones((len(images), 1))]).astype(np.float32)  # the last column carries the bias
    x_train, x_test, y_train, y_test = train_test_split(pixels, labels, test_size=0.25, random_state=0, stratify=labels)
    classes = 10
    print(f"{len(x_train)} images to train on, {len(x_test)} to test, {pixels.shape[1]} features with the bias, {classes} classes")

    weights = np.zeros((pixels.shape[1], classes), dtype=np.float32)
    velocity = np.zeros_like(weights)
    rng = np.random.default_rng(0)
    batch, rate, momentum, decay = 64, 0.15, 0.9, 1e-4
    for epoch in range(1, epochs + 1):
        seen = 0.0
        order = rng.permutation(len(x_train))
        for start in range(0, len(x_train), batch):
            rows = order[start : start + batch]
            logits = x_train[rows] @ weights
            loss, grad = ce.cross_entropy_with_grad(logits, y_train[rows], out=logits)  # the gradient takes the logits' place
            velocity = momentum * velocity - rate * (x_train[rows].T @ grad + decay * weights)
            weights += velocity
            seen += float(loss) * len(rows)
        logits = x_test @ weights
        accuracy = (logits.argmax(axis=1) == y_test).mean()
        train_loss, test_loss = seen / len(x_train), ce.cross_entropy(logits, y_test)
        print(f"epoch {epoch:>2}/{epochs}   train loss {train_loss:.4f}   test loss {test_loss:.4f}   test accuracy {accuracy:.4f}")

    logits = x_test @ weights
    ours = ce.cross_entropy(logits, y_test)
    theirs = log_loss(y_test, ce.softmax(logits.astype(np.float64)))
    accuracy = (logits.argmax(axis=1) == y_test).mean()
    print(f"\ntest accuracy {accuracy:.4f}; log-loss {ours:.8f} by crossent, {theirs:.8f} by sklearn.metrics.log_loss")
    assert math.isclose(ours, theirs, rel_tol=1e-6), (ours, theirs)
    if epochs >= 10:
        assert accuracy > 0.93, accuracy


# --- 3. a language model's output layer ---------------------------------------------------------------------------------------------


def numpy_loss_and_grad(x: Array, y: Array) -> tuple[float, Array]:
    """What a careful person writes in NumPy."""
    rows = np.arange(len(y))
    e = np.exp(x - x.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    loss = float(-np.log(p[rows, y]).mean())
    p[rows, y] -= 1
    p /= len(y)
    return loss, p


def timing(rounds: int = 5) -> None:
    n, c = 1024, 32000
    title(3, f"Loss + gradient at {n} x {c} float32, beside NumPy")
    rng = np.random.default_rng(0)
    source = rng.standard_normal((n, c), dtype=np.float32) * 3
    y = rng.integers(0, c, n)
    logits = source.copy()

    ways: dict[str, Callable[[], tuple[Any, Array]]] = {
        "NumPy": lambda: numpy_loss_and_grad(source, y),
        "crossent, new array": lambda: ce.cross_entropy_with_grad(source, y),
        "crossent, in place": lambda: ce.cross_entropy_with_grad(logits, y, out=logits),
    }
    expected_loss, expected_grad = ways["NumPy"]()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first round warms up
        for name, way in ways.items():
            np.copyto(logits, source)
            start = time.perf_counter()
            loss, grad = way()
            times[name].append(time.perf_counter() - start)
            assert math.isclose(loss, expected_loss, rel_tol=1e-5), (name, loss, expected_loss)
            assert np.abs(grad[::64] - expected_grad[::64]).max() < 1e-8, name
            del grad
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    for name, seconds in medians.items():
        print(f"{name:<22}{seconds * 1e3:>9.1f} ms   {medians['NumPy'] / seconds:>6.1f} x NumPy's speed")
    print(f"(medians of {rounds} interleaved rounds, {ce.get_num_threads()} threads, {ce.simd_level()})")


def main() -> None:
    parser = argparse.ArgumentParser(description="crossent on its main job")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of part 2 (default 20)")
    args = parser.parse_args()
    four_formulations()
    train_digits(args.epochs)
    timing()


if __name__ == "__main__":
    main()
