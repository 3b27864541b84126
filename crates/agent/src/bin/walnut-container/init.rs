//! A first process for programs that are none: it starts the program, passes every signal
//! on to it, reaps what nobody else waits for, and ends as the program ends. The container
//! has it as `/dev/init` (`--init`).

use std::{
    convert::Infallible,
    ffi::{CString, OsString},
    io,
    os::unix::ffi::OsStringExt,
    process::ExitCode,
};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, SigmaskHow, Signal, sigprocmask},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, execvp, fork, setpgid},
};

/// Where a container finds it.
const PATH: &str = "/dev/init";

/// The program and its arguments, if this process is to be one.
pub(crate) fn is_meant() -> Option<Vec<OsString>> {
    let mut args = std::env::args_os();
    let meant = args.next().is_some_and(|name| name == PATH);
    (meant && args.next().is_some_and(|arg| arg == "--")).then(|| args.collect())
}

pub(crate) fn main(program: Vec<OsString>) -> ExitCode {
    match run(program) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("{PATH}: {e}");
            ExitCode::from(125)
        }
    }
}

fn run(program: Vec<OsString>) -> io::Result<u8> {
    let all = SigSet::all();
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), Some(&mut before))?;
    // SAFETY: this process has one thread.
    let child = match unsafe { fork() }? {
        ForkResult::Child => {
            let Err(errno) = become_program(program, &before);
            return Ok(match errno {
                Errno::ENOENT | Errno::ENOTDIR => 127,
                _ => 126,
            });
        }
        ForkResult::Parent { child } => child,
    };
    loop {
        match all.wait()? {
            Signal::SIGCHLD => {
                if let Some(code) = reap(child) {
                    return Ok(code);
                }
            }
            // It may have ended this moment: then SIGCHLD comes.
            signal => drop(nix::sys::signal::kill(child, signal)),
        }
    }
}

/// Waits for all that have ended; how the program has, if it is among them.
fn reap(child: Pid) -> Option<u8> {
    let mut code = None;
    loop {
        let (pid, ended) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
            Ok(WaitStatus::StillAlive) | Err(_) => return code,
            Ok(_) => continue,
        };
        if pid == child {
            code = Some(u8::try_from(ended).unwrap_or(255));
        }
    }
}

fn become_program(program: Vec<OsString>, mask: &SigSet) -> Result<Infallible, Errno> {
    // A group of its own, in front if there is a terminal, as a shell would have it.
    let own = Pid::from_raw(0);
    let _ = setpgid(own, own);
    // SAFETY: tcsetpgrp takes integers only; SIGTTOU is blocked, and so does not stop this.
    unsafe { libc::tcsetpgrp(0, libc::getpid()) };
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(mask), None)?;
    let args = program.into_iter().map(|arg| CString::new(arg.into_vec()));
    let args: Vec<_> = args.collect::<Result<_, _>>().map_err(|_| Errno::EINVAL)?;
    let name = args.first().ok_or(Errno::ENOENT)?;
    let failed = execvp(name, &args).inspect_err(|errno| {
        eprintln!("{}: {}", name.to_string_lossy(), errno.desc());
    })?;
    match failed {}
}
