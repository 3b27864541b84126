//! Manifests and indexes (OCI image-spec, Docker schema 2), checked.

use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};
use serde::Deserialize;

use crate::{Digest, Error, store::Platform};

/// Most bytes of a manifest or an index.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Most bytes of a configuration.
pub(crate) const MAX_CONFIG: u64 = 8 << 20;
/// Most layers of an image.
pub(crate) const MAX_LAYERS: usize = 512;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// What a registry is asked for.
pub(crate) const ACCEPT: [&str; 4] = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST];

pub(crate) const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// A blob that a manifest points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// A manifest reduced to what is used of it.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    pub(crate) config: Blob,
    /// Base first.
    pub(crate) layers: Vec<Blob>,
}

/// Either kind of document a name may stand for.
#[derive(Debug, Clone)]
pub(crate) enum Document {
    Image(Manifest),
    /// The entry chosen for the platform.
    Index(Blob),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
}

/// Parses what a registry gave for `reference`.
pub(crate) fn parse(bytes: &[u8], reference: &str, platform: &Platform) -> Result<Document, Error> {
    let bad = |reason: String| Error::Manifest {
        what: "manifest",
        reference: reference.to_owned(),
        reason,
    };
    let probe: Probe = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    if probe.schema_version != Some(2) {
        return Err(bad(format!(
            "schema version {}, only 2 is supported",
            probe
                .schema_version
                .map_or("missing".to_owned(), |v| v.to_string())
        )));
    }
    let is_index = match probe.media_type.as_deref() {
        Some(OCI_MANIFEST | DOCKER_MANIFEST) => false,
        Some(OCI_INDEX | DOCKER_LIST) => true,
        Some(other) => return Err(bad(format!("its type {other} is not supported"))),
        None => probe.manifests.is_some(),
    };
    // One document must not read as both (GHSA-xmmx-7jpf-fx42).
    if probe.manifests.is_some() && probe.layers.is_some() {
        return Err(bad("it has both manifests and layers".to_owned()));
    }
    if is_index {
        let index: ImageIndex = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
        return select(&index, reference, platform).map(Document::Index);
    }
    let manifest: ImageManifest = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    image(&manifest, &bad).map(Document::Image)
}

/// The type that a manifest says it is of; OCI's, if it does not.
pub(crate) fn media_type(manifest: &[u8]) -> String {
    let probe = serde_json::from_slice::<Probe>(manifest).ok();
    let kind = probe.and_then(|probe| probe.media_type);
    kind.unwrap_or_else(|| OCI_MANIFEST.to_owned())
}

fn image(manifest: &ImageManifest, bad: &dyn Fn(String) -> Error) -> Result<Manifest, Error> {
    let blob = |d: &oci_spec::image::Descriptor| -> Result<Blob, Error> {
        Ok(Blob {
            digest: d.digest().to_string().parse()?,
            size: d.size(),
        })
    };
    let count = manifest.layers().len();
    if count > MAX_LAYERS {
        return Err(bad(format!(
            "it has {count} layers, the limit is {MAX_LAYERS}"
        )));
    }
    for layer in manifest.layers() {
        let kind = layer.media_type().to_string();
        if kind.contains("nondistributable") || kind.contains("foreign") {
            return Err(bad(format!(
                "layer {} may not be distributed ({kind}); only its vendor serves it",
                layer.digest()
            )));
        }
        if !LAYERS.contains(&kind.as_str()) {
            return Err(bad(format!(
                "layer {} is of type {kind}, which is no file system layer",
                layer.digest()
            )));
        }
    }
    let config = blob(manifest.config())?;
    if config.size > MAX_CONFIG {
        return Err(Error::TooLarge {
            what: "the image's configuration".to_owned(),
            size: config.size,
            limit: MAX_CONFIG,
        });
    }
    Ok(Manifest {
        config,
        layers: manifest
            .layers()
            .iter()
            .map(blob)
            .collect::<Result<_, _>>()?,
    })
}

fn select(index: &ImageIndex, reference: &str, wanted: &Platform) -> Result<Blob, Error> {
    let mut found = Vec::new();
    for entry in index.manifests() {
        let Some(platform) = entry.platform() else {
            continue;
        };
        let (os, architecture) = (
            platform.os().to_string(),
            platform.architecture().to_string(),
        );
        let variant = platform.variant().as_deref();
        let fits = os == wanted.os
            && architecture == wanted.architecture
            && wanted.variant.as_deref().is_none_or(|v| Some(v) == variant);
        if fits {
            return Ok(Blob {
                digest: entry.digest().to_string().parse()?,
                size: entry.size(),
            });
        }
        if os != "unknown" {
            found.push(format!("{os}/{architecture}"));
        }
    }
    found.dedup();
    found.truncate(20);
    Err(Error::Platform {
        reference: reference.to_owned(),
        wanted: wanted.to_string(),
        found: if found.is_empty() {
            "nothing".to_owned()
        } else {
            found.join(", ")
        },
    })
}

