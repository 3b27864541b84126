use walnut_archive::{Ownership, Packer};

use super::*;
use crate::{NoProgress, Store};

fn layer(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut packer = Packer::new(&mut out, Ownership::Of(0, 0));
    packer.bytes("file", text.as_bytes()).unwrap();
    packer.end().unwrap();
    out
}

/// As `docker save` of old has written it.
fn docker_archive(tags: &str, change: impl FnOnce(&mut Vec<(String, Vec<u8>)>)) -> Vec<u8> {
    let layer = layer("hello");
    let diff = Digest::of(&layer);
    let arch = crate::Platform::default().architecture;
    let config = format!(
        r#"{{"architecture":"{arch}","os":"linux","config":{{"Cmd":["true"],
        "Healthcheck":{{"Test":["CMD","true"],"Interval":5000000000}}}},
        "rootfs":{{"type":"layers","diff_ids":["{diff}"]}}}}"#
    );
    let manifest =
        format!(r#"[{{"Config":"c.json","RepoTags":{tags},"Layers":["abc/layer.tar"]}}]"#);
    let mut files = vec![
        ("abc/layer.tar".to_owned(), layer),
        ("c.json".to_owned(), config.into_bytes()),
        ("manifest.json".to_owned(), manifest.into_bytes()),
    ];
    change(&mut files);
    let mut out = Vec::new();
    let mut packer = Packer::new(&mut out, Ownership::Of(0, 0));
    for (name, bytes) in &files {
        packer.bytes(name, bytes).unwrap();
    }
    packer.end().unwrap();
    out
}

fn load(store: &Store, bytes: Vec<u8>, name: Option<&str>) -> Result<Vec<Image>, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let name = name.map(|name| name.parse().unwrap());
    let from = Box::new(std::io::Cursor::new(bytes));
    let options = PullOptions::default();
    runtime.block_on(store.load(from, name.as_ref(), &options, &NoProgress))
}

#[test]
fn archives_of_docker_and_our_own_are_taken_in() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("a")).unwrap();
    let bytes = docker_archive(r#"["app:1","app:2"]"#, |_| {});
    let images = load(&store, bytes, None).unwrap();
    assert_eq!(images.len(), 1);
    let names: Vec<_> = images[0].names.iter().map(Reference::familiar).collect();
    assert_eq!(names, ["app:1", "app:2"]);
    let health = images[0].health.clone().unwrap();
    assert_eq!((health.interval, health.test.len()), (5_000_000_000, 2));
    // Out again, and into another store, compressed this time.
    let mut saved = Vec::new();
    store.save(&["app:2".to_owned()], &mut saved).unwrap();
    let other = Store::open(dir.path().join("b")).unwrap();
    let squeezed = zstd::encode_all(&saved[..], 1).unwrap();
    let again = load(&other, squeezed, None).unwrap();
    assert_eq!(again[0].id, images[0].id);
    assert_eq!(again[0].names[0].familiar(), "app:2");
    assert_eq!(again[0].names.len(), 1);
    // By its ID it has all its names.
    let mut saved = Vec::new();
    store.save(&[images[0].id.to_string()], &mut saved).unwrap();
    assert_eq!(load(&other, saved, None).unwrap()[0].names.len(), 2);
}

#[test]
fn an_image_without_a_name_is_given_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let said = load(&store, docker_archive("null", |_| {}), None).unwrap_err();
    assert!(said.to_string().contains("--name"), "{said}");
    let images = load(&store, docker_archive("null", |_| {}), Some("mine")).unwrap();
    assert_eq!(images[0].names[0].familiar(), "mine:latest");
}

#[test]
fn links_between_layers_are_followed() {
    let entry = |kind, link: &str| Entry {
        path: Vec::new(),
        kind,
        link: link.as_bytes().to_vec(),
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        xattrs: None,
        size: 0,
        device: (0, 0),
        sparse: None,
    };
    let link = entry(EntryKind::Symlink, "../abc/layer.tar");
    assert_eq!(resolved("def/layer.tar", &link), "abc/layer.tar");
    let up = entry(EntryKind::Symlink, "../../../../etc/passwd");
    assert_eq!(resolved("def/layer.tar", &up), "etc/passwd");
    let hard = entry(EntryKind::HardLink, "./abc/layer.tar");
    assert_eq!(resolved("def/layer.tar", &hard), "abc/layer.tar");
}

#[test]
fn hostile_archives_are_refused_and_leave_a_whole_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let with = |change: fn(&mut Vec<(String, Vec<u8>)>)| docker_archive(r#"["app:1"]"#, change);
    for (bytes, why) in [
        (
            with(|files| drop(files.remove(0))),
            "it lacks \"abc/layer.tar\"",
        ),
        (with(|files| drop(files.remove(1))), "it lacks \"c.json\""),
        (with(|files| files[0].1 = layer("other")), "damaged"),
        (with(|files| files[2].1 = b"[{}]".to_vec()), "manifest.json"),
        (
            with(|files| files[2].1 = b"[]".to_vec()),
            "neither an index.json",
        ),
        (
            with(|files| {
                let index = r#"{"manifests":[{"digest":"sha256:00"}]}"#;
                files.push(("index.json".into(), index.into()));
            }),
            "index.json",
        ),
        (
            with(|files| {
                let digest = "0".repeat(64);
                let index = format!(
                    r#"{{"manifests":[{{"digest":"sha256:{digest}","annotations":{{"io.containerd.image.name":"docker.io/library/a:1"}}}}]}}"#
                );
                files.push(("index.json".into(), index.into()));
            }),
            "it lacks the manifest",
        ),
        (
            with(|files| files.push((format!("blobs/sha256/{}", "0".repeat(64)), b"x".to_vec()))),
            "under that name",
        ),
        (
            b"no archive at all, but long enough to look like a block of one".repeat(20),
            "read",
        ),
        (Vec::new(), "neither"),
    ] {
        let said = load(&store, bytes, None).unwrap_err().to_string();
        assert!(said.contains(why), "{why}: {said}");
        assert!(store.list().unwrap().is_empty());
    }
    assert!(load(&store, with(|_| {}), None).is_ok());
    store.remove("app:1").unwrap();
    let blobs = std::fs::read_dir(dir.path().join("blobs/sha256")).unwrap();
    assert_eq!(blobs.count(), 0, "what no name leads to is swept");
}
