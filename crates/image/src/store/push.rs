//! Pushing: blobs that the registry lacks, then the manifest.

use std::{fs::File, io::Read, pin::pin};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use tokio::sync::watch;

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
        send(layout, &registry, blob, progress).await?;
        progress.event(Event::LayerDone { digest, total });
    }
    let kind = media_type(&bytes);
    let sent = registry.put_manifest(bytes, &kind).await;
    sent.map_err(|f| f.error)?;
    Ok(record.manifest)
}

async fn send(
    layout: &Layout,
    registry: &Registry,
    blob: &Blob,
    progress: &dyn Progress,
) -> Result<(), Error> {
    let path = layout.blob(&blob.digest);
    let file = File::open(&path).at("open", &path)?;
    // The connection keeps the stream for itself; this is what is heard of it.
    let (taken, mut news) = watch::channel(0);
    // The registry says whether it is what its digest says.
    let chunks = stream::try_unfold((file, taken), |(mut file, taken)| async move {
        let mut chunk = vec![0; CHUNK];
        let read = file.read(&mut chunk)?;
        chunk.truncate(read);
        taken.send_modify(|done| *done += read as u64);
        Ok((read > 0).then(|| (Bytes::from(chunk), (file, taken))))
    });
    let mut sent = pin!(registry.put_blob(blob, chunks.boxed()));
    loop {
        tokio::select! {
            biased;
            // It ends with the stream.
            Ok(()) = news.changed() => progress.event(Event::LayerBytes {
                digest: &blob.digest,
                done: *news.borrow_and_update(),
                total: blob.size,
            }),
            done = &mut sent => return done.map_err(|f| f.error),
        }
    }
}
