"""What the compiler made of the kernels' inner loops: their instructions, and what should not be among them.

``python tools/loops.py`` builds the library's example and prints, per kernel and instruction set, the innermost loops with vector
arithmetic: instructions, spills to the stack and reloads from it, those of them at an index (an array of accumulators, in a loop that
was to be unrolled), scalar float arithmetic, calls, and exits (bounds checks that were not folded into the loop's condition). Whatever
stands between the first and last instruction of a loop counts, also what is hardly ever run. ``--worst`` prints only the loops with
flaws. Needs objdump; ``--triple aarch64-unknown-linux-gnu`` a cross compiler too (RUSTC, OBJDUMP).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
FUNCTION = re.compile(r"^[0-9a-f]+ <<crossent::simd::(\w+)::\w+>::run::shim::<(.*)>>:$")
LINE = re.compile(r"^ *([0-9a-f]+):\s+(\S+)\s*(.*)$")
# Arithmetic on vectors of floats, and on single ones; jumps; what writes to the stack, and what reads from it.
VECTOR = re.compile(
    r"^(v(add|sub|mul|div|max|min|fn?m(add|sub)\d+|cvt\w+2?|sqrt|scalef|range|rndscale)p[sd] "
    r"|f(add|sub|mul|div|max\w*|min\w*|mla|mls|cvt\w+|sqrt) v\d+\.(4s|2d))"
)
SCALAR = re.compile(
    r"^(v?(add|sub|mul|div|max|min|fn?m(add|sub)\d+|sqrt)s[sd] |f(add|sub|mul|div|max\w*|min\w*|n?madd|n?msub|sqrt) [sd]\d+,)"
)
JUMP = re.compile(r"^(?:j\w+|b|b\.\w+|cbn?z|tbn?z) (?:[^<]*, )?([0-9a-f]+) <")
SPILL = re.compile(r"^((v?|k)mov\w* [^,]*\[rsp|st[rp] .*\[sp)")
RELOAD = re.compile(r"^(?!(v?|k)mov\w* [^,]*\[rsp|st[rp] ).*\[r?sp")
INDEXED = re.compile(r"^v.*\[rsp\+r")


@dataclasses.dataclass
class Loop:
    instructions: int = 0
    vector: int = 0
    spills: int = 0
    reloads: int = 0
    indexed: int = 0
    scalar: int = 0
    calls: int = 0
    exits: int = 0

    @property
    def flaws(self) -> int:
        return self.spills + self.indexed + self.scalar + self.calls


def listing(folder: str | None, triple: str | None) -> list[str]:
    environment = {**os.environ, "RUSTFLAGS": "-Csymbol-mangling-version=v0", "CARGO_PROFILE_RELEASE_STRIP": "none"}
    environment["CARGO_TARGET_DIR"] = folder or str(ROOT / "target" / "loops")
    command = ["cargo", "build", "--release", "--locked", "--example", "case", "--message-format", "json"]
    command += ["--target", triple] if triple else []
    lines = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    artifacts = [json.loads(line) for line in lines if line.startswith("{")]
    binary = next(a["executable"] for a in reversed(artifacts) if a.get("target", {}).get("name") == "case" and a.get("executable"))
    command = [os.environ.get("OBJDUMP", "objdump"), "-d", "--no-show-raw-insn", "--demangle=rust", binary]
    command += [] if triple else ["-M", "intel"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def functions(lines: list[str]) -> Iterator[tuple[str, str, list[tuple[int, str]]]]:
    """Instruction set, kernel and instructions of every kernel."""
    level, kernel, code = "", "", []
    for line in [*lines, ""]:
        if line.endswith(">:") or not line:
            if code and level:
                yield level, kernel, code
            code = []
            if line:
                match = FUNCTION.match(line)
                level, kernel = (match[1], re.sub(r"(\w+::)+", "", match[2])) if match else ("", "")
        elif level and (match := LINE.match(line)):
            code.append((int(match[1], 16), f"{match[2]} {match[3]}"))


def loops(code: list[tuple[int, str]]) -> Iterator[Loop]:
    """The innermost ones."""
    ranges = []
    for address, text in code:
        jump = JUMP.match(text)
        if jump and code[0][0] <= int(jump[1], 16) <= address:
            ranges.append((int(jump[1], 16), address))
    for start, end in ranges:
        if any((a, b) != (start, end) and start <= a and b <= end for a, b in ranges):
            continue
        loop = Loop()
        for address, text in code:
            if not start <= address <= end:
                continue
            loop.instructions += 1
            loop.vector += bool(VECTOR.match(text))
            loop.scalar += bool(SCALAR.match(text))
            loop.calls += text.startswith(("call ", "bl "))
            loop.spills += bool(SPILL.match(text))
            loop.reloads += bool(RELOAD.match(text))
            loop.indexed += bool(INDEXED.match(text))
            jump = JUMP.match(text)
            loop.exits += bool(jump and not start <= int(jump[1], 16) <= end)
        yield loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worst", action="store_true", help="only loops with spills, scalar arithmetic or calls")
    parser.add_argument("--folder", help="where to build")
    parser.add_argument("--triple", help="of the machine to build for")
    options = parser.parse_args()
    found = [
        (kernel, level, loop)
        for level, kernel, code in functions(listing(options.folder, options.triple))
        for loop in loops(code)
        if loop.vector >= 3
    ]
    print("| kernel | instruction set | instructions | vector arithmetic | spills | reloads | indexed | scalar | calls | exits |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kernel, level, loop in sorted(found, key=lambda entry: (entry[0], entry[1], -entry[2].vector)):
        if loop.flaws or not options.worst:
            print(f"| {kernel} | {level} | " + " | ".join(map(str, dataclasses.astuple(loop))) + " |")
    for level in sorted({level for _, level, _ in found}):
        of = [loop for _, where, loop in found if where == level]
        kinds = [("spills", "spills"), ("indexed", "indexed accumulators"), ("scalar", "scalar arithmetic"), ("calls", "calls")]
        flaws = [f"{sum(getattr(loop, flaw) > 0 for loop in of)} with {what}" for flaw, what in kinds]
        print(f"\n{level}: {len(of)} innermost loops, {', '.join(flaws)}")


if __name__ == "__main__":
    main()
