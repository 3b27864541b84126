//! Several containers in one sandbox.

use walnut_tests::{driver, unique, until};

use crate::daemon::Daemon;

/// Runs a container of the pod `pod`.
pub(crate) fn member(daemon: &Daemon, pod: &str, id: &str, kind: &str, program: &[&str]) {
    let kind = format!("io.kubernetes.cri.container-type={kind}");
    let group = format!("io.kubernetes.cri.sandbox-id={pod}");
    let options = ["-d", "--annotation", &kind, "--annotation", &group];
    daemon.run(&options, id, program).exits(0);
}

#[test]
fn containers_of_a_pod_share_a_machine_and_come_and_go() {
    let daemon = Daemon::start();
    let (pod, a, b) = (unique("pod"), unique("a"), unique("b"));
    let sleep = ["sleep", "1000"];
    member(&daemon, &pod, &pod, "sandbox", &sleep);
    member(&daemon, &pod, &a, "container", &sleep);
    member(&daemon, &pod, &b, "container", &sleep);
    let pids: Vec<_> = [&pod, &a, &b].map(|id| daemon.task(id).unwrap().0).into();
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
    let boot = |id: &str| {
        let read = ["cat", "/proc/sys/kernel/random/boot_id"];
        daemon.exec(id, &read).exits(0).stdout
    };
    assert_eq!(boot(&a), boot(&b));
    daemon.exec(&a, &["touch", "/only-in-a"]).exits(0);
    assert!(daemon.exec(&b, &["test", "-e", "/only-in-a"]).code != 0);
    // Containers go, and others come; the sandbox stays.
    daemon.remove(&a);
    assert_eq!(daemon.task(&b).unwrap().1, "RUNNING");
    daemon.remove(&b);
    let before = daemon.task(&pod).unwrap();
    let c = unique("c");
    member(&daemon, &pod, &c, "container", &sleep);
    assert_eq!(daemon.task(&c).unwrap().0, before.0);
    daemon.exec(&c, &["true"]).exits(0);
    // The sandbox container goes first: the sandbox does not.
    daemon.remove(&pod);
    daemon.exec(&c, &["true"]).exits(0);
    daemon.remove(&c);
    daemon.assert_nothing_left();
}

/// Where machines can grow: on walnut-vmm.
#[test]
fn a_container_that_comes_later_has_room_and_leaves_it_when_it_goes() {
    let daemon = Daemon::start();
    let (pod, member) = (unique("pod"), unique("m"));
    let sleep = ["sleep", "100000"];
    let said = |name: &str, value: &str| format!("io.kubernetes.cri.{name}={value}");
    let (sandbox, own) = (said("container-type", "sandbox"), said("sandbox-id", &pod));
    let memory = said("sandbox-memory", &(96 << 20).to_string());
    let options = ["-d", "--annotation", &sandbox, "--annotation", &own];
    let options = [&options[..], &["--annotation", &memory]].concat();
    daemon.run(&options, &pod, &sleep).exits(0);
    let total = || {
        let script = "nproc; awk '/^MemTotal:/{print $2}' /proc/meminfo";
        let said = daemon.exec(&pod, &["sh", "-c", script]).exits(0).stdout;
        let numbers: Vec<u64> = said.lines().map(|line| line.parse().unwrap()).collect();
        (numbers[0], numbers[1] >> 10)
    };
    let (vcpus, small) = total();
    assert_eq!(vcpus, 1);
    assert!((150..200).contains(&small), "{small} MiB");

    let kind = said("container-type", "container");
    let limit = (400 << 20).to_string();
    let options = ["-d", "--annotation", &kind, "--annotation", &own];
    let limits = ["--memory-limit", &limit, "--cpus", "2"];
    let options = [&options[..], &limits].concat();
    daemon.run(&options, &member, &sleep).exits(0);
    let (vcpus, large) = total();
    if driver() == "vmm" {
        assert_eq!(vcpus, 2);
        assert!((450..510).contains(&large), "{large} MiB");
        let use_it = "print(len(bytearray(b'x') * (350 << 20)) >> 20)";
        let used = daemon.exec(&member, &["python3", "-c", use_it]).exits(0);
        assert_eq!(used.stdout, "350\n");
    } else {
        println!("machines of {} keep their size", driver());
        assert_eq!((vcpus, large), (1, small));
    }
    daemon.remove(&member);
    until("the machine is as small as it was", || {
        let (vcpus, now) = total();
        // On some piece something may lie that cannot move.
        vcpus == 1 && now < small + 32
    });
    // It comes again.
    daemon.run(&options, &member, &sleep).exits(0);
    let (_, again) = total();
    assert!(again + 8 > large, "{again} MiB, {large} before");
    daemon.remove(&member);
    daemon.remove(&pod);
    daemon.assert_nothing_left();
}

#[test]
fn pods_do_not_share_a_machine() {
    let daemon = Daemon::start();
    let ids = [unique("a"), unique("b"), unique("c")];
    let machines: Vec<i32> = std::thread::scope(|scope| {
        let mut starts = Vec::new();
        for id in &ids {
            let daemon = &daemon;
            starts.push(scope.spawn(move || {
                daemon.detached(id, &["sleep", "1000"]);
                daemon.task(id).unwrap().0
            }));
        }
        starts.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(
        machines[0] != machines[1] && machines[1] != machines[2],
        "{machines:?}"
    );
    for id in &ids {
        daemon.remove(id);
    }
}

#[test]
fn namespaces_may_have_containers_of_the_same_name() {
    let daemon = Daemon::start();
    let id = unique("c");
    let image = ["image", "import", "--base-name", "demo"];
    let file = crate::daemon::image();
    let other = |args: &[&str]| daemon.ctr(&[&["--namespace", "other"], args].concat());
    other(&[&image[..], &[file.to_str().unwrap()]].concat()).exits(0);
    daemon.detached(&id, &["sleep", "1000"]);
    other(&daemon.run_args(&["-d"], &id, &["sleep", "1000"])).exits(0);
    other(&["task", "kill", "--signal", "KILL", &id]).exits(0);
    until("it has ended", || {
        other(&["task", "ls"]).stdout.contains("STOPPED")
    });
    other(&["task", "delete", &id]);
    other(&["container", "rm", &id]).exits(0);
    daemon.exec(&id, &["true"]).exits(0);
    daemon.remove(&id);
}
