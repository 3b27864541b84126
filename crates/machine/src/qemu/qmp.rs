//! A client for QEMU's monitor (QMP): one command at a time over one
//! connection, events kept aside.
//!
//! QEMU is only semi-trusted: a guest that broke out of it speaks here. Lines
//! are bounded, waiting is bounded, and nothing it says is taken for more than
//! a reply or a reason.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    net::UnixStream,
    sync::{mpsc, oneshot},
};

use crate::{Error, process};

/// Longest line that is accepted, in bytes. QEMU's longest answer to what is
/// asked here is below 1 KiB.
const LINE_MAX: usize = 64 * 1024;
/// How long a command may take. Stopping vCPUs is the slowest.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

type Reply = oneshot::Sender<Result<Value, String>>;

/// The client; its connection is served by a task that ends with it or with
/// QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    commands: mpsc::Sender<(Value, Reply)>,
    shutdown: Arc<Mutex<Option<String>>>,
}

impl Qmp {
    /// Serves `stream`, and returns when QEMU's main loop has answered.
    pub(super) async fn negotiate(stream: UnixStream) -> Result<Self, Error> {
        let (commands, requests) = mpsc::channel(8);
        let shutdown = Arc::default();
        tokio::spawn(serve(stream, requests, Arc::clone(&shutdown)));
        let qmp = Self { commands, shutdown };
        qmp.execute("qmp_capabilities").await?;
        Ok(qmp)
    }

    /// Executes a command that takes no arguments.
    pub(super) async fn execute(&self, command: &str) -> Result<Value, Error> {
        let failed = |reason: String| Error::Monitor {
            command: command.to_owned(),
            reason,
        };
        let gone = || failed("QEMU is gone".to_owned());
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.commands
                .send((json!({ "execute": command }), reply))
                .await
                .map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?.map_err(failed)
        };
        tokio::time::timeout(COMMAND_DEADLINE, exchange)
            .await
            .unwrap_or_else(|_| Err(failed(format!("no answer within {COMMAND_DEADLINE:?}"))))
    }

    /// The reason QEMU gave for shutting down: `guest-reset`, `guest-panic`, ….
    pub(super) fn shutdown_reason(&self) -> Option<String> {
        self.shutdown
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

async fn serve(
    mut stream: UnixStream,
    mut requests: mpsc::Receiver<(Value, Reply)>,
    shutdown: Arc<Mutex<Option<String>>>,
) {
    let mut lines = Lines::default();
    // A command whose caller gave up still gets its reply read: replies come
    // in order, and the next command's must not be taken for it.
    let mut waiting: Option<Reply> = None;
    loop {
        tokio::select! {
            line = lines.next(&stream) => {
                let Ok(line) = line else { return };
                match message(&line) {
                    Message::Reply(result) => {
                        if let Some(reply) = waiting.take() {
                            let _ = reply.send(result);
                        }
                    }
                    Message::Shutdown(reason) => {
                        *shutdown.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                    }
                    Message::Other => {}
                    Message::Broken => return,
                }
            }
            request = requests.recv(), if waiting.is_none() => {
                let Some((command, reply)) = request else { return };
                waiting = Some(reply);
                if stream.write_all(format!("{command}\n").as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[derive(Debug, PartialEq)]
enum Message {
    Reply(Result<Value, String>),
    Shutdown(String),
    /// The greeting, or an event nobody here needs.
    Other,
    Broken,
}

/// Parses one line of QMP (docs/interop/qmp-spec).
fn message(line: &[u8]) -> Message {
    let Ok(mut value) = serde_json::from_slice::<Value>(line) else {
        return Message::Broken;
    };
    if let Some(result) = value.get_mut("return") {
        return Message::Reply(Ok(result.take()));
    }
    if let Some(error) = value.get("error") {
        let words = error.get("desc").and_then(Value::as_str);
        return Message::Reply(Err(process::quotable(
            words.unwrap_or("an error without words"),
        )));
    }
    if value.get("event").and_then(Value::as_str) == Some("SHUTDOWN") {
        let reason = value.pointer("/data/reason").and_then(Value::as_str);
        return Message::Shutdown(process::quotable(reason.unwrap_or("unknown")));
    }
    Message::Other
}

/// Bounded lines of a stream. `next` may be dropped while it waits.
#[derive(Debug, Default)]
struct Lines {
    buffer: Vec<u8>,
}

impl Lines {
    async fn next(&mut self, stream: &UnixStream) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                return Ok(std::mem::replace(&mut self.buffer, rest));
            }
            if self.buffer.len() >= LINE_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            stream.readable().await?;
            let mut chunk = [0; 2048];
            match stream.try_read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};

    /// A peer that answers each line with the next of `replies`.
    async fn with_peer(replies: &[&str]) -> Result<Qmp, Error> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let replies: Vec<String> = replies.iter().map(|r| r.to_string()).collect();
        tokio::spawn(async move {
            let mut peer = BufReader::new(theirs);
            let mut line = String::new();
            for reply in replies {
                peer.read_line(&mut line).await.unwrap();
                if peer.write_all(reply.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
        Qmp::negotiate(ours).await
    }

    #[tokio::test]
    async fn greeting_events_and_errors() {
        let qmp = with_peer(&[
            "{\"QMP\": {}}\r\n{\"return\": {}}\r\n",
            "{\"event\":\"SHUTDOWN\",\"data\":{\"guest\":true,\"reason\":\"guest-reset\"}}\n{\"return\":{\"status\":\"running\"}}\n",
            "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\\u001b way\"}}\n",
        ])
        .await
        .unwrap();
        let status = qmp.execute("query-status").await.unwrap();
        assert_eq!(status["status"], "running");
        assert_eq!(qmp.shutdown_reason().as_deref(), Some("guest-reset"));
        let error = qmp.execute("stop").await.unwrap_err().to_string();
        assert_eq!(error, "QEMU monitor, stop: no way");
        let error = qmp.execute("stop").await.unwrap_err().to_string();
        assert_eq!(error, "QEMU monitor, stop: QEMU is gone");
    }

    #[tokio::test]
    async fn hostile_peers_are_refused() {
        let endless = "x".repeat(2 * LINE_MAX);
        for reply in ["not json\n", "{\"return\": \n", endless.as_str(), "\n", ""] {
            let error = with_peer(&[reply]).await.unwrap_err();
            assert!(error.to_string().contains("gone"), "{error}");
        }
    }

    #[test]
    fn odd_messages() {
        assert_eq!(message(b"[]"), Message::Other);
        assert_eq!(message(b"{\"event\":7}"), Message::Other);
        assert_eq!(
            message(b"{\"error\":null}"),
            Message::Reply(Err("an error without words".into()))
        );
    }
}
