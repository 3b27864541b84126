//! Containers on networks.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Stdio},
};

use serde_json::json;
use walnut_tests::{Namespace, client::finish, driver, unique, until, upgrade::another_shim};

use crate::{engine::Engine, place::Place};

/// Puts a link into `pod`, to one of `node`'s that is called as it is, with "up-" before.
fn link(pod: &Namespace, node: &Namespace, name: &str, address: &str) {
    pod.ip(&format!("link add {name} type veth peer name up-{name}"));
    pod.ip(&format!("link set up-{name} netns {}", node.pid()));
    node.ip(&format!("addr add {address}.1/24 dev up-{name}"));
    node.ip(&format!("link set up-{name} up"));
    pod.ip(&format!("addr add {address}.2/24 dev {name}"));
    pod.ip(&format!("link set {name} up"));
}

/// Whether there is somebody at an address, who says that nobody listens: a guest, for
/// nobody else has an address on the way.
fn is_there(node: &Namespace, address: &str) -> bool {
    is_there_for(node, "0.0.0.0", address)
}

/// The same, for who asks from an address.
fn is_there_for(node: &Namespace, from: &str, address: &str) -> bool {
    let reach = format!(
        "import socket
try: socket.create_connection(('{address}', 9), 5, ('{from}', 0))
except ConnectionRefusedError: print('refused')
except OSError: print('nobody')"
    );
    let mut python = node.within("python3");
    finish(python.args(["-c", &reach]), b"").exits(0).stdout == "refused\n"
}

/// A bundle whose container stays, in `pod`.
fn bundle_in(place: &Place, pod: &Namespace) -> PathBuf {
    place.bundle("while :; do sleep 1; done", |config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        for one in namespaces.iter_mut().filter(|n| n["type"] == "network") {
            one["path"] = json!(pod.path());
        }
    })
}

fn taps(pod: &Namespace) -> usize {
    let done = finish(pod.within("ip").args(["-brief", "link"]), b"").exits(0);
    done.stdout.matches("walnut").count()
}

#[test]
fn a_bundle_has_the_links_of_the_namespace_that_it_names() {
    let place = Place::new();
    let id = unique("oci-links");
    let (pod, node) = (Namespace::new(), Namespace::new());
    pod.ip("link set lo up");
    link(&pod, &node, "one", "192.0.2");
    link(&pod, &node, "two", "198.51.100");
    place.start(&id, &bundle_in(&place, &pod));
    for address in ["192.0.2.2", "198.51.100.2"] {
        assert!(is_there(&node, address), "{address}");
    }
    let links = place.oci(&["exec", &id, "ls", "/sys/class/net"]).exits(0);
    assert_eq!(links.stdout, "lo\none\ntwo\n");
    place.oci(&["delete", "--force", &id]).exits(0);
    until("no tap is left", || taps(&pod) == 0);
    place.assert_nothing_left();
}

