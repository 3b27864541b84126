//! Checkpoints: a container with its processes, its memory and what it wrote, saved to go
//! on elsewhere, any number of times.
//!
//! A checkpoint is a directory with `checkpoint.json` ([`Checkpoint`]), the machine's
//! `state` and its `memory`. [`Sandbox::checkpoint`](crate::Sandbox::checkpoint) writes
//! one, [`Sandbox::restore`](crate::Sandbox::restore) begins a sandbox from it. Where the
//! directory lies is the front end's matter; [`Drafts`] has places for those that are not
//! anywhere yet, which a killed command does not leave behind.
//!
//! Nothing in it is trusted. What the record says is bounded and must fit the bundle, the
//! host and the files; the two files are the driver's to read, which takes them for hostile.

mod draft;
mod file;
mod restore;
mod save;

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use walnut_machine::{Disk, SnapshotFiles};

pub use draft::{Draft, Drafts};
use file::{Content, SavedFile};
pub use save::CheckpointOptions;

use crate::{Error, Result, Shape, template::Stamp};

/// Of the directory's files.
const FORMAT: u32 = 1;
/// Largest record that is read: a bundle's `config.json`, escaped at worst, and the rest.
pub const CHECKPOINT_MAX: u64 = 16 << 20;
/// Most disks of a machine with a container.
const DISKS_MAX: usize = 8;
/// Name of the record.
pub const CHECKPOINT_FILE: &str = "checkpoint.json";

/// The record of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    format: u32,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// The container that was saved.
    pub container: SavedContainer,
    /// The machine's disks, in order.
    disks: Vec<SavedDisk>,
    /// What it is good for.
    pub shape: Shape,
    state: SavedFile,
    memory: SavedFile,
}

/// What was saved, as its front end knew it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedContainer {
    /// Its name then.
    pub id: String,
    /// What the agent in it knows it by.
    guest_id: String,
    /// Serial of the disk that its root file system is on.
    disk: String,
    /// It has a terminal.
    pub terminal: bool,
    /// Its standard input was open.
    pub stdin: bool,
    /// Its bundle's `config.json`.
    pub spec: Spec,
}

/// A disk that the machine had: by which file, as it was when it was opened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedDisk {
    serial: String,
    file: Stamp,
}

/// A disk that a machine was given.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Attached {
    pub(crate) disk: Disk,
    /// `None` if the file could not be looked at, or changes with the guest; then there is
    /// no checkpoint.
    file: Option<Stamp>,
}

impl Attached {
    pub(crate) fn new(disk: Disk) -> Self {
        let file = match disk.read_only {
            true => Stamp::of(&disk.path).ok(),
            false => None,
        };
        Self { file, disk }
    }

    fn saved(&self) -> Option<SavedDisk> {
        Some(SavedDisk {
            serial: self.disk.serial.clone(),
            file: self.file.clone()?,
        })
    }
}

impl Checkpoint {
    /// Reads the record in `dir`, and refuses what is no record of this version.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(CHECKPOINT_FILE);
        let mut bytes = Vec::new();
        file::open(&path)?
            .take(CHECKPOINT_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(Error::io("read", &path))?;
        Self::parse(&bytes)
            .map_err(|problem| Error::Invalid(format!("read {}: {problem}", path.display())))
    }

    /// What the bytes of a record say, or what is wrong with them.
    pub(crate) fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        /// All that records of every version have.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        if bytes.len() as u64 > CHECKPOINT_MAX {
            return Err(format!("larger than {CHECKPOINT_MAX} bytes"));
        }
        let Version { format } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if format != FORMAT {
            return Err(format!(
                "a checkpoint of format {format}; this program knows {FORMAT}"
            ));
        }
        let record: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        match record.problem() {
            None => Ok(record),
            Some(problem) => Err(problem),
        }
    }

    /// What no checkpoint can say.
    fn problem(&self) -> Option<String> {
        let container = &self.container;
        let word = |text: &str| {
            (1..=128).contains(&text.len())
                && !text.starts_with('.')
                && text
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
        };
        for id in [&container.id, &container.guest_id] {
            if !word(id) {
                let id: String = id.chars().take(128).collect();
                return Some(format!("{id:?} is no container's name"));
            }
        }
        if container.spec.process().is_none() || container.spec.linux().is_none() {
            return Some("its container has no process".into());
        }
        if self.disks.len() > DISKS_MAX || self.rootfs_stamp().is_none() {
            return Some("it has not the disk of its container, or too many".into());
        }
        let files = [&self.state, &self.memory];
        files.iter().find_map(|file| file.problem())
    }

    fn rootfs_stamp(&self) -> Option<&Stamp> {
        let disk = self.disks.iter().find(|d| d.serial == self.container.disk);
        disk.map(|disk| &disk.file)
    }

    /// The image file that its container's root file system is.
    pub fn rootfs(&self) -> &Path {
        Path::new(self.rootfs_stamp().map_or("", |stamp| &stamp.path))
    }

    /// Program and arguments.
    pub fn command(&self) -> &[String] {
        let process = self.container.spec.process().as_ref();
        process
            .and_then(|p| p.args().as_deref())
            .unwrap_or_default()
    }

    /// Why no machine of this host can go on from it, if that is so.
    pub fn stale(&self) -> Option<String> {
        self.shape.stale()
    }

    /// Bytes that the checkpoint in `dir` takes on disk.
    pub fn disk_use(dir: &Path) -> u64 {
        crate::template::disk_use(dir)
    }
}

fn files(dir: &Path) -> SnapshotFiles {
    SnapshotFiles {
        state: dir.join("state"),
        memory: dir.join("memory"),
    }
}

/// Writes the record of a machine that has been saved to `dir`, whose `files` are whole.
/// With `lasting`, all of it is on disk afterwards, and its content is digested.
fn seal(dir: &Path, container: SavedContainer, what: Sealed) -> Result<()> {
    let files = files(dir);
    let lasting = what.lasting;
    let record = Checkpoint {
        format: FORMAT,
        created_at: crate::now_ns(),
        container,
        disks: what.disks,
        shape: what.shape,
        state: SavedFile::of(&files.state, Content::Plain, true)?,
        memory: SavedFile::of(&files.memory, Content::Pages, lasting)?,
    };
    let json = serde_json::to_vec(&record)
        .map_err(|e| Error::Invalid(format!("write the checkpoint's record: {e}")))?;
    if json.len() as u64 > CHECKPOINT_MAX {
        return Err(Error::Invalid(format!(
            "write the checkpoint's record: larger than {CHECKPOINT_MAX} bytes"
        )));
    }
    if lasting {
        for path in [&files.state, &files.memory] {
            let synced = fs::File::open(path).and_then(|file| file.sync_all());
            synced.map_err(Error::io("write", path))?;
        }
    }
    crate::file::write_atomic(&dir.join(CHECKPOINT_FILE), &json)?;
    if lasting {
        let synced = fs::File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(Error::io("write", dir))?;
    }
    Ok(())
}

/// What [`seal`] records beside the container.
struct Sealed {
    disks: Vec<SavedDisk>,
    shape: Shape,
    lasting: bool,
}

/// Removes what of a checkpoint is in `dir`, which stays.
fn unmake(dir: &Path) {
    let files = files(dir);
    let record = dir.join(CHECKPOINT_FILE);
    let new: PathBuf = dir.join(format!("{CHECKPOINT_FILE}.new"));
    for path in [&files.state, &files.memory, &record, &new] {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests;
