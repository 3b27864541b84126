//! A machine with every device there is, whose guest keeps all of them busy.

#[path = "../support/initramfs.rs"]
mod initramfs;

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::chown,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
};

use initramfs::initramfs;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use walnut_vmm_api::{
    Attachment, Backing, Bucket, Channel, Config, Device, Event, FdIndex, Jail, Limits, Message,
    Reply, Request, VERSION, pair,
};

/// The user that the process becomes.
pub(crate) const USER: u32 = 123_456;
/// The guest connects to this port of the host's, and listens on that.
const TO_HOST: u32 = 5000;
const TO_GUEST: u32 = 6000;
const VIRTIOFSD: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn product(name: &str) -> PathBuf {
    repository().join("out/lib/walnut").join(name)
}

pub(crate) struct Machine {
    /// strace, or the VMM itself.
    child: Child,
    traced: bool,
    control: Channel,
    virtiofsd: Option<Child>,
    kind: Kind,
    dir: TempDir,
}

fn inherited(fd: &impl AsFd) -> String {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    fd.as_fd().as_raw_fd().to_string()
}

/// virtiofsd with a directory to share, and a connection to it.
fn virtiofsd(dir: &Path) -> (Child, UnixStream) {
    let program = VIRTIOFSD.iter().find(|path| fs::exists(path).unwrap());
    let program = program.expect("virtiofsd must be installed");
    let (shared, path) = (dir.join("shared"), dir.join("virtiofsd"));
    fs::create_dir(&shared).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let fd = inherited(&listener);
    let source = shared.to_str().unwrap();
    let mut command = Command::new(program);
    if program.contains("qemu") {
        command.args(["-f", &format!("--fd={fd}"), "-o"]);
        command.arg(format!("source={source},sandbox=chroot,log_level=err"));
    } else {
        command.args([format!("--fd={fd}"), format!("--shared-dir={source}")]);
        command.args(["--sandbox=chroot", "--log-level=error"]);
    }
    let child = command.stdin(Stdio::null()).spawn().unwrap();
    (child, UnixStream::connect(path).unwrap())
}

/// A tap that the host answers on.
fn tap() -> File {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // struct ifreq: the name, then IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"jail");
    request[16..18].copy_from_slice(&0x5002u16.to_ne_bytes());
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    // The machine before may still be on its way out, with its end of it.
    loop {
        // SAFETY: the call takes a struct ifreq, of 40 bytes.
        let made = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
        match Errno::result(made) {
            Err(Errno::EBUSY) => thread::sleep(std::time::Duration::from_millis(50)),
            other => {
                other.unwrap();
                break;
            }
        }
    }
    for words in ["addr add 10.9.9.1/24 dev jail", "link set jail up"] {
        let mut command = Command::new("busybox");
        let status = command.arg("ip").args(words.split(' ')).status().unwrap();
        assert!(status.success(), "ip {words}");
    }
    tap
}

/// Limits that limit nothing, but must be asked: for that, devices look at the clock.
fn limits() -> Limits {
    Limits {
        bytes: None,
        operations: Some(Bucket {
            size: 1_000_000,
            burst: 0,
            refill_ms: 100,
        }),
    }
}

/// What is tried of a machine.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Everything,
    Saved,
    Growing { shared: bool },
}

/// The descriptors of the first request.
#[derive(Default)]
struct Fds(Vec<OwnedFd>);

impl Fds {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        FdIndex(u8::try_from(self.0.len() - 1).unwrap())
    }
}

impl Machine {
    /// A machine whose process nobody looks at, at work.
    pub(crate) fn plain() -> Self {
        Self::start(false, Kind::Everything)
    }

    /// A machine whose calls are written to [`Self::trace`].
    pub(crate) fn traced() -> Self {
        Self::start(true, Kind::Everything)
    }

    /// As [`Self::traced`], without a shared file system: it can be saved.
    pub(crate) fn traced_to_be_saved() -> Self {
        Self::start(true, Kind::Saved)
    }

    /// As [`Self::traced`], with memory that grows, which excludes a shared file system.
    pub(crate) fn traced_and_growing(shared: bool) -> Self {
        Self::start(true, Kind::Growing { shared })
    }

    fn start(traced: bool, kind: Kind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = pair().unwrap();
        let theirs = OwnedFd::from(theirs);
        let mut command = Command::new(if traced {
            "strace".into()
        } else {
            product("walnut-vmm")
        });
        if traced {
            // The second disk finds no io_uring.
            let injection = "inject=io_uring_setup:error=ENOSYS:when=2+";
            command.args(["-f", "-q", "-e", injection, "-o"]);
            command.args([dir.path().join("trace"), product("walnut-vmm")]);
        }
        let child = command
            .args(["--control-fd", &inherited(&theirs)])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        drop(theirs);
        let shares = matches!(kind, Kind::Everything);
        let (virtiofsd, share) = shares.then(|| virtiofsd(dir.path())).unzip();
        let mut machine = Self {
            child,
            traced,
            control: ours,
            virtiofsd,
            kind,
            dir,
        };
        machine.build(share);
        machine
    }

    fn build(&mut self, share: Option<UnixStream>) {
        let mut fds = Fds::default();
        let (console, to_console) = std::io::pipe().unwrap();
        let config = self.config(share, to_console.into(), &mut fds);
        let start = Request::Start(Box::new(config));
        let borrowed: Vec<BorrowedFd<'_>> = fds.0.iter().map(AsFd::as_fd).collect();
        self.control.send(&start, &borrowed).unwrap();
        drop(borrowed);
        drop(fds);
        assert_eq!(self.reply(), Ok(Reply::Done));
        let mut console = File::from(OwnedFd::from(console));
        let mut text = Vec::new();
        while !String::from_utf8_lossy(&text).contains("at work") {
            let mut chunk = [0; 4096];
            let n = console.read(&mut chunk).unwrap();
            assert!(n > 0, "{}", String::from_utf8_lossy(&text));
            text.extend(&chunk[..n]);
        }
        thread::spawn(move || std::io::copy(&mut console, &mut std::io::stderr()));
    }

