//! A sandbox: one machine, its agent, and the containers in it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex as StdMutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Mutex, RwLock},
    time::timeout,
};
use tracing::{debug, warn};
use walnut_machine::{Exit, Machine, process::Cgroup};
use walnut_protocol::{
    agent::{
        ConfigureSandboxRequest, ContainerStatsResponse, Empty, ExecProcessRequest,
        ResizeTerminalRequest, SignalProcessRequest, Stdio, TerminalSize, UpdateContainerRequest,
        WaitProcessResponse,
    },
    agent_ttrpc::AgentClient,
};
use walnut_storage::VirtioFs;

use crate::{
    ANNOTATION_LOG, Assets, Error, ExitInfo, GuestProcess, Network, ProcessState, Result, Settings,
    Shape, StdioTargets, Templates, Wanted,
    agent::{self, fault, patient, soon},
    checkpoint::Attached,
    containers::{Container, Exec},
    copy::{self, SharedLog},
    growth::Sizes,
    guest_spec,
    log::{LogWriter, Stream},
    network::Watching,
    plan::FIRST_DISK,
    pod,
    pod_request::PodParts,
    ports::Carrying,
    process::{Clients, Process},
    record::now_ns,
    sizing,
    start::Started,
    stdio::{ClientEnds, Input, Sink, Source},
    takeover::Busy,
};

/// Longest an exec's output may be held open by its descendants after its end.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);
/// Longest the guest may take to unmount and go.
pub(crate) const FAREWELL: Duration = Duration::from_secs(5);
/// Exit code of a process whose sandbox failed.
const EXIT_SANDBOX_FAILED: u32 = 255;

/// What a sandbox is started with.
#[derive(Debug, Clone)]
pub struct SandboxConfig {
    /// Name of the sandbox.
    pub id: String,
    /// Directory of its own, mode 0700.
    pub run_dir: PathBuf,
    /// Kernel, initramfs and programs.
    pub assets: Assets,
    /// How it is made.
    pub settings: Settings,
    /// Directory in which the KVM probe's verdict may be kept.
    pub cache: Option<PathBuf>,
    /// Where its network comes from.
    pub network: Network,
    /// Files of its container's that tell of that network.
    pub names: Option<NameFiles>,
    /// Where to look for a template to start from, if the settings have one used.
    pub templates: Option<Templates>,
}

/// What of a container's files says who is on its network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NameFiles {
    /// `/etc/hosts`.
    pub hosts: String,
    /// `/etc/resolv.conf`, if it is not the image's.
    pub resolv_conf: Option<String>,
}

/// A root file system as a front end hands it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    /// File system type; `erofs` is a read-only image file, `ext2` to `ext4` a file or
    /// device ([`SandboxConfig::takes_disks`]), `bind` a directory. The container
    /// writes to the latter two.
    pub kind: String,
    /// File, device or directory on the host.
    pub source: PathBuf,
    /// The container must not write to the disk. Above it is a layer of the guest's memory.
    pub read_only: bool,
}

/// A container to create.
#[derive(Debug, Clone)]
pub struct ContainerRequest {
    /// Walnut wrote its bundle, so that its annotations may name files of the host.
    pub own: bool,
    /// It gets an `/etc/hosts` and what is like it, unless its bundle mounts one. Whoever
    /// has a bundle run as it is would find them in its root file system.
    pub named: bool,
    /// Name of the container.
    pub id: String,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// Its root file system: one mount, or none where the bundle's `root.path` is it.
    pub rootfs: Vec<RootfsMount>,
    /// Its streams.
    pub stdio: StdioTargets,
}

/// A process to run in a container.
#[derive(Debug, Clone)]
pub struct ExecRequest {
    /// Name of the process.
    pub exec_id: String,
    /// OCI runtime-spec `process`, JSON.
    pub process: Vec<u8>,
    /// Its streams.
    pub stdio: StdioTargets,
}

