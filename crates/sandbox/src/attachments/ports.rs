//! Ports of the host's that are a container's.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A port of the host's, in the words of CNI's conventions ("portMappings").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PublishedPort {
    /// The port on the host; 0 for any that is free, until the container is on its networks.
    pub host_port: u16,
    /// The port in the container.
    pub container_port: u16,
    /// What is carried.
    pub protocol: Transport,
    /// The host's address; all of them where there is none.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Streams.
    Tcp,
    /// Datagrams.
    Udp,
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(ip) => write!(f, "{}", SocketAddr::new(ip, self.host_port))?,
            None => write!(f, "{}", self.host_port)?,
        }
        f.write_str(match self.protocol {
            Transport::Tcp => "/tcp",
            Transport::Udp => "/udp",
        })
    }
}

/// Attempts at a port that is free at all addresses.
const TRIES: u32 = 64;

/// Sockets that keep others from the ports, for as long as they are held: the rules that
/// carry packets to the container would take them from whoever listens already. A port that
/// may be any becomes one that is free.
pub(super) fn reserve(ports: &mut [PublishedPort]) -> Result<Vec<OwnedFd>> {
    let mut held = Vec::new();
    for port in ports {
        let mut tries = if port.host_port == 0 { TRIES } else { 1 };
        let (number, sockets) = loop {
            tries -= 1;
            match hold_all(port) {
                // Free at one address, and taken at another.
                Err(rustix::io::Errno::ADDRINUSE) if tries > 0 => {}
                Err(e) => return Err(refused(port, e)),
                Ok(done) => break done,
            }
        };
        port.host_port = number;
        held.extend(sockets);
    }
    Ok(held)
}

/// Takes a port at all of its addresses; its number.
fn hold_all(port: &PublishedPort) -> rustix::io::Result<(u16, Vec<OwnedFd>)> {
    let all = [
        IpAddr::from(Ipv4Addr::UNSPECIFIED),
        Ipv6Addr::UNSPECIFIED.into(),
    ];
    let (addresses, asked) = match &port.host_ip {
        Some(ip) => (std::slice::from_ref(ip), true),
        None => (&all[..], false),
    };
    let (mut number, mut held) = (port.host_port, Vec::new());
    for ip in addresses {
        match hold(SocketAddr::new(*ip, number), port.protocol) {
            Ok(socket) => {
                let name = SocketAddr::try_from(rustix::net::getsockname(&socket)?);
                number = name.map_err(|_| rustix::io::Errno::INVAL)?.port();
                held.push(socket);
            }
            // A host without IPv6.
            Err(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL) if !asked => {}
            Err(e) => return Err(e),
        }
    }
    Ok((number, held))
}

fn refused(port: &PublishedPort, why: rustix::io::Errno) -> Error {
    let what = match why {
        rustix::io::Errno::ADDRINUSE => {
            "it is in use on this host, by a container (`walnut ps` shows their ports) or another program; choose another".to_owned()
        }
        rustix::io::Errno::ADDRNOTAVAIL => "the host does not have this address".into(),
        why => io::Error::from(why).to_string(),
    };
    Error::Invalid(format!("publish the port {port}: {what}"))
}

fn hold(at: SocketAddr, protocol: Transport) -> rustix::io::Result<OwnedFd> {
    let kind = match protocol {
        Transport::Tcp => SocketType::STREAM,
        Transport::Udp => SocketType::DGRAM,
    };
    let family = match at {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if at.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if protocol == Transport::Tcp {
        // Connections that are over do not count; who listens does.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &at)?;
    if protocol == Transport::Tcp {
        // One that only has its port would share it with who asks as it did. Nobody gets
        // here: connections are the container's, or refused.
        rustix::net::listen(&socket, 0)?;
    }
    Ok(socket)
}
