//! containerd's Task API over a [`Sandbox`]: translation, and nothing else.

use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status as TaskStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    cgroups_v2::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat},
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim_async::Task,
};
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::Mutex;
use ttrpc::{Code, r#async::TtrpcContext, get_status};
use walnut_sandbox::{
    Assets, ContainerRequest, Error, ExecRequest, ExitInfo, ProcessState, RootfsMount, Sandbox,
    SandboxConfig, Status, StdioTargets, boot_deadline,
};

use crate::{owner::Owner, template};

/// The Task service of one sandbox.
#[derive(Debug)]
pub(crate) struct TaskService {
    owner: Arc<Owner>,
    assets: Assets,
    sandbox: Mutex<Option<Arc<Sandbox>>>,
}

type Reply<T> = ttrpc::Result<T>;

impl TaskService {
    pub(crate) fn new(owner: Arc<Owner>) -> anyhow::Result<Self> {
        Ok(Self {
            owner,
            assets: Assets::find().context("start the supervisor")?,
            sandbox: Mutex::default(),
        })
    }

    async fn sandbox(&self) -> Reply<Arc<Sandbox>> {
        self.sandbox
            .lock()
            .await
            .clone()
            .ok_or_else(|| fault(&Error::NotFound("the sandbox has no container yet".into())))
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, req: CreateTaskRequest) -> Reply<CreateTaskResponse> {
        if !req.checkpoint.is_empty() {
            return Err(unsupported("restore from a checkpoint"));
        }
        let mut slot = self.sandbox.lock().await;
        if slot.is_some() {
            return Err(unsupported("more than one container in a sandbox"));
        }
        let request = ContainerRequest {
            id: req.id.clone(),
            bundle: req.bundle.into(),
            rootfs: req
                .rootfs
                .into_iter()
                .map(|m| RootfsMount {
                    kind: m.type_,
                    source: m.source.into(),
                })
                .collect(),
            stdio: stdio(req.terminal, req.stdin, req.stdout, req.stderr),
        };
        let config = SandboxConfig {
            id: self.owner.id.clone(),
            run_dir: self.owner.run_dir.clone(),
            assets: self.assets.clone(),
            driver: driver()?,
            cache: self.owner.run_dir.parent().map(Into::into),
            boot_deadline: boot_deadline().map_err(|e| fault(&e))?,
            templates: template::store(&self.owner),
        };
        let sandbox = Arc::new(
            Sandbox::create(config, &request)
                .await
                .map_err(|e| fault(&e))?,
        );
        *slot = Some(sandbox.clone());
        self.owner.serving(sandbox.clone(), req.id.clone());
        if let Some(wanted) = sandbox.wanted_template() {
            template::make_later(&self.owner, wanted);
        }
        let state = sandbox.state(&req.id, "").map_err(|e| fault(&e))?;
        Ok(CreateTaskResponse {
            pid: state.pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> Reply<StartResponse> {
        let sandbox = self.sandbox().await?;
        let pid = sandbox
            .start(&req.id, &req.exec_id)
            .await
            .map_err(|e| fault(&e))?;
        if req.exec_id.is_empty() {
            self.owner.update(|record| {
                record.status = Status::Running;
                record.started_at = Some(walnut_sandbox::now_ns());
            });
        }
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> Reply<StateResponse> {
        let state = self
            .sandbox()
            .await?
            .state(&req.id, &req.exec_id)
            .map_err(|e| fault(&e))?;
        let mut reply = StateResponse {
            id: req.id,
            exec_id: req.exec_id,
            bundle: state.bundle.display().to_string(),
            pid: state.pid,
            stdin: path(state.stdio.stdin),
            stdout: path(state.stdio.stdout),
            stderr: path(state.stdio.stderr),
            terminal: state.stdio.terminal,
            ..Default::default()
        };
        reply.status = match state.state {
            ProcessState::Created => TaskStatus::CREATED,
            ProcessState::Running => TaskStatus::RUNNING,
            ProcessState::Paused => TaskStatus::PAUSED,
            ProcessState::Stopped(exit) => {
                reply.exit_status = exit.code;
                reply.exited_at = timestamp(&exit);
                TaskStatus::STOPPED
            }
        }
        .into();
        Ok(reply)
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> Reply<Empty> {
        let request = ExecRequest {
            exec_id: req.exec_id,
            process: req
                .spec
                .into_option()
                .map(|any| any.value)
                .unwrap_or_default(),
            stdio: stdio(req.terminal, req.stdin, req.stdout, req.stderr),
        };
        let sandbox = self.sandbox().await?;
        sandbox.exec(&req.id, request).map_err(|e| fault(&e))?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> Reply<WaitResponse> {
        let sandbox = self.sandbox().await?;
        let exit = sandbox
            .wait(&req.id, &req.exec_id)
            .await
            .map_err(|e| fault(&e))?;
        // The API has no field for the reason; an exit code alone would be taken
        // for the program's own.
        if let Some(reason) = &exit.error {
            return Err(fault(&Error::Machine(reason.clone())));
        }
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: timestamp(&exit),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> Reply<Empty> {
        let sandbox = self.sandbox().await?;
        sandbox
            .kill(&req.id, &req.exec_id, req.signal, req.all)
            .await
            .map_err(|e| fault(&e))?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> Reply<Empty> {
        let sandbox = self.sandbox().await?;
        sandbox
            .resize(&req.id, &req.exec_id, req.width, req.height)
            .await
            .map_err(|e| fault(&e))?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> Reply<Empty> {
        if req.stdin {
            let sandbox = self.sandbox().await?;
            sandbox
                .close_stdin(&req.id, &req.exec_id)
                .map_err(|e| fault(&e))?;
        }
        Ok(Empty::default())
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> Reply<Empty> {
        let sandbox = self.sandbox().await?;
        sandbox.pause(&req.id).await.map_err(|e| fault(&e))?;
        self.owner.update(|record| record.status = Status::Paused);
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> Reply<Empty> {
        let sandbox = self.sandbox().await?;
        sandbox.resume(&req.id).await.map_err(|e| fault(&e))?;
        self.owner.update(|record| record.status = Status::Running);
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> Reply<Empty> {
        let resources = req
            .resources
            .into_option()
            .map(|any| any.value)
            .unwrap_or_default();
        let sandbox = self.sandbox().await?;
        sandbox
            .update(&req.id, resources)
            .await
            .map_err(|e| fault(&e))?;
        Ok(Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> Reply<PidsResponse> {
        let pids = self
            .sandbox()
            .await?
            .pids(&req.id)
            .await
            .map_err(|e| fault(&e))?;
        Ok(PidsResponse {
            processes: pids
                .into_iter()
                .map(|pid| ProcessInfo {
                    pid,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> Reply<StatsResponse> {
        let s = self
            .sandbox()
            .await?
            .stats(&req.id)
            .await
            .map_err(|e| fault(&e))?;
        let metrics = Metrics {
            pids: MessageField::some(PidsStat {
                current: s.pids_current,
                limit: s.pids_limit,
                ..Default::default()
            }),
            cpu: MessageField::some(CPUStat {
                usage_usec: s.cpu_usage_us,
                user_usec: s.cpu_user_us,
                system_usec: s.cpu_system_us,
                throttled_usec: s.cpu_throttled_us,
                ..Default::default()
            }),
            memory: MessageField::some(MemoryStat {
                usage: s.memory_current,
                usage_limit: s.memory_limit,
                max_usage: s.memory_peak,
                swap_usage: s.memory_swap,
                ..Default::default()
            }),
            memory_events: MessageField::some(MemoryEvents {
                oom_kill: s.oom_kills,
                ..Default::default()
            }),
            ..Default::default()
        };
        let value = metrics
            .write_to_bytes()
            .map_err(|e| fault(&Error::Invalid(format!("encode the figures: {e}"))))?;
        Ok(StatsResponse {
            stats: MessageField::some(Any {
                type_url: "io.containerd.cgroups.v2.Metrics".into(),
                value,
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> Reply<DeleteResponse> {
        let (pid, exit) = self
            .sandbox()
            .await?
            .delete(&req.id, &req.exec_id)
            .await
            .map_err(|e| fault(&e))?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.code,
            exited_at: timestamp(&exit),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> Reply<ConnectResponse> {
        let sandbox = self.sandbox().await?;
        let state = sandbox.state(&req.id, "").map_err(|e| fault(&e))?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: state.pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, req: ShutdownRequest) -> Reply<Empty> {
        let running = match &*self.sandbox.lock().await {
            Some(sandbox) => sandbox
                .state(&req.id, "")
                .is_ok_and(|s| !matches!(s.state, ProcessState::Stopped(_))),
            None => false,
        };
        if !running || req.now {
            self.owner.end(None);
        }
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Reply<Empty> {
        Err(unsupported("checkpoint"))
    }
}

/// `WALNUT_DRIVER`, which `walnut run --driver` sets, else the best one.
fn driver() -> Reply<walnut_sandbox::machine::DriverChoice> {
    match std::env::var("WALNUT_DRIVER") {
        Ok(name) => name
            .parse()
            .map_err(|e: walnut_sandbox::machine::Error| fault(&e.into())),
        Err(_) => Ok(Default::default()),
    }
}

fn stdio(terminal: bool, stdin: String, stdout: String, stderr: String) -> StdioTargets {
    let some = |path: String| (!path.is_empty()).then(|| path.into());
    StdioTargets {
        terminal,
        stdin: some(stdin),
        stdout: some(stdout),
        stderr: some(stderr),
    }
}

fn path(path: Option<std::path::PathBuf>) -> String {
    path.map(|p| p.display().to_string()).unwrap_or_default()
}

fn timestamp(exit: &ExitInfo) -> MessageField<Timestamp> {
    MessageField::some(Timestamp {
        seconds: exit.at.div_euclid(1_000_000_000),
        nanos: i32::try_from(exit.at.rem_euclid(1_000_000_000)).unwrap_or(0),
        ..Default::default()
    })
}

fn unsupported(what: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(
        Code::UNIMPLEMENTED,
        format!("{what} is not supported yet"),
    ))
}

/// An error with the code containerd's clients expect.
fn fault(error: &Error) -> ttrpc::Error {
    let code = match error {
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::WrongState(_) => Code::FAILED_PRECONDITION,
        Error::Invalid(_) | Error::Storage(_) => Code::INVALID_ARGUMENT,
        // As runc's shim, so that clients see the program's name in the text.
        Error::ProgramNotFound(_) => Code::OUT_OF_RANGE,
        Error::ProgramDenied(_) => Code::PERMISSION_DENIED,
        Error::Machine(_) => Code::ABORTED,
        _ => Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(get_status(code, error.to_string()))
}
