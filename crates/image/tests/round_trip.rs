//! A layered image pulled, converted, mounted, and compared in every respect
//! with what umoci unpacks. Needs root, for owners, devices and mounting.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod common;

use std::{
    collections::BTreeMap,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use common::{Registry, layout, run};
use walnut_image::{NoProgress, PullOptions, Store};

/// A file system mounted for the test.
struct Mount(PathBuf);

impl Mount {
    fn erofs(file: &Path, at: PathBuf) -> Self {
        std::fs::create_dir(&at).unwrap();
        // Linux 6.12 and later mount the file itself; others need a loop device.
        let (file, at_text) = (file.to_str().unwrap(), at.to_str().unwrap());
        let direct = std::process::Command::new("mount")
            .args(["-i", "-t", "erofs", "-o", "ro", file, at_text])
            .output()
            .unwrap();
        if !direct.status.success() {
            run(
                Path::new("/"),
                "mount",
                &["-t", "erofs", "-o", "ro,loop", file, at_text],
            );
        }
        Self(at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

/// Everything about a file, and the other names of its inode.
fn describe(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut paths = vec![root.to_owned()];
    let mut at = 0;
    while at < paths.len() {
        if paths[at].symlink_metadata().unwrap().is_dir() {
            let found = std::fs::read_dir(&paths[at]).unwrap();
            paths.extend(found.map(|entry| entry.unwrap().path()));
        }
        at += 1;
    }
    let mut links: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    for path in &paths {
        let ino = path.symlink_metadata().unwrap().ino();
        let name = path.strip_prefix(root).unwrap().to_owned();
        links.entry(ino).or_default().push(name);
    }
    let mut out = BTreeMap::new();
    for path in paths {
        let meta = path.symlink_metadata().unwrap();
        let kind = meta.file_type();
        let mut xattrs: Vec<_> = xattr::list(&path)
            .unwrap()
            .map(|name| (name.clone(), xattr::get(&path, &name).unwrap()))
            .collect();
        xattrs.sort();
        let content = if kind.is_file() {
            let data = std::fs::read(&path).unwrap();
            format!(
                "{} {:x?}",
                data.len(),
                <sha2::Sha256 as sha2::Digest>::digest(&data)
            )
        } else if kind.is_symlink() {
            format!("-> {:?}", std::fs::read_link(&path).unwrap())
        } else if kind.is_char_device() || kind.is_block_device() {
            format!("dev {:x}", meta.rdev())
        } else {
            String::new()
        };
        let mut group = links[&meta.ino()].clone();
        group.sort();
        // Directories' link counts: 2 and one per subdirectory.
        let text = format!(
            "{:o} {}:{} {}.{:09} links {} {group:?} {xattrs:?} {content}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.nlink(),
        );
        out.insert(path.strip_prefix(root).unwrap().to_owned(), text);
    }
    out
}

fn assert_root() {
    assert!(
        std::fs::metadata("/proc/self").unwrap().uid() == 0,
        "this test mounts and makes devices: run it as root"
    );
}

#[tokio::test]
async fn converted_image_equals_the_unpacked_one() {
    assert_root();
    let dir = tempfile::tempdir().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/layers.sh");
    run(dir.path(), "sh", &[script]);
    let tars = |names: [&str; 3]| names.map(|name| dir.path().join(name));
    let oci = layout(dir.path(), "all", &tars(["1.tar", "2.tar", "3.tar"]));
    let plain = tars(["1.tar", "plain2.tar", "plain3.tar"]);
    layout(dir.path(), "plain", &plain);
    let registry = Registry::start();
    registry.push(&oci, "all", "walnut/all:v1", &[]);

    let store = Store::open(dir.path().join("store")).unwrap();
    let reference = registry.name("walnut/all:v1").parse().unwrap();
    let image = store
        .pull(&reference, &PullOptions::default(), &NoProgress)
        .await
        .unwrap();

    run(dir.path(), "fsck.erofs", &[image.rootfs.to_str().unwrap()]);
    let source = format!("{}:plain", oci.display());
    run(
        dir.path(),
        "umoci",
        &["raw", "unpack", "--image", &source, "reference"],
    );
    let mount = Mount::erofs(&image.rootfs, dir.path().join("mnt"));
    let ours = describe(&mount.0);
    let mut theirs = describe(&dir.path().join("reference"));
    // umoci leaves a directory's time as unpacking set it, if the layer that
    // last wrote into it does not describe it; ours keeps what was described.
    for through_link in ["usr/bin", "etc"] {
        let path = Path::new(through_link);
        let (Some(a), Some(b)) = (ours.get(path), theirs.get_mut(path)) else {
            panic!("{through_link} is missing");
        };
        let time = |text: &str| text.split(' ').nth(2).unwrap().to_owned();
        *b = b.replacen(&time(b), &time(a), 1);
    }
    for (path, text) in &theirs {
        assert_eq!(ours.get(path), Some(text), "{}", path.display());
    }
    assert_eq!(ours.len(), theirs.len());
    assert!(ours.contains_key(Path::new("usr/bin/tool")));
    assert!(!ours.contains_key(Path::new("etc/secret")));
}

#[tokio::test]
async fn removed_data_does_not_reach_the_guest_and_output_is_deterministic() {
    let dir = tempfile::tempdir().unwrap();
    let secret: Vec<u8> = b"walnut-secret-".repeat(4096);
    let (a, b) = (dir.path().join("a.tar"), dir.path().join("b.tar"));
    common::tar(&a, &[("etc/key", &secret), ("etc/kept", &secret[..9000])]);
    common::tar(&b, &[("etc/.wh.key", b""), ("etc/kept", b"other")]);
    let oci = layout(dir.path(), "s", &[a, b]);
    let registry = Registry::start();
    registry.push(&oci, "s", "s:1", &[]);
    let reference = registry.name("s:1").parse().unwrap();
    let mut images = Vec::new();
    for name in ["one", "two"] {
        let store = Store::open(dir.path().join(name)).unwrap();
        let image = store
            .pull(&reference, &PullOptions::default(), &NoProgress)
            .await
            .unwrap();
        run(dir.path(), "fsck.erofs", &[image.rootfs.to_str().unwrap()]);
        images.push(std::fs::read(&image.rootfs).unwrap());
    }
    assert!(images[0] == images[1], "two conversions differ");
    assert_eq!(images[0].len() % 4096, 0);
    let hidden = images[0].windows(14).any(|w| w == b"walnut-secret-");
    assert!(!hidden, "a removed file's data is in the image");
}
