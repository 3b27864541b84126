//! Supervisors that become other programs while their containers run on.

use std::{fs, path::PathBuf};

use nix::sys::signal::Signal;
use walnut_tests::{
    Detached, assert_nothing_left, host, kill_process, processes, spawn_run, spawn_walnut, unique,
    until,
    upgrade::{another_shim, counted, pretender, refused, upgrade, upgraded},
    walnut,
};

/// Counts, and says so; not so fast that a log, which is rotated, loses its beginning.
const COUNTS: &str =
    "i=0; while :; do echo $i; i=$((i+1)); [ $((i % 20)) != 0 ] || sleep 0.02; done";

/// A directory for programs.
struct Programs(PathBuf);

impl Programs {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(unique("programs"));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Has the container's supervisor become `program`.
#[track_caller]
fn becomes(name: &str, program: &std::path::Path) -> (String, String) {
    upgraded(&host().root, &host().run, name, program)
}

#[test]
fn a_container_runs_on_under_another_program_and_its_output_is_whole() {
    let programs = Programs::new();
    let (a, b) = (
        another_shim(&programs.0, "a"),
        another_shim(&programs.0, "b"),
    );
    let container = Detached::start(&["IMAGE", "sh", "-c", COUNTS]);
    let before = processes(&container.id);
    let record = container.record().unwrap();
    let lines = || {
        let logs = walnut(&["logs", &container.name]).exits(0);
        counted(logs.text())
    };
    until("it counts", || lines() > 100);
    let mut last = 0;
    // Twice in a row, and back again.
    for (program, other) in [(&a, &b), (&b, &a), (&a, &b)] {
        becomes(&container.name, program);
        // It is what it is.
        let program = program.to_str().unwrap();
        let again = ["--program", program, &container.name];
        let (code, rows) = upgrade(&host().root, &host().run, &again);
        assert_eq!((code, &rows[0]["result"]), (0, &"current".into()));
        assert_ne!(rows[0]["to"]["build"], serde_json::Value::Null, "{other:?}");
        let now = lines();
        assert!(now >= last);
        last = now;
        until("it counts on", || lines() > last);
        container.exec(&["true"]).exits(0);
    }
    // All processes are what they were, but for what the supervisor runs.
    assert_eq!(processes(&container.id), before);
    let now = container.record().unwrap();
    assert_eq!(
        (&now["shim_pid"], &now["status"]),
        (&record["shim_pid"], &"running".into())
    );
    walnut(&["stats", "--no-stream", &container.name]).exits(0);
    walnut(&["kill", "-s", "TERM", &container.name]).exits(0);
    walnut(&["kill", &container.name]);
    let record = container.ended();
    assert_eq!(record["exit_code"], 137, "{record:#}");
    assert!(record["error"].is_null(), "{record:#}");
}

#[test]
fn a_command_in_front_notices_nothing() {
    let programs = Programs::new();
    let all = ["a", "b"].map(|mark| another_shim(&programs.0, mark));
    let script = "i=0; while [ ! -e /stop ]; do echo $i; i=$((i+1)); done; exit 7";
    let running = spawn_run(&["--rm", "IMAGE", "sh", "-c", script], |_| {});
    let id = running.id();
    running.prints("\n1000\n");
    for program in &all {
        becomes(&id, program);
    }
    // It may go with the container that it ends.
    walnut(&["exec", &id, "touch", "/stop"]);
    let done = running.wait().exits(7);
    assert!(counted(std::str::from_utf8(&done.stdout).unwrap()) > 1000);
    assert_nothing_left(&id);
}

#[test]
fn a_process_of_exec_goes_on_with_its_streams() {
    let programs = Programs::new();
    let container = Detached::start(&["IMAGE", "sleep", "infinity"]);
    let script = "while read line; do echo got $line; done; exit 9";
    let mut exec = spawn_walnut(&["exec", "-i", &container.name, "sh", "-c", script]);
    let stdin = exec.child.stdin.as_mut().unwrap();
    std::io::Write::write_all(stdin, b"one\n").unwrap();
    exec.prints("got one\n");
    for mark in ["a", "b"] {
        becomes(&container.name, &another_shim(&programs.0, mark));
        let stdin = exec.child.stdin.as_mut().unwrap();
        std::io::Write::write_all(stdin, format!("{mark}\n").as_bytes()).unwrap();
        exec.prints(&format!("got {mark}\n"));
    }
    let done = exec.wait().exits(9);
    assert_eq!(done.text(), "got one\ngot a\ngot b");
}

#[test]
fn who_cannot_go_on_is_not_begun() {
    let programs = Programs::new();
    let container = Detached::start(&["IMAGE", "sh", "-c", COUNTS]);
    let before = processes(&container.id);
    let refusal = |program: &std::path::Path| {
        let why = refused(&host().root, &host().run, &container.name, program);
        container.exec(&["true"]).exits(0);
        why
    };
    // Another version's state, which is known before anything else.
    let older = r#"{"version":"0.0.9","format":0}"#;
    let older = pretender(&programs.0, "older", older, "exit 0");
    let why = refusal(&older);
    assert!(why.contains("states of format 0"), "{why}");
    // One that reads the state, and does not know what it says.
    let about = r#"{"version":"0.1.0","format":1}"#;
    let strict = "echo 'read the state: unknown field `x`' >&2; exit 1";
    let strict = pretender(&programs.0, "strict", about, strict);
    let why = refusal(&strict);
    assert!(why.contains("unknown field `x`"), "{why}");
    // One that says yes to everything, and cannot be executed when it comes to that.
    let bold = pretender(&programs.0, "bold", about, "cat >/dev/null");
    let why = refusal(&bold);
    assert!(why.contains("execute it"), "{why}");
    // None at all, and what is no program.
    for (file, says) in [("nowhere", "No such file"), ("older/x", "Not a directory")] {
        let args = [
            "upgrade",
            "--program",
            programs.0.to_str().unwrap(),
            &container.name,
        ];
        let _ = walnut(&args).exits(125);
        let file = programs.0.join(file);
        let file = file.to_str().unwrap();
        walnut(&["upgrade", "--program", file, &container.name]).fails(125, says);
    }
    let echo = refusal("/bin/echo".as_ref());
    assert!(echo.contains("cannot take over"), "{echo}");
    assert_eq!(processes(&container.id), before);
    counted(walnut(&["logs", &container.name]).exits(0).text());
    // And after all of that it can be what can.
    becomes(&container.name, &another_shim(&programs.0, "a"));
    container.exec(&["true"]).exits(0);
}

#[test]
fn what_is_installed_where_a_program_was_is_the_next() {
    let programs = Programs::new();
    let container = Detached::start(&["IMAGE", "sleep", "infinity"]);
    let first = another_shim(&programs.0, "a");
    let (_, one) = becomes(&container.name, &first);
    // Another one under its name.
    fs::rename(another_shim(&programs.0, "b"), &first).unwrap();
    let (code, rows) = upgrade(&host().root, &host().run, &[&container.name]);
    assert_eq!(
        (code, &rows[0]["result"]),
        (0, &"upgraded".into()),
        "{rows:#?}"
    );
    assert_eq!(rows[0]["from"]["build"], one.as_str());
    let shown = walnut(&["upgrade", &container.name]).exits(0);
    assert!(shown.text().contains("current"), "{shown:#?}");
    walnut(&["upgrade", "nobody"]).fails(125, "no sandbox is called nobody");
}

#[test]
fn one_that_has_been_replaced_is_killed_like_any_other() {
    let programs = Programs::new();
    let container = Detached::start(&["IMAGE", "sleep", "infinity"]);
    becomes(&container.name, &another_shim(&programs.0, "a"));
    kill_process(&container.id, "containerd-shim-walnut-v2");
    let record = container.ended();
    assert_eq!(record["exit_code"], 137, "{record:#}");
    let error = record["error"].as_str().unwrap();
    assert!(error.contains("supervisor was killed"), "{error}");
    assert_nothing_left(&container.id);
}

#[test]
fn killed_in_the_middle_of_it_nothing_is_left() {
    let programs = Programs::new();
    let program = another_shim(&programs.0, "a");
    let program = program.to_str().unwrap();
    for ms in [0, 30, 60, 90, 120, 200] {
        let container = Detached::start(&["IMAGE", "sh", "-c", COUNTS]);
        let upgrade = spawn_walnut(&["upgrade", "--program", program, &container.name]);
        std::thread::sleep(std::time::Duration::from_millis(ms));
        kill_process(&container.id, "containerd-shim-walnut-v2");
        // Whatever it says of that.
        upgrade.wait();
        let record = container.ended();
        assert_eq!(record["exit_code"], 137, "{record:#}");
        assert_nothing_left(&container.id);
    }
}

#[test]
fn a_lease_is_still_one() {
    let programs = Programs::new();
    let running = spawn_run(
        &["--rm", "IMAGE", "sh", "-c", "echo runs; sleep infinity"],
        |_| {},
    );
    let id = running.id();
    running.prints("runs");
    becomes(&id, &another_shim(&programs.0, "a"));
    // Who runs it in front is gone: so is it.
    running.signal(Signal::SIGKILL);
    assert_nothing_left(&id);
}

#[test]
fn volumes_are_served_on() {
    let programs = Programs::new();
    let shared = Programs::new();
    fs::write(shared.0.join("file"), "before").unwrap();
    let volume = format!("{}:/data", shared.0.display());
    let container = Detached::start(&["-v", &volume, "IMAGE", "sleep", "infinity"]);
    becomes(&container.name, &another_shim(&programs.0, "a"));
    assert_eq!(
        container.exec(&["cat", "/data/file"]).exits(0).text(),
        "before"
    );
    container
        .exec(&["sh", "-c", "echo after >/data/new"])
        .exits(0);
    assert_eq!(fs::read_to_string(shared.0.join("new")).unwrap(), "after\n");
    walnut(&["stop", &container.name]).exits(0);
    container.ended();
}
