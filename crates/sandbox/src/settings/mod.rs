//! What the node's administrator decides: one TOML file, drop-ins beside it, and the
//! environment. What a pod may decide of it for itself is in [`asked`].
//!
//! A later source wins, key by key: what is built in, the file, its drop-ins in the order
//! of their names, the environment, then a pod's annotations as far as they are allowed.

mod asked;
mod bytes;
mod file;

use std::{
    collections::BTreeSet,
    env,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use walnut_machine::DriverChoice;
use walnut_network::Rules;

pub use asked::Annotation;
pub use bytes::Bytes;

use crate::{
    Error, Result,
    sizing::{MEMORY_MIN, VCPUS_MAX},
};

/// Names the file, instead of the usual one.
pub const SETTINGS_FILE: &str = "WALNUT_CONFIG";

const DRIVER: &str = "WALNUT_DRIVER";
/// Variable of the environment: longest that a guest may take until its agent answers, in
/// seconds.
pub const BOOT_TIMEOUT: &str = "WALNUT_BOOT_TIMEOUT";
const TEMPLATES: &str = "WALNUT_TEMPLATES";
const NETWORK: &str = "WALNUT_NETWORK";
const PRESSURE: &str = "WALNUT_PRESSURE";
/// The word that switches something off.
const OFF: &str = "off";
/// Longest time to boot that may be given, in seconds.
const BOOT_TIMEOUT_MAX: u64 = 3600;
const MIB: u64 = 1 << 20;
/// Where clouds tell any program of a node that asks who it is, with the node's credentials:
/// Amazon's, Google's, Azure's and others' address, and those of IPv6.
const METADATA: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
];

/// How sandboxes of a node are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Machines.
    pub machine: Machine,
    /// The machine of a container that is alone and has no limits of its own.
    pub container: Needs,
    /// The machine of a pod that does not say what its containers will need.
    pub pod: Needs,
    /// Networks.
    pub network: Network,
    /// The host that they run on.
    pub host: Host,
    /// Pods' annotations.
    pub annotations: Annotations,
    /// What a pod has asked for: its machine has at least this.
    #[serde(skip)]
    pub(crate) least: Least,
    /// What a pod wants to be held to, beside what the node holds it to.
    #[serde(skip)]
    pub(crate) own_egress: Option<Rules>,
}

/// How machines are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The driver.
    #[serde(with = "driver_name")]
    pub driver: DriverChoice,
    /// Longest that a guest may take until its agent answers, in seconds.
    pub boot_timeout: u64,
    /// Whether sandboxes start from templates.
    pub templates: bool,
}

/// The size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needs {
    /// Guest memory.
    pub memory: Bytes,
    /// vCPUs.
    pub vcpus: u32,
}

/// Networks of `walnut run`, and what guests may do on those and on pods'.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The network of containers that name none, or `none`.
    pub default: String,
    /// Directories with CNI's plugins.
    pub plugins: Vec<PathBuf>,
    /// What guests may send.
    #[serde(with = "rules")]
    pub egress: Rules,
}

/// The host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// The file by which the kernel tells of a shortage of memory (PSI), or `off`.
    pub pressure: PathBuf,
}

/// What pods may decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Annotations {
    /// Annotations that are heeded, without their prefix.
    pub allow: BTreeSet<Annotation>,
}

/// Sizes that a pod has asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Least {
    pub(crate) memory: u64,
    pub(crate) vcpus: u32,
}

impl Default for Settings {
    fn default() -> Self {
        let needs = |mib: u64| Needs {
            memory: Bytes(mib * MIB),
            vcpus: 1,
        };
        Self {
            machine: Machine {
                driver: DriverChoice::Auto,
                // What a slow and loaded emulated machine needs.
                boot_timeout: 60,
                templates: true,
            },
            container: needs(512),
            // Memory that its containers do not touch is not the host's loss.
            pod: needs(2048),
            network: Network {
                default: walnut_network::DEFAULT.into(),
                plugins: ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"]
                    .map(Into::into)
                    .into(),
                egress: Rules::deny(METADATA),
            },
            host: Host {
                pressure: "/proc/pressure/memory".into(),
            },
            annotations: Annotations {
                // What costs nobody else anything.
                allow: [Annotation::Template, Annotation::Egress].into(),
            },
            least: Least::default(),
            own_egress: None,
        }
    }
}

impl Settings {
    /// Those of the node: of the file that `WALNUT_CONFIG` names, which must then be
    /// there, else of the usual one.
    pub fn load() -> Result<Self> {
        Ok(Self::with_sources()?.0)
    }

    /// The same, and the files that were read.
    pub fn with_sources() -> Result<(Self, Vec<PathBuf>)> {
        let (file, must_exist) = match env::var_os(SETTINGS_FILE).filter(|v| !v.is_empty()) {
            Some(file) => (PathBuf::from(file), true),
            None => (usual(), false),
        };
        let (settings, files) = file::load(&file, must_exist)?;
        Ok((settings.in_environment(|name| env::var(name).ok())?, files))
    }

    /// Of another file, and its drop-ins.
    pub fn load_from(file: &Path) -> Result<Self> {
        let (settings, _) = file::load(file, true)?;
        settings.in_environment(|name| env::var(name).ok())
    }

    /// Of the text of such a file, without drop-ins.
    pub fn parse(text: &str) -> Result<Self> {
        let settings = file::parse(text, "the runtime's options")?;
        settings.in_environment(|name| env::var(name).ok())
    }

