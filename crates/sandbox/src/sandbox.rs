//! A sandbox: one machine, its agent, and the containers in it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex as StdMutex, MutexGuard,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use oci_spec::runtime::Spec;
use tokio::{sync::Mutex, time::timeout};
use tracing::{debug, warn};
use walnut_machine::{DriverChoice, Exit, Machine, process::Cgroup};
use walnut_protocol::{
    agent::{
        ConfigureSandboxRequest, ContainerRequest as AgentContainer, ContainerStatsResponse,
        CreateContainerRequest, Empty, ExecProcessRequest, ProcessRequest, ResizeTerminalRequest,
        SignalProcessRequest, Stdio, Storage, TerminalSize, UpdateContainerRequest,
        WaitProcessResponse,
    },
    agent_ttrpc::AgentClient,
};
use walnut_storage::{Rootfs, VirtioFs, Volume};

use crate::{
    ANNOTATION_LOG, ANNOTATION_TEMPLATE, Assets, Error, ExitInfo, ProcessState, Result,
    StdioTargets, Templates, Wanted,
    agent::{self, fault, patient, soon},
    cgroup, guest_spec,
    log::{LogWriter, Stream},
    process::Process,
    record::now_ns,
    sizing,
    start::{self, Steps},
    stdio::{self, ClientEnds, SharedLog},
};

/// Longest an exec's output may be held open by its descendants after its end.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);
/// Longest the guest may take to unmount and go.
const FAREWELL: Duration = Duration::from_secs(5);
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
    /// Which driver.
    pub driver: DriverChoice,
    /// Directory in which the KVM probe's verdict may be kept.
    pub cache: Option<PathBuf>,
    /// Longest the guest may take until its agent answers.
    pub boot_deadline: Duration,
    /// Where to look for a template to start from, if anywhere.
    pub templates: Option<Templates>,
}

/// A root file system as a front end hands it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    /// File system type; `erofs` is a read-only image file.
    pub kind: String,
    /// File or device on the host.
    pub source: PathBuf,
}

/// A container to create.
#[derive(Debug, Clone)]
pub struct ContainerRequest {
    /// Name of the container.
    pub id: String,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// Its root file system.
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

#[derive(Debug)]
struct Container {
    bundle: PathBuf,
    init: Arc<Process>,
    execs: StdMutex<HashMap<String, Exec>>,
}

#[derive(Debug, Clone)]
struct Exec {
    process: Arc<Process>,
    /// Taken when it is started.
    request: Arc<Mutex<Option<Vec<u8>>>>,
}

/// A machine with an agent in it, and its containers. Dropping it kills the
/// machine.
pub struct Sandbox {
    id: String,
    machine: Box<dyn Machine>,
    agent: AgentClient,
    shared: Option<VirtioFs>,
    containers: StdMutex<HashMap<String, Arc<Container>>>,
    streams: AtomicU32,
    driver: &'static str,
    template: Option<String>,
    wanted: Option<Wanted>,
    size: sizing::Size,
    /// Goes last: by then its processes have ended.
    cgroup: StdMutex<Option<Cgroup>>,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("id", &self.id)
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}

/// What a first container brings into the machine that is made for it.
struct Plan {
    spec: Spec,
    rootfs: Rootfs,
    binds: Vec<guest_spec::HostBind>,
    size: sizing::Size,
}

impl Plan {
    fn new(request: &ContainerRequest) -> Result<Self> {
        let spec = guest_spec::load(&request.bundle)?;
        let [mount] = request.rootfs.as_slice() else {
            return Err(Error::Invalid(format!(
                "create container {}: its root file system must be one mount, {} were given",
                request.id,
                request.rootfs.len()
            )));
        };
        if mount.kind != "erofs" {
            return Err(Error::Invalid(format!(
                "create container {}: a root file system of type {:?} is not supported yet; give an EROFS image",
                request.id, mount.kind
            )));
        }
        Ok(Self {
            rootfs: Rootfs::erofs(&mount.source, &request.id, 0)?,
            binds: guest_spec::host_binds(&spec)?,
            size: sizing::size(&spec),
            spec,
        })
    }
}

impl Sandbox {
    /// Starts a machine sized for the first container, and builds the container
    /// in it. On failure nothing is left.
    pub async fn create(config: SandboxConfig, first: &ContainerRequest) -> Result<Self> {
        let steps = Steps::new();
        let plan = Plan::new(first)?;
        let ends = ClientEnds::open(&first.stdio)?;
        let cgroup = cgroup::enter(&config, plan.size.memory);
        let volumes: Vec<_> = plan
            .binds
            .iter()
            .map(|b| Volume {
                source: b.source.clone(),
                read_only: b.read_only,
            })
            .collect();
        let shared = if volumes.is_empty() {
            None
        } else {
            Some(VirtioFs::start(&volumes, &config.run_dir).await?)
        };
        let parts = start::Parts {
            size: plan.size,
            disks: vec![plan.rootfs.disk.clone()],
            shares: shared.iter().map(VirtioFs::share).collect(),
            template: templates_allowed(&plan.spec),
        };
        let started = start::start(&config, parts, steps).await?;
        steps.done("agent greeted");
        let sandbox = Self {
            id: config.id,
            machine: started.machine,
            agent: started.agent,
            shared,
            containers: StdMutex::default(),
            streams: AtomicU32::new(1),
            driver: started.driver,
            template: started.template,
            wanted: started.wanted,
            size: plan.size,
            cgroup: StdMutex::new(cgroup),
        };
        sandbox.configure(&plan.spec).await?;
        steps.done("sandbox configured");
        sandbox.create_first(first, plan, ends).await?;
        steps.done("container created");
        Ok(sandbox)
    }

