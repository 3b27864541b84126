//! What becomes of a namespace's links while a machine is on them.
//!
//! The kernel says over netlink that something has changed. What it says is not read, for
//! it may be cut short, and be overtaken: whoever hears of a change looks at everything
//! again ([`Watch::look`]) and compares. So it does not matter how many changes there
//! were, or whether some were missed.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    Error, Inlet, Interface, Result, Routing, Rules, inventory, links, namespace, open_inlet,
    redirect,
};

/// linux/rtnetlink.h: groups of links, and of addresses, routes and rules of both families.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// Messages that are heard before anything is done about them.
const AT_ONCE: usize = 1024;

/// Watches a namespace.
#[derive(Debug)]
pub struct Watch {
    events: AsyncFd<OwnedFd>,
    namespace: Arc<File>,
    queues: u16,
    egress: Vec<Rules>,
}

/// What a namespace has.
#[derive(Debug)]
pub struct Found {
    /// All links that a guest may have, whether they are up or not, and those that are up
    /// and that no guest can have.
    pub links: Vec<Seen>,
    /// How it routes beside what its links have.
    pub routing: Routing,
}

/// A link of a namespace.
#[derive(Debug)]
pub struct Seen {
    /// Its number, which no other link of the namespace ever has.
    pub index: u32,
    /// What a guest must know of it, or why no guest can have it.
    pub interface: Result<Interface>,
}

/// A socket that hears of changes in the calling thread's namespace.
pub(crate) fn listen() -> Result<OwnedFd> {
    let listen = || {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )?;
        let groups = GROUPS.iter().fold(0, |all, group| all | 1 << (group - 1));
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(socket)
    };
    listen().map_err(|e: Errno| Error::system("listen for changes of the network")(e.into()))
}

impl Watch {
    pub(crate) fn new(
        events: OwnedFd,
        namespace: Arc<File>,
        queues: u16,
        egress: Vec<Rules>,
    ) -> Result<Self> {
        // SAFETY: the socket is owned by the AsyncFd, and its descriptor is neither closed
        // nor replaced before it.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
        Ok(Self {
            events: events
                .map_err(|e| Error::system("listen for changes of the network")(e.into()))?,
            namespace,
            queues,
            egress,
        })
    }

    /// Watches the namespace that `namespace` stands for. Links that come get taps of
    /// `queues` queues, as [`connect`](crate::connect) has it, and `egress` is for them.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or the kernel refuses.
    pub async fn resume(namespace: OwnedFd, queues: u16, egress: Vec<Rules>) -> Result<Self> {
        let held = Arc::new(File::from(namespace));
        let listen = move || -> Work<OwnedFd> { Box::pin(async { listen() }) };
        let events = namespace::within_held(Arc::clone(&held), listen).await?;
        Self::new(events, held, queues, egress)
    }

    /// Returns when something may have changed since this, or [`Self::look`], was called.
    ///
    /// # Errors
    /// If the kernel does not tell any more.
    pub async fn changed(&self) -> io::Result<()> {
        let mut heard = false;
        loop {
            let mut ready = self.events.readable().await?;
            for _ in 0..AT_ONCE {
                // Of a message that has no room the rest is thrown away.
                match recv(self.events.as_raw_fd(), &mut [0; 16], MsgFlags::empty()) {
                    // In the latter case there was more than the kernel kept.
                    Ok(_) | Err(Errno::ENOBUFS) => heard = true,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            if heard {
                return Ok(());
            }
        }
    }

    /// What the namespace has now.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn look(&self) -> Result<Found> {
        let read = || -> Work<inventory::Inventory> {
            Box::pin(async { inventory::read(&links::open()?).await })
        };
        let found = self.within(read).await?;
        let refused = found.refused.into_iter().map(|(index, e)| Seen {
            index,
            interface: Err(e),
        });
        let links = found.links.into_iter().map(|(index, interface)| Seen {
            index,
            interface: Ok(interface),
        });
        Ok(Found {
            links: links.chain(refused).collect(),
            routing: found.routing,
        })
    }

    /// Connects a link to a tap of its own, as [`connect`](crate::connect) does.
    ///
    /// # Errors
    /// If the link has gone, or the kernel refuses. No tap is left then.
    pub async fn connect(&self, index: u32, interface: &Interface) -> Result<crate::Link> {
        let (interface, queues, egress) = (interface.clone(), self.queues, self.egress.clone());
        let connect = move || -> Work<crate::Link> {
            Box::pin(async move {
                let handle = links::open()?;
                let made = redirect::connect(&handle, index, &interface, queues, &egress).await;
                if made.is_err() {
                    redirect::disconnect(&handle, index, &interface.name).await;
                }
                let (tap, taps) = made?;
                Ok(crate::Link {
                    index,
                    tap,
                    interface,
                    taps,
                })
            })
        };
        self.within(connect).await
    }

    /// Has the namespace's own stack have what arrives on a link again.
    pub async fn disconnect(&self, index: u32, name: &str) {
        let name = name.to_owned();
        let disconnect = move || -> Work<()> {
            Box::pin(async move {
                redirect::disconnect(&links::open()?, index, &name).await;
                Ok(())
            })
        };
        // Where it cannot be entered there is nothing to be taken back.
        let _ = self.within(disconnect).await;
    }

    /// Has a tap take packets as large as its link's.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn set_mtu(&self, tap: u32, mtu: u32) -> Result<()> {
        let set = move || -> Work<()> {
            Box::pin(async move { redirect::set_mtu(&links::open()?, tap, mtu).await })
        };
        self.within(set).await
    }

    /// The namespace's loopback, if it can be had.
    pub async fn inlet(&self) -> Option<Inlet> {
        let open = || -> Work<Option<Inlet>> { Box::pin(async { Ok(open_inlet()) }) };
        self.within(open).await.ok().flatten()
    }

    async fn within<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Work<T> + Send + 'static,
    ) -> Result<T> {
        namespace::within_held(Arc::clone(&self.namespace), work).await
    }
}

/// What is done in the namespace.
type Work<T> = std::pin::Pin<Box<dyn Future<Output = Result<T>>>>;

/// The namespace.
impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}
