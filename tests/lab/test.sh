#!/usr/bin/env bash
# The tests that need a real KVM, in the lab: walnut-vmm with a test guest, then the
# product's whole end-to-end suite, which chooses walnut-vmm there by itself.
# Two labs side by side take half of the suite each.
#
#   tests/lab/test.sh               all
#   tests/lab/test.sh itself        the lab alone
#   tests/lab/test.sh vmm [OPTION…] walnut-vmm alone; options of its test programs
#   tests/lab/test.sh e2e [NAME…]   the end-to-end suite, or the tests so named
#   tests/lab/test.sh kill          processes killed under containerd, WALNUT_KILLS times
#                                   (default 30), drawn from WALNUT_SEED
set -Eeuo pipefail
cd "$(dirname "$0")/../.."

# The integration tests below a directory, or one by name, as cargo has just built them:
# with the packages and features of the Makefile, so that it has little to build.
programs() {
    local directory=$1 name names=()
    shift
    if [ $# = 0 ]; then
        set -- "$directory"/tests/*.rs
    fi
    for name; do
        name=${name##*/}
        names+=("--test=${name%.rs}")
    done
    cargo test --release --no-run --message-format=json --quiet --workspace \
        --features walnut-agent/guest-tests "${names[@]}" |
        sed -n "s|.*\"kind\":\[\"test\"\].*\"src_path\":\"$PWD/$directory/tests/.*\"executable\":\"\([^\"]*\)\".*|\1|p"
}

# A test program in a lab of its own.
in_lab() {
    local directory=$1 program=$2
    shift 2
    # shellcheck disable=SC2016 # expanded in the lab
    tests/lab/lab --timeout 2400 --env "WALNUT_TEST_CLONES=${WALNUT_TEST_CLONES:-24}" sh -c 'cd "$0" && exec "$@"' \
        "$directory" "$program" --test-threads=1 "$@" </dev/null
}

# The lab keeps what its help promises.
itself() {
    echo '==> the lab itself'
    local work status lab
    work=$(mktemp -d)
    fail() { printf 'the lab: %s\n' "$*" >&2; cat "$work/err" >&2; rm -rf "$work"; exit 1; }
    mkdir "$work/share"
    head -c 10000000 /dev/urandom >"$work/in"
    # shellcheck disable=SC2016 # expanded in the lab
    status=0
    tests/lab/lab --timeout 300 --share "$work/share" --env GREETING='two words' bash -c '
        cat
        echo "$GREETING" >"$0/back"
        touch /etc/only-here
        for module in dm_mod vhost_net vhost_vsock ipvlan macvtap vfio_pci; do
            modprobe $module || echo "no $module" >&2
        done
        ls /dev/kvm /dev/net/tun /dev/mapper/control >&2
        out/bin/walnut check >&2
        exit 7' "$work/share" <"$work/in" >"$work/out" 2>"$work/err" || status=$?
    [ $status = 7 ] || fail "code $status instead of 7"
    cmp "$work/in" "$work/out" || fail 'what went through it is not what came out'
    [ "$(cat "$work/share/back")" = 'two words' ] || fail 'no file came back'
    [ ! -e /etc/only-here ] || fail 'it wrote to this host'
    grep -q '^auto: vmm: KVM works' "$work/err" || fail 'its KVM does not work'
    ! grep -q '^no ' "$work/err" || fail 'modules are missing'

    status=0
    tests/lab/lab --timeout 2 sleep 1000 </dev/null >"$work/out" 2>"$work/err" || status=$?
    if [ $status != 125 ] || ! grep -q 'took longer than 2 s' "$work/err"; then
        fail "a time-out ended with code $status"
    fi
    tests/lab/lab sleep 1000 </dev/null >"$work/out" 2>"$work/err" &
    lab=$!
    until pgrep -f "walnut-lab.$lab[.]" >/dev/null; do sleep 0.1; done
    kill -KILL $lab
    wait $lab || true
    for _ in $(seq 100); do
        pgrep -f "walnut-lab.$lab[.]" >/dev/null || break
        sleep 0.1
    done
    ! pgrep -f "walnut-lab.$lab[.]" || fail 'it outlived a kill'
    rm -rf "$work"
}

# Each test program of the monitor and of its driver, two labs at a time.
vmm() {
    echo '==> walnut-vmm with guests of its own, in the lab'
    local logs program pids=() failed=0 all=()
    logs=$(mktemp -d)
    for program in $(programs crates/vmm); do
        all+=("crates/vmm $program --include-ignored")
    done
    for program in $(programs crates/machine); do
        all+=("crates/machine $program --ignored")
    done
    # Whoever is done takes the next.
    echo 0 >"$logs/next"
    # shellcheck disable=SC2016 # the inner shell's
    next() { flock "$logs/next" sh -c 'read -r n <"$0"; echo $((n + 1)) >"$0"; echo "$n"' "$logs/next"; }
    for _ in 0 1; do
        (
            ended=0
            while n=$(next) && [ "$n" -lt ${#all[@]} ]; do
                read -r -a words <<<"${all[$n]}"
                in_lab "${words[@]}" "$@" >"$logs/$n" 2>&1 || ended=1
                cat "$logs/$n"
            done
            exit $ended
        ) &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    rm -rf "$logs"
    return $failed
}

e2e() {
    echo '==> end-to-end tests on walnut-vmm, in the lab'
    local program logs shard pids=() failed=0
    program=$(programs tests e2e)
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

# containerd's files go into the lab's memory: its root is an overlay already.
kills() {
    echo '==> kills under containerd, on walnut-vmm, in the lab'
    local program
    program=$(programs tests containerd)
    # shellcheck disable=SC2016 # expanded in the lab
    tests/lab/lab --timeout 3600 --memory 8192 --env WALNUT_TEST_ROOT=/tmp/root \
        --env "WALNUT_KILLS=${WALNUT_KILLS:-30}" --env "WALNUT_SEED=${WALNUT_SEED:-$(date +%s)}" \
        --env "WALNUT_PODS=${WALNUT_PODS:-1}" sh -c 'cd tests && exec "$0" "$@"' \
        "$program" --ignored --nocapture hundreds_of_kills </dev/null
}

case ${1:-all} in
    all) itself && vmm && e2e ;;
    itself) itself ;;
    vmm) shift && vmm "$@" ;;
    e2e) shift && e2e "$@" ;;
    kill) kills ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
