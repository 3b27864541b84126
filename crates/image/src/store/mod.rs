//! The store: what lies where under its root, and its face.
//!
//! ```text
//! blobs/sha256/<hex>   manifests, configurations and layers, as fetched
//! rootfs/<hex>.erofs   one per sequence of layers, named by its chain key
//! checkpoints/<hex>/   saved containers, named by the digest of their records
//! refs.json            names to images, written atomically under refs.lock
//! gc.lock              shared while something is added, exclusive to sweep
//! locks/, tmp/         per-digest locks; files that are not yet complete
//! ```

mod checkpoint;
mod files;
mod image;
mod load;
mod making;
mod pull;
mod push;
mod refs;
mod save;
mod sweep;

use std::{
    fs::{DirBuilder, File},
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use crate::{
    Digest, Error, Progress, Reference,
    error::IoAt,
    store::{
        files::{Layout, lock_shared_now},
        image::{Found, find, to_images},
        refs::Refs,
    },
};

/// A content store under one directory, shared by any number of processes.
#[derive(Debug, Clone)]
pub struct Store {
    layout: Layout,
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
    /// How it says that its containers be checked (Docker's extension of the configuration).
    pub health: Option<HealthConfig>,
    /// The EROFS file, read-only, a multiple of 4096 bytes.
    pub rootfs: PathBuf,
    /// The directory of the saved container that this is, if it is one. Then `size` is what
    /// that takes on disk, and the configuration is empty.
    pub checkpoint: Option<PathBuf>,
}

/// Docker's `HEALTHCHECK` of an image; times are nanoseconds, 0 where it does not say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HealthConfig {
    /// `CMD` and a command, `CMD-SHELL` and a line for the shell, or `NONE`.
    pub test: Vec<String>,
    /// Between two checks.
    pub interval: u64,
    /// Longest one may take.
    pub timeout: u64,
    /// In which failures do not count.
    pub start_period: u64,
    /// Between two checks in that.
    pub start_interval: u64,
    /// Failures in a row that make a container unhealthy.
    pub retries: u32,
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
    /// Files with logins, as Docker's `config.json` and podman's `auth.json`.
    pub credentials: Vec<PathBuf>,
    /// Directories that say where registries' images may be had, as containerd's
    /// `certs.d`: `HOST/hosts.toml`. The first that knows the registry counts.
    pub hosts: Vec<PathBuf>,
    /// Bound on the bytes of all layers, compressed and decompressed alike.
    pub max_image_size: u64,
    /// Bound on the entries of all layers.
    pub max_entries: u64,
    /// Layers fetched at once.
    pub concurrency: usize,
}

/// Where it is looked for what is said of registries: ours, then what a node has already.
const HOSTS: [&str; 3] = [
    "/etc/walnut/certs.d",
    "/etc/containerd/certs.d",
    "/etc/docker/certs.d",
];

/// What removing did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// Names that are gone.
    pub names: Vec<String>,
    /// Bytes given back. What is in use is swept by a later command.
    pub freed: u64,
}

