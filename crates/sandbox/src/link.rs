//! A TCP connection on the host and a stream of the guest's, each copied to the other.

use std::{
    io,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::net::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpStream, UnixStream};
use walnut_machine::takeover::{Fd, Giver, Taker, hex};

use crate::copy::{CHUNK, Pending, stream};

/// Both ends, and what is on its way between them.
#[derive(Debug)]
pub(crate) struct Link {
    outside: TcpStream,
    guest: UnixStream,
    inward: Half,
    outward: Half,
}

/// One direction.
#[derive(Debug, Default)]
struct Half {
    pending: Pending,
    /// Nothing more will come.
    ended: AtomicBool,
}

/// A connection in a state ([`walnut_machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LinkState {
    outside: Fd,
    guest: Fd,
    inward: HalfState,
    outward: HalfState,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HalfState {
    #[serde(with = "hex")]
    pending: Vec<u8>,
    ended: bool,
}

/// A socket that is read and written through a reference.
trait End: AsFd {
    async fn readable(&self) -> io::Result<()>;
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize>;
    async fn writable(&self) -> io::Result<()>;
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;
}

macro_rules! end {
    ($socket:ty) => {
        impl End for $socket {
            async fn readable(&self) -> io::Result<()> {
                self.readable().await
            }
            fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
                self.try_read(buffer)
            }
            async fn writable(&self) -> io::Result<()> {
                self.writable().await
            }
            fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
                self.try_write(bytes)
            }
        }
    };
}

end!(TcpStream);
end!(UnixStream);

impl Half {
    /// Copies until the end of `from`, which `to` then sees.
    async fn copied(&self, from: &impl End, to: &impl End) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK / 4];
        loop {
            while !self.pending.is_empty() {
                to.writable().await?;
                match self.pending.written(|bytes| to.try_write(bytes)) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    written => drop(written?),
                }
            }
            if self.ended.load(Ordering::Relaxed) {
                // Again, if the program before has done so.
                return Ok(shutdown(to, Shutdown::Write)?);
            }
            from.readable().await?;
            match from.try_read(&mut buffer) {
                Ok(0) => self.ended.store(true, Ordering::Relaxed),
                Ok(read) => self.pending.add(buffer.get(..read).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn state(&self) -> HalfState {
        HalfState {
            pending: self.pending.all(),
            ended: self.ended.load(Ordering::Relaxed),
        }
    }
}

impl From<HalfState> for Half {
    fn from(state: HalfState) -> Self {
        Self {
            pending: state.pending.into(),
            ended: state.ended.into(),
        }
    }
}

impl Link {
    pub(crate) fn new(outside: TcpStream, guest: UnixStream) -> Self {
        Self {
            outside,
            guest,
            inward: Half::default(),
            outward: Half::default(),
        }
    }

    /// Returns when both directions have ended; whichever end breaks off, the other one
    /// sees the end.
    pub(crate) async fn carried(&self) {
        let inward = self.inward.copied(&self.outside, &self.guest);
        let outward = self.outward.copied(&self.guest, &self.outside);
        let _ = tokio::try_join!(inward, outward);
    }

    pub(crate) fn state(&self, giver: &mut Giver) -> LinkState {
        LinkState {
            outside: giver.give(&self.outside),
            guest: giver.give(&self.guest),
            inward: self.inward.state(),
            outward: self.outward.state(),
        }
    }
}

impl LinkState {
    pub(crate) fn take_over(self, taker: &mut Taker) -> io::Result<Link> {
        let outside = std::net::TcpStream::from(taker.take(self.outside)?);
        outside.set_nonblocking(true)?;
        Ok(Link {
            outside: TcpStream::from_std(outside)?,
            guest: stream(self.guest, taker)?,
            inward: self.inward.into(),
            outward: self.outward.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn what_is_written_at_one_end_comes_out_at_the_other() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (outside, _) = listener.accept().await.unwrap();
        let (guest, mut server) = UnixStream::pair().unwrap();
        let link = Link::new(outside, guest);
        let carried = tokio::spawn(async move { link.carried().await });
        let question = vec![7; 1 << 20];
        let (asked, got) = tokio::join!(
            async {
                client.write_all(&question).await.unwrap();
                client.shutdown().await
            },
            async {
                let mut got = Vec::new();
                server.read_to_end(&mut got).await.unwrap();
                server.write_all(b"answer").await.unwrap();
                drop(server);
                got
            }
        );
        asked.unwrap();
        assert!(got == question);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
        carried.await.unwrap();
    }
}
