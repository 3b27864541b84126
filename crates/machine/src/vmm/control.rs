//! The control socket: requests one at a time, and the guest's end.

use std::{
    collections::HashMap,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::errno::Errno;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Mutex, mpsc, watch},
};
use walnut_vmm_api::{Channel, ChannelError, End, Event, Message, Received, Reply, Request};

use crate::Error;

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

    /// From now on it is noticed that the guest lets go of a device. True if it had
    /// been asked before, and has.
    pub(super) fn expect(&self, device: &str) -> bool {
        let mut before = None;
        self.leaving.send_modify(|leaving| {
            before = leaving.get(device).copied();
            leaving.insert(device.to_owned(), before == Some(true));
        });
        before == Some(true)
    }

    /// It need not be noticed any more.
    pub(super) fn forget(&self, device: &str) {
        self.leaving.send_modify(|leaving| {
            leaving.remove(device);
        });
    }

    /// Returns when the guest has let go of a device that was [expected](Self::expect).
    pub(super) async fn left(&self, device: &str) {
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
