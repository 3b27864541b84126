//! The two programs called virtiofsd: QEMU's own in C (until 7.2, Debian 12)
//! and its successor in Rust. Same protocol, other flags.

use std::{
    os::fd::RawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::Error;

/// Where distributions put it; none has it in `PATH`.
const PLACES: [&str; 4] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/libexec/qemu/virtiofsd",
];

/// The host's virtiofsd, the newer program first.
pub fn find_virtiofsd() -> Option<PathBuf> {
    PLACES.iter().map(PathBuf::from).find(|path| path.is_file())
}

pub(crate) fn find() -> Result<PathBuf, Error> {
    find_virtiofsd().ok_or_else(|| Error::NoVirtiofsd {
        tried: PLACES.join(", "),
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavor {
    C,
    Rust,
}

impl Flavor {
    /// Asks the program itself.
    pub(crate) fn of(program: &Path) -> Result<Self, Error> {
        let output = Command::new(program)
            .arg("--version")
            .env_clear()
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .map_err(|source| Error::Source {
                what: "run",
                path: program.to_owned(),
                source,
            })?;
        let text = String::from_utf8_lossy(&output.stdout);
        Self::from_version(&text).ok_or_else(|| {
            let says: String = text.chars().filter(|c| !c.is_control()).take(80).collect();
            let path = program.display();
            Error::VirtioFs(format!(
                "{path} is no virtiofsd that is known: it says {says:?}"
            ))
        })
    }

    /// "virtiofsd version 7.2.22 (Debian …)" or "virtiofsd 1.13.0".
    fn from_version(text: &str) -> Option<Self> {
        let version = text.lines().next()?.strip_prefix("virtiofsd")?;
        match version.trim_start().strip_prefix("version") {
            Some(_) => Some(Self::C),
            None => Some(Self::Rust),
        }
    }

    /// Arguments to serve `root` on the listening socket `fd`.
    ///
    /// Both jail themselves once the machine has connected: namespaces with
    /// `root` as their only file system, few capabilities, a seccomp filter.
    ///
    /// `cache=auto` is close-to-open consistency: data written on one side is
    /// seen on the other when the file is opened again, names and attributes
    /// after a second. `none` would be stricter, and break shared `mmap`, which
    /// databases and version control need.
    pub(crate) fn arguments(self, root: &str, fd: RawFd) -> Vec<String> {
        match self {
            Self::C => vec![
                "-f".into(),
                format!("--fd={fd}"),
                "-o".into(),
                format!(
                    "source={root},sandbox=namespace,cache=auto,xattr,announce_submounts,log_level=err"
                ),
            ],
            Self::Rust => vec![
                format!("--fd={fd}"),
                format!("--shared-dir={root}"),
                "--sandbox=namespace".into(),
                "--cache=auto".into(),
                "--xattr".into(),
                "--announce-submounts".into(),
                "--inode-file-handles=never".into(),
                "--log-level=error".into(),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_programs_are_told_apart() {
        let c = "virtiofsd version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright";
        assert_eq!(Flavor::from_version(c), Some(Flavor::C));
        assert_eq!(
            Flavor::from_version("virtiofsd 1.13.0\n"),
            Some(Flavor::Rust)
        );
        assert_eq!(Flavor::from_version("bash 5"), None);
        assert_eq!(Flavor::from_version(""), None);
    }

    #[test]
    fn something_else_is_refused() {
        let error = Flavor::of(Path::new("/bin/echo")).unwrap_err().to_string();
        assert!(error.contains("no virtiofsd"), "{error}");
    }
}
