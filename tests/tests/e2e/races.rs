//! Two things at once, and ends that come from elsewhere.

use std::process::Stdio;

use nix::sys::signal::Signal;
use walnut_tests::{
    Detached, assert_nothing_left, command, host, kill_process, machine, processes, spawn_run,
    spawn_walnut, unique, until, walnut,
};

#[test]
fn one_of_two_gets_the_name() {
    let name = unique("same");
    let start = || {
        spawn_walnut(&[
            "run",
            "-d",
            "--name",
            &name,
            &host().image,
            "sleep",
            "infinity",
        ])
    };
    let done = [start(), start()].map(|running| running.wait());
    let (won, lost): (Vec<_>, Vec<_>) = done.into_iter().partition(|d| d.code == 0);
    assert_eq!((won.len(), lost.len()), (1, 1), "{won:#?} {lost:#?}");
    for done in lost {
        done.fails(125, "is in use by container");
    }
    let id = won[0].text().to_owned();
    walnut(&["rm", "-f", &name]).exits(0);
    assert_nothing_left(&id);
}

#[test]
fn a_container_is_removed_while_it_boots() {
    for verb in [&["rm", "-f"][..], &["stop", "-t", "1"]] {
        let running = spawn_run(
            &["--rm", "--no-template", "IMAGE", "sleep", "infinity"],
            |_| {},
        );
        let id = running.id();
        walnut(&[verb, &[id.as_str()]].concat()).exits(0);
        let done = running.wait();
        assert!(
            [125, 137, 143].contains(&done.code),
            "it was ended: {done:#?}"
        );
        assert_nothing_left(&id);
        until("the container is gone", || {
            !host().root.join("containers").join(&id).exists()
        });
    }
}

#[test]
fn an_exec_ends_with_its_container() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    let exec = spawn_walnut(&["exec", &box_.name, "sh", "-c", "echo in; sleep infinity"]);
    exec.prints("in");
    walnut(&["kill", &box_.name]).exits(0);
    exec.wait().exits(137);
    assert_eq!(box_.ended()["exit_code"], 137);
}

#[test]
fn everybody_hears_that_a_machine_has_died() {
    let script = "echo begun; exec sleep infinity";
    let box_ = Detached::start(&["IMAGE", "sh", "-c", script]);
    let exec = spawn_walnut(&["exec", &box_.name, "sh", "-c", "echo in; sleep infinity"]);
    exec.prints("in");
    let logs = spawn_walnut(&["logs", "-f", &box_.name]);
    logs.prints("begun");
    kill_process(&box_.id, machine().0);
    exec.wait().fails(125, "SIGKILL");
    assert_eq!(logs.wait().exits(0).text(), "begun");
    let record = box_.ended();
    let error = record["error"].as_str().unwrap_or_default();
    assert!(error.contains("SIGKILL"), "{record:#}");
    let table = walnut(&["ps", "-a"]);
    assert!(table.text().contains(error), "{table:#?}");
}

#[test]
fn an_exec_hears_that_the_supervisor_has_died() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    let exec = spawn_walnut(&["exec", &box_.name, "sh", "-c", "echo in; sleep infinity"]);
    exec.prints("in");
    kill_process(&box_.id, "containerd-shim-walnut-v2");
    exec.wait().fails(125, "supervisor is gone");
    assert_eq!(box_.ended()["error"], "the sandbox's supervisor was killed");
}

#[test]
fn a_killed_exec_leaves_the_container_alone() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    let exec = spawn_walnut(&["exec", "-i", &box_.name, "sh", "-c", "echo in; cat"]);
    exec.prints("in");
    exec.signal(Signal::SIGKILL);
    exec.wait().exits(137);
    // Its input has ended, and so has what read it.
    until("cat has ended", || {
        box_.exec(&["pgrep", "-x", "cat"]).code == 1
    });
    assert_eq!(box_.record().unwrap()["status"], "running");
}

#[test]
fn signals_reach_the_process_they_are_for() {
    let script =
        "trap 'echo usr1' USR1; trap 'echo 12' 12; echo ready; while :; do sleep 0.05; done";
    let box_ = Detached::start(&["IMAGE", "sh", "-c", script]);
    let log = || walnut(&["logs", &box_.name]).text().to_owned();
    until("it is ready", || log() == "ready");
    walnut(&["kill", "--signal", "usr1", &box_.name]).exits(0);
    until("SIGUSR1 has come", || log() == "ready\nusr1");
    walnut(&["kill", "-s", "12", &box_.name]).exits(0);
    until("SIGUSR2 has come", || log() == "ready\nusr1\n12");
    walnut(&["kill", "-s", "nosuch", &box_.name]).fails(125, "unknown signal");
    let script = "trap 'echo got; exit 4' TERM; echo in; while :; do sleep 0.05; done";
    let exec = spawn_walnut(&["exec", &box_.name, "sh", "-c", script]);
    exec.prints("in");
    exec.signal(Signal::SIGTERM);
    assert_eq!(exec.wait().exits(4).text(), "in\ngot");
    assert_eq!(log(), "ready\nusr1\n12", "the first process heard nothing");
}

#[test]
fn nobody_reads_on() {
    let cid = std::env::temp_dir().join(unique("cid"));
    let mut child = command(&["run", "--rm", "--cidfile", cid.to_str().unwrap()])
        .args([&host().image, "yes"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = [0; 2];
    let mut stdout = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut first).unwrap();
    assert_eq!(&first, b"y\n");
    drop(stdout);
    until("the command has ended", || {
        child.try_wait().unwrap().is_some()
    });
    let id = std::fs::read_to_string(&cid).unwrap();
    std::fs::remove_file(&cid).unwrap();
    assert_nothing_left(&id);
    until("the container is gone", || {
        !host().root.join("containers").join(&id).exists()
    });
    assert!(processes(&id).is_empty());
}
