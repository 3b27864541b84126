//! The one error type of this crate's face.

use std::{io, path::PathBuf};

use crate::Digest;

/// Why an image could not be named, fetched, converted, found or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name that is no image reference.
    #[error("\"{input}\" is not an image reference: {reason}")]
    Reference {
        /// What was given, shortened.
        input: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Text that is no digest.
    #[error("\"{input}\" is not a digest this store can use: {reason}")]
    Digest {
        /// What was given, shortened.
        input: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// A verb: "read", "write", "rename to".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The disk of the store is full.
    #[error(
        "no space left for images under {} (needed: {needed} more bytes); remove images or free disk space",
        path.display()
    )]
    NoSpace {
        /// The store's root.
        path: PathBuf,
        /// Bytes that were needed, 0 when unknown.
        needed: u64,
    },
    /// The registry has no such image.
    #[error("{registry} has no image {reference}; check its name and tag")]
    NotInRegistry {
        /// Registry asked.
        registry: String,
        /// Image asked for.
        reference: String,
    },
    /// The registry refused access.
    #[error(
        "{registry} refuses access to {reference}: {reason} (the image may not exist, or needs a login)"
    )]
    Unauthorized {
        /// Registry asked.
        registry: String,
        /// Image asked for.
        reference: String,
        /// The registry's words.
        reason: String,
    },
    /// Talking to the registry failed.
    #[error("cannot fetch {what} from {registry}: {reason}")]
    Registry {
        /// Registry asked.
        registry: String,
        /// What was asked for.
        what: String,
        /// The chain of causes.
        reason: String,
    },
    /// Settings of a registry that cannot be used.
    #[error("what is said of a registry in {} cannot be used: {reason}", path.display())]
    Hosts {
        /// `hosts.toml`, or a file that it names.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No login could be had from where logins are kept.
    #[error("no login can be had from {what}: {reason}")]
    Credentials {
        /// A file, or a credential helper.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A manifest, index or configuration that cannot be used.
    #[error("the {what} of {reference} cannot be used: {reason}")]
    Manifest {
        /// "manifest", "index" or "configuration".
        what: &'static str,
        /// The image.
        reference: String,
        /// What is wrong.
        reason: String,
    },
    /// No manifest for the wanted platform.
    #[error("{reference} is not available for {wanted}; it has: {found}")]
    Platform {
        /// The image.
        reference: String,
        /// Platform asked for.
        wanted: String,
        /// Platforms it has.
        found: String,
    },
    /// Content that does not match its digest or size.
    #[error("{what} {expected} is damaged: {reason}")]
    Mismatch {
        /// "blob", "manifest", "layer".
        what: &'static str,
        /// The digest it should have.
        expected: Digest,
        /// What it has instead.
        reason: String,
    },
    /// Something exceeds a bound.
    #[error("{what} is too large: {size} bytes, the limit is {limit}")]
    TooLarge {
        /// What.
        what: String,
        /// Its size, bytes (or entries).
        size: u64,
        /// The bound.
        limit: u64,
    },
    /// A layer whose content is not a layer.
    #[error("layer {digest} cannot be applied: {reason}")]
    Layer {
        /// The layer's blob.
        digest: Digest,
        /// What is wrong, and in which entry.
        reason: String,
    },
    /// An archive that cannot be taken in, or made.
    #[error("the archive cannot be {action}: {reason}")]
    Archive {
        /// "read" or "written".
        action: &'static str,
        /// Why.
        reason: String,
    },
    /// No image of that name or ID in the store.
    #[error("no image \"{0}\" here; `walnut pull` it first, or see `walnut images`")]
    NoSuchImage(String),
    /// An ID prefix that more than one image has.
    #[error("\"{prefix}\" may be any of: {matches}; give more digits")]
    Ambiguous {
        /// What was given.
        prefix: String,
        /// The IDs it may stand for.
        matches: String,
    },
    /// A file of the store is damaged and could not be repaired here.
    #[error("{} is damaged: {reason}; pull the image again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A task of this crate died; a bug.
    #[error("an internal task failed: {0}")]
    Internal(String),
}

/// `result.at("read", path)` for I/O results.
pub(crate) trait IoAt<T> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> IoAt<T> for Result<T, E> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, Error> {
        self.map_err(|e| {
            let source: io::Error = e.into();
            let path = path.into();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Error::NoSpace { path, needed: 0 }
                }
                _ => Error::Io {
                    action,
                    path,
                    source,
                },
            }
        })
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text.chars().take(1000).collect()
}
