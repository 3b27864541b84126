//! Pods, as Kubernetes' kubelet asks for them.

use std::{
    collections::BTreeSet,
    sync::{Mutex, OnceLock},
};

use k8s_cri::v1::{
    ContainerState, ContainerStatsRequest, ListContainerStatsRequest, PodSandboxState,
};
use walnut_tests::until;

use crate::{
    bootstrap::assert_spoken,
    daemon::Daemon,
    kubelet::{Kubelet, call},
    programs::Format,
};

pub(crate) const SERVE: &str =
    "trap 'exit 5' TERM; echo started; echo trouble >&2; sleep 1000 & wait";

#[test]
fn a_pod_lives_as_kubernetes_wants_it() {
    let daemon = Daemon::start_for_kubernetes();
    let kubelet = Kubelet::new(&daemon);
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

    kubelet.stop(&first).unwrap();
    assert_eq!(kubelet.status(&first).0, ContainerState::ContainerExited);
    assert_eq!(kubelet.status(&first).1, 5);
    assert_eq!(kubelet.status(&second).0, ContainerState::ContainerRunning);
    let log = daemon.scratch().join("logs/first.log");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains(" stdout F started\n"), "{log}");
    assert!(log.contains(" stderr F trouble\n"), "{log}");
    kubelet.remove(&first).unwrap();

    // The sandbox outlives its last container.
    kubelet.stop(&second).unwrap();
    kubelet.remove(&second).unwrap();
    assert_eq!(kubelet.pod(&pod).0, PodSandboxState::SandboxReady);
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
    let daemon = Daemon::start_for_kubernetes();
    let kubelet = Kubelet::new(&daemon);
    let pod = kubelet.run_pod(&daemon);
    let container = kubelet.run(&pod, "one", SERVE);
    daemon.restart(|| {});
    kubelet.until_it_answers();
    assert_eq!(kubelet.exec(&container, "exit 6").exit_code, 6);
    kubelet.stop(&container).unwrap();
    assert_eq!(kubelet.status(&container).1, 5);
    kubelet.end_pod(&pod);
}

/// So many pods are started, used and ended at a time: `WALNUT_PODS`, 20 if it is not set.
#[test]
#[ignore = "make pods: takes a gigabyte and a while"]
fn many_pods_at_once() {
    let count: usize = std::env::var("WALNUT_PODS").map_or(20, |text| text.parse().unwrap());
    let daemon = Daemon::start_for_kubernetes();
    let kubelet = Kubelet::new(&daemon);
    let at_once = |work: &(dyn Fn(usize) + Sync)| {
        std::thread::scope(|scope| {
            for n in 0..count {
                scope.spawn(move || work(n));
            }
        });
    };
    let begun = std::time::Instant::now();
    let pods: Vec<_> = (0..count).map(|_| OnceLock::new()).collect();
    at_once(&|n| {
        let pod = kubelet.run_pod(&daemon);
        let container = kubelet.run(&pod, "only", SERVE);
        assert!(pods[n].set((pod, container)).is_ok());
    });
    println!("{count} pods run after {:.1?}", begun.elapsed());
    let boots = Mutex::new(BTreeSet::new());
    at_once(&|n| {
        let (_, container) = pods[n].get().unwrap();
        let done = kubelet.exec(container, "cat /proc/sys/kernel/random/boot_id");
        assert_eq!(done.exit_code, 0, "{done:?}");
        boots.lock().unwrap().insert(done.stdout);
    });
    assert_eq!(boots.lock().unwrap().len(), count, "machines are shared");
    at_once(&|n| kubelet.end_pod(&pods[n].get().unwrap().0));
    daemon.assert_nothing_left();
    println!("and are gone after {:.1?}", begun.elapsed());
}
