//! What a namespace has: links, addresses, routes, neighbours.

use std::{collections::BTreeMap, net::IpAddr};

use futures::{Stream, TryStreamExt};
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{
            AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
        },
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
            RouteProtocol, RouteType,
        },
    },
};

use crate::{Address, Error, Interface, Mac, Neighbour, Result, Route, tap};

/// What a namespace has.
#[derive(Debug, Default)]
pub(crate) struct Inventory {
    /// The links that a machine can take the place of, by their numbers.
    pub(crate) links: BTreeMap<u32, Interface>,
    /// Why it can not take that of others, which are up.
    pub(crate) refused: Vec<(u32, Error)>,
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
    for query in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let messages = match all("list routes", handle.route().get(query).execute()).await {
            // A kernel without IPv6 has no routes of it.
            Err(Error::Netlink { source, .. })
                if crate::error::code(&source) == Some(libc::EAFNOSUPPORT) =>
            {
                continue;
            }
            other => other?,
        };
        for message in messages {
            for (index, route) in routes(&message) {
                if let Some(interface) = found.get_mut(&index) {
                    interface.routes.push(route);
                }
            }
        }
    }
    for message in all("list neighbours", handle.neighbours().get().execute()).await? {
        if let Some(interface) = found.get_mut(&message.header.ifindex) {
            interface.neighbours.extend(neighbour(&message));
        }
    }
    for interface in found.values_mut() {
        in_order(&mut interface.routes);
    }
    Ok(inventory)
}

async fn all<T>(
    what: &str,
    stream: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>> {
    stream.try_collect().await.map_err(Error::netlink(what))
}

/// A gateway must be on the link before there is a route over it.
fn in_order(routes: &mut [Route]) {
    routes.sort_by_key(|route| (route.gateway.is_some(), u8::MAX - route.prefix));
}

fn interface(message: &LinkMessage) -> Result<Option<Interface>> {
    let flags = message.header.flags;
    if flags.contains(LinkFlags::Loopback) {
        return Ok(None);
    }
    let mut interface = Interface {
        up: flags.contains(LinkFlags::Up),
        ..Interface::default()
    };
    let (mut mac, mut tap) = (None, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Address(address) => mac = Mac::try_from(address.as_slice()).ok(),
            LinkAttribute::LinkInfo(info) => {
                tap = info.contains(&LinkInfo::Kind(InfoKind::Tun));
            }
            _ => {}
        }
    }
    if tap && tap::is_ours(&interface.name) {
        return Ok(None);
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

/// The routes of a message with the links that they are over.
fn routes(message: &RouteMessage) -> Vec<(u32, Route)> {
    let header = &message.header;
    let table = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    let ours = table.unwrap_or_else(|| header.table.into()) == main
        && header.kind == RouteType::Unicast
        // Those come with an address, or with being up.
        && header.protocol != RouteProtocol::Kernel;
    if !ours {
        return Vec::new();
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return Vec::new(),
    };
    let mut route = Route {
        destination: any,
        prefix: header.destination_prefix_length,
        gateway: None,
        onlink: header.flags.contains(RouteFlags::Onlink),
        source: None,
        scope: header.scope.into(),
        metric: 0,
        mtu: 0,
        learned: header.protocol == RouteProtocol::Ra,
    };
    let mut link = None;
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => route.destination = ip(to).unwrap_or(any),
            RouteAttribute::Gateway(to) => route.gateway = ip(to),
            RouteAttribute::PrefSource(from) => route.source = ip(from),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(mtu).unwrap_or(0);
            }
            RouteAttribute::MultiPath(paths) => hops.extend(paths),
            _ => {}
        }
    }
    if let Some(index) = link {
        return vec![(index, route)];
    }
    // Of several ways that are equally good a guest gets the first over each link.
    let over = hops.into_iter().map(|hop| {
        let gateway = hop.attributes.iter().find_map(|a| match a {
            RouteAttribute::Gateway(to) => ip(to),
            _ => None,
        });
        let route = Route {
            gateway,
            ..route.clone()
        };
        (hop.interface_index, route)
    });
    let firsts: BTreeMap<u32, Route> = over.rev().collect();
    firsts.into_iter().collect()
}

fn mtu(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_link_comes_before_what_is_behind_it() {
        let route = |destination: [u8; 4], prefix, gateway: Option<[u8; 4]>| Route {
            destination: destination.into(),
            prefix,
            gateway: gateway.map(IpAddr::from),
            onlink: false,
            source: None,
            scope: 0,
            metric: 0,
            mtu: 0,
            learned: false,
        };
        // As calico has it: the gateway is known by a route alone.
        let mut routes = vec![
            route([0; 4], 0, Some([169, 254, 1, 1])),
            route([10, 1, 0, 0], 16, Some([10, 0, 0, 1])),
            route([169, 254, 1, 1], 32, None),
        ];
        in_order(&mut routes);
        let got: Vec<_> = routes.iter().map(|route| route.prefix).collect();
        assert_eq!(got, [32, 16, 0]);
    }
}
