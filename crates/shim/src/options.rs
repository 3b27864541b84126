//! The command line. Small and fixed, so it is read by hand: an argument
//! parser would be a tenth of this program's memory.

use std::{
    ffi::OsString,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use walnut_sandbox::{Lock, Wanted};

use crate::{again, containerd, oci};

const USAGE: &str = "\
Usage: containerd-shim-walnut-v2 serve --id ID --container-dir DIR --run-dir DIR
           --socket-fd N --lock-fd N --lease-fd N
       containerd-shim-walnut-v2 again --id ID --container-dir DIR --run-dir DIR --lock-fd N
       containerd-shim-walnut-v2 make-template --state-dir DIR --run-dir DIR
           --driver DRIVER --memory BYTES --vcpus N
       containerd-shim-walnut-v2 fill-pools --state-dir DIR --run-dir DIR
           [--pause-ms MS]
       containerd-shim-walnut-v2 stand-by --state-dir DIR --run-dir DIR
           --driver DRIVER --memory BYTES --vcpus N
       containerd-shim-walnut-v2 serve-bundle --id ID --container-dir DIR --run-dir DIR
           --socket-fd N --lock-fd N --lease-fd N
           --stdin-fd N --stdout-fd N [--stderr-fd N] [--network new|PATH]
       containerd-shim-walnut-v2 -namespace NAME -id ID -address SOCKET start|delete
       containerd-shim-walnut-v2 -info
       containerd-shim-walnut-v2 take-over --about|--check

The supervisor of a Walnut sandbox. It is started by `walnut`, or by containerd as the
runtime io.containerd.walnut.v2: that writes its options with one dash, and the
supervisor it starts is this program's `serve-pod`.

  --id ID              name of the container
  --container-dir DIR  its record and bundle
  --run-dir DIR        directory for the sandbox's sockets
  --socket-fd N        listening Unix socket; the Task API (v2 and v3) is served on it
  --lock-fd N          the container's lock, held
  --lease-fd N         a pipe: if it ends before a byte comes, whoever started
                       this is gone, and the sandbox is ended

again is what a supervisor becomes whose container has ended and is to be started again.

serve-bundle is what `walnut-oci` starts: without --stderr-fd the others are a terminal.

make-template saves a machine of that size, once it has booted, for others to begin
from. A supervisor starts it; people use `walnut template create`.

take-over is what a supervisor asks of the program that is to take its place: what
states of others it can go on from, and whether it can from the one on its standard
input. People use `walnut upgrade`.

fill-pools starts machines until as many stand by as are wanted; each is the supervisor
of a container to come (stand-by). People use `walnut pool set`.
";

/// What the program is to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Start a container again that has ended, and be its supervisor.
    Again(Options),
    /// Be the supervisor that another program was in this process, with its state.
    TakeOver(OwnedFd),
    /// Say what supervisors it can take over from.
    AboutTakingOver,
    /// Say whether it could go on from the state on its standard input.
    CheckTakingOver,
    /// Supervise a sandbox.
    Serve(Options),
    /// Make a template.
    MakeTemplate(MakeTemplate),
    /// Start what is missing in the pools.
    FillPools(Fill),
    /// Be what a pool is made of.
    StandBy(StandBy),
    /// What containerd asks for.
    Containerd(containerd::Action, containerd::Flags),
    /// Supervise a sandbox of containerd's.
    ServePod(ServePod),
    /// Supervise a container of the OCI command line.
    ServeBundle(oci::ServeBundle),
}

/// What `serve-pod` is told.
#[derive(Debug)]
pub(crate) struct ServePod {
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// containerd's socket, by which one knows whose sandbox it is.
    pub(crate) address: String,
    pub(crate) debug: bool,
    pub(crate) dir: PathBuf,
    /// Where events go.
    pub(crate) ttrpc_address: Option<String>,
    pub(crate) socket_fd: RawFd,
    pub(crate) lock_fd: RawFd,
    /// A pipe that ends before a byte comes if who started it has no use for it.
    pub(crate) lease_fd: RawFd,
}

