//! Changes of configuration files that are somebody else's; all else in them stays as it
//! is, comments and order too.

use std::{fmt, path::PathBuf};

use anyhow::Result;

use super::{containerd, docker};

/// One change.
#[derive(Debug)]
pub(super) enum Amendment {
    /// The runtime, of containerd's (configuration version 2).
    Runtime,
    /// Files that containerd is to read as well.
    Import(String),
    /// The runtime, of docker's, which is this program.
    Docker(PathBuf),
}

impl fmt::Display for Amendment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runtime => write!(f, "the runtime {}", containerd::NAME),
            Self::Import(files) => write!(f, "the import of {files}"),
            Self::Docker(_) => write!(f, "the runtime {}", super::OCI),
        }
    }
}

impl Amendment {
    /// The file with it.
    pub(super) fn add(&self, text: &str) -> Result<String> {
        match self {
            Self::Runtime => containerd::add_runtime(text),
            Self::Import(files) => containerd::add_import(text, files),
            Self::Docker(program) => docker::add(text, program),
        }
    }

    /// The file without it; nothing, if it was made for this.
    pub(super) fn remove(&self, text: &str) -> Result<String> {
        match self {
            Self::Runtime => containerd::remove_runtime(text),
            Self::Import(files) => containerd::remove_import(text, files),
            Self::Docker(_) => docker::remove(text),
        }
    }

    /// Nothing of it is in the file.
    pub(super) fn is_absent(&self, text: &str) -> bool {
        match self {
            Self::Runtime => !containerd::has_runtime(text),
            Self::Import(files) => !containerd::has_import(text, files),
            Self::Docker(_) => !docker::has(text),
        }
    }
}
