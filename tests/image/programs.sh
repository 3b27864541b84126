#!/usr/bin/env bash
# Makes the image with the programs that are too large for every test's image, or that only
# few need: node, systemd with nginx as a service of its, and two static programs of Go's.
# Prints the path of its OCI layout.
#
#   tests/image/programs.sh
#
# WALNUT_CACHE  where the result is kept, by a hash of the scripts
#               (default: ~/.cache/walnut)
script=${BASH_SOURCE[0]}
packages=(nodejs systemd systemd-sysv dbus nginx-light gojq gosu)
# shellcheck source=common.sh
. "$(dirname "$script")/common.sh"
begin

# As installed, but for the page.
step "installing Debian with ${packages[*]}" debian "$work/base.tar" \
    --customize-hook='echo "<h1>Walnut</h1>" >"$1/var/www/html/index.html"' \
    --customize-hook='rm -f "$1"/var/www/html/index.nginx-debian.html'

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
        --config.cmd /sbin/init \
        --config.stopsignal SIGRTMIN+3 \
        --config.label org.opencontainers.image.title=walnut-programs \
        --config.label 'org.opencontainers.image.description=Debian with node, systemd and programs of Go'
    publish "$work/base.tar"
}
step "packing the image" pack
rm -f "$log"
ready
