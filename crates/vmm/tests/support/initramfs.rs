//! An initramfs with a C program as its init.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use walnut_initramfs::Archive;

/// The file, made of `source` in this package's `tests`, in a directory of the
/// process's own, because tests may run beside each other.
pub(crate) fn initramfs(source: &str, flags: &[&str]) -> PathBuf {
    let name = format!("{}-{}", source.replace('/', "-"), std::process::id());
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let init = dir.join("init");
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(source);
    let status = Command::new("cc")
        .args(["-static", "-Os", "-Wall", "-Werror"])
        .args(flags)
        .arg("-o")
        .args([&init, &source])
        .status()
        .unwrap();
    assert!(status.success(), "cc {}", source.display());
    let mut archive = Archive::with_init_nodes().unwrap();
    archive.file("/init", &init, 0o755).unwrap();
    let mut bytes = Vec::new();
    archive.write_to(&mut bytes).unwrap();
    let file = dir.join("initramfs");
    std::fs::write(&file, bytes).unwrap();
    file
}
