//! How a namespace routes: what it has of routes, and of rules which table of them is looked at.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use rtnetlink::{
    Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHop,
            RouteNextHopFlags, RouteProtocol, RouteType,
        },
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use crate::{Error, Hop, Interface, Result, Route, Rule, WideRoute, error, inventory::all};

/// The rules that every kernel makes: priority and table.
const USUAL: [(u32, u32); 3] = [(0, 255), (32_766, 254), (32_767, 253)];
/// `FIB_RULE_INVERT` (linux/fib_rules.h).
const INVERT: u32 = 2;
/// The table of a namespace's own addresses.
const LOCAL: u32 = 255;
/// What the kernel says where nothing is suppressed.
const NOTHING: u32 = u32::MAX;

/// Routes over one link, with its number, and those of no single one of `links`.
pub(crate) async fn routes(
    handle: &Handle,
    links: &BTreeMap<u32, Interface>,
) -> Result<(Vec<(u32, Route)>, Vec<WideRoute>)> {
    let (mut over, mut wide) = (Vec::new(), Vec::new());
    for query in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        let listed = all("list routes", handle.route().get(query).execute()).await;
        for message in unless_without(listed)? {
            match route(&message, links) {
                Some(Found::Over(index, route)) => over.push((index, route)),
                Some(Found::Wide(route)) => wide.push(route),
                None => {}
            }
        }
    }
    Ok((over, wide))
}

/// Rules, but for those that every namespace has.
pub(crate) async fn rules(handle: &Handle) -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let listed = all("list rules", handle.rule().get(version).execute()).await;
        rules.extend(unless_without(listed)?.iter().filter_map(rule));
    }
    Ok(rules)
}

/// A kernel without a family, or without rules, has none of them.
fn unless_without<T>(listed: Result<Vec<T>>) -> Result<Vec<T>> {
    match listed {
        Err(Error::Netlink { source, .. })
            if matches!(
                error::code(&source),
                Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(Vec::new())
        }
        other => other,
    }
}

/// A gateway must be on the link before there is a route over it.
pub(crate) fn in_order(routes: &mut [Route]) {
    routes.sort_by_key(|route| (route.gateway.is_some(), u8::MAX - route.prefix));
}

enum Found {
    Over(u32, Route),
    Wide(WideRoute),
}

fn route(message: &RouteMessage, links: &BTreeMap<u32, Interface>) -> Option<Found> {
    let header = &message.header;
    let table = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let table = table.unwrap_or_else(|| header.table.into());
    // Those of the kernel's come with an address, or with being up.
    if table == LOCAL || header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let mut route = Route {
        table,
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
            RouteAttribute::MultiPath(paths) => {
                hops.extend(paths.iter().filter_map(|path| hop(path, links)));
            }
            _ => {}
        }
    }
    let wide = |route, hops| WideRoute {
        kind: header.kind.into(),
        hops,
        route,
    };
    match (header.kind, link) {
        (RouteType::Unicast, Some(index)) => Some(Found::Over(index, route)),
        (RouteType::Unicast, None) if !hops.is_empty() => Some(Found::Wide(wide(route, hops))),
        (
            RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw,
            _,
        ) => Some(Found::Wide(wide(route, Vec::new()))),
        _ => None,
    }
}

/// A next hop, if its link is one that a guest may have, and up.
fn hop(path: &RouteNextHop, links: &BTreeMap<u32, Interface>) -> Option<Hop> {
    if path.flags.contains(RouteNextHopFlags::Dead) {
        return None;
    }
    let gateway = path.attributes.iter().find_map(|a| match a {
        RouteAttribute::Gateway(to) => ip(to),
        _ => None,
    });
    Some(Hop {
        mac: links.get(&path.interface_index)?.mac,
        gateway,
        onlink: path.flags.contains(RouteNextHopFlags::Onlink),
        weight: path.hops,
    })
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

fn rule(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let mut rule = Rule {
        ipv6: match header.family {
            AddressFamily::Inet => false,
            AddressFamily::Inet6 => true,
            _ => return None,
        },
        table: header.table.into(),
        action: header.action.into(),
        invert: header.flags.bits() & INVERT != 0,
        tos: header.tos,
        ..Rule::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Source(ip) => rule.source = Some((*ip, header.src_len)),
            RuleAttribute::Destination(ip) => rule.destination = Some((*ip, header.dst_len)),
            RuleAttribute::Iifname(name) => rule.incoming.clone_from(name),
            RuleAttribute::Oifname(name) => rule.outgoing.clone_from(name),
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mask = *mask,
            RuleAttribute::IpProtocol(protocol) => rule.protocol = (*protocol).into(),
            RuleAttribute::SourcePortRange(ports) => {
                rule.source_ports = Some((ports.start, ports.end));
            }
            RuleAttribute::DestinationPortRange(ports) => {
                rule.destination_ports = Some((ports.start, ports.end));
            }
            RuleAttribute::UidRange(users) => rule.users = Some((users.start, users.end)),
            RuleAttribute::SuppressPrefixLen(prefix) if *prefix != NOTHING => {
                rule.suppress_prefix = Some(*prefix);
            }
            RuleAttribute::Goto(priority) => rule.target = Some(*priority),
            // Of a device for virtual routing, which guests have not.
            RuleAttribute::L3MDev(true) => return None,
            _ => {}
        }
    }
    let usual = Rule {
        ipv6: rule.ipv6,
        priority: rule.priority,
        table: rule.table,
        action: RuleAction::ToTable.into(),
        ..Rule::default()
    };
    let is_usual = USUAL.contains(&(rule.priority, rule.table)) && rule == usual;
    (!is_usual).then_some(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_link_comes_before_what_is_behind_it() {
        let route = |destination: [u8; 4], prefix, gateway: Option<[u8; 4]>| Route {
            table: 254,
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
