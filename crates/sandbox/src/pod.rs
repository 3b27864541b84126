//! What the containers of a pod have in common, in the guest.
//!
//! The guest's own IPC, UTS and network namespaces are the pod's: nothing else is in the
//! machine. Its PID namespace is the agent's, so that a pod with a common one has its
//! first container's. `/dev/shm` of the host, which the containers of a pod share, is
//! memory of the guest's here.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{
    LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType as Type, Mount, Spec,
};
use serde::{Deserialize, Serialize};
use walnut_protocol::{GUEST_ROOT, agent::Storage};

use crate::{Error, Result, guest_spec::HostBind};

/// Annotations that tell a pod's first container (the "sandbox" or "pause" container) from
/// its others: containerd's CRI plugin, and CRI-O.
const TYPES: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];
const SHM: &str = "/dev/shm";

/// A container's part in its sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    /// It shares nothing but the machine.
    Alone,
    /// It holds what a pod has in common.
    First,
    /// It has what the pod's first one holds.
    Member,
}

impl Role {
    pub(crate) fn of(spec: &Spec) -> Self {
        let annotations = spec.annotations().as_ref();
        let kind = annotations.and_then(|a| TYPES.iter().find_map(|name| a.get(*name)));
        match kind.map(String::as_str) {
            Some("sandbox") => Self::First,
            Some("container") => Self::Member,
            _ => Self::Alone,
        }
    }

    pub(crate) fn in_pod(self) -> bool {
        self != Self::Alone
    }
}

/// The pod's first container, as the guest knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct First {
    pub(crate) guest_id: String,
    pub(crate) pid: u32,
}

/// The namespaces that a container gets in the guest, of those that its spec lists.
pub(crate) fn namespaces(
    listed: &[LinuxNamespace],
    role: Role,
    first: Option<&First>,
) -> Result<Vec<LinuxNamespace>> {
    let mut namespaces = Vec::with_capacity(listed.len() + 1);
    for namespace in listed {
        let mut namespace = namespace.clone();
        let joined = namespace.path().is_some();
        // A path on the host means nothing here, but that it is not the container's alone.
        namespace.set_path(None);
        match namespace.typ() {
            Type::Network => continue,
            Type::Ipc | Type::Uts if joined || role.in_pod() => continue,
            Type::Pid if joined => {
                if let Some(first) = first.filter(|_| role == Role::Member) {
                    namespace.set_path(Some(format!("/proc/{}/ns/pid", first.pid).into()));
                }
            }
            _ => {}
        }
        namespaces.push(namespace);
    }
    // The guest's own have its agent in them, and the pod's other containers, which are
    // nobody's business. Specs of a host with cgroup v1 have no cgroup namespace.
    for own in [Type::Pid, Type::Cgroup] {
        if !namespaces.iter().any(|ns| ns.typ() == own) {
            let new = LinuxNamespaceBuilder::default().typ(own).build();
            let new = new.map_err(|e| Error::Invalid(format!("add a {own} namespace: {e}")))?;
            namespaces.push(new);
        }
    }
    Ok(namespaces)
}

/// Kernel settings of the whole guest, for a pod's first container's are the pod's.
pub(crate) fn sysctls(spec: &Spec) -> HashMap<String, String> {
    let linux = spec
        .linux()
        .as_ref()
        .filter(|_| Role::of(spec) == Role::First);
    let sysctls = linux.and_then(|linux| linux.sysctl().clone());
    sysctls.into_iter().flatten().collect()
}

/// The pod's `/dev/shm` in the guest, if the host has one for it.
pub(crate) fn shm(binds: &[HostBind], spec: &Spec) -> Option<HostBind> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    binds
        .iter()
        .find(|bind| {
            let mount = mounts.get(bind.mount);
            mount.is_some_and(|mount| mount.destination() == Path::new(SHM))
        })
        .cloned()
}

/// Makes a container's own `/dev/shm` that of the guest, which its pod shares.
pub(crate) fn share_shm(mount: &mut Mount) {
    if mount.destination() != Path::new(SHM) || mount.typ().as_deref() != Some("tmpfs") {
        return;
    }
    let options = ["rbind", "nosuid", "nodev", "noexec"].map(Into::into);
    mount
        .set_typ(Some("bind".into()))
        .set_source(Some(SHM.into()))
        .set_options(Some(options.into()));
}

/// Where the shared memory of the pod lies whose first container is `guest_id`.
pub(crate) fn shm_path(guest_id: &str) -> PathBuf {
    format!("{GUEST_ROOT}/{guest_id}/shm").into()
}

/// Shared memory as large as the host's.
pub(crate) fn shm_storage(guest_id: &str, host: &Path) -> Result<Storage> {
    let stat =
        rustix::fs::statvfs(host).map_err(|e| Error::io("read the size of", host)(e.into()))?;
    let size = stat.f_blocks.saturating_mul(stat.f_frsize);
    Ok(Storage {
        driver: "tmpfs".into(),
        source: "shm".into(),
        fstype: "tmpfs".into(),
        options: vec![
            "nosuid,nodev,noexec".into(),
            "mode=1777".into(),
            format!("size={size}"),
        ],
        mount_point: shm_path(guest_id).display().to_string(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn got(listed: serde_json::Value, role: Role, first: Option<&First>) -> serde_json::Value {
        let listed: Vec<LinuxNamespace> = serde_json::from_value(listed).unwrap();
        serde_json::to_value(namespaces(&listed, role, first).unwrap()).unwrap()
    }

    #[test]
    fn a_container_alone_keeps_what_is_its_own() {
        let listed = json!([
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
            {"type": "network", "path": "/var/run/netns/x"}, {"type": "cgroup"}]);
        assert_eq!(
            got(listed, Role::Alone, None),
            json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"}])
        );
        // Without a PID namespace it would be in the agent's.
        assert_eq!(
            got(
                json!([{"type": "mount"}, {"type": "ipc", "path": "/x"}]),
                Role::Alone,
                None
            ),
            json!([{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}])
        );
    }

    #[test]
    fn a_pods_containers_share_the_machines() {
        let first = First {
            guest_id: "p".into(),
            pid: 77,
        };
        let listed = json!([
            {"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"},
            {"type": "uts", "path": "/proc/1/ns/uts"}, {"type": "mount"}]);
        assert_eq!(
            got(listed.clone(), Role::Member, Some(&first)),
            json!([{"type": "pid", "path": "/proc/77/ns/pid"}, {"type": "mount"}, {"type": "cgroup"}])
        );
        assert_eq!(
            got(listed, Role::Member, None),
            json!([{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}])
        );
        assert_eq!(
            got(json!([{"type": "pid"}, {"type": "ipc"}]), Role::First, None),
            json!([{"type": "pid"}, {"type": "cgroup"}])
        );
    }
}
