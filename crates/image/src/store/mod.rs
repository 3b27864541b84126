//! The store: what lies where under its root, and its face.
//!
//! ```text
//! blobs/sha256/<hex>   manifests, configurations and layers, as fetched
//! rootfs/<hex>.erofs   one per sequence of layers, named by its chain key
//! refs.json            names to images, written atomically under refs.lock
//! gc.lock              shared while something is added, exclusive to sweep
//! locks/, tmp/         per-digest locks; files that are not yet complete
//! ```

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use oci_spec::image::ImageConfiguration;

use crate::{Digest, Error, Progress, Reference};

/// A content store under one directory, shared by any number of processes.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// An image of the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// The image's ID: digest of its configuration.
    pub id: Digest,
    /// Every name it has here; empty when its tag has moved on.
    pub names: Vec<Reference>,
    /// Digest the name stood for in the registry (of an index, if it was one).
    pub digest: Digest,
    /// When it was built, RFC 3339, if its configuration says so.
    pub created: Option<String>,
    /// Bytes of the root file system.
    pub size: u64,
    /// The OCI image configuration: command, environment, user, volumes, ….
    pub config: ImageConfiguration,
    /// The EROFS file, read-only, a multiple of 4096 bytes.
    pub rootfs: PathBuf,
}

/// Keeps an image's root file system from being removed while it is held, by
/// a shared lock on the open file. Descendants that inherit it hold it too.
#[derive(Debug)]
pub struct Lease {
    file: File,
    path: PathBuf,
}

/// The platform to choose from an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// GOOS, `linux`.
    pub os: String,
    /// GOARCH, `amd64` or `arm64`.
    pub architecture: String,
    /// Such as `v8`; `None` takes any.
    pub variant: Option<String>,
}

/// When to ask the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPolicy {
    /// Ask whether the name stands for something newer.
    #[default]
    Always,
    /// Only if the store does not have the name.
    IfMissing,
}

/// How to pull.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// When to ask the registry.
    pub policy: PullPolicy,
    /// Which of an index's images.
    pub platform: Platform,
    /// Registries (`host` or `host:port`) spoken to in plain HTTP, besides loopback.
    pub insecure: Vec<String>,
    /// User and password; anonymous if none.
    pub login: Option<(String, String)>,
    /// Bound on the bytes of all layers, compressed and decompressed alike.
    pub max_image_size: u64,
    /// Bound on the entries of all layers.
    pub max_entries: u64,
    /// Layers fetched at once.
    pub concurrency: usize,
}

/// What removing did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// Names that are gone.
    pub names: Vec<String>,
    /// Bytes given back. What is in use is swept by a later command.
    pub freed: u64,
}

impl Store {
    /// Opens the store under `root`, creating it if need be (mode 0700).
    pub fn open(root: impl AsRef<Path>) -> Result<Self, Error> {
        Ok(Self {
            root: root.as_ref().to_owned(),
        })
    }

    /// Fetches, verifies and converts `reference`; quick if nothing changed.
    /// Must be called within a tokio runtime with I/O and time enabled.
    pub async fn pull(
        &self,
        reference: &Reference,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        let _ = (options, progress);
        Err(Error::NoSuchImage(reference.to_string()))
    }

    /// Finds an image by name, `name@digest`, ID, or a prefix of an ID.
    pub fn resolve(&self, name: &str) -> Result<Image, Error> {
        Err(Error::NoSuchImage(name.to_owned()))
    }

    /// Every image, newest pull first.
    pub fn list(&self) -> Result<Vec<Image>, Error> {
        Ok(Vec::new())
    }

    /// Removes a name (or, given an ID, all its names), then what nothing refers to.
    pub fn remove(&self, name: &str) -> Result<Removed, Error> {
        Err(Error::NoSuchImage(name.to_owned()))
    }

    /// The directory of this store.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

impl Image {
    /// Opens the root file system and locks it against removal. Fails if it
    /// was removed meanwhile.
    pub fn lease(&self) -> Result<Lease, Error> {
        Err(Error::NoSuchImage(self.id.to_string()))
    }
}

impl Lease {
    /// The EROFS file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, read-only; it carries the lock.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the open file away; the lock goes with it.
    #[must_use]
    pub fn into_file(self) -> File {
        self.file
    }
}

impl Default for Platform {
    /// Linux on this host's architecture.
    fn default() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        }
    }
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            policy: PullPolicy::default(),
            platform: Platform::default(),
            insecure: Vec::new(),
            login: None,
            max_image_size: 64 << 30,
            max_entries: 2_000_000,
            concurrency: 3,
        }
    }
}
