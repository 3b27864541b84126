//! A process's standard streams: pipes, because programs reopen /dev/stdout,
//! which a socket does not allow; owned by the process's user, because it is
//! that user who reopens them.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown, pipe2};
use walnut_agent::wire::Ends;
use walnut_protocol::agent::Stdio;

use crate::failure::Failure;

/// The process's own ends; `None` where it gets /dev/null.
#[derive(Debug, Default)]
pub(crate) struct Own {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// A pipe for each announced stream: the agent's ends and the process's.
pub(crate) fn pipes(stdio: &Stdio, uid: u32, gid: u32) -> Result<(Ends, Own), Failure> {
    let mut ends = Ends::default();
    let mut own = Own::default();
    if stdio.stdin != 0 {
        let (read, write) = pipe(uid, gid)?;
        (own.stdin, ends.stdin) = (Some(read), Some(write));
    }
    if stdio.stdout != 0 {
        let (read, write) = pipe(uid, gid)?;
        (ends.stdout, own.stdout) = (Some(read), Some(write));
    }
    if stdio.stderr != 0 {
        let (read, write) = pipe(uid, gid)?;
        (ends.stderr, own.stderr) = (Some(read), Some(write));
    }
    Ok((ends, own))
}

fn pipe(uid: u32, gid: u32) -> Result<(OwnedFd, OwnedFd), Failure> {
    let (read, write) =
        pipe2(OFlag::O_CLOEXEC).map_err(|e| Failure::internal("make a pipe for stdio", e))?;
    // Both ends are one inode.
    fchown(
        read.as_fd(),
        Some(Uid::from_raw(uid)),
        Some(Gid::from_raw(gid)),
    )
    .map_err(|e| Failure::internal("give a stdio pipe to the process's user", e))?;
    Ok((read, write))
}
