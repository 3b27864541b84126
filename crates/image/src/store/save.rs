//! From the store to an archive: an OCI layout (image-spec `image-layout`), with the
//! `manifest.json` beside it that Docker reads.

use std::{collections::BTreeSet, fs::File, io::Write};

use serde_json::{Value, json};
use walnut_archive::{Ownership, PackError, Packer};

use crate::{
    Digest, Error, Reference,
    error::IoAt,
    manifest::{self, Document, MAX_CONFIG, MAX_MANIFEST, media_type},
    store::{
        Platform,
        files::{Layout, read_blob},
        image::{Found, find, newest},
        refs::{Record, Refs},
    },
};

/// An image to be written, under these names.
struct Saved {
    record: Record,
    names: Vec<Reference>,
}

/// Writes the images to `out`.
pub(crate) fn save(layout: &Layout, images: &[String], out: &mut dyn Write) -> Result<(), Error> {
    let refs = Refs::read(layout)?;
    let mut all: Vec<Saved> = Vec::new();
    for name in images {
        let saved = found(&refs, name)?;
        match all
            .iter_mut()
            .find(|s| s.record.manifest == saved.record.manifest)
        {
            Some(known) => known.names.extend(saved.names),
            None => all.push(saved),
        }
    }
    let mut packer = Packer::new(out, Ownership::Of(0, 0));
    let mut index = Vec::new();
    let mut docker = Vec::new();
    let mut blobs = Vec::new();
    for saved in &all {
        let bytes = whole(layout, &saved.record.manifest, MAX_MANIFEST)?;
        let name = saved
            .names
            .first()
            .map(Reference::familiar)
            .unwrap_or_default();
        let Document::Image(image) = manifest::parse(&bytes, &name, &Platform::default())? else {
            return Err(Error::Internal("a record's manifest is an index".into()));
        };
        index.extend(descriptors(saved, &bytes));
        docker.push(json!({
            "Config": path(&image.config.digest),
            "RepoTags": saved.names.iter().map(Reference::familiar).collect::<Vec<_>>(),
            "Layers": image.layers.iter().map(|layer| path(&layer.digest)).collect::<Vec<_>>(),
        }));
        // They are there to the end: whoever removes the image meanwhile removes names.
        whole(layout, &image.config.digest, MAX_CONFIG)?;
        blobs.push(saved.record.manifest);
        blobs.push(image.config.digest);
        blobs.extend(image.layers.iter().map(|layer| layer.digest));
    }
    let mut files = Vec::new();
    let mut seen = BTreeSet::new();
    for digest in blobs.iter().filter(|digest| seen.insert(**digest)) {
        let from = layout.blob(digest);
        files.push((digest, File::open(&from).at("open", from)?));
    }
    let index = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": index });
    let bytes = |value: &Value| value.to_string().into_bytes();
    packer
        .bytes(
            "oci-layout",
            &bytes(&json!({ "imageLayoutVersion": "1.0.0" })),
        )
        .map_err(unwritten)?;
    packer
        .bytes("index.json", &bytes(&index))
        .map_err(unwritten)?;
    packer
        .bytes("manifest.json", &bytes(&json!(docker)))
        .map_err(unwritten)?;
    for (digest, mut file) in files {
        let size = file.metadata().at("examine", layout.blob(digest))?.len();
        packer
            .file(&path(digest), &mut file, size)
            .map_err(unwritten)?;
    }
    packer.end().map_err(unwritten)
}

fn found(refs: &Refs, name: &str) -> Result<Saved, Error> {
    let (record, names) = match find(refs, name)? {
        Found::Name(key) => (
            refs.images.get(&key).cloned(),
            key.parse().into_iter().collect(),
        ),
        Found::Id(id) => (newest(refs, &id).cloned(), refs.names_of(&id)),
    };
    let record = record.ok_or_else(|| Error::NoSuchImage(name.to_owned()))?;
    if record.checkpoint.is_some() {
        return Err(Error::Archive {
            action: "written",
            reason: format!("{name} is a checkpoint: it is of use on this host alone"),
        });
    }
    Ok(Saved { record, names })
}

/// What an index says of an image, once for each of its names.
fn descriptors(saved: &Saved, manifest: &[u8]) -> Vec<Value> {
    let plain = json!({
        "mediaType": media_type(manifest),
        "digest": saved.record.manifest.to_string(),
        "size": manifest.len(),
        "platform": { "os": "linux", "architecture": Platform::default().architecture },
    });
    let named = |name: &Reference| {
        let mut named = plain.clone();
        named["annotations"] = json!({
            "io.containerd.image.name": name.to_string(),
            "org.opencontainers.image.ref.name": name.tag(),
        });
        named
    };
    match saved.names.as_slice() {
        [] => vec![plain],
        names => names.iter().map(named).collect(),
    }
}

fn path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn whole(layout: &Layout, digest: &Digest, most: u64) -> Result<Vec<u8>, Error> {
    read_blob(layout, digest, most).ok_or_else(|| Error::Damaged {
        path: layout.blob(digest),
        reason: "it is missing or changed".to_owned(),
    })
}

fn unwritten(error: PackError) -> Error {
    Error::Archive {
        action: "written",
        reason: error.to_string(),
    }
}
