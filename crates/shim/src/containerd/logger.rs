//! Streams as containerd's clients name them: FIFOs, files (`file://`), and programs
//! that take a container's output (`binary://`).

use std::{
    fs,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::fcntl::OFlag;
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    process::{Child, Command},
    task::JoinHandle,
    time::timeout,
};
use tracing::{info, warn};
use walnut_sandbox::{Error, Input, Output, Result, StdioTargets, machine::process};

use crate::front::Streams;

/// Longest a program may take until it says that it is ready,
const READY: Duration = Duration::from_secs(30);
/// and after the end of its input until it ends.
const GRACE: Duration = Duration::from_secs(10);

/// A program that takes output.
#[derive(Debug)]
pub(super) struct Logger {
    pid: u32,
    /// Ends with it.
    task: JoinHandle<()>,
}

impl Logger {
    /// One that the program before started.
    pub(super) fn take_over(pid: u32) -> Self {
        Self {
            pid,
            task: tokio::spawn(process::reap(pid)),
        }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }
}

/// Whose streams they are.
pub(super) struct Whose<'a> {
    pub(super) namespace: &'a str,
    pub(super) id: &'a str,
}

/// Opens what streams are called; with a program that logs, that.
pub(super) async fn open(
    whose: Whose<'_>,
    streams: &Streams,
) -> Result<(StdioTargets, Option<Logger>)> {
    let some = |path: &str| (!path.is_empty()).then(|| PathBuf::from(path));
    let mut targets = StdioTargets {
        terminal: streams.terminal,
        stdin: some(&streams.stdin).map(Input::Path),
        stdout: None,
        stderr: None,
        returns: true,
    };
    // A program or a file that is named for stdout takes both.
    let (scheme, rest) = streams
        .stdout
        .split_once("://")
        .unwrap_or(("fifo", &streams.stdout));
    let (stdout, stderr, logger) = match scheme {
        "fifo" => {
            let errors = streams.stderr.strip_prefix("fifo://");
            let errors = errors.unwrap_or(&streams.stderr);
            (
                some(rest).map(Output::Path),
                some(errors).map(Output::Path),
                None,
            )
        }
        "file" => {
            let path = PathBuf::from(decode(rest.split('?').next().unwrap_or_default())?);
            make(&path)?;
            (
                Some(Output::Path(path.clone())),
                Some(Output::Path(path)),
                None,
            )
        }
        "binary" => {
            let (stdout, stderr, logger) = start(whose, rest).await?;
            (Some(stdout), Some(stderr), Some(logger))
        }
        other => {
            return Err(Error::Invalid(format!(
                "send output to {}: {other} is none of fifo, file and binary",
                streams.stdout
            )));
        }
    };
    targets.stdout = stdout;
    // A terminal has one output.
    targets.stderr = stderr.filter(|_| !streams.terminal);
    Ok((targets, logger))
}

/// Makes a file, and its directory.
fn make(path: &Path) -> Result<()> {
    let failed = |what| {
        move |source| Error::Io {
            what,
            path: path.to_owned(),
            source,
        }
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed("create the directory of"))?;
    }
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .map_err(failed("create"))?;
    Ok(())
}

/// Starts a program that takes output: stdout at descriptor 3, stderr at 4; it closes
/// descriptor 5 when it is ready.
async fn start(whose: Whose<'_>, uri: &str) -> Result<(Output, Output, Logger)> {
    let (program, args) = command_line(uri)?;
    let failed = |e: &dyn std::fmt::Display| {
        Error::Invalid(format!(
            "start {} to take the output: {e}",
            program.display()
        ))
    };
    let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC);
    let (stdout, to_stdout) = pipe().map_err(|e| failed(&e))?;
    let (stderr, to_stderr) = pipe().map_err(|e| failed(&e))?;
    let (ready, to_ready) = pipe().map_err(|e| failed(&e))?;
    let mut command = Command::new(&program);
    command
        .args(args)
        .env("CONTAINER_ID", whose.id)
        .env("CONTAINER_NAMESPACE", whose.namespace)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let fds = [stdout.as_raw_fd(), stderr.as_raw_fd(), to_ready.as_raw_fd()];
    // SAFETY: between fork and exec only async-signal-safe calls are made.
    unsafe {
        command.pre_exec(move || hand_over(fds));
    }
    let mut child = command.spawn().map_err(|e| failed(&e))?;
    drop((stdout, stderr, to_ready));
    if let Err(e) = until_ready(ready).await {
        let _ = child.kill().await;
        return Err(failed(&e));
    }
    // It takes the rest of the output, however the sandbox ends, and goes then.
    let logger = Logger {
        pid: child.id().unwrap_or_default(),
        task: tokio::spawn(reap(child, program)),
    };
    Ok((Output::pipe(to_stdout), Output::pipe(to_stderr), logger))
}

