#!/bin/sh
# The Rust tests that share work out, under ThreadSanitizer, with a standard library that is itself instrumented. Before them a race on
# purpose (tests/race.rs), which must be reported: a sanitizer that sees nothing would pass everything.
#
#   tools/tsan.sh [arguments of cargo test]        default: the unit tests, and of the operations those that are shared out
#
# Nothing is installed; what is missing is named. RUSTC, TSAN_RUNTIME and CARGO_TARGET_DIR are respected.
set -eu
cd "$(dirname "$0")/.."

# The first compiler that has the sources of the standard library.
has_source() {
	root=$("$1" --print sysroot 2>/dev/null) && [ -f "$root/lib/rustlib/src/rust/library/Cargo.lock" ]
}
rustc=
if [ -n "${RUSTC:-}" ]; then
	if has_source "$RUSTC"; then rustc=$RUSTC; fi
else
	IFS=:
	for dir in $PATH; do
		if [ -x "$dir/rustc" ] && has_source "$dir/rustc"; then
			rustc=$dir/rustc
			break
		fi
	done
	unset IFS
fi

missing=
[ -n "$rustc" ] || missing="$missing
  the sources of the standard library: 'rustup component add rust-src', or on Debian a second compiler with them: rustc-web and rust-web-src"

# The compiler's own runtime if it brings one; otherwise that of another, which must not be older than LLVM 15.
runtime=${TSAN_RUNTIME:-}
flags=-Zsanitizer=thread
if [ -z "$runtime" ] && [ -n "$rustc" ] && ! ls "$("$rustc" --print target-libdir)"/librustc-*_rt.tsan.a >/dev/null 2>&1; then
	runtime=$(ls "$(rustc --print target-libdir)"/librustc-*_rt.tsan.a 2>/dev/null | head -n 1)
	[ -n "$runtime" ] || missing="$missing
  the sanitizer's runtime, which $rustc comes without: TSAN_RUNTIME=.../librustc-stable_rt.tsan.a of a rustup toolchain"
fi
if [ -n "$runtime" ]; then
	# GNU ld does not find the versioned symbols that the runtime names.
	command -v ld.lld >/dev/null || missing="$missing
  a linker that can take a foreign runtime, ld.lld: on Debian the package lld"
fi
if [ -n "$missing" ]; then
	echo "tsan: cannot run, for want of:$missing" >&2
	exit 1
fi

host=$("$rustc" -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target/tsan}"
mkdir -p "$CARGO_TARGET_DIR"
if [ -n "$runtime" ]; then
	# Into programs only, and what the runtime needs after it.
	linker=$(cd "$CARGO_TARGET_DIR" && pwd)/linker
	cat > "$linker" <<-END
		#!/bin/sh
		case " \$* " in *" -shared "*) exec cc -fuse-ld=lld "\$@" ;; esac
		exec cc -fuse-ld=lld "\$@" -Wl,--whole-archive '$runtime' -Wl,--no-whole-archive -lm -lpthread -ldl -lrt -lc
	END
	chmod +x "$linker"
	flags="$flags -Zexternal-clangrt -Clinker=$linker"
fi
# The flags are not stable; the compiler is.
export RUSTC_BOOTSTRAP=1 RUSTC="$rustc" RUSTFLAGS="$flags"
# With the binding's feature, for its result memory; no test calls Python.
export PYO3_BUILD_EXTENSION_MODULE=1
# Every size threshold at its smallest: threads for arrays of any size.
export CROSSENT_TEST_THIN="${CROSSENT_TEST_THIN:-1}"
export CROSSENT_TUNE="${CROSSENT_TUNE:-threads_from=1,stream_from=1,stream_columns_from=1,ask_from=1,recompute=2}"
export TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1${TSAN_OPTIONS:+:$TSAN_OPTIONS}"
echo "tsan: $("$rustc" --version), runtime ${runtime:-its own}"
suite() { cargo test --locked -Zbuild-std --target "$host" --features python "$@"; }

log=$CARGO_TARGET_DIR/control.log
suite --test race --no-run
if suite --test race > "$log" 2>&1 || ! grep -q 'WARNING: ThreadSanitizer: data race' "$log"; then
	cat "$log"
	echo "tsan: the race on purpose was not reported, so nothing that passes here means anything" >&2
	exit 1
fi
echo "tsan: the race on purpose is reported: $(sed -n 's/^SUMMARY: //p' "$log" | head -n 1)"

if [ $# -gt 0 ]; then
	suite "$@"
else
	suite --lib
	suite --test ops
fi
