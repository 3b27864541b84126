//! A container's life by the command line alone.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use nix::{sys::signal::kill, unistd::Pid};
use serde_json::{Value, json};
use walnut_tests::{client::finish, driver, unique, until};

use crate::place::Place;

/// Ends with 3 when it is told to, and says that it waits for that.
const WAITS: &str = "trap 'exit 3' TERM; echo up; sleep 100000 & wait";

fn pid_in(file: &Path) -> i32 {
    fs::read_to_string(file).unwrap().parse().unwrap()
}

#[test]
fn every_command_does_what_it_says() {
    let place = Place::new();
    let bundle = place.bundle(WAITS, |config| config["annotations"] = json!({"a": "b"}));
    let pid_file = place.dir.join("pid");
    let id = unique("oci-life");
    let id = id.as_str();
    place
        .create(id, &bundle, &["--pid-file", pid_file.to_str().unwrap()])
        .exits(0);
    let pid = pid_in(&pid_file);
    let state = place.state(id);
    assert_eq!(state["status"], "created", "{state}");
    assert_eq!((&state["id"], &state["pid"]), (&json!(id), &json!(pid)));
    assert_eq!(state["bundle"], json!(bundle), "{state}");
    assert_eq!(state["annotations"]["a"], "b", "{state}");
    // The PID is that of a process of this host.
    kill(Pid::from_raw(pid), None).unwrap();
    let twice = place.create(id, &bundle, &[]).exits(1);
    assert!(twice.stderr.contains("already exists"), "{twice:#?}");

    place.oci(&["start", id]).exits(0);
    place.oci(&["start", id]).exits(1);
    assert_eq!(place.state(id)["status"], "running");
    let list = place.oci(&["list", "--format", "json"]).exits(0);
    let list: Value = serde_json::from_str(&list.stdout).unwrap();
    assert_eq!(list[0]["id"], id, "{list}");
    assert_eq!(list[0]["owner"], "root", "{list}");
    let quiet = place.oci(&["list", "-q"]).exits(0);
    assert_eq!(quiet.stdout, format!("{id}\n"));
    let ps = place.oci(&["ps", "--format", "json", id]).exits(0);
    let pids: Vec<i32> = serde_json::from_str(&ps.stdout).unwrap();
    assert_eq!(pids, [pid]);
    let ps = place.oci(&["ps", id]).exits(0);
    assert!(ps.stdout.lines().count() > 1, "{ps:#?}");
    let stats = place.oci(&["events", "--stats", id]).exits(0);
    let stats: Value = serde_json::from_str(&stats.stdout).unwrap();
    assert_eq!(
        (&stats["type"], &stats["id"]),
        (&json!("stats"), &json!(id))
    );
    assert!(stats["data"]["cpu"]["usage"]["total"].as_u64() > Some(0));

    place.oci(&["pause", id]).exits(0);
    assert_eq!(place.state(id)["status"], "paused");
    place.oci(&["pause", id]).exits(1);
    place.oci(&["exec", id, "true"]).exits(255);
    place.oci(&["resume", id]).exits(0);
    place.oci(&["resume", id]).exits(1);
    // Its machine grows with it, where it can.
    let total = || {
        let read = place.oci(&["exec", id, "cat", "/proc/meminfo"]).exits(0);
        let line = read.stdout.lines().next().unwrap();
        let kib = line.split_whitespace().nth(1).unwrap();
        kib.parse::<u64>().unwrap() >> 10
    };
    let before = total();
    let update = |memory: &str| place.oci(&["update", "--memory", memory, id]).exits(0);
    update(&(800 << 20).to_string());
    match driver() {
        "vmm" => assert!((850..950).contains(&total()), "{} MiB", total()),
        _ => assert_eq!(total(), before),
    }
    update(&(64 << 20).to_string());
    until("the machine is as small as it was", || {
        total() < before + 64
    });
    place.oci(&["update", "--pids-limit", "77", id]).exits(0);
    let limit = ["exec", id, "cat", "/sys/fs/cgroup/pids.max"];
    assert_eq!(place.oci(&limit).exits(0).stdout, "77\n");

    let early = place.oci(&["delete", id]).exits(1);
    assert!(early.stderr.contains("not stopped"), "{early:#?}");
    // What it would do with the signal is said by then.
    place.oci(&["exec", id, "true"]).exits(0);
    place.until_says(id, "up");
    place.oci(&["kill", id, "TERM"]).exits(0);
    place.until_is(id, "stopped");
    assert_eq!(place.state(id)["pid"], 0);
    let late = place.oci(&["kill", id]).exits(1);
    assert!(late.stderr.contains("container not running"), "{late:#?}");
    place.oci(&["exec", id, "true"]).exits(255);
    place.oci(&["delete", id]).exits(0);
    let gone = place.oci(&["state", id]).exits(1);
    assert!(gone.stderr.contains("does not exist"), "{gone:#?}");
    place.oci(&["delete", id]).exits(1);
    place.oci(&["delete", "--force", id]).exits(0);
}

