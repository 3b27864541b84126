//! What a spec takes of the host's kernel, and the guest's does not have: the host's
//! cgroups, and its devices.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, Mount, Spec};

use crate::{Error, Result};

/// Where everybody has cgroups.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Major numbers of devices that every kernel has: memory, terminals, miscellaneous.
const MAJORS: [i64; 3] = [1, 5, 10];

/// Makes a spec one of a container that has a kernel of its own.
pub(crate) fn leave(spec: &mut Spec) -> Result<()> {
    if let Some(mounts) = spec.mounts_mut() {
        own_cgroups(mounts);
    }
    let Some(linux) = spec.linux_mut() else {
        return Ok(());
    };
    if is_privileged(linux)
        && let Some(devices) = linux.devices_mut()
    {
        devices.retain(|device| !is_hosts(device));
    }
    match foreign_device(spec) {
        Some(device) => Err(Error::Invalid(format!(
            "the device {} is the host's: the container's kernel does not have it",
            device.display()
        ))),
        None => Ok(()),
    }
}

/// The device that keeps a container from being made, if one does. One that may use every
/// device there is (`--privileged`) has all of the host's in its list, and means those of
/// its own kernel.
pub fn foreign_device(spec: &Spec) -> Option<&Path> {
    let linux = spec
        .linux()
        .as_ref()
        .filter(|linux| !is_privileged(linux))?;
    let device = linux.devices().iter().flatten().find(|d| is_hosts(d))?;
    Some(device.path())
}

fn is_privileged(linux: &Linux) -> bool {
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|r| r.devices().as_deref());
    let any = |number: Option<i64>| number.is_none_or(|n| n < 0);
    rules.into_iter().flatten().any(|rule| {
        let access = rule.access().as_deref().unwrap_or("rwm");
        rule.allow()
            && rule.typ().is_none_or(|t| t == LinuxDeviceType::A)
            && any(rule.major())
            && any(rule.minor())
            && ['r', 'w', 'm'].iter().all(|c| access.contains(*c))
    })
}

fn is_hosts(device: &LinuxDevice) -> bool {
    match device.typ() {
        LinuxDeviceType::P => false,
        LinuxDeviceType::C | LinuxDeviceType::U => !MAJORS.contains(&device.major()),
        _ => true,
    }
}

/// Cgroups of the host that are bound where a container has its own mean those: who runs an
/// init system binds them there, since that must write to them. What is bound below, such as
/// systemd's own hierarchy of cgroup v1, is in a cgroup v2 the whole of it.
fn own_cgroups(mounts: &mut Vec<Mount>) {
    let (mut below, mut writable) = (false, false);
    mounts.retain(|mount| {
        let inner = mount.destination().starts_with(CGROUPS)
            && mount.destination() != Path::new(CGROUPS)
            && source(mount).is_some_and(|source| source.starts_with(CGROUPS));
        if inner {
            below = true;
            writable |= !has(mount, "ro");
        }
        !inner
    });
    let at_their_place = |mount: &Mount| mount.destination() == Path::new(CGROUPS);
    for mount in mounts.iter_mut().filter(|mount| at_their_place(mount)) {
        let hosts = source(mount).is_some_and(|source| source.starts_with(CGROUPS));
        if hosts || (writable && mount.typ().as_deref() == Some("cgroup")) {
            let read_only = has(mount, "ro") && !writable;
            *mount = cgroups(read_only);
        }
    }
    if below && !mounts.iter().any(at_their_place) {
        mounts.push(cgroups(!writable));
    }
}

fn cgroups(read_only: bool) -> Mount {
    let last = if read_only { "ro" } else { "rw" };
    let mut mount = Mount::default();
    mount
        .set_destination(CGROUPS.into())
        .set_typ(Some("cgroup".into()))
        .set_source(Some("cgroup".into()))
        .set_options(Some(
            ["nosuid", "noexec", "nodev", last].map(Into::into).into(),
        ));
    mount
}

fn source(mount: &Mount) -> Option<&PathBuf> {
    mount.source().as_ref()
}

fn has(mount: &Mount, wanted: &str) -> bool {
    mount.options().iter().flatten().any(|o| o == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn left(mounts: Value, linux: Value) -> Result<Spec> {
        let spec = json!({
            "ociVersion": "1.0.2", "root": {"path": "rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "mounts": mounts, "linux": linux,
        });
        let mut spec = serde_json::from_value(spec).unwrap();
        leave(&mut spec).map(|()| spec)
    }

    fn mounts(given: Value) -> Vec<(String, String, bool)> {
        let spec = left(given, json!({})).unwrap();
        let all = spec.mounts().clone().unwrap();
        let mounts = all.iter().map(|mount| {
            (
                mount.destination().display().to_string(),
                mount.typ().clone().unwrap(),
                has(mount, "ro"),
            )
        });
        mounts.collect()
    }

    fn cgroup(read_only: bool) -> (String, String, bool) {
        (CGROUPS.into(), "cgroup".into(), read_only)
    }

    #[test]
    fn the_hosts_cgroups_are_the_containers_own_where_it_has_those() {
        let bound = |destination: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": "bind", "source": source, "options": options});
        let usual = json!({"destination": CGROUPS, "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "ro"]});
        assert_eq!(mounts(json!([usual])), [cgroup(true)]);
        // podman's for systemd, on a host with cgroup v1.
        let systemd = "/sys/fs/cgroup/systemd";
        let bind = bound(systemd, systemd, &["bind", "rprivate"]);
        assert_eq!(mounts(json!([usual, bind])), [cgroup(false)]);
        assert_eq!(mounts(json!([bind])), [cgroup(false)]);
        let read_only = bound(systemd, systemd, &["bind", "ro"]);
        assert_eq!(mounts(json!([usual, read_only])), [cgroup(true)]);
        // People's for docker.
        for (option, read_only) in [("rw", false), ("ro", true)] {
            let bind = bound(CGROUPS, CGROUPS, &["rbind", option]);
            assert_eq!(mounts(json!([bind])), [cgroup(read_only)]);
        }
        // Somebody looks at the host's.
        let watcher = bound("/host/cgroup", CGROUPS, &["rbind", "ro"]);
        assert_eq!(
            mounts(json!([watcher])),
            [("/host/cgroup".into(), "bind".into(), true)]
        );
    }

    #[test]
    fn devices_of_the_host_are_refused_unless_they_are_all_of_them() {
        let void = json!({"path": "/dev/null", "type": "c", "major": 1, "minor": 3});
        let fuse = json!({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229});
        let disk = json!({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0});
        let deny = json!({"allow": false, "access": "rwm"});
        let allow = json!({"allow": true, "access": "rwm"});
        let one = json!({"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rwm"});
        left(json!([]), json!({"devices": [void, fuse]})).unwrap();
        for rules in [json!([deny]), json!([deny, one]), json!([])] {
            let linux = json!({"devices": [void, disk], "resources": {"devices": rules}});
            let refused = left(json!([]), linux).unwrap_err().to_string();
            assert!(refused.contains("/dev/sda is the host's"), "{refused}");
        }
        let linux = json!({"devices": [void, disk], "resources": {"devices": [allow]}});
        let spec = left(json!([]), linux).unwrap();
        let devices = spec.linux().as_ref().unwrap().devices().clone().unwrap();
        assert_eq!(devices.len(), 1);
        assert!(foreign_device(&spec).is_none());
    }
}
