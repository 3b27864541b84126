//! From an archive to the store: of an OCI layout (image-spec `image-layout`), or of
//! `docker save`, as it was and as it is.
//!
//! A stream is read once, from its beginning to its end, and what it means is known at its
//! end alone. So every file of it becomes a blob, named by its digest, and what turns out to
//! be of no image goes with the next sweep. All of it is a stranger's: it has bounds, and
//! is what its digests say or is refused.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    sync::Arc,
    time::SystemTime,
};

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use walnut_archive::{Entry, EntryKind, TarReader};

use crate::{
    Digest, Error, Image, Progress, PullOptions, Reference, convert,
    error::IoAt,
    layer::decode::decompressed,
    manifest::{self, Document, LAYERS, MAX_CONFIG, MAX_MANIFEST, Manifest, OCI_MANIFEST},
    store::{
        files::{self, Layout, has_size, lock_making, read_blob},
        image,
        making::Making,
        pull::begin_adding,
        refs::{Record, Refs},
    },
};

/// Most files of an archive.
const FILES_MAX: usize = 20_000;
/// Most images of an archive.
const IMAGES_MAX: usize = 1_000;
const CHUNK: usize = 64 << 10;

/// A file of an archive: a blob by now.
#[derive(Debug, Clone, Copy)]
struct Blob {
    digest: Digest,
    size: u64,
    /// Its first bytes.
    head: [u8; 4],
}

/// What an archive has in it.
#[derive(Debug, Default)]
struct Contents {
    files: BTreeMap<String, Blob>,
    /// Links to other files.
    links: BTreeMap<String, String>,
    index: Option<Vec<u8>>,
    docker: Option<Vec<u8>>,
}

/// An image that an archive has, by its manifest.
#[derive(Debug)]
struct Offered {
    manifest: Digest,
    names: Vec<Reference>,
}

/// `manifest.json` of `docker save`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// `index.json` of a layout, and indexes that it leads to.
#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<IndexEntry>,
}

