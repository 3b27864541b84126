//! What a test needs for a guest: kernel, vsock device, and an initramfs with
//! the test init.

#![allow(unreachable_pub)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use walnut_machine::Machine;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn needed(path: PathBuf, how: &str) -> PathBuf {
    assert!(path.exists(), "{} is missing; {how}", path.display());
    path
}

/// The sandbox kernel.
pub fn kernel() -> PathBuf {
    needed(
        repository().join("out/lib/walnut/vmlinux"),
        "guest/kernel/build.sh makes it",
    )
}

/// Walnut's own programs: this test's own target directory.
pub fn own() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let own = exe.parent().unwrap().parent().unwrap().to_owned();
    needed(
        own.join("walnut-vsock"),
        "cargo build --release -p walnut-devices",
    );
    own
}

/// The test init as an initramfs, compiled once.
pub fn initramfs() -> PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        // Not a temporary: a static is never dropped. Of the process, because
        // a test's helper compiles its own.
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
            "{}-{}",
            env!("CARGO_PKG_NAME"),
            helper()
        ));
        fs::create_dir_all(&dir).unwrap();
        let init = dir.join("init");
        let source = repository().join("crates/machine/tests/guest/init.c");
        let status = Command::new("cc")
            .args(["-static", "-Os", "-Wall", "-Wno-format-truncation", "-o"])
            .args([&init, &source])
            .status()
            .unwrap();
        assert!(status.success());
        let mut cpio = Vec::new();
        member(&mut cpio, "dev", 0o40755, &[], (0, 0));
        member(&mut cpio, "dev/console", 0o20600, &[], (5, 1));
        member(
            &mut cpio,
            "init",
            0o100755,
            &fs::read(&init).unwrap(),
            (0, 0),
        );
        member(&mut cpio, "TRAILER!!!", 0, &[], (0, 0));
        fs::write(dir.join("initramfs"), cpio).unwrap();
        dir
    });
    dir.join("initramfs")
}

/// Whether this process is a test's helper.
fn helper() -> bool {
    std::env::var_os("WALNUT_TEST_RUN_DIR").is_some()
}

/// One member of a newc archive (Linux, early-userspace/buffer-format).
fn member(cpio: &mut Vec<u8>, name: &str, mode: u32, data: &[u8], device: (u32, u32)) {
    let size = u32::try_from(data.len()).unwrap();
    let name_size = u32::try_from(name.len() + 1).unwrap();
    let fields = [
        0, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0,
    ];
    cpio.extend(b"070701");
    for field in fields {
        cpio.extend(format!("{field:08x}").bytes());
    }
    cpio.extend(name.bytes().chain([0]));
    cpio.resize(cpio.len().next_multiple_of(4), 0);
    cpio.extend(data);
    cpio.resize(cpio.len().next_multiple_of(4), 0);
}

/// What the test init answers to `question`.
pub async fn ask(machine: &dyn Machine, question: &[u8]) -> String {
    let mut stream = machine.connect(1024).await.unwrap();
    stream.write_all(question).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
