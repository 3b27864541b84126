//! What sandboxes cost their host, and that they give back what they do not need.

use std::{
    collections::HashSet,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use serde_json::Value;
use walnut_tests::{
    Detached, Terminal, command, host, spawn_run, spawn_walnut, unique, until, walnut,
};

const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;

/// `walnut stats` of one container, read once.
fn stats(name: &str, option: &str) -> Value {
    let done = walnut(&["stats", option, "--format", "json", name]).exits(0);
    let mut all: Vec<Value> = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

fn breakdown(name: &str) -> Value {
    stats(name, "--memory-breakdown")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// What the host holds for a guest. (What an emulator keeps of translated code grows
/// with whatever runs.)
fn held(name: &str) -> u64 {
    guest(&breakdown(name))
}

fn guest(all: &Value) -> u64 {
    let together = &all["host"]["together"];
    number(&together["guest_private"])
        + number(&together["guest_shared"])
        + number(&all["host"]["guest_unmapped"])
}

#[test]
fn figures_are_a_containers_own() {
    let idle = Detached::start(&["-m", "300m", "IMAGE", "sleep", "infinity"]);
    let busy = Detached::start(&["IMAGE", "sh", "-c", "sleep 1000 & while :; do :; done"]);
    let figures = stats(&idle.name, "--no-stream");
    assert_eq!(figures["id"], idle.id.as_str());
    assert_eq!(figures["name"], idle.name.as_str());
    assert_eq!(figures["pids"], 1);
    assert_eq!(number(&figures["memory_limit"]), 300 * MIB);
    assert!(
        (1..50 * MIB).contains(&number(&figures["memory_usage"])),
        "{figures}"
    );
    assert!(number(&figures["block_read"]) > 100_000, "{figures}");
    let cpu = |figures: &Value| figures["cpu_percent"].as_f64().unwrap();
    assert!(cpu(&figures) < 20.0, "{figures}");
    until("the other one is seen to be busy", || {
        let figures = stats(&busy.name, "--no-stream");
        figures["pids"] == 2 && cpu(&figures) > 30.0
    });
    let table = walnut(&["stats", "--no-stream"]).exits(0);
    for part in [&idle.name, &busy.name, "CPU %", " / 300.0MiB"] {
        assert!(table.text().contains(part), "{part}: {table:#?}");
    }
    walnut(&["stats", "--no-stream", "nobody"]).fails(125, "no such container");
}

#[test]
fn the_table_is_drawn_over_until_its_container_ends() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    let mut terminal = Terminal::start(command(&["stats", &box_.name]), 120, 24);
    let drawn = |terminal: &Terminal| terminal.screen().matches("\x1b[H").count();
    until("it is drawn several times", || drawn(&terminal) > 2);
    assert!(terminal.screen().contains(&box_.id[..12]));
    walnut(&["kill", &box_.name]).exits(0);
    terminal.shows("-- / --");
    assert!(terminal.child.wait().unwrap().success());
}

#[test]
fn the_parts_of_a_sandboxs_memory_are_all_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    walnut(&["template", "create"]).exits(0);
    for options in [&[][..], &["--no-template"], &["-v", &volume]] {
        let box_ = Detached::start(&[options, &["IMAGE", "sleep", "infinity"]].concat());
        box_.exec(&["true"]).exits(0);
        until("two readings by the kernel agree", || {
            parts_are_all(&box_.name).is_none_or(|problem| {
                println!("{options:?}: {problem}");
                false
            })
        });
    }
}

/// Reads a sandbox's parts, and its processes' memory by the kernel's own sum before and
/// after: the parts must add up, and be as much as the kernel says. Or what is wrong.
fn parts_are_all(name: &str) -> Option<String> {
    let pids = |all: &Value| -> Vec<u64> {
        let processes = all["host"]["processes"].as_array().unwrap();
        processes.iter().map(|p| number(&p["pid"])).collect()
    };
    let before = pids(&breakdown(name));
    let sums: Vec<(u64, u64)> = before.iter().map(|pid| kernel_sum(*pid)).collect();
    let all = breakdown(name);
    assert_eq!(pids(&all), before, "its processes");
    let again: Vec<(u64, u64)> = before.iter().map(|pid| kernel_sum(*pid)).collect();

    let host = &all["host"];
    let parts = [
        "anonymous",
        "file_private",
        "file_shared",
        "guest_private",
        "guest_shared",
    ];
    let mut together = 0;
    let mut roles = HashSet::new();
    let processes = host["processes"].as_array().unwrap();
    for ((process, first), last) in processes.iter().zip(&sums).zip(&again) {
        let mapped: u64 = parts.iter().map(|part| number(&process[*part])).sum();
        let total = mapped + number(&process["kernel"]);
        assert_eq!(number(&process["total"]), total, "{process}");
        together += total;
        roles.insert(process["role"].as_str().unwrap().to_owned());
        let (low, high) = (first.0.min(last.0), first.0.max(last.0));
        // The kernel rounds each mapping's figure down to a kB, and the sum but once. And
        // while the command runs that is asked, it has a share of the libraries.
        let slack = first.1.max(last.1) * KIB + high / 8;
        if mapped + slack < low || mapped > high + slack {
            return Some(format!("{process}: {mapped} is not within {low}–{high}"));
        }
    }
    assert!(
        roles.contains("shim") && roles.contains(walnut_tests::machine().0),
        "{roles:?}"
    );
    let total = number(&host["total"]);
    assert_eq!(total, together + number(&host["guest_unmapped"]));
    let of_files = |key: &str| -> u64 {
        let files = host["files"].as_array().unwrap();
        files.iter().map(|file| number(&file[key])).sum()
    };
    assert_eq!(of_files("cached"), of_files("counted") + of_files("rest"));
    assert_eq!(number(&host["page_cache"]), of_files("rest"));
    assert_eq!(number(&host["with_page_cache"]), total + of_files("rest"));
    assert!(of_files("cached") > MIB, "{host:#}");

    // The guest's own account is of what the host holds for it.
    let parts = all["guest"].as_array().unwrap();
    let says: i64 = parts.iter().map(|p| p["bytes"].as_i64().unwrap()).sum();
    let holds = guest(&all);
    assert_eq!(u64::try_from(says).unwrap(), holds);
    assert!((10 * MIB..400 * MIB).contains(&holds), "{all:#}");
    None
}

/// What the kernel says a process has, by share, in bytes; and how many mappings.
fn kernel_sum(pid: u64) -> (u64, u64) {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib: u64 = line.unwrap().trim_end_matches("kB").trim().parse().unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    (kib * KIB, u64::try_from(maps.lines().count()).unwrap())
}

#[test]
fn memory_that_a_guest_frees_goes_back_to_the_host() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    box_.exec(&["true"]).exits(0);
    let before = held(&box_.name);
    let program = "import sys
block = bytearray(200 << 20)
for at in range(0, len(block), 4096): block[at] = 1
print('held', flush=True)
sys.stdin.read()
del block
print('freed', flush=True)";
    let line = ["exec", "-i", &box_.name, "python3", "-c", program];
    let mut user = spawn_walnut(&line);
    user.prints("held");
    let most = held(&box_.name);
    assert!(most > before + 190 * MIB, "{before} {most}");
    user.input(b"");
    assert_eq!(user.wait().exits(0).text(), "held\nfreed");
    let freed = Instant::now();
    until("the host has it back", || {
        held(&box_.name) < before + 30 * MIB
    });
    println!("freed memory was back after {:?}", freed.elapsed());
}

