//! Containers that were made from a bundle on the command line (OCI runtime-spec
//! "Runtime and Lifecycle"): what is known of them on disk.
//!
//! One directory each below the runtime's root, with the state, a copy of the
//! bundle's configuration and the supervisor's log. It is there until the container
//! is deleted. The sandbox's own directory, with sockets and the lock that its
//! supervisor holds, is somewhere else, under a short name, and goes with the
//! supervisor ([`SandboxDir`]).

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    DaemonDirs, Error, Lock, Result, SandboxDir,
    file::{read_json, write_atomic, write_json},
    layout::private_dir,
    record::{read_dir, remove_dir},
};

const STATE_FILE: &str = "state.json";
const CONFIG_FILE: &str = "config.json";
const LOG_FILE: &str = "log";
/// Bounds what is read of a state file; annotations are the most of it.
const STATE_MAX: u64 = 4 << 20;
/// Held while a container's directory is put in place.
const LOCK: &str = ".lock";
/// Begins the names of directories that are being made.
const NEW: &str = ".new-";
/// Longest identifier: a file's name.
const ID_MAX: usize = 128;
/// What a container is said to have ended with whose supervisor was killed.
const EXIT_KILLED: u32 = 128 + 9;

/// Where a container stands (OCI runtime-spec "State"; `paused` is runc's and crun's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BundleStatus {
    /// Its machine is being made.
    Creating,
    /// It is built, its program not executed.
    Created,
    /// Its program runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its program has ended.
    Stopped,
}

impl BundleStatus {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// What is known of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleState {
    /// Version of this format.
    pub version: u32,
    /// Its name.
    pub id: String,
    /// Of the specification that the bundle follows.
    pub oci_version: String,
    /// Where it stands.
    pub status: BundleStatus,
    /// The supervisor's PID, which stands for that of the container's first process; 0
    /// if there is none.
    pub pid: u32,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root file system.
    pub rootfs: PathBuf,
    /// RFC 3339.
    pub created: String,
    /// User who made it.
    pub owner: u32,
    /// The bundle's annotations.
    pub annotations: HashMap<String, String>,
    /// The sandbox's directory.
    pub run_dir: PathBuf,
    /// How it ended, if it has.
    #[serde(default)]
    pub exit_code: Option<u32>,
    /// The guest's OOM killer had a part in its end.
    #[serde(default)]
    pub oom_killed: bool,
    /// Why it ended, where it was the sandbox that failed.
    #[serde(default)]
    pub error: Option<String>,
}

impl BundleState {
    /// Socket of the sandbox's Task API.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("task.sock")
    }

    /// The lock that the supervisor holds.
    pub fn lock(&self) -> PathBuf {
        self.run_dir.join("lock")
    }

    /// Reads the state in a container's directory.
    pub fn load(dir: &Path) -> Result<Self> {
        read_json(&dir.join(STATE_FILE), STATE_MAX)
    }

    /// Writes it there, atomically.
    pub fn store(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(STATE_FILE), self)
    }

    /// A supervisor has been killed.
    fn end(&mut self) {
        self.status = BundleStatus::Stopped;
        self.pid = 0;
        self.exit_code = Some(EXIT_KILLED);
        self.error = Some("the sandbox's supervisor was killed".into());
    }
}

/// The containers below one root.
#[derive(Debug, Clone)]
pub struct Bundles {
    root: PathBuf,
    sandboxes: DaemonDirs,
}

impl Bundles {
    /// Those below `root`; their sandboxes are below the run directory `run`.
    pub fn open(root: &Path, run: &Path) -> Result<Self> {
        private_dir(root)?;
        let root = fs::canonicalize(root).map_err(Error::io("resolve", root))?;
        let sandboxes = DaemonDirs::of_bundles(run)?;
        Ok(Self { root, sandboxes })
    }

    /// A container's directory.
    pub fn dir(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// The configuration that a container was made from.
    pub fn config(&self, id: &str) -> PathBuf {
        self.dir(id).join(CONFIG_FILE)
    }

    /// The log of a container's supervisor.
    pub fn log(&self, id: &str) -> PathBuf {
        self.dir(id).join(LOG_FILE)
    }

    /// Where the sandbox of a container will lie.
    pub fn run_dir(&self, id: &str) -> PathBuf {
        self.sandboxes.path(&[&self.root.to_string_lossy(), id])
    }

    /// Puts a new container's directory in place, whole, and takes its sandbox's.
    pub fn place(&self, state: &BundleState, config: &[u8]) -> Result<SandboxDir> {
        let id = &state.id;
        check(id)?;
        self.sandboxes.sweep()?;
        let _placing = Lock::take(&self.root.join(LOCK))?;
        for name in read_dir(&self.root)? {
            if name.starts_with(NEW) {
                remove_dir(&self.root.join(name))?;
            }
        }
        // One that never came to life is in nobody's way.
        match self.find(id) {
            Err(Error::NotFound(_)) => {}
            Err(e) => return Err(e),
            Ok(_) => {
                return Err(Error::AlreadyExists(format!(
                    "container {id:?} already exists"
                )));
            }
        }
        let Some(sandbox) = self.sandboxes.take(&state.run_dir)? else {
            return Err(Error::WrongState(format!(
                "container {id:?}: the sandbox of one before it is still ending"
            )));
        };
        let new = self.root.join(format!("{NEW}{id}"));
        let made = || -> Result<()> {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&new)
                .map_err(Error::io("create directory", &new))?;
            write_atomic(&new.join(CONFIG_FILE), config)?;
            state.store(&new)?;
            fs::rename(&new, self.dir(id)).map_err(Error::io("create directory", self.dir(id)))
        };
        if let Err(e) = made() {
            let _ = sandbox.remove();
            let _ = remove_dir(&new);
            return Err(e);
        }
        Ok(sandbox)
    }

