//! What is known of a container on disk, so that it outlives its supervisor,
//! and the recovery that relies on it.
//!
//! A container is a directory: `container.json` (this record), `config.json`
//! (the OCI bundle), `container.log`, and `lock`, which its supervisor holds
//! for as long as it lives. A record that says "running" while nobody holds the
//! lock tells of a supervisor that was killed.

use std::{fs, io, os::fd::AsFd, path::Path};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    DaemonDirs, Drafts, Error, Health, Layout, Lock, Pools, Result, Templates, Terms, attachments,
    cgroup, daemon,
    file::{read_json, write_json},
    pool, similar, template,
};

/// Largest record that is read.
const RECORD_MAX: u64 = 1 << 20;
const RECORD_FILE: &str = "container.json";
/// Held while a record is changed.
const CHANGE_LOCK: &str = "container.lock";

/// Life of a container, as `walnut ps` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its sandbox is being started.
    Creating,
    /// Built; its program has not been executed.
    Created,
    /// Its program runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// It has ended, and is about to be started again.
    Restarting,
    /// Its program has ended, or its sandbox has.
    Exited,
}

impl Status {
    /// The word people see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Exited => "exited",
        }
    }
}

/// The image a container was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// As the user named it.
    pub name: String,
    /// Digest of the image's configuration.
    pub id: String,
}

/// A container on disk. Times are nanoseconds since the epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Format of this record: 1.
    pub version: u32,
    /// 32 hexadecimal digits.
    pub id: String,
    /// Unique name.
    pub name: String,
    /// The image.
    pub image: ImageRef,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Where it stands.
    pub status: Status,
    /// When `run` was called.
    pub created_at: i64,
    /// When the program was executed.
    #[serde(default)]
    pub started_at: Option<i64>,
    /// When it ended.
    #[serde(default)]
    pub finished_at: Option<i64>,
    /// 0–255, once ended.
    #[serde(default)]
    pub exit_code: Option<u32>,
    /// Why the sandbox failed, if it did.
    #[serde(default)]
    pub error: Option<String>,
    /// The guest's OOM killer ended it.
    #[serde(default)]
    pub oom_killed: bool,
    /// Removed as soon as it ends.
    pub auto_remove: bool,
    /// Has a terminal.
    pub terminal: bool,
    /// Signal that it is asked to end with; SIGTERM, if it has not said.
    #[serde(default)]
    pub stop_signal: Option<u32>,
    /// Machine driver, once started: `vmm`, `qemu-kvm`, `qemu-tcg`.
    #[serde(default)]
    pub driver: Option<String>,
    /// Guest memory in bytes, once started.
    #[serde(default)]
    pub memory: Option<u64>,
    /// vCPUs, once started.
    #[serde(default)]
    pub vcpus: Option<u32>,
    /// Template that its machine began from, once started, if it was one.
    #[serde(default)]
    pub template: Option<String>,
    /// PID of the supervisor, while it lives.
    #[serde(default)]
    pub shim_pid: Option<u32>,
    /// What else it was made with.
    #[serde(default)]
    pub terms: Terms,
    /// How often its restart policy has started it again, since somebody did.
    #[serde(default)]
    pub restarts: u32,
    /// Somebody has asked it to end: it is not started again.
    #[serde(default)]
    pub stopped: bool,
    /// How it is, if that is looked after.
    #[serde(default)]
    pub health: Option<Health>,
    /// It has ended, and its machine goes on for containers that have joined it.
    #[serde(default)]
    pub outlived: bool,
}

impl Record {
    /// Reads the record of the container in `dir`.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(RECORD_FILE);
        read_json(&path, RECORD_MAX).map_err(|e| match e {
            Error::Invalid(why) => Error::Invalid(format!("{why}; remove the container")),
            other => other,
        })
    }

    /// Writes the record into the container's directory, atomically.
    pub fn store(&self, dir: &Path) -> Result<()> {
        let path = dir.join(RECORD_FILE);
        write_json(&path, self)
    }

    /// Changes the record of the container in `dir`, however many do so at once, and gives
    /// what it has become.
    pub fn change(dir: &Path, change: impl FnOnce(&mut Self)) -> Result<Self> {
        let _one = Lock::take(&dir.join(CHANGE_LOCK))?;
        let mut record = Self::load(dir)?;
        change(&mut record);
        record.store(dir)?;
        Ok(record)
    }

    /// Made, and waiting for somebody to start it: nobody supervises it.
    pub fn at_rest(&self) -> bool {
        self.status == Status::Created && self.shim_pid.is_none() && self.terms.kept
    }

    /// First twelve digits of the id.
    pub fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }
}

