//! Walnut under a real docker, by the runtime that `walnut install` gives it.

use walnut_tests::{
    Terminal,
    client::{disk, finish},
    machine, until,
};

use crate::dockerd::Docker;

const NO_NETWORK: &str = "--network=none";
/// Ends with 3 when it is told to, and says that it waits for that.
const WAITS: &str = "trap 'echo bye; exit 3' TERM; echo up; sleep 100000 & wait";

#[test]
fn run_has_the_programs_streams_and_exit_code() {
    let docker = Docker::start();
    let script = "cat; echo err >&2; uname -r; exit 7";
    let mut run = docker.run_command(&["--rm", "-i", NO_NETWORK], &["sh", "-c", script]);
    let done = finish(&mut run, b"in\n").exits(7);
    assert_eq!(done.stderr, "err\n");
    let kernel = done.stdout.strip_prefix("in\n").unwrap().trim();
    assert!(kernel.ends_with("-walnut"), "{done:#?}");
    docker.assert_nothing_left();

    // docker's own codes for what cannot be run.
    for (program, code) in [("nowhere", 127), ("/etc", 126)] {
        docker.run(&["--rm", NO_NETWORK], &[program]).exits(code);
    }
    docker.assert_nothing_left();

    let options = [
        "--rm",
        NO_NETWORK,
        "--read-only",
        "--tmpfs=/t",
        "--hostname=hh",
        "--user=33",
        "--workdir=/tmp",
        "--env=A=b",
        "--ulimit=nofile=99:99",
        "--memory=300m",
        "--pids-limit=77",
    ];
    let script = "touch /a; touch /t/a && id -u; pwd; echo $A; hostname; ulimit -n; \
                  cat /sys/fs/cgroup/pids.max";
    let done = docker.run(&options, &["sh", "-c", script]).exits(0);
    assert_eq!(done.stdout, "33\n/tmp\nb\nhh\n99\n77\n", "{done:#?}");
    assert!(done.stderr.contains("Read-only"), "{done:#?}");
    docker.assert_nothing_left();

    let dir = docker.place.dir.join("volume");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("there"), "text").unwrap();
    let volume = format!("--volume={}:/v", dir.display());
    let script = "cat /v/there && echo new >/v/new";
    let done = docker.run(&["--rm", NO_NETWORK, &volume], &["sh", "-c", script]);
    assert_eq!(done.exits(0).stdout, "text");
    assert_eq!(std::fs::read_to_string(dir.join("new")).unwrap(), "new\n");
    let disk = disk();
    // Privileged in its own kernel, with cgroups of its own where people bind the host's.
    let cgroups = "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw";
    let script =
        "mount -t tmpfs t /mnt && mkdir /sys/fs/cgroup/new && cat /proc/self/cgroup && ls /dev";
    let options = ["--rm", NO_NETWORK, "--privileged", cgroups];
    let done = docker.run(&options, &["sh", "-c", script]).exits(0);
    let (cgroup, devices) = done.stdout.split_once('\n').unwrap();
    let devices: Vec<_> = devices.lines().collect();
    assert_eq!(cgroup, "0::/");
    assert!(
        devices.contains(&"null") && !devices.contains(&&*disk),
        "{devices:?}"
    );
    for (option, says) in [
        ("--pid=host", "it needs a PID namespace"),
        (&*format!("--device=/dev/{disk}"), "is the host's"),
    ] {
        let refused = docker.run(&["--rm", NO_NETWORK, option], &["true"]);
        let refused = refused.exits(125);
        assert!(refused.stderr.contains(says), "{refused:#?}");
    }
    docker.assert_nothing_left();
}

