//! What another kernel cannot have is refused, with the reason, and leaves nothing.

use serde_json::json;
use walnut_tests::{Namespace, unique, until};

use crate::place::Place;

#[test]
fn namespaces_and_devices_of_the_host_are_refused() {
    let place = Place::new();
    let id = unique("oci-refused");
    let id = id.as_str();
    for (namespaces, devices, says) in [
        (json!([{"type": "mount"}]), json!([]), "PID namespace"),
        (
            json!([{"type": "mount"}, {"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}]),
            json!([]),
            "/proc/1/ns/ipc cannot be joined",
        ),
        (
            json!([{"type": "mount"}, {"type": "pid"}]),
            json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]),
            "/dev/sda is the host's",
        ),
    ] {
        let bundle = place.bundle("true", |config| {
            config["linux"]["namespaces"] = namespaces;
            config["linux"]["devices"] = devices;
        });
        let refused = place.create(id, &bundle, &[]).exits(1);
        assert!(refused.stderr.contains(says), "{refused:#?}");
        place.oci(&["state", id]).exits(1);
        place.assert_nothing_left();
    }
}

#[test]
fn a_network_that_it_cannot_have_is_refused_and_loopback_is_not() {
    let place = Place::new();
    let id = unique("oci-network");
    let id = id.as_str();
    let namespace = Namespace::new();
    let bundle = place.bundle("while :; do sleep 1; done", |config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        for one in namespaces.iter_mut().filter(|n| n["type"] == "network") {
            one["path"] = json!(namespace.path());
        }
    });
    namespace.ip("link set lo up");
    place.start(id, &bundle);
    // Its PID is in the namespace, for those who look for the container there.
    let pid = place.state(id)["pid"].to_string();
    until("its PID is in the namespace", || {
        let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        link(&pid) == link(&namespace.pid().to_string())
    });
    place.oci(&["delete", "--force", id]).exits(0);

    namespace.ip("tuntap add dev w0 mode tun");
    namespace.ip("link set w0 up");
    let refused = place.create(id, &bundle, &[]).exits(1);
    assert!(refused.stderr.contains("the link w0"), "{refused:#?}");
    place.oci(&["state", id]).exits(1);
}
