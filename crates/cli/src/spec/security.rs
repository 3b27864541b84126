//! What a container's processes may do: capabilities, filters of system calls.

use std::{collections::BTreeSet, io::Read, path::PathBuf, str::FromStr};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::args::ContainerArgs;

/// Docker's default set: what an ordinary image's entry point may need.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// The others that Linux has.
const MORE: [&str; 27] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_DAC_READ_SEARCH",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_NET_ADMIN",
    "CAP_NET_BROADCAST",
    "CAP_PERFMON",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
];

/// Largest profile that is read.
const PROFILE_MAX: u64 = 4 << 20;
/// Version of the oldest kernel that guests have.
const KERNEL: (u32, u32) = (6, 1);

/// An option of `--security-opt`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SecurityOpt {
    /// Programs gain no privileges by being executed.
    NoNewPrivileges(bool),
    /// A filter of system calls.
    Seccomp(PathBuf),
    /// Nothing of /proc and /sys is hidden.
    SystemPaths,
    /// What holds here in any case.
    AsItIs,
}

impl FromStr for SecurityOpt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once(['=', ':']).unwrap_or((text, ""));
        Ok(match (name, value) {
            ("no-new-privileges", "" | "true") => Self::NoNewPrivileges(true),
            ("no-new-privileges", "false") => Self::NoNewPrivileges(false),
            ("seccomp", "unconfined") => Self::AsItIs,
            ("seccomp", path) if !path.is_empty() => Self::Seccomp(path.into()),
            ("systempaths", "unconfined") => Self::SystemPaths,
            ("apparmor", "unconfined") | ("label", "disable") => Self::AsItIs,
            ("apparmor" | "label", _) => {
                return Err(format!(
                    "{text}: the container's kernel is its own, without AppArmor and SELinux: the machine is what confines it; leave it out"
                ));
            }
            _ => {
                return Err(format!(
                    "{text:?} is not known; use no-new-privileges, seccomp=FILE, seccomp=unconfined or systempaths=unconfined"
                ));
            }
        })
    }
}

/// The capabilities that are left of Docker's default by what was asked.
fn capabilities(add: &[String], drop: &[String]) -> Result<BTreeSet<&'static str>> {
    let known = || CAPABILITIES.iter().chain(&MORE).copied();
    let name = |word: &str| -> Result<Option<&'static str>> {
        let upper = word.to_ascii_uppercase();
        if upper == "ALL" {
            return Ok(None);
        }
        let full = match upper.starts_with("CAP_") {
            true => upper,
            false => format!("CAP_{upper}"),
        };
        let found = known().find(|cap| *cap == full);
        found.map(Some).ok_or_else(|| {
            let hint = walnut_sandbox::similar(&full, known());
            let hint = hint
                .map(|h| format!("; did you mean {h}?"))
                .unwrap_or_default();
            anyhow!("capability {word:?} is not known{hint}")
        })
    };
    let names = |words: &[String]| words.iter().map(|w| name(w)).collect::<Result<Vec<_>>>();
    let (add, drop) = (names(add)?, names(drop)?);
    // As Docker has it: ALL first, then the single ones.
    let mut set: BTreeSet<_> = match (add.contains(&None), drop.contains(&None)) {
        (true, _) => known().collect(),
        (false, true) => BTreeSet::new(),
        (false, false) => CAPABILITIES.into(),
    };
    for cap in drop.into_iter().flatten() {
        set.remove(cap);
    }
    set.extend(add.into_iter().flatten());
    Ok(set)
}

/// The command line's security in a spec.
pub(super) fn apply(args: &ContainerArgs, spec: &mut Value) -> Result<()> {
    let security = &args.security;
    let set = capabilities(&security.cap_add, &security.cap_drop)?;
    spec["process"]["capabilities"] =
        json!({ "bounding": set, "effective": set, "permitted": set });
    for option in &security.security_opt {
        match option {
            SecurityOpt::NoNewPrivileges(on) => spec["process"]["noNewPrivileges"] = json!(on),
            SecurityOpt::Seccomp(path) => {
                let profile = load(path, &set)
                    .with_context(|| format!("--security-opt seccomp={}", path.display()))?;
                spec["linux"]["seccomp"] = profile;
            }
            SecurityOpt::SystemPaths => {
                spec["linux"]["maskedPaths"] = json!([]);
                spec["linux"]["readonlyPaths"] = json!([]);
            }
            SecurityOpt::AsItIs => {}
        }
    }
    Ok(())
}

/// Docker's form of a profile; the specification's is one without conditions.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    arch_map: Vec<ArchMap>,
    #[serde(default)]
    flags: Vec<String>,
    listener_path: Option<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: String,
    #[serde(default)]
    sub_architectures: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    name: Option<String>,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<Value>>,
    #[serde(default)]
    includes: Conditions,
    #[serde(default)]
    excludes: Conditions,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Conditions {
    arches: Vec<String>,
    caps: Vec<String>,
    min_kernel: String,
}

impl Conditions {
    fn arch(&self) -> bool {
        let here = match std::env::consts::ARCH {
            "x86_64" => ["amd64", "x86", "x32"].as_slice(),
            _ => ["arm64", "arm"].as_slice(),
        };
        self.arches.iter().any(|arch| here.contains(&arch.as_str()))
    }

    fn kernel(&self) -> bool {
        let mut parts = self
            .min_kernel
            .split('.')
            .map(|part| part.parse().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) <= KERNEL
    }

