"""Mutation testing: how many wrong kernels and batch operations the tests notice.

``python tools/mutants.py`` puts every EVERY-th possible mutant into a copy of the crate, all in one build and each behind a switch
(tools/mutants), and runs the Rust tests once per mutant; with ``--python`` those they do not notice go through the Python tests of what
they leave to it. It prints the mutants that no test noticed, and writes all of them to target/mutants/results.json.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "target" / "mutants"
CRATE = WORK / "crate"
PARTS = ("src", "tests", "benches", "examples", "build.rs", "Cargo.toml", "Cargo.lock", "README.md", "LICENSE")
# A build that is quick to make, and still quick enough to run.
ENVIRONMENT = {
    **os.environ,
    "CARGO_TARGET_DIR": str(WORK / "build"),
    "CARGO_PROFILE_DEV_OPT_LEVEL": "1",
    "CARGO_PROFILE_DEV_DEBUG": "0",
    "RUSTFLAGS": "-Awarnings",
}
# Every size threshold at its smallest: stores past the caches, computing again, threads.
SMALLEST = {"CROSSENT_TUNE": "stream_from=1,stream_columns_from=1,ask_from=1,recompute=2,threads_from=1"}
# Python tests of options and by-products, most of which the Rust tests know nothing of.
PYTHON_TESTS = ("options", "meaning", "scores", "topk", "kl", "by_products", "matrix")
SWITCH = re.compile(r"crate::mutant\((\d+)u32\)")
QUICK = 1.0


def instrument(every: int, excluded: set[int]) -> dict[int, tuple[str, str, str]]:
    """A fresh copy of the crate with its mutants."""
    shutil.rmtree(CRATE, ignore_errors=True)
    CRATE.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, CRATE / part)
        elif source.exists():
            shutil.copy(source, CRATE / part)
    tool = ["cargo", "run", "--release", "--quiet", "--locked", "--manifest-path", str(ROOT / "tools/mutants/Cargo.toml"), "--"]
    command = [*tool, str(CRATE), str(every), *map(str, sorted(excluded))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = {}
    for line in lines:
        number, file, at, what = line.split("\t")
        found[int(number)] = (file, at, what)
    return found


def near(file: Path, start: int, end: int) -> set[int]:
    """The mutants of some lines, or the last one before them."""
    lines = file.read_text().splitlines()
    inside = {int(number) for line in lines[start - 1 : end] for number in SWITCH.findall(line)}
    if inside:
        return inside
    before = SWITCH.findall("\n".join(lines[: start - 1]))
    return {int(before[-1])} if before else set()


def build() -> tuple[list[str], set[int]]:
    """The test programs, or the mutants that do not compile."""
    command = ["cargo", "test", "--locked", "--no-run", "--lib", "--test", "ops", "--test", "math", "--message-format", "json"]
    done = subprocess.run(command, cwd=CRATE, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    programs, wrong = [], set()
    for line in done.stdout.splitlines():
        message = json.loads(line) if line.startswith("{") else {}
        if message.get("executable"):
            programs.append(message["executable"])
        if message.get("reason") == "compiler-message" and message["message"]["level"] == "error":
            for span in message["message"]["spans"]:
                if span["is_primary"]:
                    wrong |= near(CRATE / span["file_name"], span["line_start"], span["line_end"])
    if done.returncode and not wrong:
        sys.exit(done.stderr[-3000:])
    return programs, wrong


def run(program: str, tests: list[str], mutant: int, limit: float, tune: dict[str, str] | None = None) -> tuple[bool, float]:
    """Whether the tests pass within so many seconds of processor time, and what they take of it."""

    bound = f"--cpu={int(limit)}"
    command = ["prlimit", bound, program, "--exact", "--test-threads", "1", "--quiet", *tests]
    environment = {**os.environ, "MUTANT": str(mutant), "RUST_BACKTRACE": "0", **(tune or {})}
    with subprocess.Popen(command, cwd=CRATE, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        # One that waits for ever takes no time.
        watch = threading.Timer(60 + 20 * limit, process.kill)
        watch.start()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.cancel()
    return process.returncode == 0, used.ru_utime + used.ru_stime


def suites(programs: list[str]) -> list[tuple[str, list[str], float]]:
    """Tests in the order to run them: all quick ones of a program together, then one by one; and how long they may take."""
    quick, slow = [], []
    for program in programs:
        listed = subprocess.run([program, "--list", "--format", "terse"], capture_output=True, text=True, check=True).stdout
        ignored = subprocess.run([program, "--list", "--format", "terse", "--ignored"], capture_output=True, text=True, check=True).stdout
        tests = [line.removesuffix(": test") for line in listed.splitlines() if line not in ignored.splitlines()]
        together: list[str] = []
        spent = 0.0
        for test in tests:
            passed, seconds = run(program, [test], 0, 600)
            if not passed:
                sys.exit(f"{test} fails without a mutant")
            if seconds < QUICK:
                together.append(test)
                spent += seconds
            else:
                slow.append((program, [test], seconds))
        if together:
            quick.append((program, together, spent))
    ordered = sorted(quick, key=lambda suite: suite[2]) + sorted(slow, key=lambda suite: suite[2])
    for _, tests, seconds in ordered:
        print(f"{seconds:6.1f} s  {tests[0] if len(tests) == 1 else f'{len(tests)} quick ones'}", flush=True)
    return [(program, tests, 5 + 5 * seconds) for program, tests, seconds in ordered]


def killer(order: list[tuple[str, list[str], float]], mutant: int) -> str | None:
    """The first tests that fail, as they are or with every threshold at its smallest."""
    for tune in ({}, SMALLEST):
        for program, tests, limit in order:
            if not run(program, tests, mutant, limit, tune)[0]:
                return tests[0] if len(tests) == 1 else f"{Path(program).name.split('-')[0]}: quick tests"
    return None


def package(python: str) -> Path:
    """The Python package with the mutants in it."""
    environment = {**ENVIRONMENT, "PYO3_PYTHON": python, "PYO3_BUILD_EXTENSION_MODULE": "1"}
    command = ["cargo", "build", "--locked", "--lib", "--features", "python"]
    subprocess.run(command, cwd=CRATE, env=environment, check=True, capture_output=True)
    folder = WORK / "package"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "crossent", folder / "crossent", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(WORK / "build" / "debug" / "libcrossent.so", folder / "crossent" / "_core.abi3.so")
    return folder


def python_killer(python: str, folder: Path, mutant: int) -> str | None:
    """The first Python test that fails."""
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in PYTHON_TESTS]
    command = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "MUTANT": str(mutant), "PYTHONPATH": str(folder)}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired:
        return "Python tests: no end"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return None if done.returncode == 0 else failed[1] if failed else "Python tests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=10, help="one of so many possible mutants (default 10)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--python", help="an interpreter with requirements/test.txt, for those that survive the Rust tests")
    parser.add_argument("--most", type=int, help="at most so many of them")
    parser.add_argument("--only", type=int, nargs="*", help="these mutants alone")
    options = parser.parse_args()

    excluded: set[int] = set()
    while True:
        mutants = instrument(options.every, excluded)
        programs, wrong = build()
        if not wrong:
            break
        print(f"do not compile: {sorted(wrong)}", flush=True)
        excluded |= wrong
    print(f"{len(mutants)} mutants, {len(excluded)} others do not compile", flush=True)
    order = suites(programs)
    print(f"{sum(len(tests) for _, tests, _ in order)} tests", flush=True)

    # In no order, so that a run that is broken off has seen a sample of all files.
    chosen = options.only or random.Random(1).sample(list(mutants), len(mutants))[: options.most]
    folder = package(options.python) if options.python else None

    def either(mutant: int) -> str | None:
        by = killer(order, mutant)
        return python_killer(options.python, folder, mutant) if by is None and folder else by

    results: dict[int, str | None] = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(either, mutant): mutant for mutant in chosen}
        for future in concurrent.futures.as_completed(futures):
            mutant = futures[future]
            results[mutant] = future.result()
            if results[mutant] is None:
                print("survives:", mutant, *mutants[mutant], flush=True)
            (WORK / "results.json").write_text(json.dumps([[k, *mutants[k], v] for k, v in sorted(results.items())], indent=1))

    files = collections.defaultdict(lambda: [0, 0])
    for mutant, by in results.items():
        files[mutants[mutant][0]][0] += by is not None
        files[mutants[mutant][0]][1] += 1
    for file, (killed, all_of) in sorted(files.items()):
        print(f"{file:32} {killed:4} of {all_of:4}")
    killed = sum(by is not None for by in results.values())
    print(f"{'all':32} {killed:4} of {len(results):4}, {100 * killed / len(results):.1f} %")


if __name__ == "__main__":
    main()
