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

use crate::gate::Line;

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
/// process's end of file. (A terminal stays open: it has other holders.) A stream that
/// breaks off has no successor, unless this is a machine's clone.
pub(crate) async fn feed<S: AsyncRead + Unpin>(
    mut stream: S,
    to: End,
    mut ended: watch::Receiver<bool>,
    line: Arc<Line<S>>,
) {
    let _pumping = line.pumping();
    let carry = async {
        loop {
            // Reserved, not touched: idle streams cost no memory.
            let mut buffer = Vec::with_capacity(CHUNK);
            let next = tokio::select! {
                biased;
                next = line.successor() => next,
                read = stream.read_buf(&mut buffer) => match read {
                    Ok(0) => return,
                    Ok(_) if write_all(&to, &buffer).await.is_err() => return,
                    Ok(_) => continue,
                    Err(_) => line.successor_if_shut().await,
                },
            };
            match next {
                Some(next) => stream = next,
                None => return,
            }
        }
    };
    tokio::select! {
        () = carry => {}
        _ = ended.wait_for(|e| *e) => {}
    }
}

/// From the process to the host, until every holder of the other end has
/// closed it; then the stream is half-closed. Where there is no stream, it is drained all
/// the same. A stream that the host closes means that nobody reads any more: then the pipe
/// is closed, and a process that goes on writing gets SIGPIPE, as it would on the host. (The
/// host closes none for a reader that may come back. A terminal stays open: it has other
/// holders.) In a machine's clone, what the stream has not taken goes to the one that takes
/// its place.
pub(crate) async fn drain<S: AsyncWrite + Unpin>(
    from: End,
    mut stream: Option<S>,
    line: Arc<Line<S>>,
) {
    let _pumping = line.pumping();
    loop {
        let Ok(mut ready) = from.readable().await else {
            break;
        };
        let _busy = line.pass(&mut stream).await;
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
        let mut bytes = buffer.get(..n).unwrap_or_default();
        while let (Some(to), false) = (stream.as_mut(), bytes.is_empty()) {
            match to.write(bytes).await {
                Ok(written @ 1..) => bytes = bytes.get(written..).unwrap_or_default(),
                _ => match line.replacement().await {
                    Some(next) => stream = next,
                    // SAFETY: asks for a property of a live descriptor.
                    None if unsafe { libc::isatty(from.as_raw_fd()) } == 1 => stream = None,
                    None => return,
                },
            }
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

    use crate::gate::Gate;

    fn line() -> Arc<Line<UnixStream>> {
        Line::new(Arc::default())
    }

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
        let feeder = tokio::spawn(feed(guest, end(write).unwrap(), ended, line()));
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
        let feeder = tokio::spawn(feed(guest, end(write).unwrap(), ended, line()));
        running.send(true).unwrap();
        feeder.await.unwrap();
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn stdout_is_drained_before_it_ends() {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let drainer = tokio::spawn(drain(end(read).unwrap(), Some(guest), line()));
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
    async fn a_reader_that_left_is_seen_by_the_process() {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (host, guest) = UnixStream::pair().unwrap();
        drop(host);
        let drainer = tokio::spawn(drain(end(read).unwrap(), Some(guest), line()));
        let written =
            tokio::task::spawn_blocking(move || File::from(write).write_all(&blob(1 << 20)));
        let error = written.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        drainer.await.unwrap();
    }

    #[tokio::test]
    async fn without_a_reader_a_process_goes_on() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let (host, guest) = UnixStream::pair().unwrap();
        drop(host);
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        for (from, to, stream) in [(read, write, None), (pty.master, pty.slave, Some(guest))] {
            let drainer = tokio::spawn(drain(end(from).unwrap(), stream, line()));
            let written =
                tokio::task::spawn_blocking(move || File::from(to).write_all(&blob(1 << 20)));
            written.await.unwrap().unwrap();
            drainer.await.unwrap();
        }
    }

    #[tokio::test]
    async fn output_waits_at_the_gate_and_goes_to_the_next_stream() {
        let gate = Arc::new(Gate::default());
        let line = Line::new(Arc::clone(&gate));
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let drainer = tokio::spawn(drain(end(read).unwrap(), Some(guest), Arc::clone(&line)));
        let mut write = File::from(write);
        write.write_all(b"before").unwrap();
        let mut got = [0; 6];
        host.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"before");
        gate.shut(std::time::Duration::from_secs(600)).await;
        write.write_all(b"meanwhile").unwrap();
        drop(write);
        let (mut clone, next) = UnixStream::pair().unwrap();
        line.give(Some(next)).unwrap();
        gate.open();
        let mut got = String::new();
        clone.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "meanwhile");
        drainer.await.unwrap();
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0, "and no other");
        // There is nobody to write to it any more.
        assert!(line.give(Some(UnixStream::pair().unwrap().0)).is_err());
    }

    #[tokio::test]
    async fn what_a_stream_did_not_take_is_not_lost() {
        let gate = Arc::new(Gate::default());
        let line = Line::new(Arc::clone(&gate));
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (mut host, guest) = tokio::io::duplex(4);
        let drainer = tokio::spawn(drain(end(read).unwrap(), Some(guest), Arc::clone(&line)));
        File::from(write).write_all(b"abcdefgh").unwrap();
        let mut got = [0; 2];
        host.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"ab");
        // It waits for a reader, so nobody waits for it.
        gate.shut(std::time::Duration::from_millis(5)).await;
        assert!(gate.is_busy());
        let mut rest = Vec::new();
        drop(host);
        let (mut clone, next) = tokio::io::duplex(64);
        line.give(Some(next)).unwrap();
        tokio::task::yield_now().await;
        gate.open();
        clone.read_to_end(&mut rest).await.unwrap();
        drainer.await.unwrap();
        // Up to four bytes were in the first stream's own buffer.
        assert!(b"abcdefgh".ends_with(&rest) && rest.len() >= 2, "{rest:?}");
    }

    #[tokio::test]
    async fn input_goes_on_with_the_next_stream() {
        /// As a connection that a machine's clone does not have any more.
        struct Either(Option<UnixStream>);
        impl AsyncRead for Either {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                context: &mut std::task::Context<'_>,
                buffer: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<io::Result<()>> {
                match &mut self.0 {
                    Some(stream) => std::pin::Pin::new(stream).poll_read(context, buffer),
                    None => std::task::Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                }
            }
        }
        let gate = Arc::new(Gate::default());
        let line = Line::new(Arc::clone(&gate));
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (_running, ended) = watch::channel(false);
        gate.shut(std::time::Duration::ZERO).await;
        let feeder = tokio::spawn(feed(
            Either(None),
            end(write).unwrap(),
            ended,
            Arc::clone(&line),
        ));
        let (mut host, guest) = UnixStream::pair().unwrap();
        line.give(Some(Either(Some(guest)))).ok().unwrap();
        gate.open();
        host.write_all(b"typed ").await.unwrap();
        let arrived = || crate::gate::unread(&read).unwrap() == 6;
        while !arrived() {
            tokio::task::yield_now().await;
        }
        // One that is alive has a successor too, and needs not break off for it.
        let (mut next, guest) = UnixStream::pair().unwrap();
        line.give(Some(Either(Some(guest)))).ok().unwrap();
        next.write_all(b"and more").await.unwrap();
        drop(host);
        let mut host = next;
        host.shutdown().await.unwrap();
        feeder.await.unwrap();
        let mut got = String::new();
        File::from(read).read_to_string(&mut got).unwrap();
        assert_eq!(got, "typed and more");
    }
}
