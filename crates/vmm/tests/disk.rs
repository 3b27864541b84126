//! Disks as a guest has them: queues, flushes, discards, limits; by io_uring, without
//! it, and served by another process.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;
mod support_grow;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::{
        fs::{FileExt, MetadataExt},
        net::UnixStream,
    },
    path::Path,
    process::{Child, Command},
};

use seccompiler::{SeccompAction, SeccompFilter};
use support_grow::{Bell, Guest, Spec, number};
use tempfile::TempDir;
use walnut_vmm_api::{Backing, Bucket, Device, Limits};

const BYTES: usize = 2 << 20;

fn byte(at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16).to_le_bytes()[0]
}

fn pattern() -> Vec<u8> {
    (0..BYTES).map(byte).collect()
}

fn disk(dir: &TempDir, name: &str) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.path().join(name))
        .unwrap();
    file.set_len(8 << 20).unwrap();
    file
}

fn held(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

/// The guest writes, reads, flushes and discards half of what it wrote.
fn used(guest: &mut Guest, bell: &Bell, file: &File, queues: u16) {
    assert_eq!(
        guest.line("data has"),
        format!("data has {queues} queues, 16384 sectors, discards 1")
    );
    guest.line("flushed");
    let mut there = vec![0; BYTES];
    file.read_exact_at(&mut there, 0).unwrap();
    assert!(there == pattern(), "the file is not what the guest wrote");
    let before = held(file);
    bell.say(b'd');
    guest.line("discarded");
    file.read_exact_at(&mut there, 0).unwrap();
    assert!(there[..BYTES / 2].iter().all(|byte| *byte == 0));
    assert!(there[BYTES / 2..] == pattern()[BYTES / 2..]);
    assert!(held(file) + BYTES as u64 / 2 <= before, "nothing was freed");
    bell.say(b'm');
}

/// Whether the VMM has an io_uring.
fn has_ring(guest: &Guest) -> bool {
    let fds = fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap();
    let mut links = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    links.any(|link| link == Path::new("anon_inode:[io_uring]"))
}

/// This thread, and what it starts, cannot have an io_uring.
fn renounce_rings() {
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let rules = BTreeMap::from([(libc::SYS_io_uring_setup, Vec::new())]);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
    let program: seccompiler::BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

fn a_guest_uses_its_disks(ring: bool) {
    const SOME: usize = 512 << 10;
    const RATE: f64 = (128 << 10) as f64;
    let dir = tempfile::tempdir().unwrap();
    let words = format!("test=disks bytes={BYTES} fixed=1 slow={SOME}");
    let mut spec = Spec::new(&words);
    (spec.vcpus, spec.max_vcpus) = (2, 2);
    let bell = spec.bell();
    let data = disk(&dir, "data");
    spec.disk("data", &data, 2, Limits::default());
    let fixed = disk(&dir, "fixed");
    fixed.write_all_at(&pattern(), 0).unwrap();
    let file = spec.fd(fixed.try_clone().unwrap());
    spec.device(
        "fixed",
        Device::Block {
            serial: "fixed".into(),
            read_only: true,
            file,
            queues: 1,
            limits: Limits::default(),
        },
    );
    let limit = Limits {
        bytes: Some(Bucket {
            size: 128 << 10,
            burst: 0,
            refill_ms: 1000,
        }),
        operations: None,
    };
    spec.disk("slow", &disk(&dir, "slow"), 1, limit);
    let mut guest = spec.start();
    assert_eq!(has_ring(&guest), ring);
    used(&mut guest, &bell, &data, 2);
    assert_eq!(guest.line("fixed"), "fixed is read-only 1, writes 0");
    let slow = number(&guest.line("slow wrote"), "in");
    let free = number(&guest.line("free wrote"), "in");
    println!("limited {slow} s, not limited {free} s");
    // A full bucket and the last request go at once.
    assert!(slow > (SOME as f64 - RATE - 65536.0) / RATE, "{slow}");
    assert!(free < slow, "{free} {slow}");
    guest.ends();
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn disks_by_io_uring() {
    a_guest_uses_its_disks(true);
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn disks_without_io_uring() {
    // On a thread of its own: the filter stays on it.
    let thread = std::thread::spawn(|| {
        renounce_rings();
        a_guest_uses_its_disks(false);
    });
    thread.join().unwrap();
}

/// A process that dies with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs KVM and qemu-storage-daemon: runs in the lab"]
fn a_disk_of_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let data = disk(&dir, "data");
    let at = |name: &str| dir.path().join(name).display().to_string();
    let daemon = Command::new("qemu-storage-daemon")
        .args([
            "--blockdev",
            &format!(
                "driver=file,node-name=data,discard=unmap,filename={}",
                at("data")
            ),
        ])
        .args([
            "--export",
            &format!(
                "type=vhost-user-blk,id=data,node-name=data,writable=on,num-queues=2,\
                 addr.type=unix,addr.path={}",
                at("socket")
            ),
        ])
        .spawn()
        .expect("qemu-storage-daemon is missing: apt-get install qemu-system-common");
    let _daemon = Ends(daemon);
    let socket = loop {
        match UnixStream::connect(at("socket")) {
            Ok(socket) => break socket,
            Err(_) => std::thread::yield_now(),
        }
    };
    let words = format!("test=disks bytes={BYTES} first=1");
    let mut spec = Spec::new(&words);
    (spec.vcpus, spec.max_vcpus) = (2, 2);
    spec.backing = Backing {
        shared: true,
        huge_pages: false,
    };
    let bell = spec.bell();
    let socket = spec.fd(socket);
    spec.device("data", Device::VhostBlock { socket, queues: 2 });
    let mut guest = spec.start();
    used(&mut guest, &bell, &data, 2);
    guest.ends();
}