#[test]
fn links_change_come_and_go_while_a_container_runs() {
    let place = Place::new();
    let id = unique("oci-plugs");
    let (pod, node) = (Namespace::new(), Namespace::new());
    pod.ip("link set lo up");
    link(&pod, &node, "one", "192.0.2");
    link(&pod, &node, "two", "198.51.100");
    place.start(&id, &bundle_in(&place, &pod));
    let shows = |file: &str| place.oci(&["exec", &id, "cat", file]).exits(0).stdout;
    let links = || {
        let done = place.oci(&["exec", &id, "ls", "/sys/class/net"]);
        done.exits(0).stdout
    };

    // What links have changes, and what the guest was told before stays.
    pod.ip("route add 203.0.113.0/24 via 198.51.100.1 dev two");
    until("the route is the guest's", || {
        shows("/proc/net/route").contains("two\t007100CB\t016433C6")
    });
    pod.ip("addr add 192.0.2.3/24 dev one");
    pod.ip("addr add fd00:2::2/64 dev one nodad");
    pod.ip("link set one mtu 1400");
    pod.ip("route delete 203.0.113.0/24");
    pod.ip("addr delete 198.51.100.2/24 dev two");
    pod.ip("addr add 198.51.100.4/24 dev two");
    until("the addresses are the guest's", || {
        is_there(&node, "192.0.2.3") && is_there(&node, "198.51.100.4")
    });
    assert!(!is_there(&node, "198.51.100.2"));
    until("the rest is", || {
        shows("/sys/class/net/one/mtu") == "1400\n"
            && shows("/proc/net/if_inet6").contains("fd000002000000000000000000000002")
            && !shows("/proc/net/route").contains("007100CB")
    });
    assert!(is_there(&node, "192.0.2.2"));

    // Down and up, on either side.
    pod.ip("link set two down");
    until("two is down", || {
        shows("/sys/class/net/two/operstate") == "down\n"
    });
    pod.ip("link set two up");
    until("two is up again", || is_there(&node, "198.51.100.4"));
    for state in ["down", "up"] {
        node.ip(&format!("link set up-one {state}"));
    }
    until("one is there again", || is_there(&node, "192.0.2.2"));

    // The links are its own when another program has taken its supervisor's place.
    place.becomes(&id, &another_shim(&place.dir, "a"));
    pod.ip("addr add 192.0.2.4/24 dev one");
    until("another address is the guest's", || {
        is_there(&node, "192.0.2.4")
    });

    // One that goes, and the other goes on.
    pod.ip("link delete two");
    until("the guest has lost it", || links() == "lo\none\n");
    until("its tap is gone", || taps(&pod) == 1);
    assert!(is_there(&node, "192.0.2.2"));

    // What cannot be the guest's harms nothing: this one is no Ethernet link.
    pod.ip("tuntap add dev point mode tun");
    pod.ip("link set point up");
    // Again and again, where machines take links that come.
    for turn in 1..4 {
        link(&pod, &node, "two", "198.51.100");
        pod.ip("route add 203.0.113.0/24 via 198.51.100.1 dev two");
        if driver() != "vmm" {
            println!("machines of {} take no link that comes", driver());
            break;
        }
        until("two is the guest's again", || {
            is_there(&node, "198.51.100.2")
        });
        assert_eq!(links(), "lo\none\ntwo\n", "{turn}");
        until("its route is", || {
            shows("/proc/net/route").contains("two\t007100CB\t016433C6")
        });
        pod.ip("link delete two");
        until("the guest has lost it", || links() == "lo\none\n");
    }
    pod.ip("addr add 192.0.2.5/24 dev one");
    until("another address is the guest's", || {
        is_there(&node, "192.0.2.5")
    });

    // The last one as well.
    pod.ip("link delete one");
    until("the guest has lost it", || links() == "lo\n");
    place.oci(&["delete", "--force", &id]).exits(0);
    until("no tap is left", || taps(&pod) == 0);
    place.assert_nothing_left();
}

/// A program on a node, as long as it is in scope.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Says its name to whoever connects, at any address of its namespace's.
fn names(node: &Namespace, name: &str) -> Server {
    let program = format!(
        "import socket
server = socket.create_server(('', 7000))
print('ready', flush=True)
while True:
    peer = server.accept()[0]
    peer.sendall(b'{name}\\n')
    peer.close()"
    );
    let mut python = node.within("python3");
    python.args(["-c", &program]).stdout(Stdio::piped());
    let mut child = python.spawn().unwrap();
    let mut line = String::new();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    Server(child)
}

