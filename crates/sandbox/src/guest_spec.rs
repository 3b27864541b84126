//! From the bundle's OCI spec, which speaks of the host, to the one the agent
//! gets, which speaks of the guest.

use std::{
    fs,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Hooks, Linux, LinuxNamespaceType, Mount, Spec};
use walnut_protocol::{ANNOTATION_COPY_UP, GUEST_ROOT, agent::GuestFile};

use crate::{
    ANNOTATION_INIT, Error, Result,
    pod::{self, First, Role},
    pod_request::PodParts,
    sandbox::NameFiles,
};

/// Largest `config.json` that is read, bytes; the agent's own limit.
const SPEC_MAX: u64 = 4 << 20;

/// Where a container has the first process of ours.
const INIT: &str = "/dev/init";
/// The agent's helper in the guest.
const GUEST_HELPER: &str = "/walnut-container";

/// A host directory or file that the container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostBind {
    /// Index of the mount in the spec.
    pub(crate) mount: usize,
    pub(crate) source: PathBuf,
    pub(crate) read_only: bool,
    /// What the host mounts below it later is to be seen too.
    pub(crate) follows_host: bool,
}

/// Where the guest has what a container's spec names.
pub(crate) struct Place<'a> {
    pub(crate) root: &'a str,
    /// Guest path of each host bind, by its index among the mounts.
    pub(crate) binds: &'a [(usize, PathBuf)],
    /// Files of ours, and where in the container they are bound.
    pub(crate) files: &'a [(GuestFile, PathBuf)],
    pub(crate) role: Role,
    pub(crate) first: Option<&'a First>,
    /// The guest's own shared memory is the pod's.
    pub(crate) guests_shm: bool,
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
    let spec = crate::spec::parse_spec(&bytes)
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
        let has = |wanted: &[&str]| options(mount).any(|o| wanted.contains(&o));
        binds.push(HostBind {
            mount: index,
            source,
            read_only: has(&["ro", "rro"]),
            follows_host: has(&["slave", "rslave", "shared", "rshared"]),
        });
    }
    Ok(binds)
}

/// Turns the spec into the guest's: root, cgroup and namespaces are the
/// agent's, binds get their guest paths, and our files are bound over the paths
/// they stand for.
pub(crate) fn translate(mut spec: Spec, container: &str, place: &Place<'_>) -> Result<Vec<u8>> {
    if let Some(root) = spec.root_mut() {
        root.set_path(place.root.into());
    }
    // Hooks are programs of the host, but for those that the spec looks for in the
    // container.
    let start = spec
        .hooks()
        .as_ref()
        .and_then(|h| h.start_container().clone());
    spec.set_hooks(start.map(|start| {
        let mut hooks = Hooks::default();
        hooks.set_start_container(Some(start));
        hooks
    }));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (index, path) in place.binds {
        let Some(mount) = mounts.get_mut(*index) else {
            continue;
        };
        mount.set_source(Some(path.clone()));
    }
    let wants_init = spec
        .annotations()
        .as_ref()
        .and_then(|a| a.get(ANNOTATION_INIT));
    if wants_init.is_some_and(|value| value == "true") {
        mounts.push(init(&mut spec));
    }
    name_copied(&mut spec, &mut mounts);
    for mount in &mut mounts {
        if place.guests_shm {
            pod::share_shm(mount);
        }
    }
    for (file, destination) in place.files {
        let mut mount = Mount::default();
        mount
            .set_destination(destination.clone())
            .set_typ(Some("bind".into()))
            .set_source(Some(file.path.clone().into()))
            .set_options(Some(vec!["bind".into(), "rprivate".into()]));
        mounts.push(mount);
    }
    spec.set_mounts(Some(mounts));
    if place.role.in_pod() {
        // The guest's, which is the pod's, and set already.
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(Some(format!("/walnut/{container}").into()));
        let listed = linux.namespaces().as_deref().unwrap_or_default();
        let namespaces = pod::namespaces(listed, place.role, place.first)?;
        linux.set_namespaces(Some(namespaces));
        if place.role.in_pod() {
            // Of the namespaces that a pod's containers share: set for the whole guest.
            linux.set_sysctl(None);
        }
        forget_host_cpus(linux);
        name_propagation(linux);
    }
    serde_json::to_vec(&spec)
        .map_err(|e| Error::Invalid(format!("write the guest's spec of {container}: {e}")))
}

/// Has the program be the child of a first process of ours, which is the guest's helper by
/// another name, and lies where every container has a file system of its own.
fn init(spec: &mut Spec) -> Mount {
    if let Some(process) = spec.process_mut() {
        let args = process.args().clone().unwrap_or_default();
        let first = [INIT.to_owned(), "--".to_owned()];
        process.set_args(Some(first.into_iter().chain(args).collect()));
    }
    let mut mount = Mount::default();
    mount
        .set_destination(INIT.into())
        .set_typ(Some("bind".into()))
        .set_source(Some(GUEST_HELPER.into()))
        .set_options(Some(["bind", "ro", "nosuid"].map(Into::into).into()));
    mount
}

