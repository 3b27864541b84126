//! Pulling: resolve the name, fetch what is missing, convert, record.

use std::{
    fs::File,
    future::Future,
    io::Write as _,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::{StreamExt as _, TryStreamExt as _};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use crate::{
    Digest, Error, Event, Image, Progress, PullOptions, PullPolicy, Reference, convert,
    error::IoAt,
    manifest::{self, Blob, Document, MAX_MANIFEST, Manifest},
    registry::{Failure, Purpose, Registry},
    store::{
        files::{self, Layout, has_size, lock_making, read_blob},
        image,
        making::Making,
        refs::{Record, Refs},
        sweep,
    },
};

/// Tries of one transfer.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Disk left free for everything else.
const DISK_RESERVE: u64 = 32 << 20;

struct Pull<'a> {
    layout: &'a Layout,
    reference: &'a Reference,
    options: &'a PullOptions,
    progress: &'a dyn Progress,
    registry: Registry,
    /// Shared: keeps sweeps away from what no name leads to yet.
    adding: Arc<File>,
}

/// What there is of a blob.
struct Partial {
    temp: NamedTempFile,
    hasher: Sha256,
    done: u64,
}

/// What a try that broke off has left to the next.
type Begun = tokio::sync::Mutex<Option<Partial>>;

/// A failure for which no other try is made.
fn fatal(error: Error) -> Failure {
    Failure {
        error,
        transient: false,
    }
}

pub(crate) async fn pull(
    layout: &Layout,
    reference: &Reference,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    let key = reference.to_string();
    if options.policy == PullPolicy::IfMissing {
        let refs = Refs::read(layout)?;
        if let Ok(image) = image::by_key(layout, &refs, &key) {
            return Ok(image);
        }
    }
    let pull = Pull {
        layout,
        reference,
        options,
        progress,
        registry: Registry::new(reference, options, Purpose::Pull).await?,
        adding: Arc::new(begin_adding(layout).await?),
    };
    let record = pull.run().await?;
    Refs::update(layout, |refs| {
        refs.images.insert(key.clone(), record);
        Ok(())
    })?;
    let refs = Refs::read(layout)?;
    image::by_key(layout, &refs, &key)
}

/// Takes the shared lock of everyone who adds; sweeps first if no one else is
/// at it.
pub(super) async fn begin_adding(layout: &Layout) -> Result<File, Error> {
    let path = layout.root().join("gc.lock");
    let lock = layout.lock_file("gc.lock")?;
    if files::lock_exclusive_now(&lock, &path)? {
        sweep::sweep_locked(layout)?;
        // Converting a lock may let another sweep in between: harmless, as
        // nothing was added yet.
        flock(&lock, FlockOperation::Unlock).at("unlock", &path)?;
    }
    files::lock_shared_async(&lock, &path).await?;
    Ok(lock)
}

