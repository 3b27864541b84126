//! From the bundle's OCI spec, which speaks of the host, to the one the agent
//! gets, which speaks of the guest.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use walnut_protocol::{GUEST_ROOT, agent::GuestFile};

use crate::{Error, Result};

/// Largest `config.json` that is read, bytes; the agent's own limit.
const SPEC_MAX: u64 = 4 << 20;

/// A host directory or file that the container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostBind {
    /// Index of the mount in the spec.
    pub(crate) mount: usize,
    pub(crate) source: PathBuf,
    pub(crate) read_only: bool,
}

/// Reads a bundle's `config.json`.
pub(crate) fn load(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let size = std::fs::metadata(&path)
        .map_err(Error::io("read", &path))?
        .len();
    if size > SPEC_MAX {
        return Err(Error::Invalid(format!(
            "read {}: {size} bytes, more than {SPEC_MAX}",
            path.display()
        )));
    }
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let spec: Spec = serde_json::from_slice(&bytes)
        .map_err(|e| Error::Invalid(format!("read {}: {e}", path.display())))?;
    for (what, absent) in [
        ("process", spec.process().is_none()),
        ("root", spec.root().is_none()),
        ("linux", spec.linux().is_none()),
    ] {
        if absent {
            return Err(Error::Invalid(format!(
                "read {}: it has no {what:?} object (OCI runtime-spec config)",
                path.display()
            )));
        }
    }
    Ok(spec)
}

/// The spec's bind mounts of host paths.
pub(crate) fn host_binds(spec: &Spec) -> Result<Vec<HostBind>> {
    let mut binds = Vec::new();
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        if !is_bind(mount) {
            continue;
        }
        let Some(source) = mount.source().clone().filter(|s| s.is_absolute()) else {
            return Err(Error::Invalid(format!(
                "bind mount on {}: its source must be an absolute path of the host",
                mount.destination().display()
            )));
        };
        let read_only = options(mount).any(|o| matches!(o, "ro" | "rro"));
        binds.push(HostBind {
            mount: index,
            source,
            read_only,
        });
    }
    Ok(binds)
}

/// Turns the spec into the guest's: root, cgroup and namespaces are the
/// agent's, `binds` gives each host bind its guest path, and `files` are bound
/// over the paths they stand for.
pub(crate) fn translate(
    mut spec: Spec,
    container: &str,
    rootfs: &str,
    binds: &[(usize, PathBuf)],
    files: &[(GuestFile, PathBuf)],
) -> Result<Vec<u8>> {
    if let Some(root) = spec.root_mut() {
        root.set_path(rootfs.into());
    }
    // Hooks are programs of the host; the guest has none.
    spec.set_hooks(None);
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (index, path) in binds {
        let Some(mount) = mounts.get_mut(*index) else {
            continue;
        };
        mount.set_source(Some(path.clone()));
    }
    for (file, destination) in files {
        let mut mount = Mount::default();
        mount
            .set_destination(destination.clone())
            .set_typ(Some("bind".into()))
            .set_source(Some(file.path.clone().into()))
            .set_options(Some(vec!["bind".into(), "rprivate".into()]));
        mounts.push(mount);
    }
    spec.set_mounts(Some(mounts));
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(Some(format!("/walnut/{container}").into()));
        let namespaces = linux.namespaces().clone().unwrap_or_default();
        // The guest's network is the pod's; host paths of namespaces mean
        // nothing in it.
        let namespaces = namespaces
            .into_iter()
            .filter(|ns| ns.typ() != LinuxNamespaceType::Network)
            .map(|mut ns| {
                ns.set_path(None);
                ns
            })
            .collect();
        linux.set_namespaces(Some(namespaces));
    }
    serde_json::to_vec(&spec)
        .map_err(|e| Error::Invalid(format!("write the guest's spec of {container}: {e}")))
}

/// `/etc/hosts` and `/etc/hostname` of a container, where the spec has no mount
/// of its own on them.
pub(crate) fn files(spec: &Spec, container: &str) -> Vec<(GuestFile, PathBuf)> {
    let hostname = spec.hostname().clone().unwrap_or_else(|| "walnut".into());
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
    );
    [
        ("hosts", "/etc/hosts", hosts),
        ("hostname", "/etc/hostname", format!("{hostname}\n")),
    ]
    .into_iter()
    .filter(|(_, destination, _)| {
        !spec
            .mounts()
            .iter()
            .flatten()
            .any(|m| m.destination() == Path::new(destination))
    })
    .map(|(name, destination, data)| {
        let file = GuestFile {
            path: format!("{GUEST_ROOT}/{container}/files/{name}"),
            data: data.into_bytes(),
            mode: 0o644,
            ..Default::default()
        };
        (file, destination.into())
    })
    .collect()
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || options(mount).any(|o| matches!(o, "bind" | "rbind"))
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        serde_json::from_str(
            r#"{"ociVersion":"1.0.2","hostname":"web","root":{"path":"rootfs"},
            "process":{"user":{"uid":0,"gid":0},"args":["true"],"cwd":"/"},
            "hooks":{"prestart":[{"path":"/bin/evil"}]},
            "mounts":[{"destination":"/proc","type":"proc","source":"proc"},
              {"destination":"/data","type":"bind","source":"/srv","options":["rbind","ro"]}],
            "linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/var/run/netns/x"}]}}"#,
        )
        .unwrap()
    }

    #[test]
    fn finds_host_binds() {
        let binds = host_binds(&spec()).unwrap();
        assert_eq!(
            binds,
            [HostBind {
                mount: 1,
                source: "/srv".into(),
                read_only: true
            }]
        );
    }

    #[test]
    fn the_guest_never_hears_of_host_paths() {
        let spec = spec();
        let files = files(&spec, "c1");
        let guest = translate(
            spec,
            "c1",
            "/run/walnut/c1/rootfs",
            &[(1, "/run/walnut/shared/0".into())],
            &files,
        )
        .unwrap();
        let text = String::from_utf8(guest.clone()).unwrap();
        for host in ["/srv", "netns", "evil"] {
            assert!(!text.contains(host), "{text}");
        }
        let guest: Spec = serde_json::from_slice(&guest).unwrap();
        let mounts = guest.mounts().clone().unwrap();
        assert_eq!(mounts[1].source(), &Some("/run/walnut/shared/0".into()));
        assert!(
            mounts
                .iter()
                .any(|m| m.destination() == Path::new("/etc/hosts"))
        );
    }

    #[test]
    fn incomplete_bundles_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(dir.path()), Err(Error::Io { .. })));
        std::fs::write(dir.path().join("config.json"), "{\"ociVersion\":\"1.0.2\"}").unwrap();
        assert!(matches!(load(dir.path()), Err(Error::Invalid(m)) if m.contains("process")));
    }
}
