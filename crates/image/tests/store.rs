//! The store with a real registry: names, damage, bounds, sharing, sweeping.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod common;

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
};

use common::{Registry, layout, tar};
use walnut_image::{
    Error, Event, Image, NoProgress, Progress, PullOptions, PullPolicy, Reference, Store,
};

/// One file per layer, pushed as `demo:1`.
struct Setup {
    registry: Registry,
    dir: tempfile::TempDir,
    store: Store,
}

impl Setup {
    fn new(layers: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tars: Vec<PathBuf> = (0..layers)
            .map(|n| {
                let path = dir.path().join(format!("{n}.tar"));
                let data: Vec<u8> = (0..60_000u32)
                    .flat_map(|i| (i * 7919 + n as u32).to_le_bytes())
                    .collect();
                tar(&path, &[(&format!("file{n}"), &data), ("same", b"x")]);
                path
            })
            .collect();
        let oci = layout(dir.path(), "demo", &tars);
        let registry = Registry::start();
        registry.push(&oci, "demo", "demo:1", &[]);
        let store = Store::open(dir.path().join("store")).unwrap();
        Self {
            registry,
            dir,
            store,
        }
    }

    fn name(&self) -> Reference {
        self.registry.name("demo:1").parse().unwrap()
    }

    async fn pull(&self) -> Result<Image, Error> {
        self.store
            .pull(&self.name(), &PullOptions::default(), &NoProgress)
            .await
    }

