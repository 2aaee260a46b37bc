#!/bin/sh
# Fuzzes the core: every target of fuzz/ first under AddressSanitizer, then nine times as often without. One argument: executions per target.
# Needs `cargo install cargo-fuzz --locked` and a C++ compiler. What is found stands in fuzz/artifacts, and the run fails.
set -eu
cd "$(dirname "$0")/.."
runs="${1:-3400000}"
# The flags of sanitizers and coverage are not stable; the compiler is.
export RUSTC_BOOTSTRAP=1
# The pool of threads is kept for the life of the process.
export ASAN_OPTIONS="detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
log=build/fuzz.log
mkdir -p build

run() { # sanitizer executions tunables
	echo "==> sanitizer $1, $2 executions per target${3:+, $3}"
	for target in losses transforms by_products; do
		if ! CROSSENT_TUNE="$3" cargo fuzz run --sanitizer "$1" --no-trace-compares "$target" -- \
			-runs="$2" -max_len=512 -print_final_stats=1 > "$log" 2>&1; then
			tail -n 60 "$log"
			exit 1
		fi
		printf '%s: %s executions\n' "$target" "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")"
	done
}

run address $((runs / 20)) ""
# Every size threshold at its smallest: threads, stores past the caches and recomputing for arrays of any size.
run address $((runs / 20)) "stream_from=1,stream_columns_from=1,ask_from=1,recompute=2,threads_from=1"
run none $((runs / 10 * 9)) ""
