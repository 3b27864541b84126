use serde_json::{Value, json};

use super::*;

const DIGEST: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn stamp() -> Value {
    json!({ "path": "/x", "device": 1, "inode": 2, "size": 3, "modified": 4 })
}

/// A record as this version writes it.
fn record() -> Value {
    json!({
        "format": 1, "created_at": 5,
        "container": {
            "id": "a", "guest_id": "b", "disk": "d", "terminal": false, "stdin": true,
            "spec": {
                "ociVersion": "1.0.2", "root": { "path": "rootfs" }, "linux": {},
                "process": { "user": { "uid": 0, "gid": 0 }, "args": ["count"], "cwd": "/" },
            },
        },
        "disks": [
            { "serial": "c", "file": { "path": "/y", "device": 1, "inode": 2, "size": 3, "modified": 4 } },
            { "serial": "d", "file": stamp() },
        ],
        "shape": {
            "format": 1, "walnut": "0", "driver": "vmm", "memory": 1, "vcpus": 1,
            "max_memory": 1, "max_vcpus": 1,
            "spare_disks": 0, "cmdline": [], "files": [],
            "host": { "id": "", "kernel": "", "processor": "" },
        },
        "state": { "stamp": stamp(), "digest": DIGEST },
        "memory": { "stamp": stamp(), "digest": null },
    })
}

fn parse(record: &Value) -> std::result::Result<Checkpoint, String> {
    Checkpoint::parse(&serde_json::to_vec(record).unwrap())
}

#[test]
fn a_record_comes_back() {
    let record = parse(&record()).unwrap();
    assert_eq!(record.command(), ["count"]);
    assert_eq!(record.rootfs(), Path::new("/x"));
    assert!(record.stale().is_some());
    let again = serde_json::to_vec(&record).unwrap();
    assert_eq!(Checkpoint::parse(&again).unwrap(), record);
}

#[test]
fn what_no_checkpoint_says_is_refused() {
    type Change = (&'static str, Value, &'static str);
    let long = "x".repeat(129);
    let changes: [Change; 14] = [
        ("/format", json!(2), "format 2; this program knows 1"),
        ("/format", json!("1"), "invalid type"),
        ("/created_at", json!(1.5), "invalid type"),
        ("/container/id", json!("../../x"), "no container's name"),
        ("/container/guest_id", json!(""), "no container's name"),
        (
            "/container/guest_id",
            json!(".state"),
            "no container's name",
        ),
        ("/container/guest_id", json!(long), "no container's name"),
        ("/container/spec", json!({"ociVersion": "1"}), "no process"),
        ("/container/spec/process", json!(7), "invalid type"),
        ("/container/disk", json!("e"), "not the disk"),
        (
            "/disks",
            json!(vec![json!({ "serial": "d", "file": stamp() }); 9]),
            "too many",
        ),
        ("/state/digest", json!("00"), "64 hexadecimal digits"),
        ("/memory/stamp/size", json!(-1), "invalid value"),
        ("/shape/vcpus", json!(u64::MAX), "invalid value"),
    ];
    for (at, value, says) in changes {
        let mut record = record();
        *record.pointer_mut(at).unwrap() = value;
        let said = parse(&record).unwrap_err();
        assert!(said.contains(says), "{at}: {said}");
    }
    // What it does not know it does not pass over.
    for at in ["", "/container", "/state"] {
        let mut record = record();
        record.pointer_mut(at).unwrap()["surplus"] = json!(1);
        let said = parse(&record).unwrap_err();
        assert!(said.contains("unknown field `surplus`"), "{at}: {said}");
    }
    let large = vec![b' '; usize::try_from(CHECKPOINT_MAX).unwrap() + 1];
    assert!(Checkpoint::parse(&large).unwrap_err().contains("larger"));
}

/// Every byte of a record, cut and changed: it is refused or it is another record, and
/// nothing panics.
#[test]
fn damaged_records_are_refused_or_others() {
    let good = parse(&record()).unwrap();
    let bytes = serde_json::to_vec(&record()).unwrap();
    for length in 0..bytes.len() {
        assert!(Checkpoint::parse(&bytes[..length]).is_err(), "{length}");
    }
    for at in 0..bytes.len() {
        for to in [0, b'"', b'0', b'}', 0xff] {
            let mut changed = bytes.clone();
            if std::mem::replace(&mut changed[at], to) == to {
                continue;
            }
            if let Ok(other) = Checkpoint::parse(&changed) {
                let _ = (other.command(), other.rootfs(), other == good);
            }
        }
    }
}

/// Noise, and records with values of the wrong kinds everywhere.
#[test]
fn noise_is_refused() {
    let mut seed = 1_u32;
    let mut random = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed >> 16
    };
    for _ in 0..2000 {
        let length = random() % 64;
        let bytes: Vec<u8> = (0..length).map(|_| random().to_le_bytes()[0]).collect();
        assert!(Checkpoint::parse(&bytes).is_err());
    }
    let deep = [
        b"{\"format\":1,\"container\":".to_vec(),
        vec![b'['; 100_000],
    ]
    .concat();
    assert!(Checkpoint::parse(&deep).is_err());
    fn each(value: &Value, path: String, all: &mut Vec<String>) {
        all.push(path.clone());
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    each(value, format!("{path}/{key}"), all);
                }
            }
            Value::Array(list) => {
                for (n, value) in list.iter().enumerate() {
                    each(value, format!("{path}/{n}"), all);
                }
            }
            _ => {}
        }
    }
    let mut paths = Vec::new();
    each(&record(), String::new(), &mut paths);
    for path in paths {
        for wrong in [json!(null), json!([[]]), json!({"x": {}}), json!(1e300)] {
            let mut record = record();
            *record.pointer_mut(&path).unwrap() = wrong;
            // Some may be none; none may panic.
            let _ = parse(&record);
        }
    }
}

#[test]
fn only_regular_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CHECKPOINT_FILE);
    assert!(Checkpoint::load(dir.path()).is_err());
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert!(Checkpoint::load(dir.path()).is_err());
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let said = Checkpoint::load(dir.path()).unwrap_err().to_string();
    assert!(said.contains("no regular file"), "{said}");
    fs::remove_file(&path).unwrap();
    fs::write(&path, serde_json::to_vec(&record()).unwrap()).unwrap();
    Checkpoint::load(dir.path()).unwrap();
}

#[test]
fn a_failed_one_leaves_nothing_and_a_good_one_verifies() {
    let dir = tempfile::tempdir().unwrap();
    let saved = parse(&record()).unwrap();
    let sealed = || Sealed {
        disks: saved.disks.clone(),
        shape: saved.shape.clone(),
        lasting: true,
    };
    assert!(seal(dir.path(), saved.container.clone(), sealed()).is_err());
    let files = files(dir.path());
    fs::write(&files.state, "state").unwrap();
    fs::write(&files.memory, "memory").unwrap();
    seal(dir.path(), saved.container.clone(), sealed()).unwrap();
    let loaded = Checkpoint::load(dir.path()).unwrap();
    loaded.state.verify(&files.state, Content::Plain).unwrap();
    loaded.memory.verify(&files.memory, Content::Pages).unwrap();
    fs::write(&files.state, "stale").unwrap();
    assert!(loaded.state.verify(&files.state, Content::Plain).is_err());
    unmake(dir.path());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
