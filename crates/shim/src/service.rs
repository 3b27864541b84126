//! containerd's Task API over a [`Sandbox`]: translation, and nothing else. [`sandbox_api`]
//! is the Sandbox API beside it.

mod ends;
mod pods;
mod sandbox_api;

pub(crate) use sandbox_api::{SandboxPod, SandboxService, Shared as SharedSandboxService};

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc, Mutex as StdMutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status as TaskStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::{Message, MessageField, well_known_types::any::Any},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{
        Mutex,
        oneshot::{self, error::TryRecvError},
    },
    time::timeout,
};
use tracing::debug;
use walnut_protocol::supervisor::AttachRequest;
use walnut_sandbox::{
    ANNOTATION_RECLAIM, Assets, Busy, ContainerRequest, Error, ExecRequest, Furnished,
    GUEST_PROCESS, ProcessState, RootfsMount, Sandbox, SandboxConfig, Settings,
    machine::takeover::NoState,
};

use crate::{
    checkpoint,
    containerd::timestamp,
    fault::fault,
    front::{Count, Event, Front, Streams},
    metrics,
    mount::{self, Mount, Mounted, Way},
    pressure, settings,
    tasks::{Tasks, TasksState},
    template,
};

/// How long who connects waits for a creation that is under way. containerd waits for five
/// seconds.
const CREATION: Duration = Duration::from_secs(2);

/// The Task service of one sandbox.
#[derive(Debug)]
pub(crate) struct TaskService {
    front: Arc<dyn Front>,
    assets: Assets,
    sandbox: StdMutex<Option<Arc<Sandbox>>>,
    /// Held while a container is created: one after the other.
    creating: Mutex<()>,
    /// A machine for the first container, if it fits.
    standby: Mutex<Option<Arc<Sandbox>>>,
    tasks: Arc<Tasks>,
    /// The machine is that of a pod of the Sandbox API, which says when it begins and ends.
    announced: AtomicBool,
    /// What is being done, whoever may still wait for it.
    pub(crate) busy: Busy,
}

/// The service in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ServiceState {
    assets: PathBuf,
    tasks: TasksState,
}

pub(crate) type Reply<T> = ttrpc::Result<T>;

