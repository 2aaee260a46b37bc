# One target per habit; `make help` lists them. Needs Rust, Python with venv, and make; everything else is installed into .venv-* here.
#
# Nothing is done twice: a digest file per input set is rewritten only when its contents change, so that edited, added, removed and
# checked-out files, another compiler and another Python all lead to a rebuild, and nothing else does.

PYTHON ?= python3
CARGO ?= cargo
# Arguments handed on: make test ARGS="-k fork", make bench ARGS="--threads 1".
ARGS ?=

SHELL := /bin/sh
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

# A PYTHONPATH from outside would let the source tree shadow the installed wheel; user site packages could change versions.
unexport PYTHONPATH
unexport PYTHONHOME
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYO3_PYTHON := $(PYTHON)
# Otherwise test programs with the binding in them would need a libpython to link with, which many Pythons do not bring.
export PYO3_BUILD_EXTENSION_MODULE := 1

WHEEL_INPUTS := build.rs Cargo.toml Cargo.lock pyproject.toml README.md LICENSE src python/crossent
BUILD := build

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-26s %s\n", $$1, $$2 }'

.PHONY: demo
demo: .venv-demo/.wheel ## install the wheel beside scikit-learn and run the demonstration
	.venv-demo/bin/python demo/demo.py $(ARGS)

.PHONY: test
test: .venv-test/.wheel ## install the wheel and run the Python tests on it
	.venv-test/bin/python -c 'import crossent, sys; sys.exit(None if "site-packages" in crossent.__file__ else crossent.__file__ + " is not the installed wheel")'
	.venv-test/bin/pytest $(ARGS)

.PHONY: test-levels
test-levels: .venv-test/.wheel ## the Rust tests at every instruction set, NEON emulated where there is an emulator, and the Python tests once per set of this machine
	cargo test --locked
	if command -v $${CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER:-qemu-aarch64} >/dev/null; then tools/test-neon.sh; \
	else echo "no emulator: NEON is left out, see make test-neon"; fi
	for level in $$(.venv-test/bin/python -c 'import crossent; print(*crossent.simd_levels())'); do \
		echo "==> $$level"; CROSSENT_SIMD=$$level .venv-test/bin/pytest $(ARGS) || exit 1; \
	done

.PHONY: test-free-threaded
test-free-threaded: ## the Python tests on a Python without a GIL, 3.14t or later, and a minute of everything at once
	PYTHON="$(if $(filter file,$(origin PYTHON)),,$(PYTHON))" tools/free-threaded.sh $(ARGS)

.PHONY: test-paths
test-paths: .venv-test/.wheel ## the Python tests with every size threshold at its smallest
	CROSSENT_TUNE="stream_from=1,stream_columns_from=1,ask_from=1,recompute=2,threads_from=1" .venv-test/bin/pytest $(ARGS)

.PHONY: bench
bench: .venv-bench/.wheel .venv-bench/.torch ## measure against the peers and the memory, write docs/benchmarks.md and its plots
	.venv-bench/bin/python benches/compare $(ARGS)

.PHONY: bench-quick
bench-quick: .venv-bench/.wheel .venv-bench/.torch ## the same on a few shapes, printed only, in under two minutes
	.venv-bench/bin/python benches/compare --quick $(ARGS)

.PHONY: accuracy
accuracy: .venv-bench/.wheel .venv-bench/.torch ## errors in ULP beside the peers, write docs/accuracy.md; fails where a bound does not hold
	.venv-bench/bin/python benches/accuracy/main.py $(ARGS)

.PHONY: bench-core
bench-core: ## criterion on the Rust core: every level and shape (no Python)
	$(CARGO) bench $(if $(ARGS),-- $(ARGS))

.PHONY: counts
counts: ## count the instructions of fixed calls (valgrind) and write benches/instructions.json
	$(PYTHON) tools/count.py

.PHONY: check-counts
check-counts: ## compare the instruction counts with that file, within 2 %
	$(PYTHON) tools/count.py --check

