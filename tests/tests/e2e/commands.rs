//! The command's verbs.

use serde_json::Value;
use walnut_tests::{Detached, assert_nothing_left, host, run, spawn_run, unique, until, walnut};

#[test]
fn a_container_behind_lives_and_ends() {
    let box_ = Detached::start(&[
        "IMAGE",
        "sh",
        "-c",
        "echo out; echo err >&2; exec sleep infinity",
    ]);
    let record = box_.record().unwrap();
    assert_eq!(record["status"], "running");
    assert_eq!(record["name"], box_.name.as_str());
    let table = walnut(&["ps"]).exits(0);
    assert!(table.text().contains(&box_.id[..12]) && table.text().contains("up "));
    until("its output is in the log", || {
        let logs = walnut(&["logs", &box_.name]).exits(0);
        logs.text() == "out" && logs.stderr == "err\n"
    });
    walnut(&["rm", &box_.name]).fails(1, "stop it first, or use -f");
    walnut(&["kill", "-s", "KILL", &box_.id[..8]]).exits(0);
    let record = box_.ended();
    assert_eq!(record["exit_code"], 137);
    assert_nothing_left(&box_.id);
    assert_eq!(walnut(&["logs", &box_.name]).text(), "out");
    walnut(&["exec", &box_.name, "true"]).fails(125, "not running");
    walnut(&["rm", &box_.name]).exits(0);
    walnut(&["logs", &box_.name]).fails(125, "no such container");
}

#[test]
fn stop_asks_first_and_then_kills() {
    let gentle = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
    let box_ = Detached::start(&["IMAGE", "sh", "-c", gentle]);
    box_.exec(&["true"]).exits(0);
    walnut(&["stop", &box_.name]).exits(0);
    assert_eq!(box_.record().unwrap()["exit_code"], 0);
    let stubborn = "trap '' TERM; while :; do sleep 0.1; done";
    let box_ = Detached::start(&["IMAGE", "sh", "-c", stubborn]);
    box_.exec(&["true"]).exits(0);
    walnut(&["stop", "-t", "1", &box_.name]).exits(0);
    assert_eq!(box_.record().unwrap()["exit_code"], 137);
}

#[test]
fn a_container_behind_with_rm_goes_by_itself() {
    let box_ = Detached::start(&["--rm", "IMAGE", "sh", "-c", "sleep 0.2"]);
    until("it is gone", || box_.record().is_none());
    assert!(!host().root.join("containers").join(&box_.id).exists());
}

#[test]
fn logs_are_followed_to_the_end() {
    let box_ = Detached::start(&[
        "IMAGE",
        "sh",
        "-c",
        "for i in 1 2 3; do echo $i; sleep 0.2; done",
    ]);
    let done = walnut(&["logs", "-f", &box_.name]).exits(0);
    assert_eq!(done.text(), "1\n2\n3");
    let stamped = walnut(&["logs", "-t", &box_.name]).exits(0);
    assert!(
        stamped.text().lines().all(|l| l.contains("Z ")),
        "{stamped:#?}"
    );
}

#[test]
fn users_directories_and_variables() {
    let show = "id; pwd; hostname; echo $A,$B";
    let done = run(&[
        "-u",
        "www-data",
        "-w",
        "/var",
        "--hostname",
        "nut",
        "-e",
        "A=x y",
        "-e",
        "B=",
        "IMAGE",
        "sh",
        "-c",
        show,
    ])
    .exits(0);
    assert_eq!(
        done.text(),
        "uid=33(www-data) gid=33(www-data) groups=33(www-data)\n/var\nnut\nx y,"
    );
    let done = run(&["-u", "1234:5678", "IMAGE", "id"]).exits(0);
    assert_eq!(done.text(), "uid=1234 gid=5678 groups=5678");
    run(&["-u", "nosuch", "IMAGE", "id"]).fails(125, "unable to find user nosuch");
    // The image's own environment and directory.
    let done = run(&["IMAGE", "sh", "-c", "echo $WALNUT_DEMO; pwd"]).exits(0);
    assert_eq!(done.text(), "yes\n/srv");
    let done = run(&["--entrypoint", "echo", "IMAGE", "-n", "a"]).exits(0);
    assert_eq!(done.text(), "a");
}