impl TaskService {
    pub(crate) fn new(
        front: Arc<dyn Front>,
        standby: Option<Arc<Sandbox>>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            standby: Mutex::new(standby),
            front,
            assets: Assets::find().context("start the supervisor")?,
            sandbox: StdMutex::default(),
            creating: Mutex::default(),
            tasks: Arc::default(),
            announced: AtomicBool::new(false),
            busy: Busy::default(),
        })
    }

    /// That of the program before, whose sandbox is `sandbox`.
    pub(crate) fn take_over(
        front: Arc<dyn Front>,
        sandbox: Arc<Sandbox>,
        state: ServiceState,
    ) -> Self {
        let (tasks, untold) = Tasks::take_over(state.tasks);
        let mut service = Self {
            standby: Mutex::default(),
            front,
            // Its machine is there; whatever another one would be made of is not missed.
            assets: Assets::find().unwrap_or(Assets { dir: state.assets }),
            sandbox: StdMutex::default(),
            creating: Mutex::default(),
            tasks: Arc::new(tasks),
            announced: AtomicBool::new(false),
            busy: Busy::default(),
        };
        for (id, exec_id) in untold {
            service.follow(&sandbox, &id, &exec_id);
        }
        for id in service.tasks.ids() {
            service.watch(&sandbox, &id);
        }
        let id = sandbox.container_ids().into_iter().next();
        let id = id.unwrap_or_else(|| service.front.place().id.to_owned());
        pressure::watch(&sandbox, &id);
        service.sandbox = StdMutex::new(Some(sandbox));
        service
    }

    /// Whom it works for.
    pub(crate) fn front(&self) -> &Arc<dyn Front> {
        &self.front
    }

    /// What the next program makes the containers its own from.
    pub(crate) fn state_of_tasks(&self) -> ServiceState {
        ServiceState {
            assets: self.assets.dir.clone(),
            tasks: self.tasks.state(),
        }
    }

    /// The sandbox, if another program could go on with it now.
    pub(crate) fn upgradable(&self) -> Result<Arc<Sandbox>, NoState> {
        self.busy.quiet()?;
        let sandbox = self.sandbox.lock().unwrap_or_else(|e| e.into_inner());
        sandbox
            .clone()
            .ok_or_else(|| NoState::never("it has no machine yet"))
    }

    /// What a machine of this supervisor's is made with.
    fn config(&self, settings: Settings) -> SandboxConfig {
        let place = self.front.place();
        SandboxConfig {
            id: place.id.to_owned(),
            run_dir: place.run_dir.to_owned(),
            assets: self.assets.clone(),
            settings,
            cache: place.node.map(|(_, run)| run.into()),
            templates: template::store(place),
            network: place.network.clone(),
            names: None,
        }
    }

    /// The machine that stood by, with its container, if there is one that fits.
    async fn stood_by(
        &self,
        checkpoint: &str,
        settings: &Settings,
        furnished: &mut Option<Furnished>,
        request: &ContainerRequest,
    ) -> Reply<Option<Arc<Sandbox>>> {
        let Some(sandbox) = self.standby.lock().await.take() else {
            return Ok(None);
        };
        let attempt = async {
            if checkpoint.is_empty() && sandbox.fits(request, settings, furnished.is_some())? {
                sandbox.adopt(request, furnished.take()).await?;
                return Ok(true);
            }
            Ok(false)
        };
        match attempt.await {
            Ok(true) => Ok(Some(sandbox)),
            Ok(false) => {
                sandbox.kill_machine().await;
                Ok(None)
            }
            Err(e) => {
                sandbox.kill_machine().await;
                Err(fault(&e))
            }
        }
    }

    /// A machine made for a container, with it; from a checkpoint unless that is empty.
    async fn started(
        &self,
        checkpoint: &str,
        settings: Settings,
        furnished: Option<Furnished>,
        request: &ContainerRequest,
    ) -> Reply<Arc<Sandbox>> {
        let mut config = self.config(settings);
        if let Some(Furnished { network, names }) = furnished {
            config.network = network;
            config.names = Some(names);
        }
        let sandbox = match checkpoint {
            "" => Sandbox::create(config, request).await,
            from => Sandbox::restore(config, request, from.as_ref())
                .await
                .map(Arc::new),
        };
        sandbox.map_err(|e| fault(&e))
    }

    /// The sandbox with a container more; whether it is the first.
    async fn with(
        &self,
        req: &CreateTaskRequest,
        request: &ContainerRequest,
    ) -> Reply<(Arc<Sandbox>, bool)> {
        let checkpoint = &*req.checkpoint;
        let there = self
            .sandbox
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .clone();
        if let Some(sandbox) = there {
            if !checkpoint.is_empty() {
                return Err(fault(&Error::Invalid(format!(
                    "create container {}: a checkpoint is a whole sandbox's, and this one has containers already",
                    request.id
                ))));
            }
            sandbox.add(request).await.map_err(|e| fault(&e))?;
            return Ok((sandbox, false));
        }
        if self.announced.load(Ordering::Acquire) {
            let early = format!(
                "create container {}: its sandbox has not been started",
                request.id
            );
            return Err(fault(&Error::WrongState(early)));
        }
        let settings = settings::of(req.options.as_ref()).map_err(|e| fault(&e))?;
        let mut furnished = self.front.furnish().await.map_err(|e| fault(&e))?;
        let sandbox = match self
            .stood_by(checkpoint, &settings, &mut furnished, request)
            .await?
        {
            Some(sandbox) => sandbox,
            None => {
                self.started(checkpoint, settings, furnished, request)
                    .await?
            }
        };
        let mut slot = self.sandbox.lock().unwrap_or_else(|e| e.into_inner());
        *slot = Some(sandbox.clone());
        Ok((sandbox, true))
    }

    fn sandbox(&self) -> Reply<Arc<Sandbox>> {
        let slot = self.sandbox.lock().unwrap_or_else(|e| e.into_inner());
        slot.clone()
            .ok_or_else(|| fault(&Error::NotFound("the sandbox has no container yet".into())))
    }

    /// Whether root file systems can be disks that the guest writes to, in the machine
    /// that is there or the one that is to be made.
    fn takes_disks(&self, req: &CreateTaskRequest) -> Result<bool, Error> {
        let there = self.sandbox.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(sandbox) = &*there {
            return Ok(sandbox.takes_disks());
        }
        let config = self.config(settings::of(req.options.as_ref())?);
        config.takes_disks(req.bundle.as_ref(), self.front.place().own)
    }

    /// Makes the root file system that a request describes.
    async fn rootfs(
        &self,
        req: &CreateTaskRequest,
    ) -> Result<(Vec<RootfsMount>, Option<Mounted>), Error> {
        let bundle = Path::new(&req.bundle);
        let mounts: Vec<Mount> = req
            .rootfs
            .iter()
            .map(|m| Mount {
                kind: m.type_.clone(),
                source: m.source.clone().into(),
                options: m.options.clone(),
            })
            .collect();
        let takes_disks = mounts.iter().any(Mount::is_disk) && self.takes_disks(req)?;
        match Way::of(&mounts, bundle, takes_disks) {
            Way::Direct(rootfs) => Ok((rootfs.into_iter().collect(), None)),
            Way::Mounted(target) => {
                self.front.mounting(&self.tasks.mount_points(&target))?;
                mount::mount_all(mounts, target.clone()).await?;
                let rootfs = RootfsMount {
                    kind: "bind".into(),
                    source: target.clone(),
                    read_only: false,
                };
                Ok((vec![rootfs], Some(Mounted(target.as_path().into()))))
            }
        }
    }
}

