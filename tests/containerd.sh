#!/usr/bin/env bash
# The containerd suite against a newer containerd than this Debian's, from the package of
# a later Debian. Nothing of this host is replaced: the package is fetched by apt with
# directories of its own, and unpacked into the cache.
#
#   tests/containerd.sh 1.7|2 [OPTION…]   options of the test program, names among them
#   tests/containerd.sh --fetch 1.7|2     only fetch; prints the directory of the programs
#
# WALNUT_CACHE  where the package is kept, unpacked (default: ~/.cache/walnut); without
#               its directory containerd/VERSION the newest one is fetched
#
# The mirror is that of this machine's apt sources.
set -Eeuo pipefail
export LC_ALL=C
umask 022
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'containerd: %s\n' "$*" >&2; }
die() { printf 'containerd: error: %s\n' "$*" >&2; exit 1; }

only_fetch=
if [ "${1:-}" = --fetch ]; then
    only_fetch=yes
    shift
fi
version=${1:-}
case $version in
    1.7) suite=trixie ;;
    2) suite=sid ;;
    *) die "which one? tests/containerd.sh 1.7, or tests/containerd.sh 2" ;;
esac
shift

cache=${WALNUT_CACHE:-$HOME/.cache/walnut}/containerd
dir=$cache/$version
programs=$dir/usr/bin

# The first mirror of Debian's own packages in this machine's sources, by lists of
# packages in a directory. apt names what it has fetched, and nothing else.
mirror() {
    local release
    # shellcheck source=/dev/null
    release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    for release in $release stable oldstable; do
        # shellcheck disable=SC2016 # apt expands it
        apt-get -o "Dir::State::lists=$1" indextargets --format '$(REPO_URI)' \
            'Created-By: Packages' "Release: $release" 'Component: main'
    done | sed -n 1p
}

fetch() {
    local work=$1 uri
    mkdir -p "$work"/apt/{lists,own,cache/archives}/partial "$work/root"
    uri=$(mirror /var/lib/apt/lists)
    if [ -z "$uri" ]; then
        # A machine that was made from an image often has no lists.
        apt-get -q -o "Dir::State::lists=$work/apt/own" update
        uri=$(mirror "$work/apt/own")
    fi
    [ -n "$uri" ] || die "no apt source of this machine offers Debian's main component"
    cat >"$work/apt/later.sources" <<EOF
Types: deb
URIs: $uri
Suites: $suite
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
    # Read after this machine's own: what it does after an update is for its own lists.
    cat >"$work/apt/apt.conf" <<EOF
Dir::Etc::sourcelist "$work/apt/later.sources";
Dir::Etc::sourceparts "-";
Dir::State::lists "$work/apt/lists";
Dir::Cache "$work/apt/cache";
APT::Sandbox::User "root";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
EOF
    apt-get -q -c "$work/apt/apt.conf" update
    (cd "$work/apt" && apt-get -q -c apt.conf download containerd)
    dpkg -x "$work"/apt/containerd_*.deb "$work/root"
}

# What the programs say of themselves; nothing if they do not run here.
said() { "$1/containerd" --version 2>&1 | sed -n 's/^containerd [^ ]* \(v\?[0-9][^ ]*\).*/\1/p'; }

if [ ! -x "$programs/containerd" ]; then
    [ "$(id -u)" = 0 ] || die "this needs root, as the tests do"
    mkdir -p "$cache"
    exec 9>"$cache/lock"
    flock 9
    if [ ! -x "$programs/containerd" ]; then
        # The lock is ours, so what others left behind belongs to nobody.
        rm -rf --one-file-system "$cache"/.fetch-*
        work=$(mktemp -d "$cache/.fetch-XXXXXX")
        log=$cache/$version.log
        trap 'rm -rf --one-file-system "$work"' EXIT
        say "fetching the package of Debian $suite"
        (fetch "$work") >"$log" 2>&1 9>&- || {
            tail -n 25 "$log" >&2
            die "fetch containerd $version: failed; the reason is above, and in $log"
        }
        got=$(said "$work/root/usr/bin") || true
        case ${got#v} in
            "$version".*) ;;
            '') "$work/root/usr/bin/containerd" --version >&2 || true
                die "containerd of Debian $suite does not run on this one" ;;
            *) die "Debian $suite of this machine's mirror has containerd $got, not $version" ;;
        esac
        rm -rf --one-file-system "$dir"
        mv -T "$work/root" "$dir"
        rm -f "$log"
    fi
    exec 9>&-
fi
say "containerd $(said "$programs") in $programs"
if [ -n "$only_fetch" ]; then
    echo "$programs"
    exit 0
fi

tests/image/build.sh >/dev/null
export WALNUT_TEST_CONTAINERD=$programs
exec cargo test --release -p walnut-tests --test containerd -- \
    --test-threads="${TEST_THREADS:-2}" "$@"
