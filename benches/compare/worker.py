"""What needs a process of its own: PyTorch over a warm allocator, and the peak memory of a call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from ours import WHO, our_ways
from peers import torch_ways
from timing import measure

import crossent as ce

# Memory that was used once stays with the process: page faults, most of PyTorch's time at large C, are gone.
WARM = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"


def run_worker(kind: str, argument: object, environment: dict[str, str] | None = None) -> Any:
    here = str(Path(__file__).parent)
    command = [sys.executable, here, "--worker", kind, json.dumps(argument)]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def warm_torch(shape: tuple[int, ...], threads: int, budget: float) -> dict[tuple[str, str], float]:
    """Medians of PyTorch and of ours in the same process, with the allocator of `WARM`."""
    rows = run_worker("warm", [list(shape), threads, budget], {"GLIBC_TUNABLES": WARM})
    return {(op, who): seconds for op, who, seconds in rows}


def memory(shape: tuple[int, ...], call: str) -> float:
    """Peak extra memory of a call, as a multiple of the logits."""
    return float(run_worker("memory", [list(shape), call]))


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


def _worker_memory(shape: tuple[int, ...], call: str) -> float:
    case = Case(shape, 1, "float32")
    ce.set_cache_limit(0)
    place = np.zeros_like(case.x)
    place[:] = case.x
    # Threads, scratch and code of a first call are not the call's own need.
    few = case.x[:64].copy()
    ce.cross_entropy_with_grad(few, case.y[:64])
    ce.cross_entropy_with_grad(few, case.y[:64], out=few)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    if call == "loss":
        ce.cross_entropy(case.x, case.y)
    elif call == "in place":
        ce.cross_entropy_with_grad(place, case.y, out=place)
    else:
        ce.cross_entropy_with_grad(case.x, case.y)
    return (_peak() - before) / case.x.nbytes


def main(kind: str, argument: str) -> None:
    """Run a worker; its last line of output is the result."""
    given = json.loads(argument)
    if kind == "memory":
        print(json.dumps(_worker_memory(tuple(given[0]), given[1])))
        return
    shape, threads, budget = tuple(given[0]), given[1], given[2]
    case = Case(shape, 1, "float32")
    ce.set_num_threads(threads)
    ways = torch_ways(case, threads, "PyTorch warm") + our_ways(case, np.zeros_like(case.x))
    medians, failed = measure(case, ways, budget)
    if failed:
        raise RuntimeError(str(failed))
    print(json.dumps([[op, WHO + " beside warm" if who == WHO else who, seconds] for (op, who), seconds in medians.items()]))
