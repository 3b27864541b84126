//! Volumes by name: directories of the node's that outlive the containers that have them.
//!
//! Each is a directory below `volumes/` of the state directory, with `volume.json` (its
//! record) and `_data` (what containers see), and lies there whole or not at all.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    Error, Layout, Lock, NamedVolume, Record, Result,
    file::{read_json, write_json},
    record::{self, now_ns, remove_dir},
    similar,
};

const RECORD_FILE: &str = "volume.json";
const DATA: &str = "_data";
const RECORD_MAX: u64 = 1 << 20;

/// The volumes of a node.
#[derive(Debug, Clone)]
pub struct NamedVolumes {
    dir: PathBuf,
}

/// A volume on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Unique name.
    pub name: String,
    /// When it was made, nanoseconds since the epoch.
    pub created_at: i64,
    /// Names and values for people and their programs.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Nobody has named it.
    #[serde(default)]
    pub anonymous: bool,
}

impl NamedVolumes {
    /// Those of a node.
    pub fn new(layout: &Layout) -> Self {
        Self {
            dir: layout.state.join("volumes"),
        }
    }

    /// The directory that containers see.
    pub fn data(&self, name: &str) -> PathBuf {
        self.dir.join(name).join(DATA)
    }

    /// Whether a name may be one: it is a directory's as well.
    pub fn check_name(name: &str) -> Result<()> {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !starts || name.len() < 2 || name.len() > 128 || !name.chars().all(fine) {
            return Err(Error::Invalid(format!(
                "name a volume {name:?}: use 2 to 128 of [a-zA-Z0-9_.-], beginning with a letter or digit"
            )));
        }
        Ok(())
    }

