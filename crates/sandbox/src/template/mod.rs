//! Templates: machines that have booted once and were saved, so that others begin where
//! they stood.
//!
//! A template is a directory, named by a digest of its [`Shape`], with `template.json`,
//! the machine's `state` and its `memory`. It is made beside the others and renamed into
//! place when it is whole, by one process at a time ([`Templates::make`]); a process that
//! is killed at it leaves what the next one sweeps away. No template is ever needed: who
//! finds none, or one that does not work, boots.

mod make;
mod shape;

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use tracing::warn;
use walnut_machine::{Driver, MachineSpec, Programs, SnapshotFiles};

pub use make::Wanted;
pub(crate) use make::machine;
pub use shape::Shape;
pub(crate) use shape::Stamp;

use crate::{
    Assets, Error, Lock, Result, file::read_json, layout::private_dir, record::remove_dir,
};

/// Disks that a clone may have: the root file system's, and that of the container which a
/// machine that stands by has built before.
pub(crate) const SPARE_DISKS: u32 = 2;
/// Templates that are kept. The one not used for longest goes first.
const TEMPLATES_MAX: usize = 8;
/// Largest `template.json` that is read.
const META_MAX: u64 = 1 << 20;
const META: &str = "template.json";
/// What a directory's name begins with until it is whole.
const UNFINISHED: &str = "new-";
/// What the name of a file begins with that is locked by who waits to make a template.
const WAITING: &str = "waiting-";
/// The directory in which a template's machine has its sockets while it is made.
pub(crate) const RUN_DIR: &str = "template";

/// The templates of a node, or of a user.
#[derive(Debug, Clone)]
pub struct Templates {
    dir: PathBuf,
    run: PathBuf,
}

/// A template that is whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// 32 hexadecimal digits.
    pub id: String,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// What it is good for.
    pub shape: Shape,
    state: Stamp,
    memory: Stamp,
}

/// A template as a list shows it.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// The template.
    #[serde(flatten)]
    pub template: Template,
    /// Bytes it takes on disk.
    pub size: u64,
    /// Why it is not used any more, if so.
    pub stale: Option<String>,
}

