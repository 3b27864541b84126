//! The life of one QEMU machine: its start, its readiness, its end.

use std::{
    os::unix::net::UnixStream as StdStream,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::{net::UnixStream, sync::watch};

use super::{Accel, Qemu, command, qmp::Qmp};
use crate::{
    Error, Exit, Machine, MachineSpec, Pause,
    agent::{self, CONSOLE_MAX, Door, GUEST_CID, host, or_end},
    console,
    files::{self, Files},
    process::{Child, Spawn, Status},
};

/// How long one process may outlive the other before it is killed, so that the
/// one that ended first by itself is blamed.
const GRACE: Duration = Duration::from_secs(1);

/// A machine of [`Qemu`].
#[derive(Debug)]
pub(super) struct QemuMachine {
    shared: Arc<Shared>,
}

/// What the machine and its supervising task share.
#[derive(Debug)]
struct Shared {
    started: Instant,
    door: Door,
    qemu: Child,
    vsock: Child,
    qmp: OnceLock<Qmp>,
    /// The end was asked for.
    stopping: AtomicBool,
    exit: watch::Sender<Option<Exit>>,
}

impl QemuMachine {
    pub(super) async fn start(driver: &Qemu, spec: MachineSpec) -> Result<Self, Error> {
        let started = Instant::now();
        command::check(&spec)?;
        let files = Files::open(&spec, files::drops_privileges(driver.accel))?;
        let door = Door::open(&spec.run_dir, "vsock.sock")?;
        let (vsock, to_vsock) = spawn_vsock(driver, &door)?;
        step(started, "vsock spawned");
        let (qemu, to_qmp) = spawn_qemu(driver, &spec, files, to_vsock, vsock.pid())?;
        step(started, "qemu spawned");

        let shared = Arc::new(Shared {
            started,
            door,
            qemu,
            vsock,
            qmp: OnceLock::new(),
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

/// Starts QEMU; the other end of its monitor's socket is returned.
fn spawn_qemu(
    driver: &Qemu,
    spec: &MachineSpec,
    files: Files,
    to_vsock: StdStream,
    unique: u32,
) -> Result<(Child, StdStream), Error> {
    let (ours, theirs) = StdStream::pair().map_err(host("make the monitor's socket"))?;
    let mut spawn = Spawn::new("qemu", &driver.qemu);
    let fds = command::Fds {
        kernel: spawn.inherit(files.kernel),
        initramfs: spawn.inherit(files.initramfs),
        qmp: spawn.inherit(theirs),
        vsock: spawn.inherit(to_vsock),
        disks: files
            .devices
            .disks
            .into_iter()
            .map(|d| spawn.inherit(d))
            .collect(),
        shares: files
            .devices
            .shares
            .into_iter()
            .map(|s| spawn.inherit(s))
            .collect(),
    };
    // KVM tells its guests the rate itself.
    let tsc_khz = match driver.accel {
        Accel::Tcg => driver.made.rate_khz(),
        Accel::Kvm => None,
    };
    let timing = command::Timing {
        threads: driver.threads(spec.vcpus),
        tsc_khz,
    };
    spawn.args(command::arguments(driver.accel, spec, &fds, timing));
    spawn.keep_stdout(CONSOLE_MAX);
    if let Some(identity) = files::identity(driver.accel, unique) {
        spawn.identity(identity).new_network();
    }
    Ok((spawn.spawn()?, ours))
}

/// Where a start's milliseconds go: `RUST_LOG=walnut_machine=debug`.
fn step(started: Instant, step: &'static str) {
    let ms = started.elapsed().as_secs_f64() * 1000.0;
    tracing::debug!(step, ms, "machine start");
}

impl Shared {
    async fn attach_monitor(&self, stream: StdStream) -> Result<(), Error> {
        let watched = stream
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(stream))
            .map_err(host("watch the monitor's socket"))?;
        match Qmp::negotiate(watched).await {
            Ok(qmp) => {
                let _ = self.qmp.set(qmp);
                Ok(())
            }
            Err(error) => Err(match tokio::time::timeout(GRACE, self.ended()).await {
                Ok(exit) => Error::Ended {
                    what: "start the machine",
                    exit,
                },
                Err(_) => error,
            }),
        }
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
        if let Some(words) = console::last_words(&self.qemu.stdout().text()) {
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
}

#[async_trait]
impl Pause for QemuMachine {
    async fn pause(&self) -> Result<(), Error> {
        self.monitor("pause the guest", "stop").await
    }

    async fn resume(&self) -> Result<(), Error> {
        self.monitor("resume the guest", "cont").await
    }
}

impl QemuMachine {
    async fn monitor(&self, what: &'static str, command: &str) -> Result<(), Error> {
        let Some(qmp) = self.shared.qmp.get() else {
            return Err(Error::Monitor {
                command: command.to_owned(),
                reason: "it is not attached".to_owned(),
            });
        };
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
