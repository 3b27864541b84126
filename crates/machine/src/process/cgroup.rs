//! A cgroup of the host for the processes of a sandbox: what they use is counted
//! together, and has a bound that no bug of theirs moves.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

/// The directory that holds those of all sandboxes.
const PARENT: &str = "walnut";
/// Tries to remove a cgroup, whose processes the kernel may still be taking apart.
const TRIES: u32 = 200;
const PAUSE: Duration = Duration::from_millis(5);

/// What the processes of a sandbox may use together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes, the guest's memory included.
    pub memory: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// A cgroup, in every hierarchy that limits what it is for. Dropping it removes it; by
/// then its processes must have ended.
#[derive(Debug)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
}

/// The hierarchies of this host that have a use here, and the cgroup of each below which
/// this process may make others.
fn bases(mountinfo: &str, own: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for line in mountinfo.lines() {
        // proc(5): … root mount-point options … - type source options
        let Some((mount, kind)) = line.split_once(" - ") else {
            continue;
        };
        let mut words = mount.split(' ').skip(3);
        let (Some(root), Some(point)) = (words.next(), words.next()) else {
            continue;
        };
        let mut words = kind.split(' ');
        let (kind, options) = (words.next(), words.nth(1).unwrap_or_default());
        // proc(5): number:controllers:path
        let path_of = |wanted: &dyn Fn(&str) -> bool| {
            own.lines().find_map(|line| {
                let (_, rest) = line.split_once(':')?;
                let (controllers, path) = rest.split_once(':')?;
                wanted(controllers).then_some(path)
            })
        };
        let own = match kind {
            Some("cgroup") => {
                let ours = ["memory", "pids"];
                if !options.split(',').any(|o| ours.contains(&o)) {
                    continue;
                }
                path_of(&|c| c.split(',').any(|c| options.split(',').any(|o| o == c)))
            }
            // Beside: one that has processes gives its children no controllers.
            Some("cgroup2") => path_of(&str::is_empty).and_then(|path| {
                Path::new(path)
                    .parent()
                    .and_then(Path::to_str)
                    .or(Some("/"))
            }),
            _ => continue,
        };
        // What is mounted may be a part of the hierarchy.
        let Some(below) = own.and_then(|own| Path::new(own).strip_prefix(root).ok()) else {
            continue;
        };
        let base = Path::new(point).join(below);
        if !found.contains(&base) {
            found.push(base);
        }
    }
    found
}

/// The files of a limit on memory, of both versions.
const MEMORY: [&str; 2] = ["memory.max", "memory.limit_in_bytes"];

fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

/// Makes one cgroup, and sets what of `limits` its hierarchy has. False if it has none.
fn make(dir: &Path, limits: Limits) -> io::Result<bool> {
    let parent = dir.parent().unwrap_or(dir);
    fs::create_dir_all(parent)?;
    // A hierarchy of version 2 hands its controllers down one by one; where they are not
    // to be had, the limits below do not exist.
    for above in [parent.parent(), Some(parent)].into_iter().flatten() {
        for controller in ["+memory", "+pids"] {
            let _ = write(&above.join("cgroup.subtree_control"), controller);
        }
    }
    fs::create_dir(dir)?;
    let memory = set(dir, &MEMORY, limits.memory)?;
    Ok(set(dir, &["pids.max"], limits.pids)? || memory)
}

/// Sets those limits of a cgroup that its hierarchy has. False if it has none.
fn set(dir: &Path, files: &[&str], value: u64) -> io::Result<bool> {
    let mut set = false;
    for file in files.iter().map(|file| dir.join(file)) {
        if file.exists() {
            write(&file, &value.to_string())?;
            set = true;
        }
    }
    Ok(set)
}

impl Cgroup {
    /// Makes the cgroup `id` beside or below this process' own. `known` is told its
    /// directories before they are made, so that they can be found again whatever happens
    /// to this process.
    ///
    /// An error where this process may not make cgroups, as one without privileges.
    pub fn create(
        id: &str,
        limits: Limits,
        known: impl FnOnce(&[PathBuf]) -> io::Result<()>,
    ) -> io::Result<Self> {
        let bases = bases(
            &fs::read_to_string("/proc/self/mountinfo")?,
            &fs::read_to_string("/proc/self/cgroup")?,
        );
        let dirs: Vec<_> = bases
            .iter()
            .map(|base| base.join(PARENT).join(id))
            .collect();
        known(&dirs)?;
        // From here on a failure removes what is there.
        let mut made = Self { dirs: Vec::new() };
        for dir in dirs {
            made.dirs.push(dir.clone());
            if !make(&dir, limits)? {
                made.dirs.pop();
                let _ = fs::remove_dir(&dir);
            }
        }
        if made.dirs.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "no hierarchy has the controllers memory or pids",
            ));
        }
        Ok(made)
    }

    /// Lets its processes have so much memory, bytes.
    pub fn limit_memory(&self, bytes: u64) -> io::Result<()> {
        self.dirs
            .iter()
            .try_for_each(|dir| set(dir, &MEMORY, bytes).map(drop))
    }

    /// Its directories.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// One that is there, with these directories.
    pub fn existing(dirs: Vec<PathBuf>) -> Self {
        Self { dirs }
    }

    /// What a process writes to, to be in it.
    pub(super) fn doors(&self) -> io::Result<Vec<File>> {
        let open = |dir: &PathBuf| {
            let procs = dir.join("cgroup.procs");
            OpenOptions::new().write(true).open(procs)
        };
        self.dirs.iter().map(open).collect()
    }

    /// Removes what [`Self::create`] told of, if it is there: its processes have ended.
    pub fn remove(dirs: &[PathBuf]) {
        for dir in dirs {
            for _ in 0..TRIES {
                match fs::remove_dir(dir) {
                    Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {}
                    _ => break,
                }
                std::thread::sleep(PAUSE);
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        Self::remove(&self.dirs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_hierarchies_are_found() {
        let mounts = "\
30 20 0:1 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
31 20 0:2 / /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory
32 20 0:3 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
33 20 0:4 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
34 20 0:5 / /proc rw - proc proc rw";
        let own = "3:pids:/\n2:memory:/a/b\n1:cpu:/\n0::/init\n";
        let found = bases(mounts, own);
        let wanted = ["memory/a/b", "pids", "unified"];
        assert_eq!(
            found,
            wanted.map(|path| Path::new("/sys/fs/cgroup").join(path))
        );
        // A container sees its own part of the host's hierarchy.
        let part = "30 20 0:1 /pod /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        let found = bases(part, "0::/pod/own\n");
        assert_eq!(found, [PathBuf::from("/sys/fs/cgroup")]);
        assert!(bases(part, "0::/elsewhere\n").is_empty());
        assert!(bases("", "").is_empty());
        assert!(bases("- cgroup\n - \n1 2 3 - cgroup2", "::\n0:\n").is_empty());
    }
}