    fn path(&self, below: &str) -> PathBuf {
        self.store.root().join(below)
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut list: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    list.sort();
    list
}

/// The largest blob of a store: a layer.
fn a_layer(store: &Store) -> PathBuf {
    let blobs = files(&store.root().join("blobs/sha256"));
    blobs
        .into_iter()
        .max_by_key(|p| p.metadata().unwrap().len())
        .unwrap()
}

#[derive(Default)]
struct Seen(Mutex<Vec<String>>);

impl Progress for Seen {
    fn event(&self, event: Event<'_>) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }
}

impl Seen {
    fn count(&self, what: &str) -> usize {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|e| e.starts_with(what))
            .count()
    }
}

#[tokio::test]
async fn pulled_images_are_found_listed_and_not_fetched_again() {
    let setup = Setup::new(5);
    let seen = Seen::default();
    let image = setup
        .store
        .pull(&setup.name(), &PullOptions::default(), &seen)
        .await
        .unwrap();
    assert_eq!(seen.count("LayerDone"), 5);
    assert_eq!(seen.count("Converted"), 1);
    assert_eq!(image.names, [setup.name()]);
    assert_eq!(image.size, image.rootfs.metadata().unwrap().len());

    let again = Seen::default();
    setup
        .store
        .pull(&setup.name(), &PullOptions::default(), &again)
        .await
        .unwrap();
    assert_eq!(again.count("LayerBytes") + again.count("Convert"), 0);
    assert_eq!(again.count("LayerExists"), 5);

    let (id, name) = (image.id.to_string(), setup.name().familiar());
    let pinned = format!("{}@{}", setup.registry.name("demo"), image.digest);
    for word in [
        id.as_str(),
        &image.id.hex(),
        &image.id.short(),
        &image.id.hex()[..5],
        &name,
        &pinned,
    ] {
        assert_eq!(setup.store.resolve(word).unwrap().id, image.id, "{word}");
    }
    for word in ["", "zz", "nosuch:tag", &"0".repeat(64)] {
        assert!(
            matches!(setup.store.resolve(word), Err(Error::NoSuchImage(_))),
            "{word}"
        );
    }
    assert_eq!(setup.store.list().unwrap().len(), 1);
}

#[tokio::test]
async fn by_digest_or_if_missing_no_registry_is_needed() {
    let mut setup = Setup::new(1);
    let image = setup.pull().await.unwrap();
    let pinned: Reference = format!("{}@{}", setup.registry.name("demo"), image.digest)
        .parse()
        .unwrap();
    let other = Registry::start();
    drop(std::mem::replace(&mut setup.registry, other));
    let options = PullOptions::default();
    let by_digest = setup
        .store
        .pull(&pinned, &options, &NoProgress)
        .await
        .unwrap();
    assert_eq!(by_digest.id, image.id);
    assert_eq!(by_digest.names.len(), 2);
    let missing = PullOptions {
        policy: PullPolicy::IfMissing,
        ..options
    };
    let kept = setup
        .store
        .pull(&image.names[0], &missing, &NoProgress)
        .await
        .unwrap();
    assert_eq!(kept.id, image.id);
}

#[tokio::test]
async fn two_images_make_a_short_prefix_ambiguous() {
    let setup = Setup::new(1);
    setup.pull().await.unwrap();
    let mut ids = Vec::new();
    // Seventeen IDs: two share their first digit.
    for n in 0..17 {
        let path = setup.dir.path().join("n.tar");
        tar(&path, &[("n", format!("{n}").as_bytes())]);
        let tag = format!("t{n}");
        let oci = layout(setup.dir.path(), &tag, &[path]);
        setup.registry.push(&oci, &tag, &format!("many:{tag}"), &[]);
        let name = setup.registry.name(&format!("many:{tag}")).parse().unwrap();
        let image = setup
            .store
            .pull(&name, &PullOptions::default(), &NoProgress)
            .await
            .unwrap();
        ids.push(image.id.hex()[..1].to_owned());
    }
    ids.sort();
    let twice = ids.windows(2).find(|pair| pair[0] == pair[1]).unwrap();
    assert!(matches!(
        setup.store.resolve(&twice[0]),
        Err(Error::Ambiguous { .. })
    ));
}

#[tokio::test]
async fn damaged_blobs_and_roots_are_repaired() {
    let setup = Setup::new(3);
    let image = setup.pull().await.unwrap();
    let good = std::fs::read(&image.rootfs).unwrap();
    let layer = a_layer(&setup.store);
    let blob = std::fs::read(&layer).unwrap();

    // Cut short: seen by its size.
    std::fs::write(&layer, &blob[..100]).unwrap();
    setup.pull().await.unwrap();
    assert_eq!(std::fs::read(&layer).unwrap(), blob);

    // Changed: seen when it is converted.
    let mut changed = blob.clone();
    changed[blob.len() / 2] ^= 0xff;
    std::fs::write(&layer, &changed).unwrap();
    std::fs::remove_file(&image.rootfs).unwrap();
    assert!(matches!(
        setup.store.resolve(&image.id.hex()),
        Err(Error::Damaged { .. })
    ));
    let repaired = setup.pull().await.unwrap();
    assert_eq!(std::fs::read(&layer).unwrap(), blob);
    assert_eq!(std::fs::read(&repaired.rootfs).unwrap(), good);

    // A root cut short: seen by its own account.
    std::fs::remove_file(&image.rootfs).unwrap();
    std::fs::write(&image.rootfs, &good[..good.len() - 4096]).unwrap();
    setup.pull().await.unwrap();
    assert_eq!(std::fs::read(&image.rootfs).unwrap(), good);

    // Manifest and configuration.
    for digest in [image.digest, image.id] {
        std::fs::write(setup.path("blobs/sha256").join(digest.hex()), b"{}").unwrap();
    }
    setup.pull().await.unwrap();
    assert_eq!(setup.store.resolve(&image.id.hex()).unwrap().id, image.id);
}

#[tokio::test]
async fn a_registry_that_lies_is_caught() {
    let setup = Setup::new(1);
    let image = setup.pull().await.unwrap();
    let layer = a_layer(&setup.store);
    let hex = layer.file_name().unwrap().to_str().unwrap().to_owned();
    let served = setup.registry.blob(&hex);
    let mut data = std::fs::read(&served).unwrap();
    data[100] ^= 1;
    std::fs::write(&served, &data).unwrap();
    let fresh = Store::open(setup.dir.path().join("fresh")).unwrap();
    let seen = Seen::default();
    let error = fresh
        .pull(&setup.name(), &PullOptions::default(), &seen)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Registry { .. } | Error::Mismatch { .. }),
        "{error}"
    );
    assert!(seen.count("Retry") >= 1);
    assert!(!fresh.root().join("blobs/sha256").join(&hex).exists());
    assert!(fresh.list().unwrap().is_empty());
    assert!(files(&fresh.root().join("rootfs")).is_empty());
    assert_eq!(setup.store.resolve(&image.id.hex()).unwrap().id, image.id);
}

