//! systemd as a container's first process.

use k8s_cri::v1::{
    ContainerState, KeyValue, LinuxContainerConfig, LinuxContainerSecurityContext, NamespaceMode,
    NamespaceOption,
};
use walnut_tests::until;

use crate::{
    daemon::Daemon,
    kubelet::{Kubelet, namespaces},
    workloads::{of_programs, page},
};

/// What a program is ended by that halts its PID namespace: systemd may, in a privileged
/// container (reboot(2), "Behavior inside PID namespaces").
const HALTED: i32 = 128 + 2;

#[test]
fn a_privileged_pod_runs_it_as_a_node_of_kubernetes_in_a_container_does() {
    let daemon = Daemon::start_with_programs();
    let kubelet = Kubelet::new(&daemon);
    let pod = kubelet.run_pod_with(&daemon, |config| {
        namespaces(config).network = NamespaceMode::Pod.into();
        let linux = config.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().privileged = true;
    });
    let pod = pod.unwrap();
    let mut config = of_programs("init", &["/sbin/init"]);
    config.envs = vec![KeyValue {
        key: "container".into(),
        value: "docker".into(),
    }];
    config.linux = Some(LinuxContainerConfig {
        security_context: Some(LinuxContainerSecurityContext {
            privileged: true,
            // It is systemd as process 1 alone.
            namespace_options: Some(NamespaceOption {
                network: NamespaceMode::Pod.into(),
                pid: NamespaceMode::Container.into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    });
    let container = kubelet.run_with(&pod, config);
    let says = |command: &str| {
        let done = kubelet.exec(&container, command);
        String::from_utf8_lossy(&done.stdout).trim().to_owned()
    };
    until("systemd has started what it is to start", || {
        assert_eq!(
            kubelet.status(&container).0,
            ContainerState::ContainerRunning
        );
        says("systemctl is-system-running") == "running"
    });
    assert_eq!(says("cat /proc/1/comm"), "systemd");
    assert_eq!(says("systemctl is-active nginx"), "active");
    let base = format!("http://{}/", kubelet.addresses(&pod)[0]);
    assert!(page(&daemon, &base).unwrap().contains("Walnut"));
    // Units have cgroups of their own, and nothing of the guest's is seen.
    let cgroup = says("cat /proc/$(systemctl show -P MainPID nginx)/cgroup");
    assert_eq!(cgroup, "0::/system.slice/nginx.service");
    let limited = "systemd-run --wait --pipe -p MemoryMax=33M \
        sh -c 'cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max'";
    assert_eq!(says(limited), (33 << 20).to_string());
    assert_eq!(
        says("systemctl restart nginx && systemctl is-active nginx"),
        "active"
    );

    // By the signal that the image names.
    kubelet.stop(&container).unwrap();
    let (state, code, reason) = kubelet.status(&container);
    assert_eq!(state, ContainerState::ContainerExited);
    assert_eq!(code, HALTED, "{reason}");
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}