#[test]
fn a_guest_that_is_asked_gives_its_page_cache_back() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    box_.exec(&["true"]).exits(0);
    let before = held(&box_.name);
    let fill = "cat $(find /usr/bin /usr/lib -type f -size +64k) >/dev/null";
    box_.exec(&["sh", "-c", fill]).exits(0);
    let most = held(&box_.name);
    assert!(most > before + 60 * MIB, "{before} {most}");
    walnut(&["reclaim", &box_.name]).exits(0);
    until("the host has most of it back", || {
        held(&box_.name) < before + (most - before) / 3
    });
    // And it runs on.
    box_.exec(&["python3", "-c", "print(7)"]).exits(0);
    walnut(&["reclaim", "nobody"]).fails(1, "no such container");
}

#[test]
fn an_idle_guest_has_no_tick() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    // The least of many: the host has other things to do.
    let program = "import time
def sleep():
    start = time.monotonic(); time.sleep(0.0001); return time.monotonic() - start
print(int(min(sleep() for _ in range(100)) * 1e6))";
    let least: u64 = box_
        .exec(&["python3", "-c", program])
        .text()
        .parse()
        .unwrap();
    assert!(least < 3000, "timers are as coarse as a tick: {least} us");
    let look = "grep -i timer /proc/interrupts";
    let script = format!("a=$({look}); sleep 8; b=$({look}); echo \"$a\"; echo --; echo \"$b\"");
    let done = box_.exec(&["sh", "-c", &script]).exits(0);
    let (before, after) = done.text().split_once("--").unwrap();
    let sum = |text: &str| -> u64 {
        let words = text.split_whitespace();
        words.filter_map(|word| word.parse::<u64>().ok()).sum()
    };
    // A tick is 250 a second.
    let ticks = sum(after) - sum(before);
    assert!(ticks < 8 * 100, "{ticks} interrupts of timers in 8 s");
}