#[test]
fn run_has_the_programs_streams_and_exit_code() {
    let place = Place::new();
    let bundle = place.bundle("echo out; echo err >&2; cat; exit 7", |_| ());
    let run = |bundle: &Path, input: &[u8]| {
        let id = unique("oci-run");
        place.note(&id);
        let args = ["run", "--bundle", bundle.to_str().unwrap(), &id];
        finish(&mut place.command(&args), input)
    };
    let done = run(&bundle, b"in\n").exits(7);
    assert_eq!((&*done.stdout, &*done.stderr), ("out\nin\n", "err\n"));
    // It has deleted the container.
    place.assert_nothing_left();
    let bundle = place.bundle("", |config| config["process"]["args"] = json!(["/no"]));
    let none = run(&bundle, b"").exits(1);
    assert!(none.stderr.contains("no such file"), "{none:#?}");
    place.assert_nothing_left();
}

#[test]
fn exec_runs_programs_in_front_and_behind() {
    let place = Place::new();
    let bundle = place.bundle(WAITS, |_| ());
    let id = unique("oci-exec");
    let id = id.as_str();
    place.start(id, &bundle);
    let script = "cat; echo $A; pwd; echo err >&2; exit 9";
    let args = ["exec", "-e", "A=b", "--cwd", "/bin", id, "sh", "-c", script];
    let done = finish(&mut place.command(&args), b"in\n").exits(9);
    assert_eq!((&*done.stdout, &*done.stderr), ("in\nb\n/bin\n", "err\n"));
    let none = place.oci(&["exec", id, "nowhere"]).exits(255);
    assert!(none.stderr.contains("not found in $PATH"), "{none:#?}");

    // podman's way: the process is a file's, and somebody waits for its PID.
    let process = json!({
        "args": ["sh", "-c", "touch /begun; until test -e /go; do sleep 0.1; done; exit 6"],
        "cwd": "/", "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/bin"],
    });
    let (file, pid_file) = (place.dir.join("process"), place.dir.join("exec-pid"));
    fs::write(&file, process.to_string()).unwrap();
    let behind = |process: &Path| {
        place
            .command(&["exec", "--detach", "--pid-file"])
            .arg(&pid_file)
            .arg("--process")
            .args([process, id.as_ref()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap()
    };
    assert_eq!(behind(&file).code(), Some(0));
    let pid = Pid::from_raw(pid_in(&pid_file));
    kill(pid, None).unwrap();
    place
        .oci(&[
            "exec",
            id,
            "sh",
            "-c",
            "until test -e /begun; do sleep 0.1; done",
        ])
        .exits(0);
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    assert_eq!(name, "walnut-oci\n", "it goes on while the process does");
    place.oci(&["exec", id, "touch", "/go"]).exits(0);
    until("the process ends", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
    let missing = json!({"args": ["nowhere"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
    fs::write(&file, missing.to_string()).unwrap();
    assert_eq!(behind(&file).code(), Some(255));

    // A container takes its processes along.
    let mut last = place.command(&["exec", id, "sleep", "7777"]);
    let mut last = last.stdin(Stdio::null()).spawn().unwrap();
    let sleeps = "until cat /proc/*/cmdline | busybox tr '\\0' ' ' | busybox grep -q 'sleep 777[7]'; \
                  do sleep 0.1; done";
    place.oci(&["exec", id, "sh", "-c", sleeps]).exits(0);
    place.oci(&["delete", "--force", id]).exits(0);
    assert_eq!(last.wait().unwrap().code(), Some(137));
}

#[test]
fn hooks_are_told_and_may_refuse() {
    let place = Place::new();
    let hook = |name: &str| {
        let file = place.dir.join(name);
        let script = format!("cat >{}", file.display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    let bundle = place.bundle("exit 0", |config| {
        config["hooks"] = json!({
            "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
            "poststart": hook("poststart"), "poststop": hook("poststop"),
        });
    });
    let id = unique("oci-hooks");
    let id = id.as_str();
    place.start(id, &bundle);
    place.until_is(id, "stopped");
    assert!(!place.dir.join("poststop").exists());
    place.oci(&["delete", id]).exits(0);
    for (name, status) in [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ] {
        let told = fs::read(place.dir.join(name)).unwrap();
        let told: Value = serde_json::from_slice(&told).unwrap();
        assert_eq!(told["status"], status, "{name}: {told}");
        assert_eq!(told["id"], id, "{name}: {told}");
        assert_eq!(told["pid"] != 0, name != "poststop", "{name}: {told}");
    }
    let bundle = place.bundle("exit 0", |config| {
        config["hooks"] = json!({"createRuntime": [{"path": "/bin/false"}]});
    });
    let refused = place.create(id, &bundle, &[]).exits(255);
    assert!(
        refused.stderr.contains("createRuntime hook"),
        "{refused:#?}"
    );
    place.oci(&["state", id]).exits(1);
    place.assert_nothing_left();
}

#[test]
fn what_needs_no_container_is_said_at_once() {
    let place = Place::new();
    let features = place.oci(&["features"]).exits(0);
    let features: Value = serde_json::from_str(&features.stdout).unwrap();
    assert!(features["ociVersionMax"].is_string(), "{features}");
    let version = place.oci(&["--version"]).exits(0);
    assert!(version.stdout.contains("spec: 1.0"), "{version:#?}");
    place.oci(&["nothing"]).exits(1);
    let log = place.dir.join("log");
    let state = [
        "--log",
        log.to_str().unwrap(),
        "--log-format=json",
        "state",
        "x",
    ];
    place.oci(&state).exits(1);
    let line: Value = serde_json::from_slice(&fs::read(&log).unwrap()).unwrap();
    assert_eq!(line["level"], "error", "{line}");
    assert!(
        line["msg"].as_str().unwrap().contains("does not exist"),
        "{line}"
    );
    // The other face of the program is as it was.
    let walnut = walnut_tests::client::repository().join("out/bin/walnut");
    let version = finish(Command::new(walnut).arg("version"), b"").exits(0);
    assert!(version.stdout.contains("walnut"), "{version:#?}");
}

#[test]
fn a_signal_to_its_pid_reaches_the_container() {
    let place = Place::new();
    // TERM, and what systemd is halted by.
    for (signal, code) in [(15, 3), (37, 9)] {
        let script = "trap 'exit 3' TERM; trap 'exit 9' 37; echo up; while :; do sleep 1; done";
        let bundle = place.bundle(script, |_| ());
        let id = unique("oci-signal");
        place.start(&id, &bundle);
        place.until_says(&id, "up");
        let pid = place.state(&id)["pid"].as_i64().unwrap();
        // SAFETY: kill takes numbers.
        assert_eq!(unsafe { libc::kill(pid.try_into().unwrap(), signal) }, 0);
        place.until_is(&id, "stopped");
        let state = place.root().join(&id).join("state.json");
        let state: Value = serde_json::from_slice(&std::fs::read(state).unwrap()).unwrap();
        assert_eq!(state["exit_code"], code, "{state}");
        place.oci(&["delete", &id]).exits(0);
    }
    place.assert_nothing_left();
}