/// What is known of a process.
#[derive(Debug, Clone)]
pub struct ContainerState {
    /// PID in the guest; 0 before it exists.
    pub pid: u32,
    /// Where it stands.
    pub state: ProcessState,
    /// Its streams.
    pub stdio: StdioTargets,
    /// The container's bundle.
    pub bundle: PathBuf,
}

/// A machine with an agent in it, and its containers. Dropping it kills the
/// machine.
pub struct Sandbox {
    pub(crate) id: String,
    pub(crate) settings: Settings,
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) agent: AgentClient,
    pub(crate) shared: Option<VirtioFs>,
    pub(crate) containers: StdMutex<HashMap<String, Arc<Container>>>,
    pub(crate) streams: AtomicU32,
    /// Tells the machine's disks apart.
    pub(crate) disk: AtomicU32,
    pub(crate) driver: &'static str,
    pub(crate) template: Option<String>,
    pub(crate) wanted: Option<Wanted>,
    /// What a checkpoint of it is good for.
    pub(crate) shape: Option<Shape>,
    /// Its machine's disks, in the order in which they came.
    pub(crate) disks: StdMutex<Vec<Attached>>,
    /// It has links of the host's.
    pub(crate) networked: AtomicBool,
    /// Its links follow those of its namespace.
    pub(crate) watching: StdMutex<Option<Watching>>,
    /// Connections to its loopback on the host are the guest's.
    pub(crate) carrying: StdMutex<Option<Carrying>>,
    /// Held exclusively while the machine is saved.
    pub(crate) saving: RwLock<()>,
    pub(crate) size: Sizes,
    /// What its container's files say of its network.
    pub(crate) names: OnceLock<NameFiles>,
    /// What its containers get from a pod that has no container of its own.
    pub(crate) pod: Option<PodParts>,
    /// Goes last: by then its processes have ended.
    pub(crate) cgroup: StdMutex<Option<Cgroup>>,
    /// What is being done that another program could not finish.
    pub(crate) busy: Busy,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("id", &self.id)
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}

impl Sandbox {
    pub(crate) fn new(
        config: SandboxConfig,
        started: Started,
        shared: Option<VirtioFs>,
        size: sizing::Size,
        cgroup: Option<Cgroup>,
    ) -> Self {
        Self {
            id: config.id,
            settings: config.settings,
            machine: started.machine,
            agent: started.agent,
            shared,
            containers: StdMutex::default(),
            streams: AtomicU32::new(1),
            // The first container's and the rehearsal's have theirs.
            disk: AtomicU32::new(FIRST_DISK + 2),
            driver: started.driver,
            template: started.template,
            wanted: started.wanted,
            shape: started.shape,
            disks: StdMutex::new(started.disks),
            networked: AtomicBool::new(false),
            watching: StdMutex::default(),
            carrying: StdMutex::default(),
            saving: RwLock::default(),
            size: Sizes::new(size, size, started.max),
            names: config.names.map(OnceLock::from).unwrap_or_default(),
            pod: None,
            cgroup: StdMutex::new(cgroup),
            busy: Busy::default(),
        }
    }

    /// Number of a disk that the machine does not have yet.
    pub(crate) fn next_disk(&self) -> u32 {
        self.disk.fetch_add(1, Ordering::Relaxed)
    }

    /// Number of a stream that there has not been yet.
    pub(crate) fn next_stream(&self) -> u32 {
        self.streams.fetch_add(1, Ordering::Relaxed)
    }

    /// The template that its machine began from.
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// A template that would have made its start quicker.
    pub fn wanted_template(&self) -> Option<&Wanted> {
        self.wanted.as_ref()
    }

