//! What `serve-bundle` is told.

use std::{os::fd::OwnedFd, path::PathBuf};

use walnut_sandbox::Lock;

use crate::options::inherited;

/// Where a supervisor lives: in which network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lives {
    /// The one it was started in.
    Here,
    /// One of its own.
    New,
    /// An existing one.
    At(PathBuf),
}

/// The container, and what was inherited for it.
#[derive(Debug)]
pub(crate) struct ServeBundle {
    pub(crate) id: String,
    pub(crate) container_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) socket: OwnedFd,
    pub(crate) lock: Lock,
    pub(crate) lease: OwnedFd,
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    /// None where a terminal carries both.
    pub(crate) stderr: Option<OwnedFd>,
    pub(crate) network: Lives,
}

/// Reads the arguments after the command.
pub(crate) fn read(mut args: impl Iterator<Item = String>) -> Result<ServeBundle, String> {
    let (mut id, mut container_dir, mut run_dir) = (None, None, None);
    let (mut socket, mut lock, mut lease) = (None, None, None);
    let (mut stdin, mut stdout, mut stderr) = (None, None, None);
    let mut network = Lives::Here;
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        let fd = || inherited(&name, &value);
        match name.as_str() {
            "--id" => id = Some(value),
            "--container-dir" => container_dir = Some(PathBuf::from(value)),
            "--run-dir" => run_dir = Some(PathBuf::from(value)),
            "--socket-fd" => socket = Some(fd()?),
            "--lock-fd" => lock = Some(fd()?),
            "--lease-fd" => lease = Some(fd()?),
            "--stdin-fd" => stdin = Some(fd()?),
            "--stdout-fd" => stdout = Some(fd()?),
            "--stderr-fd" => stderr = Some(fd()?),
            "--network" if value == "new" => network = Lives::New,
            "--network" => network = Lives::At(value.into()),
            _ => return Err(format!("serve-bundle: unknown option {name}")),
        }
    }
    let missing = |name: &str| format!("serve-bundle needs {name}");
    Ok(ServeBundle {
        id: id.ok_or_else(|| missing("--id"))?,
        container_dir: container_dir.ok_or_else(|| missing("--container-dir"))?,
        run_dir: run_dir.ok_or_else(|| missing("--run-dir"))?,
        socket: socket.ok_or_else(|| missing("--socket-fd"))?,
        lock: Lock::inherited(lock.ok_or_else(|| missing("--lock-fd"))?),
        lease: lease.ok_or_else(|| missing("--lease-fd"))?,
        stdin: stdin.ok_or_else(|| missing("--stdin-fd"))?,
        stdout: stdout.ok_or_else(|| missing("--stdout-fd"))?,
        stderr,
        network,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_lines_are_refused() {
        let read = |line: &str| read(line.split_whitespace().map(str::to_owned)).map(drop);
        for (line, says) in [
            ("--id", "needs a value"),
            ("--id x", "needs --container-dir"),
            ("--stdin-fd 0", "not a descriptor above 2"),
            ("--stdin-fd 9999", "--stdin-fd 9999"),
            ("--what x", "unknown option --what"),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
