//! Containers that are saved with their processes, and go on: elsewhere, twice, as forks.

use std::{
    fs,
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
};

use nix::sys::signal::Signal;
use walnut_tests::{
    Detached, Done, Terminal, assert_nothing_left, command, host, kill_process, run_with,
    spawn_run, spawn_walnut, unique, until, walnut,
};

/// Counts in memory and in a file, says each number, and ends as it is told.
const COUNTS: &str = "
    trap 'exit 9' TERM
    n=0
    while [ ! -e /end ]; do
        n=$((n+1)); echo $n >/count; echo n $n; sleep 0.1
    done
    exit 7";

/// A checkpoint as an image; removed when dropped.
struct Saved {
    name: String,
    id: String,
}

impl Saved {
    #[track_caller]
    fn of(container: &str) -> Self {
        Self::with(container, &[])
    }

    #[track_caller]
    fn with(container: &str, options: &[&str]) -> Self {
        let name = format!("saved:{}", unique("c"));
        let args = [&["checkpoint", container, "--as", &name], options].concat();
        let id = walnut(&args).exits(0).text().to_owned();
        assert!(id.starts_with("sha256:"), "{id}");
        Self { name, id }
    }

    fn directory(&self) -> PathBuf {
        let hex = self.id.trim_start_matches("sha256:");
        host().root.join("images/checkpoints").join(hex)
    }

    /// `walnut run` of it with these options, to its end.
    #[track_caller]
    fn run(&self, options: &[&str]) -> Done {
        run_with(&[options, &[&self.name]].concat(), b"", |_| {})
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        walnut(&["rmi", &self.name]);
        if !std::thread::panicking() {
            assert!(!self.directory().exists(), "left: {}", self.name);
        }
    }
}

/// What a container behind has printed, once it is `lines` lines.
fn printed(container: &Detached, lines: usize) -> Vec<String> {
    let mut all = Vec::new();
    until("it has printed enough", || {
        let said = walnut(&["logs", &container.name]).exits(0);
        all = said.text().lines().map(str::to_owned).collect();
        all.len() >= lines
    });
    all
}

/// The number of a line of [`COUNTS`].
fn number(line: &str) -> u32 {
    line.strip_prefix("n ").unwrap().parse().unwrap()
}

fn drafts() -> usize {
    let entries = fs::read_dir(host().root.join("checkpoints")).into_iter();
    let directories = entries.flatten().flatten().filter(|e| e.path().is_dir());
    directories.count()
}

#[test]
fn one_is_saved_and_goes_on_twice_from_the_same_count() {
    let original = Detached::start(&["IMAGE", "sh", "-c", COUNTS]);
    printed(&original, 3);
    original
        .exec(&["sh", "-c", "echo kept >/etc/mark"])
        .exits(0);
    let saved = Saved::of(&original.name);
    let then = printed(&original, 1).len();
    // It runs on, and its end does not matter to what goes on from it.
    printed(&original, then + 3);
    drop(original);

    let first = Detached::start(&[&saved.name]);
    let first_lines = printed(&first, 3);
    let second = Detached::start(&[&saved.name]);
    let second_lines = printed(&second, 3);
    let from = number(&first_lines[0]);
    assert!(from >= 4, "{first_lines:?}");
    assert_eq!(first_lines[..3], second_lines[..3], "the same count");
    for (container, other) in [(&first, &second), (&second, &first)] {
        assert_eq!(container.exec(&["cat", "/etc/mark"]).text(), "kept");
        let count: u32 = container.exec(&["cat", "/count"]).text().parse().unwrap();
        assert!(count >= from);
        let name = container.exec(&["hostname"]);
        assert_eq!(name.text(), &container.id[..12]);
        let file = container.exec(&["cat", "/etc/hostname", "/etc/hosts"]);
        assert!(file.text().contains(name.text()) && !file.text().contains(&other.id[..12]));
        let random = ["sh", "-c", "head -c 16 /dev/urandom | od -An -tx8"];
        assert_ne!(container.exec(&random).text(), other.exec(&random).text());
        let record = container.record().unwrap();
        assert_eq!(record["status"], "running");
        assert_eq!(record["image"]["name"], saved.name.as_str());
    }
    // What one writes the other does not see; its end is its own.
    first.exec(&["touch", "/end"]);
    assert_eq!(first.ended()["exit_code"], 7);
    walnut(&["stop", &second.name]).exits(0);
    assert_eq!(second.ended()["exit_code"], 9);
}

