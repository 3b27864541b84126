//! Where the sandboxes of a daemon (containerd) lie: one directory each, below
//! the run directory, with a lock that the sandbox's supervisor holds for as long
//! as it lives.
//!
//! The daemon keeps the bundles and the records of its containers. Here lies only
//! what goes with the supervisor: sockets, and the names of what a killed one
//! leaves behind (cgroups, mounts), for whoever comes next to remove.

use std::{
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, umount2};
use sha2::{Digest, Sha256};
use tracing::{debug, warn};

use crate::{
    Error, Layout, Lock, Result, cgroup,
    layout::private_dir,
    record::{read_dir, remove_dir},
};

/// Directory in the run directory.
pub(crate) const RUN_DIR: &str = "containerd";
/// The same for sandboxes of the OCI command line, which has no daemon.
pub(crate) const BUNDLES_DIR: &str = "oci";
/// Bytes of a name's digest that become a directory's name: sockets' addresses are
/// short, and identifiers of containerd's are not.
const NAME_BYTES: usize = 10;
/// Held by the supervisor.
const LOCK: &str = "lock";
/// Mount points of the sandbox's, one after the other, each closed by a NUL.
const MOUNTS: &str = "mounts";
/// What a directory's name gets that is being removed.
const GONE: &str = "gone";
/// Attempts to remove one that others look into.
const TRIES: u32 = 10;

/// The sandboxes of the daemons of this host.
#[derive(Debug, Clone)]
pub struct DaemonDirs(PathBuf);

/// The directory of one sandbox, and its lock.
#[derive(Debug)]
pub struct SandboxDir {
    path: PathBuf,
    lock: Lock,
}

impl DaemonDirs {
    /// Below the run directory `run`.
    pub fn new(run: &Path) -> Result<Self> {
        let dir = run.join(RUN_DIR);
        private_dir(&dir)?;
        Ok(Self(dir))
    }

    /// Those of the OCI command line.
    pub(crate) fn of_bundles(run: &Path) -> Result<Self> {
        let dir = run.join(BUNDLES_DIR);
        private_dir(&dir)?;
        Ok(Self(dir))
    }

    /// The directory of the sandbox with these names, whether or not there is one.
    pub fn path(&self, names: &[&str]) -> PathBuf {
        let mut digest = Sha256::new();
        for name in names {
            digest.update(name.as_bytes());
            digest.update([0]);
        }
        let name: String = digest.finalize()[..NAME_BYTES]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.0.join(name)
    }

    /// Takes the directory `path`, made empty; `None` if a supervisor has it.
    pub fn take(&self, path: &Path) -> Result<Option<SandboxDir>> {
        loop {
            let file = path.join(LOCK);
            let lock = match private_dir(path).and_then(|()| Lock::try_take(&file)) {
                Ok(Some(lock)) => lock,
                Ok(None) => return Ok(None),
                // Whoever had it has just moved it away, or who sweeps took it for one that
                // a killed supervisor left.
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    continue;
                }
                Err(e) => return Err(e),
            };
            if !is_at(&lock, &file)? {
                continue;
            }
            let dir = SandboxDir {
                path: path.to_owned(),
                lock,
            };
            dir.sweep()?;
            return Ok(Some(dir));
        }
    }

    /// Removes what killed supervisors left.
    pub fn sweep(&self) -> Result<()> {
        for name in read_dir(&self.0)? {
            let path = self.0.join(&name);
            if path.extension().is_some_and(|e| e == GONE) {
                // Somebody removes it, or was killed while doing so.
                let _ = remove_dir(&path);
                continue;
            }
            let file = path.join(LOCK);
            match Lock::try_take(&file) {
                Ok(Some(lock)) if is_at(&lock, &file)? => {
                    SandboxDir { path, lock }.remove()?;
                }
                Ok(_) => {}
                Err(e) => debug!("look into {}: {e}", path.display()),
            }
        }
        Ok(())
    }
}

/// Directories of the sandboxes of daemons and of the OCI command line that have a
/// supervisor; what killed ones left is removed.
pub fn supervisors(layout: &Layout) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for name in [RUN_DIR, BUNDLES_DIR] {
        let dir = layout.run.join(name);
        if !dir.exists() {
            continue;
        }
        DaemonDirs(dir.clone()).sweep()?;
        let names = read_dir(&dir)?.into_iter();
        let paths = names.map(|name| dir.join(name));
        all.extend(paths.filter(|path| path.extension().is_none_or(|e| e != GONE)));
    }
    Ok(all)
}

/// Whether `file` is still the file that was locked.
fn is_at(lock: &Lock, file: &Path) -> Result<bool> {
    let held = lock.inode()?;
    match fs::symlink_metadata(file) {
        Ok(meta) => Ok((meta.dev(), meta.ino()) == held),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io("examine", file)(e)),
    }
}

impl SandboxDir {
    /// One that an ancestor took, whose lock this process inherited.
    pub fn inherited(path: PathBuf, lock: Lock) -> Self {
        Self { path, lock }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its lock.
    pub fn lock(&self) -> &Lock {
        &self.lock
    }

    /// Keeps the names of all mount points, before there are any.
    pub fn keep_mounts<'a>(&self, points: impl Iterator<Item = &'a Path>) -> Result<()> {
        let mut text = Vec::new();
        for point in points {
            text.extend_from_slice(point.as_os_str().as_bytes());
            text.push(0);
        }
        let (file, new) = (self.path.join(MOUNTS), self.path.join(".mounts"));
        fs::write(&new, text).map_err(Error::io("write", &new))?;
        fs::rename(&new, &file).map_err(Error::io("write", &file))
    }

