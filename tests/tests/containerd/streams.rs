//! Standard streams, terminals and loggers.

use std::{fs, os::unix::fs::PermissionsExt};

use walnut_tests::{Terminal, unique, until};

use crate::daemon::Daemon;

#[test]
fn input_and_output_are_whole() {
    let daemon = Daemon::start();
    let id = unique("c");
    let input: String = (0..200_000).map(|n| format!("{n}\n")).collect();
    let done = daemon
        .run_with(input.as_bytes(), &["--rm"], &id, &["cat"])
        .exits(0);
    assert!(
        done.stdout == input,
        "{} bytes came back",
        done.stdout.len()
    );
    let script = "seq 1 5000; seq 1 5000 >&2";
    let done = daemon.run(&["--rm"], &id, &["sh", "-c", script]).exits(0);
    let want: String = (1..=5000).map(|n| format!("{n}\n")).collect();
    assert_eq!(done.stdout, want);
    assert_eq!(done.stderr, want);
}

#[test]
fn a_terminal_is_a_terminal() {
    let daemon = Daemon::start();
    let id = unique("c");
    let command = daemon.command(&daemon.run_args(&["--rm", "-t"], &id, &["bash"]));
    let mut terminal = Terminal::start(command, 90, 33);
    terminal.keys("tty; echo got-$((40 + 2))\n");
    terminal.shows("/dev/pts/0");
    terminal.shows("got-42");
    terminal.keys("stty size\n");
    terminal.shows("33 90");
    terminal.resize(70, 22);
    terminal.keys("until [ \"$(stty size)\" = '22 70' ]; do :; done; echo so-$((1 + 1))\n");
    terminal.shows("so-2");
    terminal.keys("exit 6\n");
    assert_eq!(terminal.end(), 6);
}

#[test]
fn output_can_go_to_a_file() {
    let daemon = Daemon::start();
    let id = unique("c");
    let file = daemon.scratch().join("logs/out");
    let uri = format!("file://{}", file.display());
    let program = ["sh", "-c", "echo one; echo two >&2"];
    daemon
        .run(&["-d", "--log-uri", &uri], &id, &program)
        .exits(0);
    daemon.until_task_is(&id, "STOPPED");
    let text = fs::read_to_string(&file).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["one", "two"]);
    daemon.remove(&id);
}

#[test]
fn output_can_go_to_a_program() {
    let daemon = Daemon::start();
    let id = unique("c");
    let (program, file) = (
        daemon.scratch().join("logger"),
        daemon.scratch().join("out"),
    );
    let script = "#!/bin/sh\n\
        echo \"$CONTAINER_NAMESPACE $CONTAINER_ID\" >\"$2\"\n\
        exec 5>&-\ncat <&3 >>\"$2\" &\ncat <&4 >>\"$2\"\nwait\necho end >>\"$2\"\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?to={}", program.display(), file.display());
    let container = ["sh", "-c", "echo one; echo two >&2"];
    daemon
        .run(&["-d", "--log-uri", &uri], &id, &container)
        .exits(0);
    let read = || fs::read_to_string(&file).unwrap_or_default();
    until("the logger has had all", || read().ends_with("end\n"));
    let text = read();
    assert!(text.starts_with(&format!("walnut-test {id}\n")), "{text}");
    assert!(text.contains("one\n") && text.contains("two\n"), "{text}");
    daemon.remove(&id);
}

#[test]
fn output_without_a_reader_keeps_nothing_alive() {
    let daemon = Daemon::start();
    let id = unique("c");
    let script = "yes & echo $! >/pid; wait";
    let mut command = daemon.command(&daemon.run_args(&[], &id, &["sh", "-c", script]));
    // Nobody reads what `ctr` prints, so in the end the program waits.
    let mut ctr = command
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    daemon.until_task_is(&id, "RUNNING");
    // It has written all that it can once it uses no processor any more.
    let waits = "t() { cut -d' ' -f14,15 /proc/$(cat /pid)/stat; }; a=$(t); sleep 0.3; test \"$a\" = \"$(t)\"";
    until("the program waits", || {
        daemon.exec(&id, &["sh", "-c", waits]).code == 0
    });
    ctr.kill().unwrap();
    ctr.wait().unwrap();
    daemon.remove(&id);
}
