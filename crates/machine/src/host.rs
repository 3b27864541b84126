//! What this host can do, for `walnut check`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::{Deserialize, Serialize};

use crate::{
    Programs,
    kvm_probe::{self, KvmStatus},
    process::quotable,
    select::{Chosen, DriverChoice, choose, find_qemu, is_executable},
};

/// Oldest QEMU the driver is written for.
const QEMU_MIN: (u32, u32) = (7, 2);

/// Files a sandbox needs besides [`Programs`]; the caller knows where they lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assets {
    /// The sandbox kernel.
    pub kernel: PathBuf,
    /// The initramfs that holds the agent.
    pub initramfs: PathBuf,
    /// virtiofsd, if one was found.
    pub virtiofsd: Option<PathBuf>,
}

/// How good or bad an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works with less; `advice` says how to have more.
    Warn,
    /// Sandboxes cannot run until `advice` is followed.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostItem {
    /// What: "kvm", "memory".
    pub name: String,
    /// How it stands.
    pub status: Level,
    /// What was found.
    pub detail: String,
    /// What a person can do about it; empty if nothing needs doing.
    pub advice: String,
}

/// Everything that was looked at, and what follows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostReport {
    /// The items, in the order a person reads them.
    pub items: Vec<HostItem>,
    /// KVM's verdict in a form for programs.
    pub kvm: KvmStatus,
    /// What [`DriverChoice::Auto`] means here.
    pub auto: Option<Chosen>,
}

impl HostReport {
    /// Looks at this host. Probes KVM afresh and runs `qemu --version`: takes
    /// up to a second; blocks the caller's thread.
    pub fn gather(programs: &Programs, assets: &Assets) -> Self {
        let kvm = kvm_probe::probe();
        let items = vec![
            architecture(),
            cores(),
            memory(),
            kvm_item(&kvm),
            file(
                "walnut-vmm",
                &programs.vmm,
                is_executable,
                "build or reinstall Walnut",
            ),
            qemu(programs, &kvm),
            file(
                "vsock device",
                &programs.vsock,
                is_executable,
                "build or reinstall Walnut",
            ),
            virtiofsd(assets),
            file(
                "sandbox kernel",
                &assets.kernel,
                is_file,
                "build it, or reinstall Walnut",
            ),
            file(
                "initramfs",
                &assets.initramfs,
                is_file,
                "build it, or reinstall Walnut",
            ),
            cgroups(),
            user_namespaces(),
            landlock(),
            device(
                "tun",
                "/dev/net/tun",
                "modprobe tun, for networks other than loopback",
            ),
            device("vhost-vsock", "/dev/vhost-vsock", ""),
        ];
        let auto = choose(DriverChoice::Auto, &kvm).ok();
        Self { items, kvm, auto }
    }

    /// Whether sandboxes can run here.
    pub fn can_run(&self) -> bool {
        self.items.iter().all(|i| i.status != Level::Missing)
    }
}

fn item(name: &str, status: Level, detail: impl Into<String>, advice: &str) -> HostItem {
    HostItem {
        name: name.to_owned(),
        status,
        detail: detail.into(),
        advice: advice.to_owned(),
    }
}

fn architecture() -> HostItem {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let detail = format!("{}, Linux {}", std::env::consts::ARCH, release.trim());
    match std::env::consts::ARCH {
        "x86_64" => item("architecture", Level::Ok, detail, ""),
        _ => item(
            "architecture",
            Level::Missing,
            detail,
            "Walnut runs on x86_64 so far",
        ),
    }
}

fn cores() -> HostItem {
    match std::thread::available_parallelism() {
        Ok(n) => item("processors", Level::Ok, n.to_string(), ""),
        Err(e) => item("processors", Level::Warn, format!("unknown: {e}"), ""),
    }
}

fn memory() -> HostItem {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mib = |key: &str| {
        meminfo.lines().find_map(|line| {
            let kib: u64 = line
                .strip_prefix(key)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()?;
            Some(kib / 1024)
        })
    };
    let (Some(total), Some(free)) = (mib("MemTotal:"), mib("MemAvailable:")) else {
        return item("memory", Level::Warn, "unknown", "mount /proc");
    };
    let detail = format!("{free} MiB available of {total} MiB");
    match free {
        512.. => item("memory", Level::Ok, detail, ""),
        _ => item(
            "memory",
            Level::Warn,
            detail,
            "a sandbox wants some 200 MiB",
        ),
    }
}

fn kvm_item(kvm: &KvmStatus) -> HostItem {
    let advice = match kvm {
        KvmStatus::Usable { .. } => return item("kvm", Level::Ok, kvm.to_string(), ""),
        KvmStatus::NoPermission => "add the user to the group kvm for hardware speed",
        KvmStatus::Absent => "enable virtualization in the firmware, or nested on the host's host",
        KvmStatus::Unusable { .. } => "nothing to do: software emulation is used, more slowly",
    };
    item("kvm", Level::Warn, kvm.to_string(), advice)
}

/// QEMU, without which a host with KVM does well.
fn qemu(programs: &Programs, kvm: &KvmStatus) -> HostItem {
    let mut item = emulator(programs);
    if item.status == Level::Missing && matches!(kvm, KvmStatus::Usable { .. }) {
        item.status = Level::Warn;
    }
    item
}