#[derive(Debug, Deserialize)]
struct IndexEntry {
    digest: Digest,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

fn bad(reason: impl Into<String>) -> Error {
    Error::Archive {
        action: "read",
        reason: reason.into(),
    }
}

/// Takes in all images of an archive.
pub(crate) async fn load(
    layout: &Layout,
    from: Box<dyn Read + Send>,
    name: Option<&Reference>,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<Vec<Image>, Error> {
    // Keeps sweeps away from what no name leads to yet.
    let adding = Arc::new(begin_adding(layout).await?);
    let (there, most) = (layout.clone(), options.max_image_size);
    let held = Arc::clone(&adding);
    let reading = tokio::task::spawn_blocking(move || {
        let _held = held;
        Contents::read(&there, from, most)
    });
    let contents = reading
        .await
        .map_err(|e| Error::Internal(e.to_string()))??;
    let offered = contents.images(layout)?;
    if offered.is_empty() {
        return Err(bad(
            "it has neither an index.json nor a manifest.json with an image in it",
        ));
    }
    let mut loaded = Vec::new();
    for image in &offered {
        let mut names = image.names.clone();
        if names.is_empty() {
            names.extend(name.cloned());
        }
        if names.is_empty() {
            return Err(bad(
                "it has an image without a name; give it one: --name NAME",
            ));
        }
        let record = take(layout, image, options, progress, &adding).await?;
        Refs::update(layout, |refs| {
            for name in &names {
                refs.images.insert(name.to_string(), record.clone());
            }
            Ok(())
        })?;
        let refs = Refs::read(layout)?;
        loaded.push(image::by_id(layout, &refs, &record.config)?);
    }
    Ok(loaded)
}

/// Makes an image of its blobs.
async fn take(
    layout: &Layout,
    offered: &Offered,
    options: &PullOptions,
    progress: &dyn Progress,
    adding: &Arc<File>,
) -> Result<Record, Error> {
    let name = offered
        .names
        .first()
        .map_or_else(|| offered.manifest.to_string(), Reference::familiar);
    let document = |digest: &Digest| {
        let bytes = read_blob(layout, digest, MAX_MANIFEST);
        let bytes = bytes.ok_or_else(|| bad(format!("it lacks the manifest {digest}")))?;
        manifest::parse(&bytes, &name, &options.platform)
    };
    let mut manifest = offered.manifest;
    let image = match document(&manifest)? {
        Document::Image(image) => image,
        Document::Index(entry) => {
            manifest = entry.digest;
            match document(&manifest)? {
                Document::Image(image) => image,
                Document::Index(_) => return Err(bad("an index leads to another")),
            }
        }
    };
    for layer in &image.layers {
        if !has_size(&layout.blob(&layer.digest), layer.size) {
            return Err(bad(format!(
                "it lacks the layer {} of {name}",
                layer.digest
            )));
        }
    }
    let config = read_blob(layout, &image.config.digest, MAX_CONFIG);
    let config = config.ok_or_else(|| bad(format!("it lacks the configuration of {name}")))?;
    let count = image.layers.len();
    let (_, diff_ids) = manifest::config(&config, count, &name, &options.platform)?;
    let rootfs = rootfs(layout, &image, &diff_ids, options, progress, adding).await?;
    let pulled = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
    Ok(Record {
        digest: offered.manifest,
        manifest,
        config: image.config.digest,
        rootfs,
        pulled,
        checkpoint: None,
    })
}

async fn rootfs(
    layout: &Layout,
    image: &Manifest,
    diff_ids: &[Digest],
    options: &PullOptions,
    progress: &dyn Progress,
    adding: &Arc<File>,
) -> Result<Digest, Error> {
    let key = convert::chain_key(diff_ids);
    let path = layout.rootfs(&key);
    let lock = lock_making(layout, &format!("{}.erofs", key.hex())).await?;
    if image::whole_rootfs(&path).is_none() {
        let making = Making {
            layout,
            options,
            progress,
        };
        let locks = (lock, Arc::clone(adding));
        making.rootfs(image, diff_ids, &path, locks).await?;
    }
    Ok(key)
}

impl Contents {
    /// Reads the whole stream; its files become blobs.
    fn read(layout: &Layout, from: Box<dyn Read + Send>, most: u64) -> Result<Self, Error> {
        let from = decompressed(from).map_err(|e| bad(e.to_string()))?;
        let mut reader = TarReader::new(from);
        let mut contents = Self::default();
        let mut left = most;
        while let Some(entry) = reader.next_entry().map_err(|e| bad(e.to_string()))? {
            let name = String::from_utf8_lossy(&entry.path);
            let name = name.trim_start_matches("./").to_owned();
            if contents.files.len() + contents.links.len() >= FILES_MAX {
                return Err(bad(format!("it has more than {FILES_MAX} files")));
            }
            match entry.kind {
                EntryKind::File => {}
                EntryKind::Symlink | EntryKind::HardLink => {
                    let target = resolved(&name, &entry);
                    contents.links.insert(name, target);
                    continue;
                }
                _ => continue,
            }
            if entry.sparse.is_some() || entry.size > left {
                return Err(Error::TooLarge {
                    what: format!("the archive's {name}"),
                    size: entry.size,
                    limit: left,
                });
            }
            left -= entry.size;
            match name.as_str() {
                "index.json" => contents.index = Some(small(&mut reader, &entry)?),
                "manifest.json" => contents.docker = Some(small(&mut reader, &entry)?),
                _ => {
                    let blob = keep(layout, &mut reader, &entry, &name)?;
                    contents.files.insert(name, blob);
                }
            }
        }
        // What follows the end mark may be padding; a pipe's writer wants it read.
        let _ = std::io::copy(&mut reader.into_inner().take(1 << 20), &mut std::io::sink());
        Ok(contents)
    }

    fn file(&self, name: &str) -> Result<Blob, Error> {
        let name = self.links.get(name).map_or(name, String::as_str);
        let found = self.files.get(name).copied();
        found.ok_or_else(|| bad(format!("it lacks {name:?}, which it names")))
    }

    /// The images that it has.
    fn images(&self, layout: &Layout) -> Result<Vec<Offered>, Error> {
        let docker = match &self.docker {
            Some(bytes) => serde_json::from_slice::<Vec<DockerImage>>(bytes)
                .map_err(|e| bad(format!("its manifest.json: {e}")))?,
            None => Vec::new(),
        };
        let mut offered = match &self.index {
            Some(bytes) => self.of_index(layout, bytes, &docker)?,
            None => docker
                .iter()
                .map(|image| self.of_docker(layout, image))
                .collect::<Result<_, _>>()?,
        };
        if offered.len() > IMAGES_MAX {
            return Err(bad(format!("it has more than {IMAGES_MAX} images")));
        }
        for image in &mut offered {
            image.names.sort();
            image.names.dedup();
        }
        Ok(offered)
    }

    fn of_index(
        &self,
        layout: &Layout,
        bytes: &[u8],
        docker: &[DockerImage],
    ) -> Result<Vec<Offered>, Error> {
        let index: Index =
            serde_json::from_slice(bytes).map_err(|e| bad(format!("its index.json: {e}")))?;
        let mut offered: Vec<Offered> = Vec::new();
        for entry in index.manifests {
            let full = entry.annotations.get("io.containerd.image.name");
            let short = entry.annotations.get("org.opencontainers.image.ref.name");
            // A tag alone names nothing.
            let short = short.filter(|name| name.contains(['/', ':']));
            let name = full.or(short).and_then(|name| name.parse().ok());
            let mut names: Vec<Reference> = name.into_iter().collect();
            if names.is_empty() {
                names = named_by_docker(layout, &entry.digest, docker);
            }
            match offered.iter_mut().find(|o| o.manifest == entry.digest) {
                Some(known) => known.names.extend(names),
                None => offered.push(Offered {
                    manifest: entry.digest,
                    names,
                }),
            }
        }
        Ok(offered)
    }

    /// Makes a manifest for an image that has none.
    fn of_docker(&self, layout: &Layout, image: &DockerImage) -> Result<Offered, Error> {
        let descriptor = |blob: &Blob, kind: &str| {
            json!({
                "mediaType": kind, "digest": blob.digest.to_string(), "size": blob.size,
            })
        };
        let layer = |name: &String| {
            let blob = self.file(name)?;
            // In LAYERS: plain, gzip, zstd.
            let kind = match blob.head {
                [0x1f, 0x8b, ..] => LAYERS[1],
                [0x28, 0xb5, 0x2f, 0xfd] => LAYERS[2],
                _ => LAYERS[0],
            };
            Ok(descriptor(&blob, kind))
        };
        let layers: Result<Vec<Value>, Error> = image.layers.iter().map(layer).collect();
        let config = self.file(&image.config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(&config, "application/vnd.oci.image.config.v1+json"),
            "layers": layers?,
        });
        let bytes = manifest.to_string().into_bytes();
        let digest = Digest::of(&bytes);
        files::write_whole(layout, &layout.blob(&digest), &bytes)?;
        Ok(Offered {
            manifest: digest,
            names: tags(image),
        })
    }
}

/// The path that a link leads to, within the archive.
fn resolved(name: &str, entry: &Entry) -> String {
    let target = String::from_utf8_lossy(&entry.link);
    if entry.kind == EntryKind::HardLink {
        return target.trim_start_matches("./").to_owned();
    }
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn tags(image: &DockerImage) -> Vec<Reference> {
    let tags = image.repo_tags.iter().flatten();
    tags.filter_map(|tag| tag.parse().ok()).collect()
}

/// The names that `manifest.json` has for an image of the index.
fn named_by_docker(layout: &Layout, manifest: &Digest, docker: &[DockerImage]) -> Vec<Reference> {
    let config = read_blob(layout, manifest, MAX_MANIFEST)
        .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok())
        .and_then(|m| m["config"]["digest"].as_str().map(str::to_owned));
    let Some(hex) = config.as_deref().and_then(|d| d.strip_prefix("sha256:")) else {
        return Vec::new();
    };
    let same = docker.iter().filter(|image| image.config.contains(hex));
    same.flat_map(tags).collect()
}

/// A small file, whole.
fn small<R: Read>(reader: &mut TarReader<R>, entry: &Entry) -> Result<Vec<u8>, Error> {
    if entry.size > MAX_MANIFEST {
        return Err(Error::TooLarge {
            what: String::from_utf8_lossy(&entry.path).into_owned(),
            size: entry.size,
            limit: MAX_MANIFEST,
        });
    }
    let mut bytes = Vec::new();
    let mut chunk = vec![0; CHUNK];
    while let read @ 1.. = reader
        .read_data(&mut chunk)
        .map_err(|e| bad(e.to_string()))?
    {
        bytes.extend_from_slice(&chunk[..read]);
    }
    Ok(bytes)
}

/// A file as a blob; one that is named by a digest is what that says.
fn keep<R: Read>(
    layout: &Layout,
    reader: &mut TarReader<R>,
    entry: &Entry,
    name: &str,
) -> Result<Blob, Error> {
    let mut temp = layout.temp()?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let (mut size, mut head) = (0, [0; 4]);
    while let read @ 1.. = reader
        .read_data(&mut chunk)
        .map_err(|e| bad(e.to_string()))?
    {
        let part = &chunk[..read];
        if size == 0 && read >= 4 {
            head.copy_from_slice(&part[..4]);
        }
        hasher.update(part);
        temp.write_all(part).at("write", temp.path())?;
        size += read as u64;
    }
    let digest = Digest::from_hasher(hasher);
    if let Some(said) = name.strip_prefix("blobs/sha256/")
        && said != digest.hex()
    {
        return Err(match format!("sha256:{said}").parse() {
            Ok(expected) => Error::Mismatch {
                what: "blob",
                expected,
                reason: format!("the archive has {digest} under that name"),
            },
            Err(e) => e,
        });
    }
    let to = layout.blob(&digest);
    if !has_size(&to, size) {
        files::keep(temp, &to)?;
    }
    let blob = Blob { digest, size, head };
    debug_assert_eq!(size, entry.size);
    Ok(blob)
}

#[cfg(test)]
mod tests;
