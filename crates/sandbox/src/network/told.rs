//! What the agent is told.

use std::net::IpAddr;

use walnut_network::{Interface, Route, Rule, WideRoute};
use walnut_protocol::agent::{
    Address, Hop, Interface as AgentInterface, Neighbour, Range, Route as AgentRoute,
    Rule as AgentRule,
};

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

pub(super) fn interface(interface: &Interface) -> AgentInterface {
    let addresses = interface.addresses.iter().map(|address| Address {
        ip: bytes(address.ip),
        prefix: address.prefix.into(),
        peer: address.peer.map(bytes).unwrap_or_default(),
        broadcast: address.broadcast.map(bytes).unwrap_or_default(),
        ..Default::default()
    });
    let routes = interface.routes.iter().map(route);
    let neighbours = interface.neighbours.iter().map(|neighbour| Neighbour {
        ip: bytes(neighbour.ip),
        mac: neighbour.mac.to_vec(),
        ..Default::default()
    });
    AgentInterface {
        mac: interface.mac.to_vec(),
        name: interface.name.clone(),
        mtu: interface.mtu,
        addresses: addresses.collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
        down: !interface.up,
        noarp: interface.noarp,
        ..Default::default()
    }
}

fn route(route: &Route) -> AgentRoute {
    AgentRoute {
        destination: bytes(route.destination),
        prefix: route.prefix.into(),
        gateway: route.gateway.map(bytes).unwrap_or_default(),
        source: route.source.map(bytes).unwrap_or_default(),
        scope: route.scope.into(),
        metric: route.metric,
        mtu: route.mtu,
        onlink: route.onlink,
        table: route.table,
        ..Default::default()
    }
}

pub(super) fn wide_route(wide: &WideRoute) -> AgentRoute {
    let hops = wide.hops.iter().map(|hop| Hop {
        mac: hop.mac.to_vec(),
        gateway: hop.gateway.map(bytes).unwrap_or_default(),
        onlink: hop.onlink,
        weight: hop.weight.into(),
        ..Default::default()
    });
    AgentRoute {
        kind: wide.kind.into(),
        hops: hops.collect(),
        ..route(&wide.route)
    }
}

pub(super) fn rule(rule: &Rule) -> AgentRule {
    let network = |network: Option<(IpAddr, u8)>| match network {
        Some((ip, prefix)) => (bytes(ip), prefix.into()),
        None => (Vec::new(), 0),
    };
    let range = |range: Option<(u32, u32)>| {
        let range = range.map(|(first, last)| Range {
            first,
            last,
            ..Default::default()
        });
        range.into()
    };
    let ports = |ports: Option<(u16, u16)>| ports.map(|(a, b)| (a.into(), b.into()));
    let (source, source_prefix) = network(rule.source);
    let (destination, destination_prefix) = network(rule.destination);
    AgentRule {
        ipv6: rule.ipv6,
        priority: rule.priority,
        table: rule.table,
        action: rule.action.into(),
        invert: rule.invert,
        source,
        source_prefix,
        destination,
        destination_prefix,
        tos: rule.tos.into(),
        incoming: rule.incoming.clone(),
        outgoing: rule.outgoing.clone(),
        mark: rule.mark,
        mask: rule.mask,
        protocol: rule.protocol.into(),
        source_ports: range(ports(rule.source_ports)),
        destination_ports: range(ports(rule.destination_ports)),
        users: range(rule.users),
        suppress_prefix: rule
            .suppress_prefix
            .map_or(0, |bits| bits.saturating_add(1)),
        target: rule.target.unwrap_or(0),
        ..Default::default()
    }
}
