#!/usr/bin/env bash
# containerd's own tests of its Kubernetes interface (integration/ in its sources), against
# containerd 1.7 with Walnut, or with runc to tell what is this machine's fault.
#
#   tests/conformance.sh [walnut|runc] [OPTION…]   options of the test program, such as
#                                                  -test.run TestPodHostname
#
# The program is built from the sources of Debian 13's containerd with Debian's Go, which
# takes some minutes once; it is kept in the cache. Its images are made here of busybox. All
# runs in network, mount and PID namespaces of its own: bridges, addresses, the registry and
# what a test kills are nobody else's. What the tests say goes to the standard output, and to the log that is named
# at the end. docs/conformance.md says what is expected to fail.
#
# WALNUT_CACHE  where the program is kept (default: ~/.cache/walnut)
set -Eeuo pipefail
export LC_ALL=C
umask 022
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repository=$PWD

say() { printf 'conformance: %s\n' "$*" >&2; }
die() { printf 'conformance: error: %s\n' "$*" >&2; exit 1; }

runtime=${1:-walnut}
case $runtime in
    walnut | runc) shift || true ;;
    *) die "which runtime? tests/conformance.sh walnut, or tests/conformance.sh runc" ;;
esac
[ "$(id -u)" = 0 ] || die "this needs root, as the tests do"
[ -x out/lib/walnut/containerd-shim-walnut-v2 ] || die "run 'make build' first"
cache=${WALNUT_CACHE:-$HOME/.cache/walnut}/conformance
registry=127.0.0.1:5000
mkdir -p "$cache"

# ---------------------------------------------------------------- the test program

build() {
    local work=$1 uri packages source=github.com/containerd/containerd go
    mkdir -p "$work"/{lists/partial,cache/archives/partial,source,go/src/github.com/containerd}
    # shellcheck disable=SC2016 # apt expands it
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' \
        'Component: main' 'Origin: Debian' | sed -n 1p)
    [ -n "$uri" ] || { echo "run apt-get update first: no lists of packages" >&2; return 1; }
    cat >"$work/later.sources" <<SOURCES
Types: deb deb-src
URIs: $uri
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
    cat >"$work/apt.conf" <<CONF
Dir::Etc::sourcelist "$work/later.sources";
Dir::Etc::sourceparts "-";
Dir::State::lists "$work/lists";
Dir::Cache "$work/cache";
APT::Sandbox::User "root";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
CONF
    apt-get -q -c "$work/apt.conf" update
    # Each file is checked by apt; the .dsc of a security update is not on every mirror.
    (cd "$work/source" && apt-get -q -c "$work/apt.conf" source --download-only containerd) || true
    mkdir "$work/go/src/$source"
    tar -C "$work/go/src/$source" --strip-components=1 -xf "$work"/source/containerd_1.7.*.orig.tar.xz
    tar -C "$work/go/src/$source" -xf "$work"/source/containerd_1.7.*.debian.tar.xz
    (cd "$work/go/src/$source" && while read -r patch; do
        patch -sp1 <"debian/patches/$patch"
    done <debian/patches/series)
    packages=$(apt-cache -c "$work/apt.conf" showsrc containerd |
        sed -n '/^Build-Depends:/{s/^Build-Depends: //;s/([^)]*)//g;s/ //g;p;q}' |
        tr ',' '\n' | grep '^golang' | sort -u | paste -sd,)
    mmdebstrap --mode=root --variant=extract --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --include="$packages,golang-github-stretchr-testify-dev,golang-k8s-component-base-dev" \
        trixie "$work/root" "deb $uri trixie main"
    go=$(readlink -f "$work/root/usr/lib/go")
    (cd "$work/go/src/$source" && env GOROOT="$go" GO111MODULE=off GOTOOLCHAIN=local CGO_ENABLED=0 \
        GOPATH="$work/go:$work/root/usr/share/gocode" GOCACHE="$work/cache/go" \
        "$go/bin/go" test -c -tags no_btrfs -o "$work/integration.test" ./integration)
}

