//! The archive is read back by a parser of its own, and by cpio(1) where there is one.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::{AddError, Archive, WriteError};

#[derive(Debug, PartialEq, Eq)]
struct Record {
    name: String,
    mode: u32,
    owner: (u32, u32),
    mtime: u32,
    device: (u32, u32),
    data: Vec<u8>,
}

/// Reads records as the kernel does: fixed header, name, padding, data, padding.
fn parse(bytes: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    let mut at = 0;
    loop {
        assert_eq!(at % 4, 0, "a record begins on a multiple of four");
        assert_eq!(&bytes[at..at + 6], b"070701");
        let field = |index: usize| {
            let start = at + 6 + index * 8;
            let text = std::str::from_utf8(&bytes[start..start + 8]).unwrap();
            u32::from_str_radix(text, 16).unwrap()
        };
        let (size, name_size) = (field(6) as usize, field(11) as usize);
        let name_start = at + 110;
        let name_end = name_start + name_size;
        assert_eq!(bytes[name_end - 1], 0);
        let name = String::from_utf8(bytes[name_start..name_end - 1].to_vec()).unwrap();
        let data_start = name_end.next_multiple_of(4);
        let data = bytes[data_start..data_start + size].to_vec();
        let record = Record {
            name,
            mode: field(1),
            owner: (field(2), field(3)),
            mtime: field(5),
            device: (field(9), field(10)),
            data,
        };
        at = (data_start + size).next_multiple_of(4);
        if record.name == "TRAILER!!!" {
            assert_eq!(at, bytes.len(), "nothing follows the trailer");
            return records;
        }
        records.push(record);
    }
}

fn written(archive: Archive) -> Vec<u8> {
    let mut bytes = Vec::new();
    archive.write_to(&mut bytes).unwrap();
    bytes
}

fn names(records: &[Record]) -> Vec<&str> {
    records.iter().map(|record| record.name.as_str()).collect()
}

#[test]
fn init_nodes_are_what_an_init_needs() {
    let mut archive = Archive::with_init_nodes().unwrap();
    archive.bytes("/init", b"#!agent".to_vec(), 0o755).unwrap();
    let records = parse(&written(archive));
    assert_eq!(
        names(&records),
        ["dev", "dev/console", "init", "proc", "run", "sys", "tmp"]
    );
    let console = &records[1];
    assert_eq!(console.mode, 0o020_600);
    assert_eq!(console.device, (5, 1));
    assert_eq!(records[2].data, b"#!agent");
    assert_eq!(records[6].mode, 0o041_777);
    for record in &records {
        assert_eq!((record.owner, record.mtime), ((0, 0), 0), "{}", record.name);
    }
}

#[test]
fn order_of_adding_does_not_matter() {
    let build = |paths: &[&str]| {
        let mut archive = Archive::new();
        for path in paths {
            archive
                .bytes(path, path.as_bytes().to_vec(), 0o644)
                .unwrap();
        }
        written(archive)
    };
    let one = build(&["/a/b/c", "/a-b", "/a/b.c", "/z"]);
    let other = build(&["/z", "/a/b.c", "/a-b", "/a/b/c"]);
    assert_eq!(one, other);
    assert_eq!(
        names(&parse(&one)),
        ["a", "a/b", "a/b/c", "a/b.c", "a-b", "z"]
    );
}

#[test]
fn sizes_around_the_padding_come_back() {
    let mut archive = Archive::new();
    for size in 0..9_u8 {
        let name = format!("/{}", "n".repeat(usize::from(size) + 1));
        archive
            .bytes(&name, vec![size; size.into()], 0o600)
            .unwrap();
    }
    for (size, record) in parse(&written(archive)).iter().enumerate() {
        assert_eq!(record.data.len(), size);
        assert!(record.data.iter().all(|byte| usize::from(*byte) == size));
    }
}

#[test]
fn a_directory_keeps_the_mode_it_was_given() {
    let mut archive = Archive::new();
    archive.bytes("/etc/secret/key", vec![1], 0o400).unwrap();
    archive.directory("/etc/secret", 0o700).unwrap();
    let records = parse(&written(archive));
    assert_eq!(records[0].mode, 0o040_755);
    assert_eq!(records[1].mode, 0o040_700);
}

