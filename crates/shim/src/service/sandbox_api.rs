//! containerd's Sandbox API (`containerd.runtime.sandbox.v1.Sandbox`): pods that are made
//! for themselves, without a container that stands for them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    protobuf::{MessageField, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::Sandbox as SandboxApi,
    types::platform::Platform,
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use ttrpc::r#async::TtrpcContext;
use walnut_sandbox::{Error, PodRequest, Sandbox, Settings, machine::takeover::NoState, now_ns};

use super::{Reply, TaskService, fault};
use crate::{
    containerd::{pod_request, timestamp},
    metrics, settings,
};

/// States, by the names that CRI has for them.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// How long the supervisor stays when it has said that it goes: containerd takes a
/// connection that ends right behind an answer for a call that failed.
const LAST_WORD: Duration = Duration::from_millis(250);
/// What a sandbox is said to have ended with that nobody stopped: killed.
const EXIT_KILLED: u32 = 128 + 9;

/// The Sandbox service.
#[derive(Debug)]
pub(crate) struct SandboxService {
    tasks: Arc<TaskService>,
    /// The runtime's options, as whoever started this got them from containerd.
    options: Option<Any>,
    pod: Mutex<Option<Pod>>,
    /// Its end, once it has ended.
    end: watch::Sender<Option<End>>,
}

/// A pod that was asked for.
#[derive(Debug)]
struct Pod {
    id: String,
    /// Taken when it is started.
    request: Option<(PodRequest, Settings)>,
    started: Option<(Arc<Sandbox>, i64)>,
    /// Somebody wants it to end.
    stopping: bool,
}

#[derive(Debug, Clone, Copy)]
struct End {
    code: u32,
    /// Nanoseconds since the epoch.
    at: i64,
}

impl SandboxService {
    pub(crate) fn new(tasks: Arc<TaskService>, options: Option<Any>) -> Self {
        Self {
            tasks,
            options,
            pod: Mutex::default(),
            end: watch::Sender::new(None),
        }
    }

    fn slot(&self) -> MutexGuard<'_, Option<Pod>> {
        self.pod.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Acts on the pod `id`.
    fn with<T>(&self, id: &str, act: impl FnOnce(&mut Pod) -> T) -> Reply<T> {
        match &mut *self.slot() {
            Some(pod) if pod.id == id => Ok(act(pod)),
            _ => Err(fault(&Error::NotFound(format!("there is no sandbox {id}")))),
        }
    }

    /// The machine of the pod `id`, and when it was started.
    fn machine(&self, id: &str) -> Reply<(Arc<Sandbox>, i64)> {
        let started = self.with(id, |pod| pod.started.clone())?;
        started.ok_or_else(|| {
            let not_yet = format!("sandbox {id} has not been started");
            fault(&Error::WrongState(not_yet))
        })
    }

    fn ended(&self) -> Option<End> {
        *self.end.borrow()
    }

    /// Notes when the machine ends, and how.
    fn follow(self: &Arc<Self>, sandbox: Arc<Sandbox>) {
        let service = self.clone();
        tokio::spawn(async move {
            let exit = sandbox.ended().await;
            let stopped = service.slot().as_ref().is_some_and(|pod| pod.stopping);
            if !stopped {
                tracing::warn!("the machine has ended: {exit:?}");
            }
            let code = if stopped { 0 } else { EXIT_KILLED };
            let at = now_ns();
            service.end.send_replace(Some(End { code, at }));
        });
    }

    /// Ends the machine of the pod, in order within `limit`.
    async fn stop(&self, id: &str, limit: Option<Duration>) -> Reply<()> {
        let started = self.with(id, |pod| {
            pod.stopping = true;
            pod.request = None;
            pod.started.clone()
        })?;
        let Some((sandbox, _)) = started else {
            let never = End {
                code: 0,
                at: now_ns(),
            };
            self.end
                .send_if_modified(|end| end.replace(never).is_none());
            return Ok(());
        };
        if self.ended().is_none() {
            match limit {
                None => sandbox.shutdown().await,
                Some(limit) => {
                    if timeout(limit, sandbox.shutdown()).await.is_err() {
                        sandbox.kill_machine().await;
                    }
                }
            }
            // The sender lives as long as `self`.
            let _ = self.end.subscribe().wait_for(Option::is_some).await;
        }
        Ok(())
    }
}

/// A pod in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SandboxPod {
    id: String,
    /// Nanoseconds since the epoch.
    started: i64,
}

impl SandboxService {
    /// For the next program; none where containerd has not asked for a sandbox by itself.
    pub(crate) fn state(&self) -> Result<Option<SandboxPod>, NoState> {
        if self.ended().is_some() {
            return Err(NoState::never("its machine has ended"));
        }
        let slot = self.slot();
        let Some(pod) = &*slot else { return Ok(None) };
        if pod.stopping {
            return Err(NoState::never("it is being ended"));
        }
        let Some((_, started)) = pod.started else {
            return Err(NoState::busy("its machine is being made"));
        };
        Ok(Some(SandboxPod {
            id: pod.id.clone(),
            started,
        }))
    }

    /// Goes on with the pod of the program before.
    pub(crate) fn take_over(self: &Arc<Self>, state: SandboxPod, sandbox: &Arc<Sandbox>) {
        self.tasks.announced();
        *self.slot() = Some(Pod {
            id: state.id,
            request: None,
            started: Some((sandbox.clone(), state.started)),
            stopping: false,
        });
        self.follow(sandbox.clone());
    }
}

