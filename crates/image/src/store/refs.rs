//! `refs.json`: which names there are, and what they stand for.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    Digest, Error, Reference,
    error::IoAt,
    store::{
        checkpoint::Kept,
        files::{Layout, lock_exclusive, write_whole},
    },
};

const VERSION: u32 = 1;

/// What a name stands for. Complete when written: its blobs and root file
/// system were on disk before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Digest the name has in the registry; of an index, if it is one.
    pub(crate) digest: Digest,
    /// Digest of this platform's manifest.
    pub(crate) manifest: Digest,
    /// Digest of the configuration: the image's ID.
    pub(crate) config: Digest,
    /// Key of the root file system.
    pub(crate) rootfs: Digest,
    /// When it was pulled, nanoseconds since 1970.
    pub(crate) pulled: u64,
    /// It is a checkpoint; its digests are that of the checkpoint's record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) checkpoint: Option<Kept>,
}

/// The whole index, by canonical name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Refs {
    version: u32,
    pub(crate) images: BTreeMap<String, Record>,
}

impl Refs {
    /// Reads the index; it is empty before the first pull.
    pub(crate) fn read(layout: &Layout) -> Result<Self, Error> {
        let path = layout.refs();
        let bytes = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self {
                    version: VERSION,
                    images: BTreeMap::new(),
                });
            }
            other => other.at("read", &path)?,
        };
        let damaged = |reason: String| Error::Damaged {
            path: path.clone(),
            reason,
        };
        let refs: Self = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if refs.version != VERSION {
            return Err(damaged(format!(
                "it has version {}, this program knows {VERSION}",
                refs.version
            )));
        }
        Ok(refs)
    }

    /// Changes the index under its lock.
    pub(crate) fn update<T>(
        layout: &Layout,
        change: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let lock = layout.lock_file("refs.lock")?;
        lock_exclusive(&lock, &layout.root().join("refs.lock"))?;
        let mut refs = Self::read(layout)?;
        let result = change(&mut refs)?;
        let bytes = serde_json::to_vec_pretty(&refs).map_err(|e| Error::Internal(e.to_string()))?;
        write_whole(layout, &layout.refs(), &bytes)?;
        Ok(result)
    }

    /// Names of the image with this ID, as people write them.
    pub(crate) fn names_of(&self, id: &Digest) -> Vec<Reference> {
        let keys = self.keys_of(id);
        keys.iter().filter_map(|key| key.parse().ok()).collect()
    }

    /// Names of the image with this ID, as they are kept.
    pub(crate) fn keys_of(&self, id: &Digest) -> Vec<String> {
        self.images
            .iter()
            .filter(|(_, record)| record.config == *id)
            .map(|(key, _)| key.clone())
            .collect()
    }
}