/// All containers, oldest first, after [`reconcile`]. Directories that hold no
/// readable record are passed over.
pub fn list(layout: &Layout) -> Result<Vec<Record>> {
    reconcile(layout)?;
    let mut records: Vec<_> = ids(layout)?
        .iter()
        .filter_map(|id| Record::load(&layout.container(id)).ok())
        .collect();
    records.sort_by_key(|r| r.created_at);
    Ok(records)
}

/// The container with this name, id or unambiguous start of an id.
pub fn find(layout: &Layout, name: &str) -> Result<Record> {
    let records = list(layout)?;
    if let Some(record) = records.iter().find(|r| r.name == name || r.id == name) {
        return Ok(record.clone());
    }
    let mut hits = records
        .iter()
        .filter(|r| !name.is_empty() && r.id.starts_with(name));
    match (hits.next(), hits.next()) {
        (Some(record), None) => Ok(record.clone()),
        (Some(_), Some(_)) => Err(Error::Invalid(format!(
            "find container {name:?}: several ids start so; give more digits"
        ))),
        _ => Err(Error::NotFound(format!(
            "no such container: {name} ({})",
            match similar(name, records.iter().map(|r| r.name.as_str())) {
                Some(other) => format!("did you mean {other}?"),
                None => "`walnut ps -a` lists them".into(),
            }
        ))),
    }
}

/// Names of the containers that are in the machine of the container `id`.
pub fn joined(layout: &Layout, id: &str) -> Result<Vec<String>> {
    let there = |r: &Record| r.status != Status::Exited && !r.at_rest();
    let records = list(layout)?;
    let joined = records
        .into_iter()
        .filter(|r| there(r) && r.terms.joins.as_deref() == Some(id));
    Ok(joined.map(|r| r.name).collect())
}

/// Removes an ended container's directory, with what of its networks a killed supervisor
/// may have left. The caller holds its lock.
pub fn remove(layout: &Layout, id: &str, lock: &Lock) -> Result<()> {
    attachments::release(layout, id, lock.as_fd())?;
    remove_dir(&layout.sandbox(id))?;
    remove_dir(&layout.container(id))
}

/// Brings disk and reality together: what a killed supervisor left is removed,
/// its container is said to have ended. Its processes have died with it.
pub fn reconcile(layout: &Layout) -> Result<()> {
    for id in ids(layout)? {
        let dir = layout.container(&id);
        if !dir.join("lock").exists() {
            // Being made this moment, or made by half: without a record it is
            // nobody's, unless it is fresh.
            if Record::load(&dir).is_err() && is_stale(&dir) {
                remove_dir(&dir)?;
            }
            continue;
        }
        let Some(lock) = Lock::try_take(&dir.join("lock"))? else {
            continue;
        };
        // One that cannot be cleaned up after now is no reason to do nothing else: the next
        // command tries again.
        if let Err(e) = reconcile_one(layout, &id, &lock) {
            warn!("clean up after container {id}: {e}");
        }
    }
    if let Err(e) = attachments::resolver(&layout.run).revive() {
        warn!("{e}");
    }
    Templates::new(&layout.state, &layout.run).sweep()?;
    Drafts::new(&layout.state).sweep()?;
    Pools::new(&layout.state, &layout.run).sweep()?;
    if layout.run.join(daemon::RUN_DIR).exists() {
        DaemonDirs::new(&layout.run)?.sweep()?;
    }
    if layout.run.join(daemon::BUNDLES_DIR).exists() {
        DaemonDirs::of_bundles(&layout.run)?.sweep()?;
    }
    for entry in read_dir(&layout.run)? {
        let others = [
            template::RUN_DIR,
            pool::RUN_DIR,
            daemon::RUN_DIR,
            daemon::BUNDLES_DIR,
            attachments::NAMES_DIR,
        ];
        if others.contains(&entry.as_str()) {
            continue;
        }
        if !layout.container(&entry).exists() && !layout.sandbox(&entry).join("bundle").exists() {
            remove_dir(&layout.sandbox(&entry))?;
        }
    }
    Ok(())
}

fn reconcile_one(layout: &Layout, id: &str, lock: &Lock) -> Result<()> {
    let dir = layout.container(id);
    cgroup::sweep(&layout.sandbox(id));
    remove_dir(&layout.sandbox(id))?;
    let released = attachments::release(layout, id, lock.as_fd());
    if let Err(e) = &released {
        // Others must not wait for a plugin that is missing. It is tried again the next
        // time, for which the directory is needed.
        warn!("take container {id} from its networks: {e}");
    }
    let removable = released.is_ok();
    let Ok(mut record) = Record::load(&dir) else {
        return if removable { remove_dir(&dir) } else { Ok(()) };
    };
    if record.auto_remove && removable {
        return remove_dir(&dir);
    }
    if record.status == Status::Exited || record.at_rest() {
        if record.outlived {
            // So is the machine by now.
            record.outlived = false;
            record.store(&dir)?;
        }
        return Ok(());
    }
    record.status = Status::Exited;
    record.exit_code = Some(137);
    record.finished_at = Some(now_ns());
    record.shim_pid = None;
    record.error = Some("the sandbox's supervisor was killed".into());
    record.store(&dir)
}

