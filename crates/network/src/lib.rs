//! A pod's network: from the namespace that a CNI plugin has furnished to taps for a
//! machine, and to what the guest must know to be on the network as the namespace is.
//!
//! [`connect`] reads every link of the namespace (addresses, routes, permanent
//! neighbours), makes a tap beside each, and has the kernel pass frames between the two
//! (`tc`: an ingress qdisc with filters that redirect). The link keeps its
//! addresses, so that plugins find what they left; what arrives on it goes to the
//! guest before the namespace's own stack sees it. Frames of the guest's with another
//! source than the link's address do not leave the tap, and no packets that [`Rules`] deny.
//! A [`Watch`] tells when any of it has changed.
//!
//! Where nobody else makes networks, it does: [`Networks`] are those of a node of Walnut's,
//! ordinary lists of CNI's, and [`Cni`] has plugins put a container's link to one into a
//! namespace of its own ([`OwnNamespace`]).
//!
//! It knows namespaces, links and taps; it knows no machine, no agent and no front end.

mod bpf;
mod cni;
mod egress;
mod error;
mod filter;
mod inlet;
mod inventory;
mod links;
mod made;
mod namespace;
mod networks;
mod redirect;
mod resolver;
mod routing;
mod tap;
mod watch;

use std::{
    collections::BTreeMap, fs::File, net::IpAddr, os::fd::OwnedFd, path::PathBuf, sync::Arc,
};

use serde::{Deserialize, Serialize};
use tracing::debug;

pub use cni::{Attachment, Cni, CniInterface, CniIp, CniResult, ConfList};
pub use egress::{RULES_MAX, Rules, Verdict};
pub use error::{Error, Result};
pub use inlet::{Inlet, is_meant};
pub use ipnet::IpNet;
pub use made::OwnNamespace;
pub use networks::{DEFAULT, Network, Networks, NewNetwork, check_programs};
pub use resolver::{Named, Resolver};
pub use watch::{Found, Seen, Watch};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The network namespace of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespace {
    /// The one that this file stands for, such as `/var/run/netns/NAME`; not the caller's.
    At(PathBuf),
    /// The caller's own.
    Own,
}

/// A namespace that a machine is on.
#[derive(Debug)]
pub struct Connection {
    /// Its links.
    pub links: Vec<Link>,
    /// How it routes beside that.
    pub routing: Routing,
    /// Its loopback. None where there are no links, and where the kernel or the caller's
    /// privileges do not allow it.
    pub inlet: Option<Inlet>,
    /// Tells of changes since.
    pub watch: Watch,
}

/// A link of a namespace, with a tap through which a machine takes its place.
#[derive(Debug)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// The tap's number.
    pub tap: u32,
    /// What the guest must know of it.
    pub interface: Interface,
    /// The tap's queues: descriptors of `/dev/net/tun` with `IFF_VNET_HDR`. With the
    /// last of them the tap goes.
    pub taps: Vec<OwnedFd>,
}

/// A network interface, as the guest is to have it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Its name, such as `eth0`.
    pub name: String,
    /// Its address.
    pub mac: Mac,
    /// Bytes in a packet at most.
    pub mtu: u32,
    /// It is up. One that is not has no routes.
    pub up: bool,
    /// Nobody is asked for Ethernet addresses on it: packets find their way by their IP
    /// addresses, as `ipvlan` in its L3 mode has it.
    #[serde(default)]
    pub noarp: bool,
    /// Addresses, but for those of link scope, which a kernel makes by itself.
    pub addresses: Vec<Address>,
    /// Routes over it alone, but for those that come with an address, in the order in which
    /// they can be made.
    pub routes: Vec<Route>,
    /// Neighbours that are there for good.
    pub neighbours: Vec<Neighbour>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// The other end of a link with two, if that is not in the network.
    pub peer: Option<IpAddr>,
    /// The network's broadcast address.
    pub broadcast: Option<IpAddr>,
    /// Learned from the network, where a guest learns it as well: that the namespace has
    /// forgotten it, to which nothing comes any more, says nothing.
    pub learned: bool,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// The table that it is in; 254 is the main one.
    pub table: u32,
    /// The network; all of the family for a default route.
    pub destination: IpAddr,
    /// Bits of it.
    pub prefix: u8,
    /// The next hop; none for what is on the link.
    pub gateway: Option<IpAddr>,
    /// The next hop is on the link, whatever addresses say.
    pub onlink: bool,
    /// The source of packets that have none yet.
    pub source: Option<IpAddr>,
    /// The kernel's `RT_SCOPE_*`.
    pub scope: u8,
    /// The lower the better.
    pub metric: u32,
    /// Bytes in a packet at most; 0: the interface's.
    pub mtu: u32,
    /// As an address's.
    pub learned: bool,
}

/// What a namespace has of routes and rules that are of no single link.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Routing {
    /// Routes with several next hops, and such as lead nowhere.
    pub routes: Vec<WideRoute>,
    /// Rules which table is looked at, but for those that every kernel makes.
    pub rules: Vec<Rule>,
}

