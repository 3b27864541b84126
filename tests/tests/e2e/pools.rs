//! Machines that stand by for containers to come.

use std::{collections::HashSet, path::Path};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use walnut_tests::{Detached, command, driver, host, run, run_with, spawn_run, until, walnut};

/// A pool of its own for each test, told apart by its size.
struct Own {
    memory: &'static str,
}

impl Own {
    fn new(memory: &'static str, size: u32) -> Self {
        let own = Self { memory };
        own.set(size);
        own
    }

    fn set(&self, size: u32) {
        walnut(&["pool", "set", "-m", self.memory, &size.to_string()]).exits(0);
    }

    /// The machine's size, in bytes, that containers of this one get.
    fn bytes(&self) -> u64 {
        let mib: u64 = self.memory.trim_end_matches('m').parse().unwrap();
        // Machines come in steps of 2 MiB.
        (mib + mib.div_ceil(64) + 96).next_multiple_of(2) << 20
    }

    fn members(&self) -> Vec<Value> {
        let listed = walnut(&["pool", "ls", "--format", "json"]).exits(0);
        let pools: Vec<Value> = serde_json::from_slice(&listed.stdout).unwrap();
        let ours = pools.iter().find(|pool| pool["memory"] == self.bytes());
        ours.map(|pool| pool["members"].as_array().unwrap().clone())
            .unwrap_or_default()
    }

    fn ready(&self) -> Vec<Value> {
        let mut members = self.members();
        members.retain(|member| member["ready"] == true);
        members
    }

    fn start(&self, options: &[&str]) -> Detached {
        let head = [&["-m", self.memory], options].concat();
        Detached::start(&[&head[..], &["IMAGE", "sleep", "infinity"]].concat())
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = command(&["pool", "set", "-m", self.memory, "0"]).status();
    }
}

fn pid(value: &Value) -> i32 {
    value.as_i64().and_then(|pid| pid.try_into().ok()).unwrap()
}

/// A process, and what it has started.
fn family(pid: i32) -> Vec<i32> {
    let children = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(children).unwrap_or_default();
    let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    children.chain([pid]).collect()
}

fn gone(family: &[i32]) -> bool {
    family
        .iter()
        .all(|pid| !Path::new(&format!("/proc/{pid}/exe")).exists())
}

fn directory(member: &Value) -> std::path::PathBuf {
    host().run.join("pool").join(member["id"].as_str().unwrap())
}

#[test]
fn a_container_gets_a_machine_that_stands_by_and_another_takes_its_place() {
    let pool = Own::new("160m", 2);
    let before = pool.ready();
    assert_eq!(before.len(), 2, "{before:?}");
    let pids: HashSet<_> = before.iter().map(|member| pid(&member["pid"])).collect();

    let first = pool.start(&["-e", "A=b", "--hostname", "own"]);
    let record = first.record().unwrap();
    let supervisor = pid(&record["shim_pid"]);
    assert!(pids.contains(&supervisor), "{record:#}");
    assert_eq!(record["template"], before[0]["template"]);
    let said = first.exec(&["sh", "-c", "hostname; echo $A; exit 3"]);
    assert_eq!(said.exits(3).text(), "own\nb");
    until("another stands by", || pool.ready().len() == 2);
    let after = pool.ready();
    assert!(after.iter().all(|m| pid(&m["pid"]) != supervisor));

    // In front, with streams and an exit code of its own.
    let done = run_with(
        &[
            "-i",
            "-m",
            pool.memory,
            "IMAGE",
            "sh",
            "-c",
            "cat; echo e >&2; exit 4",
        ],
        b"input",
        |_| {},
    );
    assert_eq!(done.stderr, "e\n");
    assert_eq!(done.exits(4).text(), "input");
    until("another stands by", || pool.ready().len() == 2);

    // Who come at the same moment get one each, or none, and all run.
    let both: Vec<_> = (0..4)
        .map(|n| {
            let echo = ["--rm", "-m", pool.memory, "IMAGE", "echo"];
            spawn_run(&[&echo[..], &[["0", "1", "2", "3"][n]]].concat(), |_| {})
        })
        .collect();
    for (n, one) in both.into_iter().enumerate() {
        assert_eq!(one.wait().exits(0).text(), n.to_string());
    }
    until("two stand by again", || pool.ready().len() == 2);

    // These want what none of them has.
    let pids: HashSet<_> = pool.ready().iter().map(|m| pid(&m["pid"])).collect();
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    for options in [&["--no-template"][..], &["-v", &volume]] {
        let other = pool.start(options);
        let supervisor = pid(&other.record().unwrap()["shim_pid"]);
        assert!(!pids.contains(&supervisor), "{options:?}");
    }
    // This one as well, unless a machine can be made larger.
    let larger = pool.start(&["--cpus", "2"]);
    let its = pid(&larger.record().unwrap()["shim_pid"]);
    assert_eq!(pids.contains(&its), driver() == "vmm");
    assert_eq!(larger.exec(&["nproc"]).exits(0).text(), "2");
    drop(larger);
    let table = walnut(&["pool", "ls"]).exits(0);
    assert!(table.text().contains("WANTED"), "{table:?}");

    // Whoever has one keeps it when the pool goes; the others end.
    let waiting: Vec<_> = pool.ready();
    let families: Vec<i32> = waiting
        .iter()
        .flat_map(|m| family(pid(&m["pid"])))
        .collect();
    pool.set(0);
    until("they have ended", || gone(&families));
    until("nothing of them is left", || {
        waiting.iter().all(|member| !directory(member).exists())
    });
    assert!(pool.members().is_empty());
    first.exec(&["true"]).exits(0);
    let mine = before.iter().find(|m| pid(&m["pid"]) == supervisor);
    assert!(directory(mine.unwrap()).exists());
    drop(first);
    until("nothing of it is left", || {
        !directory(mine.unwrap()).exists()
    });
}