/// Parses a configuration and its diff IDs, one for each of `layers` layers.
pub(crate) fn config(
    bytes: &[u8],
    layers: usize,
    reference: &str,
    platform: &Platform,
) -> Result<(ImageConfiguration, Vec<Digest>), Error> {
    let bad = |reason: String| Error::Manifest {
        what: "configuration",
        reference: reference.to_owned(),
        reason,
    };
    let config: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    let has = (config.os().to_string(), config.architecture().to_string());
    if has != (platform.os.clone(), platform.architecture.clone()) {
        return Err(Error::Platform {
            reference: reference.to_owned(),
            wanted: platform.to_string(),
            found: format!("{}/{}", has.0, has.1),
        });
    }
    let diff_ids = diff_ids(&config)?;
    if diff_ids.len() != layers {
        return Err(bad(format!(
            "it describes {} layers, the manifest has {layers}",
            diff_ids.len()
        )));
    }
    Ok((config, diff_ids))
}

/// The digests of a configuration's layers.
pub(crate) fn diff_ids(config: &ImageConfiguration) -> Result<Vec<Digest>, Error> {
    config
        .rootfs()
        .diff_ids()
        .iter()
        .map(|id| id.to_string().parse())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amd64() -> Platform {
        Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            variant: None,
        }
    }

    fn digest(n: u8) -> String {
        format!("sha256:{}", format!("{n:02x}").repeat(32))
    }

    fn manifest(layer_type: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}",
            "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":10}},
            "layers":[{{"mediaType":"{layer_type}","digest":"{}","size":20}}]}}"#,
            digest(1),
            digest(2)
        )
    }

    fn refused(text: &str) -> String {
        parse(text.as_bytes(), "x:y", &amd64())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn every_supported_layer_type_parses() {
        for kind in LAYERS {
            let Document::Image(image) = parse(manifest(kind).as_bytes(), "x:y", &amd64()).unwrap()
            else {
                panic!("not an image");
            };
            assert_eq!(image.layers[0].digest.to_string(), digest(2));
            assert_eq!(image.config.size, 10);
        }
    }

    #[test]
    fn unusable_manifests_say_why() {
        assert!(refused("{}").contains("schema version missing"));
        assert!(refused(r#"{"schemaVersion":1}"#).contains("only 2"));
        assert!(refused(r#"{"schemaVersion":2}"#).contains("missing field"));
        assert!(refused("nonsense").contains("manifest of x:y"));
        assert!(refused(r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#).contains("both"));
        assert!(refused(r#"{"schemaVersion":2,"mediaType":"a/b"}"#).contains("a/b"));
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        assert!(refused(&manifest(foreign)).contains("may not be distributed"));
        assert!(refused(&manifest("application/wasm")).contains("no file system layer"));
        assert!(refused(&manifest(LAYERS[0]).replace("sha256:02", "sha256:0")).contains("x:y"));
        assert!(refused(&manifest(LAYERS[0]).replace(":20", ":-20")).contains("invalid value"));
        let huge = manifest(LAYERS[0]).replace("\"size\":10", "\"size\":99999999999");
        assert!(refused(&huge).contains("too large"));
    }

    #[test]
    fn an_index_gives_the_platforms_manifest() {
        let index = |entries: &str| {
            format!(r#"{{"schemaVersion":2,"mediaType":"{DOCKER_LIST}","manifests":[{entries}]}}"#)
        };
        let entry = |n: u8, os: &str, arch: &str| {
            format!(
                r#"{{"mediaType":"{DOCKER_MANIFEST}","digest":"{}","size":5,
                "platform":{{"os":"{os}","architecture":"{arch}"}}}}"#,
                digest(n)
            )
        };
        let both = index(&[entry(1, "linux", "arm64"), entry(2, "linux", "amd64")].join(","));
        let Document::Index(chosen) = parse(both.as_bytes(), "x:y", &amd64()).unwrap() else {
            panic!("not an index");
        };
        assert_eq!(chosen.digest.to_string(), digest(2));
        let other = refused(&index(&entry(1, "linux", "arm64")));
        assert!(
            other.contains("linux/amd64") && other.contains("linux/arm64"),
            "{other}"
        );
        assert!(refused(&index("")).contains("nothing"));
    }
}
