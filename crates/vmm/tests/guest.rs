//! The VMM with a real kernel, on real KVM. Where there is none these tests run in
//! the lab: `tests/lab/README.md`.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use walnut_initramfs::Archive;
use walnut_vmm_api::{
    Attachment, Backing, Channel, Config, Device, End, Event, FdIndex, Jail, Limits, Message,
    Received, Reply, Request, VERSION, pair,
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

/// A VMM, and what it needs to be told.
struct Vmm {
    child: Child,
    control: Channel,
    console: File,
}

/// An init that does what the kernel command line's `test=` says.
fn initramfs() -> PathBuf {
    // Of the process, because tests may run beside each other.
    let name = format!("vmm-guest-{}", std::process::id());
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let init = dir.join("init");
    let source = repository().join("crates/vmm/tests/guest/init.c");
    let status = Command::new("cc")
        .args(["-static", "-Os", "-Wall", "-o"])
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

impl Vmm {
    fn spawn() -> Self {
        let (ours, theirs) = pair().unwrap();
        let theirs: OwnedFd = theirs.into();
        nix::fcntl::fcntl(
            &theirs,
            nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
        )
        .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_walnut-vmm"))
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            child,
            control: ours,
            console: File::open("/dev/null").unwrap(),
        }
    }

    fn start(&mut self, test: &str, vcpus: u8) -> Result<Reply, String> {
        self.start_with(test, vcpus, &[])
    }

    /// With disks, the first of which is read-only.
    fn start_with(&mut self, test: &str, vcpus: u8, disks: &[&File]) -> Result<Reply, String> {
        let kernel = File::open(repository().join("out/lib/walnut/vmlinux")).unwrap();
        let initramfs = File::open(initramfs()).unwrap();
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .unwrap();
        let (console, to_console) = std::io::pipe().unwrap();
        self.console = OwnedFd::from(console).into();
        let config = Config {
            version: VERSION,
            kvm: FdIndex(0),
            vcpus,
            max_vcpus: vcpus,
            memory: 128 << 20,
            max_memory: 128 << 20,
            backing: Backing::default(),
            kernel: FdIndex(1),
            initramfs: Some(FdIndex(2)),
            cmdline: format!("console=ttyS0 panic=-1 reboot=t test={test}"),
            console: Some(FdIndex(3)),
            devices: (0..disks.len())
                .map(|n| Attachment {
                    name: format!("disk-{n}"),
                    device: Device::Block {
                        serial: format!("disk-{n}"),
                        read_only: n == 0,
                        file: FdIndex(u8::try_from(4 + n).unwrap()),
                        queues: 1,
                        limits: Limits::default(),
                    },
                })
                .collect(),
            jail: if std::env::var_os("NOJAIL").is_some() {
                Jail::Off
            } else {
                Jail::Full { user: None }
            },
        };
        let mut fds: Vec<BorrowedFd<'_>> = vec![
            kvm.as_fd(),
            kernel.as_fd(),
            initramfs.as_fd(),
            to_console.as_fd(),
        ];
        fds.extend(disks.iter().map(|disk| disk.as_fd()));
        self.ask(&Request::Start(Box::new(config)), &fds)
    }

    fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, String> {
        self.control.send(request, fds).unwrap();
        match self.hear() {
            Some(Message::Reply(reply)) => reply,
            other => panic!("no reply, but {other:?}"),
        }
    }

    fn hear(&self) -> Option<Message> {
        let received: Option<Received<Message>> = self.control.receive().unwrap();
        received.map(|r| r.message)
    }

    fn console(&mut self) -> String {
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            let n = self.console.read(&mut chunk).unwrap();
            if n == 0 {
                break String::from_utf8_lossy(&text).into_owned();
            }
            // Seen with --nocapture, should the guest hang.
            print!("{}", String::from_utf8_lossy(&chunk[..n]));
            text.extend(&chunk[..n]);
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn boots_prints_and_resets() {
    for vcpus in [1, 2] {
        let mut vmm = Vmm::spawn();
        assert_eq!(vmm.start("hello", vcpus), Ok(Reply::Done));
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
    assert_eq!(vmm.start_with("disks", 1, &[&a, &b]), Ok(Reply::Done));
    let console = vmm.console();
    let end = vmm.hear();
    assert!(console.contains("disk-0 A 0"), "{end:?} {console}");
    assert!(console.contains("disk-1 B 1"), "{end:?} {console}");
    assert_eq!(end, Some(Message::Event(Event::Ended(End::Reset))));
    assert_eq!(std::fs::read(dir.path().join("A")).unwrap()[0], b'A');
    assert_eq!(std::fs::read(dir.path().join("B")).unwrap()[0], b'W');
}
