"""docs/accuracy.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from families import DTYPES, FAMILIES, ROWS, Array
from sums import ROWS as SUMMED
from sums import Deviation
from truth import QUANTITIES, bound

ROOT = Path(__file__).parent.parent.parent
WHO = "crossent"

METHOD = """\
Each cell is *worst / mean* in units in the last place (ULP) of the result's type at the exact value; for logsumexp at the larger of the
magnitudes of the maximum and of the result. The cells of crossent hold over every instruction set of the machine, with the classes last
and with the classes first. **Bold**: no other library's worst error is smaller by more than 1 %. ∞: not a finite number where there is
one. Exact values below the smallest normal number of the type are left out, since results may be flushed to 0 there (float64: below
2⁻¹⁰¹⁰, where the exact values themselves lose digits).

The exact values come from double-double arithmetic (about 106 bits) on differences of logits that are never rounded; {scheme}.

For 16-bit logits, losses and logsumexp are float32 and judged as such; the other results have the type of the logits, rounded once:
half a unit is the best there is, and the bound is that plus the float32 bound. Peers get 16-bit logits widened to float32, as autocast
does, and their results are rounded once: their best in 16 bits, not their default.

Peers are called as their users call them: `torch.nn.functional.cross_entropy` with autograd, `jax.nn` jitted with `jax_enable_x64`,
`scipy.special`, and in NumPy what a person writes: `x - max`, `exp`, `sum`, `log`. Except in PyTorch the loss is −log_softmax at the
label; in SciPy and NumPy the gradient is softmax, less 1 at the label. Where a peer's error is near 2⁵³ or 2²⁴ ULP, it returns 0 or
loses all digits of a result that is tiny and not 0: the loss of a confident row."""


class Stat:
    """The worst and the mean of errors."""

    def __init__(self) -> None:
        self.worst, self.total, self.count = 0.0, 0.0, 0

    def add(self, errors: Array) -> None:
        if errors.size:
            self.worst = max(self.worst, float(errors.max()))
            self.total += float(errors.sum())
            self.count += errors.size

    @property
    def mean(self) -> float:
        return self.total / self.count


class Key(NamedTuple):
    """`group` is a family, or a number of classes."""

    dtype: np.dtype[Any]
    quantity: str
    group: str | int
    who: str


Stats = dict[Key, Stat]


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def unwrapped(text: str) -> str:
    """A line per paragraph."""
    return "\n\n".join(part.replace("\n", " ") for part in text.split("\n\n"))


def number(value: float, digits: int = 2) -> str:
    if math.isinf(value):
        return "∞"
    if value >= 1e5:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.{digits}f}"


def cells(stats: Stats, dtype: np.dtype[Any], quantity: str, group: str | int, columns: list[str]) -> list[str] | None:
    """Worst / mean of every library, bold where no other is nearer by more than 1 %."""
    found = [stats.get(Key(dtype, quantity, group, who)) for who in columns]
    judged = [stat for stat in found if stat is not None and stat.count]
    if not judged:
        return None
    least = min(stat.worst for stat in judged)
    line = []
    for stat in found:
        if stat is None or not stat.count:
            line.append("")
            continue
        digits = 3 if dtype.itemsize == 2 and stat.worst < 1 else 2
        text = f"{number(stat.worst, digits)} / {number(stat.mean)}"
        line.append(f"**{text}**" if stat.worst <= 1.01 * least else text)
    return line


def over_families(stats: Stats, dtype: np.dtype[Any], quantity: str, who: str) -> Stat:
    whole = Stat()
    for name in FAMILIES:
        stat = stats.get(Key(dtype, quantity, name, who))
        if stat is not None:
            whole.worst = max(whole.worst, stat.worst)
            whole.total += stat.total
            whole.count += stat.count
    return whole


def summary(stats: Stats, columns: list[str]) -> str:
    rows = []
    merged = {Key(d, q, "", who): over_families(stats, d, q, who) for d in DTYPES for q in QUANTITIES for who in columns}
    for dtype in DTYPES:
        for quantity in QUANTITIES:
            line = cells(merged, dtype, quantity, "", columns)
            if line is not None:
                limit, worst = bound(quantity, dtype), merged[Key(dtype, quantity, "", WHO)].worst
                left = f"{100 * (1 - worst / limit):.0f} %" if limit >= 1 else f"{limit - worst:.1e}"
                rows.append([dtype.name, quantity, f"{limit:.5g}", left, *line])
    return table(["type", "result", "promised", "left of it", *columns], rows)


def by_classes(stats: Stats, dtype: np.dtype[Any]) -> str:
    rows = []
    for classes in ROWS:
        found = [stats.get(Key(dtype, quantity, classes, WHO)) for quantity in QUANTITIES]
        digits = 3 if dtype.itemsize == 2 else 2
        rows.append([str(classes), *("" if s is None or not s.count else f"{number(s.worst, digits)} / {number(s.mean)}" for s in found)])
    return table(["classes", *QUANTITIES], rows)


def families_table(stats: Stats, dtype: np.dtype[Any], quantities: Iterable[str], columns: list[str]) -> str:
    rows = []
    for quantity in quantities:
        for name in FAMILIES:
            line = cells(stats, dtype, quantity, name, columns)
            if line is not None:
                rows.append([quantity, name, *line])
    return table(["result", "family", *columns], rows)


def details(stats: Stats, columns: list[str]) -> str:
    parts = []
    groups = {"loss and logsumexp": QUANTITIES[:2], "log_softmax and softmax": QUANTITIES[2:4], "gradient": QUANTITIES[4:]}
    for dtype in DTYPES:
        for title, quantities in groups.items():
            parts.append(f"### {dtype.name}: {title}\n\n" + families_table(stats, dtype, quantities, columns))
        parts.append(f"### {dtype.name}: {WHO} by number of classes\n\n" + by_classes(stats, dtype))
    return "\n\n".join(parts)


def nearer(stats: Stats, columns: list[str]) -> list[str]:
    """Where a peer's worst error is smaller by more than 1 %."""
    lines = []
    for dtype in DTYPES:
        for quantity in QUANTITIES:
            for name in FAMILIES:
                ours = stats.get(Key(dtype, quantity, name, WHO))
                found = {who: stats[key] for who in columns if (key := Key(dtype, quantity, name, who)) in stats}
                if ours is None or not ours.count:
                    continue
                best = min((who for who in found if found[who].count), key=lambda who: found[who].worst)
                if ours.worst > 1.01 * found[best].worst:
                    lines.append(
                        f"{dtype.name} {quantity}, {name}: {best} {number(found[best].worst, 3)} / {number(found[best].mean, 3)}, "
                        f"{WHO} {number(ours.worst, 3)} / {number(ours.mean, 3)}"
                    )
    return lines