impl ServePod {
    /// The arguments that [`parse`] reads.
    pub(crate) fn args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = ["serve-pod", "--namespace"].map(Into::into).into();
        args.extend([
            (&self.namespace).into(),
            "--id".into(),
            (&self.id).into(),
            "--address".into(),
            (&self.address).into(),
            "--dir".into(),
            (&self.dir).into(),
            "--socket-fd".into(),
            self.socket_fd.to_string().into(),
            "--lock-fd".into(),
            self.lock_fd.to_string().into(),
            "--lease-fd".into(),
            self.lease_fd.to_string().into(),
        ]);
        if let Some(address) = &self.ttrpc_address {
            args.extend(["--ttrpc-address".into(), address.into()]);
        }
        if self.debug {
            args.push("--debug".into());
        }
        args
    }

    fn read(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut namespace, mut id, mut address, mut dir) = (None, None, None, None);
        let (mut ttrpc_address, mut debug) = (None, false);
        let (mut socket, mut lock, mut lease) = (None, None, None);
        while let Some(name) = args.next() {
            if name == "--debug" {
                debug = true;
                continue;
            }
            let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--namespace" => namespace = Some(value),
                "--id" => id = Some(value),
                "--address" => address = Some(value),
                "--dir" => dir = Some(PathBuf::from(value)),
                "--ttrpc-address" => ttrpc_address = Some(value),
                "--socket-fd" => socket = Some(number(&name, &value)?),
                "--lock-fd" => lock = Some(number(&name, &value)?),
                "--lease-fd" => lease = Some(number(&name, &value)?),
                _ => return Err(format!("unknown option {name}\n\n{USAGE}")),
            }
        }
        let missing = |name: &str| format!("serve-pod needs {name}\n\n{USAGE}");
        Ok(Self {
            namespace: namespace.ok_or_else(|| missing("--namespace"))?,
            id: id.ok_or_else(|| missing("--id"))?,
            address: address.ok_or_else(|| missing("--address"))?,
            debug,
            dir: dir.ok_or_else(|| missing("--dir"))?,
            ttrpc_address,
            socket_fd: socket.ok_or_else(|| missing("--socket-fd"))?,
            lock_fd: lock.ok_or_else(|| missing("--lock-fd"))?,
            lease_fd: lease.ok_or_else(|| missing("--lease-fd"))?,
        })
    }
}

/// What `make-template` is told.
#[derive(Debug)]
pub(crate) struct MakeTemplate {
    pub(crate) state_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) wanted: Wanted,
}

/// What `stand-by` is told.
#[derive(Debug)]
pub(crate) struct StandBy {
    pub(crate) state_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) wanted: Wanted,
}

/// What `fill-pools` is told.
#[derive(Debug)]
pub(crate) struct Fill {
    pub(crate) state_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    /// Waited before anything is done.
    pub(crate) pause: Duration,
}

impl MakeTemplate {
    /// The arguments that [`parse`] reads.
    pub(crate) fn args(&self) -> Vec<OsString> {
        args(
            "make-template",
            (&self.state_dir, &self.run_dir),
            Some(&self.wanted),
        )
    }
}

impl StandBy {
    /// The arguments that [`parse`] reads.
    pub(crate) fn args(&self) -> Vec<OsString> {
        args(
            "stand-by",
            (&self.state_dir, &self.run_dir),
            Some(&self.wanted),
        )
    }
}

impl Fill {
    /// The arguments that [`parse`] reads.
    pub(crate) fn args(&self) -> Vec<OsString> {
        let mut args = args("fill-pools", (&self.state_dir, &self.run_dir), None);
        args.extend([
            "--pause-ms".into(),
            self.pause.as_millis().to_string().into(),
        ]);
        args
    }
}

fn args(command: &str, (state, run): (&Path, &Path), wanted: Option<&Wanted>) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![
        command.into(),
        "--state-dir".into(),
        state.into(),
        "--run-dir".into(),
        run.into(),
    ];
    if let Some(wanted) = wanted {
        let Wanted {
            driver,
            memory,
            vcpus,
        } = wanted;
        args.extend([
            "--driver".into(),
            driver.as_str().into(),
            "--memory".into(),
            memory.to_string().into(),
            "--vcpus".into(),
            vcpus.to_string().into(),
        ]);
    }
    args
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
        Some("again") => again::options(args).map(|options| Some(Command::Again(options))),
        Some("make-template") => {
            let (state_dir, run_dir, wanted) = machine("make-template", args)?;
            let wanted = wanted?;
            Ok(Some(Command::MakeTemplate(MakeTemplate {
                state_dir,
                run_dir,
                wanted,
            })))
        }
        Some("stand-by") => {
            let (state_dir, run_dir, wanted) = machine("stand-by", args)?;
            let wanted = wanted?;
            Ok(Some(Command::StandBy(StandBy {
                state_dir,
                run_dir,
                wanted,
            })))
        }
        Some("serve-pod") => ServePod::read(args).map(|serve| Some(Command::ServePod(serve))),
        Some("serve-bundle") => oci::read(args).map(|serve| Some(Command::ServeBundle(serve))),
        Some("take-over") => match args.next().as_deref() {
            Some("--about") => Ok(Some(Command::AboutTakingOver)),
            Some("--check") => Ok(Some(Command::CheckTakingOver)),
            _ => Err(format!("take-over needs --about or --check\n\n{USAGE}")),
        },
        Some("fill-pools") => fill_pools(args).map(|fill| Some(Command::FillPools(fill))),
        Some("-h" | "-help" | "--help" | "help") => {
            print!("{USAGE}");
            Ok(None)
        }
        Some("-v" | "-version" | "--version" | "version") => {
            println!("containerd-shim-walnut-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(None)
        }
        // As containerd writes it, with the action last.
        Some(flag) if flag.starts_with('-') => {
            let args = std::iter::once(flag.to_owned()).chain(args);
            let (action, flags) = containerd::parse(args)?;
            Ok(Some(Command::Containerd(action, flags)))
        }
        other => Err(format!(
            "unknown command {:?}\n\n{USAGE}",
            other.unwrap_or_default()
        )),
    }
}