/// The calls, one each.
impl TaskService {
    /// `gone` comes when nobody waits for the answer any more.
    pub(crate) async fn create(
        &self,
        req: CreateTaskRequest,
        mut gone: oneshot::Receiver<Infallible>,
    ) -> Reply<CreateTaskResponse> {
        let _one = self.creating.lock().await;
        let id = req.id.clone();
        let known = self.tasks.has(&id);
        let first = self.sandbox().is_err();
        let reply = {
            let mut created = pin!(self.created(req));
            tokio::select! {
                reply = &mut created => reply,
                // A machine ends when it is dropped; what is under way in one that others
                // use has to come to its end first.
                _ = &mut gone => match first {
                    true => Err(fault(&Error::Invalid("nobody waits for it".into()))),
                    false => created.await,
                },
            }
        };
        if !known && matches!(gone.try_recv(), Err(TryRecvError::Closed)) {
            self.abandoned(&id, reply.is_ok()).await;
        }
        reply
    }

    async fn created(&self, req: CreateTaskRequest) -> Reply<CreateTaskResponse> {
        if self.tasks.has(&req.id) {
            let taken = format!("create container {}: it exists already", req.id);
            return Err(fault(&Error::AlreadyExists(taken)));
        }
        let streams = Streams {
            terminal: req.terminal,
            stdin: req.stdin.clone(),
            stdout: req.stdout.clone(),
            stderr: req.stderr.clone(),
        };
        let (rootfs, mounted) = self.rootfs(&req).await.map_err(|e| fault(&e))?;
        let stdio = self.front.streams(&req.id, &streams).await;
        let place = self.front.place();
        let request = ContainerRequest {
            own: place.own,
            named: place.named,
            id: req.id.clone(),
            bundle: req.bundle.clone().into(),
            rootfs,
            stdio: stdio.map_err(|e| fault(&e))?,
        };
        let (sandbox, first) = self.with(&req, &request).await?;
        self.tasks.add(&req.id, streams, mounted);
        if first {
            self.front.up(&sandbox, &req.id);
            pressure::watch(&sandbox, &req.id);
            if let Some(wanted) = sandbox.wanted_template() {
                template::make_later(self.front.place(), sandbox.settings(), wanted);
            }
        }
        self.front.tell(Event::Created(&req));
        self.watch(&sandbox, &req.id);
        let state = sandbox.state(&req.id, "").map_err(|e| fault(&e))?;
        Ok(CreateTaskResponse {
            pid: self.front.pid(state.pid),
            ..Default::default()
        })
    }

