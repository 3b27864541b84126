//! `proto/agent.proto`, answered.
//!
//! What changes a container runs in a task of its own: a host that hangs up
//! half-way must not leave a container half built.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nix::errno::Errno;
use protobuf::Message;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, Error, Result, get_status};
use walnut_agent::names::{ContainerPaths, below_guest_root, check_id};
use walnut_agent::wire::{Status, Verb};
use walnut_protocol::agent::{
    AdoptContainerRequest, AdoptContainerResponse, ConfigureNetworkRequest,
    ConfigureSandboxRequest, ConnectPortRequest, ContainerRequest, ContainerStatsResponse,
    CreateContainerRequest, CreateContainerResponse, Empty, Event, ExecProcessRequest,
    ExecProcessResponse, GuestMemoryResponse, HelloRequest, HelloResponse, ListProcessesResponse,
    OnlineCpusRequest, OnlineCpusResponse, ProcessRequest, ReclaimMemoryRequest,
    ReclaimMemoryResponse, ReleaseInterfaceRequest, ResizeTerminalRequest, SetClockRequest,
    SignalProcessRequest, Stdio, UpdateContainerRequest, WaitProcessResponse,
};
use walnut_protocol::agent_ttrpc::Agent;

use crate::container::{Container, EXECS_MAX, ExecRefused, Mount, State};
use crate::events::{Events, OomWatch};
use crate::gate::Gate;
use crate::helper::{Answer, Helpers, Refusal};
use crate::ports::Ports;
use crate::power::{self, Fatal};
use crate::process::{Process, Streams};
use crate::reaper::Reaper;
use crate::remove::remove;
use crate::streams::Pending;
use crate::table::{CONTAINERS_MAX, Refused, Table};
use crate::{adopt, cpus, memory, network, pressure, processes, scale, stats, system};

/// How long freezing may take.
const FREEZE_WITHIN: Duration = Duration::from_secs(10);
/// What a reply needs to leave the guest before it ends.
const REPLY_LEAVES: Duration = Duration::from_millis(50);

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    table: Arc<Table>,
    reaper: Arc<Reaper>,
    streams: Arc<Pending>,
    helpers: Helpers,
    events: Arc<Events>,
    oom: Arc<OomWatch>,
    gate: Arc<Gate>,
    ports: Ports,
}

pub(crate) fn status(code: Code, text: impl Into<String>) -> Error {
    Error::RpcStatus(get_status(code, text.into()))
}

pub(crate) fn invalid(e: impl ToString) -> Error {
    status(Code::INVALID_ARGUMENT, e.to_string())
}

pub(crate) fn internal(what: &str, e: impl std::fmt::Display) -> Error {
    status(Code::INTERNAL, format!("{what}: {e}"))
}

fn refused(refusal: Refusal) -> Error {
    let code = match refusal.status {
        Status::Invalid => Code::INVALID_ARGUMENT,
        Status::Precondition => Code::FAILED_PRECONDITION,
        Status::Deadline => Code::DEADLINE_EXCEEDED,
        Status::Internal | Status::Ok => Code::INTERNAL,
    };
    status(code, refusal.text)
}

impl Service {
    pub(crate) fn new(
        reaper: Arc<Reaper>,
        streams: Arc<Pending>,
        helpers: Helpers,
    ) -> std::result::Result<Self, Fatal> {
        let events = Arc::new(Events::default());
        Ok(Self {
            table: Arc::default(),
            reaper,
            streams,
            helpers,
            oom: OomWatch::start(Arc::clone(&events))?,
            events,
            gate: Arc::default(),
            ports: Ports::default(),
        })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        check_id("container", id).map_err(invalid)?;
        self.table.get(id).ok_or_else(|| {
            status(
                Code::NOT_FOUND,
                format!("container {id}: no such container"),
            )
        })
    }

    /// A container in one of the `states`.
    fn container_in(&self, id: &str, what: &str, states: &[State]) -> Result<Arc<Container>> {
        let container = self.container(id)?;
        let state = container.state();
        if states.contains(&state) {
            return Ok(container);
        }
        let state = format!("{state:?}").to_lowercase();
        Err(status(
            Code::FAILED_PRECONDITION,
            format!("{what} container {id}: it is {state}"),
        ))
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = self.container(id)?;
        if !exec_id.is_empty() {
            check_id("exec", exec_id).map_err(invalid)?;
        }
        let process = container.process(exec_id).ok_or_else(|| {
            let which = if exec_id.is_empty() {
                format!("container {id} has no process yet")
            } else {
                format!("exec {exec_id} of container {id}: no such process")
            };
            status(Code::NOT_FOUND, which)
        })?;
        Ok((container, process))
    }

