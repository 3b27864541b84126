//! Devices that come and go while a real kernel runs, on real KVM. Where there is none
//! these tests run in the lab: `tests/lab/README.md`.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::{
    fs::File,
    net::UdpSocket,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::Command,
};

use support::{Guest, Vmm, share::Share};
use walnut_vmm_api::{Attachment, Device, Event, FdIndex, Limits, Message, Reply, Request, Stats};

/// Turns of each kind.
const TURNS: usize = 20;
const TAP: &str = "walnut-plug0";

/// A guest that uses what comes.
const EAGER: Guest<'_> = Guest {
    test: "plug",
    cmdline: "quiet",
    vcpus: 1,
    shared: true,
};

fn disk(dir: &Path, name: &str) -> File {
    let path = dir.join(name);
    std::fs::write(&path, vec![name.as_bytes()[0]; 1 << 20]).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

fn block(name: &str) -> Device {
    Device::Block {
        serial: name.to_owned(),
        read_only: false,
        file: FdIndex(0),
        queues: 1,
        limits: Limits::default(),
    }
}

fn attach(vmm: &mut Vmm, name: &str, device: Device, fd: BorrowedFd<'_>) -> Result<Reply, String> {
    let name = name.to_owned();
    let attachment = Box::new(Attachment { name, device });
    vmm.ask(&Request::Attach(attachment), &[fd])
}

fn detach(vmm: &mut Vmm, name: &str) -> Result<Reply, String> {
    let name = name.to_owned();
    vmm.ask(&Request::Detach { name }, &[])
}

fn detached(name: &str) -> Option<Event> {
    let name = name.to_owned();
    Some(Event::Detached { name })
}

/// Descriptors and threads of the VMM.
fn holds(vmm: &Vmm) -> (usize, usize) {
    let count = |what: &str| {
        let dir = format!("/proc/{}/{what}", vmm.child.id());
        std::fs::read_dir(dir).unwrap().count()
    };
    (count("fd"), count("task"))
}

/// Rings of io_uring among the descriptors of the VMM.
fn rings(vmm: &Vmm) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", vmm.child.id()))
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter(|link| link.to_string_lossy().contains("io_uring"))
        .count()
}

/// Runs `turn` again and again: nothing is left behind after any but the first,
/// whose thread waits for the next.
fn again(vmm: &mut Vmm, mut turn: impl FnMut(&mut Vmm, usize)) {
    let (before, _) = holds(vmm);
    turn(vmm, 0);
    let (after, threads) = holds(vmm);
    assert_eq!(after, before, "descriptors after one turn");
    for n in 1..TURNS {
        turn(vmm, n);
        assert_eq!(holds(vmm), (before, threads), "after turn {n}");
    }
}

