//! What the supervisor does for the OCI command line: it stands for the container's
//! first process. It has that one's streams, passes signals and window sizes on, and
//! ends as it ends, so that whoever waits for a process of a container waits for this.

mod args;
mod signals;

pub(crate) use args::{ServeBundle, read};

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result as Anyhow};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::timeout};
use tracing::{error, warn};
use ttrpc::asynchronous::Server;
use walnut_protocol::supervisor::AboutResponse;
use walnut_sandbox::{
    BundleState, BundleStatus, Error, ExitInfo, Inherited, Input, Layout, Lock, Network, Output,
    Result, Sandbox, SandboxDir, StdioTargets,
    machine::takeover::{Fd, Giver, NoState, Taker},
    now_ns,
};

use self::args::Lives;
use crate::{
    front::{Count, Event, Front, Place, Streams},
    lease::Lease,
    server,
    service::TaskService,
    upgrade::FrontState,
};

/// What a container ends with whose machine failed, or was ended: killed.
const EXIT_KILLED: u32 = 128 + 9;
/// Longest the end of a container may lag behind the end of its machine.
const END_GRACE: Duration = Duration::from_secs(5);

/// Supervises a container made from a bundle; its exit code.
pub(crate) async fn serve(serve: ServeBundle) -> Anyhow<u8> {
    let network = enter(&serve.network)?;
    let lease = Lease::new(serve.lease).context("watch the lease")?;
    let dir = SandboxDir::inherited(serve.run_dir, serve.lock);
    let layout = Layout::from_env()?;
    let terminal = match &serve.stderr {
        Some(_) => None,
        None => Some(File::from(
            serve.stdin.try_clone().context("use the terminal")?,
        )),
    };
    let streams = StdioTargets {
        terminal: terminal.is_some(),
        stdin: Some(Input::Descriptor(Inherited::new(serve.stdin))),
        stdout: Some(output(serve.stdout)),
        stderr: serve.stderr.map(output),
        returns: false,
    };
    let front = Arc::new(Bundle {
        id: serve.id,
        container_dir: serve.container_dir,
        dir,
        layout,
        streams: Mutex::new(Some(streams)),
        terminal,
        network,
        lease,
        phase: watch::Sender::default(),
    });
    let service = Arc::new(TaskService::new(front.clone(), None)?);
    let server = server::listen(serve.socket, service).await?;
    run(front, server).await
}

/// From a container that is served to its end; its exit code.
pub(crate) async fn run(front: Arc<Bundle>, mut server: Server) -> Anyhow<u8> {
    let code = front.supervise().await;
    server.shutdown().await.context("stop serving")?;
    front.clean_up();
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

fn output(fd: OwnedFd) -> Output {
    Output::Descriptor(Inherited::new(fd))
}

/// Lives in the container's network namespace from here on, as its processes would:
/// what others do to that of this PID, they do to the container's.
fn enter(lives: &Lives) -> Anyhow<Network> {
    let entered = match lives {
        Lives::Here => return Ok(Network::None),
        Lives::New => {
            // SAFETY: no other thread relies on the namespace that this one leaves.
            match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }
        Lives::At(path) => {
            let namespace = File::open(path)
                .with_context(|| format!("open the network namespace {}", path.display()))?;
            nix::sched::setns(namespace.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
        }
    };
    match entered {
        // Without the privilege there is none to be touched by others either.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            warn!("the container has no network namespace on the host: {e}");
            Ok(Network::None)
        }
        other => other
            .map(|()| Network::Own)
            .context("enter the container's network namespace"),
    }
}

/// Where a supervisor stands.
#[derive(Debug, Clone, Default)]
enum Phase {
    /// The container is not there yet.
    #[default]
    Waiting,
    Serving(Arc<Sandbox>),
    /// Its program has ended.
    Ended(ExitInfo),
    /// The sandbox is to be ended now, for this reason if somebody did not ask for it.
    Ending(Option<String>),
}

/// A container made from a bundle.
#[derive(Debug)]
pub(crate) struct Bundle {
    id: String,
    container_dir: PathBuf,
    dir: SandboxDir,
    layout: Layout,
    /// The first process's, until it has them.
    streams: Mutex<Option<StdioTargets>>,
    /// Its terminal's outer side.
    terminal: Option<File>,
    network: Network,
    lease: Lease,
    phase: watch::Sender<Phase>,
}

/// The front end in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BundleFront {
    id: String,
    container_dir: PathBuf,
    dir: PathBuf,
    lock: Fd,
    state_root: PathBuf,
    run_root: PathBuf,
    terminal: Option<Fd>,
    /// It lives in a network namespace that is the container's.
    networked: bool,
    lease: Option<Fd>,
    /// In the sandbox.
    container: String,
}