#[tokio::test]
async fn what_is_not_there_or_too_large_says_so() {
    let setup = Setup::new(1);
    let nobody = "127.0.0.1:1/x:y".parse().unwrap();
    let error = setup
        .store
        .pull(&nobody, &PullOptions::default(), &NoProgress)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("from 127.0.0.1:1: "), "{error}");
    assert!(error.contains("refused"), "{error}");
    let nothing = setup.registry.name("nothing:1").parse().unwrap();
    let error = setup
        .store
        .pull(&nothing, &PullOptions::default(), &NoProgress)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NotInRegistry { .. }), "{error}");
    for max_image_size in [1000, 200_000] {
        let small = PullOptions {
            max_image_size,
            ..PullOptions::default()
        };
        let error = setup
            .store
            .pull(&setup.name(), &small, &NoProgress)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }
    let few = PullOptions {
        max_entries: 1,
        ..PullOptions::default()
    };
    let error = setup
        .store
        .pull(&setup.name(), &few, &NoProgress)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let mut arm = PullOptions::default();
    arm.platform.architecture = "arm64".to_owned();
    let error = setup
        .store
        .pull(&setup.name(), &arm, &NoProgress)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Platform { .. }), "{error}");
    assert!(files(&setup.path("rootfs")).is_empty());
}

#[tokio::test]
async fn docker_manifests_pull_as_well() {
    let setup = Setup::new(2);
    let oci = setup.dir.path().join("layout");
    setup
        .registry
        .push(&oci, "demo", "docker:2", &["--format=v2s2"]);
    let name = setup.registry.name("docker:2").parse().unwrap();
    let docker = setup
        .store
        .pull(&name, &PullOptions::default(), &NoProgress)
        .await
        .unwrap();
    let same = setup.pull().await.unwrap();
    assert_eq!(docker.rootfs, same.rootfs);
    assert_ne!(docker.digest, same.digest);
}

#[tokio::test]
async fn removing_frees_everything_but_what_is_leased() {
    let setup = Setup::new(2);
    let image = setup.pull().await.unwrap();
    let lease = image.lease().unwrap();
    std::fs::write(setup.path("tmp/left-behind"), b"x").unwrap();
    let removed = setup.store.remove(&setup.name().familiar()).unwrap();
    assert_eq!(removed.names, [setup.name().to_string()]);
    assert!(removed.freed > 0);
    assert!(files(&setup.path("blobs/sha256")).is_empty());
    assert!(files(&setup.path("tmp")).is_empty());
    assert!(lease.path().exists(), "a leased root was removed");
    assert!(matches!(
        setup.store.resolve(&image.id.hex()),
        Err(Error::NoSuchImage(_))
    ));
    drop(lease);
    let error = setup.store.remove("nothing").unwrap_err();
    assert!(matches!(error, Error::NoSuchImage(_)));
    // The next command that changes something sweeps it.
    let again = setup.pull().await.unwrap();
    setup.store.remove(&again.id.hex()).unwrap();
    assert!(files(&setup.path("rootfs")).is_empty());
    assert!(matches!(again.lease(), Err(Error::NoSuchImage(_))));
}

#[tokio::test]
async fn a_checkpoint_is_an_image_that_keeps_its_root() {
    let setup = Setup::new(1);
    let base = setup.pull().await.unwrap();
    let draft = |record: &str| {
        let dir = setup.dir.path().join("draft");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("checkpoint.json"), record).unwrap();
        std::fs::write(dir.join("memory"), vec![1; 10_000]).unwrap();
        dir
    };
    let name: Reference = "saved:1".parse().unwrap();
    let add = async |record, name: &Reference, rootfs: &Path| {
        let created = "2026-01-02T03:04:05Z".to_owned();
        let dir = draft(record);
        let added = setup.store.add_checkpoint(name, &dir, rootfs, created);
        added
            .await
            .inspect_err(|_| std::fs::remove_dir_all(&dir).unwrap())
    };
    let first = add("one", &name, &base.rootfs).await.unwrap();
    assert_eq!(first.created.as_deref(), Some("2026-01-02T03:04:05Z"));
    assert!(first.size >= 10_000 && first.rootfs == base.rootfs);
    assert!(!setup.dir.path().join("draft").exists());
    assert_eq!(setup.store.list().unwrap().len(), 2);

    // The base goes, its root stays; the checkpoint is found by name and ID.
    setup.store.remove(&base.id.hex()).unwrap();
    assert!(files(&setup.path("blobs/sha256")).is_empty());
    let found = setup.store.resolve("saved:1").unwrap();
    assert_eq!(found.checkpoint, first.checkpoint);
    let found = setup.store.resolve(&first.id.hex()[..12]).unwrap();
    drop(found.lease().unwrap());
    drop(setup.store.lease(&found.rootfs).unwrap());
    assert!(setup.store.lease(Path::new("/etc/passwd")).is_err());

    // Another takes its name, and nothing of the first is left.
    let second = add("two", &name, &base.rootfs).await.unwrap();
    assert!(!first.checkpoint.unwrap().exists());
    assert_eq!(setup.store.list().unwrap().len(), 1);
    let strange = setup.dir.path().join("x.erofs");
    std::fs::copy(&base.rootfs, &strange).unwrap();
    let said = add("three", &name, &strange).await.unwrap_err();
    assert!(said.to_string().contains("of this store"), "{said}");
    let by_digest = format!("saved@{}", second.id).parse().unwrap();
    let said = add("three", &by_digest, &base.rootfs).await.unwrap_err();
    assert!(said.to_string().contains("not by a digest"), "{said}");

    // One whose record was changed is not used, and can be removed.
    let record = second.checkpoint.as_ref().unwrap().join("checkpoint.json");
    std::fs::write(record, "changed").unwrap();
    let said = setup.store.resolve("saved:1").unwrap_err();
    assert!(said.to_string().contains("missing or changed"), "{said}");
    // A sweep waits for who adds; a removal does not.
    let adding = std::fs::File::open(setup.path("gc.lock")).unwrap();
    adding.lock_shared().unwrap();
    let kept = setup.dir.path().join("kept");
    std::fs::create_dir(&kept).unwrap();
    std::fs::write(kept.join("checkpoint.json"), "four").unwrap();
    let other: Reference = "saved:2".parse().unwrap();
    let created = "2026-01-02T03:04:05Z".to_owned();
    let added = setup
        .store
        .add_checkpoint(&other, &kept, &base.rootfs, created);
    let directory = added.await.unwrap().checkpoint.unwrap();
    setup.store.remove("saved:2").unwrap();
    assert!(!directory.exists());
    drop(adding);
    // What a killed command left has no name.
    std::fs::create_dir(setup.path("checkpoints/left")).unwrap();
    assert!(setup.store.remove("saved:1").unwrap().freed > 10_000);
    assert!(files(&setup.path("checkpoints")).is_empty());
    assert!(files(&setup.path("rootfs")).is_empty());
}