/// A tap whose queue is handed over; the interface goes with it.
fn tap() -> File {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // struct ifreq: a name, then IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
    let mut request = [0u8; 40];
    request[..TAP.len()].copy_from_slice(TAP.as_bytes());
    request[16..18].copy_from_slice(&0x5002u16.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes a struct ifreq, of 40 bytes.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    for arguments in [
        ["addr", "add", "10.99.0.1/8", "dev", TAP],
        ["link", "set", "dev", TAP, "up"],
    ] {
        let status = Command::new("ip").args(arguments).status().unwrap();
        assert!(status.success(), "ip {arguments:?}");
    }
    tap
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn disks_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut vmm = Vmm::spawn();
    assert_eq!(
        vmm.start(EAGER, &[&disk(dir.path(), "boot")]),
        Ok(Reply::Done)
    );
    vmm.line("ready for devices");
    vmm.line("disk disk-0");
    let at_boot = rings(&vmm);
    again(&mut vmm, |vmm, n| {
        let name = format!("{}-disk", (b'A' + u8::try_from(n).unwrap()) as char);
        let file = disk(dir.path(), &name);
        let attached = attach(vmm, &name, block(&name), file.as_fd());
        assert_eq!(attached, Ok(Reply::Done));
        let line = vmm.line("disk ");
        assert_eq!(line, format!("disk {name} {} 1", &name[..1]));
        assert_eq!(rings(vmm), 2 * at_boot, "it is served as the other is");
        assert_eq!(std::fs::read(dir.path().join(&name)).unwrap()[0], b'W');
        assert_eq!(detach(vmm, &name), Ok(Reply::Done));
        assert_eq!(vmm.event(), detached(&name));
        vmm.line("gone ");
        let unknown = detach(vmm, &name).unwrap_err();
        assert!(unknown.contains("no device is called"), "{unknown}");
    });
    // One that was there from the start goes in the same way, and comes again.
    assert_eq!(detach(&mut vmm, "disk-0"), Ok(Reply::Done));
    assert_eq!(vmm.event(), detached("disk-0"));
    vmm.line("gone ");
    let file = disk(dir.path(), "Zdisk");
    let attached = attach(&mut vmm, "disk-0", block("again"), file.as_fd());
    assert_eq!(attached, Ok(Reply::Done));
    assert_eq!(vmm.line("disk "), "disk again Z 1");
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn networks_come_and_go() {
    let mut vmm = Vmm::spawn();
    assert_eq!(vmm.start(EAGER, &[]), Ok(Reply::Done));
    vmm.line("ready for devices");
    let link = Path::new("/sys/class/net").join(TAP);
    again(&mut vmm, |vmm, n| {
        let tap = tap();
        let heard = UdpSocket::bind("0.0.0.0:9").unwrap();
        let last = u8::try_from(n).unwrap();
        let device = Device::Net {
            taps: vec![FdIndex(0)],
            mac: [2, 0, 0, 0, 0, last],
            mtu: None,
            only_own_mac: true,
            receive: Limits::default(),
            send: Limits::default(),
        };
        let attached = attach(vmm, "net", device, tap.as_fd());
        assert_eq!(attached, Ok(Reply::Done));
        drop(tap);
        let line = vmm.line("network ");
        assert_eq!(line, format!("network 02:00:00:00:00:{last:02x} sent"));
        let mut datagram = [0; 16];
        let (n, from) = heard.recv_from(&mut datagram).unwrap();
        assert_eq!(&datagram[..n], b"walnut");
        assert_eq!(from.ip().to_string(), "10.99.0.2");
        assert!(link.exists());
        assert_eq!(detach(vmm, "net"), Ok(Reply::Done));
        assert_eq!(vmm.event(), detached("net"));
        assert!(!link.exists(), "the tap is still open");
        vmm.line("gone ");
    });
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn shares_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut vmm = Vmm::spawn();
    assert_eq!(vmm.start(EAGER, &[]), Ok(Reply::Done));
    vmm.line("ready for devices");
    again(&mut vmm, |vmm, n| {
        let greeting = format!("hello-{n}");
        let mut share = Share::new(dir.path(), &greeting);
        let device = Device::Fs {
            tag: "share".to_owned(),
            socket: FdIndex(0),
        };
        let (ours, _) = UnixStream::pair().unwrap();
        let socket = std::mem::replace(&mut share.socket, ours);
        let attached = attach(vmm, "share", device, socket.as_fd());
        assert_eq!(attached, Ok(Reply::Done));
        drop(socket);
        assert_eq!(vmm.line("share "), format!("share share {greeting}"));
        assert_eq!(detach(vmm, "share"), Ok(Reply::Done));
        assert_eq!(vmm.event(), detached("share"));
        vmm.line("gone ");
        // Nobody holds the other end: it ends by itself.
        share.child.wait().unwrap();
    });
    vmm.child.kill().unwrap();

    let mut vmm = Vmm::spawn();
    let private = Guest {
        shared: false,
        ..EAGER
    };
    assert_eq!(vmm.start(private, &[]), Ok(Reply::Done));
    let device = Device::Fs {
        tag: "share".to_owned(),
        socket: FdIndex(0),
    };
    let (socket, _peer) = UnixStream::pair().unwrap();
    let refused = attach(&mut vmm, "share", device, socket.as_fd()).unwrap_err();
    assert!(refused.contains("memory that is shared"), "{refused}");
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn what_cannot_be_attached_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut vmm = Vmm::spawn();
    assert_eq!(
        vmm.start(EAGER, &[&disk(dir.path(), "boot")]),
        Ok(Reply::Done)
    );
    vmm.line("ready for devices");
    let file = disk(dir.path(), "more");
    let before = holds(&vmm);
    let mut refused = |name: &str, device: Device, why: &str| {
        let error = attach(&mut vmm, name, device, file.as_fd()).unwrap_err();
        assert!(error.contains(why), "{name}: {error}");
        assert_eq!(holds(&vmm), before, "{name}");
    };
    refused("disk-0", block("taken"), "two devices are called disk-0");
    refused("", block("empty"), "cannot be called");
    refused(&"x".repeat(65), block("long"), "cannot be called");
    refused("serial", block(&"x".repeat(21)), "too long");
    let missing = Device::Fs {
        tag: "t".to_owned(),
        socket: FdIndex(7),
    };
    refused("missing", missing, "descriptor 7 is missing");
    let no_tap = Device::Net {
        taps: vec![FdIndex(0)],
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        only_own_mac: false,
        receive: Limits::default(),
        send: Limits::default(),
    };
    refused("no-tap", no_tap, "tap");
    let vsock = Device::Vsock {
        cid: 3,
        dir: FdIndex(0),
        name: "sock".to_owned(),
    };
    refused("vsock", vsock, "from the start or not at all");

    // A full bus, from which one goes to make room.
    for n in 1..31 {
        let name = format!("full-{n}");
        let attached = attach(&mut vmm, &name, block(&name), file.as_fd());
        assert_eq!(attached, Ok(Reply::Done), "{name}");
    }
    let full = attach(&mut vmm, "full-31", block("full-31"), file.as_fd());
    assert!(full.unwrap_err().contains("the PCI bus is full"));
    for n in 1..31 {
        vmm.line(&format!("disk full-{n} "));
    }
    for n in 1..31 {
        assert_eq!(detach(&mut vmm, &format!("full-{n}")), Ok(Reply::Done));
    }
    let mut gone: Vec<_> = (1..31).map(|_| vmm.event()).collect();
    let mut names: Vec<_> = (1..31).map(|n| detached(&format!("full-{n}"))).collect();
    gone.sort_by_key(|event| format!("{event:?}"));
    names.sort_by_key(|event| format!("{event:?}"));
    assert_eq!(gone, names);
    assert_eq!(holds(&vmm).0, before.0);
    for _ in 1..31 {
        vmm.line("gone ");
    }
    let attached = attach(&mut vmm, "full-1", block("last"), file.as_fd());
    assert_eq!(attached, Ok(Reply::Done));
    vmm.line("disk last ");
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_paused_machine_changes_and_a_guest_that_is_early_finds_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut vmm = Vmm::spawn();
    assert_eq!(vmm.start(EAGER, &[]), Ok(Reply::Done));
    // Long before the guest can hear of it.
    let file = disk(dir.path(), "Early");
    let attached = attach(&mut vmm, "early", block("early"), file.as_fd());
    assert_eq!(attached, Ok(Reply::Done));
    assert_eq!(vmm.line("disk "), "disk early E 1");
    assert_eq!(vmm.ask(&Request::Pause, &[]), Ok(Reply::Done));
    let file = disk(dir.path(), "Paused");
    let attached = attach(&mut vmm, "paused", block("paused"), file.as_fd());
    assert_eq!(attached, Ok(Reply::Done));
    assert_eq!(vmm.ask(&Request::Resume, &[]), Ok(Reply::Done));
    assert_eq!(vmm.line("disk "), "disk paused P 1");
    assert_eq!(vmm.ask(&Request::Pause, &[]), Ok(Reply::Done));
    assert_eq!(detach(&mut vmm, "early"), Ok(Reply::Done));
    assert_eq!(vmm.ask(&Request::Resume, &[]), Ok(Reply::Done));
    assert_eq!(vmm.event(), detached("early"));
    vmm.line("gone ");
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_guest_that_refuses_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let mut vmm = Vmm::spawn();
    let refuses = Guest {
        cmdline: "quiet acpiphp.disable=1",
        ..EAGER
    };
    assert_eq!(
        vmm.start(refuses, &[&disk(dir.path(), "boot")]),
        Ok(Reply::Done)
    );
    vmm.line("ready for devices");
    vmm.line("disk disk-0");
    let file = disk(dir.path(), "more");
    for _ in 0..3 {
        assert_eq!(detach(&mut vmm, "disk-0"), Ok(Reply::Done));
        let taken = attach(&mut vmm, "disk-0", block("more"), file.as_fd()).unwrap_err();
        assert!(taken.contains("two devices are called"), "{taken}");
    }
    let attached = attach(&mut vmm, "more", block("more"), file.as_fd());
    assert_eq!(attached, Ok(Reply::Done));
    assert_eq!(vmm.ask(&Request::Pause, &[]), Ok(Reply::Done));
    assert_eq!(vmm.ask(&Request::Resume, &[]), Ok(Reply::Done));
    let stats = vmm.ask(&Request::Stats, &[]).unwrap();
    assert!(matches!(stats, Reply::Stats(Stats { exits: 1.., .. })));
    assert_eq!(vmm.ask(&Request::Stop, &[]), Ok(Reply::Done));
    assert_eq!(vmm.hear(), None, "nothing was let go");
    assert!(vmm.child.wait().unwrap().success());
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_guest_that_ejects_everything_all_the_time_loses_what_it_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut vmm = Vmm::spawn();
    let hostile = Guest {
        test: "eject",
        cmdline: "quiet acpiphp.disable=1",
        vcpus: 2,
        ..EAGER
    };
    let (a, b) = (disk(dir.path(), "A"), disk(dir.path(), "B"));
    assert_eq!(vmm.start(hostile, &[&a, &b]), Ok(Reply::Done));
    assert_eq!(vmm.line("ejects "), "ejects and reads well");
    let before = holds(&vmm);
    assert_eq!(detach(&mut vmm, "disk-0"), Ok(Reply::Done));
    assert_eq!(vmm.event(), detached("disk-0"));
    for n in 0..TURNS {
        let (kept, goes) = (format!("kept-{n}"), format!("goes-{n}"));
        if n < 5 {
            let attached = attach(&mut vmm, &kept, block(&kept), a.as_fd());
            assert_eq!(attached, Ok(Reply::Done));
        }
        let attached = attach(&mut vmm, &goes, block(&goes), a.as_fd());
        assert_eq!(attached, Ok(Reply::Done));
        assert_eq!(detach(&mut vmm, &goes), Ok(Reply::Done));
        assert_eq!(vmm.event(), detached(&goes));
    }
    // What was kept is there, and so is what the guest booted with.
    for name in ["kept-0", "kept-4", "disk-1"] {
        let taken = attach(&mut vmm, name, block("more"), a.as_fd()).unwrap_err();
        assert!(taken.contains("two devices are called"), "{taken}");
    }
    // The first of those that go found a thread that was idle.
    assert_eq!(holds(&vmm).1, before.1 + 5);
    assert_eq!(vmm.ask(&Request::Stop, &[]), Ok(Reply::Done));
    assert!(vmm.child.wait().unwrap().success());
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_device_goes_in_the_middle_of_its_work() {
    let dir = tempfile::tempdir().unwrap();
    let mut vmm = Vmm::spawn();
    let busy = Guest {
        test: "busy",
        vcpus: 2,
        ..EAGER
    };
    assert_eq!(vmm.start(busy, &[]), Ok(Reply::Done));
    vmm.line("ready for devices");
    let (before, _) = holds(&vmm);
    for n in 0..5 {
        let name = format!("busy-{n}");
        let file = disk(dir.path(), &name);
        let attached = attach(&mut vmm, &name, block(&name), file.as_fd());
        assert_eq!(attached, Ok(Reply::Done));
        vmm.line("busy ");
        assert_eq!(detach(&mut vmm, &name), Ok(Reply::Done));
        assert_eq!(vmm.event(), detached(&name));
        vmm.line("broke off ");
        assert_eq!(holds(&vmm).0, before);
    }
    let message = vmm.ask(&Request::Stop, &[]);
    assert_eq!(message, Ok(Reply::Done));
    assert!(!matches!(vmm.hear(), Some(Message::Event(Event::Ended(_)))));
}
