//! The Task API's client.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest,
        ProcessInfo, ResumeRequest, ShutdownRequest, StartRequest, StatsRequest, UpdateTaskRequest,
        WaitRequest,
    },
    cgroups_v2::metrics::Metrics,
    protobuf::{Message, MessageField, UnknownValueRef, well_known_types::any::Any},
    shim_async::TaskClient,
};
use serde_json::json;
use tokio::{sync::oneshot, time::sleep};
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    context::{self, Context},
};
use walnut_protocol::{supervisor::AttachRequest, supervisor_ttrpc::SupervisorClient};
use walnut_sandbox::{
    ANNOTATION_RECLAIM, CheckpointOptions, Error, GuestMemoryResponse, Layout, Lock,
    METRICS_GUEST_MEMORY, Record, joined,
};

/// Longest a request may take that does not wait for a process; the boot of a
/// machine is the longest.
const DEADLINE: Duration = Duration::from_secs(180);
/// How often it is looked whether a machine goes on without its container.
const LOOK: Duration = Duration::from_millis(50);
/// Longest it may take to write a machine's memory to a disk, and to digest it.
const SAVING: Duration = Duration::from_secs(1800);

/// A connection to one container's supervisor.
pub(crate) struct Supervisor {
    pub(crate) task: TaskClient,
    pub(crate) id: String,
    client: Client,
}

impl Supervisor {
    /// Connects to the supervisor of a container that is not known to have ended.
    pub(crate) async fn connect(layout: &Layout, record: &Record) -> anyhow::Result<Self> {
        let socket = layout.task_socket(&record.id);
        match Socket::connect_unix(socket.to_string_lossy()).await {
            Ok(socket) => {
                let client = Client::new(socket);
                Ok(Self {
                    task: TaskClient::new(client.clone()),
                    id: record.id.clone(),
                    client,
                })
            }
            Err(_) => Err(Error::WrongState(format!(
                "container {} is not running (`walnut ps -a` shows how it ended)",
                record.name
            ))
            .into()),
        }
    }

    /// Connects to the supervisor that listens at `socket`.
    pub(crate) async fn at(socket: &Path, id: &str) -> anyhow::Result<Self> {
        let connected = Socket::connect_unix(socket.to_string_lossy()).await;
        let connected = connected
            .with_context(|| format!("connect to the supervisor at {}", socket.display()))?;
        let client = Client::new(connected);
        Ok(Self {
            task: TaskClient::new(client.clone()),
            id: id.to_owned(),
            client,
        })
    }

    /// Has a process's input come from a FIFO that stays open when its writers go.
    pub(crate) async fn hold_stdin(&self, exec_id: &str, fifo: &str) -> anyhow::Result<()> {
        if fifo.is_empty() {
            return Ok(());
        }
        let request = AttachRequest {
            exec_id: exec_id.into(),
            stdin: fifo.into(),
            ..Default::default()
        };
        self.attach(request).await
    }

    /// Has a process's streams lead to FIFOs as well.
    pub(crate) async fn attach(&self, mut request: AttachRequest) -> anyhow::Result<()> {
        request.id.clone_from(&self.id);
        let own = SupervisorClient::new(self.client.clone());
        own.attach(soon(), &request).await.map_err(fault)?;
        Ok(())
    }

    pub(crate) async fn start(&self, exec_id: &str) -> anyhow::Result<()> {
        let request = StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.start(soon(), &request).await.map_err(fault)?;
        Ok(())
    }

    /// The exit code of a process, once it has ended.
    pub(crate) async fn wait(&self, exec_id: &str) -> anyhow::Result<u8> {
        let request = WaitRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let reply = self
            .task
            .wait(context::with_timeout(0), &request)
            .await
            .map_err(fault)?;
        Ok(u8::try_from(reply.exit_status).unwrap_or(255))
    }

