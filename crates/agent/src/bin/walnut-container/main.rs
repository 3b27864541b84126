//! The agent's helper: one process per request, single-threaded because
//! libcontainer clones. It reads one request from its standard input (a
//! socket, see [`walnut_agent::wire`]), mounts storages and builds the
//! container, enters one or changes its limits, answers, waits until the agent
//! has the new process on its books, and ends.
//!
//! It never talks to the host, and keeps nothing between requests but what
//! lies in the container's own folders.

mod archive;
mod create;
mod devices;
mod exec;
mod failure;
mod files;
mod init;
mod link;
mod mounted;
mod program;
mod spec;
mod stdio;
mod storage;
mod update;
mod user;

use std::process::ExitCode;

use failure::Failure;
use link::{Done, Link};
use walnut_agent::wire::Verb;

fn main() -> ExitCode {
    if let Some(program) = init::is_meant() {
        return init::main(program);
    }
    if let Some(wanted) = mounted::is_meant() {
        return mounted::main(&wanted);
    }
    let mut link = match Link::from_stdin() {
        Ok(link) => link,
        Err(e) => {
            eprintln!("walnut-container: fatal: {e}");
            return ExitCode::FAILURE;
        }
    };
    let (request, payload) = match link.request() {
        Ok(Some(got)) => got,
        // The agent has gone or thought better of it.
        Ok(None) => return ExitCode::SUCCESS,
        Err(e) => return report(&mut link, Err(Failure::internal("read the request", e))),
    };
    let result = prepare().and_then(|()| match request.verb {
        Verb::Create => create::create(&payload),
        Verb::Exec => exec::exec(request.pid, &payload),
        Verb::Update => update::update(&payload),
    });
    report(&mut link, result)
}

/// What every process of a container inherits unless its spec says otherwise.
fn prepare() -> Result<(), Failure> {
    // The agent is exempt from the OOM killer; nothing else is.
    std::fs::write("/proc/self/oom_score_adj", "0")
        .map_err(|e| Failure::internal("reset oom_score_adj", e))?;
    // Where the processor is emulated, the agent starts this program at fixed addresses;
    // that is not the container's to inherit.
    // SAFETY: personality takes any value, and changes no memory.
    unsafe { libc::personality(0) };
    // SAFETY: umask takes any value and cannot fail.
    unsafe { libc::umask(0o022) };
    // A soft limit of 1024 keeps programs that walk their whole table quick;
    // whoever needs more may raise it, as redis and nginx do.
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 1024, 1 << 20)
        .map_err(|e| Failure::internal("set RLIMIT_NOFILE", e))
}

fn report(link: &mut Link, result: Result<Done, Failure>) -> ExitCode {
    match link.reply(result) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("walnut-container: cannot answer the agent: {e}");
            ExitCode::FAILURE
        }
    }
}
