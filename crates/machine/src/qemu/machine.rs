//! The life of one QEMU machine: its start, its readiness, its end.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::{net::UnixStream, sync::watch};

use super::{
    Accel, Qemu,
    command::{self, Begin},
    memory::Memory,
    qmp::{self, Qmp},
    registers::Registers,
};
use crate::{
    Disk, Driver, Error, Exit, Heritable, Machine, MachineSpec, Pause, PlugNics, Snapshot,
    SpareDisks,
    agent::{self, CONSOLE_MAX, Door, GUEST_CID, host, or_end},
    console,
    files::{self, Devices, Files},
    process::{Child, Spawn, Status},
};

mod takeover;

pub use takeover::State;

/// The vsock device's socket in the machine's directory.
pub(super) const SOCKET: &str = "vsock.sock";
/// How long one process may outlive the other before it is killed, so that the
/// one that ended first by itself is blamed. QEMU hangs up before it gives its memory
/// back, which on a busy host is a while.
const GRACE: Duration = Duration::from_secs(5);

/// How long after it began to run again a guest may seem to refuse what it does not:
/// QEMU has told the vsock device by then, which may not have heard yet.
const WAKING: Duration = Duration::from_secs(1);
/// Between two attempts in that time.
const AGAIN: Duration = Duration::from_millis(2);

/// A machine of [`Qemu`].
#[derive(Debug)]
pub(super) struct QemuMachine {
    pub(super) shared: Arc<Shared>,
}

/// What the machine and the tasks that serve it share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The driver's name.
    pub(super) driver: &'static str,
    pub(super) spec: MachineSpec,
    started: Instant,
    door: Door,
    qemu: Child,
    vsock: Child,
    qmp: OnceLock<Qmp>,
    /// The registers of its devices. Held while the machine is saved, which must not
    /// run before it is whole again, and while a device comes or goes.
    pub(super) registers: tokio::sync::Mutex<Registers>,
    /// As long as it lives.
    memory: Mutex<Option<Arc<Memory>>>,
    /// Disks that came later.
    plugged: Mutex<Vec<Disk>>,
    /// When it last began to run again.
    resumed: Mutex<Option<Instant>>,
    /// The end was asked for.
    stopping: AtomicBool,
    exit: watch::Sender<Option<Exit>>,
}

/// What QEMU is given to begin with.
pub(super) struct Given {
    pub(super) door: Door,
    pub(super) memory: Arc<Memory>,
    /// Kernel and initramfs, unless a saved guest goes on.
    pub(super) boot: Option<[OwnedFd; 2]>,
    pub(super) devices: Devices,
    /// Descriptors that it inherits for later, whose numbers the caller has noted.
    pub(super) more: Vec<OwnedFd>,
}

impl QemuMachine {
    pub(super) async fn start(driver: &Qemu, spec: MachineSpec) -> Result<Self, Error> {
        command::check(&spec)?;
        let files = Files::open(&spec, files::drops_privileges(driver.accel))?;
        let memory = Memory::new(spec.memory).map_err(host("make the guest's memory"))?;
        let given = Given {
            door: Door::open(&spec.run_dir, SOCKET)?,
            memory: Arc::new(memory),
            boot: Some([files.kernel, files.initramfs]),
            devices: files.devices,
            more: Vec::new(),
        };
        Self::spawn(driver, spec, given).await
    }

