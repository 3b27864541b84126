#!/usr/bin/env bash
# Debian's generic kernel with its modules, unpacked into a cache: prints where.
# Nothing is installed.
set -Eeuo pipefail
export LC_ALL=C

cache=${WALNUT_CACHE:-$HOME/.cache/walnut}/lab
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

# One that is there will do; remove the cache to have a newer one.
package=$(find "$cache" -maxdepth 1 -name 'linux-image-*' -type d -printf '%f\n' | sort -V | tail -n1)
[ -n "$package" ] || package=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n1)
[ -n "$package" ] || { echo 'lab: no package linux-image-amd64: apt-get update' >&2; exit 125; }
dir=$cache/$package
if [ ! -e "$dir/vmlinuz" ]; then
    echo "lab: fetching $package" >&2
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    chmod 0755 "$work"
    (cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "$package") >&2
    dpkg-deb -x "$work"/linux-image-*.deb "$work/tree"
    mv "$work"/tree/boot/vmlinuz-* "$work/tree/vmlinuz"
    depmod -b "$work/tree" "$(basename "$work"/tree/lib/modules/*)"
    rm -rf "$dir"
    mv "$work/tree" "$dir"
fi
echo "$dir"