    fn caps(&self, set: &BTreeSet<&str>) -> bool {
        self.caps.iter().any(|cap| set.contains(cap.as_str()))
    }
}

impl Rule {
    fn holds(&self, set: &BTreeSet<&str>) -> bool {
        let (with, without) = (&self.includes, &self.excludes);
        (with.arches.is_empty() || with.arch())
            && (with.caps.is_empty() || with.caps.iter().all(|cap| set.contains(cap.as_str())))
            && with.kernel()
            && !without.arch()
            && !without.caps(set)
            && (without.min_kernel.is_empty() || !without.kernel())
    }
}

/// A profile in the specification's form, for processes with these capabilities.
fn load(path: &std::path::Path, set: &BTreeSet<&'static str>) -> Result<Value> {
    let mut text = String::new();
    let file = std::fs::File::open(path).context("open it")?;
    let read = file.take(PROFILE_MAX + 1).read_to_string(&mut text);
    if read.context("read it")? as u64 > PROFILE_MAX {
        bail!("it is larger than {PROFILE_MAX} bytes");
    }
    convert(&text, set)
}

fn convert(text: &str, set: &BTreeSet<&'static str>) -> Result<Value> {
    let profile: Profile = serde_json::from_str(text).context("read it as a profile")?;
    if profile.listener_path.is_some() {
        bail!(
            "it has a listener, which would be a program of the host's: the container's kernel cannot reach it"
        );
    }
    let native = match std::env::consts::ARCH {
        "x86_64" => "SCMP_ARCH_X86_64",
        _ => "SCMP_ARCH_AARCH64",
    };
    let mut architectures = profile.architectures;
    for map in profile.arch_map {
        if map.architecture == native {
            architectures.push(map.architecture);
            architectures.extend(map.sub_architectures);
        }
    }
    let mut syscalls = Vec::new();
    for rule in profile.syscalls.iter().filter(|rule| rule.holds(set)) {
        let names: Vec<_> = rule.names.iter().chain(&rule.name).collect();
        let mut call = json!({ "names": names, "action": rule.action });
        if let Some(errno) = rule.errno_ret {
            call["errnoRet"] = json!(errno);
        }
        if let Some(args) = rule.args.as_ref().filter(|args| !args.is_empty()) {
            call["args"] = json!(args);
        }
        syscalls.push(call);
    }
    let mut seccomp = json!({ "defaultAction": profile.default_action, "syscalls": syscalls });
    if let Some(errno) = profile.default_errno_ret {
        seccomp["defaultErrnoRet"] = json!(errno);
    }
    if !architectures.is_empty() {
        seccomp["architectures"] = json!(architectures);
    }
    if !profile.flags.is_empty() {
        seccomp["flags"] = json!(profile.flags);
    }
    // Before anything is started.
    let _: oci_spec::runtime::LinuxSeccomp =
        serde_json::from_value(seccomp.clone()).context("read it as a profile")?;
    Ok(seccomp)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn capabilities_are_added_and_dropped() {
        let got = |add: &str, drop: &str| capabilities(&words(add), &words(drop));
        assert_eq!(got("", "").unwrap().len(), 14);
        assert!(got("net_admin", "").unwrap().contains("CAP_NET_ADMIN"));
        assert!(!got("", "CAP_CHOWN").unwrap().contains("CAP_CHOWN"));
        let one = got("chown", "all").unwrap();
        assert_eq!(one.into_iter().collect::<Vec<_>>(), ["CAP_CHOWN"]);
        assert_eq!(got("ALL", "").unwrap().len(), 41);
        assert_eq!(got("ALL", "sys_admin").unwrap().len(), 40);
        let slip = got("NET_ADMNI", "").unwrap_err().to_string();
        assert!(slip.contains("did you mean CAP_NET_ADMIN?"), "{slip}");
    }

    #[test]
    fn options() {
        for (text, opt) in [
            ("no-new-privileges", SecurityOpt::NoNewPrivileges(true)),
            (
                "no-new-privileges:false",
                SecurityOpt::NoNewPrivileges(false),
            ),
            ("seccomp=unconfined", SecurityOpt::AsItIs),
            ("seccomp=/p", SecurityOpt::Seccomp("/p".into())),
        ] {
            assert_eq!(text.parse(), Ok(opt));
        }
        for (text, why) in [
            ("apparmor=docker-default", "leave it out"),
            ("seccomp", "is not known"),
            ("x=y", "is not known"),
        ] {
            let said = text.parse::<SecurityOpt>().unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }

    #[test]
    fn profiles_are_converted() {
        let set = capabilities(&[], &[]).unwrap();
        let text = r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,
          "archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]}],
          "syscalls":[
            {"names":["read"],"action":"SCMP_ACT_ALLOW"},
            {"name":"chroot","action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_CHROOT"]}},
            {"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
            {"names":["clone"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_CHOWN"]}},
            {"names":["later"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"99.1"}},
            {"names":["ptrace"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}},
            {"names":["s390"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["s390x"]}}]}"#;
        let profile = convert(text, &set).unwrap();
        let names = profile["syscalls"].as_array().unwrap().iter();
        let names: Vec<_> = names.map(|c| c["names"][0].as_str().unwrap()).collect();
        assert_eq!(names, ["read", "chroot", "ptrace"]);
        assert_eq!(profile["defaultErrnoRet"], 1);
        for bad in [
            "{}",
            r#"{"defaultAction":"SCMP_ACT_NOTHING"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#,
        ] {
            assert!(convert(bad, &set).is_err(), "{bad}");
        }
    }
}