    /// The template that its machine began from.
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// A template that would have made its start quicker.
    pub fn wanted_template(&self) -> Option<&Wanted> {
        self.wanted.as_ref()
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
        (self.size.memory, self.size.vcpus)
    }

    /// PIDs of the sandbox's processes with their roles.
    pub fn processes(&self) -> Vec<(&'static str, u32)> {
        let mut all = self.machine.processes();
        all.extend(self.shared.as_ref().map(|fs| ("virtiofsd", fs.pid())));
        all
    }

    async fn configure(&self, spec: &Spec) -> Result<()> {
        let mut entropy = [0; 64];
        getrandom::fill(&mut entropy)
            .map_err(|e| Error::Machine(format!("get entropy for the guest: {e}")))?;
        let request = ConfigureSandboxRequest {
            sandbox_id: self.id.clone(),
            hostname: spec.hostname().clone().unwrap_or_else(|| "walnut".into()),
            realtime_ns: now_ns(),
            entropy: entropy.to_vec(),
            ..Default::default()
        };
        self.call(
            "configure the sandbox",
            self.agent.configure_sandbox(soon(), &request).await,
        )
        .await?;
        Ok(())
    }

    async fn create_first(
        &self,
        request: &ContainerRequest,
        plan: Plan,
        ends: ClientEnds,
    ) -> Result<()> {
        let id = &request.id;
        let mut storages: Vec<Storage> = plan.rootfs.storages.clone();
        let mut binds = Vec::new();
        if let Some(shared) = &self.shared {
            storages.push(shared.storage());
            for (n, bind) in plan.binds.iter().enumerate() {
                binds.push((bind.mount, shared.guest_path(n)));
            }
        }
        let log = open_log(&plan.spec)?;
        let files = guest_spec::files(&plan.spec, id);
        let spec = guest_spec::translate(plan.spec, id, &plan.rootfs.guest_path, &binds, &files)?;
        let process = Arc::new(Process::new(request.stdio.clone()));
        let stdio = self.open_streams(&process, ends, log).await?;
        let create = CreateContainerRequest {
            container_id: id.clone(),
            spec,
            storages,
            stdio: Some(stdio).into(),
            files: files.into_iter().map(|(file, _)| file).collect(),
            ..Default::default()
        };
        let reply = self
            .call(
                "create the container",
                self.agent.create_container(soon(), &create).await,
            )
            .await?;
        process.set_pid(reply.pid);
        let container = Container {
            bundle: request.bundle.clone(),
            init: process,
            execs: StdMutex::default(),
        };
        lock(&self.containers).insert(id.clone(), Arc::new(container));
        Ok(())
    }

    /// Opens a process's streams to the guest and starts the copying.
    async fn open_streams(
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
            *number = self.streams.fetch_add(1, Ordering::Relaxed);
            let guest = agent::stream(self.machine.as_ref(), *number).await?;
            outputs.push(stdio::spawn_output(guest, client, log.clone(), stream));
        }
        let input = match ends.stdin {
            Some(client) => {
                stdio.stdin = self.streams.fetch_add(1, Ordering::Relaxed);
                let guest = agent::stream(self.machine.as_ref(), stdio.stdin).await?;
                Some(stdio::spawn_input(
                    guest,
                    client,
                    process.close_stdin.clone(),
                ))
            }
            None => None,
        };
        process.attach(outputs, input);
        Ok(stdio)
    }

