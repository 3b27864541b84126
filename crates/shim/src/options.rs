//! The command line. Small and fixed, so it is read by hand: an argument
//! parser would be a tenth of this program's memory.

use std::{
    os::fd::{FromRawFd, OwnedFd, RawFd},
    path::PathBuf,
};

use walnut_sandbox::Lock;

const USAGE: &str = "\
Usage: containerd-shim-walnut-v2 serve --id ID --container-dir DIR --run-dir DIR
           --socket-fd N --lock-fd N --lease-fd N

The supervisor of a Walnut sandbox. It is started by `walnut`; it is not
yet started by containerd itself.

  --id ID              name of the container
  --container-dir DIR  its record and bundle
  --run-dir DIR        directory for the sandbox's sockets
  --socket-fd N        listening Unix socket; the Task API (v2 and v3) is served on it
  --lock-fd N          the container's lock, held
  --lease-fd N         a pipe: if it ends before a byte comes, whoever started
                       this is gone, and the sandbox is ended
";

/// What `serve` is told.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) id: String,
    pub(crate) container_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) socket: OwnedFd,
    pub(crate) lock: Lock,
    pub(crate) lease: OwnedFd,
}

/// Reads the arguments; `None` if they only asked for help or the version, which
/// has been printed.
pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    match args.next().as_deref() {
        Some("serve") => {}
        Some("-h" | "--help" | "help") => {
            print!("{USAGE}");
            return Ok(None);
        }
        Some("-v" | "--version" | "version") => {
            println!("containerd-shim-walnut-v2 {}", env!("CARGO_PKG_VERSION"));
            return Ok(None);
        }
        other => {
            return Err(format!(
                "unknown command {:?}; starting from containerd is not supported yet, use `walnut run`\n\n{USAGE}",
                other.unwrap_or_default()
            ));
        }
    }
    let (mut id, mut container_dir, mut run_dir) = (None, None, None);
    let (mut socket, mut lock, mut lease) = (None, None, None);
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--id" => id = Some(value),
            "--container-dir" => container_dir = Some(PathBuf::from(value)),
            "--run-dir" => run_dir = Some(PathBuf::from(value)),
            "--socket-fd" => socket = Some(inherited(&name, &value)?),
            "--lock-fd" => lock = Some(inherited(&name, &value)?),
            "--lease-fd" => lease = Some(inherited(&name, &value)?),
            _ => return Err(format!("unknown option {name}\n\n{USAGE}")),
        }
    }
    let missing = |name: &str| format!("serve needs {name}\n\n{USAGE}");
    Ok(Some(Options {
        id: id.ok_or_else(|| missing("--id"))?,
        container_dir: container_dir.ok_or_else(|| missing("--container-dir"))?,
        run_dir: run_dir.ok_or_else(|| missing("--run-dir"))?,
        socket: socket.ok_or_else(|| missing("--socket-fd"))?,
        lock: Lock::inherited(lock.ok_or_else(|| missing("--lock-fd"))?),
        lease: lease.ok_or_else(|| missing("--lease-fd"))?,
    }))
}

/// Takes an inherited descriptor, and closes it on exec from here on.
fn inherited(name: &str, value: &str) -> Result<OwnedFd, String> {
    let fd: RawFd = value
        .parse()
        .ok()
        .filter(|fd| *fd > 2)
        .ok_or_else(|| format!("{name} {value}: not a descriptor above 2"))?;
    // SAFETY: fcntl on any number is sound; it fails on what is not open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(format!(
            "{name} {value}: {}",
            std::io::Error::last_os_error()
        ));
    }
    // SAFETY: the descriptor is open, and the command line gives it to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(text: &str) -> Result<Option<Options>, String> {
        parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn bad_lines_are_refused() {
        for (line, says) in [
            ("", "unknown command"),
            ("start", "not supported yet"),
            ("serve --id", "needs a value"),
            ("serve --socket-fd 1", "not a descriptor above 2"),
            ("serve --socket-fd 9999", "--socket-fd 9999"),
            ("serve --id x", "serve needs --container-dir"),
            ("serve --what x", "unknown option"),
        ] {
            let error = args(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
