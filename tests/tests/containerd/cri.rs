//! Pods, as Kubernetes' kubelet asks for them.

use std::collections::HashMap;

use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatsRequest,
    ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest, ExecSyncResponse, ImageSpec,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListContainerStatsRequest, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxState,
    PodSandboxStatusRequest, PortMapping, RemoveContainerRequest, RemovePodSandboxRequest,
    ReopenContainerLogRequest, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest,
    StopPodSandboxRequest, runtime_service_client::RuntimeServiceClient,
};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use walnut_tests::{unique, until};

use crate::{
    bootstrap::assert_spoken,
    daemon::{Daemon, KUBERNETES_IMAGE},
    programs::Format,
};

/// A kubelet's connection.
pub(crate) struct Kubelet {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

/// Calls a method to its answer.
macro_rules! call {
    ($kubelet:expr, $method:ident, $request:expr) => {{
        let reply = $kubelet.runtime.block_on($kubelet.client.$method($request));
        reply.map(tonic::Response::into_inner)
    }};
}

/// A pod, and what its containers are made with.
pub(crate) struct Pod {
    pub(crate) id: String,
    config: PodSandboxConfig,
}

impl Kubelet {
    pub(crate) fn new(daemon: &Daemon) -> Self {
        let runtime = Runtime::new().unwrap();
        let address = format!("unix://{}", daemon.socket().display());
        let channel = runtime
            .block_on(Endpoint::try_from(address).unwrap().connect())
            .unwrap();
        Self {
            runtime,
            client: RuntimeServiceClient::new(channel),
        }
    }

    /// A pod of the node's network.
    fn run_pod(&mut self, daemon: &Daemon) -> Pod {
        self.run_pod_on(daemon, NamespaceMode::Node, vec![])
    }

    /// A pod with a network of its own, some of whose ports are the node's as well.
    pub(crate) fn run_networked_pod(&mut self, daemon: &Daemon, ports: Vec<PortMapping>) -> Pod {
        self.run_pod_on(daemon, NamespaceMode::Pod, ports)
    }

    fn run_pod_on(
        &mut self,
        daemon: &Daemon,
        network: NamespaceMode,
        port_mappings: Vec<PortMapping>,
    ) -> Pod {
        let ports = |config: &mut PodSandboxConfig| {
            config.port_mappings = port_mappings;
            // One of the node's network has the node's name.
            if network == NamespaceMode::Node {
                config.hostname.clear();
            }
        };
        self.run_pod_with(daemon, network, ports).unwrap()
    }

    /// A pod that somebody has wishes for.
    pub(crate) fn run_pod_with(
        &mut self,
        daemon: &Daemon,
        network: NamespaceMode,
        wish: impl FnOnce(&mut PodSandboxConfig),
    ) -> Result<Pod, tonic::Status> {
        let name = unique("pod");
        let options = NamespaceOption {
            network: network.into(),
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        };
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.clone(),
                uid: name.clone(),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name,
            log_directory: daemon.scratch().join("logs").display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        wish(&mut config);
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: "walnut".into(),
        };
        let id = call!(self, run_pod_sandbox, request)?.pod_sandbox_id;
        daemon.note(&id);
        Ok(Pod { id, config })
    }

