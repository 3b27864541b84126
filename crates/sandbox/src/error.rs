//! What can go wrong in a sandbox, in sentences for people.

use std::{io, path::PathBuf};

/// Result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something in a sandbox's life failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be handled.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// The attempt, as "read" or "create directory".
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A bundle, record or request is not what it must be.
    #[error("{0}")]
    Invalid(String),
    /// No container or process has this name.
    #[error("{0}")]
    NotFound(String),
    /// The name is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The container or process is in another state than the request needs.
    #[error("{0}")]
    WrongState(String),
    /// The program to run does not exist in the container.
    #[error("{0}")]
    ProgramNotFound(String),
    /// The program to run may not be executed.
    #[error("{0}")]
    ProgramDenied(String),
    /// The machine did not start, or ended.
    #[error("{0}")]
    Machine(String),
    /// The agent refused or failed a request.
    #[error("{0}")]
    Agent(String),
    /// Volumes or the root file system could not be prepared.
    #[error(transparent)]
    Storage(#[from] walnut_storage::Error),
    /// A network could not be made the guest's.
    #[error(transparent)]
    Network(#[from] walnut_network::Error),
}

impl Error {
    /// An [`Error::Io`], for `map_err`.
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}

impl From<walnut_machine::Error> for Error {
    fn from(error: walnut_machine::Error) -> Self {
        Self::Machine(error.to_string())
    }
}
