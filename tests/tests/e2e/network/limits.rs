//! Limits of what a guest may send and get, which a network's plugins set.

use std::fs;

use serde_json::{Value, json};
use walnut_tests::until;

use super::node::Node;

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
