//! Wires as they are: what is lost and overtaken on the way, and what goes to many at once.

use walnut_tests::until;

use super::{Node, in_shell};

/// Bytes that go each way.
const MUCH: u64 = 400_000;

/// Sends all that it gets back, as it gets it.
const MIRROR: &str = "exec python3 -c '
import socket
server = socket.create_server((\"\", 7000))
while True:
    peer = server.accept()[0]
    while part := peer.recv(65536):
        peer.sendall(part)
    peer.close()
'";

/// Sends numbers and looks whether the same come back, in their order.
fn mirrored(address: &str) -> String {
    format!(
        "
import socket, threading
sent = b''.join(n.to_bytes(4, 'big') for n in range({MUCH} // 4))
with socket.create_connection(('{address}', 7000), 170) as peer:
    def send():
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
    threading.Thread(target=send).start()
    back = bytearray()
    while part := peer.recv(65536):
        back += part
print('whole' if back == sent else f'{{len(back)}} bytes')
"
    )
}

#[test]
fn streams_are_whole_however_a_wire_loses_and_reorders() {
    let node = Node::new();
    // Towards the container, on the other host.
    let weather = "
import subprocess
rules = 'netem delay 2ms 1ms reorder 25% 50% loss 3%'
done = subprocess.run(f'tc qdisc add dev lan root {rules}'.split(), capture_output=True, text=True)
print(done.stderr.strip() or 'rough')
";
    let rough = node.outside(weather).exits(0).stdout;
    if rough != "rough\n" {
        eprintln!(
            "skipped: this kernel has no netem ({}); the lab's has",
            rough.trim()
        );
        return;
    }
    let run = ["-p", "7000:7000", "IMAGE", "sh", "-c", MIRROR];
    let id = node.start(&run);
    let mirrored = mirrored("192.0.2.1");
    until("it comes back whole", || {
        node.outside(&mirrored).stdout == "whole\n"
    });
    let counts = "import subprocess; print(subprocess.run('tc -s qdisc show dev lan'.split(), capture_output=True, text=True).stdout)";
    let counts = node.outside(counts).exits(0).stdout;
    let mut words = counts
        .split([' ', ',', '('])
        .skip_while(|w| *w != "dropped");
    let dropped: u64 = words.nth(1).unwrap().parse().unwrap();
    assert!(dropped > 0, "nothing was lost: {counts}");
    node.walnut(&["rm", "-f", &id]).exits(0);
    node.assert_nothing_left();
    node.remove(&["bridge"]);
}

/// Joins a group, says so, and prints what comes.
fn listens(family: &str) -> String {
    let (group, join) = match family {
        "AF_INET" => (
            "239.1.2.3",
            "s.setsockopt(0, socket.IP_ADD_MEMBERSHIP, socket.inet_aton('239.1.2.3') + bytes(4))",
        ),
        _ => (
            "ff05::1:3",
            "s.setsockopt(41, socket.IPV6_JOIN_GROUP, socket.inet_pton(s.family, 'ff05::1:3') + socket.if_nametoindex('eth0').to_bytes(4, 'little'))",
        ),
    };
    in_shell(&format!(
        "
import socket
s = socket.socket(socket.{family}, socket.SOCK_DGRAM)
s.bind(('{group}', 7001))
{join}
print('joined', flush=True)
print(s.recv(100).decode(), flush=True)
"
    ))
}

#[test]
fn what_is_for_many_reaches_all_who_have_joined() {
    let node = Node::new();
    node.walnut(&["network", "create", "--ipv6", "many"])
        .exits(0);
    let on = ["--network", "many"];
    let all: Vec<_> = ["AF_INET", "AF_INET6", "AF_INET"]
        .iter()
        .map(|family| {
            let script = listens(family);
            node.start(&[&on[..], &["IMAGE", "sh", "-c", &script]].concat())
        })
        .collect();
    let logs = |id: &String| node.walnut(&["logs", id]).exits(0).stdout;
    until("all have joined", || {
        all.iter().all(|id| logs(id).starts_with("joined\n"))
    });
    let says = "
import socket, time
while True:
    for family, group in ((socket.AF_INET, '239.1.2.3'), (socket.AF_INET6, 'ff05::1:3')):
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            if family == socket.AF_INET6:
                s.setsockopt(41, socket.IPV6_MULTICAST_IF, socket.if_nametoindex('eth0'))
            s.sendto(b'to all', (group, 7001))
    time.sleep(0.05)
";
    let script = in_shell(says);
    let speaker = node.start(&[&on[..], &["IMAGE", "sh", "-c", &script]].concat());
    until("all have heard it", || {
        all.iter().all(|id| logs(id) == "joined\nto all\n")
    });
    node.walnut(&["rm", "-f", &speaker]).exits(0);
    for id in &all {
        node.walnut(&["rm", "-f", id]).exits(0);
    }
    node.assert_nothing_left();
    node.remove(&["many"]);
}
