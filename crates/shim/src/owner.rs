//! What the supervisor does for `walnut`, as containerd does for its own
//! containers: keep the record true, and end when the container has ended.

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::timeout};
use tracing::{error, warn};
use ttrpc::asynchronous::Server;
use walnut_protocol::supervisor::AboutResponse;
use walnut_sandbox::{
    ContainerLinks, Error, ExitInfo, Furnished, Input, Journal, Layout, LinksState, Lock,
    NamedVolumes, Network, Output, Record, Result, Sandbox, Status, StdioTargets,
    machine::takeover::{Fd, Giver, NoState, Taker},
};

use crate::{
    again,
    front::{Count, Event, Front, Place, Streams},
    health,
    lease::Lease,
    options::Options,
    pool::{self, Kept, KeptState},
    server,
    service::TaskService,
    upgrade::FrontState,
};

/// Exit code of what could not be started.
const EXIT_FAILED: u32 = 125;
/// Longest the end of a container may lag behind the end of its machine.
const END_GRACE: Duration = Duration::from_secs(5);

/// Where a supervisor stands.
#[derive(Debug, Clone, Default)]
pub(crate) enum Phase {
    /// No container has been created yet.
    #[default]
    Waiting,
    /// There is a sandbox, with the container `id` in it.
    Serving { sandbox: Arc<Sandbox>, id: String },
    /// The sandbox is to be ended now, for this reason if it is not the user's.
    Ending(Option<String>),
    /// It could not be started.
    Failed(ExitInfo),
}

/// A container made by `walnut`.
#[derive(Debug)]
pub(crate) struct Owner {
    id: String,
    container_dir: PathBuf,
    run_dir: PathBuf,
    /// The container's, until the end.
    lock: Mutex<Option<Lock>>,
    lease: Lease,
    /// What it has from its time in a pool.
    kept: Mutex<Option<Kept>>,
    links: ContainerLinks,
    phase: watch::Sender<Phase>,
}

/// The front end in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OwnerState {
    id: String,
    container_dir: PathBuf,
    run_dir: PathBuf,
    lock: Fd,
    lease: Option<Fd>,
    kept: Option<KeptState>,
    links: LinksState,
    /// In the sandbox.
    container: String,
}

/// Supervises a container, in the machine that stands by for it if there is one.
pub(crate) async fn serve(
    options: Options,
    standby: Option<(Arc<Sandbox>, Kept)>,
) -> anyhow::Result<()> {
    let (standby, kept) = standby.unzip();
    let (owner, _, server) = begin(options, standby, kept).await?;
    run(owner, server).await
}

/// Listens.
async fn begin(
    options: Options,
    standby: Option<Arc<Sandbox>>,
    kept: Option<Kept>,
) -> anyhow::Result<(Arc<Owner>, Arc<TaskService>, Server)> {
    let lock = options.lock.as_fd();
    let owner = Owner {
        links: links(&options.id, &options.container_dir, &options.run_dir, lock)?,
        id: options.id,
        container_dir: options.container_dir,
        run_dir: options.run_dir,
        // Nobody but the owner may speak to the sandbox; the directory's mode says so
        // already, the lock says that it is ours.
        lock: Mutex::new(Some(options.lock)),
        lease: Lease::new(options.lease).context("watch the lease")?,
        kept: Mutex::new(kept),
        phase: watch::Sender::default(),
    };
    let owner = Arc::new(owner);
    let service = Arc::new(TaskService::new(owner.clone(), standby)?);
    let server = server::listen(options.socket, service.clone()).await?;
    Ok((owner, service, server))
}

/// From a container that is served to its end.
pub(crate) async fn run(owner: Arc<Owner>, mut server: Server) -> anyhow::Result<()> {
    owner.supervise().await;
    server.shutdown().await.context("stop serving")?;
    let again = owner.clean_up().await;
    let held = lock(&owner.lock).take();
    if again && let Some(held) = &held {
        let why = again::become_again(&owner.id, &owner.container_dir, &owner.run_dir, held);
        owner.update(|record| {
            record.status = Status::Exited;
            record.error = Some(format!("start it again: {why:#}"));
        });
    }
    // Held to the very end: whoever waits for it finds nothing left.
    drop(held);
    drop(lock(&owner.kept).take());
    Ok(())
}

