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
    /// The port on the host.
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

/// Sockets that keep others from the ports, for as long as they are held: the rules that
/// carry packets to the container would take them from whoever listens already.
pub(super) fn reserve(ports: &[PublishedPort]) -> Result<Vec<OwnedFd>> {
    let mut held = Vec::new();
    for port in ports {
        let all = [
            IpAddr::from(Ipv4Addr::UNSPECIFIED),
            Ipv6Addr::UNSPECIFIED.into(),
        ];
        let (addresses, asked) = match &port.host_ip {
            Some(ip) => (std::slice::from_ref(ip), true),
            None => (&all[..], false),
        };
        for ip in addresses {
            match hold(*ip, port) {
                Ok(socket) => held.push(socket),
                // A host without IPv6.
                Err(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL) if !asked => {
                }
                Err(e) => return Err(refused(port, e)),
            }
        }
    }
    Ok(held)
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

fn hold(ip: IpAddr, port: &PublishedPort) -> rustix::io::Result<OwnedFd> {
    let kind = match port.protocol {
        Transport::Tcp => SocketType::STREAM,
        Transport::Udp => SocketType::DGRAM,
    };
    let family = match ip {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if ip.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if port.protocol == Transport::Tcp {
        // Connections that are over do not count; who listens does.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &SocketAddr::new(ip, port.host_port))?;
    if port.protocol == Transport::Tcp {
        // One that only has its port would share it with who asks as it did. Nobody gets
        // here: connections are the container's, or refused.
        rustix::net::listen(&socket, 0)?;
    }
    Ok(socket)
}
