//! Descriptors that a process inherited for somebody's streams: pipes, files,
//! sockets, terminals.
//!
//! Others have the same open file, so its flags are left alone: what can make a
//! reader wait is opened anew, without waiting, or is asked not to wait each time
//! (sockets, which cannot be opened anew).

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    sync::{Arc, Mutex},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags},
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};
use walnut_machine::takeover::{Fd, Giver, Taker};

use crate::copy::Pending;

/// A descriptor that is handed on once.
#[derive(Debug, Clone)]
pub struct Inherited(Arc<Mutex<Option<OwnedFd>>>);

impl Inherited {
    /// One that nobody else uses.
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(Mutex::new(Some(fd))))
    }

    /// Takes it; once.
    pub fn take(&self) -> io::Result<OwnedFd> {
        let fd = self.0.lock().unwrap_or_else(|e| e.into_inner()).take();
        fd.ok_or_else(|| io::Error::other("a descriptor is used up"))
    }

    /// For the next program, if it has not been taken.
    pub(crate) fn state(&self, giver: &mut Giver) -> Option<Fd> {
        let fd = self.0.lock().unwrap_or_else(|e| e.into_inner());
        fd.as_ref().map(|fd| giver.give(fd))
    }

    /// That of the program before.
    pub(crate) fn take_over(state: Option<Fd>, taker: &mut Taker) -> io::Result<Self> {
        let fd = state.map(|fd| taker.take(fd)).transpose()?;
        Ok(Self(Arc::new(Mutex::new(fd))))
    }
}

/// One that is read, or written.
#[derive(Debug)]
pub(crate) enum Descriptor {
    /// Never makes anybody wait.
    File(File),
    /// Opened anew.
    Waits(AsyncFd<File>),
    Socket(AsyncFd<OwnedFd>),
    /// A pipe whose reader has gone.
    Gone,
}

impl Descriptor {
    /// For reading.
    pub(crate) fn reader(fd: OwnedFd) -> io::Result<Self> {
        Self::new(fd, Interest::READABLE)
    }

    /// For writing.
    pub(crate) fn writer(fd: OwnedFd) -> io::Result<Self> {
        Self::new(fd, Interest::WRITABLE)
    }

    fn new(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        let file = File::from(fd);
        let kind = file.metadata()?.file_type();
        if kind.is_file() {
            return Ok(Self::File(file));
        }
        if kind.is_socket() {
            let socket = register(OwnedFd::from(file), interest).map_err(|(_, e)| e)?;
            return Ok(Self::Socket(socket));
        }
        let again = OpenOptions::new()
            .read(interest.is_readable())
            .write(interest.is_writable())
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let again = match again {
            Ok(again) => again,
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(Self::Gone),
            Err(e) => return Err(e),
        };
        match register(again, interest) {
            Ok(waits) => Ok(Self::Waits(waits)),
            // What cannot be waited for, such as /dev/null, never makes one wait.
            Err((again, e)) if e.raw_os_error() == Some(libc::EPERM) => Ok(Self::File(again)),
            Err((_, e)) => Err(e),
        }
    }

    /// Reads what there is; waits until there is something, or the end.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(_) | Self::Gone => self.read_now(buffer),
            Self::Waits(fd) => {
                fd.async_io(Interest::READABLE, |_| self.read_now(buffer))
                    .await
            }
            Self::Socket(fd) => {
                fd.async_io(Interest::READABLE, |_| self.read_now(buffer))
                    .await
            }
        }
    }

    /// Reads what there is, which may be nothing yet ([`io::ErrorKind::WouldBlock`]).
    pub(crate) fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match self {
            Self::File(file) => (&*file).read(buffer),
            Self::Waits(fd) => fd.get_ref().read(buffer),
            Self::Socket(fd) => {
                let received = rustix::net::recv(fd, &mut *buffer, RecvFlags::DONTWAIT);
                received.map(|(read, _)| read).map_err(io::Error::from)
            }
            Self::Gone => Ok(0),
        };
        match read {
            // A terminal whose other side has gone.
            Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(0),
            other => other,
        }
    }

    /// Writes some of what lies there, and takes that away, in one step; waits until some
    /// can be written.
    pub(crate) async fn write(&self, from: &Pending) -> io::Result<usize> {
        match self {
            Self::File(file) => {
                let mut file = file;
                from.written(|bytes| file.write(bytes))
            }
            Self::Waits(fd) => {
                let write = |mut file: &File| from.written(|bytes| file.write(bytes));
                fd.async_io(Interest::WRITABLE, write).await
            }
            Self::Socket(fd) => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let send = |fd: &OwnedFd| {
                    from.written(|bytes| {
                        rustix::net::send(fd.as_fd(), bytes, flags).map_err(Errno::into)
                    })
                };
                fd.async_io(Interest::WRITABLE, send).await
            }
            Self::Gone => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// For the next program.
    pub(crate) fn state(&self, giver: &mut Giver) -> DescriptorState {
        match self {
            Self::File(file) => DescriptorState::File(giver.give(file)),
            Self::Waits(fd) => DescriptorState::Waits(giver.give(fd.get_ref())),
            Self::Socket(fd) => DescriptorState::Socket(giver.give(fd.get_ref())),
            Self::Gone => DescriptorState::Gone,
        }
    }

    /// That of the program before.
    pub(crate) fn take_over(
        state: DescriptorState,
        interest: Interest,
        taker: &mut Taker,
    ) -> io::Result<Self> {
        Ok(match state {
            DescriptorState::File(fd) => Self::File(taker.take(fd)?.into()),
            DescriptorState::Waits(fd) => {
                let file = File::from(taker.take(fd)?);
                Self::Waits(register(file, interest).map_err(|(_, e)| e)?)
            }
            DescriptorState::Socket(fd) => {
                Self::Socket(register(taker.take(fd)?, interest).map_err(|(_, e)| e)?)
            }
            DescriptorState::Gone => Self::Gone,
        })
    }
}

