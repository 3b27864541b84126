//! The rule that nothing stays.

use std::{fs, path::Path};

use crate::{host, until};

/// Processes whose command line names `word`, with their programs' names.
pub fn processes(word: &str) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("list /proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line);
        // A test's own command line names it too, and is none of the product's.
        let program = line.split('\0').next().unwrap_or_default();
        let name = Path::new(program).file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        let ours = [
            "walnut",
            "walnut-oci",
            "containerd-shim-walnut-v2",
            "walnut-vmm",
            "walnut-vsock",
            "virtiofsd",
        ];
        if line.contains(word) && (ours.contains(&name.as_str()) || name.starts_with("qemu")) {
            found.push((pid, name));
        }
    }
    found
}

/// What of the container `id` is on the host, other than its directory.
fn traces(id: &str) -> Vec<String> {
    let mut found: Vec<_> = processes(id)
        .into_iter()
        .map(|(pid, name)| format!("process {pid} {name}"))
        .collect();
    for table in ["/proc/self/mountinfo", "/proc/net/unix"] {
        let text = fs::read_to_string(table).expect("read");
        found.extend(
            text.lines()
                .filter(|line| line.contains(id))
                .map(|line| format!("{table}: {line}")),
        );
    }
    for dir in [&host().run, Path::new("/sys/fs/cgroup")] {
        walk(dir, id, 4, &mut found);
    }
    let containers = host().root.join("containers");
    for entry in fs::read_dir(containers).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains(id) && name != id {
            found.push(format!("{}", entry.path().display()));
        }
    }
    found
}

/// Cgroups that `id` names.
pub fn cgroups(id: &str) -> Vec<String> {
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), id, 4, &mut found);
    found
}

fn walk(dir: &Path, id: &str, depth: u32, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().contains(id) {
            found.push(path.display().to_string());
        } else if depth > 0 && entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&path, id, depth - 1, found);
        }
    }
}

/// Panics unless every process, mount, socket, cgroup and runtime file of the
/// container goes away.
#[track_caller]
pub fn assert_nothing_left(id: &str) {
    let mut left = Vec::new();
    let start = std::time::Instant::now();
    loop {
        left = {
            let now = traces(id);
            if now.is_empty() {
                return;
            }
            drop(left);
            now
        };
        if start.elapsed() > crate::DEADLINE {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("left of {id}: {left:#?}");
}

/// Waits until `id` has a process of this name, and gives its PID.
#[track_caller]
pub(crate) fn process(id: &str, name: &str) -> i32 {
    let mut pid = None;
    until(&format!("{name} of {id} runs"), || {
        pid = processes(id)
            .into_iter()
            .find(|(_, n)| n.starts_with(name))
            .map(|(pid, _)| pid);
        pid.is_some()
    });
    pid.expect("found")
}

/// Kills the process `name` of the container `id`, as `kill -9` does.
#[track_caller]
pub fn kill_process(id: &str, name: &str) {
    let pid = nix::unistd::Pid::from_raw(process(id, name));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill");
}

/// Panics unless all that `traces` finds goes away.
#[track_caller]
pub fn assert_gone(traces: impl Fn() -> Vec<String>) {
    let start = std::time::Instant::now();
    loop {
        let left = traces();
        if left.is_empty() {
            return;
        }
        assert!(start.elapsed() < crate::DEADLINE, "left: {left:#?}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
