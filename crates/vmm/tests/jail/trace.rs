//! What strace has seen of each thread since it was locked in.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

/// A thread.
#[derive(Debug, Default)]
pub(crate) struct Thread {
    pub(crate) name: String,
    locked_in: bool,
    /// Its calls since, with the arguments of one of each, and of all of ioctl.
    pub(crate) calls: BTreeMap<String, Vec<String>>,
}

/// The output of `strace -f -o FILE`, as far as it has been read.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    at: u64,
    rest: String,
    threads: BTreeMap<u32, Thread>,
}

impl Trace {
    /// Reads on.
    pub(crate) fn read(&mut self, path: &Path) {
        let mut file = File::open(path).unwrap();
        file.seek(SeekFrom::Start(self.at)).unwrap();
        let mut bytes = Vec::new();
        self.at += u64::try_from(file.read_to_end(&mut bytes).unwrap()).unwrap();
        self.rest += &String::from_utf8_lossy(&bytes);
        let text = std::mem::take(&mut self.rest);
        let end = text.rfind('\n').map_or(0, |at| at + 1);
        text[..end].lines().for_each(|line| self.line(line));
        self.rest = text[end..].to_owned();
    }

    fn line(&mut self, line: &str) {
        let Some((pid, event)) = line.split_once(' ') else {
            return;
        };
        let first = self.threads.is_empty();
        let thread = self.threads.entry(pid.parse().unwrap()).or_default();
        if first {
            thread.name = "walnut-vmm".to_owned();
        }
        // Not the end of a call, nor a signal.
        let Some((call, arguments)) = event.trim_start().split_once('(') else {
            return;
        };
        if !call.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return;
        }
        if thread.locked_in {
            let seen = thread.calls.entry(call.to_owned()).or_default();
            if seen.is_empty() || call == "ioctl" && !seen.iter().any(|old| old == arguments) {
                seen.push(arguments.to_owned());
            }
        } else if call == "seccomp" {
            thread.locked_in = true;
        } else if let ("prctl", Some(name)) = (call, arguments.strip_prefix("PR_SET_NAME, \"")) {
            thread.name = name.split('"').next().unwrap().to_owned();
        }
    }

    pub(crate) fn threads(&self) -> impl Iterator<Item = &Thread> {
        self.threads.values()
    }

    /// Calls a thread something else.
    pub(crate) fn call(&mut self, name: &str, other: &str) {
        for thread in self.threads.values_mut().filter(|it| it.name == name) {
            other.clone_into(&mut thread.name);
        }
    }

    /// The first thread's number.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.threads.keys().next().copied()
    }
}
