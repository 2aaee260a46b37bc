"""Writes tests/data/golden.npz: results of PyTorch in float64 for the tests that run without it.

    python tools/make_golden.py

The logits are numbers that bfloat16 and float16 hold exactly, so that one set of results serves every dtype. The file holds, per case, the
options as JSON, the arrays that went in, and the loss and gradient that came out.
"""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import torch

SHAPES = [((7, 2), 1), ((5, 3), 1), ((4, 10), 1), ((3, 33), 1), ((2, 5, 3), 1), ((2, 4, 3, 2), 1), ((6,), 0), ((3, 1), 1)]


def logits(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Seven significant bits, magnitudes to about 20: exact in all four types."""
    x = rng.normal(0, 4, shape)
    return np.ldexp(np.round(np.ldexp(x, 3)), -3).clip(-15, 15)


def cases():
    """Pairs of (description, arrays) for everything that PyTorch has."""
    rng = np.random.default_rng(20240229)
    for number, ((shape, axis), kind, reduction) in enumerate(
        itertools.product(SHAPES, ("index", "ignored", "probs"), ("mean", "sum", "none"))
    ):
        rows = shape[:axis] + shape[axis + 1 :]
        classes = shape[axis]
        for smoothing, weighted in ((0.0, False), (0.1, True)) if number % 2 else ((0.0, True), (0.25, False)):
            arrays = {"x": logits(rng, shape)}
            options = {"function": "cross_entropy", "axis": axis, "reduction": reduction, "label_smoothing": smoothing}
            if weighted:
                arrays["weight"] = rng.integers(1, 9, classes) / 4
            if kind == "probs":
                arrays["target"] = rng.integers(0, 9, shape) / 8
            else:
                target = rng.integers(0, classes, rows)
                if kind == "ignored":
                    target = np.where(rng.random(rows) < 0.3, -100, target)
                arrays["target"] = np.asarray(target)
            yield options, arrays
    for shape, axis in SHAPES:
        for reduction in ("mean", "sum", "none"):
            rows, classes = shape[:axis] + shape[axis + 1 :], shape[axis]
            arrays = {
                "x": -np.abs(logits(rng, shape)),
                "target": np.asarray(rng.integers(0, classes, rows)),
                "weight": rng.integers(1, 9, classes) / 4,
            }
            yield {"function": "nll_loss", "axis": axis, "reduction": reduction}, arrays
        for function in ("softmax", "log_softmax", "logsumexp"):
            arrays = {"x": logits(rng, shape)}
            if function != "logsumexp":
                arrays["grad_output"] = rng.integers(-8, 9, shape) / 4
            yield {"function": function, "axis": axis}, arrays
    # Special rows, one at a time.
    inf, nan = np.inf, np.nan
    special = [[1, -inf, 2], [-inf, -inf, -inf], [inf, 0, 1], [nan, 0, 1], [20, 0, 0], [-inf, 3, -inf], [9984, -9984, 0], [0, 0, 0]]
    for row in special:
        for label in range(3):
            yield (
                {"function": "cross_entropy", "axis": 1, "reduction": "none", "label_smoothing": 0.0},
                {"x": np.array([row], float), "target": np.array([label])},
            )
        yield {"function": "logsumexp", "axis": 1}, {"x": np.array([row], float)}
    for reduction in ("mean", "sum", "none"):
        base = {"function": "cross_entropy", "axis": 1, "reduction": reduction, "label_smoothing": 0.0}
        yield base, {"x": np.zeros((0, 3)), "target": np.zeros(0, np.int64)}
        yield base, {"x": np.ones((2, 3)), "target": np.array([-100, -100])}
        yield base, {"x": np.ones((2, 3)), "target": np.array([1, 1]), "weight": np.array([1.0, 0.0, 1.0])}


def compute(options: dict, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What PyTorch says, in float64."""
    options = dict(options)
    function, axis = options.pop("function"), options.pop("axis")
    x = torch.tensor(arrays["x"], dtype=torch.float64, requires_grad=True)
    if function in ("softmax", "log_softmax"):
        y = getattr(torch, function)(x, axis)
        y.backward(torch.tensor(arrays["grad_output"]))
        return {"value": y.detach().numpy(), "grad": x.grad.numpy()}
    if function == "logsumexp":
        return {"value": torch.logsumexp(x, axis).detach().numpy()}
    weight = torch.tensor(arrays["weight"]) if "weight" in arrays else None
    loss = getattr(torch.nn.functional, function)(x, torch.tensor(arrays["target"]), weight=weight, **options)
    loss.sum().backward()
    return {"value": loss.detach().numpy(), "grad": x.grad.numpy()}


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Like np.savez_compressed, with fixed dates: the same contents give the same file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), buffer.getvalue(), zipfile.ZIP_DEFLATED)


def main() -> None:
    # One array per kind of content: a zip entry per case would be mostly headers.
    flat: list[float] = []
    index = []
    for options, arrays in cases():
        entry = {"options": options, "arrays": {}}
        for name, array in (arrays | compute(options, arrays)).items():
            entry["arrays"][name] = {"at": len(flat), "shape": list(array.shape), "integer": array.dtype.kind == "i"}
            flat += array.astype(np.float64).ravel().tolist()
        index.append(entry)
    path = Path(__file__).parents[1] / "tests" / "data" / "golden.npz"
    path.parent.mkdir(exist_ok=True)
    header = json.dumps({"torch": torch.__version__.split("+")[0], "cases": index}, separators=(",", ":"))
    save(path, {"index": np.frombuffer(header.encode(), np.uint8), "values": np.array(flat)})
    print(f"{path.name}: {len(index)} cases, {path.stat().st_size} bytes, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