.PHONY: check
check: .venv-check/.wheel ## formatting, lints, types, stubs, Rust tests
	./.ci/stage "cargo fmt" $(CARGO) fmt --check
	./.ci/stage "cargo fmt, fuzz targets" $(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	./.ci/stage "cargo fmt, mutants" $(CARGO) fmt --manifest-path tools/mutants/Cargo.toml --check
	./.ci/stage "cargo clippy" $(CARGO) clippy --locked --all-targets -- -D warnings
	./.ci/stage "cargo clippy, all features" $(CARGO) clippy --locked --all-targets --all-features -- -D warnings
	./.ci/stage "ruff check" .venv-check/bin/ruff check
	./.ci/stage "ruff format" .venv-check/bin/ruff format --check
	./.ci/stage "mypy" .venv-check/bin/mypy
	./.ci/stage "stubtest" .venv-check/bin/python -m mypy.stubtest crossent --allowlist .ci/stubtest-allow
	./.ci/stage "cargo test" $(CARGO) test --locked
	./.ci/stage "cargo test, all features" $(CARGO) test --locked --all-features
	./.ci/stage "instruction counts" $(PYTHON) tools/count.py --check

.PHONY: deny
deny: ## licences, duplicates, sources and advisories of the dependencies (cargo-deny); without a network: ARGS="licenses bans sources"
	$(CARGO) deny --locked check $(ARGS)

.PHONY: test-neon
test-neon: ## the Rust tests on NEON, emulated on other machines, or ARGS="--test simd" of them
	tools/test-neon.sh $(ARGS)

.PHONY: fuzz
fuzz: ## fuzz the core with libFuzzer, 3.4 million executions per target or ARGS of them (cargo-fuzz)
	tools/fuzz.sh $(ARGS)

.PHONY: fuzz-python
fuzz-python: .venv-test/.wheel ## any call with any arguments through the wheel, 100000 of them or ARGS
	CROSSENT_EXAMPLES=$(if $(ARGS),$(ARGS),100000) .venv-test/bin/pytest tests/test_any_arguments.py

.PHONY: asan
asan: ## the Rust tests under AddressSanitizer, or ARGS="--test ops" of them
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0 CARGO_TARGET_DIR=target/asan \
		$(CARGO) test --locked --target "$$(rustc -vV | sed -n 's/^host: //p')" $(if $(ARGS),$(ARGS),--lib --tests)

.PHONY: tsan
tsan: ## the Rust tests under ThreadSanitizer with a standard library built for it, or ARGS="--lib" of them: minutes
	tools/tsan.sh $(ARGS)

.PHONY: memcheck
memcheck: ## the Rust tests of the core under valgrind, which has AVX2 but not AVX-512: minutes
	tools/memcheck.sh $(ARGS)

.PHONY: mutants
mutants: ## mutation testing of the kernels and batch operations, ARGS="--every 9"; half an hour or more
	$(PYTHON) tools/mutants.py $(ARGS)

.PHONY: loops
loops: ## the kernels' inner loops as the compiler made them: instructions, spills, scalar arithmetic (objdump)
	$(PYTHON) tools/loops.py $(ARGS)

.PHONY: format
format: .venv-check/.ready ## rewrite the sources in the house format
	$(CARGO) fmt
	.venv-check/bin/ruff check --fix
	.venv-check/bin/ruff format

.PHONY: wheel
wheel: $(BUILD)/wheel ## build the release wheel into dist/
	@ls -l dist/*.whl

.PHONY: clean
clean: ## remove everything that the other targets made
	rm -rf .venv-build .venv-test .venv-demo .venv-bench .venv-check $(BUILD) dist target .pytest_cache .mypy_cache .ruff_cache .hypothesis

# --- the wheel ---------------------------------------------------------------------------------------------------------------------

# Replaces $@ by $@.new only if they differ: whoever depends on it is rebuilt only then.
keep_if_same = if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

.PHONY: FORCE
FORCE:

$(BUILD)/python: FORCE
	@mkdir -p $(BUILD)
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or later is needed: make PYTHON=..."; print(sys.executable, sys.version)' > $@.new
	@$(keep_if_same)

$(BUILD)/sources: FORCE
	@mkdir -p $(BUILD)
	@find $(WHEEL_INPUTS) -type f ! -name '*.pyc' ! -name '*.so' ! -name '.*' | LC_ALL=C sort | xargs cksum > $@.new
	@rustc -V >> $@.new
	@$(keep_if_same)

# The file names the wheel of the last build; dist/ holds that one only.
$(BUILD)/wheel: $(BUILD)/sources .venv-build/.ready
	rm -rf dist
	.venv-build/bin/maturin build --release --locked --compression-level 9 --out dist --interpreter .venv-build/bin/python
	@ls dist/*.whl > $@

# --- environments: .ready has the pinned requirements, .wheel has crossent on top ----------------------------------------------------

.venv-%/.ready: requirements/%.txt $(BUILD)/python
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --requirement requirements/$*.txt
	@touch $@

.venv-%/.wheel: .venv-%/.ready $(BUILD)/wheel
	.venv-$*/bin/python -m pip uninstall -qq --yes crossent
	.venv-$*/bin/python -m pip install --quiet "$$(cat $(BUILD)/wheel)"
	@touch $@

# PyTorch is a peer, not a need: where it cannot be installed its columns stay empty, and the next run tries again.
.venv-bench/.torch: requirements/bench-torch.txt .venv-bench/.ready
	if .venv-bench/bin/python -m pip install --quiet --requirement requirements/bench-torch.txt; then touch $@; \
	else echo "PyTorch could not be installed; the comparison goes on without it"; fi

.PRECIOUS: .venv-%/.ready .venv-%/.wheel
