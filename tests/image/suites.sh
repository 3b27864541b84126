#!/usr/bin/env bash
# Makes the image with programs and their own test suites: CPython, git, a C compiler,
# PostgreSQL, and nginx with a client that loads it. Prints the path of its OCI layout.
#
#   tests/image/suites.sh
#
# WALNUT_CACHE  where the result is kept, by a hash of the scripts
#               (default: ~/.cache/walnut)
script=${BASH_SOURCE[0]}
packages=(python3 libpython3.11-testsuite git gcc make libc6-dev bzip2 postgresql-15 nginx-light apache2-utils procps)
# shellcheck source=common.sh
. "$(dirname "$script")/common.sh"
begin

step "installing Debian with ${packages[*]}" debian "$work/base.tar"

pack() {
    local image=$work/entry/oci:$tag
    mkdir "$work/entry"
    umoci init --layout "$work/entry/oci"
    umoci new --image "$image"
    umoci raw add-layer --image "$image" --history.created_by 'Debian by mmdebstrap' "$work/base.tar"
    umoci config --image "$image" --no-history \
        --author 'the Walnut project' --os linux --architecture amd64 \
        --created 2023-11-14T22:13:20Z \
        --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        --config.cmd python3 \
        --config.label org.opencontainers.image.title=walnut-suites \
        --config.label 'org.opencontainers.image.description=Debian with test suites of programs'
    publish "$work/base.tar"
}
step "packing the image" pack
rm -f "$log"
ready