/// runc's extension, that a tmpfs begins with what it covers: the guest's kernel would take
/// it for an option of the file system's, and refuse. The agent is told where.
fn name_copied(spec: &mut Spec, mounts: &mut [Mount]) {
    let mut copied = Vec::new();
    for mount in mounts {
        if let Some(mut options) = mount.options().clone() {
            let all = options.len();
            options.retain(|option| option != "tmpcopyup");
            if options.len() < all {
                copied.push(mount.destination().display().to_string());
                mount.set_options(Some(options));
            }
        }
    }
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    annotations.remove(ANNOTATION_COPY_UP);
    if !copied.is_empty() {
        let list = serde_json::Value::from(copied).to_string();
        annotations.insert(ANNOTATION_COPY_UP.to_owned(), list);
    }
    spec.set_annotations((!annotations.is_empty()).then_some(annotations));
}

/// containerd asks for "rslave" where a volume follows the host's mounts, as runc takes it;
/// the specification has the words without an "r", and the guest knows no others.
fn name_propagation(linux: &mut Linux) {
    let word = linux.rootfs_propagation().clone();
    if let Some(known) = word.as_deref().and_then(|word| word.strip_prefix('r')) {
        linux.set_rootfs_propagation(Some(known.into()));
    }
}

/// Numbers of the host's processors and memory nodes are not the guest's.
fn forget_host_cpus(linux: &mut Linux) {
    if let Some(resources) = linux.resources_mut()
        && let Some(cpu) = resources.cpu_mut()
    {
        cpu.set_cpus(None).set_mems(None);
    }
}

/// Whether the container has a host name of its own, and not the host's.
fn has_own_name(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let listed = linux.and_then(|linux| linux.namespaces().as_deref());
    listed
        .into_iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Uts)
}

/// Refuses a name for a container that shares the host's, as other runtimes do: Kubernetes
/// relies on it.
pub(crate) fn check_hostname(spec: &Spec) -> Result<()> {
    match spec.hostname() {
        Some(name) if !name.is_empty() && !has_own_name(spec) => Err(Error::Invalid(format!(
            "set the host name {name:?}: the container has the host's; give it a UTS namespace"
        ))),
        _ => Ok(()),
    }
}

/// The container's host name: its own; the host's, where it shares that (as pods of the
/// host's network do); Walnut's, where nobody has said.
pub(crate) fn hostname(spec: &Spec) -> String {
    let given = spec.hostname().clone().filter(|name| !name.is_empty());
    given
        .or_else(|| {
            let name = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
            let name = name.trim().to_owned();
            (!name.is_empty() && !has_own_name(spec)).then_some(name)
        })
        .unwrap_or_else(|| "walnut".into())
}