#[test]
fn output_input_and_exit_codes_arrive() {
    let script = "echo begins; while read line; do echo got $line; done; echo over; exit 5";
    let mut original = spawn_run(&["--rm", "-i", "IMAGE", "sh", "-c", script], |_| {});
    original.prints("begins");
    let saved = Saved::of(&original.id());
    original.input(b"of the original\n");
    let done = original.wait().exits(5);
    assert_eq!(done.text(), "begins\ngot of the original\nover");

    let done = run_with(&["-i", &saved.name], b"one\ntwo\n", |_| {}).exits(5);
    assert_eq!(done.text(), "got one\ngot two\nover");
    // Without -i it has no input, and that is its end.
    assert_eq!(saved.run(&[]).exits(5).text(), "over");
}

#[test]
fn output_that_nobody_takes_waits() {
    // It has filled what is between it and a client who reads nothing.
    let script = "echo begins; while read go; do seq 1 60000; done; echo over";
    let mut original = spawn_run(&["--rm", "-i", "IMAGE", "sh", "-c", script], |_| {});
    original.prints("begins");
    let saved = Saved::of(&original.id());
    let want: String = (1..=60000).map(|n| format!("{n}\n")).collect();
    let done = run_with(&["-i", &saved.name], b"go\n", |_| {}).exits(0);
    assert!(done.stdout == (want + "over\n").into_bytes());
    original.input(b"");
    original.wait().exits(0);
}

#[test]
fn a_terminal_is_there_again() {
    let start = |args: &[&str]| Terminal::start(command(args), 80, 24);
    let name = unique("t");
    let image = host().image.as_str();
    let mut original = start(&["run", "--rm", "-it", "--name", &name, image, "sh"]);
    original.shows("# ");
    original.keys("word=remembered; echo $((40+1))\n");
    original.shows("41");
    let saved = Saved::of(&name);
    original.keys("exit 3\n");
    assert_eq!(original.end(), 3);

    let mut clone = start(&["run", "--rm", "-it", &saved.name]);
    clone.keys("echo $word-$((40+2)); stty size; exit 4\n");
    clone.shows("remembered-42");
    clone.shows("24 80");
    assert_eq!(clone.end(), 4);
    saved.run(&[]).fails(125, "have a terminal; add -t");
}

#[test]
fn a_fork_begins_where_the_container_stands() {
    let original = Detached::start(&["--hostname", "chosen", "IMAGE", "sh", "-c", COUNTS]);
    printed(&original, 2);
    let fork = |of: &Detached| {
        let name = unique("f");
        let id = walnut(&["fork", "-d", "--name", &name, &of.name]).exits(0);
        let id = id.text().to_owned();
        Detached { name, id }
    };
    let first = fork(&original);
    let lines = printed(&first, 2);
    assert!(number(&lines[0]) >= 3, "{lines:?}");
    assert_eq!(first.exec(&["hostname"]).text(), "chosen");
    // A fork of a fork, whose parents end.
    let second = fork(&first);
    drop(first);
    drop(original);
    let next = printed(&second, 2);
    assert!(number(&next[0]) > number(&lines[0]));
    // Other tests have some meanwhile.
    until("a fork keeps no file", || drafts() == 0);
    // In front.
    let file = std::env::temp_dir().join(unique("fork"));
    let file_name = file.to_str().unwrap();
    let options = ["--rm", "--hostname", "other", "--cidfile", file_name];
    let front = spawn_walnut(&[&["fork", &second.name], &options[..]].concat());
    front.prints("n ");
    let id = fs::read_to_string(&file).unwrap();
    fs::remove_file(&file).unwrap();
    let named = walnut(&["exec", &id, "hostname"]);
    assert_eq!(named.exits(0).text(), "other");
    // It may go down with what it ends.
    walnut(&["exec", &id, "touch", "/end"]);
    front.wait().exits(7);
    assert_nothing_left(&id);
}

