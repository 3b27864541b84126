//! What the supervisor does for `walnut`, as containerd does for its own
//! containers: keep the record true, and end when the container has ended, and those that
//! have joined it ([`members`]).

mod container;
mod members;

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Context as _;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::error;
use ttrpc::asynchronous::Server;
use walnut_protocol::supervisor::AboutResponse;
use walnut_sandbox::{
    ContainerLinks, Error, ExitInfo, Furnished, LinksState, Lock, Network, Result, Sandbox, Status,
    StdioTargets,
    machine::takeover::{Fd, Giver, NoState, Taker},
};

use self::{
    container::{After, End, OwnContainer, lock, remove},
    members::{MemberState, Members},
};
use crate::{
    again,
    front::{Count, Event, Front, Place, Streams},
    lease::Lease,
    options::Options,
    pool::{self, Kept, KeptState},
    server,
    service::TaskService,
    upgrade::FrontState,
};

/// Exit code of what could not be started.
const EXIT_FAILED: u32 = 125;

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
    own: OwnContainer,
    members: watch::Sender<Members>,
    /// The container has ended, and its machine goes on for the members.
    outlived: AtomicBool,
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
    #[serde(default)]
    members: Vec<MemberState>,
    #[serde(default)]
    outlived: bool,
}

/// Supervises a container, in the machine that stands by for it if there is one.
pub(crate) async fn serve(
    options: Options,
    standby: Option<(Arc<Sandbox>, Kept)>,
) -> anyhow::Result<()> {
    let (standby, kept) = standby.unzip();
    let (owner, service, server) = begin(options, standby, kept).await?;
    run(owner, service, server).await
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
        own: OwnContainer {
            id: options.id,
            dir: options.container_dir,
            run_dir: options.run_dir,
            // Nobody but the owner may speak to the sandbox; the directory's mode says so
            // already, the lock says that it is ours.
            lock: Mutex::new(Some(options.lock)),
            lease: Lease::new(options.lease).context("watch the lease")?,
        },
        members: watch::Sender::default(),
        outlived: AtomicBool::new(false),
        kept: Mutex::new(kept),
        phase: watch::Sender::default(),
    };
    let owner = Arc::new(owner);
    let service = Arc::new(TaskService::new(owner.clone(), standby)?);
    let server = server::listen(options.socket, service.clone()).await?;
    Ok((owner, service, server))
}

