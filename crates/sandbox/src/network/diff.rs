//! What an interface, or a namespace, has no more.

use walnut_network::{Interface, Routing};

/// What `now` has not of what it had `before`; `None` if it has all of it. What the guest
/// learns by itself is not the namespace's to take away.
pub(super) fn gone(before: &Interface, now: &Interface) -> Option<Interface> {
    let lost = Interface {
        name: now.name.clone(),
        mac: now.mac,
        addresses: left_out(&before.addresses, &now.addresses, |it| it.learned),
        routes: left_out(&before.routes, &now.routes, |it| it.learned),
        neighbours: left_out(&before.neighbours, &now.neighbours, |_| false),
        ..Interface::default()
    };
    let nothing = lost.addresses.is_empty() && lost.routes.is_empty() && lost.neighbours.is_empty();
    (!nothing).then_some(lost)
}

/// The same of what is of no single link.
pub(super) fn gone_routing(before: &Routing, now: &Routing) -> Routing {
    Routing {
        routes: left_out(&before.routes, &now.routes, |it| it.route.learned),
        rules: left_out(&before.rules, &now.rules, |_| false),
    }
}

fn left_out<T: Clone + PartialEq>(before: &[T], now: &[T], passed: fn(&T) -> bool) -> Vec<T> {
    let lost = before.iter().filter(|it| !passed(it) && !now.contains(it));
    lost.cloned().collect()
}

#[cfg(test)]
mod tests {
    use walnut_network::{Address, Route};

    use super::*;

    fn address(last: u8, learned: bool) -> Address {
        Address {
            ip: [10, 0, 0, last].into(),
            prefix: 24,
            peer: None,
            broadcast: None,
            learned,
        }
    }

    fn route(to: u8) -> Route {
        Route {
            table: 254,
            destination: [10, to, 0, 0].into(),
            prefix: 16,
            gateway: Some([10, 0, 0, 1].into()),
            onlink: false,
            source: None,
            scope: 0,
            metric: 0,
            mtu: 0,
            learned: false,
        }
    }

    #[test]
    fn only_what_the_namespace_took_away_is_gone() {
        let before = Interface {
            name: "eth0".into(),
            mac: [2; 6],
            mtu: 1500,
            up: true,
            noarp: false,
            addresses: vec![address(2, false), address(3, false), address(4, true)],
            routes: vec![route(1), route(2)],
            neighbours: Vec::new(),
        };
        assert_eq!(gone(&before, &before), None);
        let renamed = Interface {
            name: "eth1".into(),
            mtu: 1400,
            ..before.clone()
        };
        assert_eq!(gone(&before, &renamed), None);
        let now = Interface {
            addresses: vec![address(3, false), address(9, false)],
            routes: vec![route(2)],
            ..renamed
        };
        let lost = gone(&before, &now).unwrap();
        assert_eq!((lost.name.as_str(), lost.mac), ("eth1", [2; 6]));
        assert_eq!(lost.addresses, [address(2, false)]);
        assert_eq!(lost.routes, [route(1)]);
    }
}
