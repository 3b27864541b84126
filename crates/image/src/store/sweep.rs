//! Removes what no name leads to, and what interrupted pulls left.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::{
    Error,
    error::IoAt,
    manifest::{self, Document, MAX_MANIFEST},
    store::{
        Platform,
        checkpoint::disk_use,
        files::{Layout, lock_exclusive_now, read_blob},
        refs::Refs,
    },
};

/// Sweeps if no one is adding anything. Returns the bytes given back.
pub(crate) fn sweep(layout: &Layout) -> Result<u64, Error> {
    let path = layout.root().join("gc.lock");
    let lock = layout.lock_file("gc.lock")?;
    if !lock_exclusive_now(&lock, &path)? {
        return Ok(0);
    }
    sweep_locked(layout)
}

/// The same while the caller holds `gc.lock` exclusively.
pub(crate) fn sweep_locked(layout: &Layout) -> Result<u64, Error> {
    let refs = Refs::read(layout)?;
    let mut freed = 0;
    // No pull runs, so none of these has an owner.
    for dir in [layout.tmp(), layout.locks()] {
        for (_, path) in files_of(&dir)? {
            freed += remove(&path)?;
        }
    }
    let rootfs: BTreeSet<OsString> = refs
        .images
        .values()
        .map(|record| format!("{}.erofs", record.rootfs.hex()).into())
        .collect();
    for (name, path) in files_of(&layout.rootfs_dir())? {
        if !rootfs.contains(&name) {
            freed += remove_unleased(&path)?;
        }
    }
    let kept: BTreeSet<OsString> = refs
        .images
        .values()
        .filter(|record| record.checkpoint.is_some())
        .map(|record| record.config.hex().into())
        .collect();
    if layout.checkpoints().exists() {
        for (name, path) in files_of(&layout.checkpoints())? {
            if !kept.contains(&name) {
                // Machines that began from it hold what they use.
                freed += disk_use(&path);
                std::fs::remove_dir_all(&path).at("remove", &path)?;
            }
        }
    }
    if let Some(blobs) = referenced_blobs(layout, &refs) {
        for (name, path) in files_of(&layout.blobs())? {
            if !blobs.contains(&name) {
                freed += remove(&path)?;
            }
        }
    }
    Ok(freed)
}

/// Names of all blobs that some name leads to; `None` if a manifest cannot be
/// read, so that nothing is removed by mistake.
fn referenced_blobs(layout: &Layout, refs: &Refs) -> Option<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    let pulled = refs.images.iter().filter(|(_, r)| r.checkpoint.is_none());
    for (key, record) in pulled {
        for digest in [&record.digest, &record.manifest, &record.config] {
            names.insert(digest.hex().into());
        }
        let bytes = read_blob(layout, &record.manifest, MAX_MANIFEST)?;
        match manifest::parse(&bytes, key, &Platform::default()).ok()? {
            Document::Image(image) => {
                names.extend(image.layers.iter().map(|l| OsString::from(l.digest.hex())));
            }
            Document::Index(_) => return None,
        }
    }
    Some(names)
}

fn files_of(dir: &Path) -> Result<Vec<(OsString, PathBuf)>, Error> {
    std::fs::read_dir(dir)
        .at("list", dir)?
        .map(|entry| {
            let entry = entry.at("list", dir)?;
            Ok((entry.file_name(), entry.path()))
        })
        .collect()
}

fn remove(path: &Path) -> Result<u64, Error> {
    let bytes = std::fs::symlink_metadata(path).map_or(0, |meta| meta.blocks() * 512);
    match std::fs::remove_file(path) {
        Ok(()) => Ok(bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(e).at("remove", path),
    }
}

/// Removes a root file system that no sandbox uses.
fn remove_unleased(path: &Path) -> Result<u64, Error> {
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        other => other.at("open", path)?,
    };
    if !lock_exclusive_now(&file, path)? {
        return Ok(0);
    }
    remove(path)
}
