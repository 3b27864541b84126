//! The life of one machine on `walnut-vmm`.

use std::{
    fs::{File, OpenOptions},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::{net::UnixStream, sync::watch};
use walnut_vmm_api::{
    self as api, Attachment, Backing, Config, Device, End, FdIndex, Limits, Reply, Request,
};

use super::{Vmm, control::Control};
use crate::{
    Disk, Error, Exit, Heritable, HotPlug, Machine, MachineSpec, Nic, Pause, PlugNics, Pluggable,
    Resize, Share, Snapshot, SnapshotFiles, SpareDisks,
    agent::{self, CONSOLE_MAX, Door, GUEST_CID, host, or_end},
    console,
    files::{self, Files},
    process::{Child, Spawn, Status, Tail, pipe},
    spec,
};

mod takeover;

pub use takeover::State;

/// The directory of the vsock device's sockets, and its own socket's name in it.
const SOCKET_DIR: &str = "vsock";
const SOCKET: &str = "sock";
/// Devices a machine may have; each takes a slot of the PCI bus.
const DEVICES_MAX: usize = 24;

/// A machine of [`Vmm`].
#[derive(Debug)]
pub(super) struct VmmMachine {
    shared: Arc<Shared>,
}

/// What the machine and its supervising task share.
#[derive(Debug)]
struct Shared {
    /// vCPUs that there are.
    vcpus: u32,
    started: Instant,
    door: Door,
    dir: PathBuf,
    vmm: Child,
    /// Queues of a disk.
    queues: u16,
    console: Arc<Tail>,
    control: Control,
    /// The end was asked for.
    stopping: AtomicBool,
    /// What lay in the directory is gone; what lies there now is another machine's.
    cleaned: AtomicBool,
    exit: watch::Sender<Option<Exit>>,
}

/// The descriptors of the first request, in order.
#[derive(Debug, Default)]
struct Fds(Vec<OwnedFd>);

impl Fds {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        let index = u8::try_from(self.0.len()).unwrap_or(u8::MAX);
        self.0.push(fd.into());
        FdIndex(index)
    }
}

/// Whether there is a slot for each device.
pub(super) fn has_slots(spec: &MachineSpec) -> bool {
    spec.disks.len() + spec.shares.len() + spec.nics.len() <= DEVICES_MAX
}

fn check(spec: &MachineSpec) -> Result<(), Error> {
    let problem = spec::problem(spec).or_else(|| {
        // Which of them are the saved machine's nothing would say.
        let spare = usize::try_from(spec.spare_disks).unwrap_or(usize::MAX);
        (spare > 0 && spec.disks.len() > spare).then(|| {
            format!(
                "{} disks were asked for; a machine with spare disks has no others, and room for {spare}",
                spec.disks.len()
            )
        })
    });
    let problem = problem.or_else(|| {
        (!has_slots(spec)).then(|| {
            format!(
                "{} disks, {} shares and {} network interfaces were asked for; there is room for {DEVICES_MAX} devices",
                spec.disks.len(),
                spec.shares.len(),
                spec.nics.len()
            )
        })
    });
    spec::refuse(spec, problem)
}

fn kernel_cmdline(spec: &MachineSpec) -> String {
    let words = [
        "console=ttyS0",
        "quiet",
        "panic=-1",
        "reboot=t",
        "tsc=reliable",
        "random.trust_cpu=on",
        // Links that nobody asked for would show in every container.
        "fb_tunnels=none",
        "dummy.numdummies=0",
    ];
    let own = words.into_iter();
    let words: Vec<_> = own.chain(spec.cmdline.iter().map(String::as_str)).collect();
    words.join(" ")
}

fn open_kvm() -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/kvm")
        .map_err(|source| Error::File {
            what: "open",
            path: "/dev/kvm".into(),
            source,
        })
}

/// Makes `id` the owner of what the VMM must reach as another user.
fn give(path: &Path, id: u32) -> Result<(), Error> {
    std::os::unix::fs::chown(path, Some(id), Some(id)).map_err(|source| Error::File {
        what: "change the owner of",
        path: path.to_owned(),
        source,
    })
}

