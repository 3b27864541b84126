//! The image in the guest is the image in the registry, to the last attribute.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use walnut_tests::{host, run_with, until, walnut};

/// What `tests/image/README.md` promises, asked from inside.
const CHECK: &str = r#"
import os, stat, sys
bad = []
def want(name, got, expected):
    if got != expected:
        bad.append(f"{name}: {got!r}, not {expected!r}")
def st(path): return os.lstat("/srv/" + path)
def mode(path): return stat.S_IMODE(st(path).st_mode)
def text(path): return open("/srv/" + path).read().strip()
want("deleted", os.path.lexists("/srv/deleted"), False)
want("gone", os.path.lexists("/srv/gone"), False)
want("replaced", stat.S_ISDIR(st("replaced").st_mode), True)
want("replaced/file", text("replaced/file"), "above")
want("opaque", sorted(os.listdir("/srv/opaque")), ["above"])
links = [st("special/hard-1"), st("special/hard-2"), st("hard-3")]
want("hard links", {(l.st_ino, l.st_nlink) for l in links}, {(links[0].st_ino, 3)})
want("their text", text("hard-3"), "one file")
want("user.walnut", os.getxattr("/srv/special/xattr", "user.walnut"), b"thin shell")
want("user.binary", os.getxattr("/srv/special/xattr", "user.binary"), b"\x00\xff\x10")
want("user.directory", os.getxattr("/srv/special", "user.directory"), b"yes")
want("capability", len(os.getxattr("/srv/special/capable", "security.capability")) >= 20, True)
want("setuid", mode("special/setuid"), 0o4755)
want("setgid", (mode("special/setgid"), st("special/setgid").st_gid), (0o2755, 42))
want("sticky", mode("special/sticky"), 0o1777)
owned, wide = st("special/owned"), st("special/wide")
want("owned", (owned.st_uid, owned.st_gid, mode("special/owned")), (12345, 54321, 0o640))
want("wide", (wide.st_uid, wide.st_gid), (4000000, 4000001))
for name, kind, major, minor, bits in [("null", stat.S_ISCHR, 1, 3, 0o666), ("block", stat.S_ISBLK, 7, 200, 0o600)]:
    s = st("special/" + name)
    want(name, (kind(s.st_mode), os.major(s.st_rdev), os.minor(s.st_rdev), mode("special/" + name)), (True, major, minor, bits))
want("fifo", (stat.S_ISFIFO(st("special/fifo").st_mode), mode("special/fifo")), (True, 0o622))
for name, target in [("relative", "hard-1"), ("absolute", "/etc/hostname"), ("dangling", "nowhere"), ("directory", "/usr/share")]:
    want(name, os.readlink("/srv/special/" + name), target)
for name, size in [("empty", 0), ("block-4096", 4096), ("block-4097", 4097), ("sparse", 8 << 20)]:
    want(name, st("special/" + name).st_size, size)
want("block-4097 bytes", set(text("special/block-4097")), {"y"})
data = open("/srv/special/sparse", "rb").read()
want("sparse bytes", (data[-3:], data[:-3].count(0)), (b"end", (8 << 20) - 3))
want("many", sorted(os.listdir("/srv/special/many")), [f"entry-{n:04}" for n in range(1, 1001)])
want("time-zero", st("special/time-zero").st_mtime_ns, 0)
want("time-nano", st("special/time-nano").st_mtime_ns, 981173106123456789)
want("time-before", st("special/time-before").st_mtime_ns, -152391233 * 10**9)
want("time-after", st("special/time-after").st_mtime_ns, 4102542245 * 10**9)
print("\n".join(bad) or "as it should be")
"#;

#[test]
fn every_attribute_survives() {
    let done = run_with(&["-i", "IMAGE", "python3", "-"], CHECK.as_bytes(), |_| {}).exits(0);
    assert_eq!(done.text(), "as it should be");
}

#[test]
fn a_blob_that_was_changed_is_fetched_again() {
    // The store of this test alone.
    let root = tempfile::tempdir().unwrap();
    let pull = || {
        let mut command = walnut_tests::command(&["pull", &host().image]);
        command.env("WALNUT_ROOT", root.path());
        let out = command.output().unwrap();
        assert!(out.status.success(), "{out:#?}");
        String::from_utf8(out.stderr).unwrap()
    };
    assert!(pull().contains("fetched"));
    let blobs = root.path().join("images/blobs/sha256");
    let largest = std::fs::read_dir(blobs)
        .unwrap()
        .map(|e| e.unwrap().path())
        .max_by_key(|p| p.metadata().unwrap().len())
        .unwrap();
    let file = std::fs::File::options().write(true).open(&largest).unwrap();
    file.set_len(1000).unwrap();
    assert!(pull().contains("fetched"), "a torn blob is fetched again");
    assert!(largest.metadata().unwrap().len() > 1000);
}

#[test]
fn a_registry_that_is_not_there_is_named() {
    walnut(&["pull", "127.0.0.1:1/no/registry"]).fails(125, "127.0.0.1:1");
}