impl Templates {
    /// In the directory `templates` of `state`; what a machine needs while its template
    /// is made lies in `run`.
    pub fn new(state: &Path, run: &Path) -> Self {
        Self {
            dir: state.join("templates"),
            run: run.to_owned(),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }

    fn lock(&self) -> Result<Option<Lock>> {
        private_dir(&self.dir)?;
        Lock::try_take(&self.lock_path())
    }

    /// The template for a machine of `spec`, if there is one that is whole.
    pub(crate) fn find(&self, driver: &dyn Driver, spec: &MachineSpec) -> Result<Option<Template>> {
        let Some(shape) = Shape::of(driver, spec)? else {
            return Ok(None);
        };
        let id = shape.id();
        if !self.path(&id).exists() {
            return Ok(None);
        }
        match self.load(&id) {
            Ok(template) if template.shape == shape => {
                // So that it is known which ones are used; a read-only store keeps all.
                let now = fs::FileTimes::new().set_modified(SystemTime::now());
                let _ = fs::File::open(self.path(&id).join(META)).and_then(|f| f.set_times(now));
                Ok(Some(template))
            }
            Ok(_) => Ok(None),
            Err(e) => {
                self.discard(&id, &e.to_string());
                Ok(None)
            }
        }
    }

    /// Name of the template that a machine of `wanted` would begin from now.
    pub fn current(
        &self,
        wanted: &Wanted,
        assets: &Assets,
        cache: &Path,
    ) -> Result<Option<String>> {
        let programs = Programs {
            cache: Some(cache.to_owned()),
            ..Programs::new(&assets.dir)
        };
        let driver = walnut_machine::driver(wanted.driver, &programs)?;
        let run_dir = self.run.join(RUN_DIR);
        let spec = wanted.machine(driver.as_ref(), &run_dir, assets);
        let found = self.find(driver.as_ref(), &spec)?;
        Ok(found.map(|template| template.id))
    }

    /// Reads a template, and sees that its files are those it was made with.
    fn load(&self, id: &str) -> Result<Template> {
        let dir = self.path(id);
        let path = dir.join(META);
        let template: Template = read_json(&path, META_MAX)?;
        let files = self.files(id);
        for (path, then) in [
            (&files.state, &template.state),
            (&files.memory, &template.memory),
        ] {
            if !Stamp::of(path)?.same_content(then) {
                return Err(Error::Invalid(format!(
                    "use {}: it was changed after it was made",
                    path.display()
                )));
            }
        }
        if template.id != id || template.shape.id() != id {
            return Err(Error::Invalid(format!(
                "use {}: it is another template's",
                path.display()
            )));
        }
        Ok(template)
    }

    /// The files of a template, whether or not it is there.
    pub fn files(&self, id: &str) -> SnapshotFiles {
        let dir = self.path(id);
        SnapshotFiles {
            state: dir.join("state"),
            memory: dir.join("memory"),
        }
    }

    /// Removes one that does not work, and says why.
    pub(crate) fn discard(&self, id: &str, why: &str) {
        warn!(template = id, "a template is not used any more: {why}");
        if let Err(e) = self.remove(id) {
            warn!(template = id, "remove the template: {e}");
        }
    }

    /// Removes a template. Machines that were started from it keep what they use.
    pub fn remove(&self, id: &str) -> Result<()> {
        remove_dir(&self.path(id))
    }

    /// All templates, newest first. Directories that hold none are passed over.
    pub fn list(&self) -> Result<Vec<Listed>> {
        self.sweep()?;
        let mut all: Vec<_> = self
            .ids()?
            .iter()
            .filter_map(|id| {
                let template = self.load(id).ok()?;
                Some(Listed {
                    size: disk_use(&self.path(id)),
                    stale: template.shape.stale(),
                    template,
                })
            })
            .collect();
        all.sort_by_key(|listed| std::cmp::Reverse(listed.template.created_at));
        Ok(all)
    }

    fn names(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io("list", &self.dir)(e)),
        };
        Ok(entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect())
    }

    fn ids(&self) -> Result<Vec<String>> {
        let mut names = self.names()?;
        names.retain(|n| n.len() == 32 && n.bytes().all(|b| b.is_ascii_hexdigit()));
        Ok(names)
    }

    /// Removes what a killed process left. Nothing, while one makes a template.
    pub fn sweep(&self) -> Result<()> {
        if !self.dir.exists() && !self.run.join(RUN_DIR).exists() {
            return Ok(());
        }
        match self.lock()? {
            Some(_lock) => self.sweep_locked(),
            None => Ok(()),
        }
    }

    fn sweep_locked(&self) -> Result<()> {
        for name in self.names()? {
            if name.starts_with(UNFINISHED) {
                remove_dir(&self.dir.join(name))?;
            } else if name.starts_with(WAITING) {
                let place = self.dir.join(name);
                if Lock::try_take(&place)?.is_some() {
                    fs::remove_file(&place).map_err(Error::io("remove", &place))?;
                }
            }
        }
        remove_dir(&self.run.join(RUN_DIR))
    }

    /// Returns when no process is making a template any more. Blocks its thread.
    pub fn wait_for_maker(&self) -> Result<()> {
        Lock::wait_free(&self.lock_path())
    }

    /// Removes those that nothing can use any more.
    fn remove_stale(&self) -> Result<()> {
        for id in self.ids()? {
            let good = self.load(&id).is_ok_and(|t| t.shape.stale().is_none());
            if !good {
                self.remove(&id)?;
            }
        }
        Ok(())
    }

    /// Makes room for one more.
    fn evict(&self) -> Result<()> {
        let mut used: Vec<_> = self
            .ids()?
            .into_iter()
            .map(|id| {
                let meta = fs::metadata(self.path(&id).join(META));
                (meta.and_then(|m| m.modified()).ok(), id)
            })
            .collect();
        used.sort();
        let too_many = (used.len() + 1).saturating_sub(TEMPLATES_MAX);
        for (_, id) in used.into_iter().take(too_many) {
            self.remove(&id)?;
        }
        Ok(())
    }
}

/// Bytes of the blocks that a directory's files take.
pub(crate) fn disk_use(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.metadata().ok()?.blocks() * 512))
        .sum()
}

#[cfg(test)]
mod tests;
