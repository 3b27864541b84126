//! Programs of an image whose first process is systemd, and others of it.

use walnut_tests::{Detached, programs_image, run, until, walnut};

#[test]
fn systemd_runs_as_the_images_command_and_is_stopped_in_order() {
    let node = Detached::start(&["-m", "256m", programs_image()]);
    let says = |command: &[&str]| node.exec(command).text().to_owned();
    until("systemd has started what it is to start", || {
        says(&["systemctl", "is-system-running"]) == "running"
    });
    assert_eq!(says(&["cat", "/proc/1/comm"]), "systemd");
    assert_eq!(says(&["systemctl", "is-active", "nginx"]), "active");
    // What it writes to is memory, but for the rest of the root.
    let kinds = ["/run", "/tmp", "/sys/fs/cgroup", "/etc"];
    let kinds: Vec<_> = kinds
        .iter()
        .map(|path| says(&["stat", "-f", "-c", "%T", path]))
        .collect();
    assert_eq!(kinds, ["tmpfs", "tmpfs", "cgroup2fs", "overlayfs"]);
    // Each has an identity of its own.
    assert_eq!(says(&["cat", "/etc/machine-id"]), node.id);
    walnut(&["stop", "--time", "120", &node.name]).exits(0);
    assert_eq!(node.ended()["exit_code"], 0);
}

#[test]
fn a_container_is_asked_to_end_by_the_signal_that_it_wants() {
    let script = "trap 'exit 3' TERM; trap 'exit 4' QUIT; echo up; while :; do sleep 0.1; done";
    for (options, code) in [(&[][..], 3), (&["--stop-signal", "QUIT"][..], 4)] {
        let args = [options, &["IMAGE", "sh", "-c", script]].concat();
        let container = Detached::start(&args);
        until("it waits for signals", || {
            walnut(&["logs", &container.name]).text() == "up"
        });
        walnut(&["stop", "--time", "120", &container.name]).exits(0);
        assert_eq!(container.ended()["exit_code"], code, "{options:?}");
    }
}

#[test]
fn node_and_programs_of_go_run() {
    let program = "const a = Array.from({ length: 1e5 }, (_, i) => BigInt(i)); \
                   console.log(String(a.reduce((x, y) => x + y)), process.pid); process.exit(6)";
    let done = run(&[programs_image(), "node", "-e", program]).exits(6);
    assert_eq!(done.text(), "4999950000 1");
    let done = run(&[programs_image(), "gojq", "-n", "[range(1e5)] | add"]).exits(0);
    assert_eq!(done.text(), "4999950000");
}
