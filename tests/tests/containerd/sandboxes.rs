//! Pods that the shim makes for themselves: containerd 2's Sandbox API, without a pause
//! container.

use std::fs;

use containerd_shim_protos::{
    api::{CreateTaskRequest, ShutdownRequest},
    cgroups_v2::metrics::Metrics,
    protobuf::{Message, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
        SandboxStatusRequest, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest,
        WaitSandboxRequest,
    },
    sandbox_async::SandboxClient,
    shim_async::{Client, TaskClient},
};
use k8s_cri::v1::{
    ContainerState, DnsConfig, LinuxContainerResources, NamespaceMode, PodSandboxConfig,
    PodSandboxState,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::runtime::Runtime;
use ttrpc::context;
use walnut_tests::{machine, until};

use crate::{
    bootstrap::Bench,
    cri::SERVE,
    daemon::Daemon,
    kubelet::{Kubelet, Pod, namespaces},
    programs::{BY_SANDBOX_API, Format},
};

/// A daemon whose shims make sandboxes; none where there is no such interface.
fn start() -> Option<Daemon> {
    if Format::of_daemon() == Format::Two {
        eprintln!("not tested: containerd 1.x does not make pods by the Sandbox API");
        return None;
    }
    Some(Daemon::start_with_pod_network())
}

/// A pod with a network of its own: containerd up to 2.2 dies of others, when shims make
/// sandboxes (containerd issue 12983).
fn run_pod(kubelet: &Kubelet, daemon: &Daemon, more: impl FnOnce(&mut PodSandboxConfig)) -> Pod {
    let pod = kubelet.run_pod_with(daemon, |config| {
        namespaces(config).network = NamespaceMode::Pod.into();
        more(config);
    });
    pod.unwrap()
}

/// What a script in a container says.
fn says(kubelet: &Kubelet, container: &str, script: &str) -> String {
    let done = kubelet.exec(container, script);
    assert_eq!(done.exit_code, 0, "{script}: {done:?}");
    String::from_utf8(done.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_pod_is_a_machine_without_a_container_of_its_own() {
    let Some(daemon) = start() else { return };
    let kubelet = Kubelet::with(&daemon, BY_SANDBOX_API);
    let pod = run_pod(&kubelet, &daemon, |config| {
        config.dns_config = Some(DnsConfig {
            servers: vec!["192.0.2.53".into()],
            ..Default::default()
        });
        let linux = config.linux.as_mut().unwrap();
        let sysctl = ("net.core.somaxconn".into(), "321".into());
        linux.sysctls.insert(sysctl.0, sysctl.1);
        linux.resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 150_000,
            memory_limit_in_bytes: 256 << 20,
            ..Default::default()
        });
    });
    let (state, info) = kubelet.pod(&pod);
    assert_eq!(state, PodSandboxState::SandboxReady);
    assert_eq!(info["vcpus"], "2", "{info:?}");
    let containers = |daemon: &Daemon| {
        let list = daemon.ctr(&["--namespace", "k8s.io", "container", "ls", "-q"]);
        list.exits(0).stdout.lines().count()
    };
    assert_eq!(containers(&daemon), 0);

    let first = kubelet.run(&pod, "first", SERVE);
    let second = kubelet.run(&pod, "second", SERVE);
    assert_eq!(containers(&daemon), 2);
    let name = &pod.config.hostname;
    for container in [&first, &second] {
        assert_eq!(&says(&kubelet, container, "hostname"), name);
        assert_eq!(&says(&kubelet, container, "cat /etc/hostname"), name);
        let dns = says(&kubelet, container, "cat /etc/resolv.conf");
        assert_eq!(dns, "nameserver 192.0.2.53");
    }
    says(&kubelet, &first, "echo shared >/dev/shm/x");
    assert_eq!(says(&kubelet, &second, "cat /dev/shm/x"), "shared");
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let boots = [&first, &second].map(|id| says(&kubelet, id, boot));
    assert_eq!(boots[0], boots[1]);
    let setting = "cat /proc/sys/net/core/somaxconn";
    assert_eq!(says(&kubelet, &first, setting), "321");
    assert_eq!(says(&kubelet, &first, "nproc"), "2");

    // It is on the network that CNI's plugin made.
    let addresses = kubelet.addresses(&pod);
    let seen = says(&kubelet, &first, "cat /proc/net/fib_trie");
    assert!(seen.contains(&addresses[0]), "{addresses:?}: {seen}");
    let listen = "setsid python3 -c 'import socket; socket.create_server((\"\", 7000)).accept()' >/dev/null 2>&1 & exit 0";
    says(&kubelet, &second, listen);
    let reach = format!(
        "import socket; socket.create_connection(('{}', 7000), 5)",
        addresses[0]
    );
    until("it is reached from the node", || {
        daemon.on_the_node(&["python3", "-c", &reach]).code == 0
    });

    // Containers come and go; the pod stays.
    kubelet.stop(&first).unwrap();
    assert_eq!(kubelet.status(&first).1, 5);
    kubelet.remove(&first).unwrap();
    kubelet.stop(&second).unwrap();
    kubelet.remove(&second).unwrap();
    assert_eq!(kubelet.pod(&pod).0, PodSandboxState::SandboxReady);
    let third = kubelet.run(&pod, "third", SERVE);
    assert_eq!(says(&kubelet, &third, boot), boots[0]);
    // With a container that runs.
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
    let links = daemon.on_the_node(&["ip", "-brief", "link"]).exits(0);
    assert!(!links.stdout.contains("veth"), "{links:#?}");
}

#[test]
fn it_outlives_containerd() {
    let Some(daemon) = start() else { return };
    let mut kubelet = Kubelet::with(&daemon, BY_SANDBOX_API);
    let pod = run_pod(&kubelet, &daemon, |_| {});
    let one = kubelet.run(&pod, "one", SERVE);
    for _ in 0..2 {
        daemon.restart(|| {});
        kubelet = Kubelet::with(&daemon, BY_SANDBOX_API);
        assert_eq!(kubelet.pod(&pod).0, PodSandboxState::SandboxReady);
        assert_eq!(kubelet.exec(&one, "exit 6").exit_code, 6);
    }
    // Its last container goes, for which a containerd that was restarted calls the shim.
    kubelet.stop(&one).unwrap();
    assert_eq!(kubelet.status(&one).1, 5);
    kubelet.remove(&one).unwrap();
    assert_eq!(kubelet.pod(&pod).0, PodSandboxState::SandboxReady);
    let two = kubelet.run(&pod, "two", SERVE);
    assert_eq!(kubelet.exec(&two, "exit 7").exit_code, 7);
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}

#[test]
fn a_killed_machine_ends_it() {
    let Some(daemon) = start() else { return };
    let kubelet = Kubelet::with(&daemon, BY_SANDBOX_API);
    let pod = run_pod(&kubelet, &daemon, |_| {});
    let one = kubelet.run(&pod, "one", SERVE);
    // All PIDs are the machine's.
    let list = daemon
        .ctr(&["--namespace", "k8s.io", "task", "ls"])
        .exits(0);
    let line = list.stdout.lines().find(|line| line.starts_with(&one));
    let pid = line.unwrap().split_whitespace().nth(1).unwrap();
    kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
    until("the pod is not ready", || {
        let pod = kubelet.try_pod(&pod);
        pod.is_ok_and(|(state, _)| state == PodSandboxState::SandboxNotready)
    });
    until("its container has ended", || {
        kubelet.status(&one).0 == ContainerState::ContainerExited
    });
    assert_eq!(kubelet.status(&one).1, 137);
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}

#[test]
fn a_killed_shim_takes_it_along() {
    let Some(daemon) = start() else { return };
    let kubelet = Kubelet::with(&daemon, BY_SANDBOX_API);
    let pod = run_pod(&kubelet, &daemon, |_| {});
    let one = kubelet.run(&pod, "one", SERVE);
    daemon.kill_process("containerd-shim-walnut-v2");
    until("its container has ended", || {
        kubelet.status(&one).0 == ContainerState::ContainerExited
    });
    until("the pod is not ready", || {
        let pod = kubelet.try_pod(&pod);
        pod.is_ok_and(|(state, _)| state == PodSandboxState::SandboxNotready)
    });
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}

#[test]
fn what_needs_a_pause_container_is_refused() {
    let Some(daemon) = start() else { return };
    let kubelet = Kubelet::with(&daemon, BY_SANDBOX_API);
    let refused = kubelet.run_pod_with(&daemon, |config| {
        namespaces(config).network = NamespaceMode::Pod.into();
        namespaces(config).pid = NamespaceMode::Pod.into();
    });
    let refused = refused.err().unwrap().to_string();
    assert!(refused.contains("PID namespace"), "{refused}");
    daemon.assert_nothing_left();
    // One that the usual way makes beside it.
    let usual = Kubelet::new(&daemon);
    let pod = usual.run_pod(&daemon);
    usual.end_pod(&pod);
    daemon.assert_nothing_left();
}

/// Each call, as any containerd makes it that has the interface: 1.7 does, too.
#[test]
fn every_call_does_what_it_says() {
    let bench = Bench::new();
    let env = [("MAX_SHIM_VERSION", "2")];
    // The runtime's options: `bytes config_body = 3`.
    let settings = b"pod.vcpus = 3";
    let mut options = vec![3 << 3 | 2, u8::try_from(settings.len()).unwrap()];
    options.extend(settings);
    let options = Any {
        type_url: "runtimeoptions.v1.Options".into(),
        value: options,
        ..Default::default()
    };
    let options = options.write_to_bytes().unwrap();
    bench.shim("start", &env, &options).exits(0);
    let runtime = Runtime::new().unwrap();
    let client = runtime.block_on(Client::connect(&bench.address())).unwrap();
    let (api, tasks) = (SandboxClient::new(client.clone()), TaskClient::new(client));
    let soon = || context::with_duration(std::time::Duration::from_secs(120));
    /// Makes a request of the type that the method has.
    macro_rules! call {
        ($method:ident, $request:ident) => {
            runtime.block_on(api.$method(
                soon(),
                &$request {
                    sandbox_id: bench.id.clone(),
                    ..Default::default()
                },
            ))
        };
    }
    let early = CreateTaskRequest {
        id: "c".into(),
        bundle: bench.dir.join("bundle").display().to_string(),
        ..Default::default()
    };
    let none = call!(sandbox_status, SandboxStatusRequest).unwrap_err();
    assert!(none.to_string().contains("there is no sandbox"), "{none}");
    call!(create_sandbox, CreateSandboxRequest).unwrap();
    let again = call!(create_sandbox, CreateSandboxRequest).unwrap_err();
    assert!(again.to_string().contains("already"), "{again}");
    let status = call!(sandbox_status, SandboxStatusRequest).unwrap();
    assert_eq!((&*status.state, status.pid), ("SANDBOX_NOTREADY", 0));
    call!(ping_sandbox, PingRequest).unwrap_err();
    let refused = runtime.block_on(tasks.create(soon(), &early)).unwrap_err();
    assert!(
        refused.to_string().contains("has not been started"),
        "{refused}"
    );

    let started = call!(start_sandbox, StartSandboxRequest).unwrap();
    let name = fs::read_to_string(format!("/proc/{}/comm", started.pid)).unwrap();
    assert!(name.starts_with(machine().0), "{name}");
    call!(start_sandbox, StartSandboxRequest).unwrap_err();
    call!(ping_sandbox, PingRequest).unwrap();
    let platform = call!(platform, PlatformRequest).unwrap().platform;
    let name = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    assert_eq!((&*platform.os, &*platform.architecture), ("linux", name));
    let status = call!(sandbox_status, SandboxStatusRequest).unwrap();
    assert_eq!((&*status.state, status.pid), ("SANDBOX_READY", started.pid));
    assert_eq!(status.created_at, started.created_at);
    let verbose = SandboxStatusRequest {
        sandbox_id: bench.id.clone(),
        verbose: true,
        ..Default::default()
    };
    let status = runtime.block_on(api.sandbox_status(soon(), &verbose));
    assert_eq!(status.unwrap().info["vcpus"], "3");
    let metrics = call!(sandbox_metrics, SandboxMetricsRequest)
        .unwrap()
        .metrics;
    assert_eq!(metrics.id, bench.id);
    assert_eq!(metrics.data.type_url, "io.containerd.cgroups.v2.Metrics");
    let figures = Metrics::parse_from_bytes(&metrics.data.value).unwrap();
    assert_eq!(figures.pids.current, 0);
    // A container's deletion does not end it.
    let idle = ShutdownRequest {
        id: "c".into(),
        now: true,
        ..Default::default()
    };
    runtime.block_on(tasks.shutdown(soon(), &idle)).unwrap();
    call!(ping_sandbox, PingRequest).unwrap();

    let waiting = {
        let (api, id) = (api.clone(), bench.id.clone());
        let request = WaitSandboxRequest {
            sandbox_id: id,
            ..Default::default()
        };
        runtime.spawn(async move { api.wait_sandbox(context::with_timeout(0), &request).await })
    };
    call!(stop_sandbox, StopSandboxRequest).unwrap();
    let end = runtime.block_on(waiting).unwrap().unwrap();
    assert_eq!(end.exit_status, 0);
    let name = fs::read_to_string(format!("/proc/{}/comm", started.pid));
    assert!(name.is_err(), "{name:?}");
    let status = call!(sandbox_status, SandboxStatusRequest).unwrap();
    assert_eq!(&*status.state, "SANDBOX_NOTREADY");
    assert_eq!(status.exited_at, end.exited_at);
    call!(ping_sandbox, PingRequest).unwrap_err();
    call!(stop_sandbox, StopSandboxRequest).unwrap();
    call!(shutdown_sandbox, ShutdownSandboxRequest).unwrap();
    bench.goes();
}
