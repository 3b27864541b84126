//! Connections to the loopback of a sandbox's namespace on the host, carried to that of
//! its guest.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Weak},
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinHandle,
    time::{Duration, sleep},
};
use tracing::debug;
use walnut_network::{Inlet, is_meant};
use walnut_protocol::agent::ConnectPortRequest;

use crate::{
    Error, Result, Sandbox,
    agent::{self, soon},
    sandbox::lock,
};

/// Connections at a time; as many as an agent takes.
const MAX: usize = 128;
/// How long nothing is taken when there are no descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// Carries connections, until it is dropped.
#[derive(Debug)]
pub(crate) struct Carrying(JoinHandle<()>);

impl Drop for Carrying {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Sandbox {
    /// Carries connections to its namespace's loopback into the guest, while it lives.
    pub(crate) fn carry_ports(self: &Arc<Self>, inlet: Inlet) -> Result<()> {
        let (listener, attachment) = inlet.into_parts();
        let listener = TcpListener::from_std(listener)
            .map_err(|e| Error::Machine(format!("watch the pod's loopback: {e}")))?;
        let task = tokio::spawn(accept(Arc::downgrade(self), listener, attachment));
        *lock(&self.carrying) = Some(Carrying(task));
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

/// Takes connections. The attachment brings them.
async fn accept(sandbox: Weak<Sandbox>, listener: TcpListener, _attachment: OwnedFd) {
    let places = Arc::new(Semaphore::new(MAX));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                debug!("take a connection to the pod's loopback: {e}");
                sleep(PAUSE).await;
                continue;
            }
        };
        // One too many is closed.
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            let sandbox = sandbox.clone();
            tokio::spawn(async move {
                carry(sandbox, stream).await;
                drop(place);
            });
        }
    }
}

/// Carries a connection to its end. It does not keep the sandbox alive.
async fn carry(sandbox: Weak<Sandbox>, mut stream: TcpStream) {
    let Some(sandbox) = sandbox.upgrade() else {
        return;
    };
    let guest = sandbox.port(&stream).await;
    drop(sandbox);
    match guest {
        // Whichever end breaks off, the other one sees the end.
        Ok(mut guest) => {
            let _ = copy_bidirectional(&mut stream, &mut guest).await;
        }
        Err(e) => debug!("carry a connection to the guest: {e}"),
    }
}
