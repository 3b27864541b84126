//! Machines that begin where another stood: quicker, and each itself.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use walnut_tests::{Detached, command, driver, host, run, run_with, spawn_run, until, walnut};

/// `walnut template ls`, one object each.
fn templates() -> Vec<Value> {
    let listed = walnut(&["template", "ls", "--format", "json"]).exits(0);
    serde_json::from_slice(&listed.stdout).unwrap()
}

/// A usable template with that much memory for its guest.
fn usable(memory: &Value) -> Option<Value> {
    templates()
        .into_iter()
        .find(|t| t["shape"]["memory"] == *memory && t["stale"].is_null())
}

fn directory(id: &str) -> PathBuf {
    host().root.join("templates").join(id)
}

/// The template that a container of these options begins from.
fn begins_from(options: &[&str]) -> Value {
    let box_ = Detached::start(&[options, &["IMAGE", "sleep", "infinity"]].concat());
    box_.exec(&["true"]).exits(0);
    box_.record().unwrap()["template"].clone()
}

#[test]
fn a_container_begins_from_a_template_unless_told_not_to() {
    let id = walnut(&["template", "create"]).exits(0).text().to_owned();
    assert_eq!(begins_from(&[]), id.as_str());
    // Again: the same one.
    assert_eq!(walnut(&["template", "create"]).exits(0).text(), id);
    assert_eq!(begins_from(&["--no-template"]), Value::Null);
    // What it is shared comes while it stands.
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    let box_ = Detached::start(&["-v", &volume, "IMAGE", "sleep", "infinity"]);
    box_.exec(&["sh", "-c", "echo hers > /data/file"]).exits(0);
    assert_eq!(box_.record().unwrap()["template"], id.as_str());
    assert_eq!(
        fs::read_to_string(dir.path().join("file")).unwrap(),
        "hers\n"
    );
    drop(box_);
    let done = run_with(&["IMAGE", "echo", "booted"], b"", |command| {
        command.env("WALNUT_TEMPLATES", "off");
    });
    assert_eq!(done.exits(0).text(), "booted");

    let shown = walnut(&["template", "inspect", &id[..12]]).exits(0);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown[0]["id"], id.as_str());
    assert!(shown[0]["size"].as_u64().unwrap() > 1 << 20, "{shown:#}");
    let table = walnut(&["template", "ls"]).exits(0);
    assert!(table.text().contains("usable"), "{table:#?}");
    walnut(&["template", "inspect", "zz"]).fails(125, "no such template");
}

/// What a program can see that should be its own, as JSON. Addresses are those of which two
/// in 200 alike are less likely than one in a thousand.
const MINE: &str = r#"
import ctypes, json, os, socket, ssl, uuid
c = ctypes.CDLL(None)
c.getauxval.restype = ctypes.c_ulong
c.getauxval.argtypes = [ctypes.c_ulong]
AT_RANDOM = 25  # its bytes become the stack canary and the pointer guard
crypto = ctypes.CDLL("libcrypto.so.3")
crypto.EVP_PKEY_Q_keygen.restype = ctypes.c_void_p
key = crypto.EVP_PKEY_Q_keygen(None, None, b"ED25519")
public = ctypes.create_string_buffer(32)
length = ctypes.c_size_t(32)
crypto.EVP_PKEY_get_raw_public_key(ctypes.c_void_p(key), public, ctypes.byref(length))
maps = open("/proc/self/maps").read().splitlines()
base = lambda name: next(line.split("-")[0] for line in maps if name in line)
kernel = lambda name: open("/proc/sys/kernel/random/" + name).read().strip()
print(json.dumps({
    "boot ID": kernel("boot_id"),
    "UUID of the kernel": kernel("uuid"),
    "UUID": str(uuid.uuid4()),
    "getrandom": os.getrandom(16).hex(),
    "urandom": open("/dev/urandom", "rb").read(16).hex(),
    "OpenSSL's random bytes": ssl.RAND_bytes(16).hex(),
    "TLS key": public.raw.hex(),
    "canary": ctypes.string_at(c.getauxval(AT_RANDOM), 16).hex(),
    "stack": hex(c.getauxval(AT_RANDOM)),
    "libraries": base("libc.so"),
    "host name": socket.gethostname(),
}))
"#;

/// How many clones are compared.
fn clones() -> usize {
    std::env::var("WALNUT_TEST_CLONES").map_or(200, |n| n.parse().unwrap())
}

