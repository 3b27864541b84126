//! The life of one QEMU machine: its start, its readiness, its end.

use std::{
    io,
    os::unix::net::{UnixListener as StdListener, UnixStream as StdStream},
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
    sync::{Mutex, watch},
};
use walnut_protocol::{READY_LINE_MAX, READY_PORT, connect_hybrid, parse_ready_line};

use super::{
    Accel, Qemu, command, console,
    files::{self, Files},
    qmp::Qmp,
};
use crate::{
    Error, Exit, Machine, MachineSpec, Pause,
    process::{Child, Spawn, Status, quotable},
};

/// How much of the console is kept, in bytes.
const CONSOLE_MAX: usize = 64 * 1024;
/// The guest's vsock address. One guest per device, so all have the same.
const GUEST_CID: u32 = 3;
/// How long one process may outlive the other before it is killed, so that the
/// one that ended first by itself is blamed.
const GRACE: Duration = Duration::from_secs(1);

/// A machine of [`Qemu`].
#[derive(Debug)]
pub(super) struct QemuMachine {
    shared: Arc<Shared>,
    ready: Mutex<Ready>,
}

/// What the machine and its supervising task share.
#[derive(Debug)]
struct Shared {
    started: Instant,
    sockets: Sockets,
    qemu: Child,
    vsock: Child,
    qmp: OnceLock<Qmp>,
    /// The end was asked for.
    stopping: AtomicBool,
    exit: watch::Sender<Option<Exit>>,
}

/// The agent's call: waited for, or come.
#[derive(Debug)]
enum Ready {
    Waiting(UnixListener),
    Serves(u32),
}

/// The machine's names in the file system, removed with it.
#[derive(Debug)]
struct Sockets {
    /// The vsock device's own.
    uds: PathBuf,
    /// Where the agent calls.
    ready: PathBuf,
}

impl Sockets {
    fn new(run_dir: &Path) -> Self {
        Self {
            uds: run_dir.join("vsock.sock"),
            ready: run_dir.join(format!("vsock.sock_{READY_PORT}")),
        }
    }

    fn remove(&self) {
        for socket in [&self.uds, &self.ready] {
            // Most often it is gone already.
            let _ = std::fs::remove_file(socket);
        }
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.remove();
    }
}

fn listen(path: &Path) -> Result<StdListener, Error> {
    StdListener::bind(path).map_err(|source| Error::File {
        what: "listen on",
        path: path.to_owned(),
        source,
    })
}

fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host {
        what: what.to_owned(),
        source,
    }
}

impl QemuMachine {
    pub(super) async fn start(driver: &Qemu, spec: MachineSpec) -> Result<Self, Error> {
        let started = Instant::now();
        command::check(&spec)?;
        let files = Files::open(&spec, files::drops_privileges(driver.accel))?;
        let sockets = Sockets::new(&spec.run_dir);
        sockets.remove();
        let listener = listen(&sockets.ready)?;
        listener
            .set_nonblocking(true)
            .map_err(host("prepare the agent's socket"))?;
        let listener =
            UnixListener::from_std(listener).map_err(host("watch the agent's socket"))?;

        let (vsock, to_vsock) = spawn_vsock(driver, &sockets)?;
        step(started, "vsock spawned");
        let (qemu, to_qmp) = spawn_qemu(driver, &spec, files, to_vsock, vsock.pid())?;
        step(started, "qemu spawned");

        let shared = Arc::new(Shared {
            started,
            sockets,
            qemu,
            vsock,
            qmp: OnceLock::new(),
            stopping: AtomicBool::new(false),
            exit: watch::Sender::new(None),
        });
        // From here on a drop of `machine` ends both processes.
        let machine = Self {
            shared: Arc::clone(&shared),
            ready: Mutex::new(Ready::Waiting(listener)),
        };
        tokio::spawn(Arc::clone(&shared).supervise());
        shared.attach_monitor(to_qmp).await?;
        step(started, "monitor answers");
        Ok(machine)
    }
}