pub(crate) fn is_stale(dir: &Path) -> bool {
    fs::metadata(dir)
        .and_then(|m| m.modified())
        .ok()
        .and_then(|t| t.elapsed().ok())
        .is_some_and(|age| age.as_secs() > 60)
}

fn ids(layout: &Layout) -> Result<Vec<String>> {
    Ok(read_dir(&layout.containers())?
        .into_iter()
        .filter(|name| name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit()))
        .collect())
}

pub(crate) fn read_dir(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let entry = entry.map_err(Error::io("list", path))?;
        if entry.file_type().is_ok_and(|t| t.is_dir())
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    Ok(names)
}

pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Nanoseconds since the epoch.
pub fn now_ns() -> i64 {
    chrono::Utc::now().timestamp_nanos_opt().unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("s"), dir.path().join("r")).unwrap();
        (dir, layout)
    }

    fn record(id: char, name: &str) -> Record {
        Record {
            version: 1,
            id: id.to_string().repeat(32),
            name: name.into(),
            image: ImageRef {
                name: "x".into(),
                id: "sha256:0".into(),
            },
            command: vec!["true".into()],
            status: Status::Running,
            created_at: 1,
            started_at: None,
            finished_at: None,
            exit_code: None,
            error: None,
            oom_killed: false,
            auto_remove: false,
            terminal: false,
            stop_signal: None,
            driver: None,
            memory: None,
            vcpus: None,
            template: None,
            shim_pid: Some(1),
            terms: Terms::default(),
            restarts: 0,
            stopped: false,
            health: None,
            outlived: false,
        }
    }

    fn make(layout: &Layout, record: &Record) -> Lock {
        let dir = layout.container(&record.id);
        fs::create_dir(&dir).unwrap();
        fs::create_dir(layout.sandbox(&record.id)).unwrap();
        record.store(&dir).unwrap();
        Lock::try_take(&dir.join("lock")).unwrap().unwrap()
    }

    #[test]
    fn a_supervised_container_is_left_alone() {
        let (_dir, layout) = layout();
        let r = record('a', "one");
        let _lock = make(&layout, &r);
        assert_eq!(list(&layout).unwrap(), std::slice::from_ref(&r));
        assert!(layout.sandbox(&r.id).exists());
    }

    #[test]
    fn an_orphan_is_ended_and_cleaned() {
        let (_dir, layout) = layout();
        let r = record('a', "one");
        drop(make(&layout, &r));
        let found = find(&layout, "aaaa").unwrap();
        assert_eq!(found.status, Status::Exited);
        assert_eq!(found.exit_code, Some(137));
        assert!(!layout.sandbox(&r.id).exists());
    }

    #[test]
    fn an_orphan_to_be_removed_goes_entirely() {
        let (_dir, layout) = layout();
        let mut r = record('b', "two");
        r.auto_remove = true;
        drop(make(&layout, &r));
        assert!(list(&layout).unwrap().is_empty());
        assert!(!layout.container(&r.id).exists());
    }

    #[test]
    fn names_and_prefixes() {
        let (_dir, layout) = layout();
        let mut second = record('a', "two");
        second.id.replace_range(31.., "b");
        let locks = [make(&layout, &record('a', "one")), make(&layout, &second)];
        assert_eq!(find(&layout, "two").unwrap().name, "two");
        assert!(matches!(find(&layout, "aa"), Err(Error::Invalid(_))));
        assert!(matches!(find(&layout, "c"), Err(Error::NotFound(_))));
        assert!(matches!(find(&layout, ""), Err(Error::NotFound(_))));
        drop(locks);
    }

    #[test]
    fn a_container_that_was_never_started_waits() {
        let (_dir, layout) = layout();
        let mut r = record('e', "three");
        (r.status, r.shim_pid, r.terms.kept) = (Status::Created, None, true);
        drop(make(&layout, &r));
        assert_eq!(find(&layout, "three").unwrap().status, Status::Created);
        // But for one whose supervisor was killed.
        let dir = layout.container(&r.id);
        Record::change(&dir, |r| r.shim_pid = Some(1)).unwrap();
        assert_eq!(find(&layout, "three").unwrap().status, Status::Exited);
    }

    #[test]
    fn a_torn_record_is_removed_with_its_container() {
        let (_dir, layout) = layout();
        let r = record('d', "x");
        drop(make(&layout, &r));
        fs::write(layout.container(&r.id).join(RECORD_FILE), b"{\"vers").unwrap();
        assert!(list(&layout).unwrap().is_empty());
        assert!(!layout.container(&r.id).exists());
    }
}
