//! What has happened to the containers, images, networks and volumes of a node, for who
//! asks later or waits for it: a line of JSON each, in `events.log` of the state directory.
//!
//! There is no daemon that would hear of everything: whoever does something writes it down.
//! A line is written at once, and so is whole among those of others. The file is bounded:
//! at 4 MiB it becomes `events.log.1`.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::debug;

use crate::{Lock, Record, Result, log::LineReader, log::rotated, now_ns};

const FILE: &str = "events.log";
/// Bytes at which the file is put aside.
const ROTATE_AT: u64 = 4 << 20;
/// Longest line, bytes: what is longer is not written down.
const LINE_MAX: usize = 32 << 10;

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Happening {
    /// Of what: `container`, `image`, `volume`, `network`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// What, as `start`, `die`, `pull`.
    #[serde(rename = "Action")]
    pub action: String,
    /// To whom.
    #[serde(rename = "Actor")]
    pub actor: Actor,
    /// When, nanoseconds since the epoch.
    #[serde(rename = "timeNano")]
    pub time: i64,
}

/// To whom something has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// ID or name.
    #[serde(rename = "ID")]
    pub id: String,
    /// What else is known of it: its name, its image, its labels, its exit code.
    #[serde(rename = "Attributes")]
    pub attributes: BTreeMap<String, String>,
}

/// Where it is written down.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
}

/// Reads what is written there, from the oldest on, and what comes.
pub type JournalReader = LineReader<Happening>;

impl Journal {
    /// That of a node.
    pub fn new(state: &Path) -> Self {
        Self {
            path: state.join(FILE),
        }
    }

    /// Something happened to a container. A journal that cannot be written keeps nobody
    /// from what they do.
    pub fn container(&self, record: &Record, action: &str, more: &[(&str, String)]) {
        let mut attributes = record.terms.labels.clone();
        attributes.insert("name".into(), record.name.clone());
        attributes.insert("image".into(), record.image.name.clone());
        let more = more.iter();
        attributes.extend(more.map(|(name, value)| ((*name).to_owned(), value.clone())));
        self.add("container", &record.id, action, attributes);
    }

    /// Something happened to something else, of a `kind`.
    pub fn other(&self, kind: &str, id: &str, action: &str) {
        let attributes = BTreeMap::from([("name".to_owned(), id.to_owned())]);
        self.add(kind, id, action, attributes);
    }

    fn add(&self, kind: &str, id: &str, action: &str, attributes: BTreeMap<String, String>) {
        let happening = Happening {
            kind: kind.into(),
            action: action.into(),
            actor: Actor {
                id: id.into(),
                attributes,
            },
            time: now_ns(),
        };
        if let Err(e) = self.write(&happening) {
            debug!("write down what happened: {e}");
        }
    }

    fn write(&self, happening: &Happening) -> Result<(), Box<dyn std::error::Error>> {
        let mut line = serde_json::to_vec(happening)?;
        line.push(b'\n');
        if line.len() > LINE_MAX {
            return Err(format!("{} bytes are too many", line.len()).into());
        }
        let append = || {
            let mut options = OpenOptions::new();
            options.append(true).create(true).mode(0o600);
            options.custom_flags(libc::O_NOFOLLOW).open(&self.path)
        };
        let mut file = append()?;
        if file.metadata()?.size() > ROTATE_AT {
            let _one = Lock::take(&self.path.with_extension("lock"))?;
            if fs::metadata(&self.path)?.size() > ROTATE_AT {
                fs::rename(&self.path, rotated(&self.path, 1))?;
            }
            file = append()?;
        }
        file.write_all(&line)?;
        Ok(())
    }

    /// What is written there.
    pub fn read(&self) -> JournalReader {
        LineReader::new(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        let mut reader = journal.read();
        assert!(reader.next_line().unwrap().is_none());
        journal.other("image", "nginx:latest", "pull");
        journal.other("volume", "data", "create");
        let seen: Vec<_> = std::iter::from_fn(|| reader.next_line().unwrap())
            .map(|h| (h.kind, h.action, h.actor.id))
            .collect();
        let of = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(
            seen,
            [
                of("image", "pull", "nginx:latest"),
                of("volume", "create", "data")
            ]
        );
    }

    #[test]
    fn it_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        let name = "x".repeat(16 << 10);
        for _ in 0..700 {
            journal.other("image", &name, "pull");
        }
        journal.other("image", &"x".repeat(LINE_MAX), "pull");
        let sizes = fs::read_dir(dir.path()).unwrap();
        let total: u64 = sizes.map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(total < 2 * ROTATE_AT + (1 << 20), "{total}");
    }
}