/// A descriptor in a state ([`crate::machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum DescriptorState {
    File(Fd),
    Waits(Fd),
    Socket(Fd),
    Gone,
}

/// Gives what was not to be had back.
fn register<T: AsRawFd>(fd: T, interest: Interest) -> Result<AsyncFd<T>, (T, io::Error)> {
    // SAFETY: files and owned descriptors stay open, and the same, until they are dropped.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|e| e.into_parts())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn blocks(fd: impl AsFd) -> bool {
        let flags = rustix::fs::fcntl_getfl(fd).unwrap();
        !flags.contains(rustix::fs::OFlags::NONBLOCK)
    }

    #[tokio::test]
    async fn pipes_are_read_without_changing_them() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let shared = read.try_clone().unwrap();
        let reader = Descriptor::reader(read).unwrap();
        assert!(blocks(&shared));
        let mut buffer = [0; 8];
        let error = reader.read_now(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        rustix::io::write(&write, b"one").unwrap();
        assert_eq!(reader.read(&mut buffer).await.unwrap(), 3);
        drop(write);
        assert_eq!(reader.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn sockets_are_used_without_changing_them() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let shared = OwnedFd::from(ours.try_clone().unwrap());
        let both = Descriptor::reader(ours.into()).unwrap();
        assert!(blocks(&shared));
        (&theirs).write_all(b"in").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(both.read(&mut buffer).await.unwrap(), 2);
        let writer = Descriptor::writer(shared).unwrap();
        assert_eq!(writer.write(&Pending::from(*b"out")).await.unwrap(), 3);
        assert_eq!((&theirs).read(&mut buffer).unwrap(), 3);
        drop(theirs);
        assert_eq!(both.read(&mut buffer).await.unwrap(), 0);
        assert!(writer.write(&Pending::from(*b"out")).await.is_err());
    }

    #[tokio::test]
    async fn files_go_on_where_they_stood() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"one ").unwrap();
        let writer = Descriptor::writer(file.into()).unwrap();
        writer.write(&Pending::from(*b"two")).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one two");
        let mut file = File::open(&path).unwrap();
        file.read_exact(&mut [0; 4]).unwrap();
        let mut buffer = [0; 8];
        let reader = Descriptor::reader(file.into()).unwrap();
        assert_eq!(reader.read(&mut buffer).await.unwrap(), 3);
        let null = Descriptor::reader(File::open("/dev/null").unwrap().into()).unwrap();
        assert_eq!(null.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_pipe_without_a_reader_and_a_terminal_without_a_master() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        drop(read);
        let writer = Descriptor::writer(write).unwrap();
        assert!(writer.write(&Pending::from(*b"x")).await.is_err());
        let pty = nix::pty::openpty(None, None).unwrap();
        let reader = Descriptor::reader(pty.slave).unwrap();
        drop(pty.master);
        assert_eq!(reader.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[test]
    fn what_is_inherited_is_taken_once() {
        let inherited = Inherited::new(File::open("/dev/null").unwrap().into());
        let other = inherited.clone();
        assert!(inherited.take().is_ok() && other.take().is_err());
    }
}
