//! One execution of one plugin (CNI 1.0.0 §2).

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Attachment, Cni, kind};
use crate::{Error, Result};

/// Longest that a plugin may take: some wait for an answer of the network's.
const DEADLINE: Duration = Duration::from_secs(60);
/// Most that is read of what it says.
const SAID_MAX: u64 = 1 << 20;
/// Most of it that is quoted.
const QUOTE_MAX: usize = 400;
/// Where plugins find the programs that they execute, whatever the caller's `PATH`.
const SYSTEM: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A plugin's error (§5).
#[derive(Deserialize)]
struct Refusal {
    code: Option<u32>,
    msg: Option<String>,
    details: Option<String>,
}

impl Cni<'_> {
    /// What the plugin says when it is given this configuration.
    pub(super) fn execute(
        &self,
        command: &'static str,
        attachment: &Attachment<'_>,
        plugin: &Map<String, Value>,
        config: &Map<String, Value>,
    ) -> Result<Vec<u8>> {
        let kind = kind(plugin);
        let program = self.find(kind)?;
        let refused = |why: String| Error::Refused {
            network: attachment.list.name().to_owned(),
            plugin: kind.to_owned(),
            attempt: match command {
                "ADD" => "add to",
                "DEL" => "take from",
                _ => "check on",
            },
            why,
        };
        let failed = |e: io::Error| refused(format!("execute it: {e}"));
        // Files, so that nobody waits for anybody to read.
        let (stdin, stdout, stderr) = (
            file().map_err(failed)?,
            file().map_err(failed)?,
            file().map_err(failed)?,
        );
        give(&stdin, config).map_err(failed)?;
        let mut child = Command::new(&program);
        let path = std::env::var("PATH").map_or(SYSTEM.into(), |path| format!("{path}:{SYSTEM}"));
        let dirs = std::env::join_paths(self.path);
        child
            .env("PATH", path)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", attachment.container)
            .env("CNI_NETNS", attachment.namespace.unwrap_or("".as_ref()))
            .env("CNI_IFNAME", attachment.interface)
            .env("CNI_ARGS", "IgnoreUnknown=1")
            .env("CNI_PATH", dirs.unwrap_or_default())
            .current_dir("/")
            .stdin(stdin)
            .stdout(stdout.try_clone().map_err(failed)?)
            .stderr(Stdio::from(stderr.try_clone().map_err(failed)?));
        if let Some(lock) = self.lock.map(|lock| lock.as_raw_fd()) {
            // SAFETY: fcntl is async-signal-safe; the descriptor is open in the parent, which
            // waits for the child to have executed.
            unsafe {
                child.pre_exec(move || match libc::fcntl(lock, libc::F_SETFD, 0) {
                    -1 => Err(io::Error::last_os_error()),
                    _ => Ok(()),
                });
            }
        }
        let child = child.spawn().map_err(failed)?;
        let status = end(child).map_err(failed)?;
        let said = read(stdout).map_err(failed)?;
        if status.success() {
            return Ok(said);
        }
        Err(refused(why(
            &said,
            &read(stderr).unwrap_or_default(),
            status,
        )))
    }
}

fn file() -> io::Result<File> {
    Ok(memfd_create(c"cni", MFdFlags::MFD_CLOEXEC)?.into())
}

fn give(mut file: &File, config: &Map<String, Value>) -> io::Result<()> {
    serde_json::to_writer(file, config)?;
    file.flush()?;
    file.rewind()
}

fn read(mut file: File) -> io::Result<Vec<u8>> {
    let mut said = Vec::new();
    file.rewind()?;
    file.take(SAID_MAX).read_to_end(&mut said)?;
    Ok(said)
}

/// Waits for the end, up to the deadline.
fn end(mut child: Child) -> io::Result<ExitStatus> {
    let pid = rustix::process::Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let until = Instant::now() + DEADLINE;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut wait = [rustix::event::PollFd::new(
            &pidfd,
            rustix::event::PollFlags::IN,
        )];
        let timeout = rustix::event::Timespec::try_from(left).map_err(io::Error::other)?;
        match rustix::event::poll(&mut wait, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(0) => {
                child.kill()?;
                child.wait()?;
                return Err(io::Error::other(format!(
                    "it did not end within {} seconds",
                    DEADLINE.as_secs()
                )));
            }
            Ok(_) => return child.wait(),
        }
    }
}

/// Why it failed, in one line.
fn why(stdout: &[u8], stderr: &[u8], status: ExitStatus) -> String {
    let text = match serde_json::from_slice::<Refusal>(stdout) {
        Ok(Refusal {
            code,
            msg: Some(msg),
            details,
        }) => {
            let details = details.filter(|details| !details.is_empty());
            let details = details
                .map(|details| format!(": {details}"))
                .unwrap_or_default();
            match code {
                Some(code) => format!("{msg}{details} (code {code})"),
                None => format!("{msg}{details}"),
            }
        }
        _ => {
            let said = [stderr, stdout].concat();
            match String::from_utf8_lossy(&said).trim() {
                "" => format!("it ended with {status}"),
                said => said.to_owned(),
            }
        }
    };
    let words: Vec<_> = text.split_whitespace().collect();
    let line = words.join(" ");
    match line.char_indices().nth(QUOTE_MAX) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}
