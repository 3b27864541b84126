//! Standard streams, terminals, signals, exit codes.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use walnut_tests::{
    Detached, Terminal, assert_nothing_left, command, host, run, run_with, spawn_run, until,
};

/// Bytes that no text layer survives; the same each time.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[test]
fn a_hundred_megabytes_of_input_come_back_intact() {
    let input = noise(100_000_000);
    let done = run_with(&["-i", "IMAGE", "cat"], &input, |_| {}).exits(0);
    assert!(
        done.stdout == input,
        "{} bytes came back",
        done.stdout.len()
    );
}

#[test]
fn output_and_errors_stay_apart_and_whole() {
    let script = "seq 1 20000; seq 1 20000 >&2";
    let done = run(&["IMAGE", "sh", "-c", script]).exits(0);
    let want: String = (1..=20000).map(|n| format!("{n}\n")).collect();
    assert_eq!(String::from_utf8_lossy(&done.stdout), want);
    assert_eq!(done.stderr, want);
}

#[test]
fn without_i_there_is_no_input() {
    run_with(&["IMAGE", "wc", "-c"], b"unheard", |_| {}).exits(0);
    let done = run_with(&["IMAGE", "wc", "-c"], b"unheard", |_| {}).exits(0);
    assert_eq!(done.text(), "0");
}

#[test]
fn exit_codes_are_the_commands_own() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    for code in [0, 1, 2, 42, 124, 200, 255] {
        box_.exec(&["sh", "-c", &format!("exit {code}")])
            .exits(code);
    }
    box_.exec(&["sh", "-c", "kill -TERM $$"]).exits(143);
    box_.exec(&["sh", "-c", "kill -KILL $$"]).exits(137);
    run(&["IMAGE", "sh", "-c", "kill -SEGV $$; exit 3"]).exits(3);
}

#[test]
fn what_cannot_be_executed_says_so() {
    run(&["IMAGE", "no-such-program"]).fails(127, "executable file not found in $PATH");
    run(&["IMAGE", "/no/such"]).fails(127, "no such file or directory");
    run(&["IMAGE", "/etc/passwd"]).fails(126, "permission denied");
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    box_.exec(&["no-such-program"])
        .fails(127, "executable file not found in $PATH");
    box_.exec(&["/etc"]).fails(126, "permission denied");
    box_.exec(&["true"]).exits(0);
}

#[test]
fn exec_has_streams_environment_directory_and_user() {
    let box_ = Detached::start(&["-e", "A=1", "-w", "/tmp", "IMAGE", "sleep", "infinity"]);
    let input = noise(1_000_000);
    let done = box_.exec_with(&["-i"], &["cat"], &input).exits(0);
    assert!(done.stdout == input);
    let done = box_.exec_with(&["-e", "B=2"], &["sh", "-c", "echo $A $B $PWD"], b"");
    assert_eq!(done.text(), "1 2 /tmp");
    let done = box_.exec_with(
        &["-w", "/etc", "-u", "www-data"],
        &["sh", "-c", "id -un; pwd"],
        b"",
    );
    assert_eq!(done.text(), "www-data\n/etc");
    box_.exec_with(&["-u", "nosuchuser"], &["true"], b"")
        .fails(125, "unable to find user nosuchuser");
}

#[test]
fn many_execs_at_once_do_not_mix() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    std::thread::scope(|scope| {
        for n in 0..20 {
            let box_ = &box_;
            scope.spawn(move || {
                let done = box_
                    .exec(&["sh", "-c", &format!("echo {n}; exit {n}")])
                    .exits(n);
                assert_eq!(done.text(), n.to_string());
            });
        }
    });
}

#[test]
fn a_terminal_resizes_and_ends() {
    let cid = std::env::temp_dir().join(walnut_tests::unique("cid"));
    let cidfile = cid.to_str().unwrap();
    let mut terminal = Terminal::start(
        command(&[
            "run",
            "--rm",
            "-it",
            "--cidfile",
            cidfile,
            &host().image,
            "bash",
            "--norc",
        ]),
        91,
        37,
    );
    terminal.shows("# ");
    terminal.keys("echo ready-$((6*7)); tty; stty size\n");
    terminal.shows("ready-42");
    terminal.shows("/dev/pts/");
    terminal.shows("37 91");
    terminal.resize(111, 44);
    // The shell hears of it a moment later.
    until("the guest's terminal has the new size", || {
        terminal.keys("stty size\n");
        std::thread::sleep(std::time::Duration::from_millis(100));
        terminal.screen().contains("44 111")
    });
    terminal.keys("sleep 1000\n");
    let id = std::fs::read_to_string(&cid).unwrap();
    until("sleep runs", || {
        walnut_tests::walnut(&["exec", &id, "pgrep", "-x", "sleep"]).code == 0
    });
    terminal.keys("\u{3}");
    terminal.keys("echo again-$((6*7))\n");
    terminal.shows("again-42");
    terminal.keys("exit 5\n");
    assert_eq!(terminal.end(), 5);
    std::fs::remove_file(&cid).unwrap();
    assert_nothing_left(&id);
}

#[test]
fn exec_on_a_terminal_ends_on_ctrl_d() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    let mut terminal = Terminal::start(
        command(&["exec", "-it", &box_.name, "bash", "--norc"]),
        80,
        24,
    );
    terminal.shows("# ");
    terminal.keys("stty size; (exit 3)\n");
    terminal.shows("24 80");
    until("the prompt is back", || {
        terminal.screen().matches("# ").count() >= 2
    });
    terminal.keys("\u{4}");
    assert_eq!(terminal.end(), 3);
}

#[test]
fn signals_reach_the_command_in_front() {
    let script = "trap 'echo caught; exit 9' INT TERM; echo ready; while :; do sleep 0.1; done";
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let running = spawn_run(&["--rm", "IMAGE", "sh", "-c", script], |_| {});
        let id = running.id();
        until("it runs", || {
            let done = walnut_tests::walnut(&["logs", &id]);
            done.stdout.starts_with(b"ready")
        });
        kill(
            Pid::from_raw(running.child.id().try_into().unwrap()),
            signal,
        )
        .unwrap();
        let done = running.wait().exits(9);
        assert!(done.text().contains("caught"), "{done:#?}");
        assert_nothing_left(&id);
    }
}
