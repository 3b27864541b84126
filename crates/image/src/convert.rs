//! From layers in the store to one EROFS file.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use sha2::{Digest as _, Sha256};

use walnut_archive::TarReader;

use crate::{
    Digest, Error,
    erofs::{data::DataWriter, image},
    error::IoAt,
    layer::{
        apply::{ApplyError, EntryBudget, apply_layer},
        decode::{Decoded, with_layer},
        tree::{LayerIndex, Tree},
    },
};

/// Part of every key: images that another version of the writer made are
/// made anew, never mistaken for its own. Raise it with every change of output.
const WRITER: &str = "walnut-erofs 1";

/// A layer to convert.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// Its blob's file.
    pub(crate) blob: PathBuf,
    /// Digest of the blob.
    pub(crate) digest: Digest,
    /// Bytes of the blob.
    pub(crate) size: u64,
    /// Digest of the tar within it.
    pub(crate) diff_id: Digest,
}

/// Bounds of a conversion.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
}

/// Names the root file system that these layers make.
pub(crate) fn chain_key(diff_ids: &[Digest]) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(WRITER);
    for diff_id in diff_ids {
        hasher.update(b"\n");
        hasher.update(diff_id.to_string());
    }
    Digest::from_hasher(hasher)
}

/// Converts `layers`, base first, into `out`, which is on disk afterwards.
/// `tails` is an empty file for what must wait. `progress` gets the compressed
/// bytes read. Returns the size of the image.
///
/// A blob that is not what its digest says gives [`Error::Mismatch`] of a
/// "blob"; it can be fetched again.
pub(crate) fn convert(
    layers: &[Layer],
    (out, out_path): (File, &Path),
    tails: File,
    limits: Limits,
    progress: &dyn Fn(u64),
) -> Result<u64, Error> {
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
    let mut tree = Tree::new();
    let mut data = DataWriter::new(out, out_path, tails, limits.bytes);
    let mut entries = EntryBudget {
        used: 0,
        limit: limits.entries,
    };
    let (mut budget, mut before) = (limits.bytes, 0);
    for (at, layer) in layers.iter().enumerate() {
        let at = LayerIndex::try_from(at).map_err(|_| Error::TooLarge {
            what: "the number of layers".to_owned(),
            size: layers.len() as u64,
            limit: LayerIndex::MAX.into(),
        })?;
        let file = File::open(&layer.blob).at("read", &layer.blob)?;
        let count = AtomicU64::new(0);
        let (result, digest) = with_layer(file, &count, budget, |decoded| {
            let tick = || progress(before + count.load(Ordering::Relaxed));
            let result = one_layer(&mut tree, decoded, at, &mut data, &mut entries, tick);
            budget = decoded.budget();
            let over = decoded.exceeded().then(|| Error::TooLarge {
                what: format!("layer {}, decompressed,", layer.digest),
                size: limits.bytes,
                limit: limits.bytes,
            });
            over.map_or(result, |over| Err(ApplyError::Store(over)))
        });
        judge(layer, result, digest)?;
        before += layer.size;
        progress(before);
    }
    let (_, size) = image::write(&tree, data, uuid(&chain_key(&diff_ids)))?;
    Ok(size)
}

fn one_layer(
    tree: &mut Tree,
    decoded: &mut Decoded,
    at: LayerIndex,
    data: &mut DataWriter,
    entries: &mut EntryBudget,
    tick: impl FnMut(),
) -> Result<(), ApplyError> {
    let mut reader = TarReader::new(decoded);
    apply_layer(tree, &mut reader, at, data, entries, tick)?;
    reader
        .into_inner()
        .drain()
        .map_err(|source| ApplyError::Tar {
            after: "the archive's end".to_owned(),
            source: source.into(),
        })
}

/// Decides what a layer's result means: its own fault, or the store's.
fn judge(
    layer: &Layer,
    result: Result<(), ApplyError>,
    digest: Option<Digest>,
) -> Result<(), Error> {
    let fault = match result {
        Ok(()) if digest == Some(layer.diff_id) => return Ok(()),
        Ok(()) => Error::Mismatch {
            what: "layer",
            expected: layer.diff_id,
            reason: format!(
                "the image's configuration promises this content, blob {} has {}",
                layer.digest,
                digest.map_or_else(|| "something unreadable".to_owned(), |d| d.to_string())
            ),
        },
        Err(ApplyError::Store(error)) => return Err(error),
        Err(error) => Error::Layer {
            digest: layer.digest,
            reason: error.to_string(),
        },
    };
    check_blob(&layer.blob, &layer.digest)?;
    Err(fault)
}

/// Fails if a blob's file is not what its digest says.
pub(crate) fn check_blob(path: &Path, expected: &Digest) -> Result<(), Error> {
    let mut file = File::open(path).at("read", path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        match file.read(&mut buffer).at("read", path)? {
            0 => break,
            got => hasher.update(&buffer[..got]),
        }
    }
    let actual = Digest::from_hasher(hasher);
    if actual != *expected {
        return Err(Error::Mismatch {
            what: "blob",
            expected: *expected,
            reason: format!("{} has content {actual}", path.display()),
        });
    }
    Ok(())
}

/// A UUID (RFC 9562, version 8) from what the image is made of.
fn uuid(key: &Digest) -> [u8; 16] {
    let mut uuid = [0u8; 16];
    uuid.copy_from_slice(&key.bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}
