//! The three small handshakes around the service: the host's `CONNECT` to the
//! vsock device, the agent's ready line, and the number that opens a stream.

use std::io;
use std::path::Path;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest ready line that is read, newline included.
pub const READY_LINE_MAX: usize = 64;
/// Longest reply line to a `CONNECT`, newline included.
const CONNECT_REPLY_MAX: usize = 32;

/// Why a handshake failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The vsock socket could not be reached or broke off.
    #[error("vsock {what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// Nothing in the guest listens on the port, or the guest is gone.
    #[error("connect to guest port {port}: refused (nothing listens there, or the guest is gone)")]
    Refused {
        /// The guest port.
        port: u32,
    },
    /// The peer said something that is not in the protocol.
    #[error("vsock {what}: unexpected reply {reply:?}")]
    Unexpected {
        /// What was attempted.
        what: String,
        /// What came back, cut to a line.
        reply: String,
    },
}

/// Connects to `port` in the guest through the Unix socket `uds` of its vsock
/// device (the `CONNECT <port>\n` / `OK <host port>\n` convention).
pub async fn connect_hybrid(uds: &Path, port: u32) -> Result<UnixStream, HandshakeError> {
    let what = || format!("connect to guest port {port} through {}", uds.display());
    let io = |source| HandshakeError::Io {
        what: what(),
        source,
    };
    let mut stream = UnixStream::connect(uds).await.map_err(io)?;
    let line = format!("CONNECT {port}\n");
    if let Err(e) = stream.write_all(line.as_bytes()).await {
        return Err(if e.kind() == io::ErrorKind::BrokenPipe {
            HandshakeError::Refused { port }
        } else {
            io(e)
        });
    }
    // Byte by byte: what follows the newline already belongs to the stream.
    let mut reply = Vec::with_capacity(CONNECT_REPLY_MAX);
    while reply.len() < CONNECT_REPLY_MAX {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) => reply.push(byte),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                ) =>
            {
                return Err(HandshakeError::Refused { port });
            }
            Err(e) => return Err(io(e)),
        }
    }
    if reply.starts_with(b"OK ") {
        return Ok(stream);
    }
    Err(HandshakeError::Unexpected {
        what: what(),
        reply: String::from_utf8_lossy(&reply).into_owned(),
    })
}

/// The line an agent writes to [`crate::READY_PORT`] once it serves.
pub fn ready_line() -> String {
    format!("walnut-agent {}\n", crate::PROTOCOL)
}

/// The protocol number in a ready line, with or without its newline.
pub fn parse_ready_line(line: &str) -> Option<u32> {
    line.trim_end_matches('\n')
        .strip_prefix("walnut-agent ")?
        .parse()
        .ok()
}

/// Opens a stream: writes its number.
pub async fn write_stream_id<W: AsyncWrite + Unpin>(stream: &mut W, id: u32) -> io::Result<()> {
    stream.write_all(&id.to_le_bytes()).await
}

/// Reads the number that opens a stream.
pub async fn read_stream_id<R: AsyncRead + Unpin>(stream: &mut R) -> io::Result<u32> {
    let mut id = [0; 4];
    stream.read_exact(&mut id).await?;
    Ok(u32::from_le_bytes(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn served(reply: &'static [u8]) -> Result<UnixStream, HandshakeError> {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("vsock");
        let listener = UnixListener::bind(&uds).unwrap();
        let server = tokio::spawn(async move {
            let (mut peer, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            peer.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            peer.write_all(reply).await.unwrap();
        });
        let got = connect_hybrid(&uds, 1024).await;
        server.await.unwrap();
        got
    }

    #[tokio::test]
    async fn connect_leaves_the_streams_first_bytes() {
        let mut stream = served(b"OK 1073741824\nhello").await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn silent_close_is_a_refusal() {
        assert!(matches!(
            served(b"").await,
            Err(HandshakeError::Refused { port: 1024 })
        ));
    }

    #[tokio::test]
    async fn endless_reply_is_cut() {
        assert!(matches!(
            served(&[b'x'; 4096]).await,
            Err(HandshakeError::Unexpected { reply, .. }) if reply.len() == CONNECT_REPLY_MAX
        ));
    }

    #[test]
    fn ready_lines() {
        assert_eq!(parse_ready_line(&ready_line()), Some(crate::PROTOCOL));
        assert_eq!(parse_ready_line("walnut-agent x"), None);
        assert_eq!(parse_ready_line("HTTP/1.1 200 OK"), None);
    }
}
