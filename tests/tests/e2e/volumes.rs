//! Directories and files of the host.

use std::{fs, os::unix::fs::MetadataExt};

use walnut_tests::run;

#[test]
fn a_writable_volume_is_shared_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("from-host"), "hello").unwrap();
    let volume = format!("{}:/data", dir.path().display());
    let script = "cat /data/from-host; echo guest > /data/from-guest; chown 33:44 /data/from-guest; \
                  mkdir -p /data/a/b; ln -s /etc/shadow /data/link";
    let done = run(&["-v", &volume, "IMAGE", "sh", "-c", script]).exits(0);
    assert_eq!(done.text(), "hello");
    let file = dir.path().join("from-guest");
    assert_eq!(fs::read_to_string(&file).unwrap(), "guest\n");
    let meta = fs::metadata(&file).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (33, 44));
    assert!(dir.path().join("a/b").is_dir());
}

#[test]
fn a_read_only_volume_refuses_writes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("kept"), "as it was").unwrap();
    let volume = format!("{}:/data:ro", dir.path().display());
    let script = "cat /data/kept; for f in kept new; do echo x > /data/$f && echo WROTE; done 2>&1; \
                  rm -f /data/kept 2>&1 && echo REMOVED; mount -o remount,rw /data 2>&1 && echo REMOUNTED; true";
    let done = run(&["-v", &volume, "IMAGE", "sh", "-c", script]).exits(0);
    let text = done.text();
    assert!(
        text.starts_with("as it was") && text.contains("Read-only file system"),
        "{text}"
    );
    for bad in ["WROTE", "REMOVED", "REMOUNTED"] {
        assert!(!text.contains(bad), "{text}");
    }
    assert_eq!(
        fs::read_to_string(dir.path().join("kept")).unwrap(),
        "as it was"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn single_files_and_several_volumes() {
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("one");
    fs::write(&one, "1").unwrap();
    let two = dir.path().join("two");
    fs::create_dir(&two).unwrap();
    let (a, b) = (
        format!("{}:/etc/one.conf:ro", one.display()),
        format!("{}:/two", two.display()),
    );
    let script = "cat /etc/one.conf; echo x > /two/x; ls /etc/passwd";
    let done = run(&["-v", &a, "-v", &b, "IMAGE", "sh", "-c", script]).exits(0);
    assert_eq!(done.text(), "1/etc/passwd");
    assert_eq!(fs::read_to_string(two.join("x")).unwrap(), "x\n");
}

#[test]
fn links_do_not_lead_out_of_a_volume() {
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("inside");
    fs::create_dir(&inside).unwrap();
    fs::write(dir.path().join("secret"), "host only").unwrap();
    std::os::unix::fs::symlink("../secret", inside.join("relative")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("secret"), inside.join("absolute")).unwrap();
    let volume = format!("{}:/data", inside.display());
    let script = "cat /data/relative /data/absolute /data/../secret 2>/dev/null; true";
    let done = run(&["-v", &volume, "IMAGE", "sh", "-c", script]).exits(0);
    assert_eq!(done.text(), "");
}

#[test]
fn a_missing_source_is_named() {
    run(&["-v", "/no/such/dir:/data", "IMAGE", "true"]).fails(125, "/no/such/dir");
}
