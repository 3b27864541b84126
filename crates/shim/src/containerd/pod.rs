//! A sandbox of containerd's: containers come and go in it, and it ends when
//! containerd has taken the last one away.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use async_trait::async_trait;
use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{
        TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO,
        TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    protobuf::{MessageDyn, MessageField},
    topics,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{debug, warn};
use walnut_protocol::supervisor::AboutResponse;
use walnut_sandbox::{
    ExitInfo, Layout, Lock, Network, Result, Sandbox, SandboxDir, StdioTargets,
    machine::takeover::{Fd, Giver, NoState, Taker},
};

use super::{
    INIT_PID, SOCKET,
    events::{EventState, Publisher, timestamp},
    group::Outline,
    logger::{self, Logger, Whose},
};
use crate::{
    front::{Count, Event, Front, Place, Streams},
    upgrade::FrontState,
};

/// What a process is said to have ended with that its machine took along: killed.
const EXIT_KILLED: u32 = 128 + 9;
/// Longest containerd may take for the last events.
const FAREWELL: Duration = Duration::from_secs(2);

/// The front end of a sandbox of containerd's.
#[derive(Debug)]
pub(crate) struct Pod {
    me: Weak<Self>,
    namespace: String,
    /// On this host: namespaces may have sandboxes of the same ID.
    name: String,
    dir: SandboxDir,
    layout: Layout,
    publisher: Publisher,
    sandbox: Mutex<Option<Arc<Sandbox>>>,
    /// The machine's, which stands for all processes in it.
    pid: AtomicU32,
    /// Containers that ran out of memory, and that containerd knows it of.
    out_of_memory: Mutex<HashSet<String>>,
    /// How readily each container is to be killed.
    oom_scores: Mutex<HashMap<String, i32>>,
    loggers: Mutex<Vec<Logger>>,
    end: watch::Sender<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Pod {
    /// The sandbox `id`, whose directory is `dir`; events go to `ttrpc_address`.
    pub(crate) fn new(
        (namespace, id): (String, String),
        dir: SandboxDir,
        layout: Layout,
        ttrpc_address: Option<&str>,
    ) -> Arc<Self> {
        let digest = dir.path().file_name().unwrap_or_default();
        let name = format!("{id}-{}", digest.to_string_lossy());
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            publisher: Publisher::new(&namespace, ttrpc_address),
            namespace,
            name,
            dir,
            layout,
            sandbox: Mutex::default(),
            pid: AtomicU32::new(0),
            out_of_memory: Mutex::default(),
            oom_scores: Mutex::default(),
            loggers: Mutex::default(),
            end: watch::Sender::new(false),
        })
    }

    /// That of the program before, whose sandbox is `sandbox`.
    pub(crate) fn take_over(
        state: PodState,
        sandbox: Arc<Sandbox>,
        taker: &mut Taker,
    ) -> anyhow::Result<Arc<Self>> {
        let lock_file = taker.take(state.lock).context("take over the lock")?;
        let dir = SandboxDir::inherited(state.dir, Lock::inherited(lock_file));
        let address = state.ttrpc_address.as_deref();
        let publisher = Publisher::take_over(&state.namespace, address, state.events)?;
        let layout = Layout {
            state: state.state_root,
            run: state.run_root,
        };
        let pod = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            publisher,
            namespace: state.namespace,
            name: state.name,
            dir,
            layout,
            sandbox: Mutex::default(),
            pid: AtomicU32::new(state.pid),
            out_of_memory: Mutex::new(state.out_of_memory),
            oom_scores: Mutex::new(state.oom_scores),
            loggers: Mutex::new(state.loggers.into_iter().map(Logger::take_over).collect()),
            end: watch::Sender::new(false),
        });
        pod.up(&sandbox, "");
        Ok(pod)
    }

    /// The sandbox's directory.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns when there is nothing more to supervise; the machine is gone then.
    pub(crate) async fn supervise(&self) {
        let mut end = self.end.subscribe();
        // The sender lives as long as `self`.
        let _ = end.wait_for(|end| *end).await;
        let sandbox = lock(&self.sandbox).take();
        if let Some(sandbox) = sandbox {
            if sandbox.has_volumes() && !sandbox.processes().is_empty() {
                sandbox.shutdown().await;
            } else {
                sandbox.kill_machine().await;
            }
        }
        let loggers = std::mem::take(&mut *lock(&self.loggers));
        logger::finish(loggers).await;
        self.publisher.close(FAREWELL).await;
    }

    /// Removes what the sandbox had on disk.
    pub(crate) fn clean_up(&self) {
        if let Err(e) = self.dir.remove() {
            warn!("{e}");
        }
    }

    /// Tells containerd of containers that run out of memory, while the machine lives.
    async fn watch_memory(pod: Weak<Self>, sandbox: Weak<Sandbox>) {
        while let Some(machine) = sandbox.upgrade() {
            let id = match machine.out_of_memory().await {
                Ok(id) => id,
                Err(e) => return debug!("{e}"),
            };
            match pod.upgrade() {
                Some(pod) => pod.tell(Event::OutOfMemory { id: &id }),
                None => return,
            }
        }
    }

    /// Has the whole machine end when a part of it has. One that has lost its file server
    /// would go on, with containers that hang; its end is what containerd hears of.
    async fn watch_parts(sandbox: Arc<Sandbox>) {
        let exit = sandbox.ended().await;
        debug!("the machine has ended: {exit}");
        sandbox.kill_machine().await;
    }

    /// A container has been built: what it says of the host's processes.
    fn settle(&self, request: &CreateTaskRequest) {
        let bundle = Path::new(&request.bundle);
        let pid = self.pid.load(Ordering::Relaxed);
        if let Err(e) = fs::write(bundle.join(INIT_PID), pid.to_string()) {
            warn!("write a PID into {}: {e}", bundle.display());
        }
        let score = Outline::load(bundle).ok().and_then(|o| o.oom_score_adj());
        let highest = {
            let mut scores = lock(&self.oom_scores);
            scores.insert(request.id.clone(), score.unwrap_or(0));
            // One process for all of them: it goes as the first of them would.
            scores.values().copied().max()
        };
        let sandbox = lock(&self.sandbox).clone();
        for (role, pid) in sandbox.iter().flat_map(|s| s.processes()) {
            let file = format!("/proc/{pid}/oom_score_adj");
            let score = highest.unwrap_or(0).to_string();
            if let Err(e) = fs::write(&file, score) {
                debug!("set how readily {role} is killed: {e}");
            }
        }
    }

    fn exited(&self, id: &str, exec_id: &str, exit: &ExitInfo) {
        if let Some(reason) = &exit.error {
            warn!(id, exec_id, "{reason}");
        }
        let event = TaskExit {
            container_id: id.into(),
            id: if exec_id.is_empty() { id } else { exec_id }.into(),
            pid: self.pid(0),
            exit_status: code(exit),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        };
        self.publisher
            .publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }
}

