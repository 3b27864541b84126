//! Kernels of other forms than the sandbox's own.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;
mod support_grow;

use std::path::PathBuf;

use support_grow::Spec;

/// Debian's generic kernel, which the lab runs on: `tests/lab/kernel.sh`.
fn bzimage() -> PathBuf {
    let cache = std::env::var_os("WALNUT_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/walnut"),
        PathBuf::from,
    );
    let unpacked = std::fs::read_dir(cache.join("lab")).unwrap();
    let kernels = unpacked.map(|it| it.unwrap().path().join("vmlinuz"));
    kernels
        .filter(|it| it.exists())
        .max()
        .expect("tests/lab/kernel.sh fetches it")
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_bzimage_boots() {
    let mut spec = Spec::new("test=hello");
    spec.kernel = bzimage();
    spec.memory = 256 << 20;
    spec.max_memory = 256 << 20;
    let mut guest = spec.start();
    guest.line("hello, 1 online");
    guest.ends();
}
