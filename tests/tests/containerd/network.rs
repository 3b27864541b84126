//! Pods on a network that CNI's plugins make.

use k8s_cri::v1::{ExecSyncResponse, PortMapping};
use walnut_tests::until;

use crate::{daemon::Daemon, kubelet::Kubelet};

/// Answers each connection and datagram to port 7000, of either family, with what was sent.
pub(crate) const ECHO: &str = r#"exec python3 -c '
import socket, threading
def streams():
    server = socket.create_server(("::", 7000), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        peer = server.accept()[0]
        threading.Thread(target=echo, args=(peer,)).start()
def echo(peer):
    with peer:
        while data := peer.recv(65536):
            peer.sendall(data)
threading.Thread(target=streams).start()
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
server.bind(("::", 7000))
while True:
    data, peer = server.recvfrom(65536)
    server.sendto(data, peer)
'"#;

/// A program that has bytes sent back by an echo: many in a stream, one datagram.
fn asks(address: &str, port: u16) -> String {
    format!(
        r#"
import socket, hashlib, os, sys, threading
data = os.urandom(3_000_000)
with socket.create_connection(("{address}", {port}), 60) as stream:
    def send():
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
    threading.Thread(target=send).start()
    back = b""
    while part := stream.recv(65536):
        back += part
assert back == data, len(back)
family = socket.AF_INET6 if ":" in "{address}" else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as peer:
    peer.settimeout(60)
    peer.sendto(b"x" * 1000, ("{address}", {port}))
    assert peer.recv(65536) == b"x" * 1000
print("same")
"#
    )
}

/// The first part of [`asks`].
fn only_stream(asks: &str) -> String {
    asks.split("family =").next().unwrap().to_owned() + "print('same')"
}

fn text(done: &ExecSyncResponse) -> String {
    assert_eq!(done.exit_code, 0, "{done:?}");
    String::from_utf8_lossy(&done.stdout).into_owned()
}

#[test]
fn pods_are_on_the_network_that_their_plugins_made() {
    let daemon = Daemon::start_with_pod_network();
    let kubelet = Kubelet::new(&daemon);
    let port = PortMapping {
        container_port: 7000,
        host_port: 17000,
        ..Default::default()
    };
    let server = kubelet.run_networked_pod(&daemon, vec![port]);
    // This one's machine is a clone, which gets its link as it begins.
    daemon.until_there_is_a_template();
    let client = kubelet.run_networked_pod(&daemon, vec![]);
    assert_eq!(daemon.clones(), 1);
    let echo = kubelet.run(&server, "echo", ECHO);
    let idle = kubelet.run(&client, "idle", "exec sleep 1000");

    // The guest has what the plugin gave the pod: addresses, MTU, routes, address of the link.
    let addresses = kubelet.addresses(&server);
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    let seen =
        "cat /sys/class/net/eth0/mtu; cat /proc/net/route /proc/net/if_inet6 /proc/net/fib_trie";
    let seen = text(&kubelet.exec(&echo, seen));
    assert!(seen.starts_with("1400\n"), "{seen}");
    assert!(seen.contains("eth0\t00000000\t01004D0A"), "{seen}");
    assert!(seen.contains(&addresses[0]), "{seen}");
    assert!(seen.contains("fd77000000000000000000000000000"), "{seen}");

    // From pod to pod, and from the node, over both families.
    for address in &addresses {
        until("the echo listens", || {
            let reach = format!("import socket; socket.create_connection(('{address}', 7000), 5)");
            daemon.on_the_node(&["python3", "-c", &reach]).code == 0
        });
        let asks = asks(address, 7000);
        let done = daemon.on_the_node(&["python3", "-c", &asks]).exits(0);
        assert_eq!(done.stdout, "same\n");
        let done = kubelet.exec(&idle, &format!("python3 -c '{asks}'"));
        assert_eq!(text(&done), "same\n");
    }
    // To the node, and through one of its ports.
    let through = asks("10.77.0.1", 17000);
    let stream = only_stream(&through);
    let done = daemon.on_the_node(&["python3", "-c", &stream]).exits(0);
    assert_eq!(done.stdout, "same\n");

    // As containerd does for `kubectl port-forward`: the namespace's loopback is the pod's.
    let namespace = format!("--net={}", kubelet.namespace(&server));
    for address in ["127.0.0.1", "::1"] {
        let stream = only_stream(&asks(address, 7000));
        let done = daemon.on_the_node(&["nsenter", &namespace, "python3", "-c", &stream]);
        assert_eq!(done.exits(0).stdout, "same\n");
    }
    let nobody = "import socket; print(socket.create_connection(('127.0.0.1', 7001), 60).recv(9))";
    let done = daemon.on_the_node(&["nsenter", &namespace, "python3", "-c", nobody]);
    assert!(done.code != 0 || done.stdout == "b''\n", "{done:#?}");

    kubelet.end_pod(&client);
    kubelet.end_pod(&server);
    daemon.assert_nothing_left();
    // The node has no link of theirs any more.
    let links = daemon
        .on_the_node(&["ip", "-brief", "link"])
        .exits(0)
        .stdout;
    assert!(
        !links.contains("veth") && !links.contains("walnut"),
        "{links}"
    );
}
