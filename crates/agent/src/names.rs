//! Identifiers and places, and the rules that keep one from becoming another.

use std::path::{Component, Path, PathBuf};

use thiserror::Error;
use walnut_protocol::GUEST_ROOT;

/// Longest container or exec id, in bytes.
pub const ID_MAX: usize = 128;

/// Why a name was refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameError {
    /// Not an id: see [`check_id`].
    #[error("{what} id {id:?}: want 1-128 of [A-Za-z0-9_.-], not starting with '.'")]
    Id {
        /// "container" or "exec".
        what: &'static str,
        /// The id, cut to [`ID_MAX`] characters.
        id: String,
    },
    /// Not a path an agent mounts on.
    #[error(
        "mount point {path:?}: want an absolute path below {GUEST_ROOT} without '.', '..' or components that start with '.'"
    )]
    MountPoint {
        /// The path as given.
        path: String,
    },
    /// Not a sysctl key.
    #[error("sysctl {key:?}: want dotted components of [A-Za-z0-9_-]")]
    Sysctl {
        /// The key as given.
        key: String,
    },
}

/// Checks a container or exec id (`what` says which, for the message).
pub fn check_id(what: &'static str, id: &str) -> Result<(), NameError> {
    let good = !id.is_empty()
        && id.len() <= ID_MAX
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if good {
        return Ok(());
    }
    Err(NameError::Id {
        what,
        id: id.chars().take(ID_MAX).collect(),
    })
}

/// The part of a mount point below [`GUEST_ROOT`]. Components that start with
/// a dot are the agent's own and refused.
pub fn below_guest_root(path: &str) -> Result<PathBuf, NameError> {
    let error = || NameError::MountPoint {
        path: path.chars().take(256).collect(),
    };
    if path.len() >= 1024 || path.contains('\0') {
        return Err(error());
    }
    let rest = Path::new(path)
        .strip_prefix(GUEST_ROOT)
        .map_err(|_| error())?;
    let plain = |c: Component<'_>| match c {
        Component::Normal(name) => !name.as_encoded_bytes().starts_with(b"."),
        _ => false,
    };
    // `components` hides "//" and "/./": what it yields is what gets mounted.
    if rest.as_os_str().is_empty() || !rest.components().all(plain) || path.contains("/./") {
        return Err(error());
    }
    Ok(rest.components().collect())
}

/// The path under /proc/sys of a dotted sysctl key. A component may itself
/// carry a dot only if the key separates with slashes, as `sysctl(8)` has it.
pub fn sysctl_path(key: &str) -> Result<PathBuf, NameError> {
    let error = || NameError::Sysctl {
        key: key.chars().take(256).collect(),
    };
    if key.len() > 256 {
        return Err(error());
    }
    let slashes = key.contains('/');
    let separator = if slashes { '/' } else { '.' };
    let mut path = PathBuf::from("/proc/sys");
    for part in key.split(separator) {
        let good = !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| {
                b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || (slashes && b == b'.')
            });
        if !good {
            return Err(error());
        }
        path.push(part);
    }
    Ok(path)
}

/// Where the parts of one container are. Made of a checked id only.
#[derive(Debug, Clone)]
pub struct ContainerPaths {
    id: String,
}

impl ContainerPaths {
    /// libcontainer's state directory: one folder per container.
    pub const STATE_ROOT: &'static str = "/run/walnut/.state";
    /// Parent of the containers' cgroups, as a path inside the hierarchy.
    pub const CGROUP_PARENT: &'static str = "/walnut";
    /// Where cgroup2 is mounted.
    pub const CGROUP_ROOT: &'static str = "/sys/fs/cgroup";

    /// Paths of the container `id`.
    pub fn new(id: &str) -> Result<Self, NameError> {
        check_id("container", id)?;
        Ok(Self { id: id.to_owned() })
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bundle: config.json, and by convention `rootfs`.
    pub fn bundle(&self) -> PathBuf {
        Path::new(GUEST_ROOT).join(&self.id)
    }

    /// libcontainer's folder for this container; holds `notify.sock`.
    pub fn state(&self) -> PathBuf {
        Path::new(Self::STATE_ROOT).join(&self.id)
    }

    /// The cgroup as libcontainer wants it: relative to the hierarchy's root.
    pub fn cgroup_in_hierarchy(&self) -> PathBuf {
        Path::new(Self::CGROUP_PARENT).join(&self.id)
    }

    /// The cgroup's folder.
    pub fn cgroup(&self) -> PathBuf {
        let mut path = PathBuf::from(Self::CGROUP_ROOT);
        path.push("walnut");
        path.push(&self.id);
        path
    }

    /// Seccomp profile that execs into this container get, if it has one.
    pub fn seccomp(&self) -> PathBuf {
        self.bundle().join("seccomp.json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for good in ["a", "A-b_c.9", &"x".repeat(128)] {
            assert!(check_id("container", good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".state",
            "a/b",
            "a b",
            "ä",
            "a\0",
            &"x".repeat(129),
        ] {
            assert!(check_id("container", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn mount_points_stay_below_the_root() {
        assert_eq!(
            below_guest_root("/run/walnut/c1//rootfs/").unwrap(),
            Path::new("c1/rootfs")
        );
        for bad in [
            "/run/walnut",
            "/run/walnut/",
            "/run/walnut/../x",
            "/run/walnut/a/../../etc",
            "/run/walnut/a/./b",
            "/run/walnut/.state/x",
            "/run/walnutx/a",
            "run/walnut/a",
            "/etc",
            "",
            "/run/walnut/a\0b",
        ] {
            assert!(below_guest_root(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sysctls() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_forward").unwrap(),
            Path::new("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/forwarding").unwrap(),
            Path::new("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        for bad in ["", "a..b", ".a", "../x", "a/../b", "/a", "a/", "a b"] {
            assert!(sysctl_path(bad).is_err(), "{bad}");
        }
    }
}
