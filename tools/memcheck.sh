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
# The pool of threads is kept for the life of the process, so leaks are not counted.
run="valgrind --quiet --error-exitcode=9 --leak-check=no"
programs=$(cargo test --locked --lib --test simd --test ops --no-run --message-format json |
	python3 -c 'import json, sys; print(*(p["executable"] for p in map(json.loads, sys.stdin) if p.get("executable")))')
for program in $programs; do
	$run "$program" --test-threads 1 "$@"
done