    /// As the file would have them.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Invalid(format!("write the settings: {e}")))
    }

    /// Longest that a guest may take until its agent answers.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.machine.boot_timeout)
    }

    /// The file that tells of the host's shortage of memory, unless nobody shall look.
    pub fn pressure(&self) -> Option<&Path> {
        Some(self.host.pressure.as_path()).filter(|file| *file != Path::new(OFF))
    }

    /// All rules for what its guest may send. Each of the lists must allow it.
    pub(crate) fn egress(&self) -> Vec<Rules> {
        let node = [self.network.egress.clone()];
        node.into_iter().chain(self.own_egress.clone()).collect()
    }

    fn in_environment(mut self, var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        if let Some(driver) = var(DRIVER) {
            self.machine.driver = driver.parse()?;
        }
        if let Some(seconds) = var(BOOT_TIMEOUT) {
            // What is no number is out of bounds.
            self.machine.boot_timeout = seconds.parse().unwrap_or(0);
            self.check()
                .map_err(|why| Error::Invalid(format!("{BOOT_TIMEOUT}={seconds}: {why}")))?;
        }
        if let Some(switch) = var(TEMPLATES) {
            self.machine.templates = switch != OFF;
        }
        if let Some(network) = var(NETWORK) {
            self.network.default = network;
        }
        if let Some(file) = var(PRESSURE) {
            self.host.pressure = file.into();
        }
        Ok(self)
    }

    /// Why they cannot be.
    fn check(&self) -> Result<(), String> {
        if !(1..=BOOT_TIMEOUT_MAX).contains(&self.machine.boot_timeout) {
            return Err(format!(
                "boot_timeout must be a number of seconds from 1 to {BOOT_TIMEOUT_MAX}"
            ));
        }
        for (what, needs) in [("container", self.container), ("pod", self.pod)] {
            if !(1..=VCPUS_MAX).contains(&needs.vcpus) {
                return Err(format!("{what}.vcpus must be from 1 to {VCPUS_MAX}"));
            }
            if needs.memory.0 < MEMORY_MIN {
                return Err(format!(
                    "{what}.memory must be at least {}",
                    Bytes(MEMORY_MIN)
                ));
            }
        }
        if self.network.plugins.iter().any(|dir| !dir.is_absolute()) {
            return Err("network.plugins must be absolute paths of directories".into());
        }
        Ok(())
    }
}

/// Where the file is looked for.
fn usual() -> PathBuf {
    let system = PathBuf::from("/etc/walnut/config.toml");
    if nix::unistd::geteuid().is_root() {
        return system;
    }
    let dir = |name| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    dir("XDG_CONFIG_HOME")
        .or_else(|| dir("HOME").map(|home| home.join(".config")))
        .map(|dir| dir.join("walnut/config.toml"))
        .filter(|file| file.exists())
        .unwrap_or(system)
}

/// Rules as they are written.
mod rules {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
    use walnut_network::Rules;

    pub(super) fn serialize<S: Serializer>(rules: &Rules, to: S) -> Result<S::Ok, S::Error> {
        rules.to_texts().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Rules, D::Error> {
        let texts: Vec<String> = Vec::deserialize(from)?;
        Rules::parse(&texts).map_err(D::Error::custom)
    }
}

/// A driver by its name.
mod driver_name {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use walnut_machine::DriverChoice;

    pub(super) fn serialize<S: Serializer>(
        driver: &DriverChoice,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.serialize_str(driver.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<DriverChoice, D::Error> {
        let name = String::deserialize(from)?;
        name.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_wins_and_is_checked() {
        let with = |name: &'static str, value: &'static str| {
            Settings::default().in_environment(|asked| (asked == name).then(|| value.to_owned()))
        };
        let driver = with(DRIVER, "qemu-tcg").unwrap().machine.driver;
        assert_eq!(driver, DriverChoice::QemuTcg);
        assert_eq!(with(BOOT_TIMEOUT, "7").unwrap().machine.boot_timeout, 7);
        assert!(!with(TEMPLATES, "off").unwrap().machine.templates);
        assert!(with(TEMPLATES, "").unwrap().machine.templates);
        assert_eq!(with(PRESSURE, "off").unwrap().pressure(), None);
        assert_eq!(with(NETWORK, "none").unwrap().network.default, "none");
        for (name, value) in [
            (DRIVER, "best"),
            (BOOT_TIMEOUT, "0"),
            (BOOT_TIMEOUT, "soon"),
            (BOOT_TIMEOUT, "3601"),
        ] {
            let error = with(name, value).unwrap_err().to_string();
            assert!(error.contains(value), "{error}");
        }
    }

    #[test]
    fn what_the_documentation_shows_is_what_is_built_in() {
        let text = include_str!("../../../../docs/configuration.md");
        let shown = text.split("```toml\n").nth(1).unwrap();
        let shown: toml::Table = shown.split("```").next().unwrap().parse().unwrap();
        assert_eq!(shown, toml::Table::try_from(Settings::default()).unwrap());
    }

    #[test]
    fn what_is_written_is_read() {
        let text = Settings::default().to_toml().unwrap();
        assert!(text.contains("memory = \"512MiB\""), "{text}");
        assert_eq!(file::parse(&text, "it").unwrap(), Settings::default());
    }
}
