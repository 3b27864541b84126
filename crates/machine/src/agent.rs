//! The way to a guest's agent: the socket on which it calls when it serves, and
//! the one through which its ports are reached. The same for every driver whose
//! vsock device keeps the hybrid convention (`walnut_protocol::connect_hybrid`).

use std::{
    io,
    os::unix::net::UnixListener as StdListener,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
    sync::Mutex,
};
use walnut_protocol::{
    AGENT_PORT, PROTOCOL, READY_LINE_MAX, READY_PORT, connect_hybrid, parse_ready_line,
};

use crate::{Error, Exit, console, process::quotable};

/// The guest's vsock address. One guest per device, so all have the same.
pub(crate) const GUEST_CID: u32 = 3;
/// How much of a console is kept, in bytes.
pub(crate) const CONSOLE_MAX: usize = 64 * 1024;

/// Between two attempts to reach an agent that served before.
const AGAIN: Duration = Duration::from_millis(2);

/// The agent's call: waited for, or come.
#[derive(Debug)]
enum Call {
    Waiting(UnixListener),
    /// It has called before the machine was saved, and does not call again.
    Restored,
    Serves(u32),
}

/// A machine's sockets, removed with it.
#[derive(Debug)]
pub(crate) struct Door {
    /// The vsock device's own.
    uds: PathBuf,
    /// Where the agent calls.
    ready: PathBuf,
    closed: AtomicBool,
    call: Mutex<Call>,
}

pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host {
        what: what.to_owned(),
        source,
    }
}

impl Door {
    /// Listens for the agent's call in `dir`, where the vsock device is to make
    /// the socket `name`.
    pub(crate) fn open(dir: &Path, name: &str) -> Result<Self, Error> {
        let uds = dir.join(name);
        let ready = dir.join(format!("{name}_{READY_PORT}"));
        remove(&uds);
        remove(&ready);
        let listener = StdListener::bind(&ready).map_err(|source| Error::File {
            what: "listen on",
            path: ready.clone(),
            source,
        })?;
        listener
            .set_nonblocking(true)
            .map_err(host("prepare the agent's socket"))?;
        let listener =
            UnixListener::from_std(listener).map_err(host("watch the agent's socket"))?;
        Ok(Self {
            uds,
            ready,
            closed: AtomicBool::new(false),
            call: Mutex::new(Call::Waiting(listener)),
        })
    }

    /// The way to an agent that serves already, in a machine that was restored.
    pub(crate) fn reopen(dir: &Path, name: &str) -> Self {
        let uds = dir.join(name);
        let ready = dir.join(format!("{name}_{READY_PORT}"));
        remove(&uds);
        Self {
            uds,
            ready,
            closed: AtomicBool::new(false),
            call: Mutex::new(Call::Restored),
        }
    }

    /// The way to an agent that has called, for the program before.
    pub(crate) fn resume(dir: &Path, name: &str) -> Self {
        Self {
            uds: dir.join(name),
            ready: dir.join(format!("{name}_{READY_PORT}")),
            closed: AtomicBool::new(false),
            // Of this release, or the agent says otherwise when it is greeted.
            call: Mutex::new(Call::Serves(PROTOCOL)),
        }
    }

    /// Whether the agent has called.
    pub(crate) fn has_called(&self) -> bool {
        let call = self.call.try_lock();
        call.is_ok_and(|call| matches!(*call, Call::Serves(_)))
    }

    /// The vsock device's own socket.
    pub(crate) fn uds(&self) -> &Path {
        &self.uds
    }

    /// Where the agent calls.
    pub(crate) fn ready_path(&self) -> &Path {
        &self.ready
    }

    /// Removes the sockets' names, once: what is called so later is another machine's.
    pub(crate) fn close(&self) {
        if self.closed.swap(true, Ordering::Relaxed) {
            return;
        }
        remove(&self.uds);
        remove(&self.ready);
    }

    /// The protocol the agent speaks, once it has called; fails when `ended` comes
    /// first. `console` is what the guest has printed.
    pub(crate) async fn ready(
        &self,
        deadline: Duration,
        ended: impl Future<Output = Exit>,
        console: impl Fn() -> String,
    ) -> Result<u32, Error> {
        const WHAT: &str = "wait for the agent";
        let mut call = self.call.lock().await;
        let heard = async {
            match &*call {
                Call::Serves(protocol) => Ok(*protocol),
                Call::Waiting(listener) => heard(listener).await,
                Call::Restored => self.asked().await,
            }
        };
        let answer = tokio::time::timeout(deadline, or_end(WHAT, heard, ended)).await;
        let protocol = match answer {
            Ok(result) => result?,
            Err(_) => {
                let hint = console::hint(&console());
                return Err(Error::NotReady { deadline, hint });
            }
        };
        *call = Call::Serves(protocol);
        remove(&self.ready);
        Ok(protocol)
    }

    /// The agent's protocol, once it takes connections. A guest that has just been
    /// restored may not yet have heard that the old ones are gone.
    async fn asked(&self) -> Result<u32, Error> {
        loop {
            if connect_hybrid(&self.uds, AGENT_PORT).await.is_ok() {
                // Of this release, or the agent says otherwise when it is greeted.
                return Ok(PROTOCOL);
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// A connection to a port of the guest; fails when `ended` comes first.
    pub(crate) async fn connect(
        &self,
        port: u32,
        ended: impl Future<Output = Exit>,
    ) -> Result<UnixStream, Error> {
        let attempt = async { Ok(connect_hybrid(&self.uds, port).await?) };
        or_end("connect to the guest", attempt, ended).await
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.close();
    }
}

fn remove(path: &Path) {
    // It fails when there is none, which is what is wanted.
    let _ = std::fs::remove_file(path);
}

/// `attempt`, or the machine's end if that comes first.
pub(crate) async fn or_end<T>(
    what: &'static str,
    attempt: impl Future<Output = Result<T, Error>>,
    ended: impl Future<Output = Exit>,
) -> Result<T, Error> {
    tokio::select! {
        result = attempt => result,
        exit = ended => Err(Error::Ended { what, exit }),
    }
}

/// The agent's protocol, from the first connection of the guest.
async fn heard(listener: &UnixListener) -> Result<u32, Error> {
    let (stream, _) = listener.accept().await.map_err(host("hear the agent"))?;
    let mut words = Vec::with_capacity(READY_LINE_MAX);
    let mut line = stream.take(u64::try_from(READY_LINE_MAX).unwrap_or(64));
    while !words.ends_with(b"\n") {
        let n = line
            .read_buf(&mut words)
            .await
            .map_err(host("hear the agent"))?;
        if n == 0 {
            break;
        }
    }
    let words = String::from_utf8_lossy(&words);
    parse_ready_line(&words).ok_or_else(|| Error::BadReady {
        words: quotable(&words),
    })
}

/// A guest that ends before its agent serves has not done what was asked of it,
/// however orderly its end looks from outside.
pub(crate) fn stopped_early(console: &str) -> Exit {
    let hint = console::hint(console);
    Exit::Failed(format!("the guest restarted while it booted; {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_door_that_was_closed_leaves_the_next_ones_alone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Door::open(dir.path(), "sock").unwrap();
        let again = Door::open(dir.path(), "sock");
        drop(again);
        assert!(!first.ready_path().exists());
        first.close();
        let second = Door::open(dir.path(), "sock").unwrap();
        first.close();
        drop(first);
        assert!(second.ready_path().exists());
        second.close();
        assert!(!second.ready_path().exists());
    }
}
