//! The command line. Small and fixed, so it is read by hand: an argument
//! parser would be a tenth of this program's memory.

use std::{
    ffi::OsString,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    path::PathBuf,
};

use walnut_sandbox::{Lock, Wanted};

const USAGE: &str = "\
Usage: containerd-shim-walnut-v2 serve --id ID --container-dir DIR --run-dir DIR
           --socket-fd N --lock-fd N --lease-fd N
       containerd-shim-walnut-v2 make-template --state-dir DIR --run-dir DIR
           --driver DRIVER --memory BYTES --vcpus N

The supervisor of a Walnut sandbox. It is started by `walnut`; it is not
yet started by containerd itself.

  --id ID              name of the container
  --container-dir DIR  its record and bundle
  --run-dir DIR        directory for the sandbox's sockets
  --socket-fd N        listening Unix socket; the Task API (v2 and v3) is served on it
  --lock-fd N          the container's lock, held
  --lease-fd N         a pipe: if it ends before a byte comes, whoever started
                       this is gone, and the sandbox is ended

make-template saves a machine of that size, once it has booted, for others to begin
from. A supervisor starts it; people use `walnut template create`.
";

/// What the program is to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Supervise a sandbox.
    Serve(Options),
    /// Make a template.
    MakeTemplate(MakeTemplate),
}

/// What `make-template` is told.
#[derive(Debug)]
pub(crate) struct MakeTemplate {
    pub(crate) state_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) wanted: Wanted,
}

impl MakeTemplate {
    /// The arguments that [`parse`] reads.
    pub(crate) fn args(&self) -> Vec<OsString> {
        let Wanted {
            driver,
            memory,
            vcpus,
        } = &self.wanted;
        vec![
            "make-template".into(),
            "--state-dir".into(),
            self.state_dir.clone().into(),
            "--run-dir".into(),
            self.run_dir.clone().into(),
            "--driver".into(),
            driver.as_str().into(),
            "--memory".into(),
            memory.to_string().into(),
            "--vcpus".into(),
            vcpus.to_string().into(),
        ]
    }
}

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
pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Command>, String> {
    match args.next().as_deref() {
        Some("serve") => serve(args).map(|options| Some(Command::Serve(options))),
        Some("make-template") => make_template(args).map(|make| Some(Command::MakeTemplate(make))),
        Some("-h" | "--help" | "help") => {
            print!("{USAGE}");
            Ok(None)
        }
        Some("-v" | "--version" | "version") => {
            println!("containerd-shim-walnut-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(None)
        }
        other => Err(format!(
            "unknown command {:?}; starting from containerd is not supported yet, use `walnut run`\n\n{USAGE}",
            other.unwrap_or_default()
        )),
    }
}

fn make_template(mut args: impl Iterator<Item = String>) -> Result<MakeTemplate, String> {
    let (mut state_dir, mut run_dir) = (None, None);
    let (mut driver, mut memory, mut vcpus) = (None, None, None);
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        let bad = |e: &dyn std::fmt::Display| format!("{name} {value}: {e}");
        match name.as_str() {
            "--state-dir" => state_dir = Some(PathBuf::from(value)),
            "--run-dir" => run_dir = Some(PathBuf::from(value)),
            "--driver" => driver = Some(value.parse().map_err(|e| bad(&e))?),
            "--memory" => memory = Some(value.parse().map_err(|e| bad(&e))?),
            "--vcpus" => vcpus = Some(value.parse().map_err(|e| bad(&e))?),
            _ => return Err(format!("unknown option {name}\n\n{USAGE}")),
        }
    }
    let missing = |name: &str| format!("make-template needs {name}\n\n{USAGE}");
    Ok(MakeTemplate {
        state_dir: state_dir.ok_or_else(|| missing("--state-dir"))?,
        run_dir: run_dir.ok_or_else(|| missing("--run-dir"))?,
        wanted: Wanted {
            driver: driver.ok_or_else(|| missing("--driver"))?,
            memory: memory.ok_or_else(|| missing("--memory"))?,
            vcpus: vcpus.ok_or_else(|| missing("--vcpus"))?,
        },
    })
}

fn serve(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
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
    Ok(Options {
        id: id.ok_or_else(|| missing("--id"))?,
        container_dir: container_dir.ok_or_else(|| missing("--container-dir"))?,
        run_dir: run_dir.ok_or_else(|| missing("--run-dir"))?,
        socket: socket.ok_or_else(|| missing("--socket-fd"))?,
        lock: Lock::inherited(lock.ok_or_else(|| missing("--lock-fd"))?),
        lease: lease.ok_or_else(|| missing("--lease-fd"))?,
    })
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

    fn args(text: &str) -> Result<Option<Command>, String> {
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
            ("make-template --memory x", "--memory x: invalid digit"),
            ("make-template --driver x", "use auto, vmm"),
            (
                "make-template --memory 1",
                "make-template needs --state-dir",
            ),
        ] {
            let error = args(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn what_a_maker_is_told_is_what_it_understands() {
        let make = MakeTemplate {
            state_dir: "/a b".into(),
            run_dir: "/r".into(),
            wanted: Wanted {
                driver: walnut_sandbox::machine::DriverChoice::QemuKvm,
                memory: 1 << 29,
                vcpus: 3,
            },
        };
        let args = make.args().into_iter().map(|a| a.into_string().unwrap());
        let Ok(Some(Command::MakeTemplate(read))) = parse(args) else {
            unreachable!("make-template is a command");
        };
        assert_eq!(read.wanted, make.wanted);
        assert_eq!(
            (read.state_dir, read.run_dir),
            (make.state_dir, make.run_dir)
        );
    }
}
