//! Walnut under a real podman, with its conmon.

use std::thread;

use walnut_tests::{Terminal, client::disk};

use crate::engine::Engine;

const NO_NETWORK: &str = "--network=none";
/// Ends with 3 when it is told to, and says that it waits for that.
const WAITS: &str = "trap 'echo bye; exit 3' TERM; echo up; sleep 100000 & wait";

#[test]
fn run_has_the_programs_streams_and_exit_code() {
    let engine = Engine::new();
    let script = "cat; echo err >&2; uname -s; exit 7";
    let run = ["run", "--rm", "-i", NO_NETWORK, "demo", "sh", "-c", script];
    let done = engine.podman_with(b"in\n", &run).exits(7);
    assert_eq!((&*done.stdout, &*done.stderr), ("in\nLinux\n", "err\n"));
    engine.assert_nothing_left();

    // podman's own codes for what cannot be run.
    for (program, code) in [("nowhere", 127), ("/etc", 126)] {
        engine
            .podman(&["run", "--rm", NO_NETWORK, "demo", program])
            .exits(code);
    }
    engine.assert_nothing_left();

    let options = [
        "run",
        "--rm",
        NO_NETWORK,
        "--read-only",
        "--tmpfs=/t",
        "--hostname=hh",
        "--user=33",
        "--workdir=/tmp",
        "--env=A=b",
        "--ulimit=nofile=99",
        "--memory=300m",
        "demo",
        "sh",
        "-c",
        "touch /a; touch /t/a && id -u; pwd; echo $A; hostname; ulimit -n",
    ];
    let done = engine.podman(&options).exits(0);
    assert_eq!(done.stdout, "33\n/tmp\nb\nhh\n99\n", "{done:#?}");
    assert!(done.stderr.contains("Read-only"), "{done:#?}");
    engine.assert_nothing_left();
}

#[test]
fn run_with_a_terminal_shows_it() {
    let engine = Engine::new();
    let script = "tty; read line; echo got $line; stty size; exit 4";
    let run = ["run", "--rm", "-it", NO_NETWORK, "demo", "sh", "-c", script];
    let mut terminal = Terminal::start(engine.command(&run), 91, 17);
    terminal.shows("/dev/pts/0");
    terminal.keys("hey\r");
    terminal.shows("got hey");
    terminal.shows("17 91");
    assert_eq!(terminal.end(), 4);
    engine.assert_nothing_left();
}

#[test]
fn a_container_behind_is_logged_entered_stopped_and_started_again() {
    let engine = Engine::new();
    let run = [
        "run", "-d", "--name=c", NO_NETWORK, "demo", "sh", "-c", WAITS,
    ];
    engine.podman(&run).exits(0);
    engine.note_all();
    engine.until_logs("c", "up");
    let script = "cat; echo err >&2; exit 8";
    let done = engine.podman_with(b"in\n", &["exec", "-i", "c", "sh", "-c", script]);
    let done = done.exits(8);
    assert_eq!((&*done.stdout, &*done.stderr), ("in\n", "err\n"));
    engine.podman(&["exec", "c", "nowhere"]).exits(127);
    let user = engine
        .podman(&["exec", "-u", "33", "c", "id", "-u"])
        .exits(0);
    assert_eq!(user.stdout, "33\n");
    let tty = engine.command(&["exec", "-it", "c", "sh", "-c", "tty; exit 6"]);
    let tty = Terminal::start(tty, 80, 24);
    tty.shows("/dev/pts/");
    assert_eq!(tty.end(), 6);
    engine
        .podman(&["exec", "-d", "c", "touch", "/kept"])
        .exits(0);
    let kept = "until test -e /kept; do sleep 0.1; done";
    engine.podman(&["exec", "c", "sh", "-c", kept]).exits(0);

    engine.podman(&["pause", "c"]).exits(0);
    assert_eq!(engine.shows("c", "{{.State.Status}}"), "paused");
    engine.podman(&["exec", "c", "true"]).exits(255);
    engine.podman(&["unpause", "c"]).exits(0);
    engine.podman(&["exec", "c", "true"]).exits(0);

    engine.podman(&["stop", "c"]).exits(0);
    assert_eq!(
        engine.shows("c", "{{.State.Status}} {{.State.ExitCode}}"),
        "exited 3"
    );
    engine.until_logs("c", "bye");
    engine.place.assert_nothing_left();
    // What it wrote is still there.
    engine.podman(&["start", "c"]).exits(0);
    engine
        .podman(&["exec", "c", "test", "-e", "/kept"])
        .exits(0);
    engine.podman(&["kill", "c"]).exits(0);
    assert_eq!(engine.podman(&["wait", "c"]).exits(0).stdout, "137\n");
    engine.podman(&["start", "c"]).exits(0);
    engine.podman(&["rm", "--force", "--time=0", "c"]).exits(0);
    engine.assert_nothing_left();
}

#[test]
fn two_start_live_and_end_at_once() {
    let engine = Engine::new();
    thread::scope(|scope| {
        for name in ["a", "b"] {
            let engine = &engine;
            scope.spawn(move || {
                let run = [
                    "run", "-d", "--name", name, NO_NETWORK, "demo", "sh", "-c", WAITS,
                ];
                engine.podman(&run).exits(0);
                engine.until_logs(name, "up");
                let done = engine
                    .podman(&["exec", name, "sh", "-c", "echo in"])
                    .exits(0);
                assert_eq!(done.stdout, "in\n");
            });
        }
    });
    engine.note_all();
    let both = engine.podman(&["ps", "--quiet"]).exits(0);
    assert_eq!(both.stdout.lines().count(), 2, "{both:#?}");
    engine.podman(&["stop", "a", "b"]).exits(0);
    engine.podman(&["rm", "a", "b"]).exits(0);
    engine.assert_nothing_left();
}

#[test]
fn volumes_are_the_hosts_and_the_hosts_rest_is_not() {
    let engine = Engine::new();
    let dir = engine.place.dir.join("volume");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("there"), "text").unwrap();
    let volume = format!("{}:/v", dir.display());
    let script = "cat /v/there && echo new >/v/new";
    let run = [
        "run", "--rm", NO_NETWORK, "-v", &volume, "demo", "sh", "-c", script,
    ];
    assert_eq!(engine.podman(&run).exits(0).stdout, "text");
    assert_eq!(std::fs::read_to_string(dir.join("new")).unwrap(), "new\n");
    let disk = disk();
    for (option, says) in [
        ("--pid=host", "it needs a PID namespace"),
        (&*format!("--device=/dev/{disk}"), "is the host's"),
    ] {
        let refused = engine.podman(&["run", "--rm", NO_NETWORK, option, "demo", "true"]);
        let refused = refused.exits(126);
        assert!(refused.stderr.contains(says), "{refused:#?}");
    }
    // Privileged in its own kernel: it mounts, and has no device of the host's.
    let script = "mount -t tmpfs t /mnt && touch /mnt/x && ls /dev";
    let run = [
        "run",
        "--rm",
        NO_NETWORK,
        "--privileged",
        "demo",
        "sh",
        "-c",
        script,
    ];
    let devices = engine.podman(&run).exits(0).stdout;
    let devices: Vec<_> = devices.lines().collect();
    assert!(
        devices.contains(&"null") && !devices.contains(&&*disk),
        "{devices:?}"
    );
    engine.assert_nothing_left();
}