    /// Starts both processes, and returns when QEMU's monitor answers.
    pub(super) async fn spawn(
        driver: &Qemu,
        spec: MachineSpec,
        given: Given,
    ) -> Result<Self, Error> {
        let started = Instant::now();
        let (vsock, to_vsock) = spawn_vsock(driver, &given.door)?;
        step(started, "vsock spawned");
        let door = given.door;
        let memory = Arc::clone(&given.memory);
        let (qemu, to_qmp, registers) = spawn_qemu(
            driver,
            &spec,
            Inherited {
                memory: given.memory.share().map_err(host("share memory"))?,
                boot: given.boot,
                devices: given.devices,
                more: given.more,
                vsock: to_vsock,
            },
            vsock.pid(),
        )?;
        step(started, "qemu spawned");

        let shared = Arc::new(Shared {
            driver: driver.name(),
            spec,
            started,
            door,
            qemu,
            vsock,
            qmp: OnceLock::new(),
            registers: tokio::sync::Mutex::new(Registers::new(watched(registers)?)),
            memory: Mutex::new(Some(memory)),
            plugged: Mutex::default(),
            resumed: Mutex::default(),
            stopping: AtomicBool::new(false),
            exit: watch::Sender::new(None),
        });
        // From here on a drop of `machine` ends both processes.
        let machine = Self {
            shared: Arc::clone(&shared),
        };
        tokio::spawn(Arc::clone(&shared).supervise());
        shared.attach_monitor(to_qmp).await?;
        step(started, "monitor answers");
        Ok(machine)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets the runtime watch a socket.
fn watched(stream: StdStream) -> Result<UnixStream, Error> {
    stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .map_err(host("watch QEMU's socket"))
}

/// Starts the vsock device; the other end of its vhost-user socket is returned.
fn spawn_vsock(driver: &Qemu, door: &Door) -> Result<(Child, StdStream), Error> {
    let (ours, theirs) = StdStream::pair().map_err(host("make the vsock device's socket"))?;
    let mut spawn = Spawn::new("walnut-vsock", &driver.vsock);
    let fd = spawn.inherit(theirs);
    spawn
        .arg("--vhost-fd")
        .arg(fd.to_string())
        .arg("--uds")
        .arg(door.uds())
        .arg("--cid")
        .arg(GUEST_CID.to_string())
        .arg("--die-with-parent");
    Ok((spawn.spawn()?, ours))
}

/// What QEMU inherits, but for the sockets that are made on the way.
struct Inherited {
    memory: OwnedFd,
    boot: Option<[OwnedFd; 2]>,
    devices: Devices,
    more: Vec<OwnedFd>,
    vsock: StdStream,
}

/// Starts QEMU; the other ends of its monitor's socket and of the one for registers
/// are returned.
fn spawn_qemu(
    driver: &Qemu,
    spec: &MachineSpec,
    inherited: Inherited,
    unique: u32,
) -> Result<(Child, StdStream, StdStream), Error> {
    let pair = || StdStream::pair().map_err(host("make the monitor's socket"));
    let (monitor, its_monitor) = pair()?;
    let (registers, its_registers) = pair()?;
    let mut spawn = Spawn::new("qemu", &driver.qemu);
    let begin = match inherited.boot {
        Some([kernel, initramfs]) => Begin::Boot {
            kernel: spawn.inherit(kernel),
            initramfs: spawn.inherit(initramfs),
        },
        None => Begin::Restore,
    };
    for fd in inherited.more {
        spawn.inherit(fd);
    }
    let mut all = |fds: Vec<OwnedFd>| fds.into_iter().map(|fd| spawn.inherit(fd)).collect();
    let (disks, shares) = (all(inherited.devices.disks), all(inherited.devices.shares));
    let nics = inherited.devices.nics.into_iter().map(all).collect();
    let fds = command::Fds {
        memory: spawn.inherit(inherited.memory),
        qmp: spawn.inherit(its_monitor),
        registers: spawn.inherit(its_registers),
        vsock: spawn.inherit(inherited.vsock),
        disks,
        shares,
        nics,
    };
    let tsc_khz = match (driver.accel, begin) {
        (Accel::Tcg, Begin::Boot { .. }) => driver.made.rate_khz(),
        // KVM tells its guests the rate itself; one that goes on knows it.
        _ => None,
    };
    let timing = command::Timing {
        threads: driver.threads(spec.vcpus),
        tsc_khz,
    };
    spawn.args(command::arguments(driver.accel, spec, begin, &fds, timing));
    spawn.keep_stdout(CONSOLE_MAX);
    if let Some(identity) = files::identity(driver.accel, unique) {
        spawn.identity(identity).new_network();
    }
    Ok((spawn.spawn()?, monitor, registers))
}

/// Where a start's milliseconds go: `RUST_LOG=walnut_machine=debug`.
fn step(started: Instant, step: &'static str) {
    let ms = started.elapsed().as_secs_f64() * 1000.0;
    tracing::debug!(step, ms, "machine start");
}

impl Shared {
    async fn attach_monitor(&self, stream: StdStream) -> Result<(), Error> {
        let negotiated = Qmp::negotiate(watched(stream)?).await;
        let qmp = self.explain("start the machine", negotiated).await?;
        let _ = self.qmp.set(qmp);
        Ok(())
    }

    /// `result`, or the machine's end if the monitor broke off because of it.
    async fn explain<T>(&self, what: &'static str, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(Error::Monitor { .. }) = &result
            && let Ok(exit) = tokio::time::timeout(GRACE, self.ended()).await
        {
            return Err(Error::Ended { what, exit });
        }
        result
    }

    /// What `attempt` leads to, or that the machine ended before.
    pub(super) async fn or_end<T>(
        &self,
        what: &'static str,
        attempt: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let result = or_end(what, attempt, self.ended()).await;
        self.explain(what, result).await
    }

    /// Watches both processes until the first ends, takes the other down, and
    /// says how the machine ended.
    async fn supervise(self: Arc<Self>) {
        let exit = tokio::select! {
            // In this order: when both have ended, QEMU's end is the cause
            // unless a signal says otherwise.
            biased;
            status = self.qemu.wait() => self.after_qemu(status).await,
            status = self.vsock.wait() => self.after_vsock(status).await,
        };
        self.qemu.kill();
        self.vsock.kill();
        self.qemu.wait().await;
        self.vsock.wait().await;
        self.door.close();
        drop(self.release());
        let exit = match self.stopping.load(Ordering::Relaxed) {
            true => Exit::Stopped,
            false => exit,
        };
        let ms = self.started.elapsed().as_secs_f64() * 1000.0;
        tracing::debug!(%exit, ms, "machine ended");
        self.exit.send_replace(Some(exit));
    }

    async fn after_vsock(&self, status: Status) -> Exit {
        // It exits by itself when QEMU hangs up: then QEMU says why.
        if matches!(status, Status::Exited(_))
            && let Ok(qemu) = tokio::time::timeout(GRACE, self.qemu.wait()).await
        {
            return self.after_qemu(qemu).await;
        }
        Exit::Failed(sentence(&self.vsock, status).await)
    }

    async fn after_qemu(&self, status: Status) -> Exit {
        if status != Status::Exited(0) {
            return Exit::Failed(self.blame(status).await);
        }
        self.qemu.stdout().settle().await;
        let text = self.qemu.stdout().text();
        if let Some(words) = console::last_words(&text) {
            tracing::warn!("a guest's kernel panicked:\n{}", console::evidence(&text));
            return Exit::Panicked(words);
        }
        match self.qmp.get().and_then(Qmp::shutdown_reason).as_deref() {
            Some("host-signal") => {
                Exit::Failed("qemu was ended by a signal of the host".to_owned())
            }
            _ => Exit::Stopped,
        }
    }

    /// QEMU failed: by itself, or because its vsock device was taken away? The
    /// device ends well when QEMU does; then QEMU is the one.
    async fn blame(&self, qemu: Status) -> String {
        if let Status::Exited(_) = qemu
            && let Ok(vsock) = tokio::time::timeout(GRACE, self.vsock.wait()).await
            && vsock != Status::Exited(0)
        {
            return sentence(&self.vsock, vsock).await;
        }
        sentence(&self.qemu, qemu).await
    }

    /// The monitor, which every machine has that was started.
    pub(super) fn monitor(&self, command: &str) -> Result<&Qmp, Error> {
        let monitor = self.qmp.get();
        monitor.ok_or_else(|| qmp::failed(command, "it is not attached"))
    }

    /// Guest memory, from the machine that does not need it any more.
    fn release(&self) -> Option<Arc<Memory>> {
        lock(&self.memory).take()
    }

    /// All disks that it has.
    pub(super) fn disks(&self) -> Vec<Disk> {
        let mut disks = self.spec.disks.clone();
        disks.extend(lock(&self.plugged).iter().cloned());
        disks
    }

    pub(super) fn plugged(&self, disk: Disk) {
        lock(&self.plugged).push(disk);
    }

    /// The guest has just begun to run again.
    pub(super) fn runs_again(&self) {
        *lock(&self.resumed) = Some(Instant::now());
    }

    /// Whether the guest has just begun to run again.
    fn wakes(&self) -> bool {
        lock(&self.resumed).is_some_and(|when| when.elapsed() < WAKING)
    }

    /// Guest memory, while the machine lives.
    pub(super) fn memory(&self) -> Option<Arc<Memory>> {
        lock(&self.memory).clone()
    }

    /// Where a start's milliseconds go: `RUST_LOG=walnut_machine=debug`.
    pub(super) fn step(&self, name: &'static str) {
        step(self.started, name);
    }

    async fn ended(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or(Exit::Stopped),
            // The sender is in `self`.
            Err(_) => Exit::Stopped,
        }
    }

    pub(super) fn kill(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.qemu.kill();
        self.vsock.kill();
    }
}

/// "qemu exited with code 1: its last words".
async fn sentence(child: &Child, status: Status) -> String {
    match child.stderr().await {
        Some(words) => format!("{} {status}: {words}", child.name()),
        None => format!("{} {status}", child.name()),
    }
}

#[async_trait]
impl Machine for QemuMachine {
    async fn ready(&self, deadline: Duration) -> Result<u32, Error> {
        let early = async {
            match self.shared.ended().await {
                Exit::Stopped if !self.shared.stopping.load(Ordering::Relaxed) => {
                    agent::stopped_early(&self.console_tail())
                }
                exit => exit,
            }
        };
        let door = &self.shared.door;
        let protocol = door.ready(deadline, early, || self.console_tail()).await?;
        step(self.shared.started, "agent ready");
        Ok(protocol)
    }

