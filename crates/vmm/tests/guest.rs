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
    Channel, Config, End, Event, FdIndex, Jail, Message, Received, Reply, Request, VERSION, pair,
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
            shared_memory: false,
            kernel: FdIndex(1),
            initramfs: Some(FdIndex(2)),
            cmdline: format!("console=ttyS0 panic=-1 reboot=t test={test}"),
            console: Some(FdIndex(3)),
            devices: Vec::new(),
            jail: Jail::Full { user: None },
        };
        let fds: [BorrowedFd<'_>; 4] = [
            kvm.as_fd(),
            kernel.as_fd(),
            initramfs.as_fd(),
            to_console.as_fd(),
        ];
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
        let mut text = String::new();
        self.console.read_to_string(&mut text).unwrap();
        text
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
