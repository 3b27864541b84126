//! Holds streams while the machine is saved, and gives them others in its clone.
//!
//! A clone has none of its connections any more. What a process wrote must neither go
//! into one that is dead and not known to be, nor be lost, nor end the process. So no
//! pump carries output while the gate is shut, and one that passes it asks its
//! [`Line`] first whether there is another stream.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::timeout;

/// The gate of all streams of this guest.
#[derive(Debug)]
pub(crate) struct Gate {
    shut: watch::Sender<bool>,
    busy: watch::Sender<usize>,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            shut: watch::Sender::new(false),
            busy: watch::Sender::new(0),
        }
    }
}

/// A pump that has passed the gate and is not done yet.
#[derive(Debug)]
pub(crate) struct Busy<'a>(&'a Gate);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.send_modify(|n| *n = n.saturating_sub(1));
    }
}

impl Gate {
    /// Shuts it, and returns when no pump is under way any more, or after `within`:
    /// one that waits for the host to read may do so for ever.
    pub(crate) async fn shut(&self, within: Duration) {
        self.shut.send_replace(true);
        let mut busy = self.busy.subscribe();
        let _ = timeout(within, busy.wait_for(|n| *n == 0)).await;
    }

    /// Opens it.
    pub(crate) fn open(&self) {
        self.shut.send_replace(false);
    }

    /// Whether a pump is under way.
    pub(crate) fn is_busy(&self) -> bool {
        *self.busy.borrow() > 0
    }

    fn is_shut(&self) -> bool {
        *self.shut.borrow()
    }

    /// Returns when it is open.
    async fn opened(&self) {
        // The sender is in `self`.
        let _ = self.shut.subscribe().wait_for(|shut| !shut).await;
    }

    async fn pass(&self) -> Busy<'_> {
        self.opened().await;
        self.busy.send_modify(|n| *n += 1);
        Busy(self)
    }
}

/// One stream of one process: where its pump finds another when its own is gone.
#[derive(Debug)]
pub(crate) struct Line<S> {
    gate: Arc<Gate>,
    next: Mutex<Next<S>>,
    given: Notify,
}

#[derive(Debug)]
enum Next<S> {
    None,
    /// Another stream, or none any more.
    Given(Option<S>),
    /// There is no pump any more.
    Over,
}

/// Says at the end of a pump that there is none.
#[derive(Debug)]
pub(crate) struct Pumping<'a, S>(&'a Line<S>);

impl<S> Drop for Pumping<'_, S> {
    fn drop(&mut self) {
        *self.0.next() = Next::Over;
    }
}

impl<S> Line<S> {
    pub(crate) fn new(gate: Arc<Gate>) -> Arc<Self> {
        Arc::new(Self {
            gate,
            next: Mutex::new(Next::None),
            given: Notify::new(),
        })
    }

    fn next(&self) -> MutexGuard<'_, Next<S>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held by the pump for as long as it lives.
    pub(crate) fn pumping(&self) -> Pumping<'_, S> {
        Pumping(self)
    }

    /// Gives the pump another stream, or says that it has none any more; gives it back if
    /// there is no pump.
    pub(crate) fn give(&self, stream: Option<S>) -> Result<(), Option<S>> {
        match &mut *self.next() {
            Next::Over => return Err(stream),
            next => *next = Next::Given(stream),
        }
        self.given.notify_one();
        Ok(())
    }

    fn take(&self) -> Option<Option<S>> {
        let mut next = self.next();
        match &mut *next {
            Next::Given(stream) => {
                let stream = stream.take();
                *next = Next::None;
                Some(stream)
            }
            _ => None,
        }
    }

    /// Waits until the gate is open, and puts what was given into the place of `stream`.
    pub(crate) async fn pass(&self, stream: &mut Option<S>) -> Busy<'_> {
        let busy = self.gate.pass().await;
        if let Some(next) = self.take() {
            *stream = next;
        }
        busy
    }

    /// What takes the place of a stream of output that broke off, once the gate is open:
    /// another one, or that there shall be none; nothing, if nobody has said anything.
    pub(crate) async fn replacement(&self) -> Option<Option<S>> {
        self.gate.opened().await;
        self.take()
    }

    /// What takes the place of a stream of input, as soon as it is given. (That a clone's
    /// connection is gone does not make it readable: epoll tells of an error alone, for
    /// which nobody who reads waits.)
    pub(crate) async fn successor(&self) -> Option<S> {
        loop {
            let given = self.given.notified();
            if let Some(stream) = self.take() {
                return stream;
            }
            given.await;
        }
    }

    /// The same of one that broke off: only while the gate is shut can there be another.
    pub(crate) async fn successor_if_shut(&self) -> Option<S> {
        match self.gate.is_shut() {
            true => self.successor().await,
            false => self.take().flatten(),
        }
    }
}

/// Bytes that can be read from a pipe or terminal now.
pub(crate) fn unread(fd: &impl std::os::fd::AsRawFd) -> io::Result<libc::c_int> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the ioctl writes one integer.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) } {
        0 => Ok(bytes),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_passed_is_waited_for_and_no_longer_than_agreed() {
        let gate = Arc::new(Gate::default());
        let busy = gate.pass().await;
        assert!(gate.is_busy());
        gate.shut(Duration::from_millis(5)).await;
        let waiter = Arc::clone(&gate);
        let passes = tokio::spawn(async move {
            waiter.pass().await;
        });
        tokio::task::yield_now().await;
        assert!(!passes.is_finished());
        drop(busy);
        gate.shut(Duration::from_secs(600)).await;
        gate.open();
        passes.await.unwrap();
        assert!(!gate.is_busy());
    }

    #[tokio::test]
    async fn a_line_without_a_pump_takes_nothing() {
        let line = Line::new(Arc::default());
        assert_eq!(line.give(Some(1)), Ok(()));
        let mut stream = Some(0);
        drop(line.pass(&mut stream).await);
        assert_eq!(stream, Some(1));
        drop(line.pass(&mut stream).await);
        assert_eq!(stream, Some(1), "no other: the one that it has");
        assert_eq!(line.replacement().await, None);
        assert_eq!(line.successor_if_shut().await, None);
        line.give(None).unwrap();
        drop(line.pass(&mut stream).await);
        assert_eq!(stream, None, "said to be gone");
        let waiter = Arc::clone(&line);
        let next = tokio::spawn(async move { waiter.successor().await });
        tokio::task::yield_now().await;
        line.give(Some(2)).unwrap();
        assert_eq!(next.await.unwrap(), Some(2));
        drop(line.pumping());
        assert_eq!(line.give(Some(3)), Err(Some(3)));
    }
}
