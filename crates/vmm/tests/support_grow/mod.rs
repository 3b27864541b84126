//! Guests of any size and with any devices, which say on their console how far they
//! are (`tests/guest/grow.c`).

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "each test program uses a part; a test says so by panicking"
)]

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::PathBuf,
};

use walnut_vmm_api::{
    Attachment, Backing, Config, Device, End, Event, FdIndex, Jail, Limits, Message, Reply,
    Request, Restore, Stats, VERSION,
};

use crate::support::{Vmm, repository};

/// The initramfs with `grow.c` as its init.
fn initramfs() -> PathBuf {
    crate::support::initramfs::initramfs("guest/grow.c", &["-pthread"])
}

/// A machine to be started.
pub(crate) struct Spec {
    /// What `test=` is, and more words for the guest.
    pub(crate) words: String,
    pub(crate) kernel: PathBuf,
    pub(crate) vcpus: u8,
    pub(crate) max_vcpus: u8,
    pub(crate) memory: u64,
    pub(crate) max_memory: u64,
    pub(crate) backing: Backing,
    fds: Vec<OwnedFd>,
    devices: Vec<Attachment>,
}

impl Spec {
    /// One vCPU, 128 MiB, no devices.
    pub(crate) fn new(words: &str) -> Self {
        Self {
            words: words.to_owned(),
            kernel: repository().join("out/lib/walnut/vmlinux"),
            vcpus: 1,
            max_vcpus: 1,
            memory: 128 << 20,
            max_memory: 128 << 20,
            backing: Backing::default(),
            fds: Vec::new(),
            devices: Vec::new(),
        }
    }

    /// A descriptor of the first request.
    pub(crate) fn fd(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.fds.push(fd.into());
        FdIndex(u8::try_from(self.fds.len() - 1).unwrap())
    }

    pub(crate) fn device(&mut self, name: &str, device: Device) {
        self.devices.push(Attachment {
            name: name.to_owned(),
            device,
        });
    }

    /// A disk, and how to make it.
    pub(crate) fn disk(&mut self, name: &str, file: &File, queues: u16, limits: Limits) {
        let file = self.fd(file.try_clone().unwrap());
        self.device(
            name,
            Device::Block {
                serial: name.to_owned(),
                read_only: false,
                file,
                queues,
                limits,
            },
        );
    }

    /// The disk on which the host tells the guest to go on: the guest's first.
    pub(crate) fn bell(&mut self) -> Bell {
        assert!(self.devices.is_empty());
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        self.disk("bell", &file, 1, Limits::default());
        Bell(file)
    }

    /// Starts it, or says why not.
    pub(crate) fn try_start(mut self) -> Result<Guest, String> {
        let mut vmm = Vmm::spawn();
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .unwrap();
        let kvm = self.fd(kvm);
        let kernel = self.fd(File::open(&self.kernel).unwrap());
        let initramfs = self.fd(File::open(initramfs()).unwrap());
        let (console, to_console) = std::io::pipe().unwrap();
        vmm.console = OwnedFd::from(console).into();
        let to_console = self.fd(to_console);
        let jail = match std::env::var_os("NOJAIL") {
            Some(_) => Jail::Off,
            None => Jail::Full { user: None },
        };
        let config = Config {
            version: VERSION,
            kvm,
            vcpus: self.vcpus,
            max_vcpus: self.max_vcpus,
            memory: self.memory,
            max_memory: self.max_memory,
            backing: self.backing,
            kernel,
            initramfs: Some(initramfs),
            cmdline: format!(
                "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable {}",
                self.words
            ),
            console: Some(to_console),
            devices: self.devices,
            jail,
        };
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        vmm.ask(&Request::Start(Box::new(config)), &fds)?;
        Ok(Guest {
            vmm,
            said: String::new(),
            read: 0,
        })
    }

    pub(crate) fn start(self) -> Guest {
        self.try_start().unwrap()
    }

