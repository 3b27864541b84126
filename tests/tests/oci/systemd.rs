//! systemd as a container's first process, as podman sets containers up for it.

use walnut_tests::until;

use crate::engine::Engine;

#[test]
fn podman_runs_an_init_system_and_stops_it_in_order() {
    let engine = Engine::new();
    // podman sees what it is by the command.
    let run = [
        "run",
        "-d",
        "--name=c",
        "--network=none",
        "programs",
        "/sbin/init",
    ];
    engine.podman(&run).exits(0);
    engine.note_all();
    let says = |command: &[&str]| {
        let done = engine.podman(&[&["exec", "c"], command].concat());
        done.stdout.trim().to_owned()
    };
    until("systemd has started what it is to start", || {
        says(&["systemctl", "is-system-running"]) == "running"
    });
    assert_eq!(says(&["systemd-detect-virt"]), "podman");
    assert_eq!(says(&["systemctl", "is-active", "nginx"]), "active");
    let cgroup = "cat /proc/$(systemctl show -P MainPID nginx)/cgroup";
    assert_eq!(
        says(&["sh", "-c", cgroup]),
        "0::/system.slice/nginx.service"
    );
    engine.podman(&["stop", "--time=120", "c"]).exits(0);
    let ended = engine.shows("c", "{{.State.Status}} {{.State.ExitCode}}");
    assert_eq!(ended, "exited 0");
    engine.podman(&["rm", "c"]).exits(0);
    engine.assert_nothing_left();
}
