//! Paths of the store, locks on its files, and files that appear whole.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use tempfile::NamedTempFile;

use crate::{Digest, Error, error::IoAt};

/// How often a lock that someone else holds is tried again.
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Where things are under the root.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn dirs(&self) -> [PathBuf; 5] {
        [
            self.root.clone(),
            self.blobs(),
            self.rootfs_dir(),
            self.tmp(),
            self.locks(),
        ]
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub(crate) fn rootfs_dir(&self) -> PathBuf {
        self.root.join("rootfs")
    }

    pub(crate) fn rootfs(&self, key: &Digest) -> PathBuf {
        self.rootfs_dir().join(format!("{}.erofs", key.hex()))
    }

    pub(crate) fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    pub(crate) fn checkpoint(&self, id: &Digest) -> PathBuf {
        self.checkpoints().join(id.hex())
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    pub(crate) fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    pub(crate) fn refs(&self) -> PathBuf {
        self.root.join("refs.json")
    }

    /// Opens a lock file, `refs.lock`, `gc.lock` or one of `locks/`.
    pub(crate) fn lock_file(&self, name: &str) -> Result<File, Error> {
        let path = self.root.join(name);
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .at("open", path)
    }

    /// A new file in `tmp/`, removed unless it is kept.
    pub(crate) fn temp(&self) -> Result<NamedTempFile, Error> {
        NamedTempFile::new_in(self.tmp()).at("create a file in", self.tmp())
    }
}

fn try_lock(file: &File, path: &Path, operation: FlockOperation) -> Result<bool, Error> {
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).at("lock", path),
        }
    }
}

/// Takes a shared lock if no one holds an exclusive one.
pub(crate) fn lock_shared_now(file: &File, path: &Path) -> Result<bool, Error> {
    try_lock(file, path, FlockOperation::NonBlockingLockShared)
}

/// Takes an exclusive lock if no one holds any.
pub(crate) fn lock_exclusive_now(file: &File, path: &Path) -> Result<bool, Error> {
    try_lock(file, path, FlockOperation::NonBlockingLockExclusive)
}

/// Waits for an exclusive lock, for operations that others hold briefly.
pub(crate) fn lock_exclusive(file: &File, path: &Path) -> Result<(), Error> {
    try_lock(file, path, FlockOperation::LockExclusive).map(|_| ())
}

/// Waits for a shared lock without holding up the runtime.
pub(crate) async fn lock_shared_async(file: &File, path: &Path) -> Result<(), Error> {
    while !lock_shared_now(file, path)? {
        tokio::time::sleep(LOCK_POLL).await;
    }
    Ok(())
}

/// Waits for the exclusive lock of one thing being made; it may be long.
pub(crate) async fn lock_making(layout: &Layout, name: &str) -> Result<File, Error> {
    let name = format!("locks/{name}");
    let path = layout.root().join(&name);
    let file = layout.lock_file(&name)?;
    while !lock_exclusive_now(&file, &path)? {
        tokio::time::sleep(LOCK_POLL).await;
    }
    Ok(file)
}

/// Moves a complete temporary file to its place, with its content on disk
/// before its name is.
pub(crate) fn keep(temp: NamedTempFile, to: &Path) -> Result<(), Error> {
    temp.as_file().sync_all().at("write", temp.path())?;
    keep_synced(temp, to)
}

/// The same for a file that is on disk already.
pub(crate) fn keep_synced(temp: NamedTempFile, to: &Path) -> Result<(), Error> {
    temp.persist(to).map_err(|e| e.error).at("rename to", to)?;
    let dir = to.parent().unwrap_or(to);
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .at("write", dir)
}

/// Writes a small file whole or not at all.
pub(crate) fn write_whole(layout: &Layout, to: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut temp = layout.temp()?;
    temp.write_all(bytes).at("write", temp.path())?;
    keep(temp, to)
}

/// Whether a file is there with this many bytes.
pub(crate) fn has_size(path: &Path, size: u64) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.size() == size)
}

/// Reads a small blob if it is there and is what its digest says.
pub(crate) fn read_blob(layout: &Layout, digest: &Digest, limit: u64) -> Option<Vec<u8>> {
    let path = layout.blob(digest);
    let size = std::fs::symlink_metadata(&path).ok()?.size();
    if size > limit {
        return None;
    }
    let bytes = std::fs::read(&path).ok()?;
    (Digest::of(&bytes) == *digest).then_some(bytes)
}