    /// Ends what the directory tells of.
    fn release(&self) {
        cgroup::sweep(&self.path);
        let text = fs::read(self.path.join(MOUNTS)).unwrap_or_default();
        for point in text.split(|byte| *byte == 0).filter(|p| !p.is_empty()) {
            unmount_dead(Path::new(std::ffi::OsStr::from_bytes(point)));
        }
    }

    /// Ends what is left of the sandbox before, but for the directory and its lock.
    fn sweep(&self) -> Result<()> {
        self.release();
        // Whoever removed the one before may have been killed while doing so.
        remove_dir(&self.path.with_extension(GONE))?;
        for entry in fs::read_dir(&self.path).map_err(Error::io("list", &self.path))? {
            let entry = entry.map_err(Error::io("list", &self.path))?;
            let path = entry.path();
            if entry.file_name() == LOCK {
                continue;
            }
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                remove_dir(&path)?;
            } else {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Removes everything, the directory and what it tells of; the lock stays held.
    pub fn remove(&self) -> Result<()> {
        self.release();
        // Under its own name it might be somebody's again before it is gone.
        let gone = self.path.with_extension(GONE);
        let path = match fs::rename(&self.path, &gone) {
            Ok(()) => &gone,
            // One that could not be removed is in the way.
            Err(_) => &self.path,
        };
        for _ in 1..TRIES {
            match remove_dir(path) {
                // Who looked for its lock a moment ago has made one.
                Err(Error::Io { source, .. })
                    if source.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                other => return other,
            }
        }
        remove_dir(path)
    }
}

/// Unmounts what a dead process mounted; nothing happens where nothing is mounted.
fn unmount_dead(point: &Path) {
    while let Ok(()) = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        warn!("unmounted {}, which was left behind", point.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_supervisor_at_a_time_and_what_it_left_goes() {
        let run = tempfile::tempdir().unwrap();
        let dirs = DaemonDirs::new(run.path()).unwrap();
        let path = dirs.path(&["k8s.io", "pod"]);
        let dir = dirs.take(&path).unwrap().unwrap();
        assert!(dirs.take(&path).unwrap().is_none());
        fs::write(path.join("task.sock"), "").unwrap();
        fs::create_dir_all(path.join("fs/deep")).unwrap();
        dirs.sweep().unwrap();
        assert!(path.join("task.sock").exists(), "it has a supervisor");
        drop(dir);
        let dir = dirs.take(&path).unwrap().unwrap();
        assert!(!path.join("task.sock").exists() && !path.join("fs").exists());
        dir.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_sweep_is_in_nobodys_way() {
        let run = tempfile::tempdir().unwrap();
        let dirs = DaemonDirs::new(run.path()).unwrap();
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..4)
                .map(|n| {
                    let (dirs, path) = (&dirs, dirs.path(&[&n.to_string()]));
                    scope.spawn(move || {
                        for _ in 0..500 {
                            // Until a sweep lets go of it.
                            while dirs.take(&path).unwrap().is_none_or(|dir| {
                                dir.remove().unwrap();
                                false
                            }) {}
                        }
                    })
                })
                .collect();
            while all.iter().any(|one| !one.is_finished()) {
                dirs.sweep().unwrap();
            }
        });
    }

    #[test]
    fn a_sweep_removes_what_nobody_holds() {
        let run = tempfile::tempdir().unwrap();
        let dirs = DaemonDirs::new(run.path()).unwrap();
        let (dead, alive) = (dirs.path(&["a"]), dirs.path(&["b"]));
        drop(dirs.take(&dead).unwrap().unwrap());
        let held = dirs.take(&alive).unwrap().unwrap();
        held.keep_mounts([Path::new("/nowhere")].into_iter())
            .unwrap();
        dirs.sweep().unwrap();
        assert!(!dead.exists() && alive.exists());
    }

    #[test]
    fn a_directory_can_be_taken_while_another_sweeps() {
        let run = tempfile::tempdir().unwrap();
        let dirs = DaemonDirs::new(run.path()).unwrap();
        let sweeper = std::thread::spawn({
            let dirs = dirs.clone();
            move || (0..2000).try_for_each(|_| dirs.sweep())
        });
        let mut taken = Ok(());
        let mut n = 0;
        while !sweeper.is_finished() && taken.is_ok() {
            n += 1;
            // Whoever sweeps has the lock for a moment: then it is not to be had.
            taken = match dirs.take(&dirs.path(&[&n.to_string()])) {
                Ok(Some(dir)) => dir.remove(),
                Ok(None) => Ok(()),
                Err(e) => Err(e),
            };
        }
        taken.unwrap();
        sweeper.join().unwrap().unwrap();
    }

    #[test]
    fn what_a_killed_removal_left_goes_with_the_next_of_that_name() {
        let run = tempfile::tempdir().unwrap();
        let dirs = DaemonDirs::new(run.path()).unwrap();
        let path = dirs.path(&["k8s.io", "pod"]);
        let gone = path.with_extension(GONE);
        fs::create_dir_all(gone.join("fs")).unwrap();
        fs::write(gone.join(LOCK), "").unwrap();
        dirs.take(&path).unwrap().unwrap().remove().unwrap();
        assert!(read_dir(run.path()).unwrap() == [RUN_DIR]);
        assert!(read_dir(&run.path().join(RUN_DIR)).unwrap().is_empty());
    }

    #[test]
    fn names_do_not_run_into_each_other() {
        let dirs = DaemonDirs(PathBuf::from("/r"));
        assert_ne!(dirs.path(&["ab", "c"]), dirs.path(&["a", "bc"]));
        assert_eq!(dirs.path(&["a"]).as_os_str().len(), "/r/".len() + 20);
    }
}