/// From a container that is served to its end.
pub(crate) async fn run(
    owner: Arc<Owner>,
    service: Arc<TaskService>,
    mut server: Server,
) -> anyhow::Result<()> {
    let house = tokio::spawn(owner.clone().keep_house(service.clone()));
    owner.supervise(&service).await;
    house.abort();
    server.shutdown().await.context("stop serving")?;
    let again = owner.clean_up().await;
    let own = &owner.own;
    let held = lock(&own.lock).take();
    if again && let Some(held) = &held {
        let why = again::become_again(&own.id, &own.dir, &own.run_dir, held);
        own.update(|record| {
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
    run(owner, service, server).await
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
        let members = Self::take_members(state.members, taker);
        Ok(Self {
            own: OwnContainer {
                id: state.id,
                dir: state.container_dir,
                run_dir: state.run_dir,
                lock: Mutex::new(Some(Lock::inherited(held))),
                lease: Lease::take_over(state.lease, taker).context("take over the lease")?,
            },
            members: watch::Sender::new(members.context("take over what has joined")?),
            outlived: AtomicBool::new(state.outlived),
            kept: Mutex::new(kept.transpose().context("take over what a pool left")?),
            links,
            phase: watch::Sender::new(Phase::Serving { sandbox, id }),
        })
    }

    /// The sandbox came up.
    fn serving(&self, sandbox: Arc<Sandbox>, id: String) {
        self.own.built(&sandbox);
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
        if self.is_outlived() {
            // It has ended.
            return;
        }
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

    /// The sandbox, while there is one.
    fn sandbox(&self) -> Option<Arc<Sandbox>> {
        match &*self.phase.borrow() {
            Phase::Serving { sandbox, .. } => Some(sandbox.clone()),
            _ => None,
        }
    }

    /// Looks after how the container is, if that was asked for.
    pub(crate) fn look_after(&self) {
        if let Some(sandbox) = self.sandbox().filter(|_| !self.is_outlived()) {
            self.own.look_after(&sandbox);
        }
    }

    fn is_outlived(&self) -> bool {
        self.outlived.load(Ordering::Acquire)
    }

    /// Returns when there is nothing more to supervise; the sandbox is gone then.
    async fn supervise(&self, service: &TaskService) {
        let mut serving = None;
        if !self.is_outlived() {
            let (end, sandbox) = self.over().await;
            if self.close_if_alone() {
                self.own.record_end(&end, After::Policy);
                end_machine(sandbox, &end).await;
                return;
            }
            serving = sandbox;
            self.outlive(serving.as_ref(), end, service).await;
        }
        let serving = serving.or_else(|| self.sandbox());
        self.left_alone().await;
        let exit = ExitInfo {
            code: 0,
            at: walnut_sandbox::now_ns(),
            oom_killed: false,
            error: None,
        };
        end_machine(serving, &End::Exited(exit)).await;
    }

    /// The container has ended, or is to, and others are in its machine.
    async fn outlive(&self, sandbox: Option<&Arc<Sandbox>>, end: End, service: &TaskService) {
        if let (Some(sandbox), End::Told(_)) = (sandbox, &end) {
            self.own.kill(sandbox).await;
        }
        if let Some(sandbox) = sandbox {
            let (sandbox, id) = (sandbox.clone(), self.own.id.clone());
            self.phase.send_replace(Phase::Serving { sandbox, id });
        }
        // Before anybody hears of it.
        self.outlived.store(true, Ordering::Release);
        self.own.record_end(&end, After::Outlived);
        members::leave(service, &self.own.id).await;
    }

    /// Returns when the container has ended, or is to, and what it was in.
    async fn over(&self) -> (End, Option<Arc<Sandbox>>) {
        let mut phase = self.phase.subscribe();
        let mut lease = std::pin::pin!(self.own.lease.broken());
        let mut leased = true;
        let mut serving: Option<Arc<Sandbox>> = None;
        let end = loop {
            let now = phase.borrow_and_update().clone();
            match now {
                Phase::Waiting => {}
                Phase::Serving { sandbox, .. } => serving = Some(sandbox),
                Phase::Ending(reason) => break End::Told(reason),
                Phase::Failed(exit) => break End::Exited(exit),
            }
            tokio::select! {
                // A command goes as soon as it hears of the end: the end comes first.
                biased;
                exit = self.own.ended(serving.as_ref()) => break End::Exited(exit),
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
        (end, serving)
    }

    /// Takes the container from its networks, removes the run directory, and the container
    /// if it was to go with its end.
    /// True if it is to be started again.
    async fn clean_up(&self) -> bool {
        remove(&self.own.run_dir);
        if let Err(e) = self.links.unmake().await {
            // With its directory, from which the next command will try again.
            error!("{e}");
            return false;
        }
        self.own.clean_up()
    }
}

/// Ends a sandbox that nobody needs any more.
async fn end_machine(sandbox: Option<Arc<Sandbox>>, end: &End) {
    let Some(sandbox) = sandbox else { return };
    // A killed machine loses what the guest had not written back; only a
    // shared directory has anything to lose, and a failed one is dead.
    let failed = matches!(end, End::Exited(exit) if exit.error.is_some());
    if sandbox.has_volumes() && !failed && !matches!(end, End::Told(Some(_))) {
        sandbox.shutdown().await;
    } else {
        sandbox.kill_machine().await;
    }
}

#[async_trait]
impl Front for Owner {
    fn place(&self) -> Place<'_> {
        Place {
            id: &self.own.id,
            run_dir: &self.own.run_dir,
            node: self.own.node(),
            own: true,
            named: true,
            network: &Network::None,
        }
    }

    async fn streams(&self, _: &str, streams: &Streams) -> Result<StdioTargets> {
        Ok(streams.targets())
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
        let member = self.member(event.container());
        if let (Some(member), Event::Created(_), Some(sandbox)) = (&member, &event, self.sandbox())
        {
            member.built(&sandbox);
        }
        let own = member.as_ref().map_or(&self.own, |member| &member.own);
        let started = matches!(event, Event::Started { .. });
        own.tell(event);
        if let (true, Some(sandbox)) = (started, self.sandbox()) {
            own.look_after(&sandbox);
            pool::fill_later(self.own.node());
        }
    }

    fn shutdown(&self, id: &str, now: bool, count: Count) {
        match self.member(id) {
            Some(member) if now => member.end(None),
            Some(_) => {}
            None if count.alive == 0 || now => self.end(None),
            None => {}
        }
    }

    async fn stop_saved(&self, _: &Arc<Sandbox>, _: &str) -> Result<()> {
        self.end(None);
        Ok(())
    }

    fn about(&self) -> AboutResponse {
        AboutResponse {
            front: "walnut".into(),
            name: self.own.id.clone(),
            ..Default::default()
        }
    }

    fn state(&self, giver: &mut Giver) -> std::result::Result<FrontState, NoState> {
        let ending = || NoState::never("it is ending");
        let container = match &*self.phase.borrow() {
            Phase::Serving { id, .. } => id.clone(),
            _ => return Err(ending()),
        };
        let held = lock(&self.own.lock);
        let kept = lock(&self.kept);
        Ok(FrontState::Owner(OwnerState {
            id: self.own.id.clone(),
            container_dir: self.own.dir.clone(),
            run_dir: self.own.run_dir.clone(),
            lock: giver.give(held.as_ref().ok_or_else(ending)?),
            lease: self.own.lease.state(giver),
            kept: kept.as_ref().map(|kept| kept.state(giver)),
            links: self.links.state(giver)?,
            container,
            members: self.members_state(giver)?,
            outlived: self.is_outlived(),
        }))
    }
}
