//! Connections to the loopback of a sandbox's namespace on the host, carried to that of
//! its guest.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use tokio::{
    net::{TcpListener, TcpStream, UnixStream},
    task::JoinHandle,
    time::{Duration, sleep},
};
use tracing::debug;
use walnut_machine::takeover::{Fd, Giver, Taker};
use walnut_network::{Inlet, is_meant};
use walnut_protocol::agent::ConnectPortRequest;

use crate::{
    Error, Result, Sandbox,
    agent::{self, soon},
    link::{Link, LinkState},
    sandbox::lock,
};

/// Connections at a time; as many as an agent takes.
const MAX: usize = 128;
/// How long nothing is taken when there are no descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// Carries connections, until it is dropped.
#[derive(Debug)]
pub(crate) struct Carrying {
    listener: Arc<TcpListener>,
    /// Brings them.
    attachment: OwnedFd,
    carried: Arc<Carried>,
    task: JoinHandle<()>,
}

/// The connections that are being carried.
#[derive(Debug, Default)]
struct Carried {
    places: AtomicUsize,
    all: Mutex<Vec<Weak<Link>>>,
}

impl Carried {
    fn all(&self) -> MutexGuard<'_, Vec<Weak<Link>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more, if there is room.
    fn place(self: &Arc<Self>) -> Option<Place> {
        if self.places.fetch_add(1, Ordering::Relaxed) >= MAX {
            self.places.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Place(Arc::clone(self)))
    }

    /// Carries a connection to its end.
    fn carry(&self, link: Link, place: Place) {
        let link = Arc::new(link);
        let mut all = self.all();
        all.retain(|link| link.strong_count() > 0);
        all.push(Arc::downgrade(&link));
        drop(all);
        tokio::spawn(async move {
            link.carried().await;
            drop(place);
        });
    }
}

/// A place among them.
#[derive(Debug)]
struct Place(Arc<Carried>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.places.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Carrying {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Connections to a loopback in a state ([`walnut_machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CarryingState {
    listener: Fd,
    attachment: Fd,
    links: Vec<LinkState>,
}

impl Carrying {
    pub(crate) fn state(&self, giver: &mut Giver) -> CarryingState {
        let links = self.carried.all();
        CarryingState {
            listener: giver.give(&*self.listener),
            attachment: giver.give(&self.attachment),
            links: links
                .iter()
                .filter_map(|link| Some(link.upgrade()?.state(giver)))
                .collect(),
        }
    }

    pub(crate) fn take_over(
        state: CarryingState,
        sandbox: &Arc<Sandbox>,
        taker: &mut Taker,
    ) -> io::Result<Self> {
        let listener = std::net::TcpListener::from(taker.take(state.listener)?);
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let attachment = taker.take(state.attachment)?;
        let carrying = Self::begin(sandbox, listener, attachment);
        for link in state.links {
            let link = link.take_over(taker)?;
            if let Some(place) = carrying.carried.place() {
                carrying.carried.carry(link, place);
            }
        }
        Ok(carrying)
    }

    fn begin(sandbox: &Arc<Sandbox>, listener: TcpListener, attachment: OwnedFd) -> Self {
        let (listener, carried) = (Arc::new(listener), Arc::<Carried>::default());
        let accepting = accept(
            Arc::downgrade(sandbox),
            Arc::clone(&listener),
            Arc::clone(&carried),
        );
        Self {
            listener,
            attachment,
            carried,
            task: tokio::spawn(accepting),
        }
    }
}

impl Sandbox {
    /// Carries connections to its namespace's loopback into the guest, while it lives.
    pub(crate) fn carry_ports(self: &Arc<Self>, inlet: Inlet) -> Result<()> {
        let (listener, attachment) = inlet.into_parts();
        let listener = TcpListener::from_std(listener)
            .map_err(|e| Error::Machine(format!("watch the pod's loopback: {e}")))?;
        *lock(&self.carrying) = Some(Carrying::begin(self, listener, attachment));
        Ok(())
    }

    /// The guest's end for a connection.
    async fn port(&self, connection: &TcpStream) -> Result<UnixStream> {
        let to = connection
            .local_addr()
            .map_err(|e| Error::Machine(format!("ask where a connection leads: {e}")))?;
        if !is_meant(to) {
            return Err(Error::Invalid(format!("{to} is not on loopback")));
        }
        let number = self.next_stream();
        let guest = agent::stream(self.machine.as_ref(), number).await?;
        let request = ConnectPortRequest {
            stream: number,
            port: to.port().into(),
            ipv6: to.ip().to_canonical().is_ipv6(),
            ..Default::default()
        };
        let reply = self.agent.connect_port(soon(), &request).await;
        self.call("connect to a port", reply).await?;
        Ok(guest)
    }
}

/// Takes connections.
async fn accept(sandbox: Weak<Sandbox>, listener: Arc<TcpListener>, carried: Arc<Carried>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                debug!("take a connection to the pod's loopback: {e}");
                sleep(PAUSE).await;
                continue;
            }
        };
        // One too many is closed. None keeps the sandbox alive.
        if let (Some(place), Some(sandbox)) = (carried.place(), sandbox.upgrade()) {
            let carried = carried.clone();
            // From here on it is somebody's.
            let busy = sandbox.busy.with("a connection is being made");
            tokio::spawn(async move {
                match sandbox.port(&stream).await {
                    Ok(guest) => carried.carry(Link::new(stream, guest), place),
                    Err(e) => debug!("carry a connection to the guest: {e}"),
                }
                drop(busy);
            });
        }
    }
}
