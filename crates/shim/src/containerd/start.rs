//! `start`: the address of the supervisor of a container's sandbox.

use std::{
    env,
    fs::{self, OpenOptions},
    io::{self, PipeWriter, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use walnut_sandbox::SandboxDir;

use super::{Flags, Home, OPTIONS, SHIM_PID, SOCKET, bootstrap::Bootstrap};
use crate::options::ServePod;

/// Most that is read of the standard input.
const INPUT_MAX: u64 = 10 << 20;
/// Longest a supervisor that ends, or has just been started, is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at it.
const PAUSE: Duration = Duration::from_millis(5);
/// `/proc/<pid>/oom_score_adj` goes up to here.
const OOM_MAX: i32 = 1000;

/// What containerd is told, and a pipe that a byte is written to when it has been: a
/// supervisor that was started ends otherwise.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) answer: Vec<u8>,
    pub(crate) lease: Option<PipeWriter>,
}

/// Starts the supervisor unless there is one.
pub(crate) fn start(flags: &Flags) -> Result<Begun> {
    let mut input = Vec::new();
    io::stdin()
        .take(INPUT_MAX)
        .read_to_end(&mut input)
        .context("read the standard input")?;
    let names = (flags.id.as_str(), flags.namespace.as_str());
    let bootstrap = Bootstrap::read(&input, names, |name| env::var(name).ok());
    let home = Home::find(flags)?;
    // What others left is in nobody's way, but it lies there.
    if let Err(e) = home.dirs.sweep() {
        eprintln!("containerd-shim-walnut-v2: sweep: {e}");
    }
    let socket = home.socket();
    let address = format!("unix://{}", socket.display());
    let begun = Instant::now();
    let lease = loop {
        if let Some(dir) = home.dirs.take(&home.path)? {
            break Some(launch(flags, &home, dir, &bootstrap)?);
        }
        // It serves, or it will, or it ends.
        if UnixStream::connect(&socket).is_ok() {
            break None;
        }
        if begun.elapsed() > PATIENCE {
            bail!(
                "the supervisor of sandbox {} neither serves nor ends",
                home.group
            );
        }
        sleep(PAUSE);
    };
    write_whole(&home.bundle.join("address"), address.as_bytes())
        .context("write the address into the bundle")?;
    if let Ok(pid) = fs::read(home.path.join(SHIM_PID)) {
        write_whole(&home.bundle.join(SHIM_PID), &pid).context("write the PID into the bundle")?;
    }
    let answer = bootstrap.dialect.answer(&address);
    Ok(Begun {
        answer: answer.context("encode the answer")?,
        lease,
    })
}

/// Starts a supervisor, which has everything that it needs before anybody asks it.
fn launch(
    flags: &Flags,
    home: &Home,
    dir: SandboxDir,
    bootstrap: &Bootstrap,
) -> Result<PipeWriter> {
    if !bootstrap.options.is_empty() {
        let file = dir.path().join(OPTIONS);
        fs::write(file, &bootstrap.options).context("keep the runtime's options")?;
    }
    let listener = UnixListener::bind(dir.path().join(SOCKET)).context("listen")?;
    let socket = OwnedFd::from(listener);
    let (leased, lease) = io::pipe().context("make a pipe")?;
    let serve = ServePod {
        namespace: flags.namespace.clone(),
        id: home.group.clone(),
        address: flags.address.clone(),
        debug: flags.debug,
        dir: dir.path().to_owned(),
        ttrpc_address: bootstrap.ttrpc_address.clone(),
        socket_fd: socket.as_raw_fd(),
        lock_fd: dir.lock().as_fd().as_raw_fd(),
        lease_fd: leased.as_raw_fd(),
    };
    let keep = [serve.socket_fd, serve.lock_fd, serve.lease_fd];
    let program = env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command
        .args(serve.args())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log(&home.bundle));
    // SAFETY: between fork and exec only async-signal-safe calls are made.
    unsafe {
        command.pre_exec(move || detach(keep));
    }
    let mut child = command.spawn().context("start the supervisor")?;
    let pid = child.id();
    let set_up = || -> Result<()> {
        fs::write(dir.path().join(SHIM_PID), pid.to_string()).context("write its PID")?;
        adjust_oom(pid).context("set how readily it is killed")
    };
    if let Err(e) = set_up() {
        let _ = child.kill();
        let _ = child.wait();
        dir.remove()?;
        return Err(e);
    }
    Ok(lease)
}

/// A session of its own, and of what is open here only what it is to have.
fn detach(keep: [RawFd; 3]) -> io::Result<()> {
    /// linux/close_range.h.
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: these calls take numbers, and are async-signal-safe.
    unsafe {
        libc::setsid();
        if libc::syscall(libc::SYS_close_range, 3, u32::MAX, CLOSE_RANGE_CLOEXEC) != 0 {
            return Err(io::Error::last_os_error());
        }
        for fd in keep {
            if libc::fcntl(fd, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// The FIFO from which containerd takes a shim's log. Both ends are open, so that the
/// supervisor outlives containerd, and it never waits for a reader.
fn log(bundle: &Path) -> Stdio {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"))
        .map_or_else(|_| Stdio::null(), Stdio::from)
}

/// When memory is short, containerd is to be killed after its shims.
fn adjust_oom(pid: u32) -> io::Result<()> {
    let parent = nix::unistd::getppid();
    let text = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))?;
    let score: i32 = text.trim().parse().map_err(io::Error::other)?;
    let score = (score + 1).min(OOM_MAX);
    let file = format!("/proc/{pid}/oom_score_adj");
    match fs::write(file, score.to_string()) {
        // To be killed less readily than one is takes a privilege.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}

/// Writes a file that is never seen half.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let new = path.with_file_name(name);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&new)?;
    file.write_all(bytes)?;
    fs::rename(&new, path)
}