    /// Executes a container's program, or an exec's. Returns its PID in the
    /// guest. `self` learns of the end.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32> {
        let container = self.container(id)?;
        let process = if exec_id.is_empty() {
            let process = container.init.clone();
            if process.state() != ProcessState::Created {
                return Err(Error::WrongState(format!(
                    "start container {id}: it has been started already"
                )));
            }
            let request = container_request(id);
            self.call(
                "start the container",
                self.agent.start_container(soon(), &request).await,
            )
            .await?;
            process
        } else {
            self.start_exec(id, exec_id, &container).await?
        };
        process.set_state(ProcessState::Running);
        let pid = process.pid();
        let this = self.clone();
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        tokio::spawn(async move {
            let exit = this.await_end(&id, &exec_id, &process).await;
            debug!(id, exec_id, ?exit, "process ended");
            process.set_state(ProcessState::Stopped(exit));
        });
        Ok(pid)
    }

    async fn start_exec(
        &self,
        id: &str,
        exec_id: &str,
        container: &Container,
    ) -> Result<Arc<Process>> {
        let exec = find_exec(container, id, exec_id)?;
        let Some(spec) = exec.request.lock().await.take() else {
            return Err(Error::WrongState(format!(
                "start process {exec_id} of {id}: it has been started already"
            )));
        };
        let ends = ClientEnds::open(&exec.process.stdio)?;
        let stdio = self.open_streams(&exec.process, ends, None).await?;
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: spec,
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
    async fn await_end(&self, id: &str, exec_id: &str, process: &Process) -> ExitInfo {
        let request = process_request(id, exec_id);
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
        process.stop_input();
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

    /// Sends a signal to a process, or to all of a container.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let process = self.process(id, exec_id)?;
        if matches!(process.state(), ProcessState::Stopped(_)) {
            return Err(Error::NotFound(format!(
                "signal {id}: process already finished"
            )));
        }
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
            all,
            ..Default::default()
        };
        self.call(
            "signal the process",
            self.agent.signal_process(soon(), &request).await,
        )
        .await?;
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
            container_id: id.into(),
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
        self.process(id, exec_id)?.close_stdin.notify_one();
        Ok(())
    }

    /// Freezes a container.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        let request = container_request(id);
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
        let container = self.container(id)?;
        let request = container_request(id);
        self.call(
            "resume the container",
            self.agent.resume_container(soon(), &request).await,
        )
        .await?;
        container.init.set_state(ProcessState::Running);
        Ok(())
    }

    /// Changes a container's limits; `resources` is OCI `linux.resources`, JSON.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        self.container(id)?;
        let request = UpdateContainerRequest {
            container_id: id.into(),
            resources,
            ..Default::default()
        };
        self.call(
            "update the container",
            self.agent.update_container(soon(), &request).await,
        )
        .await?;
        Ok(())
    }

    /// PIDs of a container's processes, in the guest.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        self.container(id)?;
        let request = container_request(id);
        let reply = self
            .call(
                "list the processes",
                self.agent.list_processes(soon(), &request).await,
            )
            .await?;
        Ok(reply.pids)
    }

    /// cgroup figures of a container.
    pub async fn stats(&self, id: &str) -> Result<ContainerStatsResponse> {
        self.container(id)?;
        let request = container_request(id);
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

    /// Removes an ended container, or forgets an ended exec. Returns its PID and
    /// its end.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, ExitInfo)> {
        let process = self.process(id, exec_id)?;
        let exit = match process.state() {
            ProcessState::Stopped(exit) => exit,
            // Never started: deleting it is how it ends.
            ProcessState::Created => ExitInfo {
                code: 0,
                at: now_ns(),
                oom_killed: false,
                error: None,
            },
            _ => {
                return Err(Error::WrongState(format!(
                    "delete {id}: it is running; kill it first"
                )));
            }
        };
        let pid = process.pid();
        if exec_id.is_empty() {
            lock(&self.containers).remove(id);
            let request = container_request(id);
            let removed = timeout(FAREWELL, self.agent.remove_container(soon(), &request)).await;
            if let Ok(Err(e)) = removed
                && !agent::is_broken(&e)
            {
                return Err(fault("remove the container", e));
            }
        } else {
            let container = self.container(id)?;
            lock(&container.execs).remove(exec_id);
            let request = process_request(id, exec_id);
            if let Err(e) = self.agent.remove_process(soon(), &request).await {
                debug!(exec_id, "forget the process: {e}");
            }
        }
        Ok((pid, exit))
    }

    /// Returns when the machine has ended, with the reason.
    pub async fn ended(&self) -> Exit {
        match &self.shared {
            None => self.machine.wait().await,
            Some(shared) => tokio::select! {
                exit = self.machine.wait() => exit,
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
        lock(&self.cgroup).take();
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("no container {id} in this sandbox")))
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>> {
        let container = self.container(id)?;
        if exec_id.is_empty() {
            return Ok(container.init.clone());
        }
        Ok(find_exec(&container, id, exec_id)?.process)
    }

    async fn call<T>(&self, what: &'static str, result: ttrpc::Result<T>) -> Result<T> {
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

/// Whether the front end lets the machine start from a template.
fn templates_allowed(spec: &Spec) -> bool {
    spec.annotations()
        .as_ref()
        .and_then(|a| a.get(ANNOTATION_TEMPLATE))
        .is_none_or(|value| value != "off")
}

fn open_log(spec: &Spec) -> Result<Option<SharedLog>> {
    let Some(path) = spec
        .annotations()
        .as_ref()
        .and_then(|a| a.get(ANNOTATION_LOG))
    else {
        return Ok(None);
    };
    Ok(Some(Arc::new(Mutex::new(LogWriter::open(Path::new(
        path,
    ))?))))
}

fn find_exec(container: &Container, id: &str, exec_id: &str) -> Result<Exec> {
    lock(&container.execs)
        .get(exec_id)
        .cloned()
        .ok_or_else(|| Error::NotFound(format!("no process {exec_id} in container {id}")))
}

fn container_request(id: &str) -> AgentContainer {
    AgentContainer {
        container_id: id.into(),
        ..Default::default()
    }
}

fn process_request(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

fn lock<T>(mutex: &StdMutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
