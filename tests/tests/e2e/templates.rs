//! Machines that begin where another stood: quicker, and each itself.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use walnut_tests::{Detached, command, host, run, run_with, spawn_run, until, walnut};

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
    // A share is more than a clone can have.
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    assert_eq!(begins_from(&["-v", &volume]), Value::Null);
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

#[test]
fn clones_have_nothing_of_each_other() {
    walnut(&["template", "create"]).exits(0);
    // What a program can see that should be its own.
    let script = "
        cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid
        head -c 16 /dev/urandom | od -An -tx8
        python3 -c 'import os, uuid, ssl; print(os.getrandom(16).hex(), uuid.uuid4(), ssl.RAND_bytes(16).hex())'
        grep -m1 -e '\\[stack\\]' /proc/self/maps
        od -An -tx8 -j0 /proc/self/auxv | md5sum
        hostname";
    let clones: Vec<_> = (0..8)
        .map(|_| spawn_run(&["--rm", "IMAGE", "sh", "-c", script], |_| {}))
        .collect();
    let said: Vec<Vec<String>> = clones
        .into_iter()
        .map(|clone| {
            let done = clone.wait().exits(0);
            done.text().split_whitespace().map(str::to_owned).collect()
        })
        .collect();
    let lines = said[0].len();
    assert!(lines >= 14, "{said:#?}");
    // Constant words: the permissions and name of the stack's mapping, and `-`.
    let constant: HashSet<_> = ["rw-p", "00000000", "00:00", "0", "[stack]", "-"].into();
    let own = |words: &[String]| -> HashSet<String> {
        let long = words.iter().filter(|w| w.len() > 4);
        long.filter(|w| !constant.contains(w.as_str()))
            .cloned()
            .collect()
    };
    for (n, one) in said.iter().enumerate() {
        assert_eq!(one.len(), lines, "{one:?}");
        let one = own(one);
        for other in &said[n + 1..] {
            let both: Vec<_> = one.intersection(&own(other)).cloned().collect();
            assert!(both.is_empty(), "two clones have {both:?}");
        }
    }
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
    // A state that is damaged and looks as it did: the machine itself refuses it.
    let path = directory(&id).join("state");
    let meta = fs::metadata(&path).unwrap();
    let mut state = fs::read(&path).unwrap();
    let middle = state.len() / 2;
    state[middle..].fill(0xa5);
    let file = fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &state, 0).unwrap();
    let times = fs::FileTimes::new().set_modified(meta.modified().unwrap());
    file.set_times(times).unwrap();
    assert_eq!(begins_from(&SIZE), Value::Null);
    until("another one is made", || usable(&memory).is_some());

    walnut(&["template", "rm", &id]).exits(0);
    assert!(!directory(&id).exists());
    walnut(&["template", "rm", &id]).fails(125, "no such template");
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