#[test]
fn run_with_a_terminal_shows_it() {
    let docker = Docker::start();
    let script = "tty; read line; echo got $line; stty size; exit 4";
    let run = docker.run_command(&["--rm", "-it", NO_NETWORK], &["sh", "-c", script]);
    let mut terminal = Terminal::start(run, 91, 17);
    terminal.shows("/dev/pts/0");
    terminal.keys("hey\r");
    terminal.shows("got hey");
    terminal.shows("17 91");
    assert_eq!(terminal.end(), 4);
    docker.assert_nothing_left();
}

#[test]
fn a_container_behind_is_logged_entered_stopped_and_started_again() {
    let docker = Docker::start();
    docker.detached(&["--name=one", NO_NETWORK], &["sh", "-c", WAITS]);
    docker.until_logs("one", "up");
    assert_eq!(docker.shows("one", "{{.State.Status}}"), "running");
    let script = "cat; echo err >&2; exit 8";
    let exec = ["exec", "-i", "one", "sh", "-c", script];
    let done = docker.docker_with(b"in\n", &exec).exits(8);
    assert_eq!((&*done.stdout, &*done.stderr), ("in\n", "err\n"));
    // Its code, with runc as well.
    docker.docker(&["exec", "one", "nowhere"]).exits(126);
    let user = docker.docker(&["exec", "-u", "33", "one", "id", "-u"]);
    assert_eq!(user.exits(0).stdout, "33\n");
    let tty = docker.command(&["exec", "-it", "one", "sh", "-c", "tty; exit 6"]);
    let tty = Terminal::start(tty, 80, 24);
    tty.shows("/dev/pts/");
    assert_eq!(tty.end(), 6);
    docker
        .docker(&["exec", "-d", "one", "touch", "/kept"])
        .exits(0);
    let kept = "until test -e /kept; do sleep 0.1; done";
    docker.docker(&["exec", "one", "sh", "-c", kept]).exits(0);

    // Files go both ways, by the directory that the container has on the host.
    let file = docker.place.dir.join("file");
    std::fs::write(&file, "copied").unwrap();
    let file = file.to_str().unwrap();
    docker.docker(&["cp", file, "one:/file"]).exits(0);
    let read = docker.docker(&["exec", "one", "cat", "/file"]).exits(0);
    assert_eq!(read.stdout, "copied");
    let back = format!("{file}.back");
    docker.docker(&["cp", "one:/file", &back]).exits(0);
    assert_eq!(std::fs::read_to_string(&back).unwrap(), "copied");

    // What stands for the container on the host, and nothing of the host's else.
    let top = docker.docker(&["top", "one"]).exits(0).stdout;
    assert_eq!(top.lines().count(), 2, "{top}");
    assert!(top.contains("serve-bundle"), "{top}");

    docker.docker(&["pause", "one"]).exits(0);
    assert_eq!(docker.shows("one", "{{.State.Status}}"), "paused");
    docker.docker(&["unpause", "one"]).exits(0);
    docker.docker(&["exec", "one", "true"]).exits(0);

    docker.docker(&["stop", "one"]).exits(0);
    let ended = docker.shows("one", "{{.State.Status}} {{.State.ExitCode}}");
    assert_eq!(ended, "exited 3");
    docker.until_logs("one", "bye");
    docker.place.assert_nothing_left();
    // What it wrote is still there.
    docker.docker(&["start", "one"]).exits(0);
    docker
        .docker(&["exec", "one", "test", "-e", "/kept"])
        .exits(0);
    docker.docker(&["restart", "--time=60", "one"]).exits(0);
    docker.docker(&["kill", "one"]).exits(0);
    assert_eq!(docker.docker(&["wait", "one"]).exits(0).stdout, "137\n");
    docker.docker(&["start", "one"]).exits(0);
    docker.docker(&["rm", "--force", "one"]).exits(0);
    docker.assert_nothing_left();
}

