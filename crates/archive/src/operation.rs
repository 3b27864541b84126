//! What the host asks a guest to do with a container's files.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use serde::{Deserialize, Serialize};

/// The field of an OCI runtime-spec "process" object that has an [`Operation`]: instead of
/// executing a program, the process does that, with the archive on its standard input or
/// output. It exits with 0, or says on its standard error why not.
pub const FIELD: &str = "dev.walnut.archive";

/// Something to be done in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// What.
    pub kind: Kind,
    /// Absolute path in the container.
    pub path: String,
    /// What the archive is to call it; empty when unpacking.
    #[serde(default)]
    pub name: String,
    /// A symbolic link stands for what it leads to.
    #[serde(default)]
    pub follow: bool,
    /// Owners are the archive's, and not root.
    #[serde(default)]
    pub keep_owner: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Say what there is, as a [`Stat`] in JSON.
    Stat,
    /// Write an archive of it.
    Pack,
    /// Put an archive into the directory.
    Unpack,
}

/// What there is at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// It is there.
    pub exists: bool,
    /// It is a directory.
    pub dir: bool,
    /// It is a symbolic link.
    pub link: bool,
    /// Bytes, of a file.
    pub size: u64,
}

impl Stat {
    /// What there is here.
    pub fn of(path: &Path, follow: bool) -> std::io::Result<Self> {
        let found = match follow {
            true => fs::metadata(path),
            false => fs::symlink_metadata(path),
        };
        match found {
            Ok(meta) => Ok(Self {
                exists: true,
                dir: meta.is_dir(),
                link: meta.is_symlink(),
                size: meta.size(),
            }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self {
                exists: false,
                dir: false,
                link: false,
                size: 0,
            }),
            Err(e) => Err(e),
        }
    }
}