#[test]
fn clones_draw_other_random_numbers_from_their_first_step() {
    let script = "
import os, time
while True:
    print(os.getrandom(8).hex(), int(time.time()))
    time.sleep(0.02)";
    let original = Detached::start(&["IMAGE", "python3", "-u", "-c", script]);
    printed(&original, 5);
    let saved = Saved::of(&original.name);
    let before = std::time::SystemTime::now();
    let before = before.duration_since(std::time::UNIX_EPOCH).unwrap();
    let mut drawn = printed(&original, 5);
    for _ in 0..2 {
        let clone = Detached::start(&[&saved.name]);
        let lines = printed(&clone, 20);
        // And it knows the time at once.
        let time = lines[0].split(' ').nth(1).unwrap().parse::<u64>().unwrap();
        assert!(time + 1 >= before.as_secs(), "{lines:?}");
        drawn.extend(lines);
    }
    let mut numbers: Vec<_> = drawn.iter().map(|l| l.split(' ').next()).collect();
    let all = numbers.len();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), all, "drawn twice");
}

#[test]
fn execs_go_on_without_streams() {
    let original = Detached::start(&["IMAGE", "sleep", "infinity"]);
    let script = "while :; do echo out; echo x >>/ticks; sleep 0.05; done";
    let exec = spawn_walnut(&["exec", &original.name, "sh", "-c", script]);
    exec.prints("out");
    let saved = Saved::of(&original.name);
    let clone = Detached::start(&[&saved.name]);
    let ticks = |of: &Detached| {
        let count = of.exec(&["sh", "-c", "wc -l </ticks"]).exits(0);
        count.text().trim().parse::<u32>().unwrap()
    };
    let first = ticks(&clone);
    until("its exec goes on", || ticks(&clone) > first + 5);
    // The original's has its streams still.
    let first = ticks(&original);
    until("the original's goes on", || ticks(&original) > first + 5);
    drop(original);
    exec.wait();
}

#[test]
fn a_server_keeps_its_data_and_serves() {
    let redis = Detached::start(&["IMAGE", "redis-server", "--save", ""]);
    let cli = |of: &Detached, args: &[&str]| -> String {
        let done = of.exec(&[&["redis-cli"], args].concat());
        done.text().to_owned()
    };
    until("redis answers", || cli(&redis, &["ping"]) == "PONG");
    assert_eq!(cli(&redis, &["set", "key", "warm"]), "OK");
    let saved = Saved::with(&redis.name, &["--stop"]);
    assert_eq!(redis.ended()["exit_code"], 137);
    drop(redis);
    let clones: Vec<_> = (0..2).map(|_| Detached::start(&[&saved.name])).collect();
    for (n, clone) in clones.iter().enumerate() {
        assert_eq!(cli(clone, &["get", "key"]), "warm");
        assert_eq!(
            cli(clone, &["incrby", "n", &(n + 1).to_string()]),
            (n + 1).to_string()
        );
    }
    // Saved again, from a clone; the first one is not needed for it.
    let again = Saved::of(&clones[1].name);
    drop((clones, saved));
    let clone = Detached::start(&[&again.name]);
    assert_eq!(cli(&clone, &["get", "n"]), "2");
}