impl Bundle {
    /// That of the program before, whose sandbox is `sandbox`.
    pub(crate) fn take_over(
        state: BundleFront,
        sandbox: Arc<Sandbox>,
        taker: &mut Taker,
    ) -> Anyhow<Arc<Self>> {
        let lock = taker.take(state.lock).context("take over the lock")?;
        let terminal = state.terminal.map(|fd| taker.take(fd)).transpose();
        let terminal = terminal.context("take over the terminal")?.map(File::from);
        let front = Arc::new(Self {
            id: state.id,
            container_dir: state.container_dir,
            dir: SandboxDir::inherited(state.dir, Lock::inherited(lock)),
            layout: Layout {
                state: state.state_root,
                run: state.run_root,
            },
            streams: Mutex::default(),
            terminal,
            network: match state.networked {
                true => Network::Own,
                false => Network::None,
            },
            lease: Lease::take_over(state.lease, taker).context("take over the lease")?,
            phase: watch::Sender::default(),
        });
        front.up(&sandbox, &state.container);
        Ok(front)
    }

    /// Goes on to the next phase; the last ones are final.
    fn go_on(&self, next: Phase) {
        self.phase.send_if_modified(|phase| {
            let open = matches!(phase, Phase::Waiting | Phase::Serving(_));
            if open {
                *phase = next;
            }
            open
        });
    }

    /// Returns the exit code when there is nothing more to supervise; the sandbox is
    /// gone then, and the state says so.
    async fn supervise(&self) -> u32 {
        let mut phase = self.phase.subscribe();
        let mut lease = std::pin::pin!(self.lease.broken());
        let mut leased = true;
        let mut sandbox: Option<Arc<Sandbox>> = None;
        let exit = loop {
            let now = phase.borrow_and_update().clone();
            match now {
                Phase::Waiting => {}
                Phase::Serving(serving) => sandbox = Some(serving),
                Phase::Ended(exit) => break exit,
                Phase::Ending(reason) => break killed(reason),
            }
            tokio::select! {
                biased;
                changed = phase.changed() => if changed.is_err() {
                    break killed(None);
                },
                reason = machine_ended(sandbox.as_ref()) => {
                    // The program's end may be about to be told.
                    let told = phase.wait_for(|phase| matches!(phase, Phase::Ended(_)));
                    break match timeout(END_GRACE, told).await.ok().and_then(|told| told.ok()).as_deref() {
                        Some(Phase::Ended(exit)) => exit.clone(),
                        _ => killed(Some(reason)),
                    };
                }
                gone = &mut lease, if leased => {
                    leased = false;
                    if gone {
                        break killed(Some("the command that created it is gone".into()));
                    }
                }
            }
        };
        let code = match exit.error {
            Some(_) => EXIT_KILLED,
            None => exit.code,
        };
        self.record(|state| {
            // What never came to life is removed.
            if state.status != BundleStatus::Creating {
                state.status = BundleStatus::Stopped;
                state.pid = 0;
                state.exit_code = Some(code);
                state.oom_killed = exit.oom_killed;
                state.error = exit.error.clone();
            }
        });
        if let Some(sandbox) = sandbox {
            // What the guest has not written back is lost with its machine.
            if exit.error.is_none() {
                sandbox.shutdown().await;
            } else {
                sandbox.kill_machine().await;
            }
        }
        code
    }

    /// Changes the state on disk; a failure is logged, for a container must not end for
    /// a full disk.
    fn record(&self, change: impl FnOnce(&mut BundleState)) {
        let result = BundleState::load(&self.container_dir).and_then(|mut state| {
            change(&mut state);
            state.store(&self.container_dir)
        });
        if let Err(e) = result {
            error!("keep the state: {e}");
        }
    }

