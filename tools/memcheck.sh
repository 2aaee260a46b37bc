#!/bin/sh
# The Rust tests of the core under valgrind's memcheck, at AVX2 and portably: valgrind knows no AVX-512. Fails at the first error.
#
#   tools/memcheck.sh [arguments of the test programs]        default: all but the tests that take hours there
set -eu
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
	# The last one: valgrind's fused multiply-add has the wrong sign of zero.
	for test in transforms_of_every_length losses_of_every by_products::every_length small_losses of_any_choice the_same_bits fused_operations; do
		set -- "$@" --skip "$test"
	done
fi
# The pool of threads is kept for the life of the process, so leaks are not counted. Cargo starts each test program through it.
CARGO_TARGET_RUNNER="valgrind --quiet --error-exitcode=9 --leak-check=no"
host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export "CARGO_TARGET_${host}_RUNNER=$CARGO_TARGET_RUNNER"
exec cargo test --locked --lib --test simd --test ops -- --test-threads 1 "$@"
