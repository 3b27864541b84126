//! Layers applied to trees, against a plain model and against hostile input.

use std::{collections::BTreeMap, io::Write as _};

use proptest::prelude::*;
use walnut_archive::{EntryKind, TarReader};

use super::{
    apply::{ApplyError, EntryBudget, apply_layer},
    decode::with_layer,
    tree::{Kind, LayerIndex, NodeId, ROOT, Tree},
};
use crate::{Digest, erofs::data::DataWriter};

/// An entry: type flag, path, link target, size of data.
type Item<'a> = (u8, &'a str, &'a str, usize);

fn tar_of(items: &[Item<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (flag, path, link, size) in items {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(*flag));
        header.set_size(*size as u64);
        header.set_mode(0o644);
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, &vec![b'x'; *size][..]).unwrap();
    }
    builder.into_inner().unwrap()
}

fn writer(limit: u64) -> DataWriter {
    let out = tempfile::tempfile().unwrap();
    DataWriter::new(out, "image".as_ref(), tempfile::tempfile().unwrap(), limit)
}

fn apply(tree: &mut Tree, layer: LayerIndex, tar: &[u8]) -> Result<(), ApplyError> {
    let mut entries = EntryBudget {
        used: 0,
        limit: 10_000,
    };
    let mut reader = TarReader::new(tar);
    apply_layer(
        tree,
        &mut reader,
        layer,
        &mut writer(1 << 20),
        &mut entries,
        || {},
    )
}