#[test]
fn containers_are_on_its_networks_and_publish_ports() {
    let docker = Docker::start();
    let serve = "python3 -m http.server --directory /etc 7000";
    docker.detached(
        &["--name=web", "--publish=17000:7000"],
        &["sh", "-c", serve],
    );
    let address = docker.shows("web", "{{.NetworkSettings.IPAddress}}");
    let gateway = docker.shows("web", "{{.NetworkSettings.Gateway}}");
    assert!(address.starts_with("172."), "{address}");
    let fetch = |from: &str| {
        format!(
            "import urllib.request as r; print(r.urlopen('http://{from}/debian_version', timeout=60).read().decode(), end='')"
        )
    };
    let on_the_node = |from: &str| docker.on_the_node("python3", &["-c", &fetch(from)]);
    until("it serves", || {
        on_the_node(&format!("{address}:7000")).code == 0
    });
    let version = on_the_node(&format!("{address}:7000")).exits(0).stdout;
    assert!(version.starts_with("12."), "{version}");
    for node in [&*gateway, "127.0.0.1"] {
        let through = on_the_node(&format!("{node}:17000"));
        assert_eq!(through.exits(0).stdout, version, "by {node}");
    }
    // From another container, which knows the first by its name.
    let ask = fetch("web:7000");
    let add_host = format!("--add-host=web:{address}");
    let run = docker.run(&["--rm", &add_host], &["python3", "-c", &ask]);
    assert_eq!(run.exits(0).stdout, version);
    docker.docker(&["rm", "--force", "web"]).exits(0);
    docker.assert_nothing_left();
}

/// Docker takes shims of containerd's for runtimes, without being told of them, since 23.
#[test]
fn containerds_shim_is_a_runtime_of_its_own() {
    let docker = Docker::start();
    let run = |options: &[&str], program: &[&str]| {
        let runtime = ["run", "--runtime=io.containerd.walnut.v2", NO_NETWORK];
        docker.docker(&[&runtime, options, &["demo"], program].concat())
    };
    if docker.version() < 23 {
        let refused = run(&["--rm"], &["true"]).exits(125);
        assert!(refused.stderr.contains("Unknown runtime"), "{refused:#?}");
        return docker.assert_nothing_left();
    }
    let done = run(&["--rm"], &["sh", "-c", "uname -r; exit 7"]).exits(7);
    assert!(done.stdout.trim().ends_with("-walnut"), "{done:#?}");
    run(&["-d", "--name=one"], &["sh", "-c", WAITS]).exits(0);
    docker.until_logs("one", "up");
    let exec = docker.docker(&["exec", "one", "sh", "-c", "echo in; exit 8"]);
    assert_eq!(exec.exits(8).stdout, "in\n");
    docker.docker(&["stop", "one"]).exits(0);
    assert_eq!(docker.shows("one", "{{.State.ExitCode}}"), "3");
    docker.docker(&["rm", "one"]).exits(0);
    docker.assert_nothing_left();
}

#[test]
fn docker_is_told_of_what_was_killed() {
    let docker = Docker::start();
    for name in ["containerd-shim-walnut-v2", machine().0] {
        docker.detached(&["--name=one", NO_NETWORK], &["sleep", "infinity"]);
        docker.place.kill_process(name);
        let code = docker.docker(&["wait", "one"]).exits(0);
        assert_eq!(code.stdout, "137\n", "{name} was killed: {code:#?}");
        docker.until_shows("one", "{{.State.Status}}", "exited");
        docker.docker(&["rm", "one"]).exits(0);
        docker.assert_nothing_left();
    }
    // docker itself: containers live on.
    docker.detached(&["--name=one", NO_NETWORK], &["sh", "-c", WAITS]);
    docker.until_logs("one", "up");
    docker.restart();
    docker.until_shows("one", "{{.State.Status}}", "running");
    docker.docker(&["exec", "one", "true"]).exits(0);
    docker.docker(&["stop", "one"]).exits(0);
    assert_eq!(docker.shows("one", "{{.State.ExitCode}}"), "3");
    docker.docker(&["rm", "one"]).exits(0);
    docker.assert_nothing_left();
}
