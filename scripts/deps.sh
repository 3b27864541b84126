#!/usr/bin/env bash
# Installs the Debian packages that building, testing and benchmarking need, and
# that are not there yet. Does nothing, quickly, when all are.
set -euo pipefail

packages=(
    # building
    build-essential pkg-config libseccomp-dev
    linux-source flex bison libelf-dev bc xz-utils kmod cpio
    # running
    qemu-system-x86
    # the test image, and what serves it
    mmdebstrap umoci skopeo docker-registry
    # tests and benchmarks
    erofs-utils attr crun runsc busybox-static util-linux procps strace qemu-system-common
    containerd podman docker.io containernetworking-plugins iptables aardvark-dns iproute2
    protobuf-compiler
)

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true)
    [[ $status == ii* ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    exit 0
fi
if ((EUID != 0)); then
    echo "These Debian packages are missing; install them as root and try again:" >&2
    echo "    apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
fi
echo "Installing: ${missing[*]}"
log=$(mktemp)
policy=/usr/sbin/policy-rc.d
own_policy=
trap 'rm -f "$log" ${own_policy:+"$policy"}' EXIT
export DEBIAN_FRONTEND=noninteractive
# No package here may start a service of its own: Debian's way to say so.
if [[ ! -e $policy ]]; then
    own_policy=yes
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 0755 "$policy"
fi
install() { apt-get install -y --no-install-recommends "${missing[@]}"; }
if ! { apt-get update && install; } >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    echo "Installing the packages failed; the reason is above." >&2
    exit 1
fi