impl Pull<'_> {
    async fn run(&self) -> Result<Record, Error> {
        let name = self.reference.familiar();
        let (mut document, top) = self.top().await?;
        let mut digest = top;
        if let Document::Index(entry) = &document {
            digest = entry.digest;
            document = self.document(&digest).await?;
        }
        let Document::Image(image) = document else {
            return Err(Error::Manifest {
                what: "index",
                reference: name,
                reason: "it leads to another index".to_owned(),
            });
        };
        self.check_bounds(&image)?;
        let config = self.config(&image).await?;
        let (_, diff_ids) =
            manifest::config(&config, image.layers.len(), &name, &self.options.platform)?;
        self.fetch_layers(&image, &top).await?;
        let rootfs = self.convert(&image, &diff_ids).await?;
        let pulled = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
        Ok(Record {
            digest: top,
            manifest: digest,
            config: image.config.digest,
            rootfs,
            pulled,
            checkpoint: None,
        })
    }

    /// What the name stands for. A digest that the store has needs no
    /// registry; a tag that did not move costs one HEAD.
    async fn top(&self) -> Result<(Document, Digest), Error> {
        if let Some(digest) = self.reference.digest() {
            return Ok((self.document(digest).await?, *digest));
        }
        let tag = self.reference.tag().unwrap_or("latest");
        let told = self.retry(None, || self.registry.head(tag)).await?;
        if let Some(digest) = told
            && let Some(bytes) = read_blob(self.layout, &digest, MAX_MANIFEST)
        {
            return Ok((self.parse(&bytes)?, digest));
        }
        let (bytes, digest) = self
            .retry(None, || self.registry.manifest(tag, None))
            .await?;
        let document = self.parse(&bytes)?;
        files::write_whole(self.layout, &self.layout.blob(&digest), &bytes)?;
        Ok((document, digest))
    }

    fn parse(&self, bytes: &[u8]) -> Result<Document, Error> {
        manifest::parse(bytes, &self.reference.familiar(), &self.options.platform)
    }

    /// A manifest or index by digest.
    async fn document(&self, digest: &Digest) -> Result<Document, Error> {
        if let Some(bytes) = read_blob(self.layout, digest, MAX_MANIFEST) {
            return self.parse(&bytes);
        }
        let name = digest.to_string();
        let (bytes, _) = self
            .retry(Some(digest), || self.registry.manifest(&name, Some(digest)))
            .await?;
        let document = self.parse(&bytes)?;
        files::write_whole(self.layout, &self.layout.blob(digest), &bytes)?;
        Ok(document)
    }

    fn check_bounds(&self, image: &Manifest) -> Result<(), Error> {
        let limit = self.options.max_image_size;
        let total = image
            .layers
            .iter()
            .fold(0u64, |sum, layer| sum.saturating_add(layer.size));
        if total > limit {
            return Err(Error::TooLarge {
                what: format!("the layers of {}, together,", self.reference.familiar()),
                size: total,
                limit,
            });
        }
        let missing: u64 = self.missing(image).map(|layer| layer.size).sum();
        let root = self.layout.root();
        let disk = rustix::fs::statvfs(root).at("examine", root)?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let needed = missing.saturating_add(DISK_RESERVE);
        if missing > 0 && free < needed {
            return Err(Error::NoSpace {
                path: root.to_owned(),
                needed: needed - free,
            });
        }
        Ok(())
    }

    fn missing<'i>(&self, image: &'i Manifest) -> impl Iterator<Item = &'i Blob> {
        let layout = self.layout.clone();
        image
            .layers
            .iter()
            .filter(move |layer| !has_size(&layout.blob(&layer.digest), layer.size))
    }

    async fn config(&self, image: &Manifest) -> Result<Vec<u8>, Error> {
        let blob = &image.config;
        if let Some(bytes) = read_blob(self.layout, &blob.digest, manifest::MAX_CONFIG) {
            return Ok(bytes);
        }
        remove_damaged(&self.layout.blob(&blob.digest))?;
        self.fetch(blob, false).await?;
        read_blob(self.layout, &blob.digest, manifest::MAX_CONFIG).ok_or_else(|| Error::Damaged {
            path: self.layout.blob(&blob.digest),
            reason: "it changed while it was being read".to_owned(),
        })
    }

    async fn fetch_layers(&self, image: &Manifest, top: &Digest) -> Result<(), Error> {
        let mut missing: Vec<Blob> = Vec::new();
        for layer in self.missing(image) {
            if !missing.contains(layer) {
                missing.push(*layer);
            }
        }
        self.progress.event(Event::Resolved {
            digest: top,
            layers: missing.len(),
            bytes: missing.iter().map(|layer| layer.size).sum(),
        });
        for layer in image.layers.iter().filter(|layer| !missing.contains(layer)) {
            self.progress.event(Event::LayerExists {
                digest: &layer.digest,
                total: layer.size,
            });
        }
        futures::stream::iter(missing.iter().map(|layer| self.fetch(layer, true)))
            .buffer_unordered(self.options.concurrency.clamp(1, 16))
            .try_collect::<Vec<()>>()
            .await?;
        Ok(())
    }

    /// Fetches a blob that the store lacks, one process at a time.
    async fn fetch(&self, blob: &Blob, is_layer: bool) -> Result<(), Error> {
        let path = self.layout.blob(&blob.digest);
        let _making = lock_making(self.layout, &blob.digest.hex()).await?;
        if !has_size(&path, blob.size) {
            let begun = Begun::default();
            self.retry(Some(&blob.digest), || {
                self.transfer(blob, &path, is_layer, &begun)
            })
            .await?;
        }
        if is_layer {
            self.progress.event(Event::LayerDone {
                digest: &blob.digest,
                total: blob.size,
            });
        }
        Ok(())
    }

    /// One try at a blob, which goes on where the last one broke off: to a temporary file,
    /// hashed and counted on the way.
    async fn transfer(
        &self,
        blob: &Blob,
        to: &Path,
        is_layer: bool,
        begun: &Begun,
    ) -> Result<(), Failure> {
        let mismatch = |reason: String| Failure {
            error: Error::Mismatch {
                what: "blob",
                expected: blob.digest,
                reason,
            },
            transient: true,
        };
        // What is not put back has been of no use.
        let before = begun.lock().await.take();
        let from = before.as_ref().map_or(0, |partial| partial.done);
        let answer = self.registry.blob(blob, from).await;
        let (at, mut stream) = match answer {
            Ok(answer) => answer,
            Err(failure) => {
                *begun.lock().await = before;
                return Err(failure);
            }
        };
        let mut partial = match before {
            Some(before) if at > 0 => before,
            _ => Partial {
                temp: self.layout.temp().map_err(fatal)?,
                hasher: Sha256::new(),
                done: 0,
            },
        };
        while let Some(chunk) = stream.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(reason) => {
                    *begun.lock().await = Some(partial);
                    return Err(self.registry.broken(blob, reason));
                }
            };
            partial.done += chunk.len() as u64;
            if partial.done > blob.size {
                let reason = format!("the registry gives more than its {} bytes", blob.size);
                return Err(mismatch(reason));
            }
            partial.hasher.update(&chunk);
            let temp = &mut partial.temp;
            temp.write_all(&chunk)
                .at("write", temp.path())
                .map_err(fatal)?;
            if is_layer {
                self.progress.event(Event::LayerBytes {
                    digest: &blob.digest,
                    done: partial.done,
                    total: blob.size,
                });
            }
        }
        if partial.done < blob.size {
            let reason = format!("it ends after {} of {} bytes", partial.done, blob.size);
            *begun.lock().await = Some(partial);
            return Err(self.registry.broken(blob, reason));
        }
        let digest = Digest::from_hasher(partial.hasher);
        if digest != blob.digest {
            let reason = format!("the registry gave {} bytes, {digest}", blob.size);
            return Err(mismatch(reason));
        }
        // Syncing may take long; the other transfers go on meanwhile.
        let to = to.to_owned();
        tokio::task::spawn_blocking(move || files::keep(partial.temp, &to))
            .await
            .map_err(|e| fatal(Error::Internal(e.to_string())))?
            .map_err(fatal)
    }

    /// Runs `operation` until it succeeds, fails for good, or tries run out.
    async fn retry<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        digest: Option<&Digest>,
        operation: impl Fn() -> F,
    ) -> Result<T, Error> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            match operation().await {
                Ok(value) => return Ok(value),
                Err(failure) if !failure.transient || attempt >= ATTEMPTS => {
                    return Err(failure.error);
                }
                Err(failure) => {
                    let reason = failure.error.to_string();
                    tracing::debug!(attempt, %reason, "trying again");
                    if let Some(digest) = digest {
                        self.progress.event(Event::Retry {
                            digest,
                            attempt,
                            reason: &reason,
                        });
                    }
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
            }
        }
        Err(Error::Internal("tries ran out".to_owned()))
    }

    /// Makes the root file system if it is not there. A blob that turns out to
    /// be damaged is fetched anew, once each.
    async fn convert(&self, image: &Manifest, diff_ids: &[Digest]) -> Result<Digest, Error> {
        let key = convert::chain_key(diff_ids);
        let path = self.layout.rootfs(&key);
        let mut repaired = Vec::new();
        loop {
            let making = lock_making(self.layout, &format!("{}.erofs", key.hex())).await?;
            if image::whole_rootfs(&path).is_some() {
                return Ok(key);
            }
            let locks = (making, Arc::clone(&self.adding));
            let making = Making {
                layout: self.layout,
                options: self.options,
                progress: self.progress,
            };
            match making.rootfs(image, diff_ids, &path, locks).await {
                Err(Error::Mismatch {
                    what: "blob",
                    expected,
                    reason,
                }) if !repaired.contains(&expected) => {
                    tracing::warn!(blob = %expected, %reason, "fetching a damaged blob again");
                    repaired.push(expected);
                    let Some(blob) = image.layers.iter().find(|l| l.digest == expected) else {
                        return Err(Error::Internal("a blob of no layer".to_owned()));
                    };
                    remove_damaged(&self.layout.blob(&expected))?;
                    self.fetch(blob, true).await?;
                }
                Err(error) => return Err(error),
                Ok(size) => {
                    self.progress.event(Event::Converted { size });
                    return Ok(key);
                }
            }
        }
    }
}

fn remove_damaged(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).at("remove", path),
        _ => Ok(()),
    }
}