/// The directory of the vsock device's sockets, which becomes the VMM's root.
fn socket_dir(run_dir: &Path) -> Result<(PathBuf, File), Error> {
    let path = run_dir.join(SOCKET_DIR);
    let error = |what| {
        let path = path.clone();
        move |source| Error::File { what, path, source }
    };
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error("create directory")(e));
        }
        _ => {}
    }
    let dir = File::open(&path).map_err(error("open directory"))?;
    Ok((path, dir))
}

fn attachment(name: &str, device: Device) -> Attachment {
    Attachment {
        name: name.to_owned(),
        device,
    }
}

pub(super) fn fs_name(share: &Share) -> String {
    format!("fs-{}", share.tag)
}

pub(super) fn fs(share: &Share, socket: FdIndex) -> Attachment {
    let device = Device::Fs {
        tag: share.tag.clone(),
        socket,
    };
    attachment(&fs_name(share), device)
}

pub(super) fn block_name(disk: &Disk) -> String {
    format!("disk-{}", disk.serial)
}

pub(super) fn block(disk: &Disk, file: FdIndex, queues: u16) -> Attachment {
    let device = Device::Block {
        serial: disk.serial.clone(),
        read_only: disk.read_only,
        file,
        queues,
        limits: Limits::default(),
    };
    attachment(&block_name(disk), device)
}

pub(super) fn net_name(nic: &Nic) -> String {
    let pairs: Vec<_> = nic.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("net-{}", pairs.concat())
}

pub(super) fn net(nic: &Nic, taps: Vec<FdIndex>) -> Attachment {
    let device = Device::Net {
        taps,
        mac: nic.mac,
        mtu: Some(nic.mtu),
        only_own_mac: true,
        receive: Limits::default(),
        send: Limits::default(),
    };
    attachment(&net_name(nic), device)
}

/// The devices of `spec`, in the order of their slots.
fn devices(
    spec: &MachineSpec,
    devices: files::Devices,
    dir: File,
    fds: &mut Fds,
) -> Vec<Attachment> {
    let vsock = Device::Vsock {
        cid: GUEST_CID.into(),
        dir: fds.add(dir),
        name: SOCKET.to_owned(),
    };
    let mut attachments = vec![attachment("vsock", vsock)];
    for (share, socket) in spec.shares.iter().zip(devices.shares) {
        attachments.push(fs(share, fds.add(socket)));
    }
    for (disk, file) in spec.disks.iter().zip(devices.disks) {
        attachments.push(block(disk, fds.add(file), vcpus(spec).into()));
    }
    for (nic, taps) in spec.nics.iter().zip(devices.nics) {
        let taps = taps.into_iter().map(|tap| fds.add(tap)).collect();
        attachments.push(net(nic, taps));
    }
    attachments.push(attachment("rng", Device::Rng));
    attachments.push(attachment("balloon", Device::Balloon));
    attachments
}

fn vcpus(spec: &MachineSpec) -> u8 {
    u8::try_from(spec.vcpus).unwrap_or(u8::MAX)
}

fn backing(spec: &MachineSpec) -> Backing {
    Backing {
        shared: !spec.shares.is_empty(),
        huge_pages: false,
    }
}

fn open_file(what: &'static str, options: &OpenOptions, path: &Path) -> Result<File, Error> {
    options.open(path).map_err(|source| Error::File {
        what,
        path: path.to_owned(),
        source,
    })
}

/// A process that waits for its first request, and what that needs.
struct Waiting {
    fds: Fds,
    dir: File,
    console: OwnedFd,
    user: Option<u32>,
}