/// A cgroup of little memory, in which programs are short of it though the host is not.
#[derive(Debug)]
struct Squeeze {
    dirs: Vec<PathBuf>,
    program: Option<Child>,
}

impl Squeeze {
    /// None where the kernel tells nothing of pressure, or this user may make no cgroups.
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mount = |kind: &str, option: &str| {
            let line = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>());
            let mut found = line.filter(|w| w[2] == kind && w[3].split(',').any(|o| o == option));
            found.next().map(|words| PathBuf::from(words[1]))
        };
        let name = unique("walnut-squeeze");
        let mut this = Self {
            dirs: Vec::new(),
            program: None,
        };
        // Pressure is told by version 2; memory may be bound by version 1 beside it.
        for (base, limit) in [
            (mount("cgroup2", "rw")?, "memory.max"),
            (
                mount("cgroup", "memory").unwrap_or_default(),
                "memory.limit_in_bytes",
            ),
        ] {
            let _ = fs::write(base.join("cgroup.subtree_control"), "+memory");
            let dir = base.join(&name);
            if base.as_os_str().is_empty() || fs::create_dir(&dir).is_err() {
                continue;
            }
            let _ = fs::write(dir.join(limit), "20M");
            this.dirs.push(dir);
        }
        this.pressure().is_some().then_some(this)
    }

    fn pressure(&self) -> Option<String> {
        let file = self.dirs.first()?.join("memory.pressure");
        fs::read(&file).ok()?;
        Some(file.to_str()?.to_owned())
    }

    /// Reads more than there is room for, again and again.
    fn press(&mut self, file: &Path) {
        let enter: String = self
            .dirs
            .iter()
            .map(|dir| format!("echo $$ >{}/cgroup.procs; ", dir.display()))
            .collect();
        // What others have read into memory is theirs: it writes the file anew.
        let script = format!(
            "{enter}dd if=/dev/zero of=$0 bs=1M count=60 2>/dev/null; while :; do cat $0; done"
        );
        let mut command = Command::new("sh");
        command
            .args(["-c", &script])
            .arg(file)
            .stdout(Stdio::null());
        self.program = Some(command.process_group(0).spawn().unwrap());
    }
}

impl Drop for Squeeze {
    fn drop(&mut self) {
        for dir in &self.dirs {
            until("its programs have ended", || {
                for pid in fs::read_to_string(dir.join("cgroup.procs"))
                    .unwrap_or_default()
                    .lines()
                {
                    // One of another PID namespace is 0, which would mean this group.
                    let pid = pid.parse().unwrap_or(0);
                    if pid > 0 {
                        let pid = nix::unistd::Pid::from_raw(pid);
                        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
                    }
                }
                self.program.as_mut().map(Child::try_wait);
                fs::remove_dir(dir).is_ok()
            });
        }
    }
}

#[test]
fn a_host_that_is_short_of_memory_gets_some_back() {
    use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, statfs};
    let kind = statfs(&host().root).unwrap().filesystem_type();
    if kind == TMPFS_MAGIC || kind == OVERLAYFS_SUPER_MAGIC {
        println!("not tried: files lie in memory here, and cannot be read anew");
        return;
    }
    let Some(mut squeeze) = Squeeze::new() else {
        println!("not tried: no pressure is told here, or no cgroups can be made");
        return;
    };
    let pressure = squeeze.pressure().unwrap();
    let box_ = spawn_run(&["--rm", "IMAGE", "sleep", "infinity"], |command| {
        command.env("WALNUT_PRESSURE", pressure);
    });
    let id = box_.id();
    until("it runs", || walnut(&["exec", &id, "true"]).code == 0);
    let before = held(&id);
    let fill = "cat $(find /usr/bin /usr/lib -type f -size +64k) >/dev/null";
    walnut(&["exec", &id, "sh", "-c", fill]).exits(0);
    let most = held(&id);
    assert!(most > before + 60 * MIB, "{before} {most}");
    let dir = tempfile::tempdir_in(&host().root).unwrap();
    squeeze.press(&dir.path().join("file"));
    until("the host has some of it back", || {
        held(&id) < most - (most - before) / 4
    });
    drop(squeeze);
    walnut(&["kill", &id]).exits(0);
    box_.wait().exits(137);
}
