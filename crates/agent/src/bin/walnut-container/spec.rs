//! Makes a spec that was written for a host fit for a machine of its own.
//!
//! What names the host's things (its network namespace, its LSMs, its block
//! devices, its hooks) is taken out; what libcontainer reads differently from
//! the specification is put the way it reads it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{
    Hook, Hooks, LinuxNamespaceType, LinuxResources, LinuxSeccomp, LinuxSeccompAction, Process,
    Spec,
};
use libcontainer::seccomp::is_notify;
use walnut_agent::names::{ContainerPaths, sysctl_path};

use crate::failure::Failure;

/// Parses and adapts. The result is what libcontainer is given.
pub(crate) fn adapt(json: &[u8], paths: &ContainerPaths) -> Result<Spec, Failure> {
    let mut spec: Spec = serde_json::from_slice(json)
        .map_err(|e| Failure::invalid(format!("spec of {}: {e}", paths.id())))?;
    adapt_root(&mut spec, paths)?;
    let process = spec
        .process_mut()
        .as_mut()
        .ok_or_else(|| Failure::invalid("spec: process is missing"))?;
    adapt_process(process)?;
    adapt_linux(&mut spec, paths)?;
    adapt_hooks(&mut spec);
    Ok(spec)
}

/// root.path: relative to the bundle, or a guest path.
fn adapt_root(spec: &mut Spec, paths: &ContainerPaths) -> Result<(), Failure> {
    let root = spec
        .root_mut()
        .as_mut()
        .ok_or_else(|| Failure::invalid("spec: root is missing"))?;
    let path = paths.bundle().join(root.path());
    let text = path.to_string_lossy();
    walnut_agent::names::below_guest_root(&text)
        .map_err(|e| Failure::invalid(format!("spec: root.path: {e}")))?;
    root.set_path(path);
    Ok(())
}

/// Checks and adapts a `process` object, of a spec or of an exec.
pub(crate) fn adapt_process(process: &mut Process) -> Result<(), Failure> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Failure::invalid("process.args is empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(Failure::invalid(format!(
            "process.cwd {:?} is not absolute",
            process.cwd()
        )));
    }
    // libcontainer takes "false" for "set": the filter would be loaded when
    // the privilege to load it is gone.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // The guest has neither.
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    Ok(())
}

fn adapt_linux(spec: &mut Spec, paths: &ContainerPaths) -> Result<(), Failure> {
    let linux = spec
        .linux_mut()
        .as_mut()
        .ok_or_else(|| Failure::invalid("spec: linux is missing"))?;
    linux.set_cgroups_path(Some(paths.cgroup_in_hierarchy()));
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    linux.set_net_devices(None);
    if let Some(namespaces) = linux.namespaces_mut() {
        // The machine's network is the sandbox's network.
        namespaces.retain(|n| n.typ() != LinuxNamespaceType::Network);
        if !namespaces
            .iter()
            .any(|n| n.typ() == LinuxNamespaceType::Mount)
        {
            return Err(Failure::invalid(
                "spec: linux.namespaces has no mount namespace; a container needs one of its own",
            ));
        }
    } else {
        return Err(Failure::invalid("spec: linux.namespaces is missing"));
    }
    if let Some(seccomp) = linux.seccomp_mut() {
        adapt_seccomp(seccomp)?;
    }
    if let Some(resources) = linux.resources_mut() {
        adapt_resources(resources);
    }
    if let Some(sysctls) = linux.sysctl_mut() {
        set_network_sysctls(sysctls)?;
    }
    Ok(())
}

/// Drops what numbers the host's devices.
pub(crate) fn adapt_resources(resources: &mut LinuxResources) {
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_rdma(None);
}

/// A call that somebody is to be asked about fails where nobody listens, with ENOSYS: so
/// the kernel has it, and crun. A listener would be the host's, and it is refused.
fn adapt_seccomp(seccomp: &mut LinuxSeccomp) -> Result<(), Failure> {
    if seccomp.listener_path().is_none() {
        let mut rules = seccomp.syscalls().clone();
        for rule in rules.iter_mut().flatten() {
            if rule.action() == LinuxSeccompAction::ScmpActNotify {
                rule.set_action(LinuxSeccompAction::ScmpActErrno);
                rule.set_errno_ret(Some(nix::errno::Errno::ENOSYS as u32));
            }
        }
        seccomp.set_syscalls(rules);
    }
    if is_notify(seccomp) {
        return Err(Failure::invalid(
            "spec: linux.seccomp: SCMP_ACT_NOTIFY needs a listener, and the guest has none",
        ));
    }
    Ok(())
}

/// `net.*` belongs to the machine's network namespace, which libcontainer
/// would refuse to touch: set here, and taken out.
fn set_network_sysctls(sysctls: &mut HashMap<String, String>) -> Result<(), Failure> {
    let keys: Vec<String> = sysctls
        .keys()
        .filter(|k| k.starts_with("net.") || k.starts_with("net/"))
        .cloned()
        .collect();
    for key in keys {
        let path = sysctl_path(&key).map_err(|e| Failure::invalid(e.to_string()))?;
        if let Some(value) = sysctls.remove(&key) {
            fs::write(&path, value)
                .map_err(|e| Failure::invalid(format!("set sysctl {key}: {e}")))?;
        }
    }
    Ok(())
}