#[test]
fn routes_of_other_tables_rules_and_several_ways_are_the_guests() {
    let place = Place::new();
    let id = unique("oci-rules");
    let pod = Namespace::new();
    let nodes = [Namespace::new(), Namespace::new()];
    pod.ip("link set lo up");
    link(&pod, &nodes[0], "one", "192.0.2");
    link(&pod, &nodes[1], "two", "198.51.100");
    let mut _servers = Vec::new();
    for (node, name) in nodes.iter().zip(["first", "second"]) {
        node.ip("link set lo up");
        // All of it is that node's.
        node.ip("addr add 203.0.113.129/25 dev lo");
        _servers.push(names(node, name));
    }
    nodes[1].ip("addr add 203.0.113.9/32 dev lo");
    // Whichever way a connection takes, it has the first address if that was thought of first.
    nodes[1].ip("route add 192.0.2.0/24 via 198.51.100.2 dev up-two");
    // As `sbr` has it: what comes from the second address leaves by the second link.
    for words in [
        "route add default via 192.0.2.1 dev one",
        "route add default via 198.51.100.1 dev two table 100",
        "rule add from 198.51.100.2/32 table 100 priority 1000",
        "route add 203.0.113.128/25 nexthop via 192.0.2.1 dev one nexthop via 198.51.100.1 dev two",
        "route add unreachable 10.9.0.0/16",
    ] {
        pod.ip(words);
    }
    place.start(&id, &bundle_in(&place, &pod));
    let answered = || is_there_for(&nodes[1], "203.0.113.9", "198.51.100.2");
    assert!(answered());
    // Which of two ways is taken depends on where to.
    let ask = "i=129; while [ $i -lt 161 ]; do \
               busybox nc -w 60 203.0.113.$i 7000 < /dev/null; i=$((i+1)); done";
    let said = || place.oci(&["exec", &id, "sh", "-c", ask]).exits(0).stdout;
    let all = said();
    assert_eq!(all.lines().count(), 32, "{all}");
    assert!(all.contains("first") && all.contains("second"), "{all}");
    let reach = ["exec", &id, "busybox", "nc", "-w", "60", "10.9.0.1", "1"];
    let refused = place.oci(&reach);
    assert!(refused.stderr.contains("o route to host"), "{refused:#?}");

    // All of it may change.
    pod.ip("rule delete priority 1000");
    until("the guest has lost the rule", || !answered());
    pod.ip("-4 rule add from 198.51.100.0/24 table 100 priority 1001");
    until("the guest has another one", answered);
    pod.ip("route replace 203.0.113.128/25 nexthop via 198.51.100.1 dev two");
    until("there is one way", || !said().contains("first"));
    pod.ip("route delete unreachable 10.9.0.0/16");
    pod.ip("link delete one");
    until("the guest has lost a link", || {
        let links = place.oci(&["exec", &id, "ls", "/sys/class/net"]);
        links.exits(0).stdout == "lo\ntwo\n"
    });
    assert!(answered());
    place.oci(&["delete", "--force", &id]).exits(0);
    place.assert_nothing_left();
}

#[test]
fn podmans_containers_are_on_its_networks_and_publish_ports() {
    let node = Namespace::new();
    node.ip("link set lo up");
    let engine = Engine::on(node);
    let serve = "python3 -m http.server --directory /etc 7000";
    let run = [
        "run",
        "-d",
        "--name=web",
        "--publish=17000:7000",
        "demo",
        "sh",
        "-c",
        serve,
    ];
    engine.podman(&run).exits(0);
    engine.note_all();
    let address = engine.shows("web", "{{.NetworkSettings.IPAddress}}");
    assert!(address.starts_with("10.76.0."), "{address}");
    let fetch = |from: &str| {
        format!(
            "import urllib.request as r; print(r.urlopen('http://{from}/debian_version', timeout=60).read().decode(), end='')"
        )
    };
    let on_the_node = |from: &str| engine.on_the_node("python3", &["-c", &fetch(from)]);
    until("it serves", || {
        on_the_node(&format!("{address}:7000")).code == 0
    });
    let version = on_the_node(&format!("{address}:7000")).exits(0).stdout;
    assert!(version.starts_with("12."), "{version}");
    let through_the_node = on_the_node("10.76.0.1:17000").exits(0).stdout;
    assert_eq!(through_the_node, version);
    // From another container, which knows the first by its name.
    let ask = fetch("web:7000");
    let add_host = format!("--add-host=web:{address}");
    let run = ["run", "--rm", &add_host, "demo", "python3", "-c", &ask];
    assert_eq!(engine.podman(&run).exits(0).stdout, version);
    engine
        .podman(&["rm", "--force", "--time=0", "web"])
        .exits(0);
    engine.assert_nothing_left();
}