    /// The pod's addresses, as Kubernetes knows them.
    pub(crate) fn addresses(&mut self, pod: &Pod) -> Vec<String> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        let status = call!(self, pod_sandbox_status, request).unwrap().status;
        let network = status.unwrap().network.unwrap();
        let more = network.additional_ips.into_iter().map(|ip| ip.ip);
        std::iter::once(network.ip).chain(more).collect()
    }

    /// The pod's network namespace on the host.
    pub(crate) fn namespace(&mut self, pod: &Pod) -> String {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        };
        let info = call!(self, pod_sandbox_status, request).unwrap().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
        let all = info["runtimeSpec"]["linux"]["namespaces"]
            .as_array()
            .unwrap();
        let network = all.iter().find(|one| one["type"] == "network").unwrap();
        network["path"].as_str().unwrap().to_owned()
    }

    /// Creates and starts a container that runs `script`.
    pub(crate) fn run(&mut self, pod: &Pod, name: &str, script: &str) -> String {
        self.run_with(pod, name, script, |_| ()).unwrap()
    }

    /// The same of a container that somebody has wishes for.
    pub(crate) fn run_with(
        &mut self,
        pod: &Pod,
        name: &str,
        script: &str,
        wish: impl FnOnce(&mut ContainerConfig),
    ) -> Result<String, tonic::Status> {
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: KUBERNETES_IMAGE.into(),
                annotations: HashMap::default(),
                ..Default::default()
            }),
            command: ["sh", "-c", script].map(Into::into).into(),
            log_path: format!("{name}.log"),
            ..Default::default()
        };
        wish(&mut config);
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let container_id = call!(self, create_container, request)?.container_id;
        let request = StartContainerRequest {
            container_id: container_id.clone(),
        };
        call!(self, start_container, request)?;
        Ok(container_id)
    }

    pub(crate) fn exec(&mut self, id: &str, script: &str) -> ExecSyncResponse {
        self.exec_within(id, script, 0).unwrap()
    }

    /// With a number of seconds that it may take; 0 is any.
    pub(crate) fn exec_within(
        &mut self,
        id: &str,
        script: &str,
        timeout: i64,
    ) -> Result<ExecSyncResponse, tonic::Status> {
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: ["sh", "-c", script].map(Into::into).into(),
            timeout,
        };
        call!(self, exec_sync, request)
    }

    /// State and exit code of a container.
    pub(crate) fn status(&mut self, id: &str) -> (ContainerState, i32, String) {
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

    pub(crate) fn reopen_log(&mut self, id: &str) {
        let request = ReopenContainerLogRequest {
            container_id: id.into(),
        };
        call!(self, reopen_container_log, request).unwrap();
    }

    fn stop(&mut self, id: &str) {
        let request = StopContainerRequest {
            container_id: id.into(),
            timeout: 60,
        };
        call!(self, stop_container, request).unwrap();
    }

    pub(crate) fn remove(&mut self, id: &str) {
        let request = RemoveContainerRequest {
            container_id: id.into(),
        };
        call!(self, remove_container, request).unwrap();
    }

    pub(crate) fn end_pod(&mut self, pod: &Pod) {
        let pod_sandbox_id = pod.id.clone();
        let request = StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        call!(self, stop_pod_sandbox, request).unwrap();
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        call!(self, remove_pod_sandbox, request).unwrap();
    }
}

const SERVE: &str = "trap 'exit 5' TERM; echo started; echo trouble >&2; sleep 1000 & wait";

#[test]
fn a_pod_lives_as_kubernetes_wants_it() {
    let daemon = Daemon::start_for_kubernetes();
    let mut kubelet = Kubelet::new(&daemon);
    let pod = kubelet.run_pod(&daemon);
    let version = Format::of_daemon().task_api_of_pods();
    assert_spoken(&daemon, &daemon.kubernetes_bundle(&pod.id), version);
    let first = kubelet.run(&pod, "first", SERVE);
    let done = kubelet.exec(&first, "hostname; echo oops >&2; exit 3");
    // The pod has the node's network, and so its name.
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(String::from_utf8_lossy(&done.stdout), hostname);
    assert_eq!(done.stderr, b"oops\n");
    assert_eq!(done.exit_code, 3);

    let second = kubelet.run(&pod, "second", SERVE);
    let done = kubelet.exec(&second, "cat /proc/sys/kernel/random/boot_id");
    let other = kubelet.exec(&first, "cat /proc/sys/kernel/random/boot_id");
    assert_eq!(done.stdout, other.stdout);

    let request = ContainerStatsRequest {
        container_id: first.clone(),
    };
    let stats = call!(kubelet, container_stats, request)
        .unwrap()
        .stats
        .unwrap();
    let memory = stats.memory.unwrap();
    assert!(memory.working_set_bytes.unwrap().value > 0);
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    let request = ListContainerStatsRequest { filter: None };
    let all = call!(kubelet, list_container_stats, request).unwrap().stats;
    assert_eq!(all.len(), 2);

    kubelet.stop(&first);
    assert_eq!(kubelet.status(&first).0, ContainerState::ContainerExited);
    assert_eq!(kubelet.status(&first).1, 5);
    assert_eq!(kubelet.status(&second).0, ContainerState::ContainerRunning);
    let log = daemon.scratch().join("logs/first.log");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains(" stdout F started\n"), "{log}");
    assert!(log.contains(" stderr F trouble\n"), "{log}");
    kubelet.remove(&first);

    // The sandbox outlives its last container.
    kubelet.stop(&second);
    kubelet.remove(&second);
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: false,
    };
    let status = call!(kubelet, pod_sandbox_status, request)
        .unwrap()
        .status
        .unwrap();
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    let third = kubelet.run(&pod, "third", "exit 4");
    until("it has ended", || {
        kubelet.status(&third).0 == ContainerState::ContainerExited
    });
    assert_eq!(kubelet.status(&third).1, 4);
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}

#[test]
fn a_pod_outlives_containerd() {
    let mut daemon = Daemon::start_for_kubernetes();
    let mut kubelet = Kubelet::new(&daemon);
    let pod = kubelet.run_pod(&daemon);
    let container = kubelet.run(&pod, "one", SERVE);
    daemon.restart(|| {});
    let mut kubelet = Kubelet::new(&daemon);
    assert_eq!(kubelet.exec(&container, "exit 6").exit_code, 6);
    kubelet.stop(&container);
    assert_eq!(kubelet.status(&container).1, 5);
    kubelet.end_pod(&pod);
}
