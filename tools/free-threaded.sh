#!/bin/sh
# Builds the wheel for a Python without a GIL and runs the Python tests on it, and a minute of everything at once from 24 threads.
#
#   [PYTHON=...] tools/free-threaded.sh [arguments of pytest]        PYTHON: python3.14t or later; by default the first on PATH
#
# Nothing is installed but into build/free-threaded.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
	for name in python3.15t python3.14t; do
		PYTHON=$(command -v $name) && break
	done
fi
if [ -z "${PYTHON:-}" ]; then
	echo "free-threaded: no python3.14t on PATH: 'uv python install 3.14t', or CPython's sources with ./configure --disable-gil; then PYTHON=..." >&2
	exit 1
fi
"$PYTHON" -c 'import sys, sysconfig
if not sysconfig.get_config_var("Py_GIL_DISABLED") or sys.version_info < (3, 14):
    sys.exit(f"free-threaded: {sys.executable} is {sys.version}, and a free-threaded 3.14 or later is needed")'

# What PyO3 is told by the Makefile: no libpython to link with.
export PYO3_BUILD_EXTENSION_MODULE=1 PYO3_PYTHON="$PYTHON" PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME PYTHON_GIL
here=build/free-threaded
rm -rf $here/venv $here/dist
mkdir -p $here
"$PYTHON" -m venv $here/venv
$here/venv/bin/python -m pip install --quiet --requirement requirements/build.txt --requirement requirements/test.txt
$here/venv/bin/maturin build --release --locked --out $here/dist --interpreter $here/venv/bin/python
$here/venv/bin/python -m pip install --quiet $here/dist/*.whl
$here/venv/bin/python -c 'import crossent, sys
print(f"free-threaded: {sys.version}")
assert not sys._is_gil_enabled(), "importing crossent has switched the GIL on"'
$here/venv/bin/pytest "$@"
CROSSENT_TORTURE_SECONDS="${CROSSENT_TORTURE_SECONDS:-60}" $here/venv/bin/pytest -s tests/test_torture.py -k everything_at_once
