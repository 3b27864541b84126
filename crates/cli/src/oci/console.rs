//! Terminals for containers: one side is given away, the other is the container's.

use std::{
    fs::File,
    io::{IoSlice, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use anyhow::{Context as _, Result};
use nix::{
    pty::{Winsize, openpty},
    sys::{
        socket::{ControlMessage, MsgFlags, sendmsg},
        termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
    },
};

/// A terminal of the host's, in raw mode: the container has its own, in its kernel.
#[derive(Debug)]
pub(super) struct Console {
    /// For whoever shows it.
    pub(super) master: OwnedFd,
    /// For the container.
    pub(super) slave: OwnedFd,
}

impl Console {
    /// A new one; of this size (columns, rows), if that is known.
    pub(super) fn open(size: Option<(u16, u16)>) -> Result<Self> {
        let size = size.map(|(columns, rows)| Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        });
        let pty = openpty(size.as_ref(), None).context("open a terminal")?;
        let mut mode = tcgetattr(&pty.slave).context("set the terminal up")?;
        cfmakeraw(&mut mode);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &mode).context("set the terminal up")?;
        Ok(Self {
            master: pty.master,
            slave: pty.slave,
        })
    }

    /// Gives the outer side to whoever listens at `socket` (as runc does: the name as the
    /// message, the descriptor beside it). What is left is the container's.
    pub(super) fn send(self, socket: &Path) -> Result<OwnedFd> {
        let send = || -> Result<()> {
            let mut stream = UnixStream::connect(socket)?;
            let name = nix::unistd::ttyname(&self.slave)?;
            let name = name.as_os_str().as_encoded_bytes();
            let fds = [self.master.as_raw_fd()];
            let sent = sendmsg::<()>(
                stream.as_raw_fd(),
                &[IoSlice::new(name)],
                &[ControlMessage::ScmRights(&fds)],
                MsgFlags::empty(),
                None,
            )?;
            stream.write_all(&name[sent..])?;
            Ok(())
        };
        send().with_context(|| {
            format!(
                "send the terminal to the console socket {}",
                socket.display()
            )
        })?;
        Ok(self.slave)
    }
}

/// Gives a terminal a size.
pub(super) fn resize(master: impl AsFd, (columns, rows): (u32, u32)) {
    let size = libc::winsize {
        ws_row: u16::try_from(rows).unwrap_or(u16::MAX),
        ws_col: u16::try_from(columns).unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which is valid. Where it fails the terminal
    // has gone.
    unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &size) };
}

/// Makes a terminal this process's standard streams, and its controlling terminal; it
/// leads a session that has none.
pub(super) fn become_controlled(slave: OwnedFd) -> Result<()> {
    let slave = File::from(slave);
    // SAFETY: TIOCSCTTY and dup2 take numbers; 0 to 2 are nobody's but the runtime's,
    // which keeps no state of them.
    let done = unsafe {
        libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) >= 0
            && (0..3).all(|fd| libc::dup2(slave.as_raw_fd(), fd) >= 0)
    };
    if done {
        return Ok(());
    }
    Err(std::io::Error::last_os_error()).context("take the terminal")
}
