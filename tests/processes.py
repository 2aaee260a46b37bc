"""Scripts in interpreters of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

LINUX = sys.platform == "linux"
MIB = 1 << 20
linux = pytest.mark.skipif(not LINUX, reason="reads /proc")


def python(code, *, env=(), drop=(), timeout=360, args=()):
    """Runs a script in a fresh interpreter and returns what it printed; its warnings are errors unless it says otherwise."""
    unset = {"CROSSENT_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "CROSSENT_SIMD", "CROSSENT_CACHE_MB", *drop}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | dict(env)
    result = subprocess.run(
        [sys.executable, *args, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result
