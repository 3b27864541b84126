//! A container's life, call by call.

use std::fs;

use walnut_tests::{client::disk, machine, unique};

use crate::daemon::Daemon;

#[test]
fn a_container_prints_and_exits_with_its_own_code() {
    let daemon = Daemon::start();
    let id = unique("c");
    let script = "cat /etc/debian_version >/tmp/x && uname -s && touch /srv/new && exit 7";
    let done = daemon.run(&["--rm"], &id, &["sh", "-c", script]).exits(7);
    assert_eq!(done.stdout, "Linux\n", "{done:#?}");
    daemon.assert_nothing_left();
    daemon.run(&["--rm"], &id, &["true"]).exits(0);
}

#[test]
fn a_container_is_privileged_in_its_own_kernel() {
    let daemon = Daemon::start();
    let (id, disk) = (unique("c"), disk());
    let script = "mount -t tmpfs t /mnt && cat /proc/self/cgroup && ls /dev";
    let options = ["--rm", "--privileged"];
    let done = daemon.run(&options, &id, &["sh", "-c", script]).exits(0);
    let (cgroup, devices) = done.stdout.split_once('\n').unwrap();
    let devices: Vec<_> = devices.lines().collect();
    assert_eq!(cgroup, "0::/");
    assert!(
        devices.contains(&"null") && !devices.contains(&&*disk),
        "{devices:?}"
    );
    let device = format!("/dev/{disk}");
    let refused = daemon.run(&["--rm", "--device", &device], &id, &["true"]);
    assert!(
        refused.code != 0 && refused.stderr.contains("is the host's"),
        "{refused:#?}"
    );
    daemon.ctr(&["container", "rm", &id]);
    daemon.assert_nothing_left();
}

#[test]
fn a_root_file_system_of_plain_directories_works_too() {
    let daemon = Daemon::start_with_snapshotter("native");
    let id = unique("c");
    let options = ["--rm", "--snapshotter", "native"];
    let script = "echo new >/srv/new; cat /srv/new /srv/replaced/file; ls /srv/gone";
    let done = daemon.run(&options, &id, &["sh", "-c", script]).exits(2);
    assert_eq!(done.stdout.lines().next(), Some("new"), "{done:#?}");
}

#[test]
fn what_a_container_writes_stays_until_it_is_removed() {
    let daemon = Daemon::start();
    let id = unique("c");
    let script = "test -e /kept && exit 3; echo text >/kept";
    daemon.run(&[], &id, &["sh", "-c", script]).exits(0);
    // It deletes the task itself; whoever comes later finds none.
    daemon.assert_nothing_left();
    daemon.ctr(&["task", "start", &id]).exits(3);
    daemon.ctr(&["container", "rm", &id]).exits(0);
}

#[test]
fn every_call_does_what_it_says() {
    let daemon = Daemon::start();
    let id = unique("c");
    let program = "trap 'exit 5' TERM; sleep 1000 & wait";
    daemon.detached(&id, &["sh", "-c", program]);
    let (pid, state) = daemon.task(&id).unwrap();
    assert_eq!(state, "RUNNING");
    // The PID is that of a process of this host: the machine.
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    assert!(name.starts_with(machine().0), "{name}");
    let ps = daemon.ctr(&["task", "ps", &id]).exits(0);
    assert!(ps.stdout.contains(&pid.to_string()), "{ps:#?}");

    let done = daemon.exec(&id, &["sh", "-c", "echo in; exit 4"]).exits(4);
    assert_eq!(done.stdout, "in\n");
    assert!(daemon.exec(&id, &["/nowhere"]).code != 0);
    daemon.exec(&id, &["true"]).exits(0);

    let metrics = daemon.ctr(&["task", "metrics", &id]).exits(0).stdout;
    let figure = |name: &str| -> u64 {
        let line = metrics.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().last().unwrap().parse().unwrap()
    };
    assert!(
        figure("cpu.usage_usec") > 0 && figure("memory.usage ") > 0,
        "{metrics}"
    );
    assert_eq!(figure("memory.usage_limit"), u64::MAX);

    daemon.ctr(&["task", "pause", &id]).exits(0);
    assert_eq!(daemon.task(&id).unwrap().1, "PAUSED");
    let refused = daemon.exec(&id, &["true"]);
    assert!(
        refused.code != 0 && refused.stderr.contains("paused"),
        "{refused:#?}"
    );
    daemon.ctr(&["task", "resume", &id]).exits(0);
    assert_eq!(daemon.task(&id).unwrap().1, "RUNNING");

    let refused = daemon.ctr(&["task", "checkpoint", &id]);
    assert!(refused.code != 0, "{refused:#?}");
    let refused = daemon.ctr(&["task", "delete", &id]);
    assert!(refused.stderr.contains("must be stopped"), "{refused:#?}");

    daemon.ctr(&["task", "kill", &id]).exits(0);
    daemon.until_task_is(&id, "STOPPED");
    let again = daemon.ctr(&["task", "kill", &id]);
    assert!(again.stderr.contains("already finished"), "{again:#?}");
    let refused = daemon.exec(&id, &["true"]);
    assert!(
        refused.code != 0 && refused.stderr.contains("stopped"),
        "{refused:#?}"
    );
    daemon.delete(&id, 5);
    let again = daemon.ctr(&["task", "delete", &id]);
    assert!(again.stderr.contains("not found"), "{again:#?}");
    daemon.ctr(&["container", "rm", &id]).exits(0);
}

#[test]
fn what_cannot_start_leaves_nothing() {
    let daemon = Daemon::start();
    let id = unique("c");
    let done = daemon.run(&["--rm"], &id, &["/no/such/program"]);
    assert!(done.code != 0, "{done:#?}");
    assert!(done.stderr.contains("/no/such/program"), "{done:#?}");
    daemon.ctr(&["container", "rm", &id]);
    daemon.assert_nothing_left();
    assert!(daemon.task(&id).is_none());
}

#[test]
fn resources_can_be_changed() {
    let daemon = Daemon::start();
    let id = unique("c");
    let limit = (64_u64 << 20).to_string();
    daemon
        .run(&["-d", "--memory-limit", &limit], &id, &["sleep", "1000"])
        .exits(0);
    let metrics = daemon.ctr(&["task", "metrics", &id]).exits(0).stdout;
    let line = metrics
        .lines()
        .find(|l| l.starts_with("memory.usage_limit"));
    assert!(
        line.unwrap().ends_with(&limit) || line.unwrap().contains(&limit),
        "{metrics}"
    );
    daemon.remove(&id);
}
