//! Streams that the host has opened and no process has claimed yet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncRead;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_vsock::{VsockListener, VsockStream};
use walnut_protocol::read_stream_id;

/// Most streams waiting to be claimed, and as many still saying their number.
const PENDING_MAX: usize = 64;
/// How long a connection may take to say its number, and how long a request
/// waits for a stream that it names.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waiting streams by number.
#[derive(Debug)]
pub(crate) struct Pending<S = VsockStream> {
    waiting: Mutex<Waiting<S>>,
    arrived: Notify,
    patience: Duration,
}

#[derive(Debug)]
struct Waiting<S> {
    streams: HashMap<u32, S>,
    unnumbered: usize,
}

impl<S> Default for Pending<S> {
    fn default() -> Self {
        Self {
            waiting: Mutex::new(Waiting {
                streams: HashMap::new(),
                unnumbered: 0,
            }),
            arrived: Notify::new(),
            patience: PATIENCE,
        }
    }
}

impl<S: AsyncRead + Unpin> Pending<S> {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting<S>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a connection: reads its number and files it. Dropped, that is
    /// closed, if there are too many, the number is 0 or taken, or late.
    async fn admit(&self, mut stream: S) {
        if self.waiting().unnumbered >= PENDING_MAX {
            return;
        }
        self.waiting().unnumbered += 1;
        let number = timeout(self.patience, read_stream_id(&mut stream)).await;
        let mut waiting = self.waiting();
        waiting.unnumbered -= 1;
        let Ok(Ok(number)) = number else { return };
        if number == 0
            || waiting.streams.len() >= PENDING_MAX
            || waiting.streams.contains_key(&number)
        {
            return;
        }
        waiting.streams.insert(number, stream);
        drop(waiting);
        self.arrived.notify_waiters();
    }

    /// The stream `number`, waiting until it has arrived; `None` if it does
    /// not. Number 0 names no stream.
    pub(crate) async fn claim(&self, number: u32) -> Result<Option<S>, u32> {
        if number == 0 {
            return Ok(None);
        }
        let deadline = Instant::now() + self.patience;
        loop {
            let arrival = self.arrived.notified();
            if let Some(stream) = self.waiting().streams.remove(&number) {
                return Ok(Some(stream));
            }
            if timeout_at(deadline, arrival).await.is_err() {
                return Err(number);
            }
        }
    }

    /// Closes a stream nobody will claim.
    pub(crate) fn discard(&self, number: u32) {
        self.waiting().streams.remove(&number);
    }
}

/// Accepts for ever.
pub(crate) async fn accept(listener: VsockListener, pending: Arc<Pending>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let pending = Arc::clone(&pending);
                tokio::spawn(async move { pending.admit(stream).await });
            }
            // Out of descriptors or memory: others must close first.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::io::{DuplexStream, duplex};
    use walnut_protocol::write_stream_id;

    async fn announced(pending: &Pending<DuplexStream>, number: u32) -> DuplexStream {
        let (mut host, guest) = duplex(64);
        write_stream_id(&mut host, number).await.unwrap();
        pending.admit(guest).await;
        host
    }

    fn hurried() -> Pending<DuplexStream> {
        Pending {
            patience: Duration::from_millis(20),
            ..Pending::default()
        }
    }

    #[tokio::test]
    async fn a_claim_waits_for_its_stream() {
        let pending = Arc::new(Pending::<DuplexStream>::default());
        let claimer = Arc::clone(&pending);
        let claim = tokio::spawn(async move { claimer.claim(7).await });
        let _other = announced(&pending, 6).await;
        let _host = announced(&pending, 7).await;
        assert!(claim.await.unwrap().unwrap().is_some());
        assert!(pending.claim(0).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_stream_that_never_comes_is_named() {
        let pending = hurried();
        assert_eq!(pending.claim(9).await.unwrap_err(), 9);
    }

    #[tokio::test]
    async fn a_number_is_given_once() {
        let pending = Pending::default();
        let mut first = announced(&pending, 7).await;
        let mut second = announced(&pending, 7).await;
        assert!(second.write_all(b"x").await.is_err());
        first.write_all(b"x").await.unwrap();
        let mut zero = announced(&pending, 0).await;
        assert!(zero.write_all(b"x").await.is_err());
    }

    #[tokio::test]
    async fn the_table_is_bounded() {
        let pending = hurried();
        let mut kept = Vec::new();
        for number in 1..=64 {
            kept.push(announced(&pending, number).await);
        }
        let mut one_more = announced(&pending, 65).await;
        assert!(one_more.write_all(b"x").await.is_err());
        // A connection that says nothing is let go.
        let (mut silent, guest) = duplex(64);
        pending.admit(guest).await;
        assert!(silent.write_all(b"x").await.is_err());
    }
}
