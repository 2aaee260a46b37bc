"""The accuracy of crossent and its peers against exact values: ``make accuracy``. Ends with 1 if a promised bound does not hold."""

from __future__ import annotations

import argparse
import datetime as dt
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# The exact values are those of the tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import document
import libraries
import sums
import truth
from document import ROOT, WHO, Key, Stat, Stats
from families import DTYPES, ROWS, Array, Family, families
from levels import each_level

import crossent as ce

# What double-double may be off from mpmath, in ULP of the results.
TRUTH_BOUND = 1e-3
# A float64 sum of sums of blocks: a few roundings, whatever the number of rows.
SUM_BOUND = 2.0**-50


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


Peers = dict[str, Callable[[Array, Array], libraries.Results]]


class Excess(NamedTuple):
    """An error beyond the promise, and where."""

    ulps: float
    where: str


def measure(batch: list[Family], peers: Peers, stats: Stats, broken: dict[str, Excess]) -> None:
    """All families of one type and number of classes in one batch, so that compilers see one shape."""
    x, y = np.concatenate([family.x for family in batch]), np.concatenate([family.y for family in batch])
    dtype, classes = x.dtype, x.shape[1]
    results = [(name, "", compute(x, y)) for name, compute in peers.items()]
    for level in each_level():
        results += [(WHO, level, libraries.crossent(x, y)), (WHO, f"{level}, classes first", libraries.crossent_columns(x, y))]
    start = 0
    for family in batch:
        part = slice(start, start + len(family.y))
        start = part.stop
        wants = truth.in_parts(family)
        for who, level, got in results:
            for quantity, errors in truth.errors({name: value[part] for name, value in got.items()}, family.y, wants).items():
                for group in (family.name, classes):
                    stats[Key(dtype, quantity, group, who)].add(errors)
                if level and errors.size and errors.max() > truth.bound(quantity, dtype):
                    case = f"{dtype.name} {quantity}, {family.name}"
                    found = Excess(float(errors.max()), f"with {classes} classes on {level}, promised {truth.bound(quantity, dtype):.5g}")
                    broken[case] = max(found, broken.get(case, found))


def main() -> int:
    parser = argparse.ArgumentParser(prog="benches/accuracy", description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="leave docs/accuracy.md alone")
    parser.add_argument("--classes", type=int, nargs="*", choices=ROWS, default=list(ROWS), help="numbers of classes (default: all)")
    args = parser.parse_args()
    started = time.monotonic()
    peers, versions, absent = libraries.available()
    stats: Stats = defaultdict(Stat)
    excesses: dict[str, Excess] = {}
    truth_error = 0.0
    for dtype in DTYPES:
        for classes in args.classes:
            batch = list(families(dtype, classes))
            measure(batch, peers, stats, excesses)
            if classes <= 1000:
                truth_error = max(truth_error, *(truth.check(family, 1 if classes > 10 else 8) for family in batch))
            print(f"{dtype.name} {classes}: {time.monotonic() - started:.0f} s", flush=True)
    found = sums.deviations(list(DTYPES), list(peers))
    print(f"sums: {time.monotonic() - started:.0f} s; double-double is {truth_error:.1e} ULP from mpmath")

    broken = [f"{case}: {excess.ulps:.3g} ULP {excess.where}" for case, excess in excesses.items()]
    broken += [
        f"{d.dtype} mean and sum over {sums.ROWS} rows: relative errors {d.mean:.1e} and {d.sum:.1e}"
        for d in found
        if d.who == WHO and max(d.mean, d.sum) > SUM_BOUND
    ]
    if truth_error > TRUTH_BOUND:
        broken.append(f"the exact values themselves: {truth_error:.1e} ULP from mpmath")
    for line in (*absent, *broken):
        print(line)
    heading = [
        f"Command: `python benches/accuracy/main.py`, {dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}.",
        f"Processor: {processor()}; instruction sets: {', '.join(ce.simd_levels())}.",
        f"Python {platform.python_version()}, crossent {ce.__version__}, {', '.join(versions)}.",
        *(f"Not measured: {line}." for line in absent),
    ]
    scheme = (
        f"the first rows of every family up to 1000 classes were compared with mpmath's in this run: {truth_error:.0e} ULP apart at most"
    )
    if not args.no_write:
        document.write(ROOT / "docs" / "accuracy.md", heading, scheme, stats, [WHO, *peers], found, broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
