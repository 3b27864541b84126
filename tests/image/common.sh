# shellcheck shell=bash
# What the scripts that make test images share; each sources it after it has set `script`
# (its own path) and `packages`, and then calls `begin`.
#
# Packages come from the apt sources of this machine. The result is an OCI layout with the
# tag $tag, kept below WALNUT_CACHE by a hash of the scripts.
set -Eeuo pipefail
export LC_ALL=C
umask 022

cache=${WALNUT_CACHE:-$HOME/.cache/walnut}/test-image
tag=latest

say() { printf 'image: %s\n' "$*" >&2; }
die() { printf 'image: error: %s\n' "$*" >&2; exit 1; }

ready() {
    say "ready: $entry/oci ($(du -sm "$entry/oci" | cut -f1) MB compressed, $(cat "$entry/size") MB unpacked)"
    echo "$entry/oci"
}

# Prints the layout and exits where there is one. Else sets `work`, a directory for what is
# in the making, and waits until nobody else makes an image.
begin() {
    missing=()
    need() { command -v "$1" >/dev/null || missing+=("$2"); }
    need mmdebstrap mmdebstrap; need umoci umoci; need skopeo skopeo; need flock util-linux
    need setfattr attr; need setcap libcap2-bin; need tar tar
    [ ${#missing[@]} = 0 ] || die "these packages are missing: apt-get install ${missing[*]}"
    [ "$(id -u)" = 0 ] || die "this needs root: the image has device nodes and files of many users"

    hash=$({ cat "${BASH_SOURCE[0]}" "$script"; umoci --version; } | sha256sum | cut -c1-32)
    entry=$cache/$hash
    if [ -e "$entry/oci/index.json" ]; then ready; exit 0; fi

    mkdir -p "$cache"
    exec 9>"$cache/lock"
    if ! flock -n 9; then
        say "another build is running; waiting for it"
        flock 9
    fi
    if [ -e "$entry/oci/index.json" ]; then ready; exit 0; fi

    # The lock is ours, so what other builds left behind belongs to nobody.
    rm -rf --one-file-system "$cache"/.build-*
    work=$(mktemp -d "$cache/.build-XXXXXX")
    log=$cache/$hash.log
    : >"$log"
    pid=
    trap finish EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    export SOURCE_DATE_EPOCH=1700000000
}

finish() {
    local code=$?
    trap - EXIT
    if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    fi
    rm -rf --one-file-system "$work"
    exit "$code"
}

# step NAME COMMAND...: runs it into the log, and shows that time passes.
step() {
    local name=$1 started=$SECONDS shown=0 elapsed
    shift
    say "$name"
    "$@" >>"$log" 2>&1 9>&- &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        elapsed=$((SECONDS - started))
        if [ -t 2 ]; then
            printf '\r\033[Kimage: %s, %d s' "$name" "$elapsed" >&2
        elif [ $((elapsed - shown)) -ge 30 ]; then
            shown=$elapsed
            say "$name, $elapsed s"
        fi
    done
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
    wait "$pid" || {
        pid=
        tail -n 25 "$log" >&2
        die "$name: failed; the whole log is $log"
    }
    pid=
}

# debian FILE [OPTION...]: Debian with the packages, as a layer. Options are mmdebstrap's.
debian() {
    local layer=$1 suite sources=() options=() file proxy
    shift
    # shellcheck source=/dev/null
    suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [ -s "$file" ] && grep -qE "^[^#]*\b$suite\b" "$file" && sources+=("$file")
    done
    [ ${#sources[@]} -gt 0 ] || die "no apt source of this machine offers $suite"
    eval "$(apt-config shell proxy Acquire::http::Proxy)"
    [ -z "${proxy:-}" ] || options+=(--aptopt="Acquire::http::Proxy \"$proxy\"")

    # Services do not start in an image; documentation is not read in one. The apt
    # sources name this machine's mirror, which is nobody else's business.
    mmdebstrap --mode=root --variant=minbase --format=tar \
        --include="$(IFS=,; echo "${packages[*]}")" \
        --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/lintian/*' \
        --essential-hook='printf "#!/bin/sh\nexit 101\n" >"$1/usr/sbin/policy-rc.d"; chmod 755 "$1/usr/sbin/policy-rc.d"' \
        --customize-hook='rm -f "$1/usr/sbin/policy-rc.d"' \
        --customize-hook='rm -rf "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/apt/apt.conf.d/99mmdebstrap' \
        --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/log/*.log "$1"/var/log/apt "$1"/var/cache/debconf/*-old' \
        --customize-hook='echo walnut-demo >"$1/etc/hostname"; : >"$1/etc/resolv.conf"' \
        "$@" "${options[@]}" "$suite" "$layer" "${sources[@]}"
}

# publish FILE...: puts the image, which is in $work/entry, in its place. The files are its
# layers.
publish() {
    umoci gc --layout "$work/entry/oci"
    echo $(($(cat "$@" | wc -c) / 1000000)) >"$work/entry/size"
    rm -rf "$entry"
    mv -T "$work/entry" "$entry"
}
