//! From names and records to [`Image`]s.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
};

use serde::Deserialize;

use crate::{
    Digest, Error, HealthConfig, Image, Reference,
    erofs::format::{BLOCK_USIZE, Superblock},
    manifest::MAX_CONFIG,
    store::{
        checkpoint,
        files::{Layout, read_blob},
        refs::{Record, Refs},
    },
};

/// What a person's word for an image was found to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A key of the index.
    Name(String),
    /// An image's ID.
    Id(Digest),
}

/// Finds what `name` means. As with Docker: a whole ID, then a name, then the
/// beginning of an ID.
pub(crate) fn find(refs: &Refs, name: &str) -> Result<Found, Error> {
    let unknown = || Error::NoSuchImage(name.chars().take(300).collect());
    let ids: BTreeSet<Digest> = refs.images.values().map(|r| r.config).collect();
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    if let Ok(id) = format!("sha256:{hex}").parse::<Digest>() {
        return ids
            .contains(&id)
            .then_some(Found::Id(id))
            .ok_or_else(unknown);
    }
    if let Ok(reference) = name.parse::<Reference>()
        && let Some(key) = find_name(refs, &reference)
    {
        return Ok(Found::Name(key));
    }
    if hex.is_empty() || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(unknown());
    }
    let matches: Vec<&Digest> = ids.iter().filter(|id| id.hex().starts_with(hex)).collect();
    match matches.as_slice() {
        [] => Err(unknown()),
        [one] => Ok(Found::Id(**one)),
        several => Err(Error::Ambiguous {
            prefix: name.to_owned(),
            matches: several
                .iter()
                .map(|id| id.short())
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}

fn find_name(refs: &Refs, wanted: &Reference) -> Option<String> {
    let key = wanted.to_string();
    if refs.images.contains_key(&key) {
        return Some(key);
    }
    let digest = wanted.digest()?;
    refs.images
        .iter()
        .find(|(key, record)| {
            (record.digest == *digest || record.manifest == *digest)
                && key.parse::<Reference>().is_ok_and(|known| {
                    known.registry() == wanted.registry()
                        && known.repository() == wanted.repository()
                })
        })
        .map(|(key, _)| key.clone())
}

/// The image a name stands for.
pub(crate) fn by_key(layout: &Layout, refs: &Refs, key: &str) -> Result<Image, Error> {
    let record = refs
        .images
        .get(key)
        .ok_or_else(|| Error::NoSuchImage(key.to_owned()))?;
    build(layout, refs, record)
}

/// The image of an ID, as its newest name has it.
pub(crate) fn by_id(layout: &Layout, refs: &Refs, id: &Digest) -> Result<Image, Error> {
    let record = newest(refs, id).ok_or_else(|| Error::NoSuchImage(id.to_string()))?;
    build(layout, refs, record)
}

/// What the newest name of an image says of it.
pub(crate) fn newest<'a>(refs: &'a Refs, id: &Digest) -> Option<&'a Record> {
    let records = refs.images.values().filter(|record| record.config == *id);
    records.max_by_key(|record| record.pulled)
}

/// Every usable image, newest pull first.
pub(crate) fn to_images(layout: &Layout, refs: &Refs) -> Vec<Image> {
    let mut newest: BTreeMap<Digest, &Record> = BTreeMap::new();
    for record in refs.images.values() {
        let slot = newest.entry(record.config).or_insert(record);
        if slot.pulled < record.pulled {
            *slot = record;
        }
    }
    let mut records: Vec<&Record> = newest.into_values().collect();
    records.sort_by_key(|record| std::cmp::Reverse(record.pulled));
    records
        .into_iter()
        .filter_map(|record| match build(layout, refs, record) {
            Ok(image) => Some(image),
            Err(error) => {
                tracing::warn!(image = %record.config, %error, "left out of the list");
                None
            }
        })
        .collect()
}

fn build(layout: &Layout, refs: &Refs, record: &Record) -> Result<Image, Error> {
    if let Some(kept) = &record.checkpoint {
        return checkpoint::build(layout, refs, record, kept);
    }
    let damaged = |reason: &str| Error::Damaged {
        path: layout.blob(&record.config),
        reason: reason.to_owned(),
    };
    let bytes = read_blob(layout, &record.config, MAX_CONFIG)
        .ok_or_else(|| damaged("the configuration is missing or changed"))?;
    let config: oci_spec::image::ImageConfiguration =
        serde_json::from_slice(&bytes).map_err(|e| damaged(&e.to_string()))?;
    let rootfs = layout.rootfs(&record.rootfs);
    let size = whole_rootfs(&rootfs).ok_or_else(|| Error::Damaged {
        path: rootfs.clone(),
        reason: "it is missing or incomplete".to_owned(),
    })?;
    Ok(Image {
        id: record.config,
        names: refs.names_of(&record.config),
        digest: record.digest,
        created: config.created().clone(),
        size,
        health: health(&bytes),
        config,
        rootfs,
        checkpoint: None,
    })
}

/// What a configuration says of checks; nothing, if it says that in no way that is known.
fn health(config: &[u8]) -> Option<HealthConfig> {
    #[derive(Deserialize)]
    struct Extended {
        config: Option<Inner>,
    }
    #[derive(Deserialize)]
    struct Inner {
        #[serde(rename = "Healthcheck")]
        health: Option<HealthConfig>,
    }
    serde_json::from_slice::<Extended>(config)
        .ok()?
        .config?
        .health
}

/// Size of a root file system, if it is whole by its own account.
pub(crate) fn whole_rootfs(path: &Path) -> Option<u64> {
    let file = File::open(path).ok()?;
    let mut block = [0u8; BLOCK_USIZE];
    file.read_exact_at(&mut block, 0).ok()?;
    let size = file.metadata().ok()?.len();
    (Superblock::claimed_size(&block) == Some(size)).then_some(size)
}