/// `/etc/hosts` and `/etc/hostname` of a container, and the `/etc/resolv.conf` of its pod or
/// its network if they have one, where the spec has no mount of its own on them.
pub(crate) fn files(
    spec: &Spec,
    container: &str,
    pod: Option<&PodParts>,
    names: Option<&NameFiles>,
) -> Vec<(GuestFile, PathBuf)> {
    let pods = pod
        .map(|pod| pod.hostname.clone())
        .filter(|n| !n.is_empty());
    let hostname = pods.unwrap_or_else(|| hostname(spec));
    let hosts = match names {
        Some(names) => names.hosts.clone(),
        None => format!(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
        ),
    };
    let resolv_conf = pod
        .and_then(|pod| pod.resolv_conf.clone())
        .or_else(|| names?.resolv_conf.clone());
    [
        ("hosts", "/etc/hosts", hosts),
        ("hostname", "/etc/hostname", format!("{hostname}\n")),
    ]
    .into_iter()
    .chain(resolv_conf.map(|text| ("resolv.conf", "/etc/resolv.conf", text)))
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
            "hooks":{"prestart":[{"path":"/bin/evil"}],"startContainer":[{"path":"/bin/good"}]},
            "mounts":[{"destination":"/proc","type":"proc","source":"proc"},
              {"destination":"/data","type":"bind","source":"/srv","options":["rbind","ro"]},
              {"destination":"/t","type":"tmpfs","source":"tmpfs","options":["rw","tmpcopyup"]}],
            "linux":{"namespaces":[{"type":"pid"},{"type":"uts"},{"type":"network","path":"/var/run/netns/x"}]}}"#,
        )
        .unwrap()
    }

    #[test]
    fn a_host_name_is_its_own_or_the_hosts() {
        let mut spec = spec();
        assert_eq!(hostname(&spec), "web");
        check_hostname(&spec).unwrap();
        // The host's UTS namespace.
        let linux = spec.linux_mut().as_mut().unwrap();
        let mut namespaces = linux.namespaces().clone().unwrap();
        let uts = namespaces.remove(1);
        linux.set_namespaces(Some(namespaces.clone()));
        let refused = check_hostname(&spec).unwrap_err().to_string();
        assert!(refused.contains("give it a UTS namespace"), "{refused}");
        spec.set_hostname(None);
        check_hostname(&spec).unwrap();
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(hostname(&spec), host.trim());
        let named = files(&spec, "c", None, None);
        assert_eq!(named[1].0.data, host.as_bytes());
        // Its own, of which nobody has said anything.
        namespaces.push(uts);
        let linux = spec.linux_mut().as_mut().unwrap();
        linux.set_namespaces(Some(namespaces));
        assert_eq!(hostname(&spec), "walnut");
    }

    #[test]
    fn finds_host_binds() {
        let binds = host_binds(&spec()).unwrap();
        assert_eq!(
            binds,
            [HostBind {
                mount: 1,
                source: "/srv".into(),
                read_only: true,
                follows_host: false,
            }]
        );
    }

    #[test]
    fn the_guest_never_hears_of_host_paths() {
        let spec = spec();
        let files = files(&spec, "c1", None, None);
        let place = Place {
            root: "/run/walnut/c1/rootfs",
            binds: &[(1, "/run/walnut/shared/0".into())],
            files: &files,
            role: Role::Alone,
            first: None,
            guests_shm: false,
        };
        let guest = translate(spec, "c1", &place).unwrap();
        let text = String::from_utf8(guest.clone()).unwrap();
        for host in ["/srv", "netns", "evil", "tmpcopyup"] {
            assert!(!text.contains(host), "{text}");
        }
        assert!(text.contains("/bin/good"), "{text}");
        assert!(text.contains(r#""walnut.copy-up":"[\"/t\"]""#), "{text}");
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
    fn a_pod_without_a_container_of_its_own_is_in_the_others() {
        let mut spec = spec();
        let mut shm = Mount::default();
        shm.set_destination("/dev/shm".into())
            .set_typ(Some("tmpfs".into()))
            .set_source(Some("shm".into()))
            .set_options(Some(vec!["size=65536k".into()]));
        spec.set_mounts(Some(vec![shm]));
        let parts = PodParts {
            hostname: "pod".into(),
            resolv_conf: Some("nameserver 10.0.0.1\n".into()),
        };
        let files = files(&spec, "c1", Some(&parts), None);
        let text = |name: &str| {
            let found = files.iter().find(|(_, path)| path == Path::new(name));
            String::from_utf8(found.unwrap().0.data.clone()).unwrap()
        };
        assert_eq!(text("/etc/hostname"), "pod\n");
        assert!(text("/etc/hosts").contains("\tpod\n"));
        assert_eq!(text("/etc/resolv.conf"), "nameserver 10.0.0.1\n");
        let place = Place {
            root: "/run/walnut/c1/rootfs",
            binds: &[],
            files: &[],
            role: Role::Member,
            first: None,
            guests_shm: true,
        };
        let guest: Spec = serde_json::from_slice(&translate(spec, "c1", &place).unwrap()).unwrap();
        let mounts = guest.mounts().clone().unwrap();
        assert_eq!(mounts[0].typ().as_deref(), Some("bind"));
        assert_eq!(mounts[0].source(), &Some("/dev/shm".into()));
        assert!(!options(&mounts[0]).any(|o| o.starts_with("size")));
    }

    #[test]
    fn a_containers_network_says_who_is_on_it() {
        let names = NameFiles {
            hosts: "192.0.2.5\tweb\n".into(),
            resolv_conf: Some("nameserver 192.0.2.1\n".into()),
        };
        let files = files(&spec(), "c1", None, Some(&names));
        let text = |at: usize| String::from_utf8(files[at].0.data.clone()).unwrap();
        assert_eq!(files[0].1, Path::new("/etc/hosts"));
        assert_eq!(text(0), names.hosts);
        assert_eq!(text(1), "web\n");
        assert_eq!(files[2].1, Path::new("/etc/resolv.conf"));
        assert_eq!(text(2), "nameserver 192.0.2.1\n");
    }

    #[test]
    fn propagation_has_the_specifications_words() {
        for (asked, known) in [
            ("rslave", "slave"),
            ("rshared", "shared"),
            ("slave", "slave"),
        ] {
            let mut linux = Linux::default();
            linux.set_rootfs_propagation(Some(asked.into()));
            name_propagation(&mut linux);
            assert_eq!(linux.rootfs_propagation().as_deref(), Some(known));
        }
    }

    #[test]
    fn incomplete_bundles_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(dir.path()), Err(Error::Io { .. })));
        std::fs::write(dir.path().join("config.json"), "{\"ociVersion\":\"1.0.2\"}").unwrap();
        assert!(matches!(load(dir.path()), Err(Error::Invalid(m)) if m.contains("process")));
    }
}