    /// How it was made.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Name of the driver.
    pub fn driver(&self) -> &'static str {
        self.driver
    }

    /// Directories of the host are shared with the guest.
    pub fn has_volumes(&self) -> bool {
        self.shared.is_some()
    }

    /// Guest memory in bytes, and vCPUs.
    pub fn size(&self) -> (u64, u32) {
        let sizing::Size { memory, vcpus } = self.size.now();
        (memory, vcpus)
    }

    pub(crate) fn with_cgroup(&self, act: impl FnOnce(&Cgroup)) {
        if let Some(cgroup) = &*lock(&self.cgroup) {
            act(cgroup);
        }
    }

    /// PIDs of the sandbox's processes with their roles.
    pub fn processes(&self) -> Vec<(&'static str, u32)> {
        let mut all = self.machine.processes();
        all.extend(self.shared.as_ref().map(|fs| ("virtiofsd", fs.pid())));
        all
    }

    pub(crate) async fn configure(&self, spec: &Spec) -> Result<()> {
        let mut entropy = [0; 64];
        getrandom::fill(&mut entropy)
            .map_err(|e| Error::Machine(format!("get entropy for the guest: {e}")))?;
        let request = ConfigureSandboxRequest {
            sandbox_id: self.id.clone(),
            hostname: guest_spec::hostname(spec),
            realtime_ns: now_ns(),
            entropy: entropy.to_vec(),
            sysctls: pod::sysctls(spec),
            ..Default::default()
        };
        self.call(
            "configure the sandbox",
            self.agent.configure_sandbox(soon(), &request).await,
        )
        .await?;
        Ok(())
    }

    /// Opens a process's streams to the guest and starts the copying.
    pub(crate) async fn open_streams(
        &self,
        process: &Process,
        ends: ClientEnds,
        log: Option<SharedLog>,
    ) -> Result<Stdio> {
        let mut stdio = Stdio::default();
        let mut outputs = Vec::new();
        let wants_stdout = ends.stdout.is_some() || log.is_some();
        let wants_stderr = (ends.stderr.is_some() || log.is_some()) && !process.stdio.terminal;
        for (wanted, client, number, stream) in [
            (wants_stdout, ends.stdout, &mut stdio.stdout, Stream::Stdout),
            (wants_stderr, ends.stderr, &mut stdio.stderr, Stream::Stderr),
        ] {
            if !wanted {
                continue;
            }
            *number = self.next_stream();
            let guest = agent::stream(self.machine.as_ref(), *number).await?;
            let ended = process.ended();
            outputs.push(copy::output(guest, client, log.clone(), stream, ended));
        }
        let input = match ends.stdin {
            Some(client) => {
                stdio.stdin = self.next_stream();
                let guest = agent::stream(self.machine.as_ref(), stdio.stdin).await?;
                Some(copy::input(guest, client, process.close_stdin.clone()))
            }
            None => None,
        };
        process.attach(outputs, input, log);
        Ok(stdio)
    }

    /// Executes a container's program, or an exec's. Returns its PID in the
    /// guest. `self` learns of the end.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32> {
        let _whole = self.saving.read().await;
        let container = self.container(id)?;
        let process = if exec_id.is_empty() {
            let process = container.init.clone();
            if process.state() != ProcessState::Created {
                return Err(Error::WrongState(format!(
                    "start container {id}: it has been started already"
                )));
            }
            let started = if container.restored {
                self.let_go_on(&container).await
            } else {
                let request = container.request();
                let reply = self.agent.start_container(soon(), &request).await;
                self.call("start the container", reply).await.map(|_| ())
            };
            if let Err(e) = started {
                // It has ended all the same, and whoever waits for it is to hear.
                self.follow(container, "", process);
                return Err(e);
            }
            process
        } else {
            self.start_exec(id, exec_id, &container).await?
        };
        process.set_state(ProcessState::Running);
        let pid = process.pid();
        self.follow(container, exec_id, process);
        Ok(pid)
    }

    /// Learns of a process's end. A second follower of the same one changes nothing.
    pub(crate) fn follow(
        self: &Arc<Self>,
        container: Arc<Container>,
        exec_id: &str,
        process: Arc<Process>,
    ) {
        process.set_followed();
        let this = self.clone();
        let exec_id = exec_id.to_owned();
        tokio::spawn(async move {
            let exit = this.await_end(&container, &exec_id, &process).await;
            debug!(id = container.guest_id, exec_id, ?exit, "process ended");
            process.set_state(ProcessState::Stopped(exit));
        });
    }

    /// Ends a container that nobody has started, as its machine has ended. False if it is
    /// not one.
    pub fn end_unstarted(self: &Arc<Self>, id: &str) -> bool {
        let Ok(container) = self.container(id) else {
            return false;
        };
        let process = container.init.clone();
        let unstarted = process.state() == ProcessState::Created;
        if unstarted {
            self.follow(container, "", process);
        }
        unstarted
    }

    async fn start_exec(
        &self,
        id: &str,
        exec_id: &str,
        container: &Container,
    ) -> Result<Arc<Process>> {
        let exec = container.exec(id, exec_id)?;
        let Some(spec) = exec.request.lock().await.take() else {
            return Err(Error::WrongState(format!(
                "start process {exec_id} of {id}: it has been started already"
            )));
        };
        let ends = ClientEnds::open(&exec.process.stdio)?;
        let stdio = self.open_streams(&exec.process, ends, None).await?;
        let request = ExecProcessRequest {
            container_id: container.guest_id.clone(),
            exec_id: exec_id.into(),
            process: crate::spec::known_process(spec),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let reply = self
            .call(
                "run the process",
                self.agent.exec_process(soon(), &request).await,
            )
            .await?;
        exec.process.set_pid(reply.pid);
        Ok(exec.process)
    }

    /// Waits for a process's end and for its output.
    async fn await_end(&self, container: &Container, exec_id: &str, process: &Process) -> ExitInfo {
        let request = container.process_request(exec_id);
        let exit = match self.agent.wait_process(patient(), &request).await {
            Ok(WaitProcessResponse {
                exit_code,
                exited_at_ns,
                oom_killed,
                ..
            }) => ExitInfo {
                code: exit_code,
                at: exited_at_ns,
                oom_killed,
                error: None,
            },
            Err(e) => ExitInfo {
                code: EXIT_SANDBOX_FAILED,
                at: now_ns(),
                oom_killed: false,
                error: Some(self.explain("wait for the process", e).await.to_string()),
            },
        };
        process.end();
        if exec_id.is_empty() && exit.error.is_none() && container.role.in_pod() {
            self.end_rest(container).await;
        }
        for mut output in process.take_outputs() {
            // With the first process every writer is gone, and so the stream
            // ends. An exec may have left descendants that hold it open.
            if exec_id.is_empty() && exit.error.is_none() {
                let _ = output.await;
            } else if timeout(OUTPUT_GRACE, &mut output).await.is_err() {
                output.abort();
            }
        }
        exit
    }

    /// Kills what a container's first process leaves behind. Where PIDs are the pod's, the
    /// kernel does not.
    async fn end_rest(&self, container: &Container) {
        let request = SignalProcessRequest {
            container_id: container.guest_id.clone(),
            signal: libc::SIGKILL.unsigned_abs(),
            all: true,
            ..Default::default()
        };
        if let Err(e) = self.agent.signal_process(soon(), &request).await {
            debug!(id = container.guest_id, "kill the rest: {e}");
        }
    }

    /// Announces a process; [`Sandbox::start`] runs it.
    pub fn exec(&self, id: &str, request: ExecRequest) -> Result<()> {
        let container = self.container(id)?;
        let mut execs = lock(&container.execs);
        if request.exec_id.is_empty() || execs.contains_key(&request.exec_id) {
            return Err(Error::AlreadyExists(format!(
                "exec in {id}: a process {:?} exists already",
                request.exec_id
            )));
        }
        let exec = Exec {
            process: Arc::new(Process::new(request.stdio)),
            request: Arc::new(Mutex::new(Some(request.process))),
        };
        execs.insert(request.exec_id, exec);
        Ok(())
    }

    /// Has a process's streams lead to FIFOs, whose other ends are open, beside where they
    /// lead already. Input comes from there alone, and does not end when its writers go.
    pub fn attach_streams(
        &self,
        id: &str,
        exec_id: &str,
        [stdin, stdout, stderr]: [Option<&Path>; 3],
    ) -> Result<()> {
        let process = self.process(id, exec_id)?;
        if matches!(process.state(), ProcessState::Stopped(_)) {
            let ended = format!("attach to {id}: its process has ended");
            return Err(Error::WrongState(ended));
        }
        let source = |path: &Path| Source::open(&Input::Path(path.into()), true);
        process.connect(Clients {
            stdin: stdin.map(source).transpose()?,
            stdout: stdout.map(Sink::read_fifo).transpose()?,
            stderr: stderr.map(Sink::read_fifo).transpose()?,
        })
    }

    /// Sends a signal to a process, or to all of a container. `self` learns of the end
    /// of one that was never started.
    pub async fn kill(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<()> {
        let _whole = self.busy.with("a signal is on its way");
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        let finished = || Error::NotFound(format!("signal {id}: process already finished"));
        if matches!(process.state(), ProcessState::Stopped(_)) {
            return Err(finished());
        }
        let request = SignalProcessRequest {
            container_id: container.guest_id.clone(),
            exec_id: exec_id.into(),
            signal,
            all,
            ..Default::default()
        };
        let reply = self.agent.signal_process(soon(), &request).await;
        match self.call("signal the process", reply).await {
            Ok(_) => {}
            // The guest knows before we do.
            Err(Error::WrongState(_)) => return Err(finished()),
            // Its machine has ended, and it with it, though that is not known yet.
            Err(e @ Error::Machine(_)) => {
                if exec_id.is_empty() {
                    self.end_unstarted(id);
                }
                let known = timeout(OUTPUT_GRACE * 3, process.stopped()).await;
                return Err(known.map_or(e, |_| finished()));
            }
            Err(e) => return Err(e),
        }
        if exec_id.is_empty() && process.state() == ProcessState::Created {
            self.follow(container, exec_id, process);
        }
        Ok(())
    }

    /// Returns when the process has ended and its output was delivered.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<ExitInfo> {
        Ok(self.process(id, exec_id)?.stopped().await)
    }

    /// Changes the size of a process's terminal.
    pub async fn resize(&self, id: &str, exec_id: &str, columns: u32, rows: u32) -> Result<()> {
        self.process(id, exec_id)?;
        let request = ResizeTerminalRequest {
            container_id: self.container(id)?.guest_id.clone(),
            exec_id: exec_id.into(),
            size: Some(TerminalSize {
                columns,
                rows,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.call(
            "resize the terminal",
            self.agent.resize_terminal(soon(), &request).await,
        )
        .await?;
        Ok(())
    }

    /// Ends a process's input once what was written has been delivered.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<()> {
        self.process(id, exec_id)?.close_stdin.ask();
        Ok(())
    }

    /// Freezes a container.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let _whole = self.saving.read().await;
        let container = self.container(id)?;
        let request = container.request();
        self.call(
            "pause the container",
            self.agent.pause_container(soon(), &request).await,
        )
        .await?;
        container.init.set_state(ProcessState::Paused);
        Ok(())
    }

    /// Lets a frozen container go on.
    pub async fn resume(&self, id: &str) -> Result<()> {
        let _whole = self.saving.read().await;
        let container = self.container(id)?;
        let request = container.request();
        self.call(
            "resume the container",
            self.agent.resume_container(soon(), &request).await,
        )
        .await?;
        container.init.set_state(ProcessState::Running);
        Ok(())
    }

    /// Changes a container's limits; `resources` is OCI `linux.resources`, JSON.
    ///
    /// The machine grows first, if the containers may use more than it has, and as far as it
    /// can; if they may use less, it gives back what it was not started with.
    pub async fn update(self: &Arc<Self>, id: &str, resources: Vec<u8>) -> Result<()> {
        let container = self.container(id)?;
        let changed: LinuxResources = serde_json::from_slice(&resources)
            .map_err(|e| Error::Invalid(format!("update {id}: read the resources: {e}")))?;
        let limits = lock(&container.limits).changed_by(&changed);
        self.make_room(id, limits).await;
        let whole = self.saving.read().await;
        let request = UpdateContainerRequest {
            container_id: container.guest_id.clone(),
            resources,
            ..Default::default()
        };
        self.call(
            "update the container",
            self.agent.update_container(soon(), &request).await,
        )
        .await?;
        *lock(&container.limits) = limits;
        drop(whole);
        // It may have given back meanwhile what nobody was known to need.
        self.make_room(id, limits).await;
        self.give_back_later();
        Ok(())
    }

    /// PIDs of a container's processes, in the guest.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        self.guest_processes(id).await.map(|(pids, _)| pids)
    }

    /// PIDs of a container's processes in the guest, and what is known of them.
    pub async fn guest_processes(&self, id: &str) -> Result<(Vec<u32>, Vec<GuestProcess>)> {
        let request = self.container(id)?.request();
        let reply = self
            .call(
                "list the processes",
                self.agent.list_processes(soon(), &request).await,
            )
            .await?;
        Ok((reply.pids, reply.processes))
    }

    /// cgroup figures of a container.
    pub async fn stats(&self, id: &str) -> Result<ContainerStatsResponse> {
        let request = self.container(id)?.request();
        self.call(
            "read the container's figures",
            self.agent.container_stats(soon(), &request).await,
        )
        .await
    }

    /// What is known of a process.
    pub fn state(&self, id: &str, exec_id: &str) -> Result<ContainerState> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        Ok(ContainerState {
            pid: process.pid(),
            state: process.state(),
            stdio: process.stdio.clone(),
            bundle: container.bundle.clone(),
        })
    }

    /// Returns when the machine has ended, with the reason.
    pub async fn ended(&self) -> Exit {
        match &self.shared {
            None => self.machine.wait().await,
            Some(shared) => tokio::select! {
                // Who loses its file server goes as well, and may be seen to go first.
                exit = self.machine.wait() => match timeout(OUTPUT_GRACE, shared.killed()).await {
                    Ok(Some(reason)) => Exit::Failed(reason),
                    _ => exit,
                },
                reason = shared.wait() => Exit::Failed(reason),
            },
        }
    }

    /// Ends the sandbox: the agent is asked to sync and unmount, then the machine
    /// is stopped.
    pub async fn shutdown(&self) {
        let nothing = Empty::default();
        let farewell = self.agent.shutdown(soon(), &nothing);
        match timeout(FAREWELL, farewell).await {
            Ok(Ok(_)) => {
                if timeout(FAREWELL, self.machine.wait()).await.is_err() {
                    warn!("the guest did not power off in time");
                }
            }
            Ok(Err(e)) => debug!("ask the guest to shut down: {e}"),
            Err(_) => warn!("the agent did not answer in time; stopping its machine"),
        }
        self.kill_machine().await;
    }

    /// Ends the machine at once, and everything that served it.
    pub async fn kill_machine(&self) {
        self.machine.stop().await;
        if let Some(shared) = &self.shared {
            shared.kill().await;
        }
        // Nothing holds the namespace for a machine that is no more.
        lock(&self.watching).take();
        lock(&self.cgroup).take();
    }

    pub(crate) async fn call<T>(&self, what: &'static str, result: ttrpc::Result<T>) -> Result<T> {
        match result {
            Ok(reply) => Ok(reply),
            Err(e) => Err(self.explain(what, e).await),
        }
    }

    /// The reason behind a failed request: where the connection broke, it is the
    /// machine that knows.
    async fn explain(&self, what: &'static str, error: ttrpc::Error) -> Error {
        if agent::is_broken(&error)
            && let Ok(exit) = timeout(OUTPUT_GRACE, self.ended()).await
        {
            return Error::Machine(format!("{what}: {exit}"));
        }
        fault(what, error)
    }
}

pub(crate) fn open_log(spec: &Spec) -> Result<Option<SharedLog>> {
    let Some(path) = spec
        .annotations()
        .as_ref()
        .and_then(|a| a.get(ANNOTATION_LOG))
    else {
        return Ok(None);
    };
    let log = LogWriter::open(Path::new(path))?;
    Ok(Some(Arc::new(StdMutex::new(log))))
}

pub(crate) fn lock<T>(mutex: &StdMutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