    async fn connect(&self, port: u32) -> Result<UnixStream, Error> {
        let exit = self.shared.exit.borrow().clone();
        if let Some(exit) = exit {
            let what = "connect to the guest";
            return Err(Error::Ended { what, exit });
        }
        loop {
            let attempt = self.shared.door.connect(port, self.shared.ended()).await;
            if !matches!(attempt, Err(Error::Connect(_))) || !self.shared.wakes() {
                return attempt;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn wait(&self) -> Exit {
        self.shared.ended().await
    }

    async fn stop(&self) {
        self.shared.kill();
        self.shared.ended().await;
    }

    fn processes(&self) -> Vec<(&'static str, u32)> {
        [("qemu", &self.shared.qemu), ("vsock", &self.shared.vsock)]
            .into_iter()
            .filter(|(_, child)| child.try_wait().is_none())
            .map(|(role, child)| (role, child.pid()))
            .collect()
    }

    fn console_tail(&self) -> String {
        self.shared.qemu.stdout().text()
    }

    fn as_pause(&self) -> Option<&dyn Pause> {
        Some(self)
    }

    fn as_spare_disks(&self) -> Option<&dyn SpareDisks> {
        Some(self)
    }

    fn as_plug_nics(&self) -> Option<&dyn PlugNics> {
        Some(self)
    }

    fn as_snapshot(&self) -> Option<&dyn Snapshot> {
        // QEMU does not save virtio-fs, whose state another process has, and a clone has
        // no transport for a network interface.
        let spec = &self.shared.spec;
        match spec.shares.is_empty() && spec.nics.is_empty() {
            true => Some(self),
            false => None,
        }
    }

    fn as_heritable(&self) -> Option<&dyn Heritable> {
        Some(self)
    }
}

#[async_trait]
impl Pause for QemuMachine {
    async fn pause(&self) -> Result<(), Error> {
        self.order("pause the guest", "stop").await
    }

    async fn resume(&self) -> Result<(), Error> {
        self.order("resume the guest", "cont").await?;
        self.shared.runs_again();
        Ok(())
    }
}

impl QemuMachine {
    async fn order(&self, what: &'static str, command: &str) -> Result<(), Error> {
        let _whole = self.shared.registers.lock().await;
        let qmp = self.shared.monitor(command)?;
        let attempt = async { qmp.execute(command).await.map(drop) };
        or_end(what, attempt, self.shared.ended()).await
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        self.shared.kill();
        self.shared.qemu.reap_blocking();
        self.shared.vsock.reap_blocking();
        self.shared.door.close();
    }
}
