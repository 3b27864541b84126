#!/usr/bin/env bash
# Boot, save and restore of a machine with the product's agent, in the lab: prints a
# table for docs/benchmarks.md. Needs what scripts/build.sh leaves in out/.
#
#   bench/restore.sh [RUNS]
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
cargo build --release --quiet -p walnut-machine --example restore
# In memory first: waits for the lab's root are not what is measured.
# shellcheck disable=SC2016 # expanded in the lab
exec tests/lab/lab --icount --timeout 1200 sh -c '
    cp -r "$0/out/lib/walnut" /tmp/walnut && cp "$1" /tmp/restore
    exec /tmp/restore /tmp/walnut/vmlinux /tmp/walnut/initramfs.cpio /tmp/walnut "$2"' \
    "$PWD" "$target/release/examples/restore" "${1:-3}" </dev/null
