#!/usr/bin/env bash
# walnut-vmm beside QEMU on the same (emulated) KVM, same kernel, initramfs and
# image: where a start goes, and what the monitor costs beyond the guest's memory.
#
#   tests/lab/lab --icount --timeout 1200 bench/product.sh
#
# In the lab's --icount a nanosecond is an instruction or two of the emulated host:
# figures are for comparison with each other, and repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
export WALNUT_NETWORK=none WALNUT_ROOT=${WALNUT_ROOT:-$HOME/.cache/walnut/e2e} WALNUT_RUN=/run/walnut
export WALNUT_BOOT_TIMEOUT=300 WALNUT_LOG=debug
image=${1:-127.0.0.1:5055/walnut/demo:latest}
walnut=out/bin/walnut

echo '| driver | monitor started | agent ready | container created | monitor, PSS kB | guest memory, PSS kB | threads |'
echo '|---|---|---|---|---|---|---|'
# The first of each warms caches, and is not counted.
for driver in vmm qemu-kvm vmm qemu-kvm vmm qemu-kvm; do
    id=$($walnut run -d --driver "$driver" "$image" sleep infinity 2>/dev/null)
    log=$WALNUT_ROOT/containers/$id/shim.log
    at() { sed -n "s/.*sandbox start.*step=\"$1\" ms=\([0-9]*\).*/\1/p" "$log"; }
    monitor=$(pgrep -f '^[^ ]*(walnut-vmm|qemu-system)' | head -n1)
    memory=$(awk '
        # A mapping of 64 MiB or more is the guest, but for the reserve of the heap.
        /^[0-9a-f]+-/ { heap = $NF == "[heap]" }
        /^Size:/ { guest = $2 >= 65536 && !heap }
        /^Pss:/ { if (guest) theirs += $2; else own += $2 }
        END { print own " | " theirs }' "/proc/$monitor/smaps")
    threads=$(find "/proc/$monitor/task" -mindepth 1 -maxdepth 1 | wc -l)
    row="| $driver | $(at 'machine started') | $(at 'agent ready') | $(at 'container created') | $memory | $threads |"
    $walnut rm -f "$id" >/dev/null 2>&1
    case " ${seen:-} " in
        *" $driver "*) echo "$row" ;;
        *) seen="${seen:-} $driver" ;;
    esac
done
