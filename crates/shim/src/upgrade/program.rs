//! The program that is to take this one's place. It is opened once; what is asked, tried
//! and executed is that open file, whatever its name stands for meanwhile.

use std::{
    env,
    ffi::{CString, OsString},
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, ffi::OsStringExt, process::CommandExt},
    },
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::AtFlags,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{SigSet, SigmaskHow, Signal, sigprocmask},
    },
    unistd::execveat,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use walnut_sandbox::machine::takeover::Giver;

use super::state::{FORMAT, STATE_MAX, State};

/// Where the next program finds the number of the state's descriptor.
pub(super) const VARIABLE: &str = "WALNUT_TAKE_OVER";
/// Digits of a file's digest that are shown.
const DIGITS: usize = 12;
/// Longest a program may take to say something, and how much of it is read.
const PATIENCE: Duration = Duration::from_secs(10);
const ANSWER_MAX: u64 = 4 << 10;
/// Signals that this process passes on ([`crate::oci`]): none may come while nobody does.
const PASSED: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// Which of all programs one is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Build {
    pub(crate) version: String,
    /// Of its file.
    pub(crate) digest: String,
}

/// What a program says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    version: String,
    /// The states that it goes on from.
    format: u32,
}

impl Build {
    /// This program.
    pub(crate) fn own() -> Result<Self> {
        // Whatever has become of its name.
        let file = File::open("/proc/self/exe").context("open this program")?;
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").into(),
            digest: digest(file).context("read this program")?,
        })
    }
}

fn digest(mut file: File) -> io::Result<String> {
    let mut digest = Sha256::new();
    io::copy(&mut file, &mut digest)?;
    let digits: String = digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(digits.get(..DIGITS).unwrap_or_default().to_owned())
}

/// What this program says of itself.
pub(crate) fn about() -> Result<()> {
    let about = About {
        version: env!("CARGO_PKG_VERSION").into(),
        format: FORMAT,
    };
    println!("{}", serde_json::to_string(&about)?);
    Ok(())
}

/// Whether this program could go on from the state on its standard input.
pub(crate) fn check() -> Result<()> {
    let mut bytes = Vec::new();
    let input = File::open("/proc/self/fd/0").context("open the state")?;
    let input = input.take(STATE_MAX + 1).read_to_end(&mut bytes);
    input.context("read the state")?;
    State::parse(&bytes).map(drop).map_err(anyhow::Error::msg)
}

/// A program that may be the next.
#[derive(Debug)]
pub(super) struct Program {
    file: File,
    path: PathBuf,
    pub(super) build: Build,
}

impl Program {
    /// The program at `path`; by itself, what is now where this one was.
    pub(super) fn open(path: Option<PathBuf>) -> Result<Self> {
        let path = match path {
            Some(path) if path.is_absolute() => path,
            Some(path) => bail!("upgrade to {}: not an absolute path", path.display()),
            None => own_path()?,
        };
        let open = || format!("open {}", path.display());
        let file = File::open(&path).with_context(open)?;
        if !file.metadata().with_context(open)?.is_file() {
            bail!("upgrade to {}: not a file", path.display());
        }
        let digest = digest(file.try_clone().with_context(open)?)
            .with_context(|| format!("read {}", path.display()))?;
        let mut program = Self {
            file,
            path,
            build: Build {
                version: String::new(),
                digest,
            },
        };
        let said = program.ask(["take-over", "--about"], Stdio::null());
        let about = said.and_then(|said| {
            serde_json::from_str::<About>(&said).context("it does not say from what")
        });
        let about = about.with_context(|| {
            format!(
                "{} cannot take over from another program",
                program.path.display()
            )
        })?;
        if about.format != FORMAT {
            bail!(
                "{} (version {}) takes over from supervisors with states of format {}, and this one's is of format {FORMAT}",
                program.path.display(),
                about.version,
                about.format
            );
        }
        program.build.version = about.version;
        Ok(program)
    }

    /// A name by which this process, and its children while they begin, know the file.
    fn place(&self) -> PathBuf {
        let (pid, fd) = (std::process::id(), self.file.as_raw_fd());
        format!("/proc/{pid}/fd/{fd}").into()
    }