    fn lock(&self) -> Result<Lock> {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir);
        made.map_err(Error::io("create directory", &self.dir))?;
        Lock::take(&self.dir.join("lock"))
    }

    /// The volume of this name, made if there is none; whether it was.
    pub fn ensure(
        &self,
        name: &str,
        labels: BTreeMap<String, String>,
        anonymous: bool,
    ) -> Result<(VolumeRecord, bool)> {
        Self::check_name(name)?;
        let _one = self.lock()?;
        match self.load(name) {
            Ok(record) => return Ok((record, false)),
            Err(Error::NotFound(_)) => {}
            Err(e) => return Err(e),
        }
        let record = VolumeRecord {
            name: name.into(),
            created_at: now_ns(),
            labels,
            anonymous,
        };
        let new = self.dir.join(format!(".new-{name}"));
        remove_dir(&new)?;
        let make = || -> Result<()> {
            let private = |path: &Path| fs::DirBuilder::new().mode(0o700).create(path);
            private(&new).map_err(Error::io("create directory", &new))?;
            let data = new.join(DATA);
            let open = fs::DirBuilder::new().mode(0o755).create(&data);
            open.map_err(Error::io("create directory", &data))?;
            write_json(&new.join(RECORD_FILE), &record)?;
            let to = self.dir.join(name);
            fs::rename(&new, &to).map_err(Error::io("put in place", to))
        };
        make().inspect_err(|_| drop(remove_dir(&new)))?;
        Ok((record, true))
    }

    fn load(&self, name: &str) -> Result<VolumeRecord> {
        let path = self.dir.join(name).join(RECORD_FILE);
        match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(Error::NotFound(format!("no such volume: {name}")))
            }
            _ => read_json(&path, RECORD_MAX),
        }
    }

    /// The volume of this name.
    pub fn find(&self, name: &str) -> Result<VolumeRecord> {
        let unknown = |hint: &str| Error::NotFound(format!("no such volume: {name} ({hint})"));
        if Self::check_name(name).is_err() {
            return Err(unknown("`walnut volume ls` lists them"));
        }
        self.load(name).map_err(|e| match e {
            Error::NotFound(_) => {
                let all = self.list().unwrap_or_default();
                match similar(name, all.iter().map(|v| v.name.as_str())) {
                    Some(other) => unknown(&format!("did you mean {other}?")),
                    None => unknown("`walnut volume ls` lists them"),
                }
            }
            other => other,
        })
    }

    /// All of them, by name. What was being made or removed when somebody was killed goes.
    pub fn list(&self) -> Result<Vec<VolumeRecord>> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let _one = self.lock()?;
        let mut all = Vec::new();
        for name in record::read_dir(&self.dir)? {
            if name.starts_with('.') {
                remove_dir(&self.dir.join(&name))?;
            } else if let Ok(record) = self.load(&name) {
                all.push(record);
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Names of the containers that have it.
    pub fn users(layout: &Layout, name: &str) -> Result<Vec<String>> {
        let has = |r: &Record| r.terms.volumes.iter().any(|v| v.name == name);
        let all = record::list(layout)?;
        Ok(all.into_iter().filter(has).map(|r| r.name).collect())
    }

    /// Removes one that no container has; false if it was not there.
    pub fn remove(&self, layout: &Layout, name: &str) -> Result<bool> {
        Self::check_name(name)?;
        // No container is put in place meanwhile.
        let _names = Lock::take(&layout.state.join("names.lock"))?;
        let users = Self::users(layout, name)?;
        if !users.is_empty() {
            return Err(Error::WrongState(format!(
                "volume {name} is in use by {}; remove {} first",
                users.join(", "),
                if users.len() == 1 { "it" } else { "them" }
            )));
        }
        let _one = self.lock()?;
        let gone = self.dir.join(format!(".gone-{name}"));
        remove_dir(&gone)?;
        match fs::rename(self.dir.join(name), &gone) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.map_err(Error::io("remove", self.dir.join(name)))?,
        }
        remove_dir(&gone)?;
        Ok(true)
    }

    /// Removes those of a container's volumes that nobody has named and no other has.
    pub fn remove_anonymous(&self, layout: &Layout, volumes: &[NamedVolume]) {
        for volume in volumes.iter().filter(|volume| volume.anonymous) {
            if let Err(e) = self.remove(layout, &volume.name) {
                warn!("{e}");
            }
        }
    }

    /// Bytes of the blocks that a volume takes; stops counting at a million files.
    pub fn size(&self, name: &str) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let mut left = 1_000_000_u32;
        let mut dirs = vec![self.data(name)];
        let mut bytes = 0;
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let Ok(meta) = entry.metadata() else { continue };
                bytes += meta.blocks() * 512;
                if meta.is_dir() {
                    dirs.push(entry.path());
                }
                left -= 1;
                if left == 0 {
                    return bytes;
                }
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("s"), dir.path().join("r")).unwrap();
        let volumes = NamedVolumes::new(&layout);
        assert!(volumes.list().unwrap().is_empty());
        let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let (made, new) = volumes.ensure("data", labels, false).unwrap();
        assert!(new && volumes.data("data").is_dir());
        let (again, new) = volumes.ensure("data", BTreeMap::new(), false).unwrap();
        assert!(!new && again == made);
        fs::create_dir(layout.state.join("volumes/.new-half")).unwrap();
        assert_eq!(volumes.list().unwrap(), std::slice::from_ref(&made));
        assert!(!layout.state.join("volumes/.new-half").exists());
        let slip = volumes.find("dtaa").unwrap_err().to_string();
        assert!(slip.contains("did you mean data?"), "{slip}");
        assert!(volumes.remove(&layout, "data").unwrap());
        assert!(!volumes.remove(&layout, "data").unwrap());
        for name in ["", "a", "../x", "a/b", ".x", &"x".repeat(200)] {
            assert!(
                volumes.ensure(name, BTreeMap::new(), false).is_err(),
                "{name}"
            );
            assert!(volumes.find(name).is_err() && volumes.remove(&layout, name).is_err());
        }
    }
}
