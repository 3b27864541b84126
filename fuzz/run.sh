#!/usr/bin/env bash
# Builds the fuzz targets with coverage and AddressSanitizer, and runs them one
# after the other: each for so many inputs, or for so many seconds.
#
#   fuzz/run.sh [--runs N | --seconds N | --build] [--seed N] [TARGET…]
#
# What is found lies in fuzz/artifacts/TARGET/, what is new in fuzz/corpus.d/TARGET/.
# Only the stable toolchain is needed: RUSTC_BOOTSTRAP lets it take the one flag
# that is not stable yet.
set -euo pipefail
cd "$(dirname "$0")"

limit=(-runs=20000)
seed=()
while [[ ${1-} == --* ]]; do
    case $1 in
        --runs) limit=("-runs=$2") && shift ;;
        --seconds) limit=("-max_total_time=$2") && shift ;;
        --build) limit=() ;;
        --seed) seed=("-seed=$2") && shift ;;
        *) echo "usage: fuzz/run.sh [--runs N | --seconds N | --build] [--seed N] [TARGET...]" >&2 && exit 2 ;;
    esac
    shift
done
targets=("$@")
if ((${#targets[@]} == 0)); then
    mapfile -t targets < <(cd fuzz_targets && ls -- *.rs | sed 's/\.rs$//')
fi

host=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=$PWD/target RUSTC_BOOTSTRAP=1
# What cargo-fuzz passes.
export RUSTFLAGS="--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module \
-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares \
-Cllvm-args=-simplifycfg-branch-fold-threshold=0 -Cforce-frame-pointers"
# A target triple keeps these flags from build scripts.
cargo build --release --locked --quiet --target "$host" "${targets[@]/#/--bin=}"
((${#limit[@]})) || exit 0

# A device is made for every input: what is freed is not kept for long.
export ASAN_OPTIONS=${ASAN_OPTIONS-detect_leaks=0:quarantine_size_mb=16}
for target in "${targets[@]}"; do
    mkdir -p "artifacts/$target" "corpus.d/$target"
    seeds=()
    [[ -d corpus/$target ]] && seeds=("corpus/$target")
    # A state and a record are longer than what devices and wires are given.
    case $target in
        checkpoint | takeover) length=4096 ;;
        *) length=1024 ;;
    esac
    echo "==> fuzz $target"
    log=$(mktemp)
    if ! "target/$host/release/$target" "${limit[@]}" "${seed[@]}" -max_len="$length" -len_control=0 -timeout=60 \
        -malloc_limit_mb=64 -rss_limit_mb=2048 -print_final_stats=1 \
        "-artifact_prefix=artifacts/$target/" "corpus.d/$target" "${seeds[@]}" >"$log" 2>&1; then
        tail -n 60 "$log" >&2
        echo "fuzz $target found something; the input lies in fuzz/artifacts/$target/" >&2
        exit 1
    fi
    grep -E '^(#[0-9]+[[:space:]]+DONE|Done )' "$log" || tail -n 3 "$log"
    rm -f "$log"
done