#[test]
fn a_tag_that_is_not_there_is_named() {
    let name = host().image.replace(":latest", ":nosuchtag");
    assert_ne!(name, host().image);
    walnut(&["pull", &name]).fails(125, "nosuchtag");
}

/// A docker-registry of a test's own, over a copy of the other's files.
struct Registry {
    child: Child,
    dir: tempfile::TempDir,
    address: String,
}

impl Registry {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = host().root.parent().unwrap().join("test-registry/storage");
        // Links to the blobs: a blob is replaced here, never written to.
        let copied = Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(cache)
            .arg(dir.path())
            .status();
        assert!(copied.unwrap().success());
        // Its number stays unused for a moment after it is given back.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let config = dir.path().join("config.yml");
        let storage = dir.path().join("storage");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
            storage.display()
        );
        fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry");
        until("the registry listens", || {
            TcpStream::connect(&address).is_ok()
        });
        Self {
            child,
            dir,
            address,
        }
    }

    /// The largest layer of the image that tests pull; the registry has others.
    fn largest_layer(&self) -> PathBuf {
        let all = self.dir.path().join("storage/docker/registry/v2");
        let blob = |digest: &str| {
            let digest = digest.trim().strip_prefix("sha256:").unwrap();
            let blobs = all.join("blobs/sha256").join(&digest[..2]);
            blobs.join(digest).join("data")
        };
        let latest = "repositories/walnut/demo/_manifests/tags/latest/current/link";
        let manifest = blob(&fs::read_to_string(all.join(latest)).unwrap());
        let manifest: Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
        let layers = manifest["layers"].as_array().unwrap().iter();
        let largest = layers.max_by_key(|layer| layer["size"].as_u64()).unwrap();
        blob(largest["digest"].as_str().unwrap())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every file below `dir`.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}

#[test]
fn a_registry_that_serves_other_bytes_is_refused() {
    let registry = Registry::start();
    let root = tempfile::tempdir().unwrap();
    let name = host().image.replacen(
        host().image.split('/').next().unwrap(),
        &registry.address,
        1,
    );
    let pull = || {
        let mut command = walnut_tests::command(&["pull", &name]);
        command.env("WALNUT_ROOT", root.path());
        let out = command.output().unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    let blob = registry.largest_layer();
    let good = fs::read(&blob).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    let put = |bytes: &[u8]| {
        fs::remove_file(&blob).unwrap();
        fs::write(&blob, bytes).unwrap();
    };
    put(&bad);
    let (code, said) = pull();
    assert_eq!(code, Some(125), "{said}");
    let digest = blob
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap();
    let sentence = said.lines().find(|l| l.starts_with("walnut: ")).unwrap();
    assert!(sentence.contains(&digest[..12]), "{said}");
    // Nothing of it may be believed later.
    let kept = [
        files(&root.path().join("images/blobs")),
        files(&root.path().join("images/rootfs")),
    ]
    .concat();
    assert!(
        !kept
            .iter()
            .any(|p| p.ends_with(digest) || p.extension().is_some_and(|e| e == "erofs")),
        "{kept:?}"
    );
    put(&good);
    let (code, said) = pull();
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_damaged_root_file_system_is_no_container() {
    let rootfs = files(&host().root.join("images/rootfs")).pop().unwrap();
    let name = rootfs.file_name().unwrap();
    for keep in [0, 512, 4096, 1 << 20] {
        // A store of its own, with links to all but the damaged file.
        let dir = tempfile::tempdir_in(host().root.parent().unwrap()).unwrap();
        let images = dir.path().join("images");
        let copied = Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(host().root.join("images"))
            .arg(&images)
            .status();
        assert!(copied.unwrap().success());
        let file = images.join("rootfs").join(name);
        fs::remove_file(&file).unwrap();
        let whole = fs::File::open(&rootfs).unwrap();
        let mut torn = fs::File::create(&file).unwrap();
        std::io::copy(&mut std::io::Read::take(whole, keep), &mut torn).unwrap();
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
        drop(torn);
        let run = tempfile::tempdir_in("/tmp").unwrap();
        let done = run_with(&["IMAGE", "true"], b"", |command| {
            command
                .env("WALNUT_ROOT", dir.path())
                .env("WALNUT_RUN", run.path())
                // None is to be made of it, in these directories.
                .env("WALNUT_TEMPLATES", "off");
        });
        // Refused, or made anew from the layers: never run as it is.
        let lines = done.stderr.lines().filter(|l| l.starts_with("walnut: "));
        assert!(
            (done.code == 125 && lines.count() == 1) || done.code == 0,
            "{keep} bytes: {done:#?}"
        );
        // The verdict on the host's KVM is kept there, beside the sandboxes.
        let left: Vec<_> = fs::read_dir(run.path())
            .unwrap()
            .flatten()
            .filter(|e| e.file_name() != "kvm-probe.json")
            .collect();
        assert!(left.is_empty(), "{left:?} after {keep} bytes: {done:#?}");
    }
}
