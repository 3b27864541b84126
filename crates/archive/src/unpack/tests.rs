use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use super::*;

/// An archive of entries: kind, name, link or content, mode.
fn archive(entries: &[(u8, &str, &str, u32)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, text, mode) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(*kind));
        header.set_mode(*mode);
        header.set_uid(12345);
        header.set_gid(54321);
        header.set_mtime(1_000_000_000);
        // As no honest program would write them.
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        let data = match kind {
            b'1' | b'2' => {
                let field = &mut header.as_old_mut().linkname;
                field[..text.len()].copy_from_slice(text.as_bytes());
                ""
            }
            _ => *text,
        };
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn rules() -> Rules {
    Rules {
        within: None,
        ownership: None,
        trusted: false,
        follow: false,
    }
}

fn into(dir: &std::path::Path, bytes: &[u8], rules: &Rules) -> Result<Unpacked, UnpackError> {
    let dir = File::open(dir).unwrap();
    unpack(bytes, dir.as_fd(), rules)
}

#[test]
fn trees_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = archive(&[
        (b'5', "a/", "", 0o500),
        (b'0', "a/file", "hello", 0o4755),
        (b'2', "a/link", "/etc/passwd", 0o777),
        (b'1', "a/hard", "a/file", 0o644),
        (b'0', "b/c/d", "made on the way", 0o600),
    ]);
    let done = into(dir.path(), &bytes, &rules()).unwrap();
    assert_eq!((done.entries, done.bytes), (5, 20));
    let at = |name: &str| dir.path().join(name);
    assert_eq!(fs::read_to_string(at("a/hard")).unwrap(), "hello");
    assert_eq!(
        fs::read_link(at("a/link")).unwrap().to_str(),
        Some("/etc/passwd")
    );
    let mode = |name: &str| fs::metadata(at(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(
        (mode("a"), mode("a/file")),
        (0o500, 0o755),
        "no set-user-ID"
    );
    let time = fs::metadata(at("a")).unwrap().modified().unwrap();
    assert_eq!(
        time.duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs(),
        1_000_000_000
    );
    // Again, over what is there.
    fs::set_permissions(at("a"), PermissionsExt::from_mode(0o700)).unwrap();
    into(dir.path(), &bytes, &rules()).unwrap();
}

#[test]
fn nothing_leaves_the_directory() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let out = outside.path().to_str().unwrap();
    let link = format!("{out}/secret");
    let through = format!("{out}/new");
    for entries in [
        vec![(b'0', "../up", "x", 0o644)],
        vec![(b'0', "a/../../up", "x", 0o644)],
        vec![(b'2', "l", out, 0o777), (b'0', "l/new", "x", 0o644)],
        vec![
            (b'2', "l", out, 0o777),
            (b'5', "l/", "", 0o755),
            (b'0', "l/new", "x", 0o644),
        ],
        vec![(b'2', "l", "..", 0o777), (b'0', "l/up", "x", 0o644)],
        vec![(b'1', "h", "../secret", 0o644)],
        vec![(b'2', "l", out, 0o777), (b'1', "h", "l/secret", 0o644)],
        vec![(b'0', "f", "x", 0o644), (b'0', "f/g", "x", 0o644)],
    ] {
        let dir = tempfile::tempdir_in(outside.path()).unwrap();
        let said = into(dir.path(), &archive(&entries), &rules());
        assert!(
            matches!(said, Err(UnpackError::Refused { .. })),
            "{entries:?}: {said:?}"
        );
    }
    // A link that is there, and is written over, and not through.
    let dir = tempfile::tempdir().unwrap();
    symlink(&link, dir.path().join("f")).unwrap();
    into(
        dir.path(),
        &archive(&[(b'0', "f", "mine", 0o644)]),
        &rules(),
    )
    .unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("f")).unwrap(), "mine");
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
    // An absolute name begins where all do.
    into(
        dir.path(),
        &archive(&[(b'0', &through, "x", 0o644)]),
        &rules(),
    )
    .unwrap();
    let mut left: Vec<_> = fs::read_dir(&outside)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["secret"]);
}

#[test]
fn names_are_those_that_were_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let rules = Rules {
        within: Some("top".into()),
        ..rules()
    };
    into(
        dir.path(),
        &archive(&[(b'0', "./top/a", "x", 0o644)]),
        &rules,
    )
    .unwrap();
    for name in ["other", "topper", "other/top"] {
        let said = into(dir.path(), &archive(&[(b'0', name, "x", 0o644)]), &rules);
        assert!(
            said.unwrap_err().to_string().contains("begin with"),
            "{name}"
        );
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn what_is_there_keeps_its_kind() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    for entry in [(b'0', "d", "x", 0o644), (b'5', "f/", "", 0o755)] {
        let said = into(dir.path(), &archive(&[entry]), &rules());
        assert!(matches!(said, Err(UnpackError::Refused { .. })), "{said:?}");
    }
}

#[test]
fn devices_are_the_trusteds() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = archive(&[(b'3', "null", "", 0o666), (b'6', "fifo", "", 0o644)]);
    let done = into(dir.path(), &bytes, &rules()).unwrap();
    assert_eq!(done.left_out, 1);
    assert!(!dir.path().join("null").exists() && dir.path().join("fifo").exists());
}

#[test]
fn links_may_be_followed_where_they_lead_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("usr")).unwrap();
    symlink("usr", dir.path().join("lib")).unwrap();
    let bytes = archive(&[(b'5', "lib/", "", 0o755), (b'0', "lib/x", "y", 0o644)]);
    assert!(into(dir.path(), &bytes, &rules()).is_err());
    let rules = Rules {
        follow: true,
        ..rules()
    };
    into(dir.path(), &bytes, &rules).unwrap();
    assert!(dir.path().join("usr/x").exists());
    assert!(dir.path().join("lib").is_symlink());
}

#[test]
fn what_is_cut_short_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = archive(&[(b'0', "f", "some text", 0o644)]);
    for len in [100, 512, 515] {
        let said = into(dir.path(), &bytes[..len], &rules());
        assert!(
            matches!(said, Err(UnpackError::Archive(_))),
            "{len}: {said:?}"
        );
    }
}