fn fill_pools(args: impl Iterator<Item = String>) -> Result<Fill, String> {
    let mut args: Vec<String> = args.collect();
    let mut pause = Duration::ZERO;
    if let Some(at) = args.iter().position(|arg| arg == "--pause-ms") {
        let value = args.drain(at..args.len().min(at + 2)).nth(1);
        let value = value.ok_or("--pause-ms needs a value")?;
        let ms = value.parse();
        pause = Duration::from_millis(ms.map_err(|e| format!("--pause-ms {value}: {e}"))?);
    }
    let (state_dir, run_dir, _) = machine("fill-pools", args.into_iter())?;
    Ok(Fill {
        state_dir,
        run_dir,
        pause,
    })
}

/// The node's directories, and a machine, whose error is the caller's where it needs none.
type Machine = (PathBuf, PathBuf, Result<Wanted, String>);

fn machine(
    command: &'static str,
    mut args: impl Iterator<Item = String>,
) -> Result<Machine, String> {
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
    let missing = |name: &str| format!("{command} needs {name}\n\n{USAGE}");
    let wanted = || {
        Ok(Wanted {
            driver: driver.ok_or_else(|| missing("--driver"))?,
            memory: memory.ok_or_else(|| missing("--memory"))?,
            vcpus: vcpus.ok_or_else(|| missing("--vcpus"))?,
        })
    };
    Ok((
        state_dir.ok_or_else(|| missing("--state-dir"))?,
        run_dir.ok_or_else(|| missing("--run-dir"))?,
        wanted(),
    ))
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

/// From here on what this process logs goes to `log`.
pub(crate) fn log_to(log: &OwnedFd) {
    // SAFETY: both are descriptors of this process.
    unsafe { libc::dup2(log.as_raw_fd(), 2) };
}

/// Takes an inherited descriptor, and closes it on exec from here on.
pub(crate) fn inherited(name: &str, value: &str) -> Result<OwnedFd, String> {
    own(number(name, value)?).map_err(|e| format!("{name} {value}: {e}"))
}

/// The number of a descriptor that may be inherited.
fn number(name: &str, value: &str) -> Result<RawFd, String> {
    let fd = value.parse().ok().filter(|fd| *fd > 2);
    fd.ok_or_else(|| format!("{name} {value}: not a descriptor above 2"))
}

/// Takes a descriptor that the command line gives to this process.
pub(crate) fn own(fd: RawFd) -> std::io::Result<OwnedFd> {
    // SAFETY: fcntl on any number is sound; it fails on what is not open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(std::io::Error::last_os_error());
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
            ("start", "unknown command"),
            ("-id x start", "-namespace"),
            ("serve-pod --id x", "serve-pod needs --namespace"),
            ("serve-pod --lock-fd 2", "not a descriptor above 2"),
            ("serve --id", "needs a value"),
            ("serve --socket-fd 1", "not a descriptor above 2"),
            ("serve --socket-fd 9999", "--socket-fd 9999"),
            ("serve --id x", "serve needs --container-dir"),
            ("serve --what x", "unknown option"),
            ("make-template --memory x", "--memory x: invalid digit"),
            ("make-template --driver x", "use auto, vmm"),
            ("fill-pools --state-dir /s", "fill-pools needs --run-dir"),
            ("fill-pools --pause-ms", "--pause-ms needs a value"),
            ("fill-pools --pause-ms x", "--pause-ms x: invalid digit"),
            (
                "stand-by --state-dir /s --run-dir /r",
                "stand-by needs --driver",
            ),
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

    #[test]
    fn what_a_supervisor_is_told_is_what_it_understands() {
        let serve = ServePod {
            namespace: "k8s.io".into(),
            id: "pod".into(),
            address: "/c.sock".into(),
            debug: true,
            dir: "/r un".into(),
            ttrpc_address: Some("/c.ttrpc".into()),
            socket_fd: 7,
            lock_fd: 8,
            lease_fd: 9,
        };
        let args = serve.args().into_iter().map(|a| a.into_string().unwrap());
        let Ok(Some(Command::ServePod(read))) = parse(args) else {
            unreachable!("serve-pod is a command");
        };
        assert_eq!(format!("{read:?}"), format!("{serve:?}"));
    }
}