def functions() -> str:
    """The tables that the files of the vector mathematics open with, under one heading."""
    files = [ROOT / "src" / "kernels" / name for name in ("math.rs", "tanh.rs")]
    tables = [[line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("//! |")] for file in files]
    rows = [line.removeprefix("//! ") for line in tables[0] + [line for other in tables[1:] for line in other[2:]]]
    return "\n".join(row.replace("[`", "`").replace("`]", "`") for row in rows)


def sums_table(found: list[Deviation]) -> str:
    return table(["type", "library", "mean", "sum"], ([d.dtype, d.who, f"{d.mean:.1e}", f"{d.sum:.1e}"] for d in found))


def write(path: Path, heading: list[str], scheme: str, stats: Stats, columns: list[str], found: list[Deviation], broken: list[str]) -> None:
    losing = nearer(stats, columns)
    rows = ", ".join(f"{count} of {classes}" for classes, count in ROWS.items())
    verdict = (
        "Every bound holds."
        if not broken
        else "**Bounds that do not hold**, the worst of each case:\n\n" + "\n".join(f"- {line}" for line in broken)
    )
    text = [
        "# Accuracy",
        "Written by `make accuracy`; do not edit. " + " ".join(heading),
        unwrapped(METHOD).format(scheme=scheme),
        "## Against the promise\n\n" + f"Over all families. {verdict}\n\n" + summary(stats, columns),
        "## Where another library is nearer\n\n"
        + ("\n".join(f"- {line}" for line in losing) if losing else "Nowhere, in the worst case of a family, by more than 1 %."),
        f"## mean and sum over {SUMMED:,} rows\n\n".replace(",", " ")
        + "Relative error of the reduction against the exact sum (`math.fsum`) of the losses that the same library returns per row; "
        "half a unit of float64 is 1.1e-16, of float32 6e-8.\n\n" + sums_table(found),
        "## The functions underneath\n\n"
        "Stated in `src/kernels/math.rs` and `tanh.rs`, asserted by `tests/math.rs` on every level, in ULP:\n\n" + functions(),
        f"## Family by family\n\nRows per family and number of classes: {rows}; four times as many in *equal below*.\n\n"
        + table(["family", "rows"], ([name, what] for name, what in FAMILIES.items())),
        details(stats, columns),
    ]
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
