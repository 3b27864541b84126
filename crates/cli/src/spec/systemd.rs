//! What systemd wants where it is a container's first process, by podman's rules
//! (podman-run(1), `--systemd`; systemd's "Container Interface").

use std::path::Path;

use serde_json::{Value, json};

use crate::args::Systemd;

/// Halts it in order; to SIGTERM it executes itself anew.
pub(super) const STOP_SIGNAL: &str = "SIGRTMIN+3";
/// Commands that are an init system by their name.
const INITS: [&str; 3] = ["/sbin/init", "/usr/sbin/init", "/usr/local/sbin/init"];
/// What it keeps in memory.
const MEMORY: [&str; 4] = ["/run", "/run/lock", "/tmp", "/var/log/journal"];
const CGROUPS: &str = "/sys/fs/cgroup";

/// Whether a container of this command is set up for it.
pub(super) fn wanted(when: Systemd, command: &[String]) -> bool {
    let program = command.first().map(String::as_str).unwrap_or_default();
    match when {
        Systemd::Always => true,
        Systemd::False => false,
        Systemd::True => {
            INITS.contains(&program)
                || Path::new(program)
                    .file_name()
                    .is_some_and(|name| name == "systemd")
        }
    }
}

/// By which it knows that it is in a container, and which machine ID it has there.
pub(super) fn environment(id: &str) -> [String; 2] {
    ["container=oci".into(), format!("container_uuid={id}")]
}

/// Adds to a container's mounts what is not there.
pub(super) fn mounts(mounts: &mut Vec<Value>) {
    for path in MEMORY {
        if !mounts.iter().any(|mount| mount["destination"] == path) {
            let options = ["nosuid", "nodev", "mode=755"];
            let shared = ["nosuid", "nodev", "mode=1777"];
            let options = if path == "/tmp" { shared } else { options };
            mounts.push(super::mount(path, "tmpfs", &options));
        }
    }
    for mount in mounts
        .iter_mut()
        .filter(|m| m["destination"] == CGROUPS && m["type"] == "cgroup")
    {
        mount["options"] = json!(["nosuid", "noexec", "nodev", "relatime", "rw"]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_systems_are_known_by_their_names() {
        let is = |when, program: &str| wanted(when, &[program.to_owned()]);
        for program in [
            "/sbin/init",
            "/usr/sbin/init",
            "/lib/systemd/systemd",
            "systemd",
        ] {
            assert!(is(Systemd::True, program), "{program}");
            assert!(!is(Systemd::False, program), "{program}");
        }
        for program in ["init", "/bin/init", "/usr/bin/systemd-run", "bash"] {
            assert!(!is(Systemd::True, program), "{program}");
            assert!(is(Systemd::Always, program), "{program}");
        }
        assert!(!wanted(Systemd::True, &[]));
    }

    #[test]
    fn volumes_of_the_users_stay() {
        let mut all = vec![
            json!({"destination": "/tmp", "type": "bind", "source": "/srv"}),
            super::super::mount(CGROUPS, "cgroup", &["ro"]),
        ];
        mounts(&mut all);
        assert_eq!(all[0]["type"], "bind");
        assert_eq!(all[1]["options"][4], "rw");
        let added: Vec<_> = all[2..].iter().map(|m| m["destination"].clone()).collect();
        assert_eq!(added, ["/run", "/run/lock", "/var/log/journal"]);
    }
}