fn emulator(programs: &Programs) -> HostItem {
    const ADVICE: &str = "on Debian: apt-get install qemu-system-x86";
    let found = match &programs.qemu {
        Some(path) => Ok(path.clone()),
        None => find_qemu(),
    };
    let path = match found {
        Ok(path) => path,
        Err(error) => return item("qemu", Level::Missing, error.to_string(), ADVICE),
    };
    let Some(line) = version_line(&path) else {
        let detail = format!("{} does not say its version", path.display());
        return item("qemu", Level::Missing, detail, ADVICE);
    };
    let detail = format!("{} ({line})", path.display());
    match version_in(&line) {
        Some(version) if version >= QEMU_MIN => item("qemu", Level::Ok, detail, ""),
        Some(_) => item(
            "qemu",
            Level::Missing,
            detail,
            "QEMU 7.2 or newer is needed",
        ),
        None => item("qemu", Level::Warn, detail, "QEMU 7.2 or newer is needed"),
    }
}

/// The first line of `program --version`.
fn version_line(program: &Path) -> Option<String> {
    let output = Command::new(program)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(quotable)
}

/// Major and minor version of the QEMU at `program`, which is run to tell.
pub(crate) fn qemu_version(program: &Path) -> Option<(u32, u32)> {
    version_in(&version_line(program)?)
}

/// Major and minor number in "QEMU emulator version 7.2.22 (Debian …)".
fn version_in(line: &str) -> Option<(u32, u32)> {
    let version = line.split("version ").nth(1)?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}

fn file(name: &str, path: &Path, good: fn(&Path) -> bool, advice: &str) -> HostItem {
    if good(path) {
        return item(name, Level::Ok, path.display().to_string(), "");
    }
    let detail = format!("{} is not there", path.display());
    item(name, Level::Missing, detail, advice)
}

fn virtiofsd(assets: &Assets) -> HostItem {
    match &assets.virtiofsd {
        Some(path) if is_executable(path) => {
            item("virtiofsd", Level::Ok, path.display().to_string(), "")
        }
        _ => item(
            "virtiofsd",
            Level::Warn,
            "not found: host directories cannot be shared with sandboxes",
            "on Debian 12 it comes with qemu-system-common, later as virtiofsd",
        ),
    }
}

fn cgroups() -> HostItem {
    let detail = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        "version 2"
    } else if Path::new("/sys/fs/cgroup/unified").exists() {
        "version 1, with a version 2 hierarchy beside it"
    } else if Path::new("/sys/fs/cgroup").is_dir() {
        "version 1"
    } else {
        "none"
    };
    item("cgroups", Level::Ok, detail, "")
}

fn user_namespaces() -> HostItem {
    let max = fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    match max.trim().parse::<u64>() {
        Ok(1..) => item("user namespaces", Level::Ok, "available", ""),
        _ => item(
            "user namespaces",
            Level::Warn,
            "not available: Walnut must run as root to share directories",
            "sysctl user.max_user_namespaces",
        ),
    }
}

fn landlock() -> HostItem {
    // With a null attribute, no size and the version flag, the call changes
    // nothing and returns the ABI's version.
    // SAFETY: passes no memory.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0,
            1,
        )
    };
    match abi {
        1.. => item("landlock", Level::Ok, format!("ABI {abi}"), ""),
        _ => item(
            "landlock",
            Level::Warn,
            "not available",
            "boot with lsm=landlock,…",
        ),
    }
}

/// A device that some hosts have and nothing depends on.
fn device(name: &str, path: &str, advice: &str) -> HostItem {
    if Path::new(path).exists() {
        return item(name, Level::Ok, path, "");
    }
    let detail = format!("no {path}; not needed");
    item(name, Level::Ok, detail, advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs() -> Programs {
        Programs::new(Path::new("/nowhere"))
    }

    #[test]
    fn report_names_what_is_missing_and_survives_json() {
        let assets = Assets {
            kernel: "/nowhere/vmlinux".into(),
            initramfs: "/dev/null".into(),
            virtiofsd: None,
        };
        let report = HostReport::gather(&programs(), &assets);
        let json = serde_json::to_string_pretty(&report).unwrap();
        println!("{json}");
        assert_eq!(serde_json::from_str::<HostReport>(&json).unwrap(), report);
        assert!(!report.can_run());
        let missing: Vec<_> = report
            .items
            .iter()
            .filter(|i| i.status == Level::Missing)
            .map(|i| i.name.as_str())
            .collect();
        assert!(missing.contains(&"vsock device"));
        assert!(missing.contains(&"sandbox kernel"));
        assert!(report.auto.is_some());
        for item in &report.items {
            assert!(
                item.status == Level::Ok || !item.advice.is_empty(),
                "{item:?}"
            );
        }
    }

    #[test]
    fn versions() {
        assert_eq!(
            version_in("QEMU emulator version 7.2.22 (Debian 1:7.2)"),
            Some((7, 2))
        );
        assert_eq!(version_in("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(version_in("something else"), None);
    }
}