    async fn claim(&self, stdio: &Stdio) -> Result<Streams> {
        let late = |number: u32| {
            status(
                Code::DEADLINE_EXCEEDED,
                format!("stream {number} was announced and not opened"),
            )
        };
        Ok(Streams {
            stdin: self.streams.claim(stdio.stdin).await.map_err(late)?,
            stdout: self.streams.claim(stdio.stdout).await.map_err(late)?,
            stderr: self.streams.claim(stdio.stderr).await.map_err(late)?,
        })
    }

    /// Closes the streams of a request that failed.
    fn discard(&self, stdio: &Stdio) {
        for number in [stdio.stdin, stdio.stdout, stdio.stderr] {
            self.streams.discard(number);
        }
    }

    /// Takes a helper's new process on the books and connects it.
    fn adopt(
        &self,
        answer: Answer,
        container: &Container,
        streams: Streams,
        size: Option<&walnut_protocol::agent::TerminalSize>,
    ) -> io::Result<Arc<Process>> {
        let (cgroup, gate) = (container.cgroup.clone(), Arc::clone(&self.gate));
        let mut process = Process::adopt(&self.reaper, answer.pid, cgroup, gate);
        let ends = answer.acknowledge();
        process.connect(ends, streams)?;
        if let Some(size) = size.filter(|s| s.rows > 0 && s.columns > 0) {
            process.resize(size)?;
        }
        Ok(Arc::new(process))
    }

    async fn create(self, request: CreateContainerRequest) -> Result<CreateContainerResponse> {
        let id = request.container_id.as_str();
        let paths = ContainerPaths::new(id).map_err(invalid)?;
        let mut mounts = Vec::with_capacity(request.storages.len());
        for storage in &request.storages {
            below_guest_root(&storage.mount_point).map_err(invalid)?;
            // What the whole sandbox has stays.
            if storage.driver != "virtio-fs" {
                mounts.push(Mount {
                    point: storage.mount_point.clone(),
                    disk: storage.driver == "blk",
                });
            }
        }
        let container = Arc::new(Container::new(paths, mounts));
        self.table.insert(&container).map_err(|why| match why {
            Refused::Exists => status(
                Code::ALREADY_EXISTS,
                format!("create container {id}: it exists"),
            ),
            Refused::Full => status(
                Code::RESOURCE_EXHAUSTED,
                format!("create container {id}: {CONTAINERS_MAX} exist; remove one first"),
            ),
        })?;
        // Nobody may remove what is still being built.
        container.begin_removal();
        let built = self.build(&request, &container).await;
        match built {
            Ok(pid) => {
                container.end_removal();
                Ok(CreateContainerResponse {
                    pid,
                    ..CreateContainerResponse::default()
                })
            }
            Err((error, mounted)) => {
                self.discard(&request.stdio);
                if let Err(e) = remove(&container, mounted).await {
                    eprintln!("walnut-agent: after a failed create: {e}");
                }
                self.table.remove(id);
                Err(error)
            }
        }
    }

    /// The error comes with whether storages may be left mounted.
    async fn build(
        &self,
        request: &CreateContainerRequest,
        container: &Container,
    ) -> std::result::Result<u32, (Error, bool)> {
        let streams = self.claim(&request.stdio).await.map_err(|e| (e, false))?;
        let payload = request
            .write_to_bytes()
            .map_err(|e| (internal("pass the request on", e), false))?;
        let answer = self
            .helpers
            .ask(Verb::Create, 0, &payload)
            .await
            .map_err(|r| {
                let mounted = !r.undone;
                (refused(r), mounted)
            })?;
        drop(payload);
        let process = self
            .adopt(answer, container, streams, request.terminal.as_ref())
            .map_err(|e| (internal("connect stdio", e), true))?;
        self.oom.add(container.paths.id(), container.cgroup.clone());
        tokio::spawn(pressure::watch(container.cgroup.clone(), process.clone()));
        let pid = process.pid;
        container.set_first(process);
        Ok(pid)
    }

