#!/usr/bin/env bash
# Makes the image that the end-to-end tests and the demo run: a Debian root file
# system with python3, nginx and redis, as an OCI layout. Prints the layout's path.
#
#   tests/image/build.sh
#
# Layer 1 is Debian as mmdebstrap makes it. Layer 2 holds one of each thing that a
# conversion can get wrong: whiteouts, hard links, extended attributes, a device node,
# setuid, odd times and names. Layer 3 replaces a directory by an opaque whiteout.
# README.md says what must be seen in a container.
#
# WALNUT_CACHE  where the result is kept, by a hash of the scripts
#               (default: ~/.cache/walnut)
script=${BASH_SOURCE[0]}
packages=(python3 nginx-light redis-server redis-tools procps libcap2-bin attr)
# shellcheck source=common.sh
. "$(dirname "$script")/common.sh"
begin

# ---------------------------------------------------------------- layer 1: Debian

step "installing Debian with ${packages[*]}" debian "$work/base.tar" \
    --customize-hook='mkdir -p "$1/srv/gone" "$1/srv/opaque" && touch "$1/srv/gone/file" "$1/srv/opaque/below" && echo deleted >"$1/srv/deleted"' \
    --customize-hook='echo below >"$1/srv/replaced"; chmod 600 "$1/srv/replaced"'

# ---------------------------------------------------------------- layer 2: what conversions get wrong

special() {
    local top=$work/special
    mkdir -p "$top/srv/special" "$top/var/www/html" "$top/usr/local/bin"
    cd "$top/srv/special"
    # Deleted below: a file and a whole directory.
    : >"$top/srv/.wh.deleted"
    : >"$top/srv/.wh.gone"
    # Replaced, with other permissions, by a directory.
    mkdir "$top/srv/replaced"
    echo above >"$top/srv/replaced/file"
    # Three names, one file.
    echo 'one file' >hard-1
    ln hard-1 hard-2
    ln hard-1 ../hard-3
    # Extended attributes, a capability among them.
    echo attributes >xattr
    setfattr -n user.walnut -v 'thin shell' xattr
    setfattr -n user.binary -v 0x00ff10 xattr
    setfattr -n user.directory -v yes .
    cp /bin/true capable
    setcap cap_net_bind_service+ep capable
    # Permissions beyond 777, and owners.
    cp /bin/true setuid && chmod 4755 setuid
    cp /bin/true setgid && chown 0:42 setgid && chmod 2755 setgid
    mkdir sticky && chmod 1777 sticky
    echo secret >owned && chown 12345:54321 owned && chmod 0640 owned
    echo wide >wide && chown 4000000:4000001 wide
    # Nodes.
    mknod -m 0666 null c 1 3
    mknod -m 0600 block b 7 200
    mkfifo -m 0622 fifo
    # Links: relative, absolute, dangling, and to a directory.
    ln -s hard-1 relative
    ln -s /etc/hostname absolute
    ln -s nowhere dangling
    ln -s /usr/share directory
    # Names.
    echo space >'a name with spaces'
    echo bytes >$'caf\xc3\xa9'
    echo newline >$'new\nline'
    local long
    long=$(printf 'n%.0s' $(seq 200))
    echo long >"$long"
    mkdir -p "$long-dir/$long" && echo deep >"$long-dir/$long/deep"
    # Sizes: none, one block exactly, one byte more, and a hole.
    : >empty
    head -c 4096 /dev/zero | tr '\0' x >block-4096
    head -c 4097 /dev/zero | tr '\0' y >block-4097
    truncate -s 8M sparse
    printf end | dd of=sparse bs=1 seek=8388605 conv=notrunc status=none
    # A directory that needs more than one block for its names.
    mkdir many
    (cd many && seq -f 'entry-%04g' 1 1000 | xargs touch)
    # Times: before 1970 to after 2038, and nanoseconds.
    touch -d '1970-01-01 00:00:00 UTC' time-zero
    touch -d '1965-03-04 05:06:07 UTC' time-before
    touch -d '2100-01-02 03:04:05 UTC' time-after
    touch -d '2001-02-03 04:05:06.123456789 UTC' time-nano
    # What the tests serve and run.
    echo '<h1>Walnut</h1>' >"$top/var/www/html/index.html"
    printf '%s\n' '#!/bin/sh' 'exec nginx -g "daemon off;"' >"$top/usr/local/bin/serve"
    chmod 755 "$top/usr/local/bin/serve"

    cd "$top"
    tar --create --file "$work/special.tar" --format=posix --sort=name --numeric-owner \
        --xattrs --xattrs-include='user.*' --xattrs-include='security.capability' \
        --pax-option='exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime' \
        srv var usr
    # Layer 3's directory.
    mkdir -p "$work/opaque"
    echo above >"$work/opaque/above"
}
# In a subshell of its own, so that `cd` stays there.
step "making the layer of special files" special

# ---------------------------------------------------------------- the image

pack() {
    local image=$work/entry/oci:$tag
    mkdir "$work/entry"
    umoci init --layout "$work/entry/oci"
    umoci new --image "$image"
    umoci raw add-layer --image "$image" --history.created_by 'Debian by mmdebstrap' "$work/base.tar"
    umoci raw add-layer --image "$image" --history.created_by 'special files' "$work/special.tar"
    umoci insert --image "$image" --opaque --history.created_by 'an opaque directory' "$work/opaque" /srv/opaque
    umoci config --image "$image" --no-history \
        --clear=config.env --clear=config.cmd --clear=config.entrypoint \
        --author 'the Walnut project' --os linux --architecture amd64 \
        --created 2023-11-14T22:13:20Z \
        --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        --config.env LANG=C.UTF-8 \
        --config.env WALNUT_DEMO=yes \
        --config.cmd /bin/bash \
        --config.workingdir /srv \
        --config.exposedports 80/tcp \
        --config.stopsignal SIGTERM \
        --config.label org.opencontainers.image.title=walnut-demo \
        --config.label 'org.opencontainers.image.description=Debian with python3, nginx and redis'
    publish "$work/base.tar" "$work/special.tar"
}
step "packing the image" pack
rm -f "$log"
ready