    fn sockets(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    fn config(&self, share: Option<UnixStream>, console: OwnedFd, fds: &mut Fds) -> Config {
        let open = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
        fs::create_dir(self.sockets()).unwrap();
        chown(self.sockets(), Some(USER), Some(USER)).unwrap();
        let port = self.sockets().join(format!("sock_{TO_HOST}"));
        let listener = UnixListener::bind(&port).unwrap();
        chown(port, Some(USER), Some(USER)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read_to_end(&mut Vec::new());
                let _ = stream.write_all(b"bye");
            }
        });
        let mut disk = |name: &str| {
            let path = self.dir.path().join(name);
            fs::write(&path, vec![0; 4 << 20]).unwrap();
            Device::Block {
                serial: name.to_owned(),
                read_only: false,
                file: fds.add(open(&path)),
                queues: 1,
                limits: limits(),
            }
        };
        let (uring, plain) = (disk("uring"), disk("plain"));
        let vsock = Device::Vsock {
            cid: 3,
            dir: fds.add(File::open(self.sockets()).unwrap()),
            name: "sock".to_owned(),
        };
        let net = Device::Net {
            taps: vec![fds.add(tap())],
            mac: [2, 0, 0, 0, 0, 9],
            mtu: None,
            only_own_mac: false,
            receive: limits(),
            send: limits(),
        };
        let mut devices = vec![
            ("uring", uring),
            ("plain", plain),
            ("vsock", vsock),
            ("net", net),
            ("rng", Device::Rng),
            ("balloon", Device::Balloon),
        ];
        if let Some(share) = share {
            let shared = Device::Fs {
                tag: "shared".to_owned(),
                socket: fds.add(share),
            };
            devices.push(("shared", shared));
        }
        Config {
            version: VERSION,
            kvm: fds.add(open(Path::new("/dev/kvm"))),
            vcpus: 1,
            max_vcpus: 1,
            memory: 128 << 20,
            max_memory: match self.kind {
                Kind::Growing { .. } => 256 << 20,
                _ => 128 << 20,
            },
            backing: Backing {
                shared: !matches!(self.kind, Kind::Growing { shared: false }),
                huge_pages: false,
            },
            kernel: fds.add(File::open(product("vmlinux")).unwrap()),
            initramfs: Some(fds.add(File::open(initramfs("jail/init.c", &[])).unwrap())),
            cmdline: "console=ttyS0 quiet panic=-1 reboot=t".to_owned(),
            console: Some(fds.add(console)),
            devices: devices
                .into_iter()
                .map(|(name, device)| Attachment {
                    name: name.to_owned(),
                    device,
                })
                .collect(),
            jail: Jail::Full { user: Some(USER) },
        }
    }

    pub(crate) fn trace(&self) -> PathBuf {
        self.dir.path().join("trace")
    }

    /// The VMM's process.
    pub(crate) fn pid(&self) -> u32 {
        if !self.traced {
            return self.child.id();
        }
        let mut trace = crate::trace::Trace::default();
        trace.read(&self.trace());
        trace.pid().unwrap()
    }

    fn reply(&self) -> Result<Reply, String> {
        loop {
            match self.control.receive().unwrap().map(|it| it.message) {
                Some(Message::Reply(reply)) => return reply,
                Some(Message::Event(Event::Detached { .. })) => {}
                other => panic!("no reply, but {other:?}"),
            }
        }
    }

    pub(crate) fn ask(&self, request: &Request) -> Result<Reply, String> {
        // A descriptor that nobody asked for: it must be let go of.
        let stray = File::open("/dev/null").unwrap();
        self.control.send(request, &[stray.as_fd()]).unwrap();
        self.reply()
    }

    /// Asks for so much memory, and waits until the guest has it.
    pub(crate) fn resize(&self, memory: u64) {
        assert_eq!(self.ask(&Request::Resize { memory }), Ok(Reply::Done));
        loop {
            match self.ask(&Request::Stats) {
                Ok(Reply::Stats(stats)) if stats.memory == memory => return,
                Ok(Reply::Stats(_)) => thread::sleep(std::time::Duration::from_millis(100)),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Saves it, and lets it go on.
    pub(crate) fn save(&self) {
        assert_eq!(self.ask(&Request::Pause), Ok(Reply::Done));
        let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let request = Request::Snapshot {
            state: FdIndex(0),
            memory: FdIndex(1),
        };
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        self.control.send(&request, &fds).unwrap();
        assert_eq!(self.reply(), Ok(Reply::Done));
        assert_eq!(self.ask(&Request::Resume), Ok(Reply::Done));
    }

    /// Does what a host does to a machine, once: pauses it, stops its process, connects.
    pub(crate) fn stir(&self) {
        assert_eq!(self.ask(&Request::Pause), Ok(Reply::Done));
        assert_eq!(self.ask(&Request::Resume), Ok(Reply::Done));
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap());
        kill(pid, Signal::SIGSTOP).unwrap();
        kill(pid, Signal::SIGCONT).unwrap();
        let mut stream = UnixStream::connect(self.sockets().join("sock")).unwrap();
        let words = format!("CONNECT {TO_GUEST}\nhello");
        stream.write_all(words.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with("bye"), "{answer}");
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in [&mut self.child].into_iter().chain(&mut self.virtiofsd) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