fn merged(layers: &[&[Item<'_>]]) -> Tree {
    let mut tree = Tree::new();
    for (at, items) in (0..).zip(layers) {
        apply(&mut tree, at, &tar_of(items)).unwrap();
    }
    tree
}

/// Every path; files with their size, links with their target.
fn listing(tree: &Tree) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut stack: Vec<(NodeId, String)> = vec![(ROOT, String::new())];
    while let Some((id, path)) = stack.pop() {
        for (name, child) in &tree.dir(id).unwrap().children {
            let path = format!("{path}/{}", String::from_utf8_lossy(name));
            let text = match &tree.node(child.node).kind {
                Kind::Dir(_) => {
                    stack.push((child.node, path.clone()));
                    "dir".to_owned()
                }
                Kind::File(data) => data.size.to_string(),
                Kind::Symlink(target) => String::from_utf8_lossy(target).into_owned(),
                _ => "other".to_owned(),
            };
            out.insert(path, text);
        }
    }
    out
}

fn paths(tree: &Tree) -> Vec<String> {
    listing(tree).into_keys().collect()
}

#[test]
fn whiteouts_remove_only_what_lower_layers_brought() {
    let base: &[Item<'_>] = &[
        (b'0', "d/a", "", 1),
        (b'0', "d/b", "", 1),
        (b'0', "e", "", 1),
    ];
    let plain = merged(&[base, &[(b'0', "d/.wh.a", "", 0), (b'0', ".wh.e", "", 0)]]);
    assert_eq!(paths(&plain), ["/d", "/d/b"]);
    // Wherever the whiteout stands in its layer.
    let new: Item<'_> = (b'0', "d/new", "", 2);
    for marker in ["d/.wh..wh..opq", ".wh.d"] {
        for upper in [[(b'0', marker, "", 0), new], [new, (b'0', marker, "", 0)]] {
            assert_eq!(paths(&merged(&[base, &upper])), ["/d", "/d/new", "/e"]);
        }
    }
    // In the base, and of what is not there: nothing happens.
    let none = merged(&[
        &[(b'0', "a", "", 1), (b'0', ".wh.a", "", 0)],
        &[(b'0', "x/.wh.y", "", 0)],
    ]);
    assert_eq!(paths(&none), ["/a"]);
    // Not names of entries.
    let odd = merged(&[
        base,
        &[
            (b'0', "d/.wh...", "", 0),
            (b'0', "d/.wh..", "", 0),
            (b'0', ".wh..wh.plnk", "", 0),
        ],
    ]);
    assert_eq!(paths(&odd).len(), 4);
}

/// A root of nothing, and not whatever else could be found to mount.
#[test]
fn an_image_without_layers_is_an_empty_tree() {
    assert!(paths(&merged(&[])).is_empty());
    assert!(paths(&merged(&[&[], &[]])).is_empty());
}

#[test]
fn links_in_paths_stay_within_the_root() {
    let tree = merged(&[
        &[
            (b'2', "bin", "usr/bin", 0),
            (b'5', "usr/bin/", "", 0),
            (b'2', "up", "../../../../etc", 0),
            (b'2', "abs", "/usr", 0),
            (b'2', "dangling", "made/here", 0),
        ],
        &[
            (b'0', "bin/tool", "", 3),
            (b'0', "up/passwd", "", 4),
            (b'0', "abs/../abs/x", "", 5),
            (b'0', "../../../y", "", 6),
            (b'0', "/z", "", 7),
            (b'0', "dangling/f", "", 8),
        ],
    ]);
    let found = listing(&tree);
    for (path, size) in [
        ("/usr/bin/tool", "3"),
        ("/etc/passwd", "4"),
        ("/usr/x", "5"),
        ("/y", "6"),
        ("/z", "7"),
        ("/made/here/f", "8"),
    ] {
        assert_eq!(found.get(path).map(String::as_str), Some(size), "{path}");
    }
    assert_eq!(found["/bin"], "usr/bin");
}

#[test]
fn what_replaces_what() {
    let tree = merged(&[
        &[
            (b'0', "d/f", "", 1),
            (b'0', "f", "", 1),
            (b'0', "g", "", 1),
            (b'5', "keep/", "", 0),
            (b'0', "keep/k", "", 1),
        ],
        &[
            (b'0', "d", "", 2),
            (b'5', "f/", "", 0),
            (b'0', "g/below", "", 3),
            (b'5', "keep", "", 0),
        ],
    ]);
    assert_eq!(
        paths(&tree),
        ["/d", "/f", "/g", "/g/below", "/keep", "/keep/k"]
    );
}

#[test]
fn hard_links_reach_across_layers() {
    let tree = merged(&[
        &[(b'0', "a", "", 5000)],
        &[(b'1', "b", "a", 0), (b'0', ".wh.a", "", 0)],
    ]);
    assert_eq!(
        listing(&tree),
        BTreeMap::from([("/b".to_owned(), "5000".to_owned())])
    );
    let itself = merged(&[&[(b'0', "a", "", 1), (b'1', "a", "./a", 0)]]);
    assert_eq!(paths(&itself), ["/a"]);
}

#[test]
fn what_cannot_be_is_refused_with_its_path() {
    let long = "n".repeat(99);
    let cases: &[(&[Item<'_>], &str)] = &[
        (&[(b'1', "a", "nowhere", 0)], "does not exist"),
        (
            &[(b'5', "d/", "", 0), (b'1', "a", "d", 0)],
            "to a directory",
        ),
        (
            &[(b'2', "l", "l", 0), (b'0', "l/x", "", 0)],
            "too many symbolic links",
        ),
        (
            &[(b'0', "f", "", 1), (b'0', "f/x", "", 1)],
            "a file of the same layer",
        ),
        (
            &[(b'0', "./", "", 0), (b'2', ".", "x", 0)],
            "root directory",
        ),
        (&[(b'2', "s", "", 0)], "to nothing"),
        (&[(b'M', &long, "", 0)], "not supported"),
    ];
    for (items, want) in cases {
        let error = apply(&mut Tree::new(), 0, &tar_of(items))
            .unwrap_err()
            .to_string();
        assert!(error.contains(want), "{error} lacks {want}");
    }
    let error = apply(&mut Tree::new(), 0, &[7u8; 2048])
        .unwrap_err()
        .to_string();
    assert!(error.contains("no tar"), "{error}");
    let mut cut = tar_of(&[(b'0', "f", "", 4000)]);
    cut.truncate(1500);
    let error = apply(&mut Tree::new(), 0, &cut).unwrap_err().to_string();
    assert!(error.contains("middle of an entry"), "{error}");
    let mut unpadded = tar_of(&[(b'0', "f", "", 700)]);
    unpadded.truncate(512 + 700);
    apply(&mut Tree::new(), 0, &unpadded).unwrap();
    let many: Vec<Item<'_>> = vec![(b'0', "f", "", 0); 10_001];
    let error = apply(&mut Tree::new(), 0, &tar_of(&many))
        .unwrap_err()
        .to_string();
    assert!(error.contains("number of files"), "{error}");
    let error = apply(&mut Tree::new(), 0, &tar_of(&[(b'0', "f", "", 2 << 20)]));
    assert!(error.unwrap_err().to_string().contains("too large"));
}

/// A file with one PAX record.
fn pax(key: &str, value: &[u8]) -> Vec<u8> {
    let body = [format!(" {key}=").as_bytes(), value, b"\n"].concat();
    let mut length = body.len() + 1;
    while length.to_string().len() + body.len() != length {
        length += 1;
    }
    let record = [length.to_string().as_bytes(), &body].concat();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::XHeader);
    header.set_size(record.len() as u64);
    header.set_cksum();
    builder.append(&header, &record[..]).unwrap();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_path("f").unwrap();
    header.set_size(0);
    header.set_cksum();
    builder.append(&header, &[][..]).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn pax_records_are_understood_and_bounded() {
    let first = |tar: &[u8]| TarReader::new(tar).next_entry().map(Option::unwrap);
    let times = [
        ("12.5", (12, 500_000_000)),
        ("-1.5", (-2, 500_000_000)),
        ("-3", (-3, 0)),
        ("7.1234567891", (7, 123_456_789)),
    ];
    for (text, want) in times {
        assert_eq!(first(&pax("mtime", text.as_bytes())).unwrap().mtime, want);
    }
    assert_eq!(first(&pax("uid", b"4294967294")).unwrap().uid, u32::MAX - 1);
    let long = "p/".repeat(500);
    assert_eq!(
        first(&pax("path", long.as_bytes())).unwrap().path,
        long.as_bytes()
    );
    let xattrs = first(&pax("SCHILY.xattr.user.a", b"v\0\n="))
        .unwrap()
        .xattrs
        .unwrap();
    assert_eq!(xattrs[&b"user.a"[..]], b"v\0\n=");
    let xattrs = first(&pax("LIBARCHIVE.xattr.user.%41", b"aGk="))
        .unwrap()
        .xattrs
        .unwrap();
    assert_eq!(xattrs[&b"user.A"[..]], b"hi");
    for (key, value) in [
        ("mtime", "x"),
        ("uid", "-1"),
        ("uid", "4294967296"),
        ("size", "99999999999999999999"),
        ("path", "a\0b"),
        ("GNU.sparse.offset", "1"),
        ("GNU.sparse.major", "9"),
    ] {
        assert!(first(&pax(key, value.as_bytes())).is_err(), "{key}={value}");
    }
    let huge = vec![b'v'; 70_000];
    assert!(first(&pax("SCHILY.xattr.user.a", &huge)).is_err());
    assert!(first(&pax("comment", &vec![b'v'; 2 << 20])).is_err());
}

fn decode(blob: &[u8], budget: u64) -> (std::io::Result<Vec<u8>>, Option<Digest>) {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(blob).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let count = std::sync::atomic::AtomicU64::new(0);
    with_layer(file, &count, budget, |decoded| {
        let mut out = Vec::new();
        std::io::Read::read_to_end(decoded, &mut out).map(|_| out)
    })
}

#[test]
fn every_compression_is_recognised_and_bounded() {
    let data: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&data).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(&data[..], 1).unwrap();
    for blob in [&data, &gzip, &zstd] {
        let (out, digest) = decode(blob, 1 << 30);
        assert!(out.unwrap() == data);
        assert_eq!(digest, Some(Digest::of(&data)));
        let over = decode(blob, 1 << 20).0.unwrap_err().to_string();
        assert!(over.contains("more than the limit"), "{over}");
    }
    for whole in [gzip, zstd] {
        assert!(decode(&whole[..whole.len() / 2], 1 << 30).0.is_err());
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 0x10;
        let (out, digest) = decode(&flipped, 1 << 30);
        assert!(out.is_err() || digest != Some(Digest::of(&data)));
    }
}

/// Files are `f?`, directories `d?`, so that models need not know which wins.
fn arb_path() -> impl Strategy<Value = String> {
    (prop::collection::vec(0..3u8, 0..3), 0..3u8).prop_map(|(dirs, file)| {
        dirs.iter().map(|d| format!("d{d}/")).collect::<String>() + &format!("f{file}")
    })
}

#[derive(Debug, Clone)]
enum Op {
    File(String, usize),
    Whiteout(String),
    Opaque(String),
}

fn arb_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (arb_path(), 0usize..600).prop_map(|(path, size)| Op::File(path, size)),
        2 => (arb_path(), any::<bool>()).prop_map(|(path, dir)| {
            let parent = path.rsplit_once('/').map(|(parent, _)| parent.to_owned());
            Op::Whiteout(parent.filter(|_| dir).unwrap_or(path))
        }),
        1 => arb_path().prop_map(|path| {
            Op::Opaque(path.rsplit_once('/').map_or(String::new(), |(parent, _)| parent.to_owned()))
        }),
    ]
}

