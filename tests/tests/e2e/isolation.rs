//! What a sandbox does not share, and what binds it.

use walnut_tests::{Detached, run, walnut};

#[test]
fn two_sandboxes_share_nothing() {
    let (a, b) = (
        Detached::start(&["IMAGE", "sleep", "infinity"]),
        Detached::start(&["IMAGE", "sleep", "infinity"]),
    );
    for path in [
        "/proc/sys/kernel/random/boot_id",
        "/proc/sys/kernel/random/uuid",
        "/etc/hostname",
    ] {
        let read = |c: &Detached| c.exec(&["cat", path]).exits(0).text().to_owned();
        assert_ne!(read(&a), read(&b), "{path}");
    }
    a.exec(&[
        "sh",
        "-c",
        "echo a > /mine; echo a > /dev/shm/mine; sleep 4321 & ",
    ])
    .exits(0);
    b.exec(&["ls", "/mine"]).exits(2);
    b.exec(&["ls", "/dev/shm/mine"]).exits(2);
    b.exec(&["pgrep", "-f", "sleep 4321"]).exits(1);
    // Nor the host's processes.
    let count = "import os; print(sum(n.isdigit() for n in os.listdir('/proc')))";
    let seen: u32 = b.exec(&["python3", "-c", count]).text().parse().unwrap();
    assert!(seen < 10, "{seen} processes");
    assert_eq!(b.exec(&["ls", "/sys/class/net"]).text(), "lo");
}

#[test]
fn a_memory_limit_holds() {
    let eat = "b = bytearray(1)\nwhile True: b += bytes(1 << 20)";
    let box_ = Detached::start(&["-m", "64m", "IMAGE", "sleep", "infinity"]);
    let max = box_.exec(&["cat", "/sys/fs/cgroup/memory.max"]).exits(0);
    assert_eq!(max.text(), (64 << 20).to_string());
    let total = box_.exec(&["sh", "-c", "awk '/MemTotal/{print $2}' /proc/meminfo"]);
    let total: u64 = total.text().parse().unwrap();
    assert!(total < 192 * 1024, "the machine has {total} kB");
    box_.exec(&["python3", "-c", eat]).exits(137);
    box_.exec(&["true"]).exits(0);
    drop(box_);
    // Without a limit it is the machine's memory that binds; the guest survives.
    let free = Detached::start(&["IMAGE", "sleep", "infinity"]);
    free.exec(&["python3", "-c", eat]).exits(137);
    free.exec(&["true"]).exits(0);
    drop(free);
    let done = run(&["-m", "64m", "IMAGE", "python3", "-c", eat]).exits(137);
    assert_eq!(done.stdout, b"");
    let ended = Detached::start(&["-m", "128m", "IMAGE", "python3", "-c", eat]);
    let record = ended.ended();
    assert_eq!(record["oom_killed"], true, "{record:#}");
    assert_eq!(record["exit_code"], 137, "{record:#}");
    let table = walnut(&["ps", "-a"]);
    assert!(table.text().contains("out of memory"), "{table:#?}");
}

/// A program that leaves its own code no page to stay in: the kernel, which can
/// always take one more, never comes to its OOM killer.
#[test]
fn what_grinds_at_its_limit_is_ended() {
    let eat = "l = []\nwhile True: l.append(bytearray(4096))";
    let box_ = Detached::start(&["-m", "64m", "IMAGE", "python3", "-c", eat]);
    let record = box_.ended();
    assert_eq!(record["oom_killed"], true, "{record:#}");
    assert_eq!(record["exit_code"], 137, "{record:#}");
    // Not the container, but the process that grinds.
    let box_ = Detached::start(&["-m", "64m", "IMAGE", "sleep", "infinity"]);
    box_.exec(&["python3", "-c", eat]).exits(137);
    box_.exec(&["echo", "alive"]).exits(0);
}

#[test]
fn a_cpu_limit_holds() {
    let box_ = Detached::start(&["--cpus", "0.5", "IMAGE", "sleep", "infinity"]);
    assert_eq!(
        box_.exec(&["cat", "/sys/fs/cgroup/cpu.max"]).text(),
        "50000 100000"
    );
    assert_eq!(box_.exec(&["nproc"]).text(), "1");
    let burn =
        "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass";
    box_.exec(&["python3", "-c", burn]).exits(0);
    let stat = box_.exec(&["cat", "/sys/fs/cgroup/cpu.stat"]);
    let throttled = stat
        .text()
        .lines()
        .find_map(|l| l.strip_prefix("nr_throttled "))
        .and_then(|n| n.parse::<u64>().ok());
    assert!(throttled.is_some_and(|n| n > 0), "{stat:#?}");
    drop(box_);
    let done = run(&[
        "--cpus",
        "1.5",
        "IMAGE",
        "sh",
        "-c",
        "nproc; cat /sys/fs/cgroup/cpu.max",
    ]);
    assert_eq!(done.text(), "2\n150000 100000");
}

#[test]
fn the_container_is_confined_in_its_guest() {
    let script = "grep -E 'CapEff|CapBnd' /proc/self/status; \
                  echo 1 > /proc/sys/vm/drop_caches; mount -t tmpfs x /mnt; cat /proc/kcore | head -c 1; \
                  mknod /tmp/d b 254 0 && head -c 1 /tmp/d; true";
    let done = run(&["IMAGE", "sh", "-c", script]).exits(0);
    assert!(
        done.text().contains("CapEff:\t00000000a80425fb"),
        "{done:#?}"
    );
    for part in ["Read-only file system", "permission denied"] {
        assert!(done.stderr.contains(part), "{part}: {done:#?}");
    }
    // A container reaches no port of the host's, and not the agent's own.
    let vsock = "import socket\nfor cid in (2, 3, 1):\n for port in (1024, 1025, 22):\n  s = \
                 socket.socket(40, 1)\n  try:\n   s.connect((cid, port)); print('OPEN', cid, port)\n  \
                 except OSError: pass";
    let done = run(&["IMAGE", "python3", "-c", vsock]).exits(0);
    assert_eq!(done.text(), "");
}

#[test]
fn the_host_bounds_what_serves_a_sandbox() {
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    let box_ = Detached::start(&["-m", "64m", "-v", &volume, "IMAGE", "sleep", "infinity"]);
    let inside = format!("/walnut/{}", box_.id);
    let mut bounded = 0;
    for (pid, name) in walnut_tests::processes(&box_.id) {
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let ours: Vec<_> = groups.lines().filter(|l| l.ends_with(&inside)).collect();
        match name.as_str() {
            "containerd-shim-walnut-v2" => assert!(ours.is_empty(), "{groups}"),
            _ => {
                assert!(!ours.is_empty(), "{name} is in {groups}");
                bounded += 1;
            }
        }
    }
    // The machine and virtiofsd at least.
    assert!(bounded >= 2, "{bounded}");
    let find = |name: &str| {
        let found = std::process::Command::new("find")
            .args(["/sys/fs/cgroup", "-path", &format!("*{inside}/{name}")])
            .output()
            .unwrap();
        let paths = String::from_utf8(found.stdout).unwrap();
        paths.lines().next().map(|path| {
            let value = std::fs::read_to_string(path).unwrap();
            value.trim().to_owned()
        })
    };
    let memory = find("memory.max").or_else(|| find("memory.limit_in_bytes"));
    let memory: u64 = memory.unwrap().parse().unwrap();
    assert!((64 << 20..4 << 30).contains(&memory), "{memory}");
    assert_eq!(find("pids.max").unwrap(), "1024");
}