    pub(crate) async fn start(&self, req: StartRequest) -> Reply<StartResponse> {
        let sandbox = self.sandbox()?;
        let (id, exec_id) = (&*req.id, &*req.exec_id);
        let started = sandbox.start(id, exec_id).await;
        if started.is_ok() {
            self.front.tell(match exec_id {
                "" => Event::Started { id },
                _ => Event::ExecStarted { id, exec_id },
            });
        }
        if started.is_ok() || exec_id.is_empty() {
            self.follow(&sandbox, id, exec_id);
        }
        Ok(StartResponse {
            pid: self.front.pid(started.map_err(|e| fault(&e))?),
            ..Default::default()
        })
    }

    pub(crate) async fn state(&self, req: StateRequest) -> Reply<StateResponse> {
        let state = self
            .sandbox()?
            .state(&req.id, &req.exec_id)
            .map_err(|e| fault(&e))?;
        let streams = self.tasks.streams(&req.id, &req.exec_id);
        let mut reply = StateResponse {
            id: req.id,
            exec_id: req.exec_id,
            bundle: state.bundle.display().to_string(),
            pid: self.front.pid(state.pid),
            stdin: streams.stdin,
            stdout: streams.stdout,
            stderr: streams.stderr,
            terminal: streams.terminal,
            ..Default::default()
        };
        reply.status = match state.state {
            ProcessState::Created => TaskStatus::CREATED,
            ProcessState::Running => TaskStatus::RUNNING,
            ProcessState::Paused => TaskStatus::PAUSED,
            ProcessState::Stopped(exit) => {
                reply.exit_status = self.front.verdict(&exit).unwrap_or(exit.code);
                reply.exited_at = MessageField::some(timestamp(exit.at));
                TaskStatus::STOPPED
            }
        }
        .into();
        Ok(reply)
    }

    pub(crate) async fn exec(&self, req: ExecProcessRequest) -> Reply<Empty> {
        let sandbox = self.sandbox()?;
        let state = sandbox.state(&req.id, "").map_err(|e| fault(&e))?.state;
        let state = match state {
            ProcessState::Stopped(_) => Some("stopped"),
            ProcessState::Paused => Some("paused"),
            _ => None,
        };
        if let Some(state) = state {
            let refused = format!("exec in {}: cannot exec in a {state} container", req.id);
            return Err(fault(&Error::WrongState(refused)));
        }
        let (id, exec_id) = (&*req.id, &*req.exec_id);
        if sandbox.state(id, exec_id).is_ok() {
            let taken = format!("exec in {id}: a process {exec_id:?} exists already");
            return Err(fault(&Error::AlreadyExists(taken)));
        }
        let streams = Streams {
            terminal: req.terminal,
            stdin: req.stdin.clone(),
            stdout: req.stdout.clone(),
            stderr: req.stderr.clone(),
        };
        let stdio = self.front.streams(id, &streams).await;
        let request = ExecRequest {
            exec_id: exec_id.to_owned(),
            process: req.spec.value.clone(),
            stdio: stdio.map_err(|e| fault(&e))?,
        };
        sandbox.exec(id, request).map_err(|e| fault(&e))?;
        self.tasks.add_exec(id, exec_id, streams);
        self.front.tell(Event::ExecAdded { id, exec_id });
        Ok(Empty::default())
    }

    /// Has a process's streams lead to FIFOs as well.
    pub(crate) fn attach(&self, req: &AttachRequest) -> Reply<()> {
        let path = |path: &'_ str| (!path.is_empty()).then(|| PathBuf::from(path));
        let paths = [&req.stdin, &req.stdout, &req.stderr].map(|p| path(p));
        let paths = paths.each_ref().map(Option::as_deref);
        let attached = self.sandbox()?.attach_streams(&req.id, &req.exec_id, paths);
        attached.map_err(|e| fault(&e))
    }

