//! `walnut-vsock`: the guest's sockets, served over vhost-user by a process that
//! can do nothing else. One per machine.

mod args;
mod backend;
mod jail;

use std::{
    fmt,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, net::UnixListener, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::{getsockopt, sockopt::AcceptConn},
        stat::{Mode, umask},
    },
};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use walnut_devices::vsock::{Config, Device, Error as DeviceError, Log, SocketDir};

use args::{Args, ArgsError, Command, Vhost};
use backend::Backend;
use jail::JailError;

/// Connections served at most.
const MAX_CONNECTIONS: u16 = 2048;
/// Descriptors for everything but connections.
const OTHER_FDS: u16 = 48;

/// Numbers of our own descriptors in the device's loop; kicks have the numbers
/// of their queues.
const MACHINE: u32 = 100;
const SIGNALS: u32 = 101;

/// Why the process could not serve, or could not go on.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Args(#[from] ArgsError),
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("cannot use --uds {0:?}: it names no file in a directory")]
    Uds(PathBuf),
    #[error("cannot enter the directory {0:?}: {1}; create it first")]
    Directory(PathBuf, #[source] Errno),
    #[error("cannot listen on {0:?} for the machine: {1}")]
    Listen(PathBuf, #[source] std::io::Error),
    #[error("descriptor {0} given by --vhost-fd is no Unix socket: {1}")]
    Descriptor(RawFd, #[source] Errno),
    #[error("cannot prepare the process ({0}): {1}")]
    Process(&'static str, #[source] Errno),
    #[error("cannot accept the machine's connection: {0}")]
    Accept(#[source] std::io::Error),
    #[error("the machine broke the vhost-user protocol: {0}")]
    Vhost(#[source] VhostError),
}

fn main() -> ExitCode {
    let command = match args::parse(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(e) => return fail(&e.into()),
    };
    let args = match command {
        Command::Serve(args) => args,
        Command::Help => {
            println!("{}", args::USAGE);
            return ExitCode::SUCCESS;
        }
        Command::Version => {
            println!("walnut-vsock {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
    };
    match serve(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn fail(e: &Error) -> ExitCode {
    eprintln!("walnut-vsock: {e}");
    ExitCode::FAILURE
}

/// Prepares, locks the door, serves.
fn serve(args: &Args) -> Result<(), Error> {
    if let Some(parent) = args.die_with_parent {
        jail::die_with_parent(parent)?;
    }
    let machine = open_machine(&args.vhost)?;
    let signals = signals()?;
    let (directory, name) = split(&args.uds)?;
    // The machine's socket is removed once it is connected, where that is possible.
    let socket = match &args.vhost {
        Vhost::Socket(path) if path.parent() == args.uds.parent() => path.file_name(),
        _ => None,
    };
    let dir = enter(&directory)?;
    let config = Config {
        cid: args.cid,
        name,
        max_connections: raise_limit()?,
        timeouts: Default::default(),
    };
    let log = Log::new(|message: fmt::Arguments<'_>| eprintln!("walnut-vsock: {message}"));
    let mut device = Device::new(config, SocketDir::current(), log)?;
    device.set_next_port(any_number());
    device.watch(&signals, SIGNALS, false)?;
    jail::enter(dir.as_fd(), args.die_with_parent.is_some())?;
    let backend = Arc::new(Mutex::new(Backend::new(device)));
    let result = run(&backend, machine, socket);
    // The device's socket goes with it.
    drop(backend);
    result
}

/// Some number, another in each process.
fn any_number() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    let number = RandomState::new().hash_one(std::process::id());
    u32::try_from(number >> 32).unwrap_or(0)
}

/// The other end of vhost-user.
enum Machine {
    Awaited(UnixListener),
    Connected(BackendReqHandler<Mutex<Backend>>),
}

type Shared = Arc<Mutex<Backend>>;

fn lock(backend: &Shared) -> std::sync::MutexGuard<'_, Backend> {
    // One thread: nobody can have panicked with it.
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}

fn connected(backend: &Shared, stream: UnixStream) -> Result<Machine, Error> {
    lock(backend).device.watch(&stream, MACHINE, false)?;
    let handler = BackendReqHandler::from_stream(stream, backend.clone());
    Ok(Machine::Connected(handler))
}

/// The loop. Ends well when the machine disconnects or a signal says so.
fn run(backend: &Shared, machine: Socket, path: Option<&std::ffi::OsStr>) -> Result<(), Error> {
    let mut machine = match machine {
        Socket::Listening(listener) => {
            lock(backend).device.watch(&listener, MACHINE, false)?;
            Machine::Awaited(listener)
        }
        Socket::Connected(stream) => connected(backend, stream)?,
    };
    let mut events = Vec::new();
    loop {
        lock(backend).device.wait(&mut events)?;
        for event in events.drain(..) {
            match (event, &mut machine) {
                (SIGNALS, _) => return Ok(()),
                (MACHINE, Machine::Awaited(listener)) => {
                    let (stream, _) = listener.accept().map_err(Error::Accept)?;
                    if let Some(path) = path {
                        // Nobody else may connect, so nobody needs to find it.
                        let _ = nix::unistd::unlink(path);
                    }
                    machine = connected(backend, stream)?;
                }
                (MACHINE, Machine::Connected(handler)) => match handler.handle_request() {
                    Ok(()) | Err(VhostError::SocketRetry(_)) => {}
                    Err(
                        VhostError::Disconnected
                        | VhostError::PartialMessage
                        | VhostError::SocketBroken(_),
                    ) => return Ok(()),
                    Err(e) => return Err(Error::Vhost(e)),
                },
                // A kick: the run below looks at all queues.
                _ => {}
            }
        }
        lock(backend).run();
    }
}

/// The machine's socket before it is served.
enum Socket {
    Listening(UnixListener),
    Connected(UnixStream),
}

fn open_machine(vhost: &Vhost) -> Result<Socket, Error> {
    match vhost {
        Vhost::Socket(path) => {
            close_others(None)?;
            let old = umask(Mode::from_bits_truncate(0o177));
            let listener = UnixListener::bind(path);
            umask(old);
            let listener = listener.map_err(|e| Error::Listen(path.clone(), e))?;
            Ok(Socket::Listening(listener))
        }
        Vhost::Fd(fd) => {
            if *fd <= 2 {
                return Err(Error::Descriptor(*fd, Errno::EBADF));
            }
            close_others(Some(*fd))?;
            nix::fcntl::fcntl(
                // SAFETY: only borrowed for the check that it is open at all.
                unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) },
                nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
            )
            .map_err(|e| Error::Descriptor(*fd, e))?;
            // SAFETY: it is open, and the command line has made it ours.
            let fd = unsafe { OwnedFd::from_raw_fd(*fd) };
            let listening =
                getsockopt(&fd, AcceptConn).map_err(|e| Error::Descriptor(fd.as_raw_fd(), e))?;
            Ok(if listening {
                Socket::Listening(UnixListener::from(fd))
            } else {
                let stream = UnixStream::from(fd);
                // Requests are read whole.
                stream.set_nonblocking(false).map_err(Error::Accept)?;
                Socket::Connected(stream)
            })
        }
    }
}

/// Closes whatever else the starter has left open.
fn close_others(keep: Option<RawFd>) -> Result<(), Error> {
    let close = |from: u32, to: u32| {
        // SAFETY: at this point nothing but the standard streams and `keep`,
        // which both ranges leave out, is in use.
        Errno::result(unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) })
            .map_err(|e| Error::Process("closing inherited descriptors", e))
    };
    let keep = keep.and_then(|fd| u32::try_from(fd).ok());
    match keep {
        None => close(3, u32::MAX)?,
        Some(keep) => {
            if keep > 3 {
                close(3, keep - 1)?;
            }
            close(keep + 1, u32::MAX)?
        }
    };
    Ok(())
}

/// The signals that ask for an orderly end.
fn signals() -> Result<SignalFd, Error> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.add(Signal::SIGHUP);
    set.thread_block()
        .map_err(|e| Error::Process("blocking signals", e))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(|e| Error::Process("signalfd", e))
}

fn split(uds: &Path) -> Result<(PathBuf, String), Error> {
    let refuse = || Error::Uds(uds.to_path_buf());
    let name = uds
        .file_name()
        .and_then(|name| std::str::from_utf8(name.as_bytes()).ok())
        .ok_or_else(refuse)?;
    let parent = uds.parent().ok_or_else(refuse)?;
    let directory = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    Ok((directory.to_path_buf(), name.to_owned()))
}

/// Makes the sockets' directory the working directory, once and for all: names
/// in it stay short and cannot be led elsewhere.
fn enter(directory: &Path) -> Result<OwnedFd, Error> {
    let fail = |e| Error::Directory(directory.to_path_buf(), e);
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = nix::fcntl::open(directory, flags, Mode::empty()).map_err(fail)?;
    nix::unistd::fchdir(&dir).map_err(fail)?;
    Ok(dir)
}

/// Raises the descriptor limit as far as allowed and needed; returns how many
/// connections it leaves room for.
fn raise_limit() -> Result<usize, Error> {
    let fail = |e| Error::Process("descriptor limit", e);
    let wanted = u64::from(MAX_CONNECTIONS + OTHER_FDS);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(fail)?;
    let limit = soft.max(wanted.min(hard));
    if limit > soft {
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).map_err(fail)?;
    }
    let room = limit.min(wanted).saturating_sub(u64::from(OTHER_FDS));
    Ok(usize::try_from(room).unwrap_or(0).max(1))
}