#[test]
fn a_machine_that_stood_by_is_saved_like_others() {
    const MEMORY: &str = "172m";
    let pool = |size: &str| walnut(&["pool", "set", "-m", MEMORY, size]).exits(0);
    pool("1");
    let original = Detached::start(&["-m", MEMORY, "IMAGE", "sh", "-c", COUNTS]);
    let record = original.record().unwrap();
    pool("0");
    let supervisor = record["shim_pid"].as_i64().unwrap();
    let line = fs::read_to_string(format!("/proc/{supervisor}/cmdline")).unwrap();
    assert!(line.contains("stand-by"), "{line:?}");
    printed(&original, 3);
    let saved = Saved::of(&original.name);
    drop(original);
    let clone = Detached::start(&[&saved.name]);
    let lines = printed(&clone, 2);
    assert!(number(&lines[0]) >= 4, "{lines:?}");
    assert_eq!(clone.exec(&["hostname"]).text(), &clone.id[..12]);
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    let shared = Detached::start(&["-v", &volume, "IMAGE", "sleep", "infinity"]);
    let to = ["checkpoint", &shared.name, "--as", "saved:not"];
    walnut(&to).fails(125, "it has volumes");
    walnut(&["fork", &shared.name]).fails(125, "it has volumes");
    shared.exec(&["true"]).exits(0);
    walnut(&["checkpoint", "nobody", "--as", "x"]).fails(125, "no such container");

    // Of a size that other tests have too, who count templates.
    let limited = ["--no-template", "-m", "200m", "IMAGE", "sleep", "infinity"];
    let original = Detached::start(&limited);
    let by_digest = format!("x@sha256:{}", "0".repeat(64));
    walnut(&["checkpoint", &original.name, "--as", &by_digest]).fails(125, "not by a digest");
    let saved = Saved::of(&original.name);
    for (options, says) in [
        (["-m", "100m"], "-m: it was saved with 209715200 bytes"),
        (["--cpus", "2"], "--cpus: it was saved with no limit"),
        (["-e", "A=1"], "--env cannot be applied"),
        (["-w", "/tmp"], "--workdir cannot be applied"),
        (["-u", "daemon"], "--user cannot be applied"),
        (["-v", &volume], "--volume cannot be applied"),
        (["--entrypoint", "sh"], "--entrypoint cannot be applied"),
        (["--hostname", "a b"], "host name"),
    ] {
        saved.run(&options).fails(125, says);
    }
    saved.run(&["-i"]).fails(125, "leave -i out");
    saved.run(&["-t"]).fails(125, "leave -t out");
    saved.run(&["--read-only"]).fails(125, "--read-only cannot");
    let done = run_with(&[&saved.name, "true"], b"", |_| {});
    done.fails(125, "a command cannot be applied");
    let other = match walnut_tests::driver() {
        "vmm" => "qemu-tcg",
        _ => "vmm",
    };
    saved
        .run(&["--driver", other])
        .fails(125, "it was saved by the driver");
    // The same is no other.
    let same = Detached::start(&["-m", "200m", &saved.name]);
    same.exec(&["true"]).exits(0);
    // Nothing of all that is left; other tests have drafts meanwhile.
    until("no draft is left", || drafts() == 0);
    let images = walnut(&["images"]).exits(0);
    assert!(!images.text().contains("not"), "{images:#?}");
}

#[test]
fn files_that_are_damaged_cut_or_of_another_host_are_refused() {
    let original = Detached::start(&["IMAGE", "sleep", "infinity"]);
    let saved = Saved::of(&original.name);
    let files = saved.directory();
    let open = |name: &str| {
        let path = files.join(name);
        fs::File::options()
            .write(true)
            .read(true)
            .open(path)
            .unwrap()
    };
    let good = |name: &str| fs::read(files.join(name)).unwrap();
    // Another program than the one that it was saved with.
    let lib = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&host().lib).unwrap() {
        let path = entry.unwrap().path();
        symlink(&path, lib.path().join(path.file_name().unwrap())).unwrap();
    }
    fs::remove_file(lib.path().join("initramfs.cpio")).unwrap();
    fs::copy(
        host().lib.join("initramfs.cpio"),
        lib.path().join("initramfs.cpio"),
    )
    .unwrap();
    run_with(&[&saved.name], b"", |command| {
        command.env("WALNUT_LIB", lib.path());
    })
    .fails(125, "this host cannot go on from it");

    let state = good("state");
    let memory = open("memory");
    let mut byte = [0];
    memory.read_exact_at(&mut byte, 1 << 20).unwrap();
    memory.write_all_at(&[byte[0] ^ 1], 1 << 20).unwrap();
    saved
        .run(&[])
        .fails(125, "its content is not what was saved");
    memory.write_all_at(&byte, 1 << 20).unwrap();
    // As it was: it is read, and found to be.
    let clone = Detached::start(&[&saved.name]);
    clone.exec(&["true"]).exits(0);
    drop(clone);

    let middle = u64::try_from(state.len() / 2).unwrap();
    open("state")
        .write_all_at(&[!state[state.len() / 2]], middle)
        .unwrap();
    saved
        .run(&[])
        .fails(125, "its content is not what was saved");
    open("state").set_len(7).unwrap();
    saved.run(&[]).fails(125, "it has 7 bytes");
    fs::remove_file(files.join("state")).unwrap();
    saved.run(&[]).fails(125, "state");
    fs::write(files.join("state"), &state).unwrap();

    let length = memory.metadata().unwrap().len();
    memory.set_len(length - 4096).unwrap();
    saved.run(&[]).fails(125, "bytes and had");
    // A record that says what it likes has not the digest that is its name.
    let record = String::from_utf8(good("checkpoint.json")).unwrap();
    fs::write(
        files.join("checkpoint.json"),
        record.replace("\"terminal\":false", "\"terminal\":true"),
    )
    .unwrap();
    run_with(&["--pull", "never", &saved.name], b"", |_| {}).fails(125, "missing or changed");
}

