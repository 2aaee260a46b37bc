"""Our own ways, and the variants that the targets compare with each other."""

from __future__ import annotations

import numpy as np
from cases import Array, Case
from peers import grad_answer, log_softmax_answer, loss_answer
from timing import Way

import crossent as ce

WHO = "crossent"


def our_ways(case: Case, place: Array) -> list[Way]:
    """Loss, gradient in a new array, into one, in place, and log_softmax; `place` is an array like the logits to write to."""
    x, y, axis = case.x, case.y, case.axis

    def in_place() -> object:
        return ce.cross_entropy_with_grad(place, y, axis=axis, out=place)

    return [
        Way(WHO, "loss", lambda: ce.cross_entropy(x, y, axis=axis), loss_answer),
        Way(WHO, "grad", lambda: ce.cross_entropy_with_grad(x, y, axis=axis), grad_answer),
        Way(WHO, "out", lambda: ce.cross_entropy_with_grad(x, y, axis=axis, out=place), grad_answer),
        Way(WHO, "in place", in_place, grad_answer, lambda: np.copyto(place, x)),
        Way(WHO, "log_softmax", lambda: ce.log_softmax(x, axis, out=place), log_softmax_answer),
        Way(WHO, "log_softmax new", lambda: ce.log_softmax(x, axis), log_softmax_answer),
    ]


def layout_ways(case: Case, place: Array) -> list[Way]:
    """The same numbers in other layouts (two-dimensional, classes last)."""
    n, c = case.shape
    fortran = np.asfortranarray(case.x)
    backwards = np.ascontiguousarray(case.x[::-1, ::-1])[::-1, ::-1]
    padded = np.zeros((n, c + 8), case.x.dtype)
    padded[:, :c] = case.x
    layouts = {"Fortran": fortran, "reversed": backwards, "row-strided": padded[:, :c]}
    fortran_place = np.empty_like(fortran)
    ways = []
    for name, x in layouts.items():
        out = fortran_place if name == "Fortran" else place
        ways += [
            Way(f"{WHO} {name}", "loss", lambda x=x: ce.cross_entropy(x, case.y), loss_answer),  # type: ignore[misc]
            Way(f"{WHO} {name}", "out", lambda x=x, out=out: ce.cross_entropy_with_grad(x, case.y, out=out), grad_answer),  # type: ignore[misc]
        ]
    return ways


def ignored_ways(case: Case, place: Array) -> list[Way]:
    """Nine rows of ten ignored, and what writing zeros alone takes."""
    y = case.y.copy()
    y[np.arange(len(y)) % 10 != 0] = -100
    x = case.x
    return [
        Way(f"{WHO} 90 % ignored", "loss", lambda: ce.cross_entropy(x, y)),
        Way(f"{WHO} 90 % ignored", "out", lambda: ce.cross_entropy_with_grad(x, y, out=place)),
        Way("limit", "zeros", lambda: place.fill(0)),
    ]


# Options of the loss and how much of the plain call's time each may take.
OPTIONS = {
    "z_loss": 1.05,
    "temperature": 1.05,
    "sample_weight": 1.05,
    "normalizer": 1.05,
    "Mixup": 1.05,
    "SparseProbs, k = 8": 1.05,
    "where": 1.3,
    "softcap": 1.6,
}
UNJUDGED = ("label_smoothing", "weight", "SparseProbs, k = 64", "where, one row for all")


def option_ways(case: Case, place: Array) -> list[Way]:
    """Loss + gradient in place with one option each, and the plain call right before it."""
    x, y, rows, classes = case.x, case.y, case.rows, case.classes
    rng = np.random.default_rng(3)

    def sparse(k: int) -> ce.SparseProbs:
        probs = rng.random((rows, k), dtype=np.float32)
        return ce.SparseProbs(rng.integers(0, classes, (rows, k)), probs / probs.sum(1, keepdims=True))

    kept: Array = np.less(rng.random(x.shape, dtype=np.float32), 0.9)
    calls: dict[str, tuple[object, dict[str, object]]] = {
        "z_loss": (y, {"z_loss": 1e-4}),
        "temperature": (y, {"temperature": 1.5}),
        "sample_weight": (y, {"sample_weight": rng.random(rows, dtype=np.float32) + 0.5}),
        "normalizer": (y, {"normalizer": 1000.0}),
        "Mixup": (ce.Mixup(y, y[::-1].copy(), 0.3), {}),
        "SparseProbs, k = 8": (sparse(8), {}),
        "SparseProbs, k = 64": (sparse(64), {}),
        "where": (y, {"where": kept}),
        "where, one row for all": (y, {"where": kept[0]}),
        "softcap": (y, {"softcap": 30.0}),
        "label_smoothing": (y, {"label_smoothing": 0.1}),
        "weight": (y, {"weight": rng.random(classes, dtype=np.float32) + 0.5}),
    }
    return [
        Way(
            f"{WHO} {name}",
            "in place",
            lambda target=target, more=more: ce.cross_entropy_with_grad(place, target, out=place, **more),  # type: ignore[misc]
            None,
            lambda: np.copyto(place, x),
        )
        for of, call in calls.items()
        for name, (target, more) in ((f"beside {of}", (y, dict[str, object]())), (of, call))
    ]


def level_ways(case: Case, place: Array, level: str) -> list[Way]:
    """Another instruction set; switching is not timed."""
    best = ce.simd_level()
    ways = []
    for way in our_ways(case, place):
        if way.op in {"loss", "out", "in place", "log_softmax"}:

            def prepare(way: Way = way) -> None:
                if way.prepare is not None:
                    way.prepare()
                ce.set_simd_level(level)

            def call(way: Way = way) -> object:
                try:
                    return way.call()
                finally:
                    ce.set_simd_level(best)

            ways.append(Way(f"{WHO} {level}", way.op, call, way.answer, prepare))
    return ways
