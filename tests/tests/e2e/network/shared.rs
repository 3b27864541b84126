//! Containers that share another one's machine, and with that its network.

use std::fs;

use serde_json::Value;
use walnut_tests::{
    driver, unique, until,
    upgrade::{another_shim, upgraded},
};

use super::{Node, PAGE, SERVE, fetch, in_shell};

/// Another server, on the port that nginx had.
const OTHER: &str = "mkdir /tmp/www && cd /tmp/www && echo other > index.html && exec python3 -m http.server --bind :: 80";

fn record(node: &Node, id: &str) -> Value {
    let path = node.root.join("containers").join(id).join("container.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn status(node: &Node, id: &str) -> String {
    record(node, id)["status"].as_str().unwrap().to_owned()
}

/// A network, and a server on it, whose ID this is.
fn served(node: &Node, options: &[&str]) -> String {
    node.walnut(&["network", "create", "shop"]).exits(0);
    let names = ["--name", "web", "--hostname", "front", "--network", "shop"];
    let run = ["-p", "8080:80", "IMAGE", "sh", "-c", SERVE];
    let id = node.start(&[&names[..], options, &run].concat());
    let page = fetch("192.0.2.1:8080");
    until("it serves", || node.outside(&page).code == 0);
    id
}

#[test]
fn a_container_joins_anothers_machine_and_its_network() {
    let node = Node::new();
    let web = served(&node, &[]);
    let join = ["--network", "container:web"];
    let idle = ["IMAGE", "sleep", "infinity"];
    let side = node.start(&[&["--name", "side"], &join[..], &idle].concat());

    // One machine, one network; files and processes of its own.
    assert_eq!(
        record(&node, &web)["shim_pid"],
        record(&node, &side)["shim_pid"]
    );
    let inside = |name: &str, script: &str| {
        let done = node.walnut(&["exec", name, "sh", "-c", script]);
        done.exits(0).stdout
    };
    let page = inside("side", &in_shell(&fetch("127.0.0.1")));
    assert_eq!(page.trim(), PAGE);
    for script in [
        "hostname",
        "cat /etc/hosts /etc/resolv.conf /etc/hostname",
        "cat /proc/net/route",
        "readlink /proc/self/ns/net",
    ] {
        assert_eq!(inside("side", script), inside("web", script), "{script}");
    }
    assert_eq!(inside("side", "hostname"), "front\n");
    inside("web", "touch /tmp/here");
    inside("side", "test ! -e /tmp/here");
    assert_eq!(inside("side", "cat /proc/1/comm"), "sleep\n");
    assert_ne!(
        inside("side", "readlink /proc/self/ns/pid"),
        inside("web", "readlink /proc/self/ns/pid")
    );
    let mode = ["inspect", "-f", "{{.HostConfig.NetworkMode}}", "side"];
    let mode = node.walnut(&mode).exits(0).stdout;
    assert_eq!(mode, format!("container:{web}\n"));
    let shown = node.json(&["ps", "--format", "json"]);
    assert_eq!(shown.as_array().unwrap().len(), 2, "{shown}");

    others_come_and_go(&node, &web);

    // What is the other one's to say.
    let refused = |options: &[&str], part: &str| {
        node.fails(
            &[&["run"], &join[..], options, &["IMAGE", "true"]].concat(),
            part,
        );
    };
    refused(&["-p", "81:81"], "--publish: the network of a container");
    refused(&["--dns", "192.0.2.9"], "--dns: the network");
    refused(&["--add-host", "a:192.0.2.9"], "--add-host: the network");
    refused(&["--hostname", "own"], "--hostname: the host name");
    refused(&["-m", "64m"], "--memory: the machine");
    refused(&["--cpus", "1"], "--cpus: the machine");
    refused(&["--restart", "always"], "--restart always");
    refused(&["--network", "shop"], "excludes every other");
    let absent = ["run", "--network", "container:absent", "IMAGE", "true"];
    node.fails(&absent, "no such container: absent");

    // It ends, and its machine goes on, with the network that it had.
    node.walnut(&["stop", "-t", "0", "web"]).exits(0);
    assert_eq!(status(&node, &web), "exited");
    assert_eq!(status(&node, &side), "running");
    let goes_on = "its machine goes on for side";
    node.fails(&["rm", "web"], goes_on);
    node.fails(&["rm", "-f", "web"], goes_on);
    node.fails(&["start", "web"], goes_on);
    node.walnut(&["exec", "-d", "side", "sh", "-c", OTHER])
        .exits(0);
    let page = fetch("192.0.2.1:8080");
    until("the other one serves", || {
        node.outside(&page).stdout.trim() == "other"
    });

    // With the last one everything goes.
    node.walnut(&["stop", "-t", "0", "side"]).exits(0);
    node.assert_nothing_left();
    node.fails(&["start", "side"], "start web first");
    node.walnut(&["start", "web"]).exits(0);
    node.walnut(&["start", "side"]).exits(0);
    assert_eq!(inside("side", "hostname"), "front\n");
    node.walnut(&["rm", "-f", "side", "web"]).exits(0);
    node.assert_nothing_left();
    node.remove(&["shop"]);
}

/// Others join `web` and end: in front, with an output and an exit code; by who has joined
/// already; one that never starts; one that the machine cannot take.
fn others_come_and_go(node: &Node, web: &str) {
    let join = ["--network", "container:web"];
    if driver() != "vmm" {
        // Its disk is the one that there was to spare.
        let one_more = [&["run", "--rm"], &join[..], &["IMAGE", "true"]].concat();
        node.fails(&one_more, "--driver vmm");
        assert_eq!(status(node, web), "running");
        return;
    }
    let say = ["IMAGE", "sh", "-c", "echo here; echo there >&2; exit 7"];
    let front = [&["run", "--name", "short"], &join[..], &say].concat();
    let front = node.walnut(&front);
    assert_eq!(
        (front.code, &*front.stdout, &*front.stderr),
        (7, "here\n", "there\n")
    );
    let logs = node.walnut(&["logs", "short"]).exits(0);
    assert_eq!(logs.stdout, "here\n");
    let again = node.walnut(&["start", "-a", "short"]);
    assert_eq!((again.code, &*again.stdout), (7, "here\n"));
    node.walnut(&["rm", "short"]).exits(0);
    let through = ["run", "--rm", "--network", "container:side", "IMAGE"];
    let through = [&through[..], &["hostname"]].concat();
    assert_eq!(node.walnut(&through).exits(0).stdout, "front\n");
    let absent = [&["run", "--rm"], &join[..], &["IMAGE", "absent"]].concat();
    assert_eq!(node.walnut(&absent).code, 127);
    let shares = node.root.join("shared");
    fs::create_dir(&shares).unwrap();
    let volume = format!("{}:/shared", shares.display());
    let with = [
        &["run", "--rm", "-v", &volume],
        &join[..],
        &["IMAGE", "true"],
    ]
    .concat();
    node.fails(&with, "without a way to share them");
    assert_eq!(status(node, web), "running");
}

#[test]
fn whoever_of_a_shared_machine_is_killed_nothing_stays() {
    let node = Node::new();
    let web = served(&node, &[]);
    let join = ["--network", "container:web"];
    let idle = ["IMAGE", "sleep", "infinity"];

    // The command of one that has joined: that one alone goes.
    let front = [&["run", "--name", "front"], &join[..], &idle].concat();
    let mut front = node.command(&front).spawn().unwrap();
    let runs = |name: &str| {
        let all = node.json(&["ps", "--format", "json"]);
        let mut all = all.as_array().unwrap().iter();
        all.any(|c| c["name"] == name && c["status"] == "running")
    };
    until("it runs", || runs("front"));
    front.kill().unwrap();
    front.wait().unwrap();
    until("it has ended", || !runs("front"));
    node.walnut(&["rm", "-f", "front"]).exits(0);
    assert!(runs("web"));

    // Supervisor and machine are common.
    let (machine, _) = walnut_tests::machine();
    for victim in ["containerd-shim-walnut-v2", machine] {
        // In a machine that nobody has joined.
        node.walnut(&["restart", "-t", "0", "web"]).exits(0);
        let side = node.start(&[&join[..], &idle].concat());
        node.kill(&web, victim);
        until("both have ended", || {
            !runs("web") && node.json(&["ps", "--format", "json"]) == Value::Array(Vec::new())
        });
        assert_eq!(
            (status(&node, &web), status(&node, &side)),
            ("exited".into(), "exited".into())
        );
        node.assert_nothing_left();
        node.walnut(&["rm", &side]).exits(0);
    }
    node.walnut(&["rm", "web"]).exits(0);
    node.remove(&["shop"]);
}

#[test]
fn a_shared_machine_goes_on_under_another_supervisor() {
    let node = Node::new();
    let web = served(&node, &["--rm"]);
    let idle = ["IMAGE", "sleep", "infinity"];
    let join = ["--network", "container:web"];
    let side = node.start(&[&["--name", "side", "--rm"], &join[..], &idle].concat());
    let programs = std::env::temp_dir().join(unique("programs"));
    fs::create_dir(&programs).unwrap();
    let of = |mark: &str| another_shim(&programs, mark);
    upgraded(&node.root, &node.run, "web", &of("a"));
    if driver() == "vmm" {
        let late = [&["run", "--rm"], &join[..], &["IMAGE", "hostname"]].concat();
        assert_eq!(node.walnut(&late).exits(0).stdout, "front\n");
    }
    node.walnut(&["exec", "side", "true"]).exits(0);
    // Whose container is no more.
    node.walnut(&["stop", "-t", "0", "web"]).exits(0);
    assert_eq!(status(&node, &web), "exited");
    upgraded(&node.root, &node.run, "web", &of("b"));
    let here = ["exec", "side", "cat", "/etc/hostname"];
    assert_eq!(node.walnut(&here).exits(0).stdout, "front\n");
    node.walnut(&["stop", "-t", "0", "side"]).exits(0);
    until("both are gone", || {
        [&web, &side]
            .iter()
            .all(|id| !node.root.join("containers").join(id).exists())
    });
    node.assert_nothing_left();
    node.remove(&["shop"]);
    fs::remove_dir_all(&programs).unwrap();
}
