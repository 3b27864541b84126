//! What another kernel cannot have is refused, with the reason, and leaves nothing.

use std::{
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use serde_json::json;
use walnut_tests::{client::finish, unique, until};

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

/// A process in a network namespace of its own; ends with the test.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let mut command = Command::new("sleep");
        command.arg("infinity").stdin(Stdio::null());
        // SAFETY: unshare and prctl are system calls and no more.
        unsafe {
            command.pre_exec(|| {
                if libc::unshare(libc::CLONE_NEWNET) != 0
                    || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Self(command.spawn().expect("make a network namespace"))
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    /// Runs `ip` in it.
    fn ip(&self, args: &str) {
        let net = format!("--net={}", self.path());
        let mut command = Command::new("nsenter");
        command.arg(net).arg("ip").args(args.split(' '));
        finish(&mut command, b"").exits(0);
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
        link(&pid) == link(&namespace.0.id().to_string())
    });
    place.oci(&["delete", "--force", id]).exits(0);

    namespace.ip("link add w0 type veth peer name w1");
    namespace.ip("addr add 192.0.2.1/24 dev w0");
    namespace.ip("link set w0 up");
    let refused = place.create(id, &bundle, &[]).exits(1);
    assert!(refused.stderr.contains("the interface w0"), "{refused:#?}");
    place.oci(&["state", id]).exits(1);
}
