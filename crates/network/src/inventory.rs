//! What a namespace has: links, addresses, neighbours, and with [`routing`] the rest.

use std::{collections::BTreeMap, net::IpAddr};

use futures::{Stream, TryStreamExt};
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        address::{
            AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
        },
        link::{
            InfoData, InfoIpVlan, InfoKind, IpVlanMode, LinkAttribute, LinkFlags, LinkInfo,
            LinkLayerType, LinkMessage,
        },
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    },
};

use crate::{Address, Error, Interface, Mac, Neighbour, Result, Routing, routing, tap};

/// What a namespace has.
#[derive(Debug, Default)]
pub(crate) struct Inventory {
    /// The links that a machine can take the place of, by their numbers.
    pub(crate) links: BTreeMap<u32, Interface>,
    /// Why it can not take that of others, which are up.
    pub(crate) refused: Vec<(u32, Error)>,
    /// Routes of no single link, and rules.
    pub(crate) routing: Routing,
}

/// What the namespace of this handle has, but for loopback and what a machine's taps are.
pub(crate) async fn read(handle: &Handle) -> Result<Inventory> {
    let mut inventory = Inventory::default();
    for message in all("list links", handle.link().get().execute()).await? {
        let index = message.header.index;
        match interface(&message) {
            Ok(None) => {}
            Ok(Some(interface)) => drop(inventory.links.insert(index, interface)),
            Err(e) => inventory.refused.push((index, e)),
        }
    }
    let found = &mut inventory.links;
    if found.is_empty() {
        return Ok(inventory);
    }
    for message in all("list addresses", handle.address().get().execute()).await? {
        if let Some(interface) = found.get_mut(&message.header.index) {
            interface.addresses.extend(address(&message));
        }
    }
    let (over, wide) = routing::routes(handle, found).await?;
    for (index, route) in over {
        if let Some(interface) = found.get_mut(&index) {
            interface.routes.push(route);
        }
    }
    for message in all("list neighbours", handle.neighbours().get().execute()).await? {
        if let Some(interface) = found.get_mut(&message.header.ifindex) {
            interface.neighbours.extend(neighbour(&message));
        }
    }
    for interface in found.values_mut() {
        routing::in_order(&mut interface.routes);
    }
    inventory.routing = Routing {
        routes: wide,
        rules: routing::rules(handle).await?,
    };
    Ok(inventory)
}

pub(crate) async fn all<T>(
    what: &str,
    stream: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>> {
    stream.try_collect().await.map_err(Error::netlink(what))
}

fn interface(message: &LinkMessage) -> Result<Option<Interface>> {
    let flags = message.header.flags;
    if flags.contains(LinkFlags::Loopback) {
        return Ok(None);
    }
    let mut interface = Interface {
        up: flags.contains(LinkFlags::Up),
        noarp: flags.contains(LinkFlags::Noarp),
        ..Interface::default()
    };
    let (mut mac, mut tap, mut l3s) = (None, false, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Address(address) => mac = Mac::try_from(address.as_slice()).ok(),
            LinkAttribute::LinkInfo(info) => {
                tap = info.contains(&LinkInfo::Kind(InfoKind::Tun));
                l3s = info.iter().any(is_l3s);
            }
            _ => {}
        }
    }
    if tap && tap::is_ours(&interface.name) {
        return Ok(None);
    }
    if l3s && interface.up {
        return Err(Error::L3s(interface.name));
    }
    let kind = message.header.link_layer_type;
    match mac {
        Some(mac) if kind == LinkLayerType::Ether => interface.mac = mac,
        // What is not up is nobody's yet.
        _ if !interface.up => return Ok(None),
        _ => {
            return Err(Error::Kind {
                name: interface.name,
                kind: format!("{kind:?}"),
            });
        }
    }
    Ok(Some(interface))
}

/// An `ipvlan` whose packets pass the host's firewall as the host's own do: they never are
/// the link's frames.
fn is_l3s(info: &LinkInfo) -> bool {
    let LinkInfo::Data(InfoData::IpVlan(all)) = info else {
        return false;
    };
    all.contains(&InfoIpVlan::Mode(IpVlanMode::L3S))
}

fn address(message: &AddressMessage) -> Option<Address> {
    if message.header.scope == AddressScope::Link && message.header.family == AddressFamily::Inet6 {
        return None;
    }
    let (mut local, mut peer, mut broadcast) = (None, None, None);
    let mut lasts = message.header.flags.contains(AddressHeaderFlags::Permanent);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(flags) => lasts = flags.contains(AddressFlags::Permanent),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(IpAddr::V4(*ip)),
            _ => {}
        }
    }
    let ip = local.or(peer)?;
    Some(Address {
        ip,
        prefix: message.header.prefix_len,
        peer: peer.filter(|peer| *peer != ip),
        broadcast,
        learned: !lasts,
    })
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(to)) => {
                ip = Some(IpAddr::V4(*to))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(to)) => {
                ip = Some(IpAddr::V6(*to));
            }
            NeighbourAttribute::LinkLayerAddress(address) => {
                mac = Mac::try_from(address.as_slice()).ok();
            }
            _ => {}
        }
    }
    Some(Neighbour { ip: ip?, mac: mac? })
}