impl Waiting {
    /// From here on a drop of the machine in it ends the process.
    fn spawn(
        driver: &Vmm,
        spec: &MachineSpec,
        door: fn(&Path) -> Result<Door, Error>,
    ) -> Result<(VmmMachine, Self), Error> {
        let started = Instant::now();
        let (dir_path, dir) = socket_dir(&spec.run_dir)?;
        let door = door(&dir_path)?;
        // One machine to a supervisor, as a rule; two of one supervisor share it.
        let user = files::own_identity(std::process::id()).map(|identity| identity.uid);
        if let Some(id) = user {
            give(&dir_path, id)?;
            if door.ready_path().exists() {
                give(door.ready_path(), id)?;
            }
        }
        let (tail, console) = pipe(CONSOLE_MAX).map_err(host("make a pipe for the console"))?;
        let (ours, theirs) = api::pair().map_err(|e| Error::Other(e.to_string()))?;
        let mut spawn = Spawn::new("walnut-vmm", &driver.program);
        let number = spawn.inherit(OwnedFd::from(theirs));
        spawn.args(["--id", &spec.id, "--control-fd", &number.to_string()]);
        spawn.new_pids();
        let vmm = spawn.spawn()?;
        step(started, "vmm spawned");
        let shared = Arc::new(Shared {
            started,
            door,
            dir: dir_path,
            vmm,
            queues: vcpus(spec).into(),
            vcpus: spec.max_vcpus,
            console: tail,
            control: Control::new(ours)?,
            stopping: AtomicBool::new(false),
            cleaned: AtomicBool::new(false),
            exit: watch::Sender::new(None),
        });
        let machine = VmmMachine {
            shared: Arc::clone(&shared),
        };
        tokio::spawn(shared.supervise());
        let waiting = Self {
            fds: Fds::default(),
            dir,
            console,
            user,
        };
        Ok((machine, waiting))
    }
}

impl VmmMachine {
    pub(super) async fn start(driver: &Vmm, spec: MachineSpec) -> Result<Self, Error> {
        check(&spec)?;
        let files = Files::open(&spec, false)?;
        let door = |dir: &Path| Door::open(dir, SOCKET);
        let (machine, waiting) = Waiting::spawn(driver, &spec, door)?;
        let Waiting {
            dir,
            console,
            user,
            mut fds,
            ..
        } = waiting;
        let config = Config {
            version: api::VERSION,
            kvm: fds.add(open_kvm()?),
            vcpus: vcpus(&spec),
            max_vcpus: u8::try_from(spec.max_vcpus).unwrap_or(u8::MAX),
            memory: spec.memory,
            max_memory: spec.max_memory,
            backing: backing(&spec),
            kernel: fds.add(files.kernel),
            initramfs: Some(fds.add(files.initramfs)),
            cmdline: kernel_cmdline(&spec),
            console: Some(fds.add(console)),
            devices: devices(&spec, files.devices, dir, &mut fds),
            jail: api::Jail::Full { user },
        };
        let request = Request::Start(Box::new(config));
        machine
            .first("start the machine", "start", &request, &fds)
            .await?;
        Ok(machine)
    }

    pub(super) async fn restore(
        driver: &Vmm,
        mut spec: MachineSpec,
        from: &SnapshotFiles,
    ) -> Result<Self, Error> {
        check(&spec)?;
        // What the snapshot does not have is plugged in before the guest runs on.
        let backing = backing(&spec);
        let more: Vec<Pluggable> = match spec.spare_disks {
            0 => Vec::new(),
            _ => {
                let disks = std::mem::take(&mut spec.disks).into_iter();
                let shares = std::mem::take(&mut spec.shares).into_iter();
                let nics = std::mem::take(&mut spec.nics).into_iter();
                let disks = disks.map(Pluggable::Disk);
                let shares = shares.map(Pluggable::Share);
                disks
                    .chain(shares)
                    .chain(nics.map(Pluggable::Nic))
                    .collect()
            }
        };
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let state = open_file("open the snapshot's state", &options, &from.state)?;
        let memory = open_file("open the snapshot's memory", &options, &from.memory)?;
        let files = files::Devices::open(&spec)?;
        let door = |dir: &Path| Ok(Door::reopen(dir, SOCKET));
        let (machine, waiting) = Waiting::spawn(driver, &spec, door)?;
        let Waiting {
            dir,
            console,
            user,
            mut fds,
            ..
        } = waiting;
        let restore = api::Restore {
            version: api::VERSION,
            kvm: fds.add(open_kvm()?),
            state: fds.add(state),
            memory: fds.add(memory),
            backing,
            console: Some(fds.add(console)),
            devices: devices(&spec, files, dir, &mut fds),
            jail: api::Jail::Full { user },
            run: more.is_empty(),
        };
        let request = Request::Restore(Box::new(restore));
        machine
            .first("restore the machine", "restore", &request, &fds)
            .await?;
        if more.is_empty() {
            return Ok(machine);
        }
        for device in &more {
            machine.attach(device).await?;
        }
        machine
            .ask("run the machine", "resume", &Request::Resume)
            .await?;
        Ok(machine)
    }