#[test]
fn machines_that_stood_by_have_nothing_of_each_other() {
    let pool = Own::new("168m", 2);
    let script = "
        cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid
        head -c 16 /dev/urandom | od -An -tx8
        od -An -tx8 -j0 /proc/self/auxv | md5sum
        hostname; ls /tmp /run; dmesg | grep -c rehearsal
        ps ax | grep -c [r]ehearsal; cd /sys/fs/cgroup; ls -d */";
    let mut said: Vec<Vec<String>> = Vec::new();
    for _ in 0..2 {
        let done = run(&["-m", pool.memory, "IMAGE", "sh", "-c", script]);
        said.push(done.text().split_whitespace().map(str::to_owned).collect());
    }
    // Of the rehearsal nothing is left to be seen.
    for words in &said {
        assert!(
            !words.iter().any(|word| word.contains("rehears")),
            "{words:?}"
        );
    }
    let long = |words: &[String]| -> HashSet<String> {
        let own = |w: &&String| w.len() >= 12 && w.bytes().any(|b| b.is_ascii_digit());
        words.iter().filter(own).cloned().collect()
    };
    let (one, other) = (long(&said[0]), long(&said[1]));
    assert!(one.len() >= 6, "{said:?}");
    let both: Vec<_> = one.intersection(&other).collect();
    assert!(both.is_empty(), "two have {both:?}");
}

#[test]
fn who_is_killed_while_standing_by_or_after_leaves_nothing() {
    let pool = Own::new("176m", 1);
    let member = &pool.ready()[0];
    let all = family(pid(&member["pid"]));
    assert!(all.len() >= 2, "{all:?}");
    kill(Pid::from_raw(pid(&member["pid"])), Signal::SIGKILL).unwrap();
    until("its machine is gone", || gone(&all));
    // The next container starts without it, and brings the pool back.
    let container = pool.start(&[]);
    container.exec(&["true"]).exits(0);
    assert!(!directory(member).exists());
    drop(container);
    until("another stands by", || pool.ready().len() == 1);

    // A machine that dies while it waits is none that can be had.
    let member = &pool.ready()[0];
    let all = family(pid(&member["pid"]));
    kill(Pid::from_raw(all[0]), Signal::SIGKILL).unwrap();
    until("its supervisor is gone", || gone(&all));
    let container = pool.start(&[]);
    container.exec(&["true"]).exits(0);
    drop(container);
    until("another stands by", || pool.ready().len() == 1);

    // A supervisor that stood by is one like others.
    let member = &pool.ready()[0];
    let container = pool.start(&[]);
    let supervisor = pid(&container.record().unwrap()["shim_pid"]);
    assert_eq!(supervisor, pid(&member["pid"]));
    let all = family(supervisor);
    kill(Pid::from_raw(supervisor), Signal::SIGKILL).unwrap();
    until("its machine is gone", || gone(&all));
    let record = container.ended();
    assert_eq!(record["exit_code"], 137, "{record:#}");
    assert!(!directory(member).exists());
}
