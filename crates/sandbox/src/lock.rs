//! A supervisor's sign of life: an exclusive `flock` that the kernel gives
//! back, however the holder ends.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustix::fs::FlockOperation;

use crate::{Error, Result};

/// A held lock; released when dropped in every process that shares it.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Takes the lock, or returns `None` if somebody holds it.
    pub fn try_take(path: &Path) -> Result<Option<Self>> {
        let file = open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(Error::io("lock", path)(e.into())),
        }
    }

    /// Takes the lock; waits for as long as somebody holds it.
    pub fn take(path: &Path) -> Result<Self> {
        let file = open(path)?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::io("lock", path)(e.into())),
            }
        }
    }

    /// Returns when nobody holds the lock any more; at once if its file is gone.
    pub fn wait_free(path: &Path) -> Result<()> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io("open", path)(e)),
        };
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockShared) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::io("wait for", path)(e.into())),
            }
        }
    }

    /// Device and inode of the locked file.
    pub(crate) fn inode(&self) -> Result<(u64, u64)> {
        let meta = self.0.metadata().map_err(Error::io("examine", "lock"))?;
        Ok((meta.dev(), meta.ino()))
    }

    /// A lock that an ancestor took and this process inherited.
    pub fn inherited(fd: OwnedFd) -> Self {
        Self(File::from(fd))
    }
}

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(Error::io("open", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = Lock::try_take(&path).unwrap().unwrap();
        assert!(Lock::try_take(&path).unwrap().is_none());
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || Lock::wait_free(&path)
        });
        drop(held);
        waiter.join().unwrap().unwrap();
        assert!(Lock::try_take(&path).unwrap().is_some());
    }
}