/// A root of its own, with the images of the others.
struct Root {
    dir: tempfile::TempDir,
}

impl Root {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        symlink(host().root.join("images"), root.join("images")).unwrap();
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn run(&self, args: &[&str]) -> std::process::Output {
        let mut command = command(args);
        command
            .env("WALNUT_ROOT", self.root())
            .env("WALNUT_RUN", self.dir.path().join("run"))
            .env("WALNUT_TEMPLATES", "off");
        command.output().unwrap()
    }
}

#[test]
fn a_full_disk_is_said_and_the_container_runs_on() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can mount a small disk");
        return;
    }
    let root = Root::new();
    let small = root.root().join("checkpoints");
    fs::create_dir(&small).unwrap();
    nix::mount::mount(
        Some("tmpfs"),
        &small,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=4m,mode=0700"),
    )
    .unwrap();
    let image = host().image.as_str();
    let started = root.run(&["run", "-d", "--name", "full", image, "sh", "-c", COUNTS]);
    assert!(started.status.success(), "{started:?}");
    for args in [
        &["checkpoint", "full", "--as", "saved:full"][..],
        &["fork", "full"],
    ] {
        let done = root.run(args);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(125), "{said}");
        assert!(said.contains("No space left"), "{said}");
        let left: Vec<_> = fs::read_dir(&small).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "more than the lock: {left:?}");
    }
    let lines = || root.run(&["logs", "full"]).stdout.len();
    let before = lines();
    until("it counts on", || lines() > before + 20);
    assert!(root.run(&["rm", "-f", "full"]).status.success());
    nix::mount::umount(&small).unwrap();
}

#[test]
fn whoever_is_killed_leaves_nothing() {
    let original = Detached::start(&["--no-template", "-m", "1g", "IMAGE", "sh", "-c", COUNTS]);
    printed(&original, 1);
    let root = &host().root;
    let begun = || {
        let entries = fs::read_dir(root.join("checkpoints")).into_iter();
        let mut paths = entries.flatten().flatten().map(|e| e.path());
        paths.any(|path: PathBuf| path.join("memory").exists())
    };
    // The command, in the middle of it.
    for verb in [&["checkpoint", "--as", "saved:killed"][..], &["fork", "-d"]] {
        let running = spawn_walnut(&[verb, &[&original.name]].concat());
        until("the machine is being saved", begun);
        running.signal(Signal::SIGKILL);
        running.wait();
        // The container runs on, whatever its supervisor was at.
        let before = printed(&original, 1).len();
        printed(&original, before + 5);
        walnut(&["ps"]).exits(0);
        until("nothing is left", || {
            walnut(&["ps"]).exits(0);
            drafts() == 0
        });
    }
    // The supervisor.
    let running = spawn_walnut(&["checkpoint", &original.name, "--as", "saved:killed"]);
    until("the machine is being saved", begun);
    kill_process(&original.id, "containerd-shim-walnut-v2");
    running.wait().fails(125, "supervisor is gone");
    assert_eq!(original.ended()["status"], "exited");
    assert_eq!(drafts(), 0);
    let images = walnut(&["images"]).exits(0);
    assert!(!images.text().contains("killed"), "{images:#?}");
    assert!(Path::new(&host().root).exists());
}
