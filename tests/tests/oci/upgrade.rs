//! Supervisors of the OCI command line that become other programs.

use std::{fs, path::Path};

use walnut_tests::{
    Terminal, unique, until,
    upgrade::{another_shim, counted, pretender, refused, upgraded},
};

use crate::{engine::Engine, place::Place};

/// Counts until it is told to stop.
const COUNTS: &str = "i=0; while [ ! -e /stop ]; do echo $i; i=$((i+1)); done; exit 7";

impl Place {
    /// Has a container's supervisor become `program`.
    #[track_caller]
    pub(crate) fn becomes(&self, id: &str, program: &Path) {
        upgraded(&self.dir.join("r"), &self.dir.join("w"), id, program);
    }
}

#[test]
fn a_container_is_what_it_was() {
    let place = Place::new();
    let id = unique("c");
    let script = format!("trap 'exit 5' USR1; {COUNTS}");
    let bundle = place.bundle(&script, |_| {});
    place.start(&id, &bundle);
    place.until_says(&id, "\n100\n");
    let before = place.state(&id);
    for mark in ["a", "b"] {
        place.becomes(&id, &another_shim(&place.dir, mark));
        assert_eq!(place.state(&id), before);
        place.oci(&["exec", &id, "true"]).exits(0);
        place.oci(&["pause", &id]).exits(0);
        place.oci(&["resume", &id]).exits(0);
    }
    let older = r#"{"version":"0.0.9","format":0}"#;
    let older = pretender(&place.dir, "older", older, "exit 0");
    let why = refused(&place.dir.join("r"), &place.dir.join("w"), &id, &older);
    assert!(why.contains("states of format 0"), "{why}");
    // A signal to its PID reaches the container's first process.
    let pid = i32::try_from(before["pid"].as_i64().unwrap()).unwrap();
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1).unwrap();
    until("it has ended", || place.state(&id)["status"] == "stopped");
    let said = fs::read_to_string(place.dir.join(format!("{id}.out"))).unwrap();
    assert!(counted(&said) > 100);
    place.oci(&["delete", &id]).exits(0);
    place.assert_nothing_left();
}

#[test]
fn podman_notices_nothing() {
    let engine = Engine::new();
    let name = unique("c");
    let run = [
        "run",
        "-d",
        "--name",
        &name,
        "--network=none",
        "demo",
        "sh",
        "-c",
        COUNTS,
    ];
    engine.podman(&run).exits(0);
    engine.note_all();
    let id = engine.shows(&name, "{{.Id}}");
    let lines = || counted(&engine.podman(&["logs", &name]).exits(0).stdout);
    until("it counts", || lines() > 100);
    for mark in ["a", "b"] {
        engine
            .place
            .becomes(&id, &another_shim(&engine.place.dir, mark));
        let then = lines();
        until("it counts on", || lines() > then);
        let done = engine.podman(&["exec", &name, "echo", "hi"]).exits(0);
        assert_eq!(done.stdout, "hi\n");
    }
    // It may go with the container that it ends.
    engine.podman(&["exec", &name, "touch", "/stop"]);
    let code = engine.podman(&["wait", &name]).exits(0);
    assert_eq!(code.stdout.trim(), "7");
    lines();
    engine.podman(&["rm", &name]).exits(0);
    engine.assert_nothing_left();
}

#[test]
fn a_terminal_stays_one() {
    let engine = Engine::new();
    let name = unique("c");
    let run = [
        "run",
        "--rm",
        "-it",
        "--name",
        &name,
        "--network=none",
        "demo",
        "bash",
    ];
    let mut terminal = Terminal::start(engine.command(&run), 91, 17);
    terminal.keys("echo got-$((40 + 2))\n");
    terminal.shows("got-42");
    engine.note_all();
    let id = engine.shows(&name, "{{.Id}}");
    engine
        .place
        .becomes(&id, &another_shim(&engine.place.dir, "a"));
    terminal.keys("echo still-$((40 + 2))\n");
    terminal.shows("still-42");
    terminal.resize(70, 22);
    terminal.keys("until [ \"$(stty size)\" = '22 70' ]; do :; done; echo so-$((1 + 1))\n");
    terminal.shows("so-2");
    terminal.keys("exit 6\n");
    assert_eq!(terminal.end(), 6);
    engine.assert_nothing_left();
}