#[tokio::test]
async fn many_pull_at_once_and_agree() {
    let setup = Setup::new(4);
    let pulls = (0..6).map(|_| async {
        // Each its own handle, as other processes would have.
        let store = Store::open(setup.store.root()).unwrap();
        store
            .pull(&setup.name(), &PullOptions::default(), &NoProgress)
            .await
            .unwrap()
            .id
    });
    let ids = futures::future::join_all(pulls).await;
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(files(&setup.path("rootfs")).len(), 1);
    assert!(files(&setup.path("tmp")).is_empty());
}

#[tokio::test]
async fn an_index_leads_to_this_platforms_image() {
    let setup = Setup::new(1);
    let image = setup.pull().await.unwrap();
    let manifest = setup.path("blobs/sha256").join(image.digest.hex());
    let entry = |arch: &str| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":{},
            "platform":{{"os":"linux","architecture":"{arch}"}}}}"#,
            image.digest,
            manifest.metadata().unwrap().len()
        )
    };
    let kind = "application/vnd.oci.image.index.v1+json";
    let host = walnut_image::Platform::default().architecture;
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{kind}","manifests":[{},{}]}}"#,
        entry("s390x"),
        entry(&host)
    );
    let url = format!("http://{}", setup.registry.name("v2/demo/manifests/multi"));
    let answer = reqwest::Client::builder()
        .no_proxy()
        .build()
        .unwrap()
        .put(url)
        .header("content-type", kind)
        .body(index.clone())
        .send()
        .await
        .unwrap();
    assert!(answer.status().is_success(), "{answer:?}");
    let fresh = Store::open(setup.dir.path().join("fresh")).unwrap();
    let name = setup.registry.name("demo:multi").parse().unwrap();
    let pulled = fresh
        .pull(&name, &PullOptions::default(), &NoProgress)
        .await
        .unwrap();
    assert_eq!(pulled.id, image.id);
    assert_eq!(pulled.digest, walnut_image::Digest::of(index.as_bytes()));
    // Sweeping keeps the index's blob and everything it leads to.
    fresh.remove("nothing").unwrap_err();
    let before = files(&fresh.root().join("blobs/sha256"));
    fresh
        .pull(&name, &PullOptions::default(), &NoProgress)
        .await
        .unwrap();
    assert_eq!(files(&fresh.root().join("blobs/sha256")), before);
    assert_eq!(before.len(), 4);
    let mut odd = PullOptions::default();
    odd.platform.architecture = "riscv64".to_owned();
    let error = fresh.pull(&name, &odd, &NoProgress).await.unwrap_err();
    assert!(error.to_string().contains("s390x"), "{error}");
}