/// The front end in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PodState {
    namespace: String,
    name: String,
    dir: PathBuf,
    lock: Fd,
    state_root: PathBuf,
    run_root: PathBuf,
    ttrpc_address: Option<String>,
    events: Vec<EventState>,
    pid: u32,
    out_of_memory: HashSet<String>,
    oom_scores: HashMap<String, i32>,
    loggers: Vec<u32>,
}

/// An exit code: containerd has no word for a sandbox that failed.
fn code(exit: &ExitInfo) -> u32 {
    match exit.error {
        Some(_) => EXIT_KILLED,
        None => exit.code,
    }
}

#[async_trait]
impl Front for Pod {
    fn place(&self) -> Place<'_> {
        Place {
            id: &self.name,
            run_dir: self.dir.path(),
            node: Some((&self.layout.state, &self.layout.run)),
            own: false,
            named: true,
            network: &Network::Named,
        }
    }

    async fn streams(&self, id: &str, streams: &Streams) -> Result<StdioTargets> {
        let whose = Whose {
            namespace: &self.namespace,
            id,
        };
        let (targets, logger) = logger::open(whose, streams).await?;
        let mut loggers = lock(&self.loggers);
        loggers.retain(|logger| !logger.is_finished());
        loggers.extend(logger);
        Ok(targets)
    }

    fn mounting(&self, points: &[PathBuf]) -> Result<()> {
        self.dir.keep_mounts(points.iter().map(PathBuf::as_path))
    }

    fn up(&self, sandbox: &Arc<Sandbox>, _: &str) {
        if let Some((_, pid)) = sandbox.processes().first() {
            self.pid.store(*pid, Ordering::Relaxed);
        }
        *lock(&self.sandbox) = Some(sandbox.clone());
        tokio::spawn(Self::watch_parts(sandbox.clone()));
        tokio::spawn(Self::watch_memory(self.me.clone(), Arc::downgrade(sandbox)));
    }

    fn tell(&self, event: Event<'_>) {
        let publish = |topic, event: &dyn MessageDyn| self.publisher.publish(topic, event);
        match event {
            Event::Created(request) => {
                self.settle(request);
                let event = TaskCreate {
                    container_id: request.id.clone(),
                    bundle: request.bundle.clone(),
                    rootfs: request.rootfs.clone(),
                    io: MessageField::some(TaskIO {
                        stdin: request.stdin.clone(),
                        stdout: request.stdout.clone(),
                        stderr: request.stderr.clone(),
                        terminal: request.terminal,
                        ..Default::default()
                    }),
                    checkpoint: request.checkpoint.clone(),
                    pid: self.pid(0),
                    ..Default::default()
                };
                publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
            }
            Event::Started { id } => {
                let event = TaskStart {
                    container_id: id.into(),
                    pid: self.pid(0),
                    ..Default::default()
                };
                publish(topics::TASK_START_EVENT_TOPIC, &event);
            }
            Event::ExecAdded { id, exec_id } => {
                let event = TaskExecAdded {
                    container_id: id.into(),
                    exec_id: exec_id.into(),
                    ..Default::default()
                };
                publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
            }
            Event::ExecStarted { id, exec_id } => {
                let event = TaskExecStarted {
                    container_id: id.into(),
                    exec_id: exec_id.into(),
                    pid: self.pid(0),
                    ..Default::default()
                };
                publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
            }
            Event::Exited { id, exec_id, exit } => self.exited(id, exec_id, exit),
            Event::Deleted { id, exit } => {
                lock(&self.out_of_memory).remove(id);
                lock(&self.oom_scores).remove(id);
                let event = TaskDelete {
                    container_id: id.into(),
                    pid: self.pid(0),
                    exit_status: code(exit),
                    exited_at: MessageField::some(timestamp(exit.at)),
                    ..Default::default()
                };
                publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
            }
            Event::Paused { id } => {
                let event = TaskPaused {
                    container_id: id.into(),
                    ..Default::default()
                };
                publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
            }
            Event::Resumed { id } => {
                let event = TaskResumed {
                    container_id: id.into(),
                    ..Default::default()
                };
                publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
            }
            Event::OutOfMemory { id } => {
                if lock(&self.out_of_memory).insert(id.to_owned()) {
                    let event = TaskOOM {
                        container_id: id.into(),
                        ..Default::default()
                    };
                    publish(topics::TASK_OOM_EVENT_TOPIC, &event);
                }
            }
            Event::Checkpointed { id, path } => {
                let event = TaskCheckpointed {
                    container_id: id.into(),
                    checkpoint: path.into(),
                    ..Default::default()
                };
                publish(topics::TASK_CHECKPOINTED_EVENT_TOPIC, &event);
            }
        }
    }

    fn pid(&self, _: u32) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    fn pids(&self, _: Vec<u32>) -> Vec<u32> {
        vec![self.pid(0)]
    }

    fn verdict(&self, exit: &ExitInfo) -> Result<u32> {
        Ok(code(exit))
    }

    // A containerd that was started again asks, and takes one that it does not hear of for
    // one that has to be cleaned up after: 1.6 would otherwise keep an empty supervisor.
    fn wants_container(&self) -> bool {
        true
    }

    fn abandoned(&self, count: Count) {
        self.shutdown("", false, count);
    }

    fn shutdown(&self, _: &str, _: bool, count: Count) {
        if count.all > 0 {
            // Each container's deletion asks for it; others need the sandbox.
            return;
        }
        // Who comes from now on is for the next supervisor.
        let _ = fs::remove_file(self.dir.path().join(SOCKET));
        self.end.send_replace(true);
    }

    async fn stop_saved(&self, sandbox: &Arc<Sandbox>, id: &str) -> Result<()> {
        sandbox.kill(id, "", 9, true).await
    }

    fn about(&self) -> AboutResponse {
        let digest = self.dir.path().file_name().unwrap_or_default();
        let name = self.name.strip_suffix(&*digest.to_string_lossy());
        AboutResponse {
            front: "containerd".into(),
            name: name
                .map_or(&*self.name, |name| name.trim_end_matches('-'))
                .into(),
            namespace: self.namespace.clone(),
            ..Default::default()
        }
    }

    fn hold(&self, held: bool) {
        self.publisher.hold(held);
    }

    fn state(&self, giver: &mut Giver) -> std::result::Result<FrontState, NoState> {
        if *self.end.borrow() {
            return Err(NoState::never("it is ending"));
        }
        let loggers = lock(&self.loggers);
        let loggers = loggers.iter().filter(|logger| !logger.is_finished());
        Ok(FrontState::Pod(PodState {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            dir: self.dir.path().to_owned(),
            lock: giver.give(self.dir.lock()),
            state_root: self.layout.state.clone(),
            run_root: self.layout.run.clone(),
            ttrpc_address: self.publisher.address().map(str::to_owned),
            events: self.publisher.state()?,
            pid: self.pid.load(Ordering::Relaxed),
            out_of_memory: lock(&self.out_of_memory).clone(),
            oom_scores: lock(&self.oom_scores).clone(),
            loggers: loggers.map(Logger::pid).collect(),
        }))
    }
}
