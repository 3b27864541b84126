//! Kubernetes' side of its interface to containerd (CRI), as its kubelet speaks it.

use std::{collections::HashMap, path::Path, time::Duration};

use k8s_cri::v1::{
    Container, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatusRequest,
    CreateContainerRequest, ExecSyncRequest, ExecSyncResponse, ImageSpec, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, ListContainersRequest, ListPodSandboxRequest, NamespaceMode,
    NamespaceOption, PodSandbox, PodSandboxConfig, PodSandboxMetadata, PodSandboxState,
    PodSandboxStatusRequest, PodSandboxStatusResponse, PortMapping, RemoveContainerRequest,
    RemovePodSandboxRequest, ReopenContainerLogRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    runtime_service_client::RuntimeServiceClient,
};
use tokio::runtime::Runtime;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};
use walnut_tests::{unique, until};

use crate::daemon::{Daemon, KUBERNETES_IMAGE};

/// Longest a call may take: kubelet's own bound.
const CALL: Duration = Duration::from_secs(120);

/// A kubelet's connection; it outlives containerd, as kubelet's does.
pub(crate) struct Kubelet {
    pub(crate) runtime: Runtime,
    pub(crate) client: RuntimeServiceClient<Channel>,
    /// Name of the runtime that it asks for.
    handler: &'static str,
}

/// Calls a method to its answer.
macro_rules! call {
    ($kubelet:expr, $method:ident, $request:expr) => {{
        let mut client = $kubelet.client.clone();
        let reply = $kubelet.runtime.block_on(client.$method($request));
        reply.map(tonic::Response::into_inner)
    }};
}
pub(crate) use call;

/// A pod, and what its containers are made with.
pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) config: PodSandboxConfig,
}

/// A pod of this name and of the node's network, whose logs are in `logs`.
pub(crate) fn pod_config(name: &str, logs: &Path) -> PodSandboxConfig {
    let options = NamespaceOption {
        network: NamespaceMode::Node.into(),
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: name.into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        log_directory: logs.display().to_string(),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The namespaces that a pod is to have.
pub(crate) fn namespaces(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    let context = &mut config.linux.as_mut().unwrap().security_context;
    let options = &mut context.as_mut().unwrap().namespace_options;
    options.as_mut().unwrap()
}

/// A container that runs `script`.
pub(crate) fn container_config(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: KUBERNETES_IMAGE.into(),
            ..Default::default()
        }),
        command: ["sh", "-c", script].map(Into::into).into(),
        log_path: format!("{name}.log"),
        ..Default::default()
    }
}

impl Kubelet {
    /// Connects, and waits until containerd's interface has started.
    pub(crate) fn new(daemon: &Daemon) -> Self {
        Self::with(daemon, "walnut")
    }

    /// One that asks for another runtime than the usual.
    pub(crate) fn with(daemon: &Daemon, handler: &'static str) -> Self {
        let runtime = Runtime::new().unwrap();
        let address = format!("unix://{}", daemon.socket().display());
        let endpoint = Endpoint::try_from(address).unwrap().timeout(CALL);
        let channel = runtime.block_on(endpoint.connect()).unwrap();
        let kubelet = Self {
            runtime,
            client: RuntimeServiceClient::new(channel),
            handler,
        };
        kubelet.until_it_answers();
        kubelet
    }

    /// containerd's other services answer before this one does.
    pub(crate) fn until_it_answers(&self) {
        until("containerd's interface for Kubernetes answers", || {
            self.pods().is_ok()
        });
    }

    /// Runs a pod of a name of its own.
    pub(crate) fn run_pod(&self, daemon: &Daemon) -> Pod {
        self.run_pod_with(daemon, |_| {}).unwrap()
    }

    /// A pod with a network of its own, some of whose ports are the node's as well.
    pub(crate) fn run_networked_pod(&self, daemon: &Daemon, ports: Vec<PortMapping>) -> Pod {
        let pod = self.run_pod_with(daemon, |config| {
            namespaces(config).network = NamespaceMode::Pod.into();
            config.port_mappings = ports;
        });
        pod.unwrap()
    }

    /// A pod of the node's network, unless `more` says something else of it.
    pub(crate) fn run_pod_with(
        &self,
        daemon: &Daemon,
        more: impl FnOnce(&mut PodSandboxConfig),
    ) -> Result<Pod, Status> {
        let mut config = pod_config(&unique("pod"), &daemon.scratch().join("logs"));
        more(&mut config);
        // One of the node's network has the node's name.
        let network = namespaces(&mut config).network();
        if network == NamespaceMode::Pod && config.hostname.is_empty() {
            config.hostname = config.metadata.as_ref().unwrap().name.clone();
        }
        let id = self.try_run_pod(&config)?;
        daemon.note(&id);
        Ok(Pod { id, config })
    }

    /// The pod's state, and what there is to say of it besides.
    pub(crate) fn pod(&self, pod: &Pod) -> (PodSandboxState, HashMap<String, String>) {
        self.try_pod(pod).unwrap()
    }

