#!/usr/bin/env bash
# Builds everything a sandbox needs and puts it into out/: bin/walnut, and in
# lib/walnut the kernel, the initramfs and the helpers.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '%s\n' "==> $*"; }
mkdir -p out/bin out/lib/walnut
target=${CARGO_TARGET_DIR:-target}

# What the guest's helper links statically.
export LIBSECCOMP_LINK_TYPE=static
LIBSECCOMP_LIB_PATH=$(pkg-config --variable=libdir libseccomp)
export LIBSECCOMP_LIB_PATH

step "programs"
cargo build --release --quiet -p walnut-cli -p walnut-shim -p walnut-initramfs
cargo build --release --quiet -p walnut-devices --bin walnut-vsock

step "monitor"
# Static: no loader and no library of the host's runs in it.
cargo rustc --profile monitor --quiet -p walnut-vmm --bin walnut-vmm -- \
    -C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs

step "agent"
for program in walnut-agent walnut-container walnut-rehearsal; do
    # Relative relocations in their packed form: 70 kB less to keep and to touch.
    cargo rustc --profile guest --quiet -p walnut-agent --bin "$program" -- \
        -C target-feature=+crt-static -C force-unwind-tables=no \
        -C link-arg=-Wl,-z,pack-relative-relocs
    install -m 0755 "$target/guest/$program" "out/lib/walnut/$program"
done
for program in guest/walnut-agent monitor/walnut-vmm; do
    if file=$(ldd "$target/$program" 2>&1) && [[ $file != *static* ]]; then
        echo "$program is not static: $file" >&2
        exit 1
    fi
done

step "rehearsal image"
# What the machines of a pool run before anybody asks for one. The same input gives the
# same bytes.
rehearsal=$(mktemp -d)
trap 'rm -rf "$rehearsal"' EXIT
mkdir "$rehearsal"/root "$rehearsal"/root/{proc,sys,dev,etc,tmp}
install -m 0755 "$target/guest/walnut-rehearsal" "$rehearsal/root/rehearsal"
mkfs.erofs -T0 -U 00000000-0000-0000-0000-000000000000 --all-root --quiet "$rehearsal/rehearsal.erofs" "$rehearsal/root"
install -m 0644 "$rehearsal/rehearsal.erofs" out/lib/walnut/rehearsal.erofs

step "initramfs"
"$target/release/walnut-initramfs" --output out/lib/walnut/initramfs.cpio \
    init=out/lib/walnut/walnut-agent \
    /walnut-container=out/lib/walnut/walnut-container

step "sandbox kernel"
guest/kernel/build.sh

# Replaced, not rewritten: a running sandbox keeps the program it has.
for program in monitor/walnut-vmm release/walnut-vsock release/containerd-shim-walnut-v2; do
    name=${program#*/}
    install -m 0755 "$target/$program" "out/lib/walnut/.$name"
    mv -f "out/lib/walnut/.$name" "out/lib/walnut/$name"
done
install -m 0755 "$target/release/walnut" out/bin/.walnut
mv -f out/bin/.walnut out/bin/walnut
ln -sfn walnut out/bin/walnut-oci
step "built: out/bin/walnut, out/bin/walnut-oci"
