//! A bundle, and whether a container of it can be what it says.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use chrono::{SecondsFormat, Utc};
use oci_spec::runtime::{Linux, LinuxNamespaceType, Spec};
use walnut_sandbox::{BundleState, BundleStatus, Bundles, foreign_device, parse_spec};

const CONFIG: &str = "config.json";
/// Largest configuration that is read.
const CONFIG_MAX: u64 = 4 << 20;

/// A directory with a configuration.
#[derive(Debug)]
pub(super) struct Bundle {
    path: PathBuf,
    pub(super) spec: Spec,
    /// The configuration as it was read.
    pub(super) config: Vec<u8>,
    rootfs: PathBuf,
}

impl Bundle {
    /// Reads it, and refuses what cannot be had.
    pub(super) fn load(path: &Path) -> Result<Self> {
        let found = path.canonicalize();
        let path = found.with_context(|| format!("open the bundle {}", path.display()))?;
        let file = path.join(CONFIG);
        let config = read(&file)?;
        let spec = parse(&config).with_context(|| format!("read {}", file.display()))?;
        refuse(&spec)?;
        let root = spec.root().as_ref().map(|root| root.path().clone());
        let rootfs = path.join(root.context("the configuration has no root file system")?);
        let rootfs = rootfs
            .canonicalize()
            .with_context(|| format!("invalid rootfs {}", rootfs.display()))?;
        Ok(Self {
            path,
            spec,
            config,
            rootfs,
        })
    }

    /// Whether its process wants a terminal.
    pub(super) fn terminal(&self) -> bool {
        let process = self.spec.process().as_ref();
        process.and_then(|p| p.terminal()).unwrap_or(false)
    }

    /// Columns and rows of the terminal, if it says so.
    pub(super) fn console_size(&self) -> Option<(u16, u16)> {
        let size = self.spec.process().as_ref()?.console_size()?;
        let number = |n: u64| u16::try_from(n).ok().filter(|n| *n > 0);
        Some((number(size.width())?, number(size.height())?))
    }

    /// What is known of a container that is to be made of it.
    pub(super) fn state(&self, bundles: &Bundles, id: &str) -> BundleState {
        BundleState {
            version: 1,
            id: id.into(),
            oci_version: self.spec.version().clone(),
            status: BundleStatus::Creating,
            pid: 0,
            bundle: self.path.clone(),
            rootfs: self.rootfs.clone(),
            created: Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true),
            owner: nix::unistd::getuid().as_raw(),
            annotations: self.spec.annotations().clone().unwrap_or_default(),
            run_dir: bundles.run_dir(id),
            exit_code: None,
            oom_killed: false,
            error: None,
        }
    }
}

/// Reads the configuration that a container was made of.
pub(super) fn saved(bundles: &Bundles, id: &str) -> Result<Spec> {
    let file = bundles.config(id);
    parse(&read(&file)?).with_context(|| format!("read {}", file.display()))
}

/// Reads a file of JSON.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(CONFIG_MAX + 1).read_to_end(&mut bytes))
        .with_context(|| format!("open {}", path.display()))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > CONFIG_MAX {
        bail!("read {}: more than {CONFIG_MAX} bytes", path.display());
    }
    Ok(bytes)
}

fn parse(config: &[u8]) -> Result<Spec> {
    Ok(parse_spec(config)?)
}

/// What another kernel cannot have of this one.
fn refuse(spec: &Spec) -> Result<()> {
    if spec.process().is_none() {
        bail!("the configuration has no process");
    }
    let hooks = spec.hooks().as_ref();
    if hooks.is_some_and(|h| h.create_container().as_ref().is_some_and(|h| !h.is_empty())) {
        bail!(
            "createContainer hooks cannot be run: they are programs of the host in the namespaces of the container, which are another kernel's; createRuntime and startContainer hooks can"
        );
    }
    if let Some(device) = foreign_device(spec) {
        bail!(
            "the device {} is the host's: the container's kernel does not have it",
            device.display()
        );
    }
    match spec.linux() {
        Some(linux) => refuse_linux(linux),
        None => bail!("the configuration has no \"linux\" object"),
    }
}

fn refuse_linux(linux: &Linux) -> Result<()> {
    use LinuxNamespaceType as Type;
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    for namespace in namespaces {
        // Whether that of the network can be had is seen when it is set up.
        if namespace.typ() != Type::Network
            && let Some(path) = namespace.path()
        {
            bail!(
                "the {:?} namespace {} cannot be joined: the container has a kernel of its own",
                namespace.typ(),
                path.display()
            );
        }
    }
    if !namespaces
        .iter()
        .any(|namespace| namespace.typ() == Type::Pid)
    {
        bail!(
            "the processes of the host cannot be shown to the container, which has a kernel of its own: it needs a PID namespace"
        );
    }
    if let Some(seccomp) = linux.seccomp()
        && seccomp.listener_path().is_some()
    {
        bail!("seccomp notifications cannot leave the container's kernel");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(more: &str) -> Result<(), String> {
        let config = format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},
            "process":{{"user":{{"uid":0,"gid":0}},"args":["true"],"cwd":"/"}},{more}}}"#
        );
        refuse(&parse(config.as_bytes()).unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn what_another_kernel_cannot_have_is_refused() {
        let linux = |more: &str| {
            verdict(&format!(
                r#""linux":{{"namespaces":[{{"type":"pid"}},{{"type":"network","path":"/run/netns/x"}}]{more}}}"#
            ))
        };
        linux("").unwrap();
        linux(r#","devices":[{"path":"/dev/fuse","type":"c","major":10,"minor":229}]"#).unwrap();
        for (more, says) in [
            (
                r#","devices":[{"path":"/dev/sda","type":"b","major":8,"minor":0}]"#,
                "/dev/sda",
            ),
            (
                r#","devices":[{"path":"/dev/kvm0","type":"c","major":99,"minor":0}]"#,
                "/dev/kvm0",
            ),
            (
                r#","seccomp":{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#,
                "notifications",
            ),
        ] {
            let error = linux(more).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        for (more, says) in [
            (
                r#""linux":{"namespaces":[{"type":"mount"}]}"#,
                "PID namespace",
            ),
            (
                r#""linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}"#,
                "/proc/1/ns/pid cannot be joined",
            ),
            (
                r#""hooks":{"createContainer":[{"path":"/bin/x"}]},"linux":{"namespaces":[{"type":"pid"}]}"#,
                "createContainer",
            ),
        ] {
            let error = verdict(more).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
