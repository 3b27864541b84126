//! A VMM, and what it needs to be told.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "each test program uses a part; a test says so by panicking"
)]

pub(crate) mod initramfs;
pub(crate) mod share;

use std::{
    cell::RefCell,
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use initramfs::initramfs;
use walnut_vmm_api::{
    Attachment, Backing, Channel, Config, Device, Event, FdIndex, Jail, Limits, Message, Received,
    Reply, Request, VERSION, pair,
};

/// Longest a word is waited for, in milliseconds: a test that would never end says where.
const PATIENCE: i32 = 600_000;

/// Waits until there is something to read.
fn patiently(whom: &str, from: &impl AsFd) {
    let mut fds = [libc::pollfd {
        fd: from.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }];
    // SAFETY: `fds` is one entry, and the descriptor is open.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), 1, PATIENCE) };
    assert!(ready != 0, "{whom} says nothing");
}

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

/// A VMM, and what it needs to be told.
pub(crate) struct Vmm {
    pub(crate) child: Child,
    pub(crate) control: Channel,
    pub(crate) console: File,
    /// What the guest has said and nobody has waited for.
    unheard: Vec<u8>,
    /// Events that came while something else was waited for.
    events: RefCell<Vec<Event>>,
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

impl Vmm {
    pub(crate) fn spawn() -> Self {
        let (ours, theirs) = pair().unwrap();
        let theirs: OwnedFd = theirs.into();
        nix::fcntl::fcntl(
            &theirs,
            nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
        )
        .unwrap();
        // The product's: static, and built by scripts/build.sh as the kernel is.
        let child = Command::new(repository().join("out/lib/walnut/walnut-vmm"))
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            child,
            control: ours,
            console: File::open("/dev/null").unwrap(),
            unheard: Vec::new(),
            events: RefCell::default(),
        }
    }

    /// With disks, the first of which is read-only.
    pub(crate) fn start(&mut self, guest: Guest<'_>, disks: &[&File]) -> Result<Reply, String> {
        let disks: Vec<_> = (disks.iter().enumerate())
            .map(|(n, disk)| (*disk, n == 0))
            .collect();
        self.start_disks(guest, &disks)
    }

    /// With disks, each read-only or not.
    pub(crate) fn start_disks(
        &mut self,
        guest: Guest<'_>,
        disks: &[(&File, bool)],
    ) -> Result<Reply, String> {
        let Guest {
            test,
            cmdline,
            vcpus,
            shared,
        } = guest;
        let kernel = File::open(repository().join("out/lib/walnut/vmlinux")).unwrap();
        let initramfs = File::open(initramfs("guest/init.c", &[])).unwrap();
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
                        read_only: disks[n].1,
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
        fds.extend(disks.iter().map(|(disk, _)| disk.as_fd()));
        self.ask(&Request::Start(Box::new(config)), &fds)
    }

    pub(crate) fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, String> {
        self.control.send(request, fds).unwrap();
        loop {
            match self.hear() {
                Some(Message::Reply(reply)) => return reply,
                Some(Message::Event(event)) => self.events.borrow_mut().push(event),
                None => panic!("no reply"),
            }
        }
    }

    pub(crate) fn hear(&self) -> Option<Message> {
        patiently("the monitor", &self.control);
        let received: Option<Received<Message>> = self.control.receive().unwrap();
        received.map(|r| r.message)
    }

    /// The next event.
    pub(crate) fn event(&mut self) -> Option<Event> {
        let events = self.events.get_mut();
        if !events.is_empty() {
            return Some(events.remove(0));
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

    /// Reads the console until what it said since the last call holds what is looked
    /// for.
    pub(crate) fn console_until(&mut self, found: impl Fn(&str) -> bool) -> String {
        let mut text = std::mem::take(&mut self.unheard);
        let mut chunk = [0; 4096];
        loop {
            let said = String::from_utf8_lossy(&text);
            if found(&said) {
                return said.into_owned();
            }
            patiently(&format!("the guest after {said:?}"), &self.console);
            let n = self.console.read(&mut chunk).unwrap();
            assert!(n > 0, "the console ended: {said}");
            print!("{}", String::from_utf8_lossy(&chunk[..n]));
            text.extend(&chunk[..n]);
        }
    }

    /// All that the guest says until its end.
    pub(crate) fn console(&mut self) -> String {
        let mut text = std::mem::take(&mut self.unheard);
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
