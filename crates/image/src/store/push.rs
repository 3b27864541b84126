//! Pushing: blobs that the registry lacks, then the manifest.

use std::{fs::File, io::Read};

use bytes::Bytes;
use futures::{StreamExt as _, stream};

use crate::{
    Digest, Error, Event, Progress, PullOptions, Reference,
    error::IoAt,
    manifest::{self, Blob, Document, MAX_MANIFEST, media_type},
    registry::{Purpose, Registry},
    store::{
        Platform,
        files::{Layout, has_size, read_blob},
        image::{Found, find},
        refs::Refs,
    },
};

/// Bytes that are sent at once.
const CHUNK: usize = 1 << 20;

/// Sends the image that has this name to its registry; the digest that it has there.
pub(crate) async fn push(
    layout: &Layout,
    reference: &Reference,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<Digest, Error> {
    let name = reference.familiar();
    let refs = Refs::read(layout)?;
    let Found::Name(key) = find(&refs, &reference.to_string())? else {
        return Err(Error::NoSuchImage(name));
    };
    let record = refs.images.get(&key).filter(|r| r.checkpoint.is_none());
    let record = record.ok_or_else(|| Error::Archive {
        action: "written",
        reason: format!("{name} is a checkpoint: it is of use on this host alone"),
    })?;
    let damaged = |digest: &Digest| Error::Damaged {
        path: layout.blob(digest),
        reason: "it is missing or changed".to_owned(),
    };
    let bytes = read_blob(layout, &record.manifest, MAX_MANIFEST);
    let bytes = bytes.ok_or_else(|| damaged(&record.manifest))?;
    let Document::Image(image) = manifest::parse(&bytes, &name, &Platform::default())? else {
        return Err(Error::Internal("a record's manifest is an index".into()));
    };
    let registry = Registry::new(reference, options, Purpose::Push).await?;
    let mut blobs = image.layers.clone();
    blobs.push(image.config);
    progress.event(Event::Resolved {
        digest: &record.manifest,
        layers: blobs.len(),
        bytes: blobs.iter().map(|blob| blob.size).sum(),
    });
    for blob in &blobs {
        if !has_size(&layout.blob(&blob.digest), blob.size) {
            return Err(damaged(&blob.digest));
        }
        let total = blob.size;
        let digest = &blob.digest;
        if registry.has(digest).await.map_err(|f| f.error)? {
            progress.event(Event::LayerExists { digest, total });
            continue;
        }
        send(layout, &registry, blob).await?;
        progress.event(Event::LayerDone { digest, total });
    }
    let kind = media_type(&bytes);
    let sent = registry.put_manifest(bytes, &kind).await;
    sent.map_err(|f| f.error)?;
    Ok(record.manifest)
}

async fn send(layout: &Layout, registry: &Registry, blob: &Blob) -> Result<(), Error> {
    let path = layout.blob(&blob.digest);
    let file = File::open(&path).at("open", &path)?;
    // The registry says whether it is what its digest says.
    let chunks = stream::try_unfold(file, |mut file| async move {
        let mut chunk = vec![0; CHUNK];
        let read = file.read(&mut chunk)?;
        chunk.truncate(read);
        Ok((read > 0).then(|| (Bytes::from(chunk), file)))
    });
    registry
        .put_blob(blob, chunks.boxed())
        .await
        .map_err(|f| f.error)
}
