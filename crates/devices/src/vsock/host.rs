//! The host's side: the directory of the sockets, the listener, connects.

use std::{
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen,
            socket,
        },
        stat::{Mode, umask},
    },
};

use super::Error;

/// Longest file name: `_4294967295` must still fit into a socket address.
const MAX_NAME: usize = 96;

/// The directory that holds the device's sockets; names are resolved in it,
/// wherever it may have been moved, and nowhere else.
#[derive(Debug)]
pub struct SocketDir {
    // None: the process's working directory.
    fd: Option<OwnedFd>,
}

impl SocketDir {
    /// The process's working directory: for a process of the device's own, whose
    /// jail has no `/proc`.
    pub fn current() -> SocketDir {
        SocketDir { fd: None }
    }

    /// A directory held by a descriptor. Needs `/proc` later on.
    pub fn open(path: &Path) -> Result<SocketDir, Error> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty())
            .map_err(|e| Error::Directory(path.to_path_buf(), e.into()))?;
        Ok(SocketDir { fd: Some(fd) })
    }

    fn path(&self, name: &str) -> PathBuf {
        match &self.fd {
            None => PathBuf::from(name),
            Some(fd) => PathBuf::from(format!("/proc/self/fd/{}/{name}", fd.as_raw_fd())),
        }
    }

    fn address(&self, name: &str) -> Result<UnixAddr, Errno> {
        UnixAddr::new(self.path(name).as_os_str().as_bytes())
    }

    /// Connects to the socket `name` without ever waiting; `EAGAIN` means that
    /// its backlog is full.
    pub(super) fn connect(&self, name: &str) -> Result<OwnedFd, Errno> {
        let sock = stream()?;
        connect(sock.as_raw_fd(), &self.address(name)?)?;
        Ok(sock)
    }
}

fn stream() -> Result<OwnedFd, Errno> {
    socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        None,
    )
}

/// The socket that host programs connect to. Its file goes when it is dropped.
#[derive(Debug)]
pub(super) struct Listener {
    sock: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Creates the socket, mode 0600.
    pub(super) fn bind(dir: &SocketDir, name: &str) -> Result<Listener, Error> {
        if name.is_empty() || name.len() > MAX_NAME || name.contains(['/', '\0']) {
            return Err(Error::Name(name.to_owned()));
        }
        let fail = |e: Errno| Error::Listen(name.to_owned(), e.into());
        let sock = stream().map_err(fail)?;
        let address = dir.address(name).map_err(fail)?;
        // The mode is set by the mask at creation: a chmod afterwards would
        // leave a moment in which anybody may connect.
        let old = umask(Mode::from_bits_truncate(0o177));
        let bound = bind(sock.as_raw_fd(), &address);
        umask(old);
        bound.map_err(fail)?;
        let listener = Listener {
            sock,
            path: dir.path(name),
        };
        listen(&listener.sock, Backlog::MAXCONN).map_err(fail)?;
        Ok(listener)
    }

    pub(super) fn sock(&self) -> &OwnedFd {
        &self.sock
    }

    /// The next waiting client; `EAGAIN` when there is none.
    pub(super) fn accept(&self) -> Result<OwnedFd, Errno> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = accept4(self.sock.as_raw_fd(), flags)?;
        // SAFETY: accept4 has just made this descriptor, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Nothing to do about a failure: the directory's owner cleans up.
        let _ = nix::unistd::unlink(&self.path);
    }
}
