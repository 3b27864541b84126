//! Containers on networks.

use serde_json::json;
use walnut_tests::{Namespace, client::finish, unique, until};

use crate::{engine::Engine, place::Place};

#[test]
fn a_bundle_has_the_links_of_the_namespace_that_it_names() {
    let place = Place::new();
    let id = unique("oci-links");
    let (pod, node) = (Namespace::new(), Namespace::new());
    pod.ip("link set lo up");
    for (link, address) in [("one", "192.0.2"), ("two", "198.51.100")] {
        pod.ip(&format!("link add {link} type veth peer name up-{link}"));
        pod.ip(&format!("link set up-{link} netns {}", node.pid()));
        pod.ip(&format!("link set {link} up"));
        pod.ip(&format!("addr add {address}.2/24 dev {link}"));
        node.ip(&format!("link set up-{link} up"));
        node.ip(&format!("addr add {address}.1/24 dev up-{link}"));
    }
    let bundle = place.bundle("while :; do sleep 1; done", |config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        for one in namespaces.iter_mut().filter(|n| n["type"] == "network") {
            one["path"] = json!(pod.path());
        }
    });
    place.start(&id, &bundle);
    for address in ["192.0.2.2", "198.51.100.2"] {
        // Nobody listens, which only the guest can say.
        let reach = format!(
            "import socket
try: socket.create_connection(('{address}', 9), 60)
except ConnectionRefusedError: print('refused')"
        );
        let mut python = node.within("python3");
        let done = finish(python.args(["-c", &reach]), b"").exits(0);
        assert_eq!(done.stdout, "refused\n");
    }
    let links = place.oci(&["exec", &id, "ls", "/sys/class/net"]).exits(0);
    assert_eq!(links.stdout, "lo\none\ntwo\n");
    place.oci(&["delete", "--force", &id]).exits(0);
    until("no tap is left", || {
        let done = finish(pod.within("ip").args(["-brief", "link"]), b"").exits(0);
        !done.stdout.contains("walnut")
    });
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
