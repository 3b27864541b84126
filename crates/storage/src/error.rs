//! The one error type of this crate's face.

use std::{io, path::PathBuf};

use walnut_machine::process::SpawnError;

/// Why a root file system or a volume could not be prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A volume's source is not there.
    #[error("bind source path does not exist: {}", .0.display())]
    NoSource(PathBuf),
    /// A source of a volume, or an image, could not be used.
    #[error("{what} {}: {source}", path.display())]
    Source {
        /// What was attempted: "open bind source".
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// virtiofsd is not on this host.
    #[error(
        "virtiofsd was not found ({tried}), so host directories cannot be shared; on Debian 12 it comes with qemu-system-common, later as virtiofsd"
    )]
    NoVirtiofsd {
        /// Where it was looked for.
        tried: String,
    },
    /// Sharing host directories needs mounts of our own.
    #[error("share host directories: {0}; run as root (CAP_SYS_ADMIN)")]
    NotPermitted(io::Error),
    /// virtiofsd could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// virtiofsd could not be prepared or broke.
    #[error("{0}")]
    VirtioFs(String),
}