#[test]
fn paths_that_would_unpack_elsewhere_are_refused() {
    let mut archive = Archive::new();
    let long = format!("/{}", "x".repeat(256));
    let deep = "/x".repeat(2100);
    let bad = [
        "init",
        "",
        "/",
        "//a",
        "/a/",
        "/a/../b",
        "/./a",
        "/a\0b",
        "/TRAILER!!!",
        &long,
        &deep,
    ];
    for path in bad {
        let error = archive.bytes(path, Vec::new(), 0o644).unwrap_err();
        assert!(matches!(error, AddError::Path { .. }), "{path}: {error}");
    }
    assert!(archive.symlink("/link", "").is_err());
    assert!(matches!(
        archive.bytes("/a", Vec::new(), 0o10_000).unwrap_err(),
        AddError::Mode { .. }
    ));
}

#[test]
fn nothing_is_replaced_or_put_below_a_file() {
    let mut archive = Archive::new();
    archive.bytes("/a", Vec::new(), 0o644).unwrap();
    assert!(matches!(
        archive.symlink("/a", "b").unwrap_err(),
        AddError::Exists { .. }
    ));
    assert!(matches!(
        archive.directory("/a", 0o755).unwrap_err(),
        AddError::Exists { .. }
    ));
    assert!(matches!(
        archive.bytes("/a/b", Vec::new(), 0o644).unwrap_err(),
        AddError::NotADirectory { .. }
    ));
}

#[test]
fn host_files_must_be_regular_and_below_4_gib() {
    let directory = tempfile::tempdir().unwrap();
    let mut archive = Archive::new();
    let error = archive.file("/d", directory.path(), 0o644).unwrap_err();
    assert!(matches!(error, AddError::NotAFile { .. }), "{error}");
    let error = archive.file("/n", Path::new("/absent"), 0o644).unwrap_err();
    assert!(matches!(error, AddError::Open { .. }), "{error}");

    let sparse = directory.path().join("sparse");
    std::fs::File::create(&sparse)
        .unwrap()
        .set_len(1 << 32)
        .unwrap();
    let error = archive.file("/s", &sparse, 0o644).unwrap_err();
    assert!(error.to_string().contains("4294967296 bytes"), "{error}");
}

#[test]
fn a_file_that_changes_size_is_noticed() {
    for (first, then) in [("four", "fo"), ("four", "fourteen")] {
        let directory = tempfile::tempdir().unwrap();
        let host = directory.path().join("file");
        std::fs::write(&host, first).unwrap();
        let mut archive = Archive::new();
        archive.file("/file", &host, 0o644).unwrap();
        std::fs::write(&host, then).unwrap();
        let error = archive.write_to(&mut Vec::new()).unwrap_err();
        assert!(
            matches!(error, WriteError::Changed { expected: 4, .. }),
            "{error}"
        );
    }
}

#[test]
fn cpio_unpacks_it() {
    if Command::new("cpio").arg("--version").output().is_err() {
        eprintln!("skipped: there is no cpio on this host");
        return;
    }
    let mut archive = Archive::new();
    archive
        .bytes("/etc/deep/er/file", b"content".to_vec(), 0o640)
        .unwrap();
    archive.symlink("/etc/link", "deep/er/file").unwrap();
    archive.directory("/empty", 0o711).unwrap();
    let bytes = written(archive);

    let cpio = |arguments: &[&str], directory: &Path| {
        let mut child = Command::new("cpio")
            .args(arguments)
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(
        cpio(&["--list"], directory.path()),
        "empty\netc\netc/deep\netc/deep/er\netc/deep/er/file\netc/link\n"
    );
    cpio(
        &["--extract", "--make-directories", "--no-preserve-owner"],
        directory.path(),
    );
    let file = directory.path().join("etc/link");
    assert_eq!(std::fs::read(&file).unwrap(), b"content");
    assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o7777, 0o640);
}
