//! A container's cgroup, by its files (the kernel's cgroup-v2.rst).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Processes listed at most; more than any guest has.
const PIDS_MAX: usize = 1 << 16;
/// Folders of nested cgroups walked at most.
const NESTED_MAX: usize = 1 << 12;

/// The folder of one cgroup.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Processes ended for want of memory by the agent itself.
    kills: Arc<AtomicU64>,
}

impl Cgroup {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            kills: Arc::default(),
        }
    }

    /// A file of the cgroup.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A file's text; empty if there is none.
    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap_or_default()
    }

    /// Kills every process, those of nested cgroups and frozen ones included.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match fs::write(self.file("cgroup.kill"), "1") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Freezes or thaws, and waits until that is so.
    pub(crate) async fn freeze(&self, on: bool, within: Duration) -> io::Result<()> {
        let wanted = if on { "1" } else { "0" };
        fs::write(self.file("cgroup.freeze"), wanted)?;
        self.until(within, || {
            keyed(&self.read("cgroup.events"), "frozen") == u64::from(on)
        })
        .await
    }

    /// Waits until no process is left.
    pub(crate) async fn empty(&self, within: Duration) -> io::Result<()> {
        self.until(within, || {
            keyed(&self.read("cgroup.events"), "populated") == 0
        })
        .await
    }

    /// Asks at growing intervals: the change takes the kernel microseconds, or
    /// a task in an uninterruptible wait holds it up.
    async fn until(&self, within: Duration, done: impl Fn() -> bool) -> io::Result<()> {
        let deadline = Instant::now() + within;
        let mut pause = Duration::from_millis(1);
        while !done() {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Every process, those of nested cgroups included.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        for folder in self.folders() {
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            let room = PIDS_MAX - pids.len();
            pids.extend(
                text.lines()
                    .filter_map(|l| l.parse::<u32>().ok())
                    .take(room),
            );
        }
        pids
    }

    /// Removes the empty cgroup and those nested in it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        for folder in self.folders().iter().rev() {
            match fs::remove_dir(folder) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// This cgroup and those below it, parents first.
    fn folders(&self) -> Vec<PathBuf> {
        let mut folders = vec![self.path.clone()];
        let mut at = 0;
        while let Some(folder) = folders.get(at).cloned() {
            at += 1;
            folders.extend(children(&folder).take(NESTED_MAX.saturating_sub(folders.len())));
        }
        folders
    }

    /// Times the kernel's OOM killer, or the agent's, ended a process in here.
    pub(crate) fn oom_kills(&self) -> u64 {
        keyed(&self.read("memory.events"), "oom_kill")
            .saturating_add(self.kills.load(Ordering::Relaxed))
    }

    /// The agent ends a process for want of memory.
    pub(crate) fn count_kill(&self) {
        self.kills.fetch_add(1, Ordering::Relaxed);
    }
}

fn children(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
}

/// The value of `key` in a flat keyed file; 0 if missing.
pub(crate) fn keyed(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            let (name, value) = line.split_once(' ')?;
            (name == key).then(|| value.trim().parse().ok())?
        })
        .unwrap_or_default()
}

/// A single value; "max" and nothing are 0.
pub(crate) fn single(text: &str) -> u64 {
    text.trim().parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        let text = "low 0\nhigh 3\noom 1\noom_kill 12\noom_group_kill 0\n";
        assert_eq!(keyed(text, "oom_kill"), 12);
        assert_eq!(keyed(text, "oom"), 1);
        assert_eq!(keyed(text, "none"), 0);
        assert_eq!(single("max\n"), 0);
        assert_eq!(single("4096\n"), 4096);
    }

    #[test]
    fn nested_cgroups_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("cgroup.procs"), "1\n2\n").unwrap();
        fs::write(dir.path().join("a/b/cgroup.procs"), "7\n").unwrap();
        let cgroup = Cgroup::new(dir.path().to_owned());
        assert_eq!(cgroup.pids(), [1, 2, 7]);
        assert_eq!(cgroup.folders().len(), 3);
    }
}