    /// The first request, which takes all descriptors along.
    async fn first(
        &self,
        what: &'static str,
        name: &str,
        request: &Request,
        fds: &Fds,
    ) -> Result<(), Error> {
        let borrowed: Vec<BorrowedFd<'_>> = fds.0.iter().map(AsFd::as_fd).collect();
        let attempt = async {
            self.shared
                .control
                .ask(name, request, &borrowed)
                .await
                .map(drop)
        };
        or_end(what, attempt, self.shared.ended()).await?;
        step(self.shared.started, "guest runs");
        Ok(())
    }

    async fn ask(&self, what: &'static str, name: &str, request: &Request) -> Result<(), Error> {
        self.ask_with(what, name, request, &[]).await
    }

    pub(super) async fn ask_with(
        &self,
        what: &'static str,
        name: &str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let attempt = async { self.shared.control.ask(name, request, fds).await.map(drop) };
        self.or_end(what, attempt).await
    }

    /// What `attempt` leads to, or that the machine ended before.
    pub(super) async fn or_end<T>(
        &self,
        what: &'static str,
        attempt: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        or_end(what, attempt, self.shared.ended()).await
    }

    pub(super) fn control(&self) -> &Control {
        &self.shared.control
    }

    /// Queues of a disk: as many as vCPUs.
    pub(super) fn queues(&self) -> u16 {
        self.shared.queues
    }
}

/// Where a start's milliseconds go: `RUST_LOG=walnut_machine=debug`.
fn step(started: Instant, step: &'static str) {
    let ms = started.elapsed().as_secs_f64() * 1000.0;
    tracing::debug!(step, ms, "machine start");
}

impl Shared {
    /// Waits for the process's end, and says how the machine ended.
    async fn supervise(self: Arc<Self>) {
        let status = self.vmm.wait().await;
        self.control.closed().await;
        self.clean();
        let exit = match self.stopping.load(Ordering::Relaxed) {
            true => Exit::Stopped,
            false => self.verdict(status).await,
        };
        let ms = self.started.elapsed().as_secs_f64() * 1000.0;
        tracing::debug!(%exit, ms, "machine ended");
        self.exit.send_replace(Some(exit));
    }

    async fn verdict(&self, status: Status) -> Exit {
        match self.control.end() {
            Some(End::Failed(reason)) => Exit::Failed(format!("walnut-vmm: {reason}")),
            Some(End::Reset | End::Stopped) => {
                self.console.settle().await;
                let text = self.console.text();
                match console::last_words(&text) {
                    Some(words) => {
                        tracing::warn!("a guest's kernel panicked:\n{}", console::evidence(&text));
                        Exit::Panicked(words)
                    }
                    None => Exit::Stopped,
                }
            }
            None => Exit::Failed(match self.vmm.stderr().await {
                Some(words) => format!("walnut-vmm {status}: {words}"),
                None => format!("walnut-vmm {status}"),
            }),
        }
    }

    async fn ended(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or(Exit::Stopped),
            // The sender is in `self`.
            Err(_) => Exit::Stopped,
        }
    }

    fn kill(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.vmm.kill();
    }

    fn clean(&self) {
        if self.cleaned.swap(true, Ordering::Relaxed) {
            return;
        }
        self.door.close();
        // It is empty now, or somebody else's.
        let _ = std::fs::remove_dir(&self.dir);
    }
}

#[async_trait]
impl Machine for VmmMachine {
    async fn ready(&self, deadline: Duration) -> Result<u32, Error> {
        let shared = &self.shared;
        let early = async {
            match shared.ended().await {
                Exit::Stopped if !shared.stopping.load(Ordering::Relaxed) => {
                    agent::stopped_early(&self.console_tail())
                }
                exit => exit,
            }
        };
        let door = &shared.door;
        let protocol = door.ready(deadline, early, || self.console_tail()).await?;
        step(shared.started, "agent ready");
        Ok(protocol)
    }