    /// The same where containerd may have lost the shim a moment ago.
    pub(crate) fn try_pod(
        &self,
        pod: &Pod,
    ) -> Result<(PodSandboxState, HashMap<String, String>), Status> {
        let reply = self.pod_status(pod)?;
        Ok((reply.status.unwrap().state(), reply.info))
    }

    fn pod_status(&self, pod: &Pod) -> Result<PodSandboxStatusResponse, Status> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        };
        call!(self, pod_sandbox_status, request)
    }

    /// The pod's addresses, as Kubernetes knows them.
    pub(crate) fn addresses(&self, pod: &Pod) -> Vec<String> {
        let status = self.pod_status(pod).unwrap().status;
        let network = status.unwrap().network.unwrap();
        let more = network.additional_ips.into_iter().map(|ip| ip.ip);
        std::iter::once(network.ip).chain(more).collect()
    }

    /// The pod's network namespace on the host.
    pub(crate) fn namespace(&self, pod: &Pod) -> String {
        let info = self.pod_status(pod).unwrap().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        let all = info["runtimeSpec"]["linux"]["namespaces"]
            .as_array()
            .unwrap();
        let network = all.iter().find(|one| one["type"] == "network").unwrap();
        network["path"].as_str().unwrap().to_owned()
    }

    pub(crate) fn try_run_pod(&self, config: &PodSandboxConfig) -> Result<String, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: self.handler.into(),
        };
        Ok(call!(self, run_pod_sandbox, request)?.pod_sandbox_id)
    }

    /// Creates and starts a container that runs `script`.
    pub(crate) fn run(&self, pod: &Pod, name: &str, script: &str) -> String {
        self.run_with(pod, container_config(name, script))
    }

    /// Creates and starts a container.
    pub(crate) fn run_with(&self, pod: &Pod, config: ContainerConfig) -> String {
        let id = self.create(pod, config).unwrap();
        self.start(&id).unwrap();
        id
    }

    /// Creates and starts a container that runs `script`, and that somebody has wishes for.
    pub(crate) fn try_run(
        &self,
        pod: &Pod,
        name: &str,
        script: &str,
        wish: impl FnOnce(&mut ContainerConfig),
    ) -> Result<String, Status> {
        let mut config = container_config(name, script);
        wish(&mut config);
        let id = self.create(pod, config)?;
        self.start(&id)?;
        Ok(id)
    }

    pub(crate) fn create(&self, pod: &Pod, config: ContainerConfig) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        Ok(call!(self, create_container, request)?.container_id)
    }

    pub(crate) fn start(&self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest {
            container_id: id.into(),
        };
        call!(self, start_container, request).map(drop)
    }

    /// Runs `script` in a container.
    pub(crate) fn exec(&self, id: &str, script: &str) -> ExecSyncResponse {
        self.try_exec(id, script).unwrap()
    }

    pub(crate) fn try_exec(&self, id: &str, script: &str) -> Result<ExecSyncResponse, Status> {
        self.exec_within(id, script, 0)
    }

    /// With a number of seconds that it may take; 0 is any.
    pub(crate) fn exec_within(
        &self,
        id: &str,
        script: &str,
        timeout: i64,
    ) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: ["sh", "-c", script].map(Into::into).into(),
            timeout,
        };
        call!(self, exec_sync, request)
    }

    pub(crate) fn reopen_log(&self, id: &str) {
        let request = ReopenContainerLogRequest {
            container_id: id.into(),
        };
        call!(self, reopen_container_log, request).unwrap();
    }

    /// State and exit code of a container.
    pub(crate) fn status(&self, id: &str) -> (ContainerState, i32, String) {
        let request = ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let status = call!(self, container_status, request)
            .unwrap()
            .status
            .unwrap();
        (status.state(), status.exit_code, status.reason)
    }

    pub(crate) fn stop(&self, id: &str) -> Result<(), Status> {
        let request = StopContainerRequest {
            container_id: id.into(),
            timeout: 60,
        };
        call!(self, stop_container, request).map(drop)
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), Status> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
        };
        call!(self, remove_container, request).map(drop)
    }

    pub(crate) fn stop_pod(&self, id: &str) -> Result<(), Status> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        call!(self, stop_pod_sandbox, request).map(drop)
    }

    pub(crate) fn remove_pod(&self, id: &str) -> Result<(), Status> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        call!(self, remove_pod_sandbox, request).map(drop)
    }

    /// Stops a pod and removes it.
    pub(crate) fn end_pod(&self, pod: &Pod) {
        self.stop_pod(&pod.id).unwrap();
        self.remove_pod(&pod.id).unwrap();
    }

    /// All pods.
    pub(crate) fn pods(&self) -> Result<Vec<PodSandbox>, Status> {
        let request = ListPodSandboxRequest { filter: None };
        Ok(call!(self, list_pod_sandbox, request)?.items)
    }

    /// All containers of all pods, but for those that the pods themselves are.
    pub(crate) fn containers(&self) -> Result<Vec<Container>, Status> {
        let request = ListContainersRequest { filter: None };
        Ok(call!(self, list_containers, request)?.containers)
    }
}