#[test]
fn clones_have_nothing_of_each_other() {
    const AT_ONCE: usize = 8;
    walnut(&["template", "create"]).exits(0);
    let mut seen: HashMap<String, HashSet<String>> = HashMap::new();
    let all: Vec<usize> = (0..clones()).collect();
    for some in all.chunks(AT_ONCE) {
        let clones: Vec<_> = some
            .iter()
            .map(|_| spawn_run(&["--rm", "IMAGE", "python3", "-c", MINE], |_| {}))
            .collect();
        for clone in clones {
            let done = clone.wait().exits(0);
            let own: HashMap<String, String> = serde_json::from_str(done.text()).unwrap();
            assert_eq!(own.len(), 11, "{own:?}");
            for (what, value) in own {
                assert!(value.len() >= 8, "{what}: {value}");
                let first = seen.entry(what.clone()).or_default().insert(value.clone());
                assert!(first, "two clones have the {what} {value}");
            }
        }
    }
    assert!(seen.values().all(|values| values.len() == clones()));
}

#[test]
fn a_clone_knows_the_time() {
    walnut(&["template", "create"]).exits(0);
    let now = || {
        let now = std::time::SystemTime::now();
        now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
    };
    let before = now();
    let said: u64 = run(&["IMAGE", "date", "+%s"])
        .exits(0)
        .text()
        .parse()
        .unwrap();
    // The guest's clock and the host's may round differently.
    assert!((before - 1..=now() + 1).contains(&said), "{before} {said}");
}

#[test]
fn a_template_that_is_damaged_is_replaced_by_itself() {
    const SIZE: [&str; 2] = ["-m", "200m"];
    let id = walnut(&["template", "create", SIZE[0], SIZE[1]]).exits(0);
    let id = id.text().to_owned();
    let memory = {
        let all = templates();
        let ours = all.iter().find(|t| t["id"] == id.as_str()).unwrap();
        ours["shape"]["memory"].clone()
    };
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 3] = [
        ("cut", |dir| {
            let memory = fs::File::options().write(true).open(dir.join("memory"));
            memory.unwrap().set_len(4096).unwrap();
        }),
        ("rewritten", |dir| {
            let state = fs::read(dir.join("state")).unwrap();
            fs::write(dir.join("state"), vec![0x5a; state.len()]).unwrap();
        }),
        ("gone", |dir| fs::remove_file(dir.join("memory")).unwrap()),
    ];
    for (damage, inflict) in damages {
        inflict(&directory(&id));
        // It starts all the same, and leaves a good one behind.
        assert_eq!(begins_from(&SIZE), Value::Null, "{damage}");
        until("another one is made", || usable(&memory).is_some());
        assert_eq!(begins_from(&SIZE), id.as_str(), "{damage}");
    }
    // A state that is damaged and looks as it did: the machine itself refuses it. The file
    // server of a volume has ended with that clone: the machine that boots has another one.
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    for options in [SIZE.to_vec(), [&SIZE[..], &["-v", &volume]].concat()] {
        let path = directory(&id).join("state");
        let meta = fs::metadata(&path).unwrap();
        let mut state = fs::read(&path).unwrap();
        let middle = state.len() / 2;
        state[middle..].fill(0xa5);
        let file = fs::File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &state, 0).unwrap();
        let times = fs::FileTimes::new().set_modified(meta.modified().unwrap());
        file.set_times(times).unwrap();
        assert_eq!(begins_from(&options), Value::Null, "{options:?}");
        until("another one is made", || usable(&memory).is_some());
    }

    walnut(&["template", "rm", &id]).exits(0);
    assert!(!directory(&id).exists());
    walnut(&["template", "rm", &id]).fails(125, "no such template");
}

/// A figure of the guest's `/proc/meminfo`, in KiB.
fn meminfo(box_: &Detached, name: &str) -> u64 {
    let script = format!("awk '/^{name}:/{{print $2}}' /proc/meminfo");
    box_.exec(&["sh", "-c", &script])
        .exits(0)
        .text()
        .parse()
        .unwrap()
}