    async fn connect(&self, port: u32) -> Result<UnixStream, Error> {
        let exit = self.shared.exit.borrow().clone();
        if let Some(exit) = exit {
            let what = "connect to the guest";
            return Err(Error::Ended { what, exit });
        }
        self.shared.door.connect(port, self.shared.ended()).await
    }

    async fn wait(&self) -> Exit {
        self.shared.ended().await
    }

    async fn stop(&self) {
        self.shared.kill();
        self.shared.ended().await;
    }

    fn processes(&self) -> Vec<(&'static str, u32)> {
        let vmm = &self.shared.vmm;
        match vmm.try_wait() {
            None => vec![("vmm", vmm.pid())],
            Some(_) => Vec::new(),
        }
    }

    fn console_tail(&self) -> String {
        self.shared.console.text()
    }

    fn as_pause(&self) -> Option<&dyn Pause> {
        Some(self)
    }

    fn as_snapshot(&self) -> Option<&dyn Snapshot> {
        Some(self)
    }

    fn as_hot_plug(&self) -> Option<&dyn HotPlug> {
        Some(self)
    }

    fn as_spare_disks(&self) -> Option<&dyn SpareDisks> {
        Some(self)
    }

    fn as_plug_nics(&self) -> Option<&dyn PlugNics> {
        Some(self)
    }

    fn as_resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn as_heritable(&self) -> Option<&dyn Heritable> {
        Some(self)
    }
}

#[async_trait]
impl Resize for VmmMachine {
    async fn set_memory(&self, bytes: u64) -> Result<(), Error> {
        let request = Request::Resize { memory: bytes };
        self.ask("resize the guest's memory", "resize", &request)
            .await
    }

    async fn memory(&self) -> Result<u64, Error> {
        let attempt = self.shared.control.ask("stats", &Request::Stats, &[]);
        let what = "ask for the guest's memory";
        match or_end(what, attempt, self.shared.ended()).await? {
            Reply::Stats(stats) => Ok(stats.memory),
            Reply::Done => Err(Error::Other(
                "walnut-vmm, stats: no figures came".to_owned(),
            )),
        }
    }

    fn vcpus(&self) -> u32 {
        self.shared.vcpus
    }
}

#[async_trait]
impl Pause for VmmMachine {
    async fn pause(&self) -> Result<(), Error> {
        self.ask("pause the guest", "pause", &Request::Pause).await
    }

    async fn resume(&self) -> Result<(), Error> {
        self.ask("resume the guest", "resume", &Request::Resume)
            .await
    }
}

#[async_trait]
impl Snapshot for VmmMachine {
    async fn save(&self, to: &SnapshotFiles) -> Result<(), Error> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC);
        let state = open_file("create the snapshot's state", &options, &to.state)?;
        let result = self.save_with(state, to, &options).await;
        if result.is_err() {
            let _ = std::fs::remove_file(&to.state);
        }
        result
    }
}

impl VmmMachine {
    async fn save_with(
        &self,
        state: File,
        to: &SnapshotFiles,
        options: &OpenOptions,
    ) -> Result<(), Error> {
        let memory = open_file("create the snapshot's memory", options, &to.memory)?;
        let mut fds = Fds::default();
        let request = Request::Snapshot {
            state: fds.add(state),
            memory: fds.add(memory),
        };
        let borrowed: Vec<BorrowedFd<'_>> = fds.0.iter().map(AsFd::as_fd).collect();
        let control = &self.shared.control;
        let attempt = async { control.ask("snapshot", &request, &borrowed).await.map(drop) };
        let result = or_end("save the machine", attempt, self.shared.ended()).await;
        if result.is_err() {
            let _ = std::fs::remove_file(&to.memory);
        }
        result
    }
}

impl Drop for VmmMachine {
    fn drop(&mut self) {
        self.shared.kill();
        self.shared.vmm.reap_blocking();
        self.shared.clean();
    }
}
