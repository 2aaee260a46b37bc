"""Instructions per call at AVX2, counted by valgrind: the same on every machine, so that a slower kernel shows where times are noise.

``python tools/count.py`` writes benches/instructions.json; ``--check`` compares with it and fails beyond 2 %. The counts belong to one
compiler: with another one (or without valgrind) there is nothing to compare, which is said and is no failure.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE = ROOT / "benches" / "instructions.json"
LEVEL = "avx2"
TOLERANCE = 0.02

CASES = [
    *(
        f"{operation} {shape} float32"
        for shape in ("64x32000", "256x2000", "512x1000", "4096x100")
        for operation in ("loss", "gradient", "log_softmax")
    ),
    *(f"smoothed {shape} float32" for shape in ("64x32000", "512x1000", "8192x10")),
    *(f"{operation} {shape} float32" for shape in ("8192x10", "8192x2", "1x10") for operation in ("loss", "gradient")),
    *(f"{operation} 64x32000 {dtype}" for dtype in ("bfloat16", "float16", "float64") for operation in ("loss", "gradient")),
    *(f"{operation} 1100x500F {dtype}" for dtype in ("float32", "float16", "float64") for operation in ("loss", "gradient")),
]


def output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def build() -> Path:
    """The example, and where cargo says it put it."""
    lines = output("cargo", "build", "--release", "--locked", "--example", "case", "--message-format", "json").splitlines()
    artifacts = [json.loads(line) for line in lines if line.startswith("{")]
    found = [a["executable"] for a in artifacts if a.get("executable") and a.get("target", {}).get("name") == "case"]
    return Path(found[-1])


def count(binary: Path, case: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind",
            "--tool=callgrind",
            "--collect-atstart=no",
            "--toggle-collect=*measured*",
            f"--callgrind-out-file={folder}/out",
            str(binary),
            LEVEL,
            *case.split(),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(re.search(r"Collected : (\d+)", done.stderr)[1])  # type: ignore[index]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    if shutil.which("valgrind") is None:
        print("valgrind is not installed: nothing counted")
        return 0
    compiler = output("rustc", "--version").strip()
    known = json.loads(FILE.read_text()) if FILE.exists() else {"compiler": None, "counts": {}}
    if check and known["compiler"] != compiler:
        print(f"counted with {known['compiler']}, this is {compiler}: nothing to compare")
        return 0
    binary = build()
    lacks = subprocess.run([str(binary), LEVEL, *CASES[0].split()], capture_output=True, text=True, check=False)
    if lacks.returncode:
        print(f"{lacks.stderr.strip()}: nothing counted")
        return 0
    counts = {}
    changed = 0
    for case in CASES:
        counts[case] = count(binary, case)
        before = known["counts"].get(case)
        change = "" if before is None else f"{counts[case] / before - 1:+8.2%}"
        print(f"{case:<32} {counts[case]:>12,} {change}", flush=True)
        changed += before is None or abs(counts[case] / before - 1) > TOLERANCE
    if not check:
        FILE.write_text(json.dumps({"compiler": compiler, "level": LEVEL, "counts": counts}, indent=1) + "\n")
        return 0
    if changed:
        print(f"{changed} of {len(CASES)} changed by more than {TOLERANCE:.0%}: if that is meant, run `make counts` and commit the file")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
