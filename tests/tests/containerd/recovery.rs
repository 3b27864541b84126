//! Each of them killed, and containerd's view right afterwards.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use walnut_tests::{unique, until};

use crate::{daemon::Daemon, events::Events, pods::member};

#[test]
fn containers_outlive_containerd() {
    let daemon = Daemon::start();
    let (a, b) = (unique("a"), unique("b"));
    daemon.detached(&a, &["sleep", "1000"]);
    daemon.detached(&b, &["sleep", "1000"]);
    let before = (daemon.task(&a), daemon.task(&b));
    for _ in 0..2 {
        daemon.restart(|| {});
        assert_eq!((daemon.task(&a), daemon.task(&b)), before);
        let done = daemon.exec(&a, &["echo", "still here"]).exits(0);
        assert_eq!(done.stdout, "still here\n");
    }
    let events = Events::listen(&daemon);
    daemon.remove(&a);
    until("its end is told", || {
        events.of(&a).contains(&"delete".into())
    });
    assert_eq!(events.of(&a), ["exit", "delete"]);
    assert_eq!(daemon.task(&b), before.1);
    daemon.remove(&b);
}

#[test]
fn a_killed_shim_takes_everything_along() {
    let daemon = Daemon::start();
    let events = Events::listen(&daemon);
    let id = unique("c");
    daemon.detached(&id, &["sleep", "1000"]);
    daemon.kill_process("containerd-shim-walnut-v2");
    until("the task is gone", || daemon.task(&id).is_none());
    daemon.assert_nothing_left();
    until("its end is told", || {
        events.of(&id).contains(&"delete".into())
    });
    assert_eq!(events.of(&id), ["create", "start", "exit", "delete"]);
    let exits = events.lines("/tasks/exit", &id);
    assert!(exits[0].contains("\"exit_status\":137"), "{exits:#?}");
    // Its name can be had again.
    daemon.ctr(&["task", "start", "-d", &id]).exits(0);
    daemon.exec(&id, &["true"]).exits(0);
    daemon.remove(&id);
}

#[test]
fn a_shim_killed_in_containerd_s_absence_is_cleaned_up_after() {
    let daemon = Daemon::start();
    let id = unique("c");
    daemon.detached(&id, &["sleep", "1000"]);
    let mark = daemon.scratch().to_owned();
    daemon.restart(|| {
        let all = walnut_tests::processes(mark.to_str().unwrap());
        let shim = all
            .iter()
            .find(|(_, name)| name.starts_with("containerd-shim"));
        kill(Pid::from_raw(shim.unwrap().0), Signal::SIGKILL).unwrap();
    });
    until("the task is gone", || daemon.task(&id).is_none());
    daemon.assert_nothing_left();
    daemon.remove(&id);
}

#[test]
fn a_killed_machine_ends_its_containers() {
    let daemon = Daemon::start();
    let events = Events::listen(&daemon);
    let id = unique("c");
    daemon.detached(&id, &["sleep", "1000"]);
    let (pid, _) = daemon.task(&id).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    daemon.until_task_is(&id, "STOPPED");
    let refused = daemon.exec(&id, &["true"]);
    assert!(refused.code != 0, "{refused:#?}");
    daemon.delete(&id, 137);
    daemon.assert_nothing_left();
    until("its end is told", || {
        events.of(&id).contains(&"delete".into())
    });
    assert_eq!(events.of(&id), ["create", "start", "exit", "delete"]);
    let exits = events.lines("/tasks/exit", &id);
    assert!(exits[0].contains("\"exit_status\":137"), "{exits:#?}");
    daemon.ctr(&["container", "rm", &id]).exits(0);
}

#[test]
fn a_killed_shim_takes_its_whole_pod_along() {
    let daemon = Daemon::start();
    let ids = [unique("pod"), unique("a"), unique("b")];
    for (n, id) in ids.iter().enumerate() {
        let kind = if n == 0 { "sandbox" } else { "container" };
        member(&daemon, &ids[0], id, kind, &["sleep", "1000"]);
    }
    daemon.kill_process("containerd-shim-walnut-v2");
    for id in &ids {
        until("the task is gone", || daemon.task(id).is_none());
    }
    daemon.assert_nothing_left();
    // Each of them can be had again, and they share a machine again.
    for id in &ids {
        daemon.ctr(&["task", "start", "-d", id]).exits(0);
    }
    assert_eq!(daemon.task(&ids[1]), daemon.task(&ids[2]));
    for id in &ids {
        daemon.remove(id);
    }
}

#[test]
fn a_killed_file_server_ends_its_containers() {
    let daemon = Daemon::start();
    let id = unique("c");
    daemon.detached(&id, &["sleep", "1000"]);
    daemon.kill_process("virtiofsd");
    daemon.until_task_is(&id, "STOPPED");
    daemon.delete(&id, 137);
    daemon.assert_nothing_left();
    daemon.ctr(&["container", "rm", &id]).exits(0);
}

#[test]
fn what_is_being_created_when_containerd_is_killed_goes() {
    let daemon = Daemon::start();
    let id = unique("c");
    std::thread::scope(|scope| {
        // It is told that its connection is gone.
        scope.spawn(|| daemon.run(&["-d"], &id, &["sleep", "1000"]));
        let mark = daemon.scratch().to_str().unwrap();
        until("its machine is being started", || {
            let all = walnut_tests::processes(mark);
            all.iter().any(|(_, name)| name == "virtiofsd")
        });
        daemon.restart(|| {});
    });
    assert!(daemon.task(&id).is_none());
    daemon.assert_nothing_left();
    daemon.ctr(&["container", "rm", &id]).exits(0);
}

/// Processes that stand still for as long as this lives.
struct Stopped(Vec<Pid>);

impl Stopped {
    fn new(pids: Vec<Pid>) -> Self {
        for pid in &pids {
            kill(*pid, Signal::SIGSTOP).unwrap();
        }
        Self(pids)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            // It may have ended, where what is tested failed.
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

/// Readahead of a killed process is under way when its root file system goes, which is a
/// mount of its own in the guest: the guest's kernel has to wait for it.
#[test]
fn a_container_killed_while_it_reads_harms_no_other() {
    const ROUNDS: usize = 8;
    const READS: &str = "for dir in /usr/bin /usr/lib /usr/share /etc /usr/sbin; do
        while :; do find $dir -xdev -type f -exec cat {} + >/dev/null 2>&1; done &
    done; wait";
    let daemon = Daemon::start();
    let pod = unique("pod");
    member(&daemon, &pod, &pod, "sandbox", &["sleep", "1000"]);
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    let before = daemon.exec(&pod, &boot).exits(0).stdout;
    for _ in 0..ROUNDS {
        let id = unique("c");
        member(&daemon, &pod, &id, "container", &["sh", "-c", READS]);
        let stopped = Stopped::new(daemon.pids_of("virtiofsd"));
        daemon
            .ctr(&["task", "kill", "--signal", "KILL", &id])
            .exits(0);
        // Its processes end, as far as they can; where they do so later, nothing is tested.
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(stopped);
        daemon.until_task_is(&id, "STOPPED");
        daemon.delete(&id, 137);
        daemon.ctr(&["container", "rm", &id]).exits(0);
    }
    assert_eq!(daemon.exec(&pod, &boot).exits(0).stdout, before);
    daemon.remove(&pod);
}
