//! Which processes are a sandbox's: its supervisor, and what that has started.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use crate::{Error, Result, smaps::text};

/// Longest file of a process that is read here: the kernel's bound on arguments.
const LONGEST: u64 = 2 << 20;
/// Processes of one sandbox, at most; what its cgroup admits.
const MOST: usize = 1024;

/// The host's processes by who started them, as they were a moment ago.
#[derive(Debug)]
pub struct Processes {
    children: HashMap<u32, Vec<u32>>,
}

/// A process of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relative {
    /// What it is to the sandbox: `shim`, `walnut-vmm`, `qemu`, `vsock`, `virtiofsd`;
    /// others by their program's name.
    pub role: String,
    /// Its PID.
    pub pid: u32,
}

impl Processes {
    /// Looks at all that this user may see.
    pub fn scan() -> Result<Self> {
        let entries = fs::read_dir("/proc").map_err(|source| Error::Proc {
            path: "/proc".into(),
            source,
        })?;
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        for entry in entries.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            let stat = text(&entry.path().join("stat"), LONGEST).unwrap_or_default();
            if let Some(parent) = parent(&stat) {
                children.entry(parent).or_default().push(pid);
            }
        }
        Ok(Self { children })
    }

    /// A sandbox's processes, its supervisor first. One that makes a template or fills a
    /// pool works for the node, whoever started it.
    pub fn of(&self, supervisor: u32) -> Vec<Relative> {
        let mut found = vec![supervisor];
        let mut at = 0;
        while let Some(&pid) = found.get(at).filter(|_| found.len() < MOST) {
            let mut children = self.children.get(&pid).cloned().unwrap_or_default();
            children.sort_unstable();
            children.retain(|child| !found.contains(child) && !works_for_node(*child));
            found.extend(children);
            at += 1;
        }
        found
            .into_iter()
            .map(|pid| Relative {
                // One from a pool has another name.
                role: match pid == supervisor {
                    true => "shim".into(),
                    false => role(pid),
                },
                pid,
            })
            .collect()
    }
}

/// `12 (a name) S 1 …`: names may hold anything, so the last parenthesis counts.
fn parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}

fn arguments(pid: u32) -> Vec<String> {
    let path = PathBuf::from(format!("/proc/{pid}/cmdline"));
    let line = text(&path, LONGEST).unwrap_or_default();
    line.split_terminator('\0').map(str::to_owned).collect()
}

/// A supervisor starts itself once more, to make a template or fill a pool.
fn works_for_node(pid: u32) -> bool {
    let arguments = arguments(pid);
    arguments
        .first()
        .is_some_and(|word| word == "/proc/self/exe")
}

fn role(pid: u32) -> String {
    let arguments = arguments(pid);
    let program = arguments.first().map(String::as_str).unwrap_or_default();
    let name = Path::new(program).file_name().unwrap_or_default();
    match name.to_string_lossy().as_ref() {
        "walnut-vsock" => "vsock".into(),
        qemu if qemu.starts_with("qemu-system-") => "qemu".into(),
        "" => {
            let comm = text(Path::new(&format!("/proc/{pid}/comm")), LONGEST);
            comm.unwrap_or_default().trim().to_owned()
        }
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_confuse() {
        assert_eq!(parent("12 (a) S 9) R 7 12 12 0"), Some(7));
        assert_eq!(parent(""), None);
        assert_eq!(parent("1 (x) S"), None);
    }

    #[test]
    fn children_are_found_and_their_children() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "sleep 1000 & echo; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Its line says that it has started the other.
        let mut line = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let all = Processes::scan().unwrap().of(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        let roles: Vec<_> = all.iter().map(|r| r.role.as_str()).collect();
        // The second may not have become another program yet.
        assert!(matches!(roles[..], ["shim", "sleep" | "sh"]), "{all:?}");
        let sleep = i32::try_from(all[1].pid).unwrap();
        // SAFETY: takes two numbers.
        unsafe { libc::kill(sleep, libc::SIGKILL) };
    }
}