/// Starts the vsock device; the other end of its vhost-user socket is returned.
fn spawn_vsock(driver: &Qemu, sockets: &Sockets) -> Result<(Child, StdStream), Error> {
    let (ours, theirs) = StdStream::pair().map_err(host("make the vsock device's socket"))?;
    let mut spawn = Spawn::new("walnut-vsock", &driver.vsock);
    let fd = spawn.inherit(theirs);
    spawn
        .arg("--vhost-fd")
        .arg(fd.to_string())
        .arg("--uds")
        .arg(&sockets.uds)
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
        disks: files.disks.into_iter().map(|d| spawn.inherit(d)).collect(),
        shares: files.shares.into_iter().map(|s| spawn.inherit(s)).collect(),
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
        self.sockets.remove();
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

    /// `attempt`, or the machine's end if that comes first.
    async fn or_end<T>(
        &self,
        what: &'static str,
        attempt: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            result = attempt => result,
            exit = self.ended() => Err(Error::Ended { what, exit }),
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
        let mut ready = self.ready.lock().await;
        let listener = match &*ready {
            Ready::Serves(protocol) => return Ok(*protocol),
            Ready::Waiting(listener) => listener,
        };
        let call = self.shared.or_end("wait for the agent", heard(listener));
        let protocol = match tokio::time::timeout(deadline, call).await {
            Ok(Err(Error::Ended {
                what,
                exit: Exit::Stopped,
            })) => {
                return Err(Error::Ended {
                    what,
                    exit: self.stopped_early(),
                });
            }
            Ok(result) => result?,
            Err(_) => {
                let hint = console::hint(&self.console_tail());
                return Err(Error::NotReady { deadline, hint });
            }
        };
        *ready = Ready::Serves(protocol);
        let _ = std::fs::remove_file(&self.shared.sockets.ready);
        step(self.shared.started, "agent ready");
        Ok(protocol)
    }

    async fn connect(&self, port: u32) -> Result<UnixStream, Error> {
        let what = "connect to the guest";
        let exit = self.shared.exit.borrow().clone();
        if let Some(exit) = exit {
            return Err(Error::Ended { what, exit });
        }
        let attempt = async { Ok(connect_hybrid(&self.shared.sockets.uds, port).await?) };
        self.shared.or_end(what, attempt).await
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

/// The agent's protocol, from the first connection of the guest.
async fn heard(listener: &UnixListener) -> Result<u32, Error> {
    let (stream, _) = listener.accept().await.map_err(host("hear the agent"))?;
    let mut words = Vec::with_capacity(READY_LINE_MAX);
    let mut line = stream.take(u64::try_from(READY_LINE_MAX).unwrap_or(64));
    while !words.ends_with(b"\n") {
        let n = line
            .read_buf(&mut words)
            .await
            .map_err(host("hear the agent"))?;
        if n == 0 {
            break;
        }
    }
    let words = String::from_utf8_lossy(&words);
    parse_ready_line(&words).ok_or_else(|| Error::BadReady {
        words: quotable(&words),
    })
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
    /// A guest that ends before its agent serves has not done what was asked of
    /// it, however orderly its end looks from outside.
    fn stopped_early(&self) -> Exit {
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Exit::Stopped;
        }
        let hint = console::hint(&self.console_tail());
        Exit::Failed(format!("the guest restarted while it booted; {hint}"))
    }

    async fn monitor(&self, what: &'static str, command: &str) -> Result<(), Error> {
        let Some(qmp) = self.shared.qmp.get() else {
            return Err(Error::Monitor {
                command: command.to_owned(),
                reason: "it is not attached".to_owned(),
            });
        };
        let attempt = async { qmp.execute(command).await.map(drop) };
        self.shared.or_end(what, attempt).await
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        self.shared.kill();
        self.shared.qemu.reap_blocking();
        self.shared.vsock.reap_blocking();
        self.shared.sockets.remove();
    }
}