/// The service that containerd calls: shared, since ends are waited for.
#[derive(Debug, Clone)]
pub(crate) struct Shared(pub(crate) Arc<SandboxService>);

#[async_trait]
impl SandboxApi for Shared {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: CreateSandboxRequest,
    ) -> Reply<CreateSandboxResponse> {
        if !req.rootfs.is_empty() {
            let refused = format!(
                "create sandbox {}: it has a root file system, and its machine brings its own",
                req.sandbox_id
            );
            return Err(fault(&Error::Invalid(refused)));
        }
        let request = pod_request(req.options.as_ref(), &req.netns_path).map_err(|e| fault(&e))?;
        let settings = settings::of(self.0.options.as_ref()).map_err(|e| fault(&e))?;
        self.0.tasks.announce_pod().await?;
        *self.0.slot() = Some(Pod {
            id: req.sandbox_id,
            request: Some((request, settings)),
            started: None,
            stopping: false,
        });
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        req: StartSandboxRequest,
    ) -> Reply<StartSandboxResponse> {
        let id = &*req.sandbox_id;
        let asked = self.0.with(id, |pod| pod.request.take())?;
        let Some((request, settings)) = asked else {
            let twice = format!("start sandbox {id}: it was started, or stopped, before");
            return Err(fault(&Error::WrongState(twice)));
        };
        let sandbox = self.0.tasks.start_pod(id, settings, &request).await?;
        let created = now_ns();
        self.0.follow(sandbox.clone());
        let stopping = self.0.with(id, |pod| {
            pod.started = Some((sandbox.clone(), created));
            pod.stopping
        })?;
        if stopping {
            // Meanwhile.
            sandbox.kill_machine().await;
        }
        Ok(StartSandboxResponse {
            pid: self.0.tasks.pod_pid(),
            created_at: MessageField::some(timestamp(created)),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Reply<PlatformResponse> {
        // By their names in OCI images.
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Ok(PlatformResponse {
            platform: MessageField::some(Platform {
                os: "linux".into(),
                architecture: architecture.into(),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        req: StopSandboxRequest,
    ) -> Reply<StopSandboxResponse> {
        let limit = Duration::from_secs(req.timeout_secs.into());
        let limit = Some(limit).filter(|limit| !limit.is_zero());
        self.0.stop(&req.sandbox_id, limit).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        req: WaitSandboxRequest,
    ) -> Reply<WaitSandboxResponse> {
        self.0.with(&req.sandbox_id, |_| ())?;
        let mut end = self.0.end.subscribe();
        let end = end.wait_for(Option::is_some).await;
        let End { code, at } = end.ok().and_then(|end| *end).unwrap_or(End {
            code: EXIT_KILLED,
            at: now_ns(),
        });
        Ok(WaitSandboxResponse {
            exit_status: code,
            exited_at: MessageField::some(timestamp(at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: SandboxStatusRequest,
    ) -> Reply<SandboxStatusResponse> {
        let id = req.sandbox_id;
        let started = self.0.with(&id, |pod| pod.started.clone())?;
        let end = self.0.ended();
        let state = match (&started, end) {
            (Some(_), None) => READY,
            _ => NOT_READY,
        };
        let mut info = HashMap::new();
        if let (true, Some((sandbox, _))) = (req.verbose, &started) {
            let (memory, vcpus) = sandbox.size();
            info.insert("driver".into(), sandbox.driver().into());
            info.insert("memory".into(), memory.to_string());
            info.insert("vcpus".into(), vcpus.to_string());
        }
        Ok(SandboxStatusResponse {
            sandbox_id: id,
            pid: self.0.tasks.pod_pid(),
            state: state.into(),
            info,
            created_at: started.map(|(_, at)| timestamp(at)).into(),
            exited_at: end.map(|end| timestamp(end.at)).into(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, req: PingRequest) -> Reply<PingResponse> {
        self.0.machine(&req.sandbox_id)?;
        match self.0.ended() {
            None => Ok(PingResponse::default()),
            Some(_) => {
                let over = format!("sandbox {} has ended", req.sandbox_id);
                Err(fault(&Error::WrongState(over)))
            }
        }
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        req: ShutdownSandboxRequest,
    ) -> Reply<ShutdownSandboxResponse> {
        // One that could not be made ends as well.
        let _ = self.0.stop(&req.sandbox_id, None).await;
        let tasks = self.0.tasks.clone();
        let doing = tasks.busy.with("it is being ended");
        tokio::spawn(async move {
            sleep(LAST_WORD).await;
            tasks.end_pod().await;
            drop(doing);
        });
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        req: SandboxMetricsRequest,
    ) -> Reply<SandboxMetricsResponse> {
        self.0.machine(&req.sandbox_id)?;
        let (sum, guest) = self.0.tasks.pod_stats().await?;
        let value = metrics::encode(&sum, &guest)
            .map_err(|e| fault(&Error::Invalid(format!("encode the figures: {e}"))))?;
        let mut reply = SandboxMetricsResponse::default();
        let metric = reply.metrics.mut_or_insert_default();
        metric.id = req.sandbox_id;
        metric.timestamp = MessageField::some(timestamp(now_ns()));
        metric.data = MessageField::some(Any {
            type_url: metrics::KIND.into(),
            value,
            ..Default::default()
        });
        Ok(reply)
    }
}
