//! Carries bytes between a process's pipes or terminal and the host's streams.
//!
//! One task per direction, one buffer each, held only while bytes flow. A
//! reader that does not read stops the writer: a task reads no more until what
//! it has is written.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;

/// Bytes carried at once.
const CHUNK: usize = 32 << 10;

/// A pipe end or a terminal's master, not blocking.
pub(crate) type End = Arc<AsyncFd<OwnedFd>>;

/// Registers a descriptor with the runtime.
pub(crate) fn end(fd: OwnedFd) -> io::Result<End> {
    // SAFETY: reads and sets the flags of a descriptor that is ours.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: an OwnedFd is one open descriptor for all its life.
    Ok(Arc::new(unsafe { AsyncFd::register(fd) }?))
}

fn count(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

async fn write_all(to: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = to.writable().await?;
        let written = ready.try_io(|fd| {
            // SAFETY: writes from a live slice to a live descriptor.
            count(unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) })
        });
        match written {
            Ok(Ok(n)) => bytes = bytes.get(n..).unwrap_or_default(),
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(e)) => return Err(e),
            Err(_not_ready) => {}
        }
    }
    Ok(())
}

/// From the host to the process. Ends with the stream, with the process, or
/// when the process has closed its end; then the pipe is closed, which is the
/// process's end of file. (A terminal stays open: it has other holders.)
pub(crate) async fn feed<S: AsyncRead + Unpin>(
    mut stream: S,
    to: End,
    mut ended: watch::Receiver<bool>,
) {
    let carry = async {
        loop {
            // Reserved, not touched: idle streams cost no memory.
            let mut buffer = Vec::with_capacity(CHUNK);
            if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0
                || write_all(&to, &buffer).await.is_err()
            {
                return;
            }
        }
    };
    tokio::select! {
        () = carry => {}
        _ = ended.wait_for(|e| *e) => {}
    }
}

/// From the process to the host, until every holder of the other end has
/// closed it; then the stream is half-closed. A stream that breaks off, or
/// none at all, is drained all the same: a process must not be stopped by a
/// reader that left.
pub(crate) async fn drain<S: AsyncWrite + Unpin>(from: End, mut stream: Option<S>) {
    loop {
        let Ok(mut ready) = from.readable().await else {
            break;
        };
        let mut buffer = vec![0; CHUNK];
        let read = ready.try_io(|fd| {
            // SAFETY: reads into a live slice from a live descriptor.
            count(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) })
        });
        let n = match read {
            Ok(Ok(0)) => break,
            Ok(Ok(n)) => n,
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => continue,
            // EIO is how a terminal says that nobody has it open any more.
            Ok(Err(_)) => break,
            Err(_not_ready) => continue,
        };
        if let Some(to) = stream.as_mut()
            && to
                .write_all(buffer.get(..n).unwrap_or_default())
                .await
                .is_err()
        {
            stream = None;
        }
    }
    if let Some(mut to) = stream {
        let _ = to.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;
    use std::fs::File;
    use std::io::{Read, Write};
    use tokio::net::UnixStream;

    fn blob(len: usize) -> Vec<u8> {
        let mut x = 1_u32;
        let next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            x.to_le_bytes()[3]
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    #[tokio::test]
    async fn stdin_arrives_whole_and_ends() {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (_running, ended) = watch::channel(false);
        let feeder = tokio::spawn(feed(guest, end(write).unwrap(), ended));
        let sent = blob(3 << 20);
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            File::from(read).read_to_end(&mut got).unwrap();
            got
        });
        host.write_all(&sent).await.unwrap();
        host.shutdown().await.unwrap();
        feeder.await.unwrap();
        assert!(reader.join().unwrap() == sent);
    }

    #[tokio::test]
    async fn the_end_of_the_process_closes_its_stdin() {
        let (_read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (running, ended) = watch::channel(false);
        let feeder = tokio::spawn(feed(guest, end(write).unwrap(), ended));
        running.send(true).unwrap();
        feeder.await.unwrap();
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn stdout_is_drained_before_it_ends() {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let drainer = tokio::spawn(drain(end(read).unwrap(), Some(guest)));
        let sent = blob(1 << 20);
        let expected = sent.clone();
        let writer = std::thread::spawn(move || File::from(write).write_all(&sent).unwrap());
        let mut got = Vec::new();
        host.read_to_end(&mut got).await.unwrap();
        drainer.await.unwrap();
        writer.join().unwrap();
        assert!(got == expected);
    }

    #[tokio::test]
    async fn a_reader_that_left_does_not_stop_the_process() {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (host, guest) = UnixStream::pair().unwrap();
        drop(host);
        let drainer = tokio::spawn(drain(end(read).unwrap(), Some(guest)));
        tokio::task::spawn_blocking(move || File::from(write).write_all(&blob(1 << 20)))
            .await
            .unwrap()
            .unwrap();
        drainer.await.unwrap();
    }
}
