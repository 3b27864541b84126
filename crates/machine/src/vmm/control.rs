//! The control socket: requests one at a time, and the guest's end.

use std::{
    collections::HashMap,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Mutex, mpsc, watch},
};
use walnut_vmm_api::{Channel, ChannelError, End, Event, Message, Received, Reply, Request};

use crate::{
    Error,
    takeover::{Fd, Giver, NoState, Taker},
};

/// The supervisor's end.
#[derive(Debug)]
pub(super) struct Control {
    channel: Arc<AsyncFd<Channel>>,
    /// Held while a request waits for its reply.
    replies: Mutex<mpsc::Receiver<Result<Reply, String>>>,
    end: watch::Receiver<Option<End>>,
    leaving: Leaving,
}

/// Devices that the guest was asked to let go, and whether it has. No others are
/// remembered, whatever the VMM says.
type Leaving = Arc<watch::Sender<HashMap<String, bool>>>;

/// The supervisor's end in a state ([`crate::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ControlState {
    channel: Fd,
    leaving: HashMap<String, bool>,
}

fn monitor(request: &str, reason: impl std::fmt::Display) -> Error {
    Error::Other(format!("walnut-vmm, {request}: {reason}"))
}

impl Control {
    pub(super) fn new(channel: Channel) -> Result<Self, Error> {
        let fd: OwnedFd = channel.into();
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|e| monitor("prepare", std::io::Error::from(e)))?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: the channel is owned by the AsyncFd, and its descriptor is
        // neither closed nor replaced before it.
        let channel = unsafe { AsyncFd::register_with_interest(Channel::from(fd), interest) };
        let channel = Arc::new(channel.map_err(|e| monitor("prepare", std::io::Error::from(e)))?);
        let (to_replies, replies) = mpsc::channel(1);
        let (to_end, end) = watch::channel(None);
        let leaving = Leaving::default();
        let news = Arc::clone(&leaving);
        tokio::spawn(listen(Arc::clone(&channel), to_replies, to_end, news));
        Ok(Self {
            channel,
            replies: Mutex::new(replies),
            end,
            leaving,
        })
    }

    /// For the next program.
    pub(super) fn state(&self, giver: &mut Giver) -> Result<ControlState, NoState> {
        if self.end().is_some() {
            return Err(NoState::never("the guest has ended"));
        }
        if self.replies.try_lock().is_err() {
            let doing = "walnut-vmm is doing something it was asked to";
            return Err(NoState::busy(doing));
        }
        Ok(ControlState {
            channel: giver.give(self.channel.get_ref()),
            leaving: self.leaving.borrow().clone(),
        })
    }

    /// That of the program before.
    pub(super) fn take_over(state: ControlState, taker: &mut Taker) -> Result<Self, Error> {
        let channel = taker.take(state.channel);
        let channel = channel.map_err(|e| monitor("take over", e))?;
        let control = Self::new(Channel::from(channel))?;
        control.leaving.send_replace(state.leaving);
        Ok(control)
    }

    /// Sends a request and waits for its reply. `name` is for people.
    pub(super) async fn ask(
        &self,
        name: &str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, Error> {
        let mut replies = self.replies.lock().await;
        loop {
            let mut ready = self
                .channel
                .writable()
                .await
                .map_err(|e| monitor(name, e))?;
            match self.channel.get_ref().send(request, fds) {
                Err(ChannelError::Socket(_, Errno::EAGAIN)) => ready.clear_ready(),
                other => break other.map_err(|e| monitor(name, e))?,
            }
        }
        match replies.recv().await {
            Some(reply) => reply.map_err(|reason| monitor(name, reason)),
            None => Err(monitor(name, "walnut-vmm broke off")),
        }
    }

    /// Asks for a device to be let go, and waits until it is.
    pub(super) async fn detach(&self, device: &str, deadline: Duration) -> Result<(), Error> {
        if !self.expect(device) {
            let name = device.to_owned();
            let asked = self.ask("detach", &Request::Detach { name }, &[]).await;
            // One that the VMM does not know may have gone at this moment.
            if let Err(e) = asked
                && !self.expect(device)
            {
                self.forget(device);
                return Err(e);
            }
            let left = tokio::time::timeout(deadline, self.left(device)).await;
            left.map_err(|_| Error::NotDetached {
                device: device.to_owned(),
                deadline,
            })?;
        }
        self.forget(device);
        Ok(())
    }

    /// From now on it is noticed that a device is let go. True if it was expected
    /// before, and has happened.
    fn expect(&self, device: &str) -> bool {
        let mut happened = false;
        self.leaving.send_modify(|leaving| {
            happened = *leaving.entry(device.to_owned()).or_default();
        });
        happened
    }

    /// It need not be noticed any more: of whatever was so called nothing is left.
    pub(super) fn forget(&self, device: &str) {
        self.leaving.send_modify(|leaving| {
            leaving.remove(device);
        });
    }

    /// Returns when a device that was expected to go is let go.
    async fn left(&self, device: &str) {
        let gone = |leaving: &HashMap<String, bool>| leaving.get(device) == Some(&true);
        // The sender is in `self`.
        let _ = self.leaving.subscribe().wait_for(gone).await;
    }

    /// How the guest ended, as far as the VMM has said.
    pub(super) fn end(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    /// Returns when everything the VMM said has been heard.
    pub(super) async fn closed(&self) {
        let mut end = self.end.clone();
        while end.changed().await.is_ok() {}
    }
}

/// Reads what the VMM says, until it breaks off.
async fn listen(
    channel: Arc<AsyncFd<Channel>>,
    replies: mpsc::Sender<Result<Reply, String>>,
    end: watch::Sender<Option<End>>,
    leaving: Leaving,
) {
    while let Ok(mut ready) = channel.readable().await {
        match channel.get_ref().receive::<Message>() {
            Err(ChannelError::Socket(_, Errno::EAGAIN)) => ready.clear_ready(),
            Ok(Some(Received { message, .. })) => match message {
                Message::Event(Event::Ended(how)) => drop(end.send_replace(Some(how))),
                Message::Event(Event::Detached { name }) => {
                    leaving.send_if_modified(|leaving| {
                        let device = leaving.get_mut(&name);
                        device.is_some_and(|gone| !std::mem::replace(gone, true))
                    });
                }
                // One that nobody waits for is a VMM's mistake, or its malice.
                Message::Reply(reply) => drop(replies.try_send(reply)),
            },
            Ok(None) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// A long time, for what must happen.
    const LONG: Duration = Duration::from_secs(600);

    /// A VMM that answers `replies` and then says `events`, for each request.
    fn vmm(turns: Vec<(Result<Reply, String>, Vec<&'static str>)>) -> (Control, Channel) {
        let (ours, theirs) = walnut_vmm_api::pair().unwrap();
        let fd = theirs.as_fd().try_clone_to_owned().unwrap();
        std::thread::spawn(move || {
            for (reply, gone) in turns {
                theirs.receive::<Request>().unwrap().unwrap();
                theirs.send(&Message::Reply(reply), &[]).unwrap();
                for name in gone {
                    tell(&theirs, name);
                }
            }
        });
        (Control::new(ours).unwrap(), Channel::from(fd))
    }

    fn tell(vmm: &Channel, name: &str) {
        let name = name.to_owned();
        let event = Message::Event(Event::Detached { name });
        vmm.send(&event, &[]).unwrap();
    }

    #[tokio::test]
    async fn a_device_is_detached_when_the_vmm_says_so() {
        let done = || Ok(Reply::Done);
        let turns = vec![(done(), vec!["b", "a"]), (done(), vec!["b"])];
        let (control, _peer) = vmm(turns);
        control.detach("a", LONG).await.unwrap();
        // What was said of `b` before anybody asked was of nobody's.
        assert!(control.leaving.borrow().is_empty());
        control.detach("b", LONG).await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_is_late_is_noticed_later() {
        let unknown = || Err("no device is called a".to_owned());
        let turns = vec![(Ok(Reply::Done), vec![]), (unknown(), vec![])];
        let (control, peer) = vmm(turns);
        let late = control.detach("a", Duration::from_millis(1)).await;
        assert!(matches!(late, Err(Error::NotDetached { .. })), "{late:?}");
        tell(&peer, "a");
        control.left("a").await;
        control.detach("a", LONG).await.unwrap();
        // Now it is unknown, here and there.
        let error = control.detach("a", LONG).await.unwrap_err();
        assert!(error.to_string().contains("no device is called a"));
        assert!(control.leaving.borrow().is_empty());
    }
}