/// Starts a container again that has ended, and supervises it.
pub(crate) async fn serve_again(options: Options) -> anyhow::Result<()> {
    let (id, dir) = (options.id.clone(), options.container_dir.clone());
    let run_dir = options.run_dir.clone();
    let (owner, service, server) = begin(options, None, None).await?;
    let starting = {
        let (owner, service) = (owner.clone(), service.clone());
        async move {
            match again::start(&service, &id, &dir, &run_dir).await {
                Ok(true) => {}
                // Somebody has asked it to end meanwhile.
                Ok(false) => owner.end(None),
                Err(e) => owner.fail(ExitInfo {
                    code: EXIT_FAILED,
                    at: walnut_sandbox::now_ns(),
                    oom_killed: false,
                    error: Some(format!("{e:#}")),
                }),
            }
        }
    };
    tokio::spawn(starting);
    run(owner, server).await
}

/// A container's links; none are made yet. `lock` is the container's, and held.
fn links(
    id: &str,
    container_dir: &Path,
    run_dir: &Path,
    lock: BorrowedFd<'_>,
) -> Result<ContainerLinks> {
    let node = run_dir.parent().unwrap_or(run_dir);
    ContainerLinks::new(id, container_dir, node, lock)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why supervision ends.
enum End {
    Exited(ExitInfo),
    Told(Option<String>),
}

impl Owner {
    /// That of the program before, whose sandbox is `sandbox`.
    pub(crate) fn take_over(
        state: OwnerState,
        sandbox: Arc<Sandbox>,
        taker: &mut Taker,
    ) -> anyhow::Result<Self> {
        let held = taker.take(state.lock).context("take over the lock")?;
        let kept = state.kept.map(|kept| Kept::take_over(kept, taker));
        let links = links(
            &state.id,
            &state.container_dir,
            &state.run_dir,
            held.as_fd(),
        )?;
        let taken = links.take_over(state.links, taker);
        taken.context("take over the container's networks")?;
        let id = state.container;
        Ok(Self {
            id: state.id,
            container_dir: state.container_dir,
            run_dir: state.run_dir,
            lock: Mutex::new(Some(Lock::inherited(held))),
            lease: Lease::take_over(state.lease, taker).context("take over the lease")?,
            kept: Mutex::new(kept.transpose().context("take over what a pool left")?),
            links,
            phase: watch::Sender::new(Phase::Serving { sandbox, id }),
        })
    }

    /// The node's state and run directories, as the container's tell.
    fn node(&self) -> Option<(&Path, &Path)> {
        let state = self.container_dir.parent()?.parent()?;
        Some((state, self.run_dir.parent()?))
    }

    /// The sandbox came up.
    fn serving(&self, sandbox: Arc<Sandbox>, id: String) {
        let (memory, vcpus) = sandbox.size();
        let driver = sandbox.driver();
        let template = sandbox.template().map(str::to_owned);
        self.update(|record| {
            record.status = Status::Created;
            record.driver = Some(driver.into());
            record.memory = Some(memory);
            record.vcpus = Some(vcpus);
            record.template = template;
            record.shim_pid = Some(std::process::id());
        });
        self.phase.send_if_modified(|phase| {
            let waiting = matches!(phase, Phase::Waiting);
            if waiting {
                *phase = Phase::Serving { sandbox, id };
            }
            waiting
        });
    }

    /// Ends the sandbox.
    fn end(&self, reason: Option<String>) {
        self.phase.send_if_modified(|phase| {
            let ending = matches!(phase, Phase::Ending(_));
            if !ending {
                *phase = Phase::Ending(reason);
            }
            !ending
        });
    }

    /// It could not be started.
    fn fail(&self, exit: ExitInfo) {
        self.phase.send_if_modified(|phase| {
            let ending = matches!(phase, Phase::Ending(_));
            if !ending {
                *phase = Phase::Failed(exit);
            }
            !ending
        });
    }

    /// Changes the record; a failure is logged, for a container must not end for
    /// a full disk.
    fn update(&self, change: impl FnOnce(&mut Record)) {
        if let Err(e) = Record::change(&self.container_dir, change) {
            error!("keep the record: {e}");
        }
    }

    /// Writes down what has happened to the container.
    fn happened(&self, action: &str, more: &[(&str, String)]) {
        let record = Record::load(&self.container_dir);
        if let (Some((state, _)), Ok(record)) = (self.node(), record) {
            Journal::new(state).container(&record, action, more);
        }
    }

    fn kept_before(&self) -> bool {
        Record::load(&self.container_dir).is_ok_and(|record| record.terms.kept)
    }

    /// Looks after how the container is, if that was asked for.
    pub(crate) fn look_after(&self) {
        let Phase::Serving { sandbox, id } = self.phase.borrow().clone() else {
            return;
        };
        let check = Record::load(&self.container_dir).ok();
        let Some(check) = check.and_then(|record| record.terms.health) else {
            return;
        };
        let state = self.node().map(|(state, _)| state.to_owned());
        let dir = self.container_dir.clone();
        tokio::spawn(health::watch(dir, state, sandbox, id, check));
    }

    /// Returns when there is nothing more to supervise; the sandbox is gone then.
    async fn supervise(&self) {
        let mut phase = self.phase.subscribe();
        let mut lease = std::pin::pin!(self.lease.broken());
        let mut leased = true;
        let mut serving: Option<(Arc<Sandbox>, String)> = None;
        let end = loop {
            let now = phase.borrow_and_update().clone();
            match now {
                Phase::Waiting => {}
                Phase::Serving { sandbox, id } => serving = Some((sandbox, id)),
                Phase::Ending(reason) => break End::Told(reason),
                Phase::Failed(exit) => break End::Exited(exit),
            }
            tokio::select! {
                // A command goes as soon as it hears of the end: the end comes first.
                biased;
                exit = ended(serving.as_ref()) => break End::Exited(exit),
                changed = phase.changed() => if changed.is_err() {
                    break End::Told(None);
                },
                gone = &mut lease, if leased => {
                    leased = false;
                    if gone {
                        break End::Told(Some("the command that ran it is gone".into()));
                    }
                }
            }
        };
        let sandbox = serving.as_ref().map(|(sandbox, _)| sandbox.clone());
        self.record_end(&end);
        if let Some(sandbox) = sandbox {
            // A killed machine loses what the guest had not written back; only a
            // shared directory has anything to lose, and a failed one is dead.
            let failed = matches!(&end, End::Exited(exit) if exit.error.is_some());
            if sandbox.has_volumes() && !failed && !matches!(end, End::Told(Some(_))) {
                sandbox.shutdown().await;
            } else {
                sandbox.kill_machine().await;
            }
        }
    }

    /// Writes down how it ended, and whether it is to be started again.
    fn record_end(&self, end: &End) {
        let mut was_waiting = false;
        self.update(|record| {
            if record.status == Status::Restarting {
                // It has ended before, and is not to be started after all.
                was_waiting = true;
                (record.status, record.shim_pid) = (Status::Exited, None);
                return;
            }
            if record.status == Status::Creating && !record.terms.kept {
                // `walnut` removes what never came to life.
                return;
            }
            record.shim_pid = None;
            match end {
                End::Exited(exit) => {
                    record.finished_at = Some(exit.at);
                    record.exit_code = Some(exit.code);
                    record.oom_killed = exit.oom_killed;
                    record.error = exit.error.clone();
                }
                End::Told(reason) => {
                    record.finished_at = Some(walnut_sandbox::now_ns());
                    record.exit_code = Some(137);
                    record.error = reason.clone();
                }
            }
            // One that was told to end was told so by somebody.
            let ended = matches!(end, End::Exited(_)) && record.started_at.is_some();
            record.status = match ended && again::wanted(record) {
                true => Status::Restarting,
                false => Status::Exited,
            };
        });
        if was_waiting {
            return;
        }
        let code = |record: Record| record.exit_code.unwrap_or_default().to_string();
        if let Ok(record) = Record::load(&self.container_dir) {
            if record.oom_killed {
                self.happened("oom", &[]);
            }
            self.happened("die", &[("exitCode", code(record))]);
        }
    }

    /// Takes the container from its networks, removes the run directory, and the container
    /// if it was to go with its end.
    /// True if it is to be started again.
    async fn clean_up(&self) -> bool {
        remove(&self.run_dir);
        if let Err(e) = self.links.unmake().await {
            // With its directory, from which the next command will try again.
            error!("{e}");
            return false;
        }
        match Record::load(&self.container_dir) {
            Ok(record) if record.status == Status::Restarting => return true,
            Ok(record)
                if record.auto_remove
                    || record.status == Status::Creating && !record.terms.kept =>
            {
                self.happened("destroy", &[]);
                remove(&self.container_dir);
                self.remove_volumes(&record);
            }
            Ok(_) => {}
            Err(e) => warn!("read the record: {e}"),
        }
        false
    }

    /// Removes what nobody has named.
    fn remove_volumes(&self, record: &Record) {
        let Some((state, run)) = self.node() else {
            return;
        };
        let layout = Layout {
            state: state.to_owned(),
            run: run.to_owned(),
        };
        NamedVolumes::new(&layout).remove_anonymous(&layout, &record.terms.volumes);
    }
}

#[async_trait]
impl Front for Owner {
    fn place(&self) -> Place<'_> {
        Place {
            id: &self.id,
            run_dir: &self.run_dir,
            node: self.node(),
            own: true,
            named: true,
            network: &Network::None,
        }
    }

    async fn streams(&self, _: &str, streams: &Streams) -> Result<StdioTargets> {
        let some = |path: &str| (!path.is_empty()).then(|| PathBuf::from(path));
        Ok(StdioTargets {
            terminal: streams.terminal,
            stdin: some(&streams.stdin).map(Input::Path),
            stdout: some(&streams.stdout).map(Output::Path),
            stderr: some(&streams.stderr).map(Output::Path),
            returns: false,
        })
    }

    fn mounting(&self, points: &[PathBuf]) -> Result<()> {
        match points {
            [] => Ok(()),
            _ => Err(Error::Invalid(
                "the root file system of a container of walnut's is an image".into(),
            )),
        }
    }

    async fn furnish(&self) -> Result<Option<Furnished>> {
        self.links.make().await
    }

    fn up(&self, sandbox: &Arc<Sandbox>, id: &str) {
        self.serving(sandbox.clone(), id.to_owned());
    }

    fn tell(&self, event: Event<'_>) {
        match event {
            Event::Started { .. } => {
                self.update(|record| {
                    record.status = Status::Running;
                    record.started_at = Some(walnut_sandbox::now_ns());
                    record.terms.kept = !record.auto_remove;
                });
                self.happened("start", &[]);
                self.look_after();
                pool::fill_later(self.node());
            }
            Event::Paused { .. } => {
                self.update(|record| record.status = Status::Paused);
                self.happened("pause", &[]);
            }
            Event::Resumed { .. } => {
                self.update(|record| record.status = Status::Running);
                self.happened("unpause", &[]);
            }
            // One that was there before is not made again.
            Event::Created(_) if !self.kept_before() => self.happened("create", &[]),
            Event::ExecStarted { exec_id, .. } if !exec_id.starts_with(health::EXEC) => {
                self.happened("exec_start", &[("execID", exec_id.to_owned())]);
            }
            Event::Checkpointed { .. } => self.happened("checkpoint", &[]),
            // The end is for `supervise`; the rest is in no record.
            _ => {}
        }
    }

    fn shutdown(&self, now: bool, count: Count) {
        if count.alive == 0 || now {
            self.end(None);
        }
    }

    async fn stop_saved(&self, _: &Arc<Sandbox>, _: &str) -> Result<()> {
        self.end(None);
        Ok(())
    }

    fn about(&self) -> AboutResponse {
        AboutResponse {
            front: "walnut".into(),
            name: self.id.clone(),
            ..Default::default()
        }
    }

    fn state(&self, giver: &mut Giver) -> std::result::Result<FrontState, NoState> {
        let ending = || NoState::never("it is ending");
        let container = match &*self.phase.borrow() {
            Phase::Serving { id, .. } => id.clone(),
            _ => return Err(ending()),
        };
        let held = lock(&self.lock);
        let kept = lock(&self.kept);
        Ok(FrontState::Owner(OwnerState {
            id: self.id.clone(),
            container_dir: self.container_dir.clone(),
            run_dir: self.run_dir.clone(),
            lock: giver.give(held.as_ref().ok_or_else(ending)?),
            lease: self.lease.state(giver),
            kept: kept.as_ref().map(|kept| kept.state(giver)),
            links: self.links.state(giver)?,
            container,
        }))
    }
}

fn remove(dir: &Path) {
    if let Err(e) = std::fs::remove_dir_all(dir)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        error!("remove {}: {e}", dir.display());
    }
}

/// Returns how the sandbox's container ended; never, if there is none.
async fn ended(serving: Option<&(Arc<Sandbox>, String)>) -> ExitInfo {
    let Some((sandbox, id)) = serving else {
        return std::future::pending().await;
    };
    tokio::select! {
        Ok(exit) = sandbox.wait(id, "") => exit,
        machine = sandbox.ended() => match timeout(END_GRACE, sandbox.wait(id, "")).await {
            Ok(Ok(exit)) => exit,
            // It was never started, so nobody waits for it.
            _ => ExitInfo {
                code: 255,
                at: walnut_sandbox::now_ns(),
                oom_killed: false,
                error: Some(machine.to_string()),
            },
        },
    }
}
