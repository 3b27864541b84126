//! A VMM, and what it needs to be told.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use walnut_initramfs::Archive;
use walnut_vmm_api::{
    Attachment, Backing, Channel, Config, Device, Event, FdIndex, Jail, Limits, Message, Received,
    Reply, Request, VERSION, pair,
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

/// A VMM, and what it needs to be told.
pub(crate) struct Vmm {
    pub(crate) child: Child,
    control: Channel,
    console: File,
    /// What the guest has said and nobody has waited for.
    unheard: Vec<u8>,
    /// Events that came while something else was waited for.
    events: Vec<Event>,
}

/// What a machine is, beyond the usual.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guest<'a> {
    /// What init does.
    pub(crate) test: &'a str,
    /// More of the kernel's command line.
    pub(crate) cmdline: &'a str,
    pub(crate) vcpus: u8,
    /// Whether memory is shared.
    pub(crate) shared: bool,
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
    pub(crate) fn spawn() -> Self {
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
            unheard: Vec::new(),
            events: Vec::new(),
        }
    }

    /// With disks, the first of which is read-only.
    pub(crate) fn start(&mut self, guest: Guest<'_>, disks: &[&File]) -> Result<Reply, String> {
        let Guest {
            test,
            cmdline,
            vcpus,
            shared,
        } = guest;
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
            backing: Backing {
                shared,
                huge_pages: false,
            },
            kernel: FdIndex(1),
            initramfs: Some(FdIndex(2)),
            cmdline: format!("console=ttyS0 panic=-1 reboot=t {cmdline} test={test}"),
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

    pub(crate) fn ask(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, String> {
        // Seen with --nocapture, as the console is.
        println!("> {request:?}");
        self.control.send(request, fds).unwrap();
        loop {
            match self.hear() {
                Some(Message::Reply(reply)) => return reply,
                Some(Message::Event(event)) => self.events.push(event),
                None => panic!("no reply"),
            }
        }
    }

    pub(crate) fn hear(&self) -> Option<Message> {
        let received: Option<Received<Message>> = self.control.receive().unwrap();
        received.map(|r| r.message)
    }

    /// The next event.
    pub(crate) fn event(&mut self) -> Option<Event> {
        if !self.events.is_empty() {
            return Some(self.events.remove(0));
        }
        match self.hear() {
            Some(Message::Event(event)) => Some(event),
            None => None,
            Some(other) => panic!("no event, but {other:?}"),
        }
    }

    /// Reads the console up to a line that contains `words`; that line.
    pub(crate) fn line(&mut self, words: &str) -> String {
        let mut chunk = [0; 4096];
        loop {
            while let Some(end) = self.unheard.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unheard.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if line.contains(words) {
                    return line;
                }
            }
            let n = self.console.read(&mut chunk).unwrap();
            assert!(n > 0, "the guest ended before it said {words:?}");
            print!("{}", String::from_utf8_lossy(&chunk[..n]));
            self.unheard.extend(&chunk[..n]);
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
