#!/usr/bin/env bash
# Time to a container's first output with walnut-vmm, in the lab, in milliseconds of a
# clock that counts instructions: booted, from a template, each with a volume and without,
# from a pool. Prints a table for docs/benchmarks.md. Needs what scripts/build.sh leaves in out/.
#
#   bench/start-lab.sh [RUNS]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$(realpath -m "${CARGO_TARGET_DIR:-target}")/bench-start
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
tests/image/build.sh >/dev/null
image=$(tests/image/registry.sh start | tail -n 1)
WALNUT_ROOT=$root WALNUT_RUN=$run out/bin/walnut pull -q "$image" >/dev/null
# shellcheck disable=SC2016 # expanded in the lab
tests/lab/lab --icount --timeout 3000 bash -c '
    set -euo pipefail
    runs=$1 image=$3
    # In memory first: waits for the lab'\''s root are not what is measured.
    cp -r out/bin out/lib /tmp
    cp -r "$2" /tmp/root
    export PATH=/tmp/bin:$PATH WALNUT_ROOT=/tmp/root WALNUT_RUN=/tmp/run WALNUT_NETWORK=none
    # In an idle lab the clock leaps over what real waits take. What keeps it from that takes
    # nothing from anyone, whatever group they are in: groups of equal weight have equal shares.
    mkdir /sys/fs/cgroup/burner
    echo 1 >/sys/fs/cgroup/burner/cpu.idle
    (echo "$BASHPID" >/sys/fs/cgroup/burner/cgroup.procs; while :; do :; done) &
    # QEMU counts instructions in slices; where one ends soon after the lab'\''s KVM has given
    # its guest an interrupt, the guest gets that interrupt twice, whether it takes any or not,
    # and now and then loses something over it. Such a start stands for seconds: it is taken
    # again, and that is said.
    first() {
        local start end
        while :; do
            start=$(date +%s%N)
            end=$(timeout 4 walnut run --rm --pull never "$@" "$image" echo x |
                { read -r _ && date +%s%N; }) && break
            echo "start-lab: a guest lost an interrupt of the emulated host; once more" >&2
            walnut ps -aq | xargs -r walnut rm -f >/dev/null 2>&1
        done
        echo $((end - start))
    }
    pooled() {
        walnut pool set 1 >&2
        first
        walnut pool set 0 >&2
    }
    mkdir /tmp/volume
    walnut template create >&2
    for ((n = 0; n <= runs; n++)); do
        # The first round warms caches and is not counted.
        echo "$n booted $(first --no-template)"
        echo "$n template $(first)"
        echo "$n booted-with-volume $(first --no-template -v /tmp/volume:/data)"
        echo "$n template-with-volume $(first -v /tmp/volume:/data)"
        echo "$n pool $(pooled)"
    done' start-lab "${1:-3}" "$root" "$image" </dev/null |
    awk '$1 > 0 { of[$2] = of[$2] " " $3 }
         END {
             print "| start | ms, each run | of a boot |"
             print "|---|---|---|"
             names = "booted template pool booted-with-volume template-with-volume"
             for (n = split(names, name, " "); i < n; ) {
                 count = split(of[name[++i]], value, " ")
                 text = ""; sum = 0
                 for (j = 1; j <= count; j++) {
                     text = text sprintf(" %.1f", value[j] / 1e6)
                     sum += value[j]
                 }
                 if (name[i] ~ /^booted/) boot = sum
                 gsub("-", " ", name[i])
                 printf "| %s |%s | %.2f |\n", name[i], text, sum / boot
             }
         }'