/// A route of no single link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WideRoute {
    /// The kernel's `RTN_*`.
    pub kind: u8,
    /// Where it leads, if anywhere.
    pub hops: Vec<Hop>,
    /// The rest, without a gateway.
    pub route: Route,
}

/// A next hop of a route with several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hop {
    /// Address of the link that it is over.
    pub mac: Mac,
    /// None for what is on the link.
    pub gateway: Option<IpAddr>,
    /// It is on the link, whatever addresses say.
    pub onlink: bool,
    /// Its weight less 1.
    pub weight: u8,
}

/// A rule which table is looked at (ip-rule(8)). What is not there fits everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Of IPv6.
    pub ipv6: bool,
    /// The lowest is asked first.
    pub priority: u32,
    /// The table.
    pub table: u32,
    /// The kernel's `FR_ACT_*`.
    pub action: u8,
    /// It holds for what does not fit.
    pub invert: bool,
    /// Source of a packet, with the bits of its network.
    pub source: Option<(IpAddr, u8)>,
    /// Destination.
    pub destination: Option<(IpAddr, u8)>,
    /// Type of service; 0 for any.
    pub tos: u8,
    /// Interface that it came by; empty for any.
    pub incoming: String,
    /// Interface that its sender is bound to.
    pub outgoing: String,
    /// Mark of a packet, as far as `mask` has bits.
    pub mark: u32,
    /// Bits of the mark that are looked at.
    pub mask: u32,
    /// IP protocol; 0 for any.
    pub protocol: u8,
    /// First and last port.
    pub source_ports: Option<(u16, u16)>,
    /// First and last port.
    pub destination_ports: Option<(u16, u16)>,
    /// First and last user.
    pub users: Option<(u32, u32)>,
    /// What leads to a network of so many bits or fewer is passed over.
    pub suppress_prefix: Option<u32>,
    /// The rule to go on at, for an action that says so.
    pub target: Option<u32>,
}

/// A neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Neighbour {
    /// Its address.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// Connects each link of a namespace that is up, but for loopback, to a tap with
/// `queues` queues. Fails on a link that is not Ethernet's. On failure no tap is left,
/// and the links pass their frames on as before. What all lists of `egress` allow is sent.
///
/// # Errors
/// If the namespace cannot be entered, is the host's own, or the kernel refuses.
pub async fn connect(namespace: &Namespace, queues: u16, egress: Vec<Rules>) -> Result<Connection> {
    let namespace = namespace.clone();
    let connect = connect_all(queues, egress.clone());
    let connected = namespace::within(namespace, move || Box::pin(connect)).await?;
    let watch = Watch::new(connected.events, Arc::new(connected.held), queues, egress)?;
    Ok(Connection {
        links: connected.links,
        routing: connected.routing,
        inlet: connected.inlet,
        watch,
    })
}

struct Connected {
    links: Vec<Link>,
    routing: Routing,
    inlet: Option<Inlet>,
    events: OwnedFd,
    held: File,
}

async fn connect_all(queues: u16, egress: Vec<Rules>) -> Result<Connected> {
    // First, for what changes later is to be told.
    let (events, held) = (watch::listen()?, namespace::hold()?);
    let handle = links::open()?;
    let mut found = inventory::read(&handle).await?;
    if let Some((_, e)) = found.refused.pop() {
        return Err(e);
    }
    apart(&found.links)?;
    let mut links = Vec::with_capacity(found.links.len());
    let mut done = Vec::with_capacity(found.links.len());
    for (index, interface) in found.links {
        if !interface.up {
            continue;
        }
        done.push((index, interface.name.clone()));
        match redirect::connect(&handle, index, &interface, queues, &egress).await {
            Ok((tap, taps)) => links.push(Link {
                index,
                tap,
                interface,
                taps,
            }),
            Err(e) => {
                for (index, name) in &done {
                    redirect::disconnect(&handle, *index, name).await;
                }
                return Err(e);
            }
        }
    }
    let inlet = match links.is_empty() {
        true => None,
        false => open_inlet(),
    };
    Ok(Connected {
        links,
        routing: found.routing,
        inlet,
        events,
        held,
    })
}

/// Refuses links that a guest could not tell apart.
fn apart(links: &BTreeMap<u32, Interface>) -> Result<()> {
    let mut seen: BTreeMap<Mac, &str> = BTreeMap::new();
    for interface in links.values().filter(|it| it.up) {
        if let Some(other) = seen.insert(interface.mac, &interface.name) {
            return Err(Error::SameMac(other.to_owned(), interface.name.clone()));
        }
    }
    Ok(())
}

/// The calling thread's namespace's loopback, if it can be had.
fn open_inlet() -> Option<Inlet> {
    Inlet::open()
        .inspect_err(|e| debug!("no connections to the pod's loopback: {e}"))
        .ok()
}
