//! Limits of what a guest may send and get: those that a network's plugins set, and those
//! that hold for a guest that floods.

use std::fs;

use serde_json::{Value, json};
use walnut_tests::{processes, until};

use super::{PAGE, SERVE, fetch, node::Node};

/// Bytes that go each way, and a limit's bytes a second.
const MUCH: u64 = 2_000_000;
const RATE: u64 = 1_000_000;

/// Sends all that it gets back, once it has got it.
const MIRROR: &str = "exec python3 -c '
import socket
server = socket.create_server((\"\", 7000))
while True:
    peer = server.accept()[0]
    data = b\"\"
    while part := peer.recv(65536):
        data += part
    peer.sendall(data)
    peer.close()
'";

fn mirrored(address: &str) -> String {
    format!(
        "
import socket
with socket.create_connection(('{address}', 7000), 60) as peer:
    peer.sendall(bytes({MUCH}))
    peer.shutdown(socket.SHUT_WR)
    back = 0
    while part := peer.recv(65536):
        back += len(part)
print(back)
"
    )
}

#[test]
fn limits_of_a_networks_plugins_hold_for_a_guest_in_both_directions() {
    let node = Node::new();
    node.walnut(&["network", "create", "slow"]).exits(0);
    let file = node.root.join("networks/slow.conflist");
    let mut list: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let bits = RATE * 8;
    list["plugins"].as_array_mut().unwrap().push(json!({
        "type": "bandwidth",
        "ingressRate": bits, "ingressBurst": bits / 20,
        "egressRate": bits, "egressBurst": bits / 20,
    }));
    fs::write(&file, list.to_string()).unwrap();
    let names = ["--name", "slow", "--network", "slow"];
    node.start(&[&names[..], &["IMAGE", "sh", "-c", MIRROR]].concat());
    let address = node.addresses("slow", "slow").remove(0);
    until("it listens", || {
        let reach = format!("import socket; socket.create_connection(('{address}', 7000), 5)");
        node.on_the_host(&reach).code == 0
    });
    let done = node.on_the_host(&mirrored(&address)).exits(0);
    assert_eq!(done.stdout.trim(), MUCH.to_string());

    // Both of the plugin's token buckets had all of it, and held some of it up.
    let shown = node.host_has("tc", &["-statistics", "-json", "qdisc", "show"]);
    let shown: Vec<Value> = serde_json::from_str(&shown).unwrap();
    let buckets: Vec<_> = shown.iter().filter(|it| it["kind"] == "tbf").collect();
    assert_eq!(buckets.len(), 2, "{shown:#?}");
    let on = |kind: &str| {
        let found = buckets.iter().find(|it| {
            let device = it["dev"].as_str().unwrap();
            device.starts_with(kind)
        });
        found.unwrap_or_else(|| panic!("no limit on {kind}: {buckets:#?}"))
    };
    // To the guest, and from it.
    for bucket in [on("veth"), on("bwp")] {
        assert_eq!(bucket["options"]["rate"], RATE, "{bucket:#}");
        assert!(bucket["bytes"].as_u64().unwrap() >= MUCH, "{bucket:#}");
        assert!(bucket["overlimits"].as_u64().unwrap() > 0, "{bucket:#}");
    }
    node.walnut(&["rm", "-f", "slow"]).exits(0);
    node.assert_nothing_left();
    let links = node.host_has("ip", &["-brief", "link"]);
    assert!(!links.contains("bwp"), "{links}");
    node.remove(&["slow"]);
}

/// Packets that have come from containers.
fn came(node: &Node) -> u64 {
    let shown = node.host_has("ip", &["-s", "-j", "link", "show", "type", "veth"]);
    let shown: Vec<Value> = serde_json::from_str(&shown).unwrap();
    let links = shown.iter().filter(|it| it["master"].is_string());
    links
        .map(|it| it["stats64"]["rx"]["packets"].as_u64().unwrap())
        .sum()
}

/// Memory of a container's processes on the host that is their own, in kB; of guests' memory
/// there may be some in it.
fn memory(id: &str) -> Vec<(String, u64)> {
    let mut all = Vec::new();
    for (pid, name) in processes(id) {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let words = line.and_then(|line| line.split_whitespace().next());
        if let Some(kb) = words.and_then(|kb| kb.parse().ok()) {
            all.push((format!("{name} {pid}"), kb));
        }
    }
    all
}

#[test]
fn a_guest_that_floods_harms_nobody_and_costs_no_memory() {
    /// Packets after which everything has the memory that it needs, and those after it.
    const WARM: u64 = 5_000;
    const FLOOD: u64 = 20_000;
    /// What may be more then, of each process, in kB.
    const MORE: u64 = 16 << 10;
    let node = Node::new();
    node.start(&["--name", "web", "IMAGE", "sh", "-c", SERVE]);
    let web = node.addresses("bridge", "web").remove(0);
    until("it serves", || {
        node.on_the_host(&fetch(&format!("{web}:80"))).code == 0
    });
    // Small ones, in all directions: to the other container, to the host, to nobody.
    let flood = format!(
        "exec python3 -c '
import socket
peers = [(\"{web}\", 9), (\"192.0.2.1\", 9), (\"10.64.3.200\", 9)]
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.setblocking(False)
while True:
    for peer in peers:
        try: sender.sendto(b\"x\" * 64, peer)
        except OSError: pass
'"
    );
    let id = node.start(&["--name", "flood", "IMAGE", "sh", "-c", &flood]);
    let began = came(&node);
    until("everything is warm", || came(&node) > began + WARM);
    let before = memory(&id);
    let warm = came(&node);
    // Others go on meanwhile.
    until("it floods", || {
        let page = node.on_the_host(&fetch(&format!("{web}:80"))).exits(0);
        assert_eq!(page.stdout.trim(), PAGE);
        came(&node) > warm + FLOOD
    });
    let after = memory(&id);
    assert!(!before.is_empty());
    for (process, kb) in &after {
        let was = before.iter().find(|(other, _)| other == process);
        let was = was.map_or(0, |(_, kb)| *kb);
        assert!(*kb < was + MORE, "{process}: {was} kB, then {kb} kB");
    }
    // It is still what it was, and is told to end.
    assert!(node.walnut(&["exec", "flood", "true"]).code == 0);
    node.walnut(&["rm", "-f", "flood", "web"]).exits(0);
    node.assert_nothing_left();
}