# ---------------------------------------------------------------- its images

# A root file system of busybox, with the users and groups that the tests look for.
busybox_root() {
    local root=$1 applet
    mkdir -p "$root"/{bin,etc,tmp,root,proc,sys,dev,usr/bin,var,home}
    chmod 1777 "$root/tmp"
    cp /bin/busybox "$root/bin/"
    for applet in $(/bin/busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
    done
    printf '%s\n' root:x:0:0:root:/root:/bin/sh daemon:x:1:1:daemon:/usr/sbin:/bin/false \
        nobody:x:65534:65534:nobody:/home:/bin/false >"$root/etc/passwd"
    printf '%s\n' root:x:0: daemon:x:1: wheel:x:10:root nogroup:x:65534: >"$root/etc/group"
}

image() {
    local dir=$1 name=$2 tag=$3
    shift 3
    umoci init --layout "$dir/oci-$name"
    umoci new --image "$dir/oci-$name:$tag"
    tar -C "$dir/$name" --numeric-owner -cf "$dir/$name.tar" .
    umoci raw add-layer --image "$dir/oci-$name:$tag" "$dir/$name.tar"
    umoci config --image "$dir/oci-$name:$tag" \
        --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
    skopeo --insecure-policy copy --quiet --dest-tls-verify=false \
        "oci:$dir/oci-$name:$tag" "docker://$registry/$name:$tag"
}

images() {
    local dir=$1 name
    for name in busybox volume-copy-up volume-ownership resource-consumer; do
        busybox_root "$dir/$name"
    done
    image "$dir" busybox 1.36 --config.cmd sh
    mkdir "$dir"/volume-{copy-up,ownership}/test_dir
    echo test_content >"$dir/volume-copy-up/test_dir/test_file"
    image "$dir" volume-copy-up 2.1 --config.volume /test_dir
    chown 65534:65534 "$dir/volume-ownership/test_dir"
    image "$dir" volume-ownership 2.1 --config.volume /test_dir
    # Stands for stress(1): holds 110 MB for half a minute.
    printf '#!/bin/sh\n{ head -c 115343360 /dev/zero; sleep 30; } | tail -c 120000000 >/dev/null\n' \
        >"$dir/resource-consumer/bin/stress"
    chmod 755 "$dir/resource-consumer/bin/stress"
    image "$dir" resource-consumer 1.10 --config.cmd sleep --config.cmd infinity
    mkdir -p "$dir/pause/bin"
    cp /bin/busybox "$dir/pause/bin/sleep"
    image "$dir" pause 3.8 --config.entrypoint /bin/sleep --config.entrypoint infinity
}

# ---------------------------------------------------------------- the run

configuration() {
    cat >"$top/cni/10-pods.conflist" <<CNI
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local",
            "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
CNI
    # The kernel of a container or of a sandboxed host may forbid lower scores.
    cat >"$top/config.toml" <<CONFIG
version = 2
root = "$root/containerd"
state = "$top/state"
[grpc]
address = "$top/c.sock"
[ttrpc]
address = "$top/c.sock.ttrpc"
[plugins."io.containerd.nri.v1.nri"]
disable = false
socket_path = "/var/run/nri-test.sock"
plugin_path = "$top/nri"
plugin_config_path = "$top/nri"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "$registry/pause:3.8"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "$runtime"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.walnut]
runtime_type = "io.containerd.walnut.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "$top/cni"
CONFIG
    cat >"$top/registry.yml" <<REGISTRY
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $root/registry}}
http: {addr: "$registry"}
REGISTRY
    cat >"$top/images.toml" <<IMAGES
busybox = "$registry/busybox:1.36"
pause = "$registry/pause:3.8"
resourceconsumer = "$registry/resource-consumer:1.10"
volumecopyup = "$registry/volume-copy-up:2.1"
volumeownership = "$registry/volume-ownership:2.1"
IMAGES
}