impl Store {
    /// Opens the store under `root`, creating it if need be (mode 0700, as
    /// images may hold files that only their root may read).
    pub fn open(root: impl AsRef<Path>) -> Result<Self, Error> {
        let root = std::path::absolute(root.as_ref()).at("find", root.as_ref())?;
        let layout = Layout::new(root);
        for dir in layout.dirs() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .at("create", &dir)?;
        }
        Ok(Self { layout })
    }

    /// Fetches, verifies and converts `reference`; quick if nothing changed.
    /// Must be called within a tokio runtime with I/O and time enabled.
    /// Dropping the future leaves nothing but files the next command sweeps.
    pub async fn pull(
        &self,
        reference: &Reference,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        pull::pull(&self.layout, reference, options, progress).await
    }

    /// Finds an image by name, `name@digest`, ID, or a prefix of an ID.
    pub fn resolve(&self, name: &str) -> Result<Image, Error> {
        let refs = Refs::read(&self.layout)?;
        match find(&refs, name)? {
            Found::Name(key) => image::by_key(&self.layout, &refs, &key),
            Found::Id(id) => image::by_id(&self.layout, &refs, &id),
        }
    }

    /// Every image, newest pull first. One that is damaged is left out with a
    /// warning in the log.
    pub fn list(&self) -> Result<Vec<Image>, Error> {
        let refs = Refs::read(&self.layout)?;
        Ok(to_images(&self.layout, &refs))
    }

    /// Takes the images of an archive in: of an OCI layout, or of `docker save`, compressed
    /// or not. `name` is what an image is called that the archive does not name. Must be
    /// called within a tokio runtime with time enabled.
    pub async fn load(
        &self,
        from: Box<dyn Read + Send>,
        name: Option<&Reference>,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>, Error> {
        load::load(&self.layout, from, name, options, progress).await
    }

    /// Writes images to an archive that is both an OCI layout and what `docker save` writes.
    /// Those that are named by their IDs are named in it with all names that they have.
    pub fn save(&self, images: &[String], out: &mut dyn Write) -> Result<(), Error> {
        save::save(&self.layout, images, out)
    }

    /// Sends the image of this name to the registry that the name has in it; the digest of its
    /// manifest. Must be called within a tokio runtime with I/O and time enabled.
    pub async fn push(
        &self,
        reference: &Reference,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Digest, Error> {
        push::push(&self.layout, reference, options, progress).await
    }

    /// Gives an image one more name, which it takes from another if need be.
    pub fn tag(&self, image: &str, name: &Reference) -> Result<(), Error> {
        if name.digest().is_some() {
            return Err(Error::Reference {
                input: name.familiar(),
                reason: "an image is given a tag; its digest is what it is".into(),
            });
        }
        let gone = Refs::update(&self.layout, |refs| {
            let record = match find(refs, image)? {
                Found::Name(key) => refs.images.get(&key).cloned(),
                Found::Id(id) => image::newest(refs, &id).cloned(),
            };
            let record = record.ok_or_else(|| Error::NoSuchImage(image.to_owned()))?;
            let before = refs.images.insert(name.to_string(), record);
            Ok(checkpoint::without_names(
                refs,
                before.into_iter().collect(),
            ))
        })?;
        checkpoint::remove(&self.layout, &gone)?;
        sweep::sweep(&self.layout)?;
        Ok(())
    }

    /// Removes a name (or, given an ID, all its names), then what nothing
    /// refers to. What is leased, or being pulled by others, stays until a
    /// later command sweeps.
    pub fn remove(&self, name: &str) -> Result<Removed, Error> {
        let (names, gone) = Refs::update(&self.layout, |refs| {
            let keys = match find(refs, name)? {
                Found::Name(key) => vec![key],
                Found::Id(id) => refs.keys_of(&id),
            };
            let gone = keys.iter().filter_map(|key| refs.images.remove(key));
            let gone: Vec<_> = gone.collect();
            Ok((keys, checkpoint::without_names(refs, gone)))
        })?;
        let freed = checkpoint::remove(&self.layout, &gone)? + sweep::sweep(&self.layout)?;
        Ok(Removed { names, freed })
    }

    /// Takes a checkpoint in: the directory `dir`, which is moved here, is whole and on
    /// disk, with a `checkpoint.json` whose digest becomes the image's ID. `rootfs` is the
    /// root file system that it needs, of this store, and `created` RFC 3339. A name that
    /// another image has is taken from it. Must be called within a tokio runtime with time
    /// enabled.
    pub async fn add_checkpoint(
        &self,
        name: &Reference,
        dir: &Path,
        rootfs: &Path,
        created: String,
    ) -> Result<Image, Error> {
        checkpoint::add(&self.layout, name, dir, rootfs, created).await
    }

    /// As [`Image::lease`], of a root file system of this store whose image may have lost
    /// its names.
    pub fn lease(&self, rootfs: &Path) -> Result<Lease, Error> {
        let gone = || Error::NoSuchImage(rootfs.display().to_string());
        checkpoint::rootfs_key(&self.layout, rootfs).map_err(|_| gone())?;
        lease(rootfs, gone)
    }

    /// Removes what nothing refers to; the bytes given back. What others are adding stays.
    pub fn sweep(&self) -> Result<u64, Error> {
        sweep::sweep(&self.layout)
    }

    /// The directory of this store.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.layout.root()
    }
}

impl Image {
    /// Opens the root file system and locks it against removal. Fails if it
    /// was removed meanwhile.
    pub fn lease(&self) -> Result<Lease, Error> {
        lease(&self.rootfs, || Error::NoSuchImage(self.id.to_string()))
    }
}

fn lease(rootfs: &Path, gone: impl Fn() -> Error) -> Result<Lease, Error> {
    let file = match File::open(rootfs) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(gone()),
        other => other.at("open", rootfs)?,
    };
    // A sweep holds the lock for a moment before it removes the file.
    if !lock_shared_now(&file, rootfs)? {
        return Err(gone());
    }
    let held = file.metadata().at("examine", rootfs)?;
    match std::fs::symlink_metadata(rootfs) {
        Ok(now) if (now.dev(), now.ino()) == (held.dev(), held.ino()) => Ok(Lease {
            file,
            path: rootfs.to_owned(),
        }),
        _ => Err(gone()),
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

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            policy: PullPolicy::default(),
            platform: Platform::default(),
            insecure: Vec::new(),
            credentials: crate::registry::credential_files(),
            hosts: HOSTS.iter().map(PathBuf::from).collect(),
            max_image_size: 64 << 30,
            max_entries: 2_000_000,
            concurrency: 3,
        }
    }
}
