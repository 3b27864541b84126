//! The processes of a pod, found by what the kernel says of them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A process; its start tells it from a later one with the same PID.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) start: u64,
    pub(crate) name: String,
}

impl Process {
    /// Kills it as `kill -9` does. False if it is not there any more.
    pub(crate) fn kill(&self) -> bool {
        self.is_there() && kill(Pid::from_raw(self.pid), Signal::SIGKILL).is_ok()
    }

    /// It has not ended.
    pub(crate) fn is_there(&self) -> bool {
        stat(self.pid).is_some_and(|s| s.start == self.start && s.state != "Z")
    }
}

struct Stat {
    name: String,
    state: String,
    parent: i32,
    start: u64,
}

/// proc(5), `/proc/pid/stat`.
fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = text.rsplit_once(") ")?;
    let words: Vec<_> = tail.split(' ').collect();
    Some(Stat {
        name: head.split_once('(')?.1.to_owned(),
        state: (*words.first()?).to_owned(),
        parent: words.get(1)?.parse().ok()?,
        start: words.get(19)?.parse().ok()?,
    })
}

fn command_line(pid: i32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = line.split(|byte| *byte == 0);
    words
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

/// What runs for one pod.
#[derive(Debug, Default)]
pub(crate) struct Family {
    /// The sandbox's ID, once there is a bundle.
    pub(crate) id: Option<String>,
    pub(crate) shim: Option<Process>,
    /// Everything that the shim started, but for:
    pub(crate) children: Vec<Process>,
    /// Who makes a template, and its machine: the pod does not live by them.
    pub(crate) makers: Vec<Process>,
    /// Commands that containerd runs for one of its containers.
    pub(crate) commands: Vec<Process>,
    /// Directory of the sandbox in Walnut's run directory: its name is in that of its
    /// cgroups.
    pub(crate) dir: Option<PathBuf>,
}

impl Family {
    /// All of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Process> {
        let all = self.shim.iter().chain(&self.children);
        all.chain(&self.makers).chain(&self.commands)
    }

    /// Those whose name begins so.
    pub(crate) fn named(&self, name: &str) -> Vec<&Process> {
        let all = self.children.iter();
        all.filter(|p| p.name.starts_with(name)).collect()
    }
}

/// Finds what runs for the pod `name` of the containerd with this state directory.
pub(crate) fn family(state: &Path, name: &str) -> Family {
    let bundles = state.join("containerd/io.containerd.runtime.v2.task/k8s.io");
    let mut family = Family::default();
    let mut ids = Vec::new();
    for entry in fs::read_dir(bundles).into_iter().flatten().flatten() {
        let Ok(text) = fs::read(entry.path().join("config.json")) else {
            continue;
        };
        let spec: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        let annotation = |key: &str| spec["annotations"][key].as_str();
        if annotation("io.kubernetes.cri.sandbox-name") == Some(name) {
            ids.push(entry.file_name().to_string_lossy().into_owned());
            family.id = annotation("io.kubernetes.cri.sandbox-id").map(Into::into);
        }
    }
    let mut parents: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let Some(stat) = stat(pid) else { continue };
        let process = Process {
            pid,
            start: stat.start,
            name: stat.name,
        };
        if process.name.starts_with("containerd-shim") && stat.state != "Z" {
            let line = command_line(pid);
            let after = |flag: &str| {
                let at = line.iter().position(|word| word == flag)?;
                line.get(at + 1).cloned()
            };
            let here = line
                .iter()
                .any(|word| word.starts_with(state.to_str().unwrap()));
            if here && line.get(1).is_some_and(|word| word == "serve-pod") {
                if after("--id") == family.id && family.id.is_some() {
                    family.dir = after("--dir").map(Into::into);
                    family.shim = Some(process.clone());
                }
            } else if here && after("-id").is_some_and(|id| ids.contains(&id)) {
                family.commands.push(process.clone());
            }
        }
        parents.entry(stat.parent).or_default().push(process);
    }
    let mut next: Vec<_> = (family.shim.iter()).map(|shim| (shim.pid, false)).collect();
    while let Some((parent, makes)) = next.pop() {
        for child in parents.remove(&parent).unwrap_or_default() {
            let line = command_line(child.pid);
            let makes = makes || line.get(1).is_some_and(|word| word == "make-template");
            next.push((child.pid, makes));
            match makes {
                true => family.makers.push(child),
                false => family.children.push(child),
            }
        }
    }
    family
}
