//! Places for checkpoints that are being made, or that go no further than a fork.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use crate::{Error, Lock, Result, layout::private_dir, record::remove_dir};

/// The drafts of a node, or of a user.
#[derive(Debug, Clone)]
pub struct Drafts {
    dir: PathBuf,
}

/// An empty directory to make a checkpoint in. Removed when this is dropped, unless it
/// has been moved away; swept once the process that holds this is gone.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    lock: PathBuf,
    _lock: Lock,
}

impl Drafts {
    /// In the directory `checkpoints` of `state`.
    pub fn new(state: &Path) -> Self {
        Self {
            dir: state.join("checkpoints"),
        }
    }

    /// Held while drafts come, or are looked at by who is not their maker.
    fn lock(&self) -> Result<Lock> {
        Lock::take(&self.dir.join("lock"))
    }

    fn lock_of(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.lock"))
    }

    /// Makes one.
    pub fn begin(&self) -> Result<Draft> {
        private_dir(&self.dir)?;
        let mut random = [0; 16];
        getrandom::fill(&mut random)
            .map_err(|e| Error::Invalid(format!("name a checkpoint: {e}")))?;
        let name: String = random.iter().map(|b| format!("{b:02x}")).collect();
        let _all = self.lock()?;
        let lock = self.lock_of(&name);
        let held = Lock::try_take(&lock)?
            .ok_or_else(|| Error::AlreadyExists(format!("{} is held", lock.display())))?;
        let draft = Draft {
            path: self.dir.join(name),
            lock,
            _lock: held,
        };
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&draft.path)
            .map_err(Error::io("create directory", &draft.path))?;
        Ok(draft)
    }

    /// Removes those whose makers are gone.
    pub fn sweep(&self) -> Result<()> {
        if !self.dir.exists() {
            return Ok(());
        }
        let _all = self.lock()?;
        let entries = fs::read_dir(&self.dir).map_err(Error::io("list", &self.dir))?;
        for entry in entries {
            let entry = entry.map_err(Error::io("list", &self.dir))?;
            let Ok(file) = entry.file_name().into_string() else {
                continue;
            };
            let name = file.strip_suffix(".lock").unwrap_or(&file);
            if name.len() != 32 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
                continue;
            }
            let lock = self.lock_of(name);
            if let Some(_lock) = Lock::try_take(&lock)? {
                remove_dir(&self.dir.join(name))?;
                let _ = fs::remove_file(&lock);
            }
        }
        Ok(())
    }
}

impl Draft {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(e) = remove_dir(&self.path) {
            tracing::warn!("remove a checkpoint's draft: {e}");
        }
        let _ = fs::remove_file(&self.lock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(drafts: &Drafts) -> Vec<String> {
        let entries = fs::read_dir(&drafts.dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_draft_goes_with_its_maker_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let drafts = Drafts::new(dir.path());
        drafts.sweep().unwrap();
        let draft = drafts.begin().unwrap();
        fs::write(draft.path().join("state"), "x").unwrap();
        drafts.sweep().unwrap();
        assert!(draft.path().join("state").exists());
        // One that was killed, in the middle or as it began.
        let left = "0".repeat(32);
        fs::create_dir(drafts.dir.join(&left)).unwrap();
        fs::write(drafts.dir.join(&left).join("memory"), "x").unwrap();
        fs::write(drafts.lock_of(&"1".repeat(32)), "").unwrap();
        fs::write(drafts.dir.join("other"), "").unwrap();
        drafts.sweep().unwrap();
        assert_eq!(names(&drafts).len(), 4, "{:?}", names(&drafts));
        drop(draft);
        assert_eq!(names(&drafts), ["lock", "other"]);
    }

    #[test]
    fn one_that_was_moved_away_stays_there() {
        let dir = tempfile::tempdir().unwrap();
        let drafts = Drafts::new(dir.path());
        let draft = drafts.begin().unwrap();
        let kept = dir.path().join("kept");
        fs::rename(draft.path(), &kept).unwrap();
        drop(draft);
        drafts.sweep().unwrap();
        assert!(kept.exists());
        assert_eq!(names(&drafts), ["lock"]);
    }
}
