//! The last bytes a process wrote, read from a pipe by a task.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{net::unix::pipe::Receiver, sync::watch};

use crate::takeover::{Fd, Giver, Taker, hex};

/// The last bytes of an output. A writer may write for ever: older bytes are
/// dropped.
#[derive(Debug)]
pub struct Tail {
    limit: usize,
    bytes: Mutex<VecDeque<u8>>,
    /// True when the last writer has closed.
    ended: watch::Sender<bool>,
    /// Until then.
    pipe: Mutex<Option<Arc<Receiver>>>,
}

/// A tail in a state ([`crate::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TailState {
    limit: usize,
    #[serde(with = "hex")]
    bytes: Vec<u8>,
    /// None once its writers have closed.
    pipe: Option<Fd>,
}

/// A tail of at most `limit` bytes and the pipe that feeds it.
pub(crate) fn pipe(limit: usize) -> io::Result<(Arc<Tail>, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((Tail::begin(limit, Vec::new(), Some(read))?, write))
}

impl Tail {
    /// The tail of a process whose output nobody keeps.
    pub(super) fn closed() -> Self {
        Self {
            limit: 0,
            bytes: Mutex::default(),
            ended: watch::Sender::new(true),
            pipe: Mutex::default(),
        }
    }

    /// A tail that has `bytes`, and gets what comes through the pipe.
    fn begin(limit: usize, bytes: Vec<u8>, pipe: Option<OwnedFd>) -> io::Result<Arc<Self>> {
        let pipe = pipe.map(Receiver::from_owned_fd).transpose()?.map(Arc::new);
        let tail = Arc::new(Self {
            limit,
            bytes: Mutex::new(bytes.into()),
            ended: watch::Sender::new(pipe.is_none()),
            pipe: Mutex::new(pipe.clone()),
        });
        if let Some(pipe) = pipe {
            tokio::spawn(Arc::clone(&tail).fill(pipe));
        }
        Ok(tail)
    }

    /// For the next program.
    pub(crate) fn state(&self, giver: &mut Giver) -> TailState {
        let pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        TailState {
            limit: self.limit,
            bytes: self.lock().iter().copied().collect(),
            pipe: pipe.as_ref().map(|pipe| giver.give(pipe)),
        }
    }

    /// That of the program before.
    pub(crate) fn take_over(state: TailState, taker: &mut Taker) -> io::Result<Arc<Self>> {
        let pipe = state.pipe.map(|pipe| taker.take(pipe)).transpose()?;
        Self::begin(state.limit, state.bytes, pipe)
    }

    async fn fill(self: Arc<Self>, pipe: Arc<Receiver>) {
        while pipe.readable().await.is_ok() {
            // On the stack between two awaits: an idle tail holds no buffer.
            let mut chunk = [0; 4096];
            match pipe.try_read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => self.push(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
        self.pipe
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.ended.send_replace(true);
    }

    fn push(&self, chunk: &[u8]) {
        let mut bytes = self.lock();
        bytes.extend(chunk);
        let excess = bytes.len().saturating_sub(self.limit);
        bytes.drain(..excess);
    }

    /// What is kept, with bytes that are not UTF-8 replaced.
    pub fn text(&self) -> String {
        let mut bytes = self.lock();
        String::from_utf8_lossy(bytes.make_contiguous()).into_owned()
    }

    /// Returns when the writers have closed, or after a quarter of a second in
    /// which something still holds the pipe.
    pub async fn settle(&self) {
        let mut ended = self.ended.subscribe();
        // The verdict is the same either way: what has been read counts.
        let _ =
            tokio::time::timeout(Duration::from_millis(250), ended.wait_for(|ended| *ended)).await;
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // No code panics while it holds the lock; the bytes are valid anyway.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