    /// What it says, if it ends well.
    fn ask(&self, args: [&str; 2], input: Stdio) -> Result<String> {
        let (said, says) = io::pipe().context("make a pipe")?;
        let mut command = Command::new(self.place());
        command
            .arg0("containerd-shim-walnut-v2")
            .args(args)
            .stdin(input)
            .stdout(says.try_clone().context("make a pipe")?)
            .stderr(says);
        let mut child = command.spawn().context("run it")?;
        // Which has the pipe's other end.
        drop(command);
        let text = heard(said, Instant::now() + PATIENCE);
        if text.is_err() {
            let _ = child.kill();
        }
        let status = child.wait().context("wait for it")?;
        let text = text?;
        match status.success() {
            true => Ok(text),
            false => bail!("{}", last(&text).unwrap_or(&status.to_string())),
        }
    }

    /// Becomes this program, with a state and its descriptors. Returns why not; then
    /// nothing has changed.
    pub(super) fn replace(&self, state: &State, giver: Giver) -> String {
        let replaced = self.try_replace(state, giver);
        match replaced {
            Ok(never) => match never {},
            Err(e) => format!("{}: {e:#}", self.path.display()),
        }
    }

    fn try_replace(&self, state: &State, mut giver: Giver) -> Result<std::convert::Infallible> {
        let bytes = state.pack().map_err(anyhow::Error::msg)?;
        let memory = sealed(&bytes).context("write the state")?;
        let input = memory.try_clone().context("hand over the state")?;
        self.ask(["take-over", "--check"], input.into())
            .context("it cannot go on from this one's state")?;
        giver.give(&memory);
        let args = env::args_os().map(c_string).collect::<Result<Vec<_>>>()?;
        let entry = OsString::from(format!("{VARIABLE}={}", memory.as_raw_fd()));
        let others = env::vars_os().map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            name
        });
        let entries = others.chain([entry]).map(c_string);
        let entries = entries.collect::<Result<Vec<_>>>()?;
        let mask = SigSet::from_iter(PASSED);
        let mut before = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), Some(&mut before))
            .context("block signals")?;
        let exposed = giver.expose();
        let failed = match &exposed {
            // The file itself: a script, whose interpreter would have no name for it, is
            // refused.
            Ok(_) => execveat(&self.file, c"", &args, &entries, AtFlags::AT_EMPTY_PATH)
                .err()
                .map(io::Error::from),
            Err(e) => Some(io::Error::other(e.to_string())),
        };
        drop(exposed);
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
        Err(failed.unwrap_or_else(|| io::Error::other("nothing happened"))).context("execute it")
    }
}

/// Lets the signals come that were held up while the program was replaced.
pub(super) fn unblock() -> Result<()> {
    let mask = SigSet::from_iter(PASSED);
    sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&mask), None).context("unblock signals")
}

fn c_string(text: OsString) -> Result<CString> {
    CString::new(text.into_vec()).context("a NUL in an argument")
}

/// Where this program lay; another one may lie there now.
fn own_path() -> Result<PathBuf> {
    let path = fs::read_link("/proc/self/exe").context("find this program's place")?;
    let gone = path.as_os_str().as_bytes().strip_suffix(b" (deleted)");
    Ok(gone.map_or(path.clone(), |path| {
        PathBuf::from(std::ffi::OsStr::from_bytes(path))
    }))
}

/// Memory with these bytes, which nobody can change.
fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memory = memfd_create("walnut-state", flags)?;
    let mut file = File::from(memory);
    file.write_all(bytes)?;
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// What comes through a pipe until its end.
fn heard(mut pipe: io::PipeReader, deadline: Instant) -> Result<String> {
    let mut text = Vec::new();
    let most = usize::try_from(ANSWER_MAX).unwrap_or(usize::MAX);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut ends = [PollFd::new(
            std::os::fd::AsFd::as_fd(&pipe),
            PollFlags::POLLIN,
        )];
        match poll(&mut ends, wait) {
            Ok(0) => bail!("it says nothing for {} s", PATIENCE.as_secs()),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(e).context("wait for its answer"),
        }
        let mut chunk = [0; 512];
        match pipe.read(&mut chunk).context("read its answer")? {
            0 => return Ok(String::from_utf8_lossy(&text).into_owned()),
            read => text.extend_from_slice(chunk.get(..read).unwrap_or_default()),
        }
        if text.len() > most {
            bail!("it says more than {ANSWER_MAX} bytes");
        }
    }
}

/// The last line that says something.
fn last(text: &str) -> Option<&str> {
    text.lines().map(str::trim).rfind(|line| !line.is_empty())
}