#[test]
fn one_template_serves_larger_sizes_where_machines_grow() {
    const LARGE: [&str; 4] = ["-m", "700m", "--cpus", "2"];
    let id = walnut(&["template", "create"]).exits(0).text().to_owned();
    let large = || Detached::start(&[&LARGE[..], &["IMAGE", "sleep", "infinity"]].concat());
    let right = |box_: &Detached| {
        assert_eq!(box_.exec(&["nproc"]).exits(0).text(), "2");
        let total = meminfo(box_, "MemTotal");
        assert!((700..800).contains(&(total >> 10)), "{total} KiB");
        let limit = box_.exec(&["cat", "/sys/fs/cgroup/memory.max"]).exits(0);
        assert_eq!(limit.text(), (700u64 << 20).to_string());
        let quota = box_.exec(&["cat", "/sys/fs/cgroup/cpu.max"]).exits(0);
        assert_eq!(quota.text(), "200000 100000");
    };
    if driver() != "vmm" {
        println!("machines of {} keep their size: another template", driver());
        let own = walnut(&[&["template", "create"][..], &LARGE].concat()).exits(0);
        assert_ne!(own.text(), id);
        let box_ = large();
        assert_eq!(box_.record().unwrap()["template"], own.text());
        right(&box_);
        walnut(&["template", "rm", own.text()]).exits(0);
        return;
    }
    // What is made for a larger one is the same.
    let again = walnut(&[&["template", "create"][..], &LARGE].concat()).exits(0);
    assert_eq!(again.text(), id);
    let box_ = large();
    assert_eq!(box_.record().unwrap()["template"], id.as_str());
    right(&box_);
    // All of it can be used: more than the template's guest has.
    let use_it = "b = bytearray(b'x') * (560 << 20); print(b.count(b'x') >> 20)";
    assert_eq!(box_.exec(&["python3", "-c", use_it]).exits(0).text(), "560");
    // What is written to the root file system may have half of that.
    let room = "import os; s = os.statvfs('/'); print(s.f_blocks * s.f_frsize >> 20)";
    let room = box_.exec(&["python3", "-c", room]).exits(0);
    assert!(room.text().parse::<u64>().unwrap() >= 350, "{room:?}");
    // So can both vCPUs, at once.
    let both = "import os; print(*sorted(os.sched_getaffinity(0)))";
    assert_eq!(box_.exec(&["python3", "-c", both]).exits(0).text(), "0 1");
    // What has grown goes on elsewhere as large as it is.
    let fork = format!("{}-fork", box_.name);
    walnut(&["fork", "-d", "--name", &fork, &box_.name]).exits(0);
    let total = |name: &str| {
        let script = "nproc; awk '/^MemTotal:/{print $2}' /proc/meminfo";
        let said = walnut(&["exec", name, "sh", "-c", script]).exits(0);
        said.text().to_owned()
    };
    assert_eq!(total(&fork), total(&box_.name));
    walnut(&["rm", "-f", &fork]).exits(0);
    drop(box_);
    // With a volume as well, which is served from what has been added.
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    let options = [&LARGE[..], &["-v", &volume, "IMAGE", "sleep", "infinity"]].concat();
    let box_ = Detached::start(&options);
    assert_eq!(box_.record().unwrap()["template"], id.as_str());
    right(&box_);
    // More than the template's guest has, so that some of the file is in what was added.
    let copy = "import hashlib, os\n\
                filler = bytearray(b'x') * (520 << 20)\n\
                part = os.urandom(24 << 20)\n\
                with open('/data/large', 'wb') as out: out.write(part)\n\
                back = open('/data/large', 'rb')\n\
                os.fsync(back.fileno())\n\
                os.posix_fadvise(back.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n\
                print(hashlib.sha256(part).hexdigest())\n\
                print(hashlib.file_digest(back, 'sha256').hexdigest())";
    let sums = box_.exec(&["python3", "-c", copy]).exits(0);
    let (first, second) = sums.text().split_once('\n').unwrap();
    assert_eq!(first, second);
    let here = std::process::Command::new("sha256sum")
        .arg(dir.path().join("large"))
        .output()
        .unwrap();
    assert!(here.stdout.starts_with(first.as_bytes()), "{here:?}");
    drop(box_);
    // A smaller one is none that the default could become.
    let smaller = walnut(&["template", "create", "-m", "64m"]).exits(0);
    assert_ne!(smaller.text(), id);
    walnut(&["template", "rm", smaller.text()]).exits(0);
}

#[test]
fn a_maker_that_is_killed_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (root, run) = (dir.path().join("root"), dir.path().join("run"));
    let on = |args: &[&str]| {
        let mut command = command(args);
        command.env("WALNUT_ROOT", &root).env("WALNUT_RUN", &run);
        command
    };
    let children = |of: u32| {
        let path = format!("/proc/{of}/task/{of}/children");
        fs::read_to_string(path).unwrap_or_default()
    };
    let mut maker = on(&["template", "create"]).spawn().unwrap();
    until("its machine runs", || {
        run.join("template").exists() && !children(maker.id()).is_empty()
    });
    let machine = children(maker.id());
    maker.kill().unwrap();
    maker.wait().unwrap();
    until("its machine is gone", || {
        machine
            .split_whitespace()
            .all(|pid| !Path::new("/proc").join(pid).join("exe").exists())
    });
    assert!(on(&["ps"]).status().unwrap().success());
    assert!(!run.join("template").exists());
    let left: Vec<_> = fs::read_dir(root.join("templates"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["lock"]);
    // And does not stand in the next one's way.
    assert!(on(&["template", "create"]).status().unwrap().success());
    assert!(on(&["template", "rm", "--all"]).status().unwrap().success());
}