    pub(crate) async fn wait(&self, req: WaitRequest) -> Reply<WaitResponse> {
        let sandbox = self.sandbox()?;
        let exit = sandbox
            .wait(&req.id, &req.exec_id)
            .await
            .map_err(|e| fault(&e))?;
        Ok(WaitResponse {
            exit_status: self.front.verdict(&exit).map_err(|e| fault(&e))?,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    pub(crate) async fn kill(&self, req: KillRequest) -> Reply<Empty> {
        let sandbox = self.sandbox()?;
        let (id, exec_id) = (&*req.id, &*req.exec_id);
        let before = sandbox.state(id, exec_id).map_err(|e| fault(&e))?.state;
        sandbox
            .kill(id, exec_id, req.signal, req.all)
            .await
            .map_err(|e| fault(&e))?;
        // Whoever is started is followed from then on.
        if before == ProcessState::Created && exec_id.is_empty() {
            self.follow(&sandbox, id, exec_id);
        }
        Ok(Empty::default())
    }

    pub(crate) async fn resize_pty(&self, req: ResizePtyRequest) -> Reply<Empty> {
        let sandbox = self.sandbox()?;
        sandbox
            .resize(&req.id, &req.exec_id, req.width, req.height)
            .await
            .map_err(|e| fault(&e))?;
        Ok(Empty::default())
    }

    pub(crate) async fn close_io(&self, req: CloseIORequest) -> Reply<Empty> {
        if req.stdin {
            let sandbox = self.sandbox()?;
            sandbox
                .close_stdin(&req.id, &req.exec_id)
                .map_err(|e| fault(&e))?;
        }
        Ok(Empty::default())
    }

    pub(crate) async fn pause(&self, req: PauseRequest) -> Reply<Empty> {
        let sandbox = self.sandbox()?;
        sandbox.pause(&req.id).await.map_err(|e| fault(&e))?;
        self.front.tell(Event::Paused { id: &req.id });
        Ok(Empty::default())
    }

    pub(crate) async fn resume(&self, req: ResumeRequest) -> Reply<Empty> {
        let sandbox = self.sandbox()?;
        sandbox.resume(&req.id).await.map_err(|e| fault(&e))?;
        self.front.tell(Event::Resumed { id: &req.id });
        Ok(Empty::default())
    }

    pub(crate) async fn update(&self, req: UpdateTaskRequest) -> Reply<Empty> {
        let sandbox = self.sandbox()?;
        if let Some(bytes) = req.annotations.get(ANNOTATION_RECLAIM) {
            let bytes = bytes.parse().map_err(|e| {
                let bad = format!("{ANNOTATION_RECLAIM}: {bytes:?}: {e}; give bytes, 0 for all");
                fault(&Error::Invalid(bad))
            })?;
            let freed = sandbox.reclaim(bytes).await.map_err(|e| fault(&e))?;
            tracing::info!(freed, "memory reclaimed, as asked");
        }
        let Some(resources) = req.resources.into_option().map(|any| any.value) else {
            return Ok(Empty::default());
        };
        sandbox
            .update(&req.id, resources)
            .await
            .map_err(|e| fault(&e))?;
        Ok(Empty::default())
    }

    pub(crate) async fn pids(&self, req: PidsRequest) -> Reply<PidsResponse> {
        let (pids, known) = self
            .sandbox()?
            .guest_processes(&req.id)
            .await
            .map_err(|e| fault(&e))?;
        // Other clients know no such type, and some fail on one.
        let own = self.front.place().own;
        let info = |pid: u32| {
            let process = known.iter().find(|p| own && p.pid == pid)?;
            Some(Any {
                type_url: GUEST_PROCESS.into(),
                value: process.write_to_bytes().ok()?,
                ..Default::default()
            })
        };
        let shown = self.front.pids(pids).into_iter().map(|pid| ProcessInfo {
            pid,
            info: info(pid).into(),
            ..Default::default()
        });
        Ok(PidsResponse {
            processes: shown.collect(),
            ..Default::default()
        })
    }

    pub(crate) async fn stats(&self, req: StatsRequest) -> Reply<StatsResponse> {
        let sandbox = self.sandbox()?;
        let container = sandbox.stats(&req.id).await.map_err(|e| fault(&e))?;
        let guest = sandbox.guest_memory().await.map_err(|e| fault(&e))?;
        let value = metrics::encode(&container, &guest)
            .map_err(|e| fault(&Error::Invalid(format!("encode the figures: {e}"))))?;
        Ok(StatsResponse {
            stats: MessageField::some(Any {
                type_url: metrics::KIND.into(),
                value,
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    pub(crate) async fn delete(&self, req: DeleteRequest) -> Reply<DeleteResponse> {
        let (id, exec_id) = (&*req.id, &*req.exec_id);
        let sandbox = self.sandbox()?;
        let deleted = sandbox.delete(id, exec_id).await;
        let (pid, exit) = deleted.map_err(|e| fault(&e))?;
        if exec_id.is_empty() {
            // Its end is told of first.
            for follower in self.tasks.followers(id, true) {
                let _ = follower.await;
            }
            if let Some(rootfs) = self.tasks.remove(id) {
                let forget = async {
                    if let Err(e) = sandbox.reclaim(0).await {
                        debug!("have the guest forget a root file system: {e}");
                    }
                };
                rootfs.end(forget).await;
            }
            self.front.tell(Event::Deleted { id, exit: &exit });
        } else {
            self.tasks.remove_exec(id, exec_id);
        }
        Ok(DeleteResponse {
            pid: self.front.pid(pid),
            exit_status: self.front.verdict(&exit).unwrap_or(exit.code),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    pub(crate) async fn connect(&self, req: ConnectRequest) -> Reply<ConnectResponse> {
        // containerd asks by the ID of a pod of the Sandbox API as well.
        let announced = self.announced.load(Ordering::Acquire);
        if !announced && self.front.wants_container() && !self.tasks.has(&req.id) {
            // One may be being created for somebody who has gone, and goes as well.
            let _one = timeout(CREATION, self.creating.lock()).await;
            if !self.tasks.has(&req.id) {
                let none = format!("connect to container {}: there is none", req.id);
                return Err(fault(&Error::NotFound(none)));
            }
        }
        let state = self.sandbox().ok().and_then(|s| s.state(&req.id, "").ok());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: state.map_or(0, |state| self.front.pid(state.pid)),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    pub(crate) async fn shutdown(&self, req: ShutdownRequest) -> Reply<Empty> {
        // One that is being created counts.
        let _one = self.creating.lock().await;
        if self.announced.load(Ordering::Acquire) {
            // Whoever asked for the sandbox ends it (`ShutdownSandbox`).
            return Ok(Empty::default());
        }
        self.front.shutdown(&req.id, req.now, self.count());
        Ok(Empty::default())
    }

    /// Ends what has no container, and is no pod that somebody asked for by itself.
    pub(crate) async fn end_if_empty(&self) {
        let _one = self.creating.lock().await;
        let count = self.count();
        if count.all == 0 && !self.announced.load(Ordering::Acquire) {
            self.front.shutdown(self.front.place().id, false, count);
        }
    }

    fn count(&self) -> Count {
        let ids = self.tasks.ids();
        let sandbox = self.sandbox().ok();
        let alive = |id: &&String| {
            let state = sandbox.as_ref().and_then(|s| s.state(id, "").ok());
            state.is_some_and(|s| !matches!(s.state, ProcessState::Stopped(_)))
        };
        Count {
            all: ids.len(),
            alive: ids.iter().filter(alive).count(),
        }
    }

    /// Who asked for a container has gone while it was being created, and nobody will ask
    /// for it: it goes as well.
    async fn abandoned(&self, id: &str, created: bool) {
        if created {
            let delete = DeleteRequest {
                id: id.into(),
                ..Default::default()
            };
            if let Err(e) = self.delete(delete).await {
                tracing::warn!(id, "remove a container that nobody waits for: {e}");
            }
        }
        self.front.abandoned(self.count());
    }

    pub(crate) async fn checkpoint(&self, req: CheckpointTaskRequest) -> Reply<Empty> {
        let options = checkpoint::options(req.options.as_ref()).map_err(|e| fault(&e))?;
        let sandbox = self.sandbox()?;
        let (id, path) = (&*req.id, &*req.path);
        sandbox
            .checkpoint(id, path.as_ref(), options)
            .await
            .map_err(|e| fault(&e))?;
        self.front.tell(Event::Checkpointed { id, path });
        if options.exit {
            let stopped = self.front.stop_saved(&sandbox, id).await;
            stopped.map_err(|e| fault(&e))?;
        }
        Ok(Empty::default())
    }
}
