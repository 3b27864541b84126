#!/usr/bin/env bash
# The tests that need a real KVM, in the lab: walnut-vmm with a test guest, then the
# product's whole end-to-end suite, which chooses walnut-vmm there by itself.
# Two labs side by side take half of the suite each.
#
#   tests/lab/test.sh               all
#   tests/lab/test.sh vmm           walnut-vmm alone
#   tests/lab/test.sh e2e [NAME…]   the end-to-end suite, or the tests so named
set -Eeuo pipefail
cd "$(dirname "$0")/../.."

# The integration tests of a package, as cargo has just built them.
programs() {
    cargo test --release --no-run --message-format=json --quiet -p "$1" --tests |
        sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p'
}

# A test program in a lab of its own.
in_lab() {
    local directory=$1 program=$2
    shift 2
    # shellcheck disable=SC2016 # expanded in the lab
    tests/lab/lab --timeout 2400 sh -c 'cd "$0" && exec "$@"' \
        "$directory" "$program" --test-threads=1 "$@" </dev/null
}

vmm() {
    echo '==> walnut-vmm with a guest of its own, in the lab'
    local program
    for program in $(programs walnut-vmm); do
        in_lab crates/vmm "$program" --include-ignored
    done
}

e2e() {
    echo '==> end-to-end tests on walnut-vmm, in the lab'
    local program logs shard pids=() failed=0
    program=$(programs walnut-tests)
    logs=$(mktemp -d)
    "$program" --list "$@" | sed -n 's/: test$//p' >"$logs/names"
    for shard in 0 1; do
        mapfile -t names < <(awk -v shard=$shard 'NR % 2 == shard' "$logs/names")
        [ ${#names[@]} -gt 0 ] || continue
        in_lab tests "$program" --exact "${names[@]}" >"$logs/$shard" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    cat "$logs"/[01]
    rm -rf "$logs"
    return $failed
}

case ${1:-all} in
    all) vmm && e2e ;;
    vmm) vmm ;;
    e2e) shift && e2e "$@" ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