    /// Removes the sandbox's directory, and the container's if nobody has heard of it.
    fn clean_up(&self) {
        let state = BundleState::load(&self.container_dir);
        if state.is_ok_and(|state| state.status == BundleStatus::Creating)
            && let Err(e) = fs::remove_dir_all(&self.container_dir)
        {
            error!("remove {}: {e}", self.container_dir.display());
        }
        // Whoever waits for its lock finds nothing left.
        if let Err(e) = self.dir.remove() {
            error!("{e}");
        }
    }
}

/// The end of what did not end by itself.
fn killed(error: Option<String>) -> ExitInfo {
    ExitInfo {
        code: EXIT_KILLED,
        at: now_ns(),
        oom_killed: false,
        error,
    }
}

/// Returns why the machine has ended; never, if there is none.
async fn machine_ended(sandbox: Option<&Arc<Sandbox>>) -> String {
    match sandbox {
        Some(sandbox) => sandbox.ended().await.to_string(),
        None => std::future::pending().await,
    }
}

#[async_trait]
impl Front for Bundle {
    fn place(&self) -> Place<'_> {
        Place {
            id: &self.id,
            run_dir: self.dir.path(),
            node: Some((&self.layout.state, &self.layout.run)),
            own: false,
            named: false,
            network: &self.network,
        }
    }

    async fn streams(&self, _: &str, streams: &Streams) -> Result<StdioTargets> {
        // The first process's are not named.
        if let Some(first) = self
            .streams
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take()
        {
            return Ok(first);
        }
        Ok(streams.targets())
    }

    fn mounting(&self, points: &[PathBuf]) -> Result<()> {
        match points {
            [] => Ok(()),
            _ => Err(Error::Invalid(
                "the root file system of a bundle is a directory".into(),
            )),
        }
    }

    fn up(&self, sandbox: &Arc<Sandbox>, id: &str) {
        signals::forward(sandbox, id);
        if let Some(terminal) = &self.terminal {
            signals::follow_window(sandbox, id, terminal);
        }
        self.go_on(Phase::Serving(sandbox.clone()));
    }

    fn tell(&self, event: Event<'_>) {
        match event {
            Event::Created(_) => self.record(|state| {
                state.status = BundleStatus::Created;
                state.pid = std::process::id();
            }),
            Event::Started { .. } | Event::Resumed { .. } => {
                self.record(|state| state.status = BundleStatus::Running);
            }
            Event::Paused { .. } => self.record(|state| state.status = BundleStatus::Paused),
            Event::Exited {
                exec_id: "", exit, ..
            } => self.go_on(Phase::Ended(exit.clone())),
            // Nobody listens.
            _ => {}
        }
    }

    fn shutdown(&self, _: &str, now: bool, count: Count) {
        if count.alive == 0 || now {
            self.go_on(Phase::Ending(None));
        }
    }

    async fn stop_saved(&self, _: &Arc<Sandbox>, _: &str) -> Result<()> {
        self.go_on(Phase::Ending(None));
        Ok(())
    }

    fn about(&self) -> AboutResponse {
        AboutResponse {
            front: "oci".into(),
            name: self.id.clone(),
            ..Default::default()
        }
    }

    fn state(&self, giver: &mut Giver) -> std::result::Result<FrontState, NoState> {
        let Phase::Serving(sandbox) = &*self.phase.borrow() else {
            return Err(NoState::never("it is ending"));
        };
        let containers = sandbox.container_ids();
        let [container] = containers.as_slice() else {
            return Err(NoState::never("it has no container"));
        };
        let terminal = self.terminal.as_ref();
        Ok(FrontState::Bundle(BundleFront {
            id: self.id.clone(),
            container_dir: self.container_dir.clone(),
            dir: self.dir.path().to_owned(),
            lock: giver.give(self.dir.lock()),
            state_root: self.layout.state.clone(),
            run_root: self.layout.run.clone(),
            terminal: terminal.map(|terminal| giver.give(terminal)),
            networked: self.network == Network::Own,
            lease: self.lease.state(giver),
            container: container.clone(),
        }))
    }
}
