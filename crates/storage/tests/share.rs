//! Volumes from end to end: the real QEMU, kernel and virtiofsd. Needs root.

#![allow(clippy::unwrap_used)]

#[path = "../../machine/tests/guest/mod.rs"]
mod guest;

use std::{fs, os::unix::fs::MetadataExt, time::Duration};

use walnut_machine::{DriverChoice, Exit, MachineSpec, Programs};
use walnut_storage::{VirtioFs, Volume};

#[tokio::test]
async fn a_guest_reads_and_writes_what_it_may() {
    let (run, ro, rw) = (dir(), dir(), dir());
    fs::write(ro.path().join("file"), "from the host").unwrap();
    let volume = |dir: &tempfile::TempDir, read_only| Volume {
        source: dir.path().to_owned(),
        read_only,
        follows_host: false,
    };
    let volumes = [volume(&ro, true), volume(&rw, false)];
    let shared = VirtioFs::start(&volumes, run.path()).await.unwrap();
    let programs = Programs::new(&guest::own());
    let driver = walnut_machine::driver(DriverChoice::QemuTcg, &programs).unwrap();
    let spec = MachineSpec {
        id: "share".into(),
        run_dir: run.path().to_owned(),
        kernel: guest::kernel(),
        initramfs: guest::initramfs(),
        cmdline: vec!["test=serve".into()],
        vcpus: 1,
        max_vcpus: 1,
        memory: 128 << 20,
        max_memory: 128 << 20,
        disks: Vec::new(),
        spare_disks: 0,
        shares: vec![shared.share()],
        nics: Vec::new(),
    };
    let machine = driver.start(spec).await.unwrap();
    machine.ready(Duration::from_secs(60)).await.unwrap();
    assert_eq!(
        guest::ask(&*machine, b"s").await,
        "from the host ro:Read-only file system rw:written\n"
    );
    let written = rw.path().join("new");
    assert_eq!(fs::read_to_string(&written).unwrap(), "from the guest");
    assert_eq!(fs::metadata(&written).unwrap().uid(), 0);
    assert!(!ro.path().join("new").exists());

    // virtiofsd ends in good order with its machine, and says nothing of it.
    let silent = async {
        let reason = shared.wait().await;
        panic!("virtiofsd failed: {reason}");
    };
    tokio::select! {
        () = silent => {}
        () = async {
            machine.stop().await;
            assert_eq!(machine.wait().await, Exit::Stopped);
        } => {}
    }
    let pid = shared.pid();
    drop(shared);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(fs::read_dir(run.path()).unwrap().count(), 0);
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}
