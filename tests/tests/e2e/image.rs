//! The image in the guest is the image in the registry, to the last attribute.

use walnut_tests::{host, run_with, walnut};

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
