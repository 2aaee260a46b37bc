"""The targets, judged from the medians of one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cases import shape_name
from ours import OPTIONS, UNJUDGED, WHO
from timing import Medians, Timing

# By (shape, dtype, threads).
Results = dict[tuple[tuple[int, ...], str, int], Medians]
LARGE: list[tuple[int, ...]] = [(8192, 1000), (1024, 32000), (512, 128256)]
HUGE: list[tuple[int, ...]] = [(1024, 32000), (512, 128256)]
PEERS = ("torch.compile", "JAX jit", "ONNX Runtime", "scikit-learn", "SciPy", "NumPy")


@dataclass
class Verdict:
    """One target on one shape."""

    what: str
    where: str
    value: float
    # None where only the stretch goal is set.
    must: float | None
    # Whether a larger value is better.
    larger: bool = True
    stretch: float | None = None
    # Why a value short of the number is still what was asked for.
    instead: str = ""

    def _reaches(self, bound: float) -> bool:
        return self.value >= bound if self.larger else self.value <= bound

    @property
    def met(self) -> bool:
        return bool(self.instead) or self.must is None or self._reaches(self.must)

    def line(self) -> list[str]:
        """Cells of a table."""
        sign = "≥" if self.larger else "≤"
        must, stretch = ("" if bound is None else f"{sign} {bound:g}" for bound in (self.must, self.stretch))
        verdict = "met" if self.met else "SHORT"
        if self.must is None:
            verdict = ""
        if self.stretch is not None and self._reaches(self.stretch):
            verdict = "stretch met"
        if self.instead:
            verdict += f" ({self.instead})"
        return [self.what, self.where, f"{self.value:.3g}", must, stretch, verdict]


def judge(results: Results, threads: int, memory: dict[str, float]) -> list[Verdict]:
    """Every target whose measurements are there."""
    verdicts: list[Verdict] = []

    def get(shape: tuple[int, ...], op: str, who: str = WHO, dtype: str = "float32", t: int = threads) -> float | None:
        return results.get((shape, dtype, t), {}).get((op, who))

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else Timing.ratio(a, b)

    def add(what: str, shape: tuple[int, ...], value: float | None, must: float | None, **more: object) -> None:
        if value is not None:
            verdicts.append(Verdict(what, shape_name(shape), value, must, **more))  # type: ignore[arg-type]

    def share(shape: tuple[int, ...], op: str, limit: str) -> float | None:
        return ratio(get(shape, limit, "limit"), get(shape, op))

    for shape in LARGE:
        add("loss, of the read limit", shape, share(shape, "loss", "read"), 0.90, stretch=1.0)
        add("loss + gradient in place, of the rewrite limit", shape, share(shape, "in place", "rewrite"), 0.62, stretch=0.80)
        add("loss + gradient into out, of the copy limit", shape, share(shape, "out", "copy"), 0.90)
        add("loss + gradient into out, of the copy past the cache", shape, share(shape, "out", "stream"), None, stretch=1.0)
        add("log_softmax into out, of the copy limit", shape, share(shape, "log_softmax", "copy"), 0.95)
        add("log_softmax into out, of the copy past the cache", shape, share(shape, "log_softmax", "stream"), None, stretch=1.0)
        add("loss + gradient in a new array, of the speed into out", shape, ratio(get(shape, "out"), get(shape, "grad")), 0.7, stretch=0.9)
        new = ratio(get(shape, "log_softmax"), get(shape, "log_softmax new"))
        add("log_softmax in a new array, of the speed into out", shape, new, 0.7, stretch=0.9)

    # A multiple is due, or the share of the memory limit, where that is less.
    demanded = {"loss": ("read", 0.90), "out": ("copy", 0.90), "in place": ("rewrite", 0.62), "log_softmax": ("copy", 0.95)}
    for shape in [*HUGE, (1, 262144)]:
        for op, theirs, name, who, must in [
            ("loss", "loss", "loss", "PyTorch", 8.0),
            ("out", "grad", "loss + gradient into out", "PyTorch", 12.0),
            ("grad", "grad", "loss + gradient in a new array", "PyTorch", 4.0),
            ("in place", "grad", "loss + gradient in place", "PyTorch", 25.0),
            ("loss", "loss", "loss", "PyTorch warm", 3.0),
            ("out", "grad", "loss + gradient into out", "PyTorch warm", 4.0),
            ("in place", "grad", "loss + gradient in place", "PyTorch warm", 6.0),
            ("log_softmax", "log_softmax", "log_softmax into out", "PyTorch warm", 1.7),
        ]:
            ours = get(shape, op, WHO + " beside warm") if who == "PyTorch warm" else get(shape, op)
            value = ratio(get(shape, theirs, who), ours)
            instead = ""
            if value is not None and value < must and op in demanded:
                limit, needed = demanded[op]
                reached = share(shape, op, limit)
                if reached is not None and reached >= needed:
                    instead = f"{reached:.2f} of the {limit} limit"
            add(f"{name}, times {who}", shape, value, must, instead=instead)

    small: list[tuple[tuple[int, ...], float]] = [((65536, 10), 20.0), ((65536, 2), 8.0)]
    for shape, must in small:
        for op, name in [("grad", "loss + gradient"), ("loss", "loss")]:
            add(f"{name}, times PyTorch", shape, ratio(get(shape, op, "PyTorch"), get(shape, op)), must, stretch=40.0)
    medium: list[tuple[int, ...]] = [(65536, 100), (8192, 1000), (4, 21, 256, 256)]
    for shape in medium:
        add("loss + gradient, times PyTorch", shape, ratio(get(shape, "grad", "PyTorch"), get(shape, "grad")), 6.0, stretch=10.0)

    for shape in [(8192, 1000), (1024, 32000)]:
        for layout in ("Fortran", "reversed", "row-strided"):
            for op in ("loss", "out"):
                value = ratio(get(shape, op, f"{WHO} {layout}"), get(shape, op))
                add(f"{layout} order, {op}, of the C-order time", shape, value, 1.5, larger=False)

    for shape in sorted({shape for shape, dtype, t in results if dtype == "float32" and t == threads}):
        for op in ("loss", "grad", "log_softmax"):
            rivals = {who: get(shape, op, who) for who in PEERS}
            best = min(((seconds, who) for who, seconds in rivals.items() if seconds is not None), default=None)
            ours = get(shape, op)
            if best is not None and ours is not None:
                add(f"{op}, times the best other peer ({best[1]})", shape, Timing.ratio(best[0], ours), 1.0, stretch=2.0)

    add(
        "a call, of F.cross_entropy's time",
        (1, 10),
        ratio(get((1, 10), "loss"), get((1, 10), "loss", "PyTorch")),
        0.25,
        larger=False,
        stretch=0.1,
    )
    value = ratio(get((1, 10), "grad"), get((1, 10), "grad", "PyTorch"))
    add("a call with gradient, of its forward + backward", (1, 10), value, 0.05, larger=False)

    for shape in HUGE:
        for dtype in ("bfloat16", "float16"):
            add(f"{dtype} loss, times float32", shape, ratio(get(shape, "loss"), get(shape, "loss", dtype=dtype)), 1.6, stretch=2.0)
            for op in ("in place", "out"):
                add(f"{dtype} {op}, times float32", shape, ratio(get(shape, op), get(shape, op, dtype=dtype)), 1.3, stretch=2.0)
    for shape in LARGE:
        for op in ("loss", "in place", "out"):
            add(f"float64 {op}, of the float32 speed", shape, ratio(get(shape, op), get(shape, op, dtype="float64")), 0.4, stretch=0.5)

    for shape in [(8192, 1000), (1024, 32000)]:
        ignored = f"{WHO} 90 % ignored"
        add("90 % ignored: loss, of the full time", shape, ratio(get(shape, "loss", ignored), get(shape, "loss")), 0.2, larger=False)
        full, zeros = get(shape, "out"), get(shape, "zeros", "limit")
        if full is not None and zeros is not None:
            allowed = full / 10 + zeros
            add("90 % ignored: gradient, of a tenth + writing zeros", shape, ratio(get(shape, "out", ignored), allowed), 1.0, larger=False)

    for shape in HUGE:
        for op in ("loss", "out", "in place", "log_softmax"):
            add(f"AVX2, {op}, of the best level's time", shape, ratio(get(shape, op, f"{WHO} avx2"), get(shape, op)), 1.3, larger=False)

    one: tuple[int, ...] = (1024, 32000)
    for name, allowed in OPTIONS.items():
        add(
            f"{name} in place, of the plain call",
            one,
            ratio(get(one, "in place", f"{WHO} {name}"), get(one, "in place", f"{WHO} beside {name}")),
            allowed,
            larger=False,
        )
    for name in UNJUDGED:
        plain = get(one, "in place", f"{WHO} beside {name}")
        add(f"{name} in place, of the plain call", one, ratio(get(one, "in place", f"{WHO} {name}"), plain), None)
    for op, allowed in (("score_tokens", 1.1), ("score_tokens, entropy and rank", 1.5)):
        add(f"{op}, of the loss", one, ratio(get(one, op), get(one, "loss", f"{WHO} beside {op}")), allowed, larger=False)
    for op in ("topk_logprobs, k = 20", "kl_divergence", "kl_divergence_with_grad, into out"):
        add(f"{op}, times PyTorch", one, ratio(get(one, op, "PyTorch"), get(one, op)), None if "grad" in op else 5.0)

    for call, allowed in (("loss", 0.0), ("in place", 0.0), ("new array", 1.0)):
        if call in memory:
            # Stacks, scratch and page tables: a few hundred kilobytes.
            add(f"extra memory, {call}, of the logits", (1024, 32000), memory[call], allowed + 0.01, larger=False)

    if threads > 1:
        for shape in LARGE:
            alone, together = get(shape, "loss", t=1), get(shape, "loss")
            reading = ratio(get(shape, "read", "limit", t=1), get(shape, "read", "limit"))
            scaling = ratio(alone, together)
            add(f"{threads} threads over 1, of what reading scales by", shape, ratio(scaling, reading), 0.9)
    return verdicts


def summary(verdicts: Iterable[Verdict]) -> str:
    all_of_them = [v for v in verdicts if v.must is not None]
    met = sum(v.met for v in all_of_them)
    return f"{met} targets met, {len(all_of_them) - met} short"
