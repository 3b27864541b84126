//! Limits and parameters, as the command line has them and as a spec does.

use std::{os::unix::fs::MetadataExt, path::PathBuf, str::FromStr};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use walnut_sandbox::Bytes;

use crate::{
    args::ContainerArgs,
    values::{Cpus, Size},
};

/// Names of `ulimit` that Linux knows.
const ULIMITS: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];
/// Major numbers of devices that every kernel has.
const MAJORS: [u64; 3] = [1, 5, 10];

/// `NAME=SOFT[:HARD]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UlimitArg {
    pub(crate) name: String,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

impl FromStr for UlimitArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, limits) = text.split_once('=').ok_or("write it as nofile=1024:4096")?;
        if !ULIMITS.contains(&name) {
            return Err(format!(
                "unknown limit {name:?}; there are {}",
                ULIMITS.join(", ")
            ));
        }
        let number = |text: &str| match text {
            "-1" | "unlimited" => Ok(u64::MAX),
            text => text.parse().map_err(|e| format!("{text:?}: {e}")),
        };
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(format!("{text}: the soft limit is above the hard one"));
        }
        Ok(Self {
            name: name.into(),
            soft,
            hard,
        })
    }
}

/// `NAME=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SysctlArg(pub(crate) String, pub(crate) String);

impl FromStr for SysctlArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text
            .split_once('=')
            .ok_or("write it as net.core.somaxconn=1024")?;
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
        if name.is_empty() || !name.chars().all(fine) || name.contains("..") {
            return Err(format!("{name:?} is no name of a kernel's parameter"));
        }
        Ok(Self(name.replace('/', "."), value.to_owned()))
    }
}

/// `DEVICE[:CONTAINER[:rwm]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeviceArg {
    source: PathBuf,
    target: PathBuf,
    access: String,
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let access =
            |text: &str| !text.is_empty() && text.chars().all(|c| matches!(c, 'r' | 'w' | 'm'));
        let parts: Vec<_> = text.split(':').collect();
        let (source, target, rights) = match parts.as_slice() {
            [one] => (*one, *one, "rwm"),
            [one, rights] if access(rights) => (*one, *one, *rights),
            [one, two] => (*one, *two, "rwm"),
            [one, two, rights] if access(rights) => (*one, *two, *rights),
            _ => return Err("write it as /dev/fuse or /dev/fuse:/dev/fuse:rwm".into()),
        };
        if !source.starts_with('/') || !target.starts_with("/dev/") || target.contains("..") {
            return Err("both paths must be absolute, and the container's below /dev".into());
        }
        Ok(Self {
            source: source.into(),
            target: target.into(),
            access: rights.into(),
        })
    }
}

impl DeviceArg {
    /// The device of a spec, and the rule that lets it be used.
    fn spec(&self) -> Result<(Value, Value)> {
        let path = self.source.display();
        let meta = match std::fs::metadata(&self.source) {
            Ok(meta) => meta,
            Err(e) => bail!("--device {path}: {e}"),
        };
        let number = meta.rdev();
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        let is_char = meta.mode() & libc::S_IFMT == libc::S_IFCHR;
        if !is_char || !MAJORS.contains(&major) {
            bail!(
                "--device {path}: it is the host's, and the container's kernel does not have it; only devices that every kernel has, as /dev/fuse and /dev/net/tun, can be given"
            );
        }
        let device = json!({
            "path": self.target, "type": "c", "major": major, "minor": minor,
            "fileMode": meta.mode() & 0o777, "uid": 0, "gid": 0,
        });
        let rule = json!({
            "allow": true, "type": "c", "major": major, "minor": minor, "access": self.access,
        });
        Ok((device, rule))
    }
}

/// Limits as the spec has them.
pub(crate) fn resources(memory: Option<Size>, cpus: Option<Cpus>, pids: Option<i64>) -> Value {
    let mut resources = json!({});
    if let Some(memory) = memory {
        resources["memory"] = json!({ "limit": memory.0, "swap": memory.0 });
    }
    if let Some(cpus) = cpus {
        resources["cpu"] = json!({ "quota": cpus.0, "period": 100_000 });
    }
    if let Some(pids) = pids {
        // As in Docker, 0 is no limit either.
        let limit = if pids <= 0 { -1 } else { pids };
        resources["pids"] = json!({ "limit": limit });
    }
    resources
}