    async fn exec(self, request: ExecProcessRequest) -> Result<ExecProcessResponse> {
        let (id, exec_id) = (request.container_id.as_str(), request.exec_id.as_str());
        let container = self.container_in(id, "exec in", &[State::Running])?;
        check_id("exec", exec_id).map_err(invalid)?;
        if container.paused() {
            return Err(status(
                Code::FAILED_PRECONDITION,
                format!("exec in container {id}: it is paused"),
            ));
        }
        let Some(first) = container.process("") else {
            return Err(status(
                Code::NOT_FOUND,
                format!("container {id} has no process"),
            ));
        };
        container.reserve_exec(exec_id).map_err(|why| match why {
            ExecRefused::Exists => status(
                Code::ALREADY_EXISTS,
                format!("exec {exec_id} in container {id}: it exists"),
            ),
            ExecRefused::Full => status(
                Code::RESOURCE_EXHAUSTED,
                format!("exec in container {id}: {EXECS_MAX} exist; remove one first"),
            ),
        })?;
        let started = self.run_exec(&request, &container, first.pid).await;
        match started {
            Ok(process) => {
                let pid = process.pid;
                container.set_exec(exec_id, process);
                Ok(ExecProcessResponse {
                    pid,
                    ..ExecProcessResponse::default()
                })
            }
            Err(e) => {
                self.discard(&request.stdio);
                container.remove_exec(exec_id);
                Err(e)
            }
        }
    }

    async fn run_exec(
        &self,
        request: &ExecProcessRequest,
        container: &Container,
        first: u32,
    ) -> Result<Arc<Process>> {
        let streams = self.claim(&request.stdio).await?;
        let payload = request
            .write_to_bytes()
            .map_err(|e| internal("pass the request on", e))?;
        let answer = self
            .helpers
            .ask(Verb::Exec, first, &payload)
            .await
            .map_err(refused)?;
        self.adopt(answer, container, streams, request.terminal.as_ref())
            .map_err(|e| internal("connect stdio", e))
    }

    async fn adopt_clone(self, request: AdoptContainerRequest) -> Result<AdoptContainerResponse> {
        let id = request.container_id.as_str();
        let container = self.container_in(id, "adopt", &[State::Running])?;
        let Some(first) = container.process("") else {
            return Err(status(
                Code::NOT_FOUND,
                format!("container {id} has no process"),
            ));
        };
        if request.stdio.stdin != 0 && !first.takes_input() {
            self.discard(&request.stdio);
            let text = format!("adopt container {id}: its standard input is not open");
            return Err(status(Code::FAILED_PRECONDITION, text));
        }
        let result = adopt::rename(&container, first.pid, &request).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidInput => invalid(format!("adopt container {id}: {e}")),
            _ => internal(&format!("adopt container {id}"), e),
        });
        let streams = match result {
            Ok(()) => self.claim(&request.stdio).await,
            Err(e) => Err(e),
        };
        let streams = streams.inspect_err(|_| self.discard(&request.stdio))?;
        for process in container.processes() {
            process.reconnect(Streams::default());
        }
        container.forget_execs();
        first.reconnect(streams);
        Ok(AdoptContainerResponse {
            pid: first.pid,
            ..AdoptContainerResponse::default()
        })
    }

    async fn remove(self, id: String) -> Result<Empty> {
        let container = self.container(&id)?;
        if !container.begin_removal() {
            return Err(status(
                Code::FAILED_PRECONDITION,
                format!("remove container {id}: it is being created or removed"),
            ));
        }
        match remove(&container, true).await {
            Ok(()) => {
                self.table.remove(&id);
                Ok(Empty::new())
            }
            Err(e) => {
                container.end_removal();
                Err(status(Code::INTERNAL, e))
            }
        }
    }

    fn signal(&self, request: &SignalProcessRequest) -> Result<()> {
        let (container, process) = self.process(&request.container_id, &request.exec_id)?;
        let signal = libc::c_int::try_from(request.signal)
            .ok()
            .filter(|s| (1..=64).contains(s))
            .ok_or_else(|| invalid(format!("signal {}: want 1-64", request.signal)))?;
        let what = format!("signal container {}", request.container_id);
        if request.all && signal == libc::SIGKILL {
            return container.cgroup.kill().map_err(|e| internal(&what, e));
        }
        if request.all {
            for pid in container.cgroup.pids() {
                if let Ok(pid) = i32::try_from(pid) {
                    // SAFETY: kill takes integers; one that has ended is fine.
                    unsafe { libc::kill(pid, signal) };
                }
            }
            return Ok(());
        }
        match self.reaper.signal(process.pid, signal) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(status(
                Code::FAILED_PRECONDITION,
                format!("{what}: the process has ended"),
            )),
            Err(e) => Err(internal(&what, e)),
        }
    }

    async fn pause(&self, id: &str, on: bool) -> Result<Empty> {
        let what = if on { "pause" } else { "resume" };
        let container = self.container_in(id, what, &[State::Created, State::Running])?;
        container
            .cgroup
            .freeze(on, FREEZE_WITHIN)
            .await
            .map_err(|e| match e.kind() {
                io::ErrorKind::TimedOut => status(
                    Code::DEADLINE_EXCEEDED,
                    format!("{what} container {id}: a process does not stop"),
                ),
                _ => internal(&format!("{what} container {id}"), e),
            })?;
        container.set_paused(on);
        Ok(Empty::new())
    }
}