/// What OCI says: whiteouts act on lower layers, then the layer is added.
fn model(layers: &[Vec<Op>]) -> BTreeMap<String, String> {
    let mut state: BTreeMap<String, String> = BTreeMap::new();
    for ops in layers {
        for op in ops {
            match op {
                Op::Whiteout(path) => {
                    let (this, below) = (format!("/{path}"), format!("/{path}/"));
                    state.retain(|known, _| *known != this && !known.starts_with(&below));
                }
                Op::Opaque(path) => {
                    let below = if path.is_empty() {
                        "/".to_owned()
                    } else {
                        format!("/{path}/")
                    };
                    state.retain(|known, _| !known.starts_with(&below));
                }
                Op::File(..) => {}
            }
        }
        for op in ops {
            let Op::File(path, size) = op else { continue };
            let path = format!("/{path}");
            for (at, _) in path.match_indices('/').skip(1) {
                state.insert(path[..at].to_owned(), "dir".to_owned());
            }
            state.insert(path, size.to_string());
        }
    }
    state
}

proptest! {
    #[test]
    fn merging_agrees_with_the_model(layers in prop::collection::vec(prop::collection::vec(arb_op(), 0..12), 1..5)) {
        let mut tree = Tree::new();
        for (at, ops) in (0..).zip(&layers) {
            let items: Vec<(u8, String, usize)> = ops.iter().map(|op| match op {
                Op::File(path, size) => (b'0', path.clone(), *size),
                Op::Whiteout(path) => {
                    let (dir, name) = path.rsplit_once('/').map_or(("", path.as_str()), |(d, n)| (d, n));
                    (b'0', format!("./{dir}/.wh.{name}"), 0)
                }
                Op::Opaque(path) => (b'0', format!("./{path}/.wh..wh..opq"), 0),
            }).collect();
            let items: Vec<Item<'_>> = items.iter().map(|(f, p, s)| (*f, p.as_str(), "", *s)).collect();
            apply(&mut tree, at, &tar_of(&items)).unwrap();
        }
        prop_assert_eq!(listing(&tree), model(&layers));
    }

    #[test]
    fn archives_of_the_tar_crate_read_back(files in prop::collection::vec(("[a-z]{1,30}(/[a-z]{1,40}){0,5}", 0usize..3000), 0..20)) {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, size) in &files {
            let mut header = tar::Header::new_gnu();
            header.set_size(*size as u64);
            header.set_uid(3_000_000);
            builder.append_data(&mut header, path, &vec![b'z'; *size][..]).unwrap();
        }
        let bytes = builder.into_inner().unwrap();
        let mut reader = TarReader::new(&bytes[..]);
        for (path, size) in &files {
            let entry = reader.next_entry().unwrap().unwrap();
            prop_assert_eq!(&entry.path, path.as_bytes());
            prop_assert_eq!(entry.size, *size as u64);
            prop_assert_eq!(entry.uid, 3_000_000);
            prop_assert_eq!(entry.kind, EntryKind::File);
        }
        prop_assert!(reader.next_entry().unwrap().is_none());
    }

    #[test]
    fn damaged_archives_end_in_an_answer(at in prop::collection::vec((0usize..6000, any::<u8>()), 1..40)) {
        let mut bytes = [pax("SCHILY.xattr.user.a", b"value"), tar_of(&[(b'0', "a", "", 700), (b'2', "l", "a", 0), (b'5', "d", "", 0)])].concat();
        for (at, byte) in at {
            let at = at % bytes.len();
            bytes[at] = byte;
            // Keep checksums right, so that damage gets past them.
            let start = at / 512 * 512;
            let sum: u32 = (start..start + 512).map(|i| if (148..156).contains(&(i - start)) { 32 } else { u32::from(bytes[i]) }).sum();
            bytes[start + 148..start + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let _ = apply(&mut Tree::new(), 0, &bytes);
    }
}
