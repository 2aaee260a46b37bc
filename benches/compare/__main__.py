"""crossent beside its peers and beside the memory's limits: ``make bench``, ``make bench-quick``, or ``python benches/compare --help``."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import by_products
import limits
import numpy as np
import ours
import peers
import report
import worker
from cases import DTYPES, GRID, QUICK, Case, shape_name
from targets import HUGE, Results, judge, summary
from timing import measure

import crossent as ce

ROOT = Path(__file__).parent.parent.parent


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    caches = [
        f"L{(index / 'level').read_text().strip()} {(index / 'size').read_text().strip()}"
        for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
        if (index / "type").read_text().strip() != "Instruction"
    ]
    return f"{model}, {os.cpu_count()} CPUs, {', '.join(caches)}, {platform.system()} {platform.release()}"


def load() -> str:
    return " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches/compare", description="crossent beside its peers and the memory's limits")
    parser.add_argument("--quick", action="store_true", help="few shapes, float32, all threads, NumPy and PyTorch only; printed only")
    parser.add_argument("--threads", type=int, nargs="*", help="thread counts (default: 1 and all this process may use)")
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, help="element types (default: all)")
    parser.add_argument("--shapes", nargs="*", help="shapes of the grid, as 1024x32000 (default: all)")
    parser.add_argument("--peers", nargs="*", choices=[name for name, _, _ in peers.PEERS], help="libraries (default: all)")
    parser.add_argument("--budget", type=float, help="seconds per shape, type and thread count (default 12, quick 6)")
    parser.add_argument("--no-write", action="store_true", help="print only, leave docs/benchmarks.md alone")
    parser.add_argument("--page", default="benchmarks", help="page of docs/ to write; another one leaves the README's table alone")
    parser.add_argument("--by-products", action="store_true", help="scores, top-k and KL beside PyTorch instead; printed only")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.worker:
        worker.main(*args.worker)
        return 0
    if args.by_products:
        by_products.main(max(args.threads or [ce.get_num_threads()]))
        return 0
    started = time.monotonic()
    most = ce.get_num_threads()
    thread_counts = args.threads or ([most] if args.quick else sorted({1, most}, reverse=True))
    grid = [entry for entry in (QUICK if args.quick else GRID) if not args.shapes or shape_name(entry[0]) in args.shapes]
    dtypes = args.dtypes or (["float32"] if args.quick else DTYPES)
    budget = args.budget or (6.0 if args.quick else 12.0)
    makers, versions, absent = peers.available(args.peers or (["NumPy", "PyTorch"] if args.quick else None))

    numbers = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    command = shlex.join(["python", "benches/compare", *sys.argv[1:]])
    heading = [
        f"Command: `{command}`, {dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}.",
        f"Machine: {machine()}.",
        f"Python {platform.python_version()}, crossent {ce.__version__} ({ce.simd_level()}), {numbers}.",
        f"Load at the start: {load()}.",
    ]
    print("\n".join(heading))
    for line in absent:
        print(f"absent: {line}")

    results: Results = {}
    failures: dict[str, None] = dict.fromkeys(absent)
    for threads in thread_counts:
        ce.set_num_threads(threads)
        for dtype in dtypes:
            for shape, axis in grid:
                case = Case(shape, axis, dtype)
                place, scratch = np.zeros_like(case.x), np.zeros_like(case.x)
                ways = ours.our_ways(case, place)
                if case.x.nbytes >= 2**20:
                    ways += limits.limit_ways(case.x, scratch)
                if dtype == "float32" and threads == most:
                    if shape in [(8192, 1000), (1024, 32000)]:
                        ways += ours.layout_ways(case, place) + ours.ignored_ways(case, place)
                    if shape == (1024, 32000) and not args.quick:
                        ways += ours.option_ways(case, place) + by_products.ways(case.x, case.y, threads)
                    if shape in HUGE and ce.simd_level() != "avx2" and "avx2" in ce.simd_levels():
                        ways += ours.level_ways(case, place, "avx2")
                for name, maker in makers.items():
                    try:
                        ways += maker(case, threads)
                    except Exception as error:
                        failures[f"{name}: {type(error).__name__}: {str(error)[:200]}"] = None
                medians, failed = measure(case, ways, budget)
                for (op, who), reason in failed.items():
                    failures[f"{who} {op} on {case.name} {dtype}: {reason}"] = None
                if "PyTorch" in makers and dtype == "float32" and case.classes >= 32000 and sys.platform == "linux":
                    try:
                        medians |= worker.warm_torch(shape, threads, budget / 2)
                    except RuntimeError as error:
                        failures[f"PyTorch warm on {case.name}: {error}"] = None
                results[shape, dtype, threads] = medians
                del ways
                line = ", ".join(
                    f"{op} {report.duration(medians[op, ours.WHO])}" for op in ("loss", "grad", "out", "in place", "log_softmax")
                )
                rivals = {
                    who: seconds / medians["grad", ours.WHO] for (op, who), seconds in medians.items() if op == "grad" and who in makers
                }
                against = ", ".join(f"{who} {times:.1f}x" for who, times in rivals.items())
                print(f"{case.name:>13} {dtype:<8} {threads} threads: {line}; loss + gradient: {against}", flush=True)
    ce.set_num_threads(most)

    memory = {}
    if not args.shapes and sys.platform == "linux":
        for call in ("loss", "in place", "new array"):
            try:
                memory[call] = worker.memory((1024, 32000), call)
            except RuntimeError as error:
                failures[f"extra memory, {call}: {error}"] = None

    verdicts = judge(results, max(thread_counts), memory)
    print(f"\n{'value':>8}  {'must':<7} {'stretch':<7} {'shape':>13}  target")
    for verdict in verdicts:
        what, where, value, must, stretch, word = verdict.line()
        print(f"{value:>8}  {must:<7} {stretch:<7} {where:>13}  {what}: {word}")
    for line in failures:
        print(f"note: {line}")
    heading.append(f"Load at the end: {load()}.")
    print(f"\n{summary(verdicts)}; {time.monotonic() - started:.0f} s; load {load()}")
    if not args.quick and not args.no_write:
        path = ROOT / "docs" / f"{args.page}.md"
        path.parent.mkdir(exist_ok=True)
        report.write(path, results, verdicts, max(thread_counts), heading, list(failures))
        print(f"written: {path.relative_to(ROOT)}")
        if not args.shapes and "float32" in dtypes and args.page == "benchmarks":
            about = f"{machine()}; {max(thread_counts)} threads; {numbers}; {dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}."
            report.write_readme(ROOT / "README.md", results, max(thread_counts), about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
