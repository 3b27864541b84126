//! Connections of the host's to ports of the guest's loopback.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use ttrpc::Code;
use walnut_protocol::agent::ConnectPortRequest;

use crate::service::{internal, invalid, status};
use crate::streams::Pending;

/// Connections at a time.
const MAX: usize = 128;
/// Longest that loopback may take to say who listens.
const WITHIN: Duration = Duration::from_secs(10);
/// Bytes that are under way in each direction.
const BUFFER: usize = 8 << 10;

/// What connections there may be.
#[derive(Debug, Clone)]
pub(crate) struct Ports(Arc<Semaphore>);

impl Default for Ports {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX)))
    }
}

/// A connection that has its place, and no other end yet.
#[derive(Debug)]
pub(crate) struct Connected {
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
}

impl Ports {
    /// Connects to a port; `None` if there are too many connections.
    pub(crate) async fn connect(&self, port: u16, ipv6: bool) -> io::Result<Option<Connected>> {
        let Ok(place) = Arc::clone(&self.0).try_acquire_owned() else {
            return Ok(None);
        };
        let ip = match ipv6 {
            false => IpAddr::V4(Ipv4Addr::LOCALHOST),
            true => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let stream = timeout(WITHIN, TcpStream::connect(SocketAddr::new(ip, port))).await??;
        Ok(Some(Connected {
            stream,
            _place: place,
        }))
    }
}

impl Ports {
    /// Connects a stream to a port, as the host asks for it.
    pub(crate) async fn serve(
        &self,
        request: &ConnectPortRequest,
        streams: &Pending,
    ) -> ttrpc::Result<()> {
        let what = format!("connect to port {}", request.port);
        let port = u16::try_from(request.port).map_err(|e| invalid(format!("{what}: {e}")))?;
        let attempt = self.connect(port, request.ipv6).await;
        let connected = attempt.map_err(|e| match e.kind() {
            io::ErrorKind::ConnectionRefused => {
                status(Code::FAILED_PRECONDITION, format!("{what}: nobody listens"))
            }
            _ => internal(&what, e),
        });
        let stream = match (connected, request.stream) {
            (Ok(_), 0) => Err(invalid(format!("{what}: no stream is named"))),
            (Ok(connected), number) => Ok((connected, streams.claim(number).await)),
            (Err(e), number) => {
                streams.discard(number);
                Err(e)
            }
        };
        match stream? {
            (Some(connected), Ok(Some(stream))) => {
                connected.carry(stream);
                Ok(())
            }
            (None, _) => {
                let many = format!("{what}: there are too many connections");
                Err(status(Code::RESOURCE_EXHAUSTED, many))
            }
            (_, _) => {
                let missing = format!("{what}: there is no stream {}", request.stream);
                Err(status(Code::NOT_FOUND, missing))
            }
        }
    }
}

impl Connected {
    /// Carries bytes to and from `other` until both ends have closed.
    pub(crate) fn carry(mut self, mut other: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        tokio::spawn(async move {
            // Whichever end breaks off, the other one sees the end.
            let _ =
                copy_bidirectional_with_sizes(&mut self.stream, &mut other, BUFFER, BUFFER).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn bytes_and_ends_are_carried_both_ways() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let ports = Ports::default();
        let connected = ports.connect(port, false).await.unwrap().unwrap();
        let (mut host, guest) = duplex(64);
        connected.carry(guest);
        let (mut served, _) = listener.accept().await.unwrap();
        host.write_all(b"question").await.unwrap();
        host.shutdown().await.unwrap();
        let mut said = String::new();
        served.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "question");
        served.write_all(b"answer").await.unwrap();
        drop(served);
        said.clear();
        host.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "answer");
    }

    #[tokio::test]
    async fn there_are_not_too_many() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let ports = Ports::default();
        let mut all = Vec::new();
        for _ in 0..MAX {
            all.push(ports.connect(port, false).await.unwrap().unwrap());
            listener.accept().await.unwrap();
        }
        assert!(ports.connect(port, false).await.unwrap().is_none());
        all.pop();
        assert!(ports.connect(port, false).await.unwrap().is_some());
        drop((listener, all));
        let error = ports.connect(port, false).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
