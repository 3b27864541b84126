#!/usr/bin/env bash
# Boots the sandbox kernel under QEMU and checks, in the guest, what config.d/ promises.
#
#   guest/kernel/check.sh [VMLINUX]     (default: out/lib/walnut/vmlinux)
set -Eeuo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
kernel=${1:-${WALNUT_OUT:-$root/out}/lib/walnut/vmlinux}
tool=${CARGO_TARGET_DIR:-$root/target}/release/walnut-initramfs

fail() { printf 'kernel check: error: %s\n' "$*" >&2; exit 1; }
[ -e "$kernel" ] || fail "$kernel is missing: guest/kernel/build.sh"
[ -x "$tool" ] || fail "$tool is missing: cargo build --release -p walnut-initramfs"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gcc -Os -static -s -Wall -o "$work/check" "$here/check.c"
"$tool" --output "$work/initramfs" "init=$work/check"

# Under emulation the guest's TSC is the host's, which it cannot measure itself.
khz=$(awk '/^cpu MHz/ {printf "%d", $4 * 1000; exit}' /proc/cpuinfo)
timeout 60 qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none \
    -M microvm,acpi=off,pcie=off,usb=off,x-option-roms=off -accel tcg -cpu max -m 128M \
    -kernel "$kernel" -initrd "$work/initramfs" -serial stdio \
    -append "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable tsc_early_khz=$khz" \
    </dev/null | tr -d '\r' >"$work/output" || fail "QEMU did not end: $(tail -n 3 "$work/output")"
cat "$work/output"
grep -q '^CHECK-DONE$' "$work/output" || fail "the guest did not come to the end"
! grep -q '^FAIL' "$work/output" || fail "the kernel does not keep $(grep -c '^FAIL' "$work/output") promises (above)"
printf 'kernel check: %s promises kept\n' "$(grep -c '^ok' "$work/output")"