    /// Goes on from a snapshot, which says all but what the devices are.
    pub(crate) fn try_restore(mut self, from: &Files) -> Result<Guest, String> {
        let mut vmm = Vmm::spawn();
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let kvm = self.fd(kvm.unwrap());
        let [state, memory] = [&from.state, &from.memory].map(|file| file.try_clone().unwrap());
        let (state, memory) = (self.fd(state), self.fd(memory));
        let (console, to_console) = std::io::pipe().unwrap();
        vmm.console = OwnedFd::from(console).into();
        let console = Some(self.fd(to_console));
        let request = Restore {
            version: VERSION,
            kvm,
            state,
            memory,
            backing: self.backing,
            console,
            devices: self.devices,
            jail: Jail::Full { user: None },
            run: true,
        };
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        vmm.ask(&Request::Restore(Box::new(request)), &fds)?;
        Ok(Guest {
            vmm,
            said: String::new(),
            read: 0,
        })
    }
}

/// The two files of a snapshot.
pub(crate) struct Files {
    pub(crate) state: File,
    pub(crate) memory: File,
}

/// How the host tells the guest to go on.
pub(crate) struct Bell(File);

impl Bell {
    /// Says one byte.
    pub(crate) fn say(&self, what: u8) {
        self.0.write_all_at(&[what], 0).unwrap();
    }
}

/// A running machine.
pub(crate) struct Guest {
    pub(crate) vmm: Vmm,
    said: String,
    /// How much of that was looked at.
    read: usize,
}

impl Guest {
    /// The next line of the console that has `words` in it.
    pub(crate) fn line(&mut self, words: &str) -> String {
        loop {
            while let Some(end) = self.said[self.read..].find('\n') {
                let line = self.said[self.read..self.read + end].trim().to_owned();
                self.read += end + 1;
                if line.contains("FAILED") || line.contains("Kernel panic") {
                    panic!("{}", self.said);
                }
                if line.contains(words) {
                    return line;
                }
            }
            let mut chunk = [0; 4096];
            let n = self.vmm.console.read(&mut chunk).unwrap();
            if n == 0 {
                let end = self.vmm.hear();
                panic!(
                    "the guest ended before it said {words:?}: {end:?}\n{}",
                    self.said
                );
            }
            print!("{}", String::from_utf8_lossy(&chunk[..n]));
            self.said
                .push_str(&String::from_utf8_lossy(&chunk[..n]).replace('\r', ""));
        }
    }

    /// It ends by itself, as it should.
    pub(crate) fn ends(mut self) {
        self.line("done");
        let console = self.vmm.console();
        let end = self.vmm.hear();
        assert_eq!(
            end,
            Some(Message::Event(Event::Ended(End::Reset))),
            "{}{console}",
            self.said
        );
        assert!(self.vmm.child.wait().unwrap().success());
    }

    pub(crate) fn stats(&self) -> Stats {
        match self.vmm.ask(&Request::Stats, &[]) {
            Ok(Reply::Stats(stats)) => stats,
            other => panic!("{other:?}"),
        }
    }

    /// What of the process is in memory, by its share in each page, in KiB.
    pub(crate) fn pss(&self) -> u64 {
        let file = format!("/proc/{}/smaps_rollup", self.pid());
        let text = std::fs::read_to_string(file).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = line.unwrap().split_whitespace().next().unwrap();
        kib.parse().unwrap()
    }

    pub(crate) fn resize(&self, memory: u64) -> Result<Reply, String> {
        self.vmm.ask(&Request::Resize { memory }, &[])
    }

    /// Saves it as it is now, and lets it go on.
    pub(crate) fn save(&self) -> Files {
        let [state, memory] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let request = Request::Snapshot {
            state: FdIndex(0),
            memory: FdIndex(1),
        };
        assert_eq!(self.vmm.ask(&Request::Pause, &[]), Ok(Reply::Done));
        let saved = self.vmm.ask(&request, &[state.as_fd(), memory.as_fd()]);
        assert_eq!(saved, Ok(Reply::Done));
        assert_eq!(self.vmm.ask(&Request::Resume, &[]), Ok(Reply::Done));
        Files { state, memory }
    }

    /// Ends it.
    pub(crate) fn stop(mut self) {
        assert_eq!(self.vmm.ask(&Request::Stop, &[]), Ok(Reply::Done));
        assert!(self.vmm.child.wait().unwrap().success());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.vmm.child.id()
    }
}

/// The number after a word of a line.
pub(crate) fn number(line: &str, word: &str) -> f64 {
    let mut words = line.split_whitespace();
    words.find(|it| *it == word).unwrap();
    words.next().unwrap().parse().unwrap()
}
