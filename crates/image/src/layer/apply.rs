//! Applies one layer's tar to the tree, its data going straight to the image.
//!
//! Rules: OCI image-spec layer.md. Where it is silent, what containerd does:
//! links in a path are followed within the root, missing parents are made, a
//! file over a directory replaces it, a directory over a directory does not.

use std::{collections::BTreeMap, io::Read};

use walnut_archive::{Entry, EntryKind, TarError, TarReader};

use crate::{
    Error,
    erofs::{data::DataWriter, format},
    layer::tree::{Data, Kind, LayerIndex, Meta, Tree, TreeError},
};

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
/// AUFS's own bookkeeping, which never is content.
const WHITEOUT_META: &[u8] = b".wh..wh.";

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error("after \"{after}\": {source}")]
    Tar { after: String, source: TarError },
    #[error("\"{path}\": {reason}")]
    Entry { path: String, reason: String },
    #[error(transparent)]
    Store(#[from] Error),
}

/// Counts what all layers together may hold.
#[derive(Debug)]
pub(crate) struct EntryBudget {
    pub(crate) used: u64,
    pub(crate) limit: u64,
}

impl EntryBudget {
    fn take(&mut self) -> Result<(), Error> {
        self.used += 1;
        if self.used > self.limit {
            return Err(Error::TooLarge {
                what: "the number of files in the image".to_owned(),
                size: self.used,
                limit: self.limit,
            });
        }
        Ok(())
    }
}

/// Applies the layer that `reader` gives; `tick` is called between entries.
pub(crate) fn apply_layer<R: Read>(
    tree: &mut Tree,
    reader: &mut TarReader<R>,
    layer: LayerIndex,
    data: &mut DataWriter,
    entries: &mut EntryBudget,
    mut tick: impl FnMut(),
) -> Result<(), ApplyError> {
    let mut last = Vec::new();
    loop {
        let entry = match reader.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(()),
            Err(source) => {
                let after = shown(&last);
                return Err(ApplyError::Tar { after, source });
            }
        };
        entries.take()?;
        tick();
        last.clone_from(&entry.path);
        apply_entry(tree, reader, entry, layer, data)?;
    }
}

fn apply_entry<R: Read>(
    tree: &mut Tree,
    reader: &mut TarReader<R>,
    mut entry: Entry,
    layer: LayerIndex,
    data: &mut DataWriter,
) -> Result<(), ApplyError> {
    let path = std::mem::take(&mut entry.path);
    let refuse = |reason: String| ApplyError::Entry {
        path: shown(&path),
        reason,
    };
    if let Some(done) = apply_whiteout(tree, &path, layer) {
        return done.map_err(|e| refuse(e.to_string()));
    }
    let kind = match entry.kind {
        EntryKind::HardLink => {
            return tree
                .link(&path, &entry.link, layer)
                .map_err(|e| refuse(format!("{e} (\"{}\")", shown(&entry.link))));
        }
        EntryKind::Dir => Kind::Dir(crate::layer::tree::Dir::default()),
        EntryKind::Symlink if entry.link.is_empty() => {
            return Err(refuse("it is a symbolic link to nothing".to_owned()));
        }
        EntryKind::Symlink => Kind::Symlink(std::mem::take(&mut entry.link).into()),
        EntryKind::Fifo => Kind::Fifo,
        EntryKind::Char | EntryKind::Block => {
            let (major, minor) = entry.device;
            let device = format::encode_device(major, minor)
                .ok_or_else(|| refuse(format!("there is no device {major}:{minor}")))?;
            match entry.kind {
                EntryKind::Char => Kind::Char(device),
                _ => Kind::Block(device),
            }
        }
        EntryKind::File => Kind::File(Data::default()),
    };
    let meta = meta(&mut entry).ok_or_else(|| refuse("its xattrs are too large".to_owned()))?;
    let kind = match kind {
        Kind::File(_) => Kind::File(store_data(reader, &entry, &meta, data, &path)?),
        other => other,
    };
    tree.put(&path, meta, kind, layer)
        .map_err(|e| refuse(e.to_string()))
}

/// Handles `.wh.*`; `None` for any other name.
fn apply_whiteout(
    tree: &mut Tree,
    path: &[u8],
    layer: LayerIndex,
) -> Option<Result<(), TreeError>> {
    let trimmed = path.strip_suffix(b"/").unwrap_or(path);
    let at = trimmed
        .iter()
        .rposition(|b| *b == b'/')
        .map_or(0, |p| p + 1);
    let (dir, name) = trimmed.split_at(at);
    let hidden = name.strip_prefix(WHITEOUT)?;
    if name == WHITEOUT_OPAQUE {
        return Some(tree.opaque(dir, layer));
    }
    // "." and ".." would name something else than an entry of `dir`.
    if name.starts_with(WHITEOUT_META) || matches!(hidden, b"" | b"." | b"..") {
        return Some(Ok(()));
    }
    Some(tree.whiteout(&[dir, hidden].concat(), layer))
}

/// The entry's metadata; `None` if its xattrs exceed the format.
fn meta(entry: &mut Entry) -> Option<Meta> {
    let mut xattrs = entry.xattrs.take();
    if let Some(map) = &mut xattrs {
        // What EROFS cannot serve, no Linux file system would take (macOS's
        // com.apple.*): left out, as containerd does. An overlay's own marks
        // would be obeyed by the guest's overlay as if it had made them.
        map.retain(|name, _| {
            format::split_xattr_name(name).is_some()
                && !name.starts_with(b"trusted.overlay.")
                && !name.starts_with(b"user.overlay.")
        });
    }
    let xattrs = xattrs.filter(|map| !map.is_empty());
    if let Some(map) = &xattrs {
        format::encode_xattrs(pairs(map))?;
    }
    Some(Meta {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        xattrs,
    })
}

pub(crate) fn pairs(map: &BTreeMap<Vec<u8>, Vec<u8>>) -> impl Iterator<Item = (&[u8], &[u8])> {
    map.iter().map(|(name, value)| (&name[..], &value[..]))
}

fn store_data<R: Read>(
    reader: &mut TarReader<R>,
    entry: &Entry,
    meta: &Meta,
    data: &mut DataWriter,
    path: &[u8],
) -> Result<Data, ApplyError> {
    let xattrs = meta
        .xattrs
        .as_ref()
        .and_then(|map| format::encode_xattrs(pairs(map)))
        .map_or(0, |(bytes, _)| bytes.len());
    let mut file = data.begin(entry.size, xattrs)?;
    // Most files are small: no more is cleared than can be filled.
    let room = usize::try_from(entry.size.min(64 << 10)).unwrap_or(64 << 10);
    let mut buffer = vec![0u8; room];
    let mut segments = entry.sparse.iter().flatten();
    let mut left = match &entry.sparse {
        None => entry.size,
        Some(_) => 0,
    };
    loop {
        while left == 0 {
            let Some(segment) = segments.next() else {
                return Ok(file.finish()?);
            };
            file.skip_to(segment.offset)?;
            left = segment.length;
            if left == 0 {
                continue;
            }
        }
        let most = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let got = reader
            .read_data(&mut buffer[..most])
            .map_err(|source| ApplyError::Tar {
                after: shown(path),
                source: source.into(),
            })?;
        if got == 0 {
            return Err(ApplyError::Entry {
                path: shown(path),
                reason: "its data is cut short".to_owned(),
            });
        }
        file.write(&buffer[..got])?;
        left -= u64::try_from(got).unwrap_or(left);
    }
}

/// A path for a message.
fn shown(path: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(path).chars().take(200).collect();
    text.escape_debug().to_string()
}