    pub(crate) async fn kill(&self, exec_id: &str, signal: u32) -> anyhow::Result<()> {
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            signal,
            ..Default::default()
        };
        self.task.kill(soon(), &request).await.map_err(fault)?;
        Ok(())
    }

    /// The container's figures, and what its guest says of all of its memory.
    pub(crate) async fn stats(&self) -> anyhow::Result<(Metrics, GuestMemoryResponse)> {
        let request = StatsRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let reply = self.task.stats(soon(), &request).await.map_err(fault)?;
        let value = reply.stats.into_option().unwrap_or_default().value;
        let metrics = Metrics::parse_from_bytes(&value).context("read the figures")?;
        let guest = match metrics.unknown_fields().get(METRICS_GUEST_MEMORY) {
            Some(UnknownValueRef::LengthDelimited(guest)) => {
                GuestMemoryResponse::parse_from_bytes(guest).context("read the guest's figures")?
            }
            _ => GuestMemoryResponse::default(),
        };
        Ok((metrics, guest))
    }

    /// Returns when the guest has let go of all memory that it can do without.
    pub(crate) async fn reclaim(&self) -> anyhow::Result<()> {
        let all = (ANNOTATION_RECLAIM.to_owned(), "0".to_owned());
        let request = UpdateTaskRequest {
            id: self.id.clone(),
            annotations: [all].into(),
            ..Default::default()
        };
        self.task.update(soon(), &request).await.map_err(fault)?;
        Ok(())
    }

    /// Freezes the container's processes, or lets them go on.
    pub(crate) async fn freeze(&self, on: bool) -> anyhow::Result<()> {
        let id = self.id.clone();
        let done = match on {
            true => {
                let request = PauseRequest {
                    id,
                    ..Default::default()
                };
                self.task.pause(soon(), &request).await
            }
            false => {
                let request = ResumeRequest {
                    id,
                    ..Default::default()
                };
                self.task.resume(soon(), &request).await
            }
        };
        done.map(drop).map_err(fault)
    }

    /// Gives the container other limits: OCI runtime-spec "linux.resources", JSON.
    pub(crate) async fn limit(&self, resources: Vec<u8>) -> anyhow::Result<()> {
        let request = UpdateTaskRequest {
            id: self.id.clone(),
            resources: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: resources,
                ..Default::default()
            }),
            ..Default::default()
        };
        self.task.update(soon(), &request).await.map_err(fault)?;
        Ok(())
    }

    /// The container's processes.
    pub(crate) async fn processes(&self) -> anyhow::Result<Vec<ProcessInfo>> {
        let request = PidsRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let reply = self.task.pids(soon(), &request).await.map_err(fault)?;
        Ok(reply.processes)
    }

    pub(crate) async fn exec(&self, request: ExecProcessRequest) -> anyhow::Result<()> {
        self.task.exec(soon(), &request).await.map_err(fault)?;
        Ok(())
    }

    /// Saves the container into a directory.
    pub(crate) async fn checkpoint(
        &self,
        to: &Path,
        options: CheckpointOptions,
    ) -> anyhow::Result<()> {
        let CheckpointOptions { exit, lasting } = options;
        let value = serde_json::to_vec(&json!({ "exit": exit, "lasting": lasting }))?;
        let request = CheckpointTaskRequest {
            id: self.id.clone(),
            path: to.display().to_string(),
            options: MessageField::some(Any {
                type_url: "dev.walnut.CheckpointOptions".into(),
                value,
                ..Default::default()
            }),
            ..Default::default()
        };
        let context = context::with_duration(SAVING);
        self.task
            .checkpoint(context, &request)
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// Ends the sandbox, whatever its guest is doing.
    pub(crate) async fn shutdown(&self) -> anyhow::Result<()> {
        let request = ShutdownRequest {
            id: self.id.clone(),
            now: true,
            ..Default::default()
        };
        self.task.shutdown(soon(), &request).await.map_err(fault)?;
        Ok(())
    }
}

/// Context of a request that is answered soon.
pub(crate) fn soon() -> Context {
    context::with_duration(DEADLINE)
}

/// Returns when a container's supervisor is gone, and all of it; or when it has ended, and
/// its machine goes on for others.
pub(crate) async fn gone(layout: &Layout, id: &str) -> anyhow::Result<()> {
    let dir = layout.container(id);
    let lock = dir.join("lock");
    let (tell, told) = oneshot::channel();
    // Of its own: nobody waits for it where the machine goes on.
    let wait = move || drop(tell.send(Lock::wait_free(&lock)));
    std::thread::Builder::new()
        .name("gone".into())
        .spawn(wait)
        .context("start a thread")?;
    let outlived = async {
        loop {
            sleep(LOOK).await;
            if Record::load(&dir).is_ok_and(|r| r.outlived) && !joined(layout, id)?.is_empty() {
                return anyhow::Ok(());
            }
        }
    };
    tokio::select! {
        free = told => Ok(free??),
        outlived = outlived => outlived,
    }
}

/// A supervisor's answer as an error of ours, with the code it came with.
pub(crate) fn fault(error: ttrpc::Error) -> anyhow::Error {
    let ttrpc::Error::RpcStatus(status) = error else {
        return Error::Machine(
            "the sandbox's supervisor is gone (it was killed, or it crashed)".into(),
        )
        .into();
    };
    let text = status.message().to_owned();
    match status.code() {
        Code::NOT_FOUND => Error::NotFound(text),
        Code::ALREADY_EXISTS => Error::AlreadyExists(text),
        Code::FAILED_PRECONDITION => Error::WrongState(text),
        Code::OUT_OF_RANGE => Error::ProgramNotFound(text),
        Code::PERMISSION_DENIED => Error::ProgramDenied(text),
        Code::ABORTED => Error::Machine(text),
        Code::DEADLINE_EXCEEDED => Error::Machine(format!("the supervisor did not answer: {text}")),
        _ => Error::Invalid(text),
    }
    .into()
}
