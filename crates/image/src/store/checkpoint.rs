//! Checkpoints as images: directories of another crate's making, of which this store knows
//! the root file system that they need, and the record that names the rest.

use std::{
    fs::{DirBuilder, File},
    io::Read,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::Path,
    time::SystemTime,
};

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::{
    files::Layout,
    image::{self, whole_rootfs},
    pull::begin_adding,
    refs::{Record, Refs},
    sweep,
};
use crate::{Digest, Error, Image, Reference, error::IoAt};

/// The file in a checkpoint's directory whose digest is its ID.
const RECORD: &str = "checkpoint.json";
/// Largest such file.
const RECORD_MAX: u64 = 16 << 20;

/// What the index says of a name that stands for a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// When it was made, RFC 3339.
    created: String,
}

/// Moves the checkpoint in `dir`, which is whole and on disk, into the store under `name`,
/// which it takes from another image if need be. It keeps the root file system at `rootfs`,
/// one of this store's, for as long as it is here.
pub(crate) async fn add(
    layout: &Layout,
    name: &Reference,
    dir: &Path,
    rootfs: &Path,
    created: String,
) -> Result<Image, Error> {
    if name.digest().is_some() {
        return Err(Error::Reference {
            input: name.familiar(),
            reason: "a checkpoint is named by a tag, not by a digest".into(),
        });
    }
    let key = name.to_string();
    let adding = begin_adding(layout).await?;
    let (rootfs, _) = rootfs_key(layout, rootfs)?;
    let id = Digest::of(&record(dir)?);
    let all = layout.checkpoints();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&all)
        .at("create", &all)?;
    let to = layout.checkpoint(&id);
    std::fs::rename(dir, &to).at("rename to", &to)?;
    File::open(&all)
        .and_then(|all| all.sync_all())
        .at("write", &all)?;
    let pulled = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
    let record = Record {
        digest: id,
        manifest: id,
        config: id,
        rootfs,
        pulled,
        checkpoint: Some(Kept { created }),
    };
    let named = Refs::update(layout, |refs| {
        let before = refs.images.insert(key.clone(), record);
        Ok(without_names(refs, before.into_iter().collect()))
    });
    let gone = named.inspect_err(|_| {
        let _ = std::fs::remove_dir_all(&to);
    })?;
    drop(adding);
    remove(layout, &gone)?;
    sweep::sweep(layout)?;
    image::by_key(layout, &Refs::read(layout)?, &key)
}

/// Those of the records that are checkpoints to which no name leads any more.
pub(super) fn without_names(refs: &Refs, records: Vec<Record>) -> Vec<Digest> {
    let mut gone: Vec<_> = records
        .into_iter()
        .filter(|r| r.checkpoint.is_some() && refs.keys_of(&r.config).is_empty())
        .map(|r| r.config)
        .collect();
    gone.dedup();
    gone
}

/// Removes checkpoints that have no names; the bytes given back. Nobody adds one
/// of the same digest, so this need not wait for a sweep. Machines that began from one hold
/// what they use.
pub(super) fn remove(layout: &Layout, gone: &[Digest]) -> Result<u64, Error> {
    let mut freed = 0;
    for id in gone {
        let dir = layout.checkpoint(id);
        freed += disk_use(&dir);
        match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).at("remove", &dir);
            }
            _ => {}
        }
    }
    Ok(freed)
}

/// The image that is this checkpoint.
pub(super) fn build(
    layout: &Layout,
    refs: &Refs,
    record: &Record,
    kept: &Kept,
) -> Result<Image, Error> {
    let dir = layout.checkpoint(&record.config);
    let damaged = |path: &Path, reason: &str| Error::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    match self::record(&dir) {
        Ok(bytes) if Digest::of(&bytes) == record.config => {}
        _ => {
            return Err(damaged(
                &dir.join(RECORD),
                "the checkpoint's record is missing or changed",
            ));
        }
    }
    let rootfs = layout.rootfs(&record.rootfs);
    if whole_rootfs(&rootfs).is_none() {
        return Err(damaged(&rootfs, "it is missing or incomplete"));
    }
    Ok(Image {
        id: record.config,
        names: refs.names_of(&record.config),
        digest: record.digest,
        created: Some(kept.created.clone()),
        size: disk_use(&dir),
        config: ImageConfiguration::default(),
        health: None,
        rootfs,
        checkpoint: Some(dir),
    })
}

/// The key of a root file system of this store's, which is there, and its size.
pub(super) fn rootfs_key(layout: &Layout, path: &Path) -> Result<(Digest, u64), Error> {
    let here = path.parent() == Some(&layout.rootfs_dir());
    let hex = path.file_name().and_then(|name| name.to_str());
    let hex = hex.and_then(|name| name.strip_suffix(".erofs"));
    let key = hex.filter(|_| here);
    let key = key.and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
    match key.and_then(|key| Some((key, whole_rootfs(path)?))) {
        Some(found) => Ok(found),
        None => Err(Error::Damaged {
            path: path.to_owned(),
            reason: "it is no root file system of this store".into(),
        }),
    }
}

/// The record of the checkpoint in `dir`.
fn record(dir: &Path) -> Result<Vec<u8>, Error> {
    let path = dir.join(RECORD);
    let file = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(&path)
        .at("open", &path)?;
    let mut bytes = Vec::new();
    file.take(RECORD_MAX + 1)
        .read_to_end(&mut bytes)
        .at("read", &path)?;
    if bytes.len() as u64 > RECORD_MAX {
        return Err(Error::TooLarge {
            what: path.display().to_string(),
            size: bytes.len() as u64,
            limit: RECORD_MAX,
        });
    }
    Ok(bytes)
}

/// Bytes of the blocks that a directory's files take.
pub(super) fn disk_use(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.metadata().ok()?.blocks() * 512))
        .sum()
}
