//! Which driver runs a sandbox, and why.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    Driver, Error,
    kvm_probe::{self, KvmStatus},
    qemu::{Accel, Qemu},
    vmm::Vmm,
};

/// Programs the drivers start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// QEMU; `None` searches `PATH` for `qemu-system-x86_64`.
    pub qemu: Option<PathBuf>,
    /// Walnut's own `walnut-vsock`, which QEMU's machines need.
    pub vsock: PathBuf,
    /// Walnut's own `walnut-vmm`.
    pub vmm: PathBuf,
    /// A directory in which the KVM probe's verdict is kept, if anywhere.
    pub cache: Option<PathBuf>,
}

impl Programs {
    /// Walnut's own programs in the directory `own` and the QEMU of `PATH`; the
    /// KVM probe's verdict is not kept.
    pub fn new(own: &Path) -> Self {
        Self {
            qemu: None,
            vsock: own.join("walnut-vsock"),
            vmm: own.join("walnut-vmm"),
            cache: None,
        }
    }
}

/// What a person or a configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverChoice {
    /// Walnut's own VMM where KVM works, software emulation where not.
    #[default]
    Auto,
    /// Walnut's own VMM on KVM, or nothing.
    Vmm,
    /// QEMU on KVM, or nothing.
    QemuKvm,
    /// QEMU's software emulation.
    QemuTcg,
}

impl DriverChoice {
    /// The name that is parsed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Vmm => "vmm",
            Self::QemuKvm => "qemu-kvm",
            Self::QemuTcg => "qemu-tcg",
        }
    }
}

impl std::str::FromStr for DriverChoice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "auto" => Ok(Self::Auto),
            "vmm" => Ok(Self::Vmm),
            "qemu-kvm" => Ok(Self::QemuKvm),
            "qemu-tcg" => Ok(Self::QemuTcg),
            _ => Err(Error::Other(format!(
                "driver {name:?} is unknown; use auto, vmm, qemu-kvm or qemu-tcg"
            ))),
        }
    }
}

/// A driver of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverKind {
    /// Walnut's own VMM on KVM.
    Vmm,
    /// QEMU on KVM.
    QemuKvm,
    /// QEMU's software emulation.
    QemuTcg,
}

impl DriverKind {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::QemuKvm => "qemu-kvm",
            Self::QemuTcg => "qemu-tcg",
        }
    }
}

/// The driver a choice leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// The driver.
    pub driver: DriverKind,
    /// One sentence for people: why this one.
    pub reason: String,
}

/// What `choice` leads to on a host whose KVM is `kvm`. Fails only where a driver
/// was asked for by name that needs KVM, and KVM does not work.
pub fn choose(choice: DriverChoice, kvm: &KvmStatus) -> Result<Chosen, Error> {
    let usable = matches!(kvm, KvmStatus::Usable { .. });
    let (driver, reason) = match choice {
        DriverChoice::QemuTcg => (
            DriverKind::QemuTcg,
            "software emulation was asked for".to_owned(),
        ),
        DriverChoice::Auto if !usable => (
            DriverKind::QemuTcg,
            format!("software emulation, because {kvm}"),
        ),
        DriverChoice::Vmm | DriverChoice::QemuKvm if !usable => {
            let driver = match choice {
                DriverChoice::Vmm => "vmm",
                _ => "qemu-kvm",
            };
            return Err(Error::Unusable {
                driver,
                reason: kvm.to_string(),
            });
        }
        DriverChoice::QemuKvm => (DriverKind::QemuKvm, kvm.to_string()),
        DriverChoice::Auto | DriverChoice::Vmm => (DriverKind::Vmm, kvm.to_string()),
    };
    Ok(Chosen { driver, reason })
}

/// The driver for `choice` on this host. Probes KVM where the choice depends on
/// it, which takes milliseconds, or up to three seconds once per boot of the host if
/// `programs.cache` is set, else each time.
pub fn driver(choice: DriverChoice, programs: &Programs) -> Result<Box<dyn Driver>, Error> {
    let kvm = match (choice, &programs.cache) {
        (DriverChoice::QemuTcg, _) => KvmStatus::Absent,
        (_, Some(dir)) => kvm_probe::probe_cached(dir),
        (_, None) => kvm_probe::probe(),
    };
    let chosen = choose(choice, &kvm)?;
    tracing::debug!(
        driver = chosen.driver.name(),
        reason = chosen.reason,
        "driver chosen"
    );
    let accel = match chosen.driver {
        DriverKind::Vmm => return Ok(Box::new(Vmm::new(programs.vmm.clone()))),
        DriverKind::QemuKvm => Accel::Kvm,
        DriverKind::QemuTcg => Accel::Tcg,
    };
    let qemu = match &programs.qemu {
        Some(path) => path.clone(),
        None => find_qemu()?,
    };
    Ok(Box::new(Qemu::new(accel, qemu, programs.vsock.clone())))
}

/// QEMU in the usual places.
pub(crate) fn find_qemu() -> Result<PathBuf, Error> {
    const NAME: &str = "qemu-system-x86_64";
    find_program(NAME, &["/usr/bin", "/usr/local/bin", "/usr/libexec"]).ok_or_else(|| {
        Error::MissingProgram {
            program: NAME,
            tried: "PATH, /usr/bin, /usr/local/bin, /usr/libexec".to_owned(),
            advice: "on Debian: apt-get install qemu-system-x86",
        }
    })
}

/// The first executable file `name` in `PATH`, then in `more`.
pub(crate) fn find_program(name: &str, more: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .chain(more.iter().map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

pub(crate) fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_follows_the_probe_and_says_why() {
        let broken = KvmStatus::Unusable {
            reason: "its guest hung".into(),
        };
        let chosen = choose(DriverChoice::Auto, &broken).unwrap();
        assert_eq!(chosen.driver, DriverKind::QemuTcg);
        assert!(
            chosen.reason.contains("its guest hung"),
            "{}",
            chosen.reason
        );
        let usable = KvmStatus::Usable {
            slowdown: 1.1,
            micros: 4000,
        };
        let chosen = choose(DriverChoice::Auto, &usable).unwrap();
        assert_eq!(chosen.driver, DriverKind::Vmm);
        let chosen = choose(DriverChoice::QemuKvm, &usable).unwrap();
        assert_eq!(chosen.driver, DriverKind::QemuKvm);
    }

    #[test]
    fn kvm_by_name_never_falls_back() {
        let error = choose(DriverChoice::QemuKvm, &KvmStatus::Absent).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("driver qemu-kvm cannot run here")
        );
    }

    #[test]
    fn choices_are_parsed() {
        use DriverChoice::{Auto, QemuKvm, QemuTcg, Vmm};
        for choice in [Auto, Vmm, QemuKvm, QemuTcg] {
            assert_eq!(choice.as_str().parse::<DriverChoice>().unwrap(), choice);
        }
        assert!("tcg".parse::<DriverChoice>().is_err());
    }
}