/// Refuses more swap than the machine has: none.
pub(crate) fn check_swap(swap: Option<&str>, memory: Option<Size>) -> Result<()> {
    let Some(swap) = swap else { return Ok(()) };
    let bytes = match swap {
        // Docker's word for "as much as there is".
        "-1" | "0" => return Ok(()),
        text => match text.parse::<Bytes>() {
            Ok(Bytes(bytes)) => bytes,
            Err(e) => bail!("--memory-swap {text}: {e}"),
        },
    };
    match memory {
        None => bail!("--memory-swap {swap}: give --memory too"),
        Some(memory) if i128::from(memory.0) == i128::from(bytes) => Ok(()),
        Some(_) => bail!(
            "--memory-swap {swap}: the container's machine has no swap (the host may swap the machine); give the same as --memory, or leave it out"
        ),
    }
}

/// The limits of the command line in a spec.
pub(super) fn apply(args: &ContainerArgs, spec: &mut Value) -> Result<()> {
    let limits = &args.limits;
    check_swap(limits.memory_swap.as_deref(), limits.memory)?;
    // One that runs on two processors needs no more than two of its own.
    let set = limits
        .cpuset_cpus
        .as_ref()
        .map(|set| Cpus::whole(set.len()));
    let cpus = limits.cpus.or(set);
    let mut resources = resources(limits.memory, cpus, limits.pids_limit);
    if !args.security.device.is_empty() {
        let all: Result<Vec<_>> = args.security.device.iter().map(DeviceArg::spec).collect();
        let (devices, rules): (Vec<_>, Vec<_>) = all?.into_iter().unzip();
        spec["linux"]["devices"] = json!(devices);
        let deny = json!({ "allow": false, "access": "rwm" });
        resources["devices"] = json!(std::iter::once(deny).chain(rules).collect::<Vec<_>>());
    }
    spec["linux"]["resources"] = resources;
    if !limits.ulimit.is_empty() {
        let limit = |u: &UlimitArg| {
            let kind = format!("RLIMIT_{}", u.name.to_uppercase());
            json!({ "type": kind, "soft": u.soft, "hard": u.hard })
        };
        let all: Vec<_> = limits.ulimit.iter().map(limit).collect();
        spec["process"]["rlimits"] = json!(all);
    }
    for SysctlArg(name, value) in &limits.sysctl {
        spec["linux"]["sysctl"][name] = json!(value);
    }
    if let Some(Bytes(bytes)) = limits.shm_size {
        if bytes == 0 {
            bail!("--shm-size 0: give some, as 64m");
        }
        let mounts = spec["mounts"].as_array_mut().into_iter().flatten();
        for mount in mounts.filter(|m| m["destination"] == "/dev/shm") {
            mount["options"] = json!([
                "nosuid",
                "noexec",
                "nodev",
                "mode=1777",
                format!("size={bytes}")
            ]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulimits() {
        let one: UlimitArg = "nofile=10:20".parse().unwrap();
        assert_eq!((one.soft, one.hard), (10, 20));
        let one: UlimitArg = "core=-1".parse().unwrap();
        assert_eq!((one.soft, one.hard), (u64::MAX, u64::MAX));
        for text in ["nofile", "files=1", "nofile=2:1", "nofile=x"] {
            assert!(text.parse::<UlimitArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn devices() {
        let null: DeviceArg = "/dev/null:/dev/nothing:r".parse().unwrap();
        let (device, rule) = null.spec().unwrap();
        assert_eq!(
            (&device["path"], &rule["access"]),
            (&json!("/dev/nothing"), &json!("r"))
        );
        let file: DeviceArg = "/proc/version:/dev/x".parse().unwrap();
        assert!(
            file.spec()
                .unwrap_err()
                .to_string()
                .contains("every kernel has")
        );
        for text in [
            "null",
            "/dev/null:x",
            "/dev/null:/etc/x",
            "/dev/null:/dev/../x",
            "/a:/dev/b:q",
        ] {
            assert!(text.parse::<DeviceArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn swap_is_what_there_is() {
        let memory = Some(Size(64 << 20));
        for fine in [None, Some("-1"), Some("64m")] {
            check_swap(fine, memory).unwrap();
        }
        for (swap, memory) in [
            (Some("128m"), memory),
            (Some("64m"), None),
            (Some("x"), memory),
        ] {
            assert!(check_swap(swap, memory).is_err());
        }
    }

    #[test]
    fn parameters() {
        let one: SysctlArg = "net/core/somaxconn=5".parse().unwrap();
        assert_eq!(one, SysctlArg("net.core.somaxconn".into(), "5".into()));
        for text in ["x", "=1", "a b=1", "a..b=1"] {
            assert!(text.parse::<SysctlArg>().is_err(), "{text}");
        }
    }
}