#[test]
fn a_read_only_root_refuses_writes() {
    let done = run(&[
        "--read-only",
        "IMAGE",
        "sh",
        "-c",
        "touch /x 2>&1; echo $?; touch /dev/shm/x",
    ]);
    assert!(done.text().contains("Read-only file system"), "{done:#?}");
    let done = run(&[
        "IMAGE",
        "sh",
        "-c",
        "echo 1 > /x; rm /etc/passwd; cat /x; ls /etc/passwd",
    ]);
    assert_eq!(done.code, 2, "{done:#?}");
    let done = run(&["IMAGE", "sh", "-c", "ls /x; ls /etc/passwd"]);
    assert_eq!(done.text(), "/etc/passwd", "the image is as it was");
}

#[test]
fn names_are_unique_and_checked() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    run(&["--name", &box_.name, "IMAGE", "true"]).fails(125, "is in use by container");
    run(&["--name", "../x", "IMAGE", "true"]).fails(125, "beginning with a letter or digit");
    assert_eq!(box_.record().unwrap()["status"], "running");
}

#[test]
fn bad_requests_are_refused_before_anything_starts() {
    for (args, says) in [
        (vec!["--memory", "1x", "IMAGE"], "unknown unit"),
        (vec!["--cpus", "0", "IMAGE"], "a number from"),
        (
            vec!["-v", "a b:/data", "IMAGE"],
            "for a directory write ./a b",
        ),
        (vec!["-v", "/a:b", "IMAGE"], "must be absolute"),
        (vec!["--driver", "xen", "IMAGE"], "invalid value"),
        (vec![], "required arguments"),
    ] {
        let done = run(&args).exits(2);
        assert!(done.stderr.contains(says), "{says}: {done:#?}");
    }
    run(&["-w", "relative", "IMAGE", "true"]).fails(125, "must be an absolute path");
    let missing = format!(
        "{}/none/such:latest",
        host().image.split('/').next().unwrap()
    );
    run(&[&missing, "true"]).fails(125, "none/such");
    run(&["--pull", "never", "never/pulled", "true"]).fails(125, "never/pulled");
    walnut(&["stop", "nosuchcontainer"]).fails(1, "no such container");
}

#[test]
fn images_are_listed_and_pulled_once() {
    let again = walnut(&["pull", &host().image]).exits(0);
    assert!(!again.stderr.contains("fetched"), "{again:#?}");
    let all: Vec<Value> =
        serde_json::from_slice(&walnut(&["images", "--format", "json"]).stdout).unwrap();
    let entry = all
        .iter()
        .find(|i| {
            i["names"]
                .as_array()
                .is_some_and(|n| n.contains(&host().image.as_str().into()))
        })
        .expect("the image is listed");
    let id = entry["id"].as_str().unwrap();
    let done = run(&[&id["sha256:".len()..][..12], "echo", "by its ID"]).exits(0);
    assert_eq!(done.text(), "by its ID");
}

#[test]
fn check_agrees_with_itself() {
    let done = walnut(&["check", "--format", "json"]).exits(0);
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    let auto = report["auto"]["driver"].as_str().unwrap();
    let usable = report["kvm"]["state"] == "usable";
    assert!(
        (auto == "vmm") == usable && !report["auto"]["reason"].as_str().unwrap().is_empty(),
        "{report:#}"
    );
    for name in ["settings", "containerd", "podman"] {
        let items = report["items"].as_array().unwrap();
        let item = items.iter().find(|item| item["name"] == name);
        assert!(!item.unwrap()["detail"].as_str().unwrap().is_empty());
    }
    let table = walnut(&["check"]).exits(0);
    assert!(
        table.text().contains(&format!("auto: {auto}: ")),
        "{table:#?}"
    );
    walnut(&["version"]).exits(0);
}

#[test]
fn four_at_once_in_front() {
    let name = unique("n");
    std::thread::scope(|scope| {
        for n in 0..4 {
            let name = format!("{name}-{n}");
            scope.spawn(move || {
                let done = spawn_run(&["--rm", "--name", &name, "IMAGE", "echo", &name], |_| {})
                    .wait()
                    .exits(0);
                assert_eq!(done.text(), name);
                assert_nothing_left(&done.id.unwrap());
            });
        }
    });
}