/// Program and arguments of `/path?name=value&flag`.
fn command_line(uri: &str) -> Result<(PathBuf, Vec<String>)> {
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let program = PathBuf::from(decode(path)?);
    if !program.is_absolute() {
        return Err(Error::Invalid(format!(
            "send output to binary://{uri}: not an absolute path"
        )));
    }
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        args.push(decode(&name.replace('+', " "))?);
        if !value.is_empty() {
            args.push(decode(&value.replace('+', " "))?);
        }
    }
    Ok((program, args))
}

/// Undoes the percent signs of a URI.
fn decode(text: &str) -> Result<String> {
    let bad = || Error::Invalid(format!("{text:?} is not a valid part of a URI"));
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let (high, low) = (digit(bytes.next()), digit(bytes.next()));
        let (high, low) = (high.ok_or_else(bad)?, low.ok_or_else(bad)?);
        decoded.push(u8::try_from(high * 16 + low).map_err(|_| bad())?);
    }
    String::from_utf8(decoded).map_err(|_| bad())
}

/// Puts descriptors at 3, 4 and 5.
fn hand_over(fds: [RawFd; 3]) -> std::io::Result<()> {
    let mut moved = fds;
    // SAFETY: fcntl and dup2 on descriptors of this process.
    unsafe {
        // Out of the way first: they may be 3 to 5 themselves.
        for fd in &mut moved {
            *fd = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, 6);
            if *fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        for (fd, number) in moved.into_iter().zip(3..) {
            if libc::dup2(fd, number) < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

async fn until_ready(ready: OwnedFd) -> std::io::Result<()> {
    let mut ready = pipe::Receiver::from_owned_fd(ready)?;
    let mut byte = [0];
    match timeout(READY, ready.read(&mut byte)).await {
        Ok(read) => read.map(|_| ()),
        Err(_) => Err(std::io::Error::other("it does not say that it is ready")),
    }
}

async fn reap(mut child: Child, program: PathBuf) {
    match child.wait().await {
        Ok(status) => info!("{} ended: {status}", program.display()),
        Err(e) => warn!("wait for {}: {e}", program.display()),
    }
}

/// Waits for programs that have had all there is.
pub(super) async fn finish(loggers: Vec<Logger>) {
    for logger in loggers {
        if timeout(GRACE, logger.task).await.is_err() {
            warn!("a program that takes output does not end; it is left alone");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(stdout: &str) -> Streams {
        Streams {
            stdout: stdout.into(),
            ..Streams::default()
        }
    }

    const WHOSE: fn() -> Whose<'static> = || Whose {
        namespace: "space",
        id: "box",
    };

    #[tokio::test]
    async fn a_file_is_made_for_both_outputs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a b/log");
        let uri = format!("file://{}", path.display().to_string().replace(' ', "%20"));
        let (targets, logger) = open(WHOSE(), &streams(&uri)).await.unwrap();
        assert!(path.exists() && logger.is_none());
        for output in [targets.stdout, targets.stderr] {
            assert!(matches!(output, Some(Output::Path(p)) if p == path));
        }
    }

    #[tokio::test]
    async fn a_program_is_started_and_told_whose_output_it_takes() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("logger");
        let script = "#!/bin/sh\n\
            echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\" >\"$2\"\n\
            exec 5>&-\ncat <&3 >>\"$2\"\ncat <&4 >>\"$2\"\n";
        fs::write(&program, script).unwrap();
        fs::set_permissions(
            &program,
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let file = dir.path().join("out");
        let uri = format!("binary://{}?to={}&bare", program.display(), file.display());
        let (targets, logger) = open(WHOSE(), &streams(&uri)).await.unwrap();
        for (output, text) in [(targets.stdout, "one\n"), (targets.stderr, "two\n")] {
            let Some(Output::Pipe(pipe)) = output else {
                unreachable!("{output:?}");
            };
            let pipe = pipe.take().unwrap();
            std::io::Write::write_all(&mut fs::File::from(pipe), text.as_bytes()).unwrap();
        }
        logger.unwrap().task.await.unwrap();
        let want = format!("space/box to {} bare\none\ntwo\n", file.display());
        assert_eq!(fs::read_to_string(&file).unwrap(), want);
    }

    #[tokio::test]
    async fn what_cannot_be_is_refused() {
        for (uri, says) in [
            ("binary://relative", "not an absolute path"),
            ("binary:///nowhere/at/all", "/nowhere/at/all"),
            ("tcp://host", "none of fifo, file and binary"),
            ("file:///a%zz", "not a valid part"),
        ] {
            let error = open(WHOSE(), &streams(uri)).await.map(|_| ()).unwrap_err();
            assert!(error.to_string().contains(says), "{uri}: {error}");
        }
    }
}