/// Runs to the end whatever becomes of the caller.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|e| Err(internal("run the request", e)))
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, _: HelloRequest) -> Result<HelloResponse> {
        Ok(HelloResponse {
            protocol: walnut_protocol::PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: system::kernel_release(),
            memory_bytes: system::memory_bytes(),
            cpus_online: system::cpus_online(),
            ..HelloResponse::default()
        })
    }

    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: ConfigureSandboxRequest,
    ) -> Result<Empty> {
        if !system::ENTROPY.contains(&request.entropy.len()) {
            return Err(invalid(format!(
                "configure sandbox: {} bytes of entropy; want {} to {}",
                request.entropy.len(),
                system::ENTROPY.start(),
                system::ENTROPY.end()
            )));
        }
        system::add_entropy(&request.entropy).map_err(|e| internal("add entropy", e))?;
        system::set_clock(request.realtime_ns).map_err(|e| internal("set the clock", e))?;
        let refused = |what: String, e: io::Error| match e.kind() {
            io::ErrorKind::InvalidInput | io::ErrorKind::NotFound => {
                invalid(format!("{what}: {e}"))
            }
            _ => internal(&what, e),
        };
        if !request.hostname.is_empty() {
            system::set_hostname(&request.hostname)
                .map_err(|e| refused(format!("set host name {:?}", request.hostname), e))?;
        }
        for (key, value) in &request.sysctls {
            system::set_sysctl(key, value).map_err(|e| refused(format!("set sysctl {key}"), e))?;
        }
        // A container comes next; after the first one nobody has seen to this.
        self.helpers.prepare();
        Ok(Empty::new())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> Result<Empty> {
        network::serve(&request).await?;
        Ok(Empty::new())
    }

    async fn release_interface(
        &self,
        _: &TtrpcContext,
        request: ReleaseInterfaceRequest,
    ) -> Result<Empty> {
        network::release(&request)?;
        Ok(Empty::new())
    }

    async fn connect_port(&self, _: &TtrpcContext, request: ConnectPortRequest) -> Result<Empty> {
        self.ports.serve(&request, &self.streams).await?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse> {
        to_the_end(self.clone().create(request)).await
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        let id = request.container_id;
        let container = self.container_in(&id, "start", &[State::Created])?;
        container.start().map_err(|e| {
            status(
                Code::FAILED_PRECONDITION,
                format!("start container {id}: {e}"),
            )
        })?;
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> Result<ExecProcessResponse> {
        to_the_end(self.clone().exec(request)).await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> Result<WaitProcessResponse> {
        let (_, process) = self.process(&request.container_id, &request.exec_id)?;
        let exit = process
            .wait()
            .await
            .ok_or_else(|| internal("wait for the process", "its status was lost"))?;
        Ok(WaitProcessResponse {
            exit_code: exit.code,
            exited_at_ns: exit.at_ns,
            oom_killed: exit.oom,
            ..WaitProcessResponse::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> Result<Empty> {
        self.signal(&request).map(|()| Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> Result<Empty> {
        let (_, process) = self.process(&request.container_id, &request.exec_id)?;
        let resized = process
            .resize(&request.size)
            .map_err(|e| internal("resize the terminal", e))?;
        if resized {
            return Ok(Empty::new());
        }
        Err(status(
            Code::FAILED_PRECONDITION,
            format!(
                "resize in container {}: the process has no terminal",
                request.container_id
            ),
        ))
    }

    async fn remove_process(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<Empty> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        if exec_id.is_empty() {
            return Err(invalid(format!(
                "remove process of container {id}: exec_id is empty"
            )));
        }
        let (container, process) = self.process(id, exec_id)?;
        if process.exit().is_none() {
            return Err(status(
                Code::FAILED_PRECONDITION,
                format!("remove exec {exec_id} of container {id}: it runs"),
            ));
        }
        container.remove_exec(exec_id);
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.pause(&request.container_id, true).await
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.pause(&request.container_id, false).await
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> Result<Empty> {
        let states = [State::Created, State::Running];
        self.container_in(&request.container_id, "update", &states)?;
        let payload = request
            .write_to_bytes()
            .map_err(|e| internal("pass the request on", e))?;
        let answer = self
            .helpers
            .ask(Verb::Update, 0, &payload)
            .await
            .map_err(refused)?;
        answer.acknowledge();
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Result<ListProcessesResponse> {
        let container = self.container(&request.container_id)?;
        let pids = container.cgroup.pids();
        Ok(ListProcessesResponse {
            processes: processes::known(&pids),
            pids,
            ..ListProcessesResponse::default()
        })
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Result<ContainerStatsResponse> {
        let container = self.container(&request.container_id)?;
        Ok(stats::read(&container.cgroup))
    }

    async fn remove_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        to_the_end(self.clone().remove(request.container_id)).await
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> Result<Event> {
        Ok(self.events.next().await)
    }

    async fn online_cpus(
        &self,
        _: &TtrpcContext,
        request: OnlineCpusRequest,
    ) -> Result<OnlineCpusResponse> {
        if request.count == 0 {
            return Err(invalid("bring 0 processors online: want 1 or more"));
        }
        let mut changed = cpus::online(request.count).await;
        if request.exact && changed.is_ok() {
            changed = cpus::offline(request.count).await;
        }
        let online = changed.map_err(|e| {
            let code = match e {
                cpus::Refused::Few(_) => Code::FAILED_PRECONDITION,
                cpus::Refused::Kernel(..) | cpus::Refused::Unknown(_) => Code::INTERNAL,
            };
            let count = request.count;
            status(code, format!("have {count} processors online: {e}"))
        })?;
        Ok(OnlineCpusResponse {
            online,
            ..OnlineCpusResponse::default()
        })
    }

    async fn adjust_memory(&self, _: &TtrpcContext, _: Empty) -> Result<GuestMemoryResponse> {
        scale::adjust().map_err(|e| internal("let containers have the guest's memory", e))
    }

    async fn guest_memory(&self, _: &TtrpcContext, _: Empty) -> Result<GuestMemoryResponse> {
        memory::read().map_err(|e| internal("read the guest's memory", e))
    }

    async fn reclaim_memory(
        &self,
        _: &TtrpcContext,
        request: ReclaimMemoryRequest,
    ) -> Result<ReclaimMemoryResponse> {
        let freed = memory::reclaim(request.bytes)
            .await
            .map_err(|e| internal("reclaim memory", e))?;
        Ok(ReclaimMemoryResponse {
            freed,
            ..ReclaimMemoryResponse::default()
        })
    }

    async fn hold_streams(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        adopt::hold(&self.table, &self.gate).await;
        Ok(Empty::new())
    }

    async fn adopt_container(
        &self,
        _: &TtrpcContext,
        request: AdoptContainerRequest,
    ) -> Result<AdoptContainerResponse> {
        to_the_end(self.clone().adopt_clone(request)).await
    }

    async fn release_streams(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        self.gate.open();
        Ok(Empty::new())
    }

    async fn set_clock(&self, _: &TtrpcContext, request: SetClockRequest) -> Result<Empty> {
        system::set_clock(request.realtime_ns).map_err(|e| internal("set the clock", e))?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        let all = self.table.all();
        to_the_end(async move {
            for container in &all {
                let _ = container.cgroup.kill();
            }
            for container in &all {
                // Going anyway; what cannot be removed goes with the machine.
                if let Err(e) = remove(container, true).await {
                    eprintln!("walnut-agent: shutdown: {e}");
                }
            }
            nix::unistd::sync();
            tokio::spawn(async {
                tokio::time::sleep(REPLY_LEAVES).await;
                power::off();
            });
            Ok(Empty::new())
        })
        .await
    }
}
