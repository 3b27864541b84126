#!/usr/bin/env bash
# walnut-vmm beside QEMU on the same (emulated) KVM, in the lab: start, memory,
# exits, disk, network. Prints tables for docs/benchmarks.md.
#
#   bench/lab.sh [--runs N] [--only start|kernel|disk|net]
#
# Needs what scripts/build.sh leaves in out/.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")

cargo build --release --quiet -p walnut-bench -p walnut-initramfs
mkdir -p "$target/bench-lab"
cc -static -Os -Wall -s -o "$target/bench-lab/init" bench/guest/init.c
"$target/release/walnut-initramfs" --output "$target/bench-lab/initramfs" \
    init="$target/bench-lab/init"
exec tests/lab/lab --icount --timeout 3600 \
    "$target/release/walnut-bench-lab" --initramfs "$target/bench-lab/initramfs" "$@" </dev/null
