//! Guest memory that grows and shrinks, and huge pages.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;
mod support_grow;

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use support::{repository, share::Share};
use support_grow::Spec;
use walnut_vmm_api::{Backing, Device, Reply};

const MIB: u64 = 1 << 20;

/// The kernel of `touch.S`.
fn toucher() -> PathBuf {
    let name = format!("vmm-touch-{}", std::process::id());
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let source = repository().join("crates/vmm/tests/guest/touch.S");
    let status = Command::new("cc")
        .args([
            "-nostdlib",
            "-static",
            "-no-pie",
            "-Wl,--build-id=none,-e,start",
        ])
        .args([Path::new("-o"), &file, &source])
        .status()
        .unwrap();
    assert!(status.success(), "cc {}", source.display());
    file
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn memory_that_is_not_plugged_is_not_there() {
    let mut spec = Spec::new("");
    spec.kernel = toucher();
    spec.max_memory = spec.memory + 256 * MIB;
    let mut guest = spec.start();
    let before = guest.pss();
    // It reads, writes, and reads again: nothing keeps what is written.
    assert_eq!(guest.line("f"), "ffffffff");
    assert_eq!(guest.line("f"), "ffffffff");
    assert!(guest.pss() < before + 64, "the write took memory");
    guest.stop();
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn memory_that_cannot_grow_is_refused() {
    let why = |change: &dyn Fn(&mut Spec)| {
        let mut spec = Spec::new("");
        spec.backing.shared = true;
        change(&mut spec);
        spec.try_start().err().unwrap()
    };
    let odd = why(&|spec| spec.max_memory += MIB);
    assert!(odd.contains("multiple of 2 MiB"), "{odd}");
    let less = why(&|spec| spec.max_memory -= 2 * MIB);
    assert!(less.contains("cannot grow"), "{less}");
    let endless = why(&|spec| spec.max_memory += 1 << 50);
    assert!(endless.contains("cannot grow"), "{endless}");
}

/// The guest has so much more, uses it, and gives it back. All the while a `share` is
/// served, from memory that comes and goes.
fn grows_and_shrinks(shared: bool, mut share: Option<Share>) {
    let (boot, more) = (128 * MIB, 256 * MIB);
    let kib = more / 1024;
    let words = format!("test=memory more={kib} share={}", u8::from(share.is_some()));
    let mut spec = Spec::new(&words);
    spec.max_memory = boot + more;
    spec.backing = Backing {
        shared,
        huge_pages: false,
    };
    let bell = spec.bell();
    if let Some(share) = &mut share {
        let (ours, _) = UnixStream::pair().unwrap();
        let socket = spec.fd(std::mem::replace(&mut share.socket, ours));
        let tag = "share".to_owned();
        spec.device("share", Device::Fs { tag, socket });
    }
    let mut guest = spec.start();
    guest.line("boots with");
    assert_eq!(guest.stats().memory, boot);
    let small = guest.pss();
    for wrong in [boot - 2 * MIB, boot + MIB, boot + more + 2 * MIB] {
        guest.resize(wrong).unwrap_err();
    }
    assert_eq!(guest.resize(boot + more), Ok(Reply::Done));
    guest.line("used it");
    assert_eq!(guest.stats().memory, boot + more);
    let large = guest.pss();
    assert!(large > small + more / 1024 * 9 / 10, "{small} {large}");
    bell.say(b'f');
    guest.line("let go");
    assert_eq!(guest.resize(boot), Ok(Reply::Done));
    guest.line("shrunk to");
    // The guest may keep a block on which something lies that cannot move.
    assert!(guest.stats().memory < boot + more / 16);
    let after = guest.pss();
    println!("PSS: {small}, {large}, {after} KiB");
    assert!(after < small + more / 1024 / 10, "{small} {large} {after}");
    bell.say(b'e');
    guest.ends();
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn private_memory_grows_and_goes_back_to_the_host() {
    grows_and_shrinks(false, None);
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn memory_grows_and_goes_back_beside_a_share() {
    let dir = tempfile::tempdir().unwrap();
    grows_and_shrinks(true, Some(Share::new(dir.path(), "hello")));
    let written = fs::metadata(dir.path().join("root/data")).unwrap().len();
    assert!(written > 255 * MIB, "{written} bytes");
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn shared_memory_grows_and_goes_back_to_the_host() {
    grows_and_shrinks(true, None);
}

/// A figure of /proc/meminfo, in pages of 2 MiB.
fn huge_pages(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim_matches([':', ' ']).parse().unwrap()
}

#[test]
#[ignore = "needs KVM and the host's huge pages: runs in the lab"]
fn huge_pages_are_the_machines_while_it_lives() {
    let set_aside = |pages: u64| {
        fs::write("/proc/sys/vm/nr_hugepages", pages.to_string()).unwrap();
        assert_eq!(huge_pages("HugePages_Total"), pages);
    };
    for shared in [false, true] {
        let spec = || {
            let mut spec = Spec::new("test=balloon");
            spec.backing = Backing {
                shared,
                huge_pages: true,
            };
            spec.device("balloon", Device::Balloon);
            spec.max_memory = spec.memory + 64 * MIB;
            spec
        };
        // 64 for 128 MiB.
        set_aside(63);
        let why = spec().try_start().err().unwrap();
        assert!(why.contains("too few huge pages: 64"), "{why}");
        set_aside(66);
        let mut guest = spec().start();
        let used = |guest: &support_grow::Guest| {
            assert_eq!(guest.stats().memory, 128 * MIB);
            huge_pages("HugePages_Total") - huge_pages("HugePages_Free")
                + huge_pages("HugePages_Rsvd")
        };
        // All of it is taken at once.
        assert_eq!(used(&guest), 64);
        // No free pages are reported: they could not be had back.
        assert_eq!(guest.line("balloon"), "balloon without reporting");
        assert_eq!(used(&guest), 64);
        // Memory that is plugged is of huge pages as well.
        assert_eq!(guest.resize(132 * MIB), Ok(Reply::Done));
        while guest.stats().memory < 132 * MIB {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(huge_pages("HugePages_Free"), huge_pages("HugePages_Rsvd"));
        guest.stop();
        assert_eq!(huge_pages("HugePages_Free"), 66);
        let mut odd = spec();
        odd.memory += MIB;
        odd.max_memory += MIB;
        let why = odd.try_start().err().unwrap();
        assert!(why.contains("no multiple of a huge page"), "{why}");
    }
    set_aside(0);
}
