"""docs/benchmarks.md, or another page, and its plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cases import GRID, shape_name
from ours import WHO
from targets import Results, Verdict, summary

FAMILIES = {
    "loss": ("Loss", {WHO: "loss"}),
    "grad": ("Loss + gradient", {WHO: "grad", f"{WHO} out": "out", f"{WHO} in place": "in place"}),
    "log_softmax": ("log_softmax", {WHO: "log_softmax"}),
}
LIMIT = {"loss": "read", "grad": "rewrite", "log_softmax": "copy"}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def grid_tables(results: Results) -> str:
    """One table per element type and number of threads: a row per shape and operation, a column per library."""
    parts = []
    for dtype, threads in sorted(
        {(dtype, threads) for _, dtype, threads in results}, key=lambda key: (key[0] != "float32", key[0], -key[1])
    ):
        shapes = [shape for shape, _ in GRID if (shape, dtype, threads) in results]
        columns: list[str] = []
        for shape in shapes:
            for op, who in results[shape, dtype, threads]:
                if op in FAMILIES and who not in columns and not who.startswith(WHO):
                    columns.append(who)
        rows = []
        for shape in shapes:
            medians = results[shape, dtype, threads]
            for op, label in (
                ("loss", "loss"),
                ("grad", "loss + gradient"),
                ("out", "… into out"),
                ("in place", "… in place"),
                ("log_softmax", "log_softmax"),
            ):
                ours = medians.get((op, WHO))
                if ours is None:
                    continue
                theirs = "grad" if op in {"out", "in place"} else op
                cells = []
                for who in columns:
                    other = medians.get((theirs, who))
                    cells.append("" if other is None else f"{duration(other)} ({other / ours:.1f}×)")
                rows.append([shape_name(shape), label, duration(ours), *cells])
        parts.append(f"### {dtype}, {threads} thread{'s' if threads > 1 else ''}\n\n" + table(["shape", "work", WHO, *columns], rows))
    return "\n\n".join(parts)


BEGIN, END = "<!-- figures: written by make bench -->", "<!-- end of figures -->"


def readme_table(results: Results, threads: int) -> str:
    """What a reader of the README wants to know: a few shapes, ours beside NumPy and PyTorch as users call it."""
    shapes = [((1024, 32000), "tokens"), ((8192, 1000), "images"), ((65536, 10), "few classes"), ((1, 10), "one call")]
    rows = []
    for shape, name in shapes:
        medians = results.get((shape, "float32", threads), {})
        for op, label, theirs in (
            ("loss", "loss", "loss"),
            ("grad", "loss + gradient", "grad"),
            ("in place", "… in place", "grad"),
            ("log_softmax", "log_softmax", "log_softmax"),
        ):
            if (op, WHO) in medians:
                ours = medians[op, WHO]
                others = [medians.get((theirs, who)) for who in ("NumPy", "PyTorch")]
                rows.append(
                    [f"{name}, {shape_name(shape)}", label, duration(ours), *("" if o is None else f"{o / ours:.1f}×" for o in others)]
                )
    return table(["float32", "work", "time", "NumPy takes", "PyTorch takes"], rows)


def write_readme(path: Path, results: Results, threads: int, heading: str) -> None:
    """Puts the table between the marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    if after:
        path.write_text(f"{before}{BEGIN}\n\n{heading}\n\n{readme_table(results, threads)}\n\n{END}{after}", encoding="utf-8")


def bandwidth_table(results: Results, threads: int) -> str:
    rows = []
    for (shape, dtype, t), medians in results.items():
        if dtype != "float32" or t != threads or ("read", "limit") not in medians:
            continue
        size = 4.0
        for n in shape:
            size *= n
        if size >= 2**24:
            moved = {"read": 1, "copy": 2, "stream": 2, "rewrite": 2}
            rows.append([shape_name(shape), *(f"{size * n / medians[kind, 'limit'] / 1e9:.1f}" for kind, n in moved.items())])
    return table(["array", "read", "copy", "copy past the cache", "rewrite"], rows)


def plots(results: Results, threads: int, folder: Path) -> list[str]:
    """One plot per family: elements per second over the shapes, on a log scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "crossent"
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    shapes = [shape for shape, _ in GRID if (shape, "float32", threads) in results]
    files = []
    for op, (title, own) in FAMILIES.items():
        lines: dict[str, list[float]] = {}
        for i, shape in enumerate(shapes):
            size = 1
            for n in shape:
                size *= n
            medians = results[shape, "float32", threads]
            keys = {label: (name, WHO) for label, name in own.items()}
            keys |= {who: (op, who) for o, who in medians if o == op and not who.startswith(WHO)}
            keys[f"limit ({LIMIT[op]})"] = (LIMIT[op], "limit")
            for label, key in keys.items():
                lines.setdefault(label, [float("nan")] * len(shapes))
                if key in medians:
                    lines[label][i] = size / medians[key] / 1e9
        figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
        for label, values in lines.items():
            style: dict[str, Any] = {"color": "0.6", "linestyle": "--"} if label.startswith("limit") else {"marker": "o"}
            width = 2.5 if label.startswith(WHO) else 1.2
            axes.plot(range(len(shapes)), values, label=label, linewidth=width, **style)
        axes.set_yscale("log")
        axes.set_xticks(range(len(shapes)), [shape_name(shape) for shape in shapes], rotation=30, ha="right")
        axes.set_ylabel("10⁹ logits per second")
        axes.set_title(f"{title}, float32, {threads} threads")
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend(fontsize=8, ncols=2)
        name = f"{op}.svg"
        figure.savefig(folder / name, metadata={"Date": None})
        plt.close(figure)
        files.append(name)
    return files


def write(path: Path, results: Results, verdicts: list[Verdict], threads: int, heading: list[str], failed: list[str]) -> None:
    pictures = plots(results, threads, path.with_suffix(""))
    method = (
        "All ways of a shape are called in turn, round by round, in one process, with a pause of 20 ms between two "
        "libraries, whose idle threads spin for a while, and after it a call that is not timed, which wakes those of the next. "
        "Times are medians, and what targets compare are medians of the ratios of a round. Every answer was compared with "
        "float64 before anything was timed. PyTorch stands for PyTorch as users call it; *PyTorch warm* is the same in a process "
        "whose allocator keeps its memory. A multiple above 1 means that crossent is faster. The memory limits are plain loops "
        "of the core over the same array."
    )
    text = [
        "# Benchmarks",
        "Written by `make bench`; do not edit. " + " ".join(heading),
        method,
        f"## Targets\n\n{summary(verdicts)}.\n\n"
        + table(["target", "shape", "value", "must", "stretch", "verdict"], (v.line() for v in verdicts)),
        "## Memory limits\n\n"
        f"GB/s, {threads} threads; copies and rewriting count the bytes read and written.\n\n" + bandwidth_table(results, threads),
        "## Plots\n\n" + "\n".join(f"![{name.removesuffix('.svg')}]({path.stem}/{name})" for name in pictures),
        "## Times\n\n" + grid_tables(results),
    ]
    if failed:
        text.append("## Not measured, or measured although inexact\n\n" + "\n".join(f"- {line}" for line in failed))
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
