//! The VMM with a real kernel, on real KVM. Where there is none these tests run in
//! the lab: `tests/lab/README.md`.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::fs::File;

use support::{Guest, Vmm};
use walnut_vmm_api::{End, Event, Message, Reply};

fn guest(test: &str, vcpus: u8) -> Guest<'_> {
    Guest {
        test,
        cmdline: "",
        vcpus,
        shared: false,
    }
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn boots_prints_and_resets() {
    for vcpus in [1, 2] {
        let mut vmm = Vmm::spawn();
        assert_eq!(vmm.start(guest("hello", vcpus), &[]), Ok(Reply::Done));
        let console = vmm.console();
        let end = vmm.hear();
        assert!(console.contains("hello from init"), "{end:?} {console}");
        assert!(console.contains(&format!("vcpus {vcpus}")), "{console}");
        assert_eq!(end, Some(Message::Event(Event::Ended(End::Reset))));
        assert!(vmm.child.wait().unwrap().success());
    }
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn disks_are_read_and_written() {
    let mut vmm = Vmm::spawn();
    let dir = tempfile::tempdir().unwrap();
    let disk = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![name.as_bytes()[0]; 1 << 20]).unwrap();
        File::options().read(true).write(true).open(path).unwrap()
    };
    let (a, b) = (disk("A"), disk("B"));
    assert_eq!(vmm.start(guest("disks", 1), &[&a, &b]), Ok(Reply::Done));
    let console = vmm.console();
    let end = vmm.hear();
    assert!(console.contains("disk-0 A 0"), "{end:?} {console}");
    assert!(console.contains("disk-1 B 1"), "{end:?} {console}");
    assert_eq!(end, Some(Message::Event(Event::Ended(End::Reset))));
    assert_eq!(std::fs::read(dir.path().join("A")).unwrap()[0], b'A');
    assert_eq!(std::fs::read(dir.path().join("B")).unwrap()[0], b'W');
}