/// Hooks of the runtime's namespace are programs of the host, which runs them
/// itself. `startContainer` runs inside the container and stays.
fn adapt_hooks(spec: &mut Spec) {
    let start = spec
        .hooks()
        .as_ref()
        .and_then(|h| h.start_container().clone());
    spec.set_hooks(start.filter(|s| !s.is_empty()).map(|start| {
        let mut hooks = Hooks::default();
        hooks.set_start_container(Some(start));
        hooks
    }));
}

/// Takes out the hooks that run when the container is started.
pub(crate) fn take_start_hooks(spec: &mut Spec) -> Vec<Hook> {
    let hooks = spec.hooks().as_ref();
    let hooks = hooks.and_then(|h| h.start_container().clone());
    spec.set_hooks(None);
    hooks.unwrap_or_default()
}

/// Leaves the seccomp profile where execs find it.
pub(crate) fn save_seccomp(spec: &Spec, path: &Path) -> Result<(), Failure> {
    let Some(seccomp) = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref()) else {
        return Ok(());
    };
    let json = serde_json::to_vec(seccomp).map_err(|e| Failure::internal("seccomp profile", e))?;
    fs::write(path, json).map_err(|e| Failure::internal(path.display(), e))
}

/// The profile that [`save_seccomp`] left, if there was one.
pub(crate) fn load_seccomp(path: &Path) -> Result<Option<LinuxSeccomp>, Failure> {
    match fs::read(path) {
        Ok(json) => serde_json::from_slice(&json)
            .map(Some)
            .map_err(|e| Failure::internal(path.display(), e)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::internal(path.display(), e)),
    }
}

/// Writes config.json for libcontainer.
pub(crate) fn save(spec: &Spec, bundle: &Path) -> Result<(), Failure> {
    let path: PathBuf = bundle.join("config.json");
    let json = serde_json::to_vec(spec).map_err(|e| Failure::internal("spec", e))?;
    fs::write(&path, json).map_err(|e| Failure::internal(path.display(), e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn host_spec() -> serde_json::Value {
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "process": {
                "args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0},
                "noNewPrivileges": false, "apparmorProfile": "docker-default",
            },
            "hooks": {"prestart": [{"path": "/usr/bin/host-thing"}]},
            "linux": {
                "cgroupsPath": "/kubepods/x",
                "namespaces": [{"type": "mount"}, {"type": "pid"},
                    {"type": "network", "path": "/var/run/netns/x"}],
                "resources": {"blockIO": {"weight": 10}, "pids": {"limit": 5}},
            },
        })
    }

    fn adapted(value: &serde_json::Value) -> Result<Spec, Failure> {
        let paths = ContainerPaths::new("c1").unwrap();
        adapt(&serde_json::to_vec(value).unwrap(), &paths)
    }

    #[test]
    fn the_hosts_things_are_taken_out() {
        let spec = adapted(&host_spec()).unwrap();
        let process = spec.process().as_ref().unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(process.no_new_privileges(), None);
        assert_eq!(process.apparmor_profile(), &None);
        assert!(spec.hooks().is_none());
        assert_eq!(
            linux.cgroups_path().as_deref(),
            Some(Path::new("/walnut/c1"))
        );
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert!(
            namespaces
                .iter()
                .all(|n| n.typ() != LinuxNamespaceType::Network)
        );
        let resources = linux.resources().as_ref().unwrap();
        assert!(resources.block_io().is_none() && resources.pids().is_some());
        assert_eq!(
            spec.root().as_ref().unwrap().path(),
            Path::new("/run/walnut/c1/rootfs")
        );
    }

    #[test]
    fn a_call_nobody_listens_for_fails() {
        let mut spec = host_spec();
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
        });
        let adapted_spec = adapted(&spec).unwrap();
        let seccomp = adapted_spec.linux().as_ref().unwrap().seccomp();
        let rules = seccomp.as_ref().unwrap().syscalls().as_ref().unwrap();
        assert_eq!(rules[0].action(), LinuxSeccompAction::ScmpActErrno);
        assert_eq!(rules[0].errno_ret(), Some(38));
        spec["linux"]["seccomp"]["listenerPath"] = json!("/run/listener");
        assert!(adapted(&spec).is_err());
    }

    #[test]
    fn bad_specs_are_invalid() {
        use walnut_agent::wire::Status;
        for (pointer, value) in [
            ("/root/path", json!("/etc")),
            ("/root/path", json!("../../../etc")),
            ("/process/args", json!([])),
            ("/process/cwd", json!("relative")),
            ("/linux/namespaces", json!([{"type": "pid"}])),
            ("/process", json!(null)),
        ] {
            let mut spec = host_spec();
            *spec.pointer_mut(pointer).unwrap() = value;
            let failure = adapted(&spec).unwrap_err();
            assert_eq!(failure.status, Status::Invalid, "{pointer}: {failure}");
        }
        let paths = ContainerPaths::new("c1").unwrap();
        assert!(adapt(b"{", &paths).is_err());
    }
}
