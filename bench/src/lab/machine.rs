//! A guest on either monitor, started as its driver in the product starts it, but
//! by hand: no supervisor stands between the exec and the clock.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use walnut_vmm_api::{
    Attachment, Backing, Channel, Config, Device, FdIndex, Jail, Limits, Message, Received, Reply,
    Request, Stats, VERSION, pair,
};

use crate::clock;

/// Guest memory, bytes; what `walnut run` gives by default.
const MEMORY: u64 = 512 << 20;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// Who runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Monitor {
    Walnut,
    Qemu,
}

impl Monitor {
    pub(crate) const BOTH: [Self; 2] = [Self::Walnut, Self::Qemu];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Walnut => "walnut-vmm",
            Self::Qemu => "qemu",
        }
    }
}

/// What the guest is made of.
#[derive(Debug, Clone)]
pub(crate) struct Guest<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    /// What the kernel is told beyond the driver's own words.
    pub(crate) words: String,
    pub(crate) disk: Option<&'a Path>,
    pub(crate) tap: Option<&'a File>,
    /// A directory for vsock's sockets.
    pub(crate) vsock: Option<&'a Path>,
}

/// A guest that runs.
#[derive(Debug)]
pub(crate) struct Running {
    /// When the monitor was executed.
    pub(crate) spawned: u64,
    monitor: Child,
    vsock: Option<Child>,
    control: Option<Channel>,
    console: Option<File>,
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in std::iter::once(&mut self.monitor).chain(&mut self.vsock) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The descriptors of the first request.
#[derive(Default)]
struct Fds(Vec<OwnedFd>);

impl Fds {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> Result<FdIndex> {
        let index = FdIndex(u8::try_from(self.0.len())?);
        self.0.push(fd.into());
        Ok(index)
    }
}

/// Lets `command`'s process keep a descriptor, under the same number.
fn inherit(command: &mut Command, fd: RawFd) {
    // SAFETY: fcntl is async-signal-safe, and the descriptor outlives the spawn.
    unsafe {
        command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
}

impl Guest<'_> {
    pub(crate) fn start(&self, monitor: Monitor) -> Result<Running> {
        let (console, to_console) = std::io::pipe()?;
        let console = OwnedFd::from(console).into();
        match monitor {
            Monitor::Walnut => self.on_walnut(console, to_console.into()),
            Monitor::Qemu => self.on_qemu(console, to_console.into()),
        }
    }

    fn devices(&self, fds: &mut Fds) -> Result<Vec<Attachment>> {
        let mut devices = Vec::new();
        let mut add = |name: &str, device| {
            devices.push(Attachment {
                name: name.to_owned(),
                device,
            });
        };
        if let Some(dir) = self.vsock {
            add(
                "vsock",
                Device::Vsock {
                    cid: 3,
                    dir: fds.add(File::open(dir)?)?,
                    name: "sock".to_owned(),
                },
            );
        }
        if let Some(disk) = self.disk {
            add(
                "disk",
                Device::Block {
                    serial: "disk".to_owned(),
                    read_only: true,
                    file: fds.add(File::open(disk)?)?,
                    queues: 1,
                    limits: Limits::default(),
                },
            );
        }
        if let Some(tap) = self.tap {
            add(
                "net",
                Device::Net {
                    taps: vec![fds.add(tap.try_clone()?)?],
                    mac: MAC,
                    mtu: None,
                    only_own_mac: false,
                    receive: Limits::default(),
                    send: Limits::default(),
                },
            );
        }
        add("rng", Device::Rng);
        add("balloon", Device::Balloon);
        Ok(devices)
    }

    fn on_walnut(&self, console: File, to_console: OwnedFd) -> Result<Running> {
        let mut fds = Fds::default();
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let config = Config {
            version: VERSION,
            kvm: fds.add(kvm)?,
            vcpus: 1,
            max_vcpus: 1,
            memory: MEMORY,
            max_memory: MEMORY,
            backing: Backing::default(),
            kernel: fds.add(File::open(self.kernel)?)?,
            initramfs: Some(fds.add(File::open(self.initramfs)?)?),
            cmdline: format!(
                "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable random.trust_cpu=on \
                 fb_tunnels=none dummy.numdummies=0 {}",
                self.words
            ),
            console: Some(fds.add(to_console)?),
            devices: self.devices(&mut fds)?,
            jail: Jail::Full { user: Some(65534) },
        };
        let (ours, theirs) = pair()?;
        let theirs = OwnedFd::from(theirs);
        let mut command = Command::new("out/lib/walnut/walnut-vmm");
        command.args(["--control-fd", &theirs.as_raw_fd().to_string()]);
        inherit(&mut command, theirs.as_raw_fd());
        let spawned = clock();
        let child = command.stdin(Stdio::null()).spawn()?;
        let running = Running {
            spawned,
            monitor: child,
            vsock: None,
            control: Some(ours),
            console: Some(console),
        };
        drop(theirs);
        let borrowed: Vec<BorrowedFd<'_>> = fds.0.iter().map(AsFd::as_fd).collect();
        running.ask(&Request::Start(Box::new(config)), &borrowed)?;
        Ok(running)
    }

    fn on_qemu(&self, console: File, to_console: OwnedFd) -> Result<Running> {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"])
            .args(["-machine", "microvm,acpi=off,pit=on,pic=on,rtc=on,pcie=off,usb=off,isa-serial=on,\
                    x-option-roms=off,auto-kernel-cmdline=on,dump-guest-core=off,memory-backend=mem"])
            .args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-bios", "qboot.rom"])
            .args(["-m", &format!("{}M", MEMORY >> 20)])
            .args(["-object", &format!("memory-backend-memfd,id=mem,size={MEMORY},share=on")])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-device", "virtio-balloon-device,free-page-reporting=on"])
            .args(["-object", "rng-builtin,id=rng"])
            .args(["-device", "virtio-rng-device,rng=rng"])
            .arg("-kernel").arg(self.kernel)
            .arg("-initrd").arg(self.initramfs)
            .args(["-chardev", "stdio,id=console,signal=off,mux=off", "-serial", "chardev:console"])
            .args(["-append", &format!(
                "console=ttyS0 quiet panic=-1 reboot=t no_timer_check tsc=reliable \
                 random.trust_cpu=on acpi=off pci=off fb_tunnels=none dummy.numdummies=0 {}",
                self.words
            )]);
        if let Some(disk) = self.disk {
            command
                .args([
                    "-blockdev",
                    &format!(
                        "driver=raw,node-name=disk,read-only=on,file.driver=file,file.filename={},\
                     file.read-only=on,file.locking=off",
                        disk.display()
                    ),
                ])
                .args(["-device", "virtio-blk-device,drive=disk,serial=disk"]);
        }
        if let Some(tap) = self.tap {
            let fd = tap.as_raw_fd();
            inherit(&mut command, fd);
            let [.., last] = MAC;
            command
                .args(["-netdev", &format!("tap,id=net,fd={fd},vhost=off")])
                .args([
                    "-device",
                    &format!("virtio-net-device,netdev=net,mac=02:00:00:00:00:{last:02x}"),
                ]);
        }
        let mut vsock = None;
        if let Some(dir) = self.vsock {
            vsock = Some(
                Command::new("out/lib/walnut/walnut-vsock")
                    .arg("--vhost-socket")
                    .arg(dir.join("vhost"))
                    .arg("--uds")
                    .arg(dir.join("sock"))
                    .spawn()?,
            );
            while !dir.join("vhost").exists() {
                std::thread::yield_now();
            }
            command
                .args([
                    "-chardev",
                    &format!("socket,id=vsock,path={}", dir.join("vhost").display()),
                ])
                .args(["-device", "vhost-user-vsock-device,chardev=vsock"]);
        }
        command.stdin(Stdio::null()).stdout(to_console);
        let spawned = clock();
        let monitor = command.spawn()?;
        Ok(Running {
            spawned,
            monitor,
            vsock,
            control: None,
            console: Some(console),
        })
    }
}

impl Running {
    pub(crate) fn process(&self) -> PathBuf {
        format!("/proc/{}", self.monitor.id()).into()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.monitor.id()
    }

    fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        let control = self.control.as_ref().context("only walnut-vmm is asked")?;
        control.send(request, fds)?;
        loop {
            let received: Option<Received<Message>> = control.receive()?;
            match received.context("walnut-vmm broke off")?.message {
                Message::Reply(Ok(reply)) => return Ok(reply),
                Message::Reply(Err(reason)) => bail!("walnut-vmm: {reason}"),
                Message::Event(_) => {}
            }
        }
    }

    /// What walnut-vmm counts itself.
    pub(crate) fn stats(&self) -> Result<Stats> {
        match self.ask(&Request::Stats, &[])? {
            Reply::Stats(stats) => Ok(stats),
            other => bail!("{other:?} in answer to a question for statistics"),
        }
    }

    /// The lines of the console. Once.
    pub(crate) fn lines(&mut self) -> Result<impl Iterator<Item = String> + use<>> {
        let console = self.console.take().context("the console is being read")?;
        Ok(BufReader::new(console)
            .split(b'\n')
            .map_while(|line| line.ok())
            .map(|line| String::from_utf8_lossy(&line).trim_end().to_owned()))
    }
}

/// A tap of that name with one queue, which virtio-net's headers cross.
pub(crate) fn tap(name: &str) -> Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TAP_NO_PI_VNET_HDR: u16 = 0x0002 | 0x1000 | 0x4000;
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("open /dev/net/tun")?;
    // struct ifreq: a name of 16 bytes, then the flags.
    let mut request = [0; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&TAP_NO_PI_VNET_HDR.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` has the size of.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } < 0 {
        return Err(std::io::Error::last_os_error()).context("make a tap");
    }
    // Neither monitor may wait for it.
    // SAFETY: fcntl on a descriptor that we own.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    for words in [
        ["addr", "add", "10.9.0.1/24", "dev", name].as_slice(),
        &["link", "set", name, "up"],
    ] {
        let status = Command::new("ip").args(words).status().context("run ip")?;
        if !status.success() {
            bail!("ip {}: {status}", words.join(" "));
        }
    }
    Ok(file)
}