    /// What is known of a container, after what a killed supervisor left is gone.
    pub fn find(&self, id: &str) -> Result<BundleState> {
        let missing = || Error::NotFound(format!("container {id:?} does not exist"));
        if check(id).is_err() {
            return Err(missing());
        }
        let dir = self.dir(id);
        let load = || match BundleState::load(&dir) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(missing())
            }
            other => other,
        };
        let state = load()?;
        if state.status == BundleStatus::Stopped {
            return Ok(state);
        }
        let Some(sandbox) = self.sandboxes.take(&state.run_dir)? else {
            return Ok(state);
        };
        // It may have ended in its own time since.
        let mut state = match load() {
            Ok(state) => state,
            Err(e) => {
                sandbox.remove()?;
                return Err(e);
            }
        };
        match state.status {
            BundleStatus::Stopped => {}
            BundleStatus::Creating => {
                remove_dir(&dir)?;
                sandbox.remove()?;
                return Err(missing());
            }
            _ => {
                state.end();
                state.store(&dir)?;
            }
        }
        sandbox.remove()?;
        Ok(state)
    }

    /// All containers, by name.
    pub fn list(&self) -> Result<Vec<BundleState>> {
        let mut names = read_dir(&self.root)?;
        names.sort();
        let mut states = Vec::new();
        for name in names.iter().filter(|name| !name.starts_with('.')) {
            match self.find(name) {
                Ok(state) => states.push(state),
                Err(Error::NotFound(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(states)
    }

    /// Removes a container whose supervisor is gone.
    pub fn remove(&self, id: &str) -> Result<()> {
        check(id)?;
        remove_dir(&self.dir(id))
    }
}

/// What runc takes for an identifier, but for names that begin with a dot.
fn check(id: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    if id.is_empty() || id.len() > ID_MAX || id.starts_with('.') || !id.chars().all(fine) {
        return Err(Error::Invalid(format!(
            "invalid container ID format: {id:?} (up to {ID_MAX} of [a-zA-Z0-9_+.-], the first no dot)"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundles() -> (tempfile::TempDir, Bundles) {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        private_dir(&run).unwrap();
        let bundles = Bundles::open(&dir.path().join("root"), &run).unwrap();
        (dir, bundles)
    }

    fn state(bundles: &Bundles, id: &str) -> BundleState {
        BundleState {
            version: 1,
            id: id.into(),
            oci_version: "1.0.2".into(),
            status: BundleStatus::Creating,
            pid: 0,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "2020-01-01T00:00:00Z".into(),
            owner: 0,
            annotations: HashMap::new(),
            run_dir: bundles.run_dir(id),
            exit_code: None,
            oom_killed: false,
            error: None,
        }
    }

    #[test]
    fn a_name_is_one_containers() {
        let (_dir, bundles) = bundles();
        let mut one = state(&bundles, "one");
        let held = bundles.place(&one, b"{}").unwrap();
        let again = bundles.place(&one, b"{}");
        assert!(
            matches!(again, Err(Error::AlreadyExists(m)) if m == "container \"one\" already exists")
        );
        one.status = BundleStatus::Running;
        one.store(&bundles.dir("one")).unwrap();
        assert_eq!(bundles.list().unwrap(), std::slice::from_ref(&one));
        // The supervisor is killed.
        drop(held);
        let found = bundles.find("one").unwrap();
        assert_eq!(found.status, BundleStatus::Stopped);
        assert_eq!((found.pid, found.exit_code), (0, Some(EXIT_KILLED)));
        assert!(!one.run_dir.exists());
        let again = bundles.place(&one, b"{}");
        assert!(matches!(again, Err(Error::AlreadyExists(_))));
        bundles.remove("one").unwrap();
        assert!(matches!(bundles.find("one"), Err(Error::NotFound(_))));
        bundles.place(&one, b"{}").unwrap();
    }

    #[test]
    fn what_never_came_to_life_is_not_there() {
        let (_dir, bundles) = bundles();
        let one = state(&bundles, "one");
        drop(bundles.place(&one, b"{}").unwrap());
        assert!(bundles.list().unwrap().is_empty());
        assert!(!bundles.dir("one").exists() && !one.run_dir.exists());
    }

    #[test]
    fn names_are_file_names() {
        let (_dir, bundles) = bundles();
        for bad in ["", ".", "..", ".lock", "a/b", "a b", &"x".repeat(129)] {
            let placed = bundles.place(&state(&bundles, bad), b"{}");
            assert!(matches!(placed, Err(Error::Invalid(_))), "{bad:?}");
            assert!(
                matches!(bundles.find(bad), Err(Error::NotFound(_))),
                "{bad:?}"
            );
        }
        let long = "f".repeat(64);
        let placed = bundles.place(&state(&bundles, &long), b"{}").unwrap();
        assert!(placed.path().as_os_str().len() < 100);
    }
}
