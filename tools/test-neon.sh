#!/bin/sh
# Runs the Rust tests on the NEON level, on any Linux machine: cross-compiled, and emulated by qemu unless the machine is an Arm one.
#
#   tools/test-neon.sh [arguments of cargo test]        default: --lib --test simd --test math --test ops
#
# Emulated, the operations are thinned (CROSSENT_TEST_THIN, see docs/testing.md), or they would take hours; CROSSENT_TEST_THIN= runs all.
# Nothing is installed; what is missing is named. RUSTC, CARGO_TARGET_DIR and the CARGO_TARGET_AARCH64_... variables are respected.
set -eu

target=aarch64-unknown-linux-gnu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- --lib --test simd --test math --test ops

if [ "$(uname -m)" = aarch64 ]; then
    exec cargo test "$@"
fi

# The first compiler that has the standard library of the target.
has_std() {
    lib=$("$1" --print target-libdir --target $target 2>/dev/null) && ls "$lib"/libstd-* >/dev/null 2>&1
}
rustc=
if [ -n "${RUSTC:-}" ]; then
    if has_std "$RUSTC"; then rustc=$RUSTC; fi
else
    IFS=:
    for dir in $PATH; do
        if [ -x "$dir/rustc" ] && has_std "$dir/rustc"; then
            rustc=$dir/rustc
            break
        fi
    done
    unset IFS
fi

missing=
[ -n "$rustc" ] || missing="$missing
  the Rust standard library for $target: 'rustup target add $target', or on Debian a second compiler with it:
      dpkg --add-architecture arm64 && apt-get update && apt-get install --no-install-recommends rustc-web libstd-rust-web-dev:arm64"
linker=${CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER:-aarch64-linux-gnu-gcc}
command -v "$linker" >/dev/null || missing="$missing
  a linker, $linker: on Debian the packages gcc-aarch64-linux-gnu and libc6-dev-arm64-cross"
runner=${CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER:-qemu-aarch64}
command -v "${runner%% *}" >/dev/null || missing="$missing
  an emulator, $runner: on Debian the package qemu-user. A static one may need the arm64 libc (libc6:arm64)"
if [ -n "$missing" ]; then
    echo "test-neon: cannot run, for want of:$missing" >&2
    exit 1
fi

# Threads for arrays of any size: few of the thinned ones are large.
if [ -z "${CROSSENT_TEST_THIN-1}" ]; then unset CROSSENT_TEST_THIN; else export CROSSENT_TEST_THIN=1; fi
export CROSSENT_TUNE="${CROSSENT_TUNE-threads_from=1}"

# A target directory of its own: artefacts of two compilers do not mix. No -L for qemu: with the libc of the foreign architecture
# installed, that would mix two of them, and every start of a thread would hang.
echo "test-neon: $("$rustc" --version), $runner"
RUSTC=$rustc \
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/neon} \
CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$linker \
CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=$runner \
    exec cargo test --target $target "$@"