# A test ends containerd by its program's name, which is therefore nobody else's, and has it
# started again: only once it has seen that it is gone.
keep_containerd() {
    until [ -e "$top/stop" ]; do
        PATH=$repository/out/lib/walnut:$programs:$PATH WALNUT_ROOT=$root/walnut \
            WALNUT_RUN=$top/w "$top/$name" -l debug --config "$top/config.toml" \
            >>"$top/log" 2>&1 &
        echo $! >"$top/pid"
        wait $! || true
        sleep 3
    done
}

inside() {
    top=$1 root=$2 programs=$3 name=ctd$$
    shift 3
    local deadline code=0 id
    mount --make-rprivate /
    mkdir -p /var/lib/cni "$top"/{cni,nri,images} "$root/registry"
    mount -t tmpfs tmpfs /var/lib/cni
    ip link set lo up
    cp "$programs/containerd" "$top/$name"
    configuration
    OTEL_TRACES_EXPORTER=none docker-registry serve "$top/registry.yml" >"$top/registry.log" 2>&1 &
    registry_pid=$!
    keep_containerd &
    keeper=$!
    # shellcheck disable=SC2064 # as they are now
    trap "touch '$top/stop'; kill \$(cat '$top/pid') 2>/dev/null; wait $keeper; kill $registry_pid" EXIT
    deadline=$((SECONDS + 60))
    until "$programs/ctr" -a "$top/c.sock" version >/dev/null 2>&1 &&
        { exec 3<>"/dev/tcp/${registry%:*}/${registry#*:}"; } 2>/dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || die "containerd does not answer; its log is $top/log"
        sleep 0.2
    done
    exec 3>&-
    images "$top/images" >"$top/images.log" 2>&1 || { tail -n 5 "$top/images.log" >&2; die "make the images: failed"; }
    # Not of a runtime: tests that start a containerd of their own, with programs and images
    # that are fetched from the Internet, or that need containerd's faulty shims.
    (cd "$top" && PATH=$programs:$PATH "$cache/integration.test" -test.v -test.count=1 -test.timeout 60m \
        -test.skip 'TestIssue7496|TestCRIImagePullTimeout|TestRunContainerWithVolatileOption|TestContainerdImageWithDockerSchema1|TestImageLoad|TestRunPodSandbox(With(CNI|Setup|Shim)|And)' \
        -cri-endpoint "unix://$top/c.sock" -cri-root "$root/containerd/io.containerd.grpc.v1.cri" \
        -runtime-handler "$runtime" -containerd-bin "$name" -image-list "$top/images.toml" "$@" 2>&1) |
        tee "$top/tests.log" || code=$?
    # A test that fails may leave its pod.
    for id in $("$programs/ctr" -a "$top/c.sock" -n k8s.io task ls -q); do
        "$programs/ctr" -a "$top/c.sock" -n k8s.io task rm -f "$id" >/dev/null 2>&1 || true
    done
    say "the log of the tests is $top/tests.log, containerd's $top/log"
    return "$code"
}

if [ "${WALNUT_CONFORMANCE_INSIDE:-}" = yes ]; then
    inside "$@"
    exit
fi
programs=$(tests/containerd.sh --fetch 1.7)
if [ ! -x "$cache/integration.test" ]; then
    say "building the test program"
    work=$(mktemp -d "$cache/.build-XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
    build "$work" >"$cache/build.log" 2>&1 || {
        tail -n 25 "$cache/build.log" >&2
        die "build the test program: failed; the reason is above, and in $cache/build.log"
    }
    mv "$work/integration.test" "$cache/"
fi
# Short: sockets' addresses are. What must not lie on an overlay is in the cache.
top=$(mktemp -d /tmp/conf-XXXXXX)
root=$(mktemp -d "$cache/run-XXXXXX")
trap 'rm -rf --one-file-system "${work:-/nonexistent}" "$root"' EXIT
WALNUT_CONFORMANCE_INSIDE=yes unshare --net --mount --pid --fork --kill-child --mount-proc "$0" "$runtime" "$top" "$root" "$programs" "$@"
