//! A container's `/etc/hosts` and `/etc/resolv.conf`.

use std::{fs, net::IpAddr};

use serde::{Deserialize, Serialize};
use walnut_network::Network;

use super::Attachments;

/// The host's name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Those that a resolver on the host's loopback asks itself.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";
/// Most that is read of either.
const TEXT_MAX: usize = 64 << 10;

/// What was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// The container's name.
    #[serde(default)]
    pub name: String,
    /// What it calls itself.
    #[serde(default)]
    pub hostname: String,
    /// Lines for `/etc/hosts`.
    #[serde(default)]
    pub hosts: Vec<HostEntry>,
    /// Name servers and where they look.
    #[serde(default)]
    pub servers: NameServers,
}

/// A name with an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEntry {
    /// The name.
    pub name: String,
    /// Its address; the host's on the container's first network where there is none.
    pub ip: Option<IpAddr>,
}

/// Name servers; what is empty is as the host has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameServers {
    /// Their addresses.
    #[serde(default)]
    pub servers: Vec<IpAddr>,
    /// Domains that names without one are looked for in.
    #[serde(default)]
    pub search: Vec<String>,
    /// Options of the resolver's.
    #[serde(default)]
    pub options: Vec<String>,
}

/// `/etc/hosts` of a container.
pub(super) fn hosts(attachments: &Attachments) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let gateway = attachments.links.iter().flat_map(|link| link.made().ips);
    let gateway = gateway.filter_map(|ip| ip.gateway).next();
    for entry in &attachments.names.hosts {
        if let Some(ip) = entry.ip.or(gateway) {
            text.push_str(&format!("{ip}\t{}\n", entry.name));
        }
    }
    let Names { name, hostname, .. } = &attachments.names;
    let own = match name == hostname || name.is_empty() {
        true => hostname.clone(),
        false => format!("{hostname} {name}"),
    };
    for ip in attachments.addresses() {
        text.push_str(&format!("{ip}\t{own}\n"));
    }
    text
}

/// `/etc/resolv.conf` of a container.
pub(super) fn resolv_conf(attachments: &Attachments) -> Option<String> {
    let read = |path| {
        fs::read_to_string(path)
            .ok()
            .filter(|t| t.len() <= TEXT_MAX)
    };
    let host = parse(&read(RESOLV_CONF)?);
    let host = match host.servers.is_empty() {
        true => read(UPSTREAM).map_or(host, |text| parse(&text)),
        false => host,
    };
    let mut asked = attachments.names.servers.clone();
    // A network's own server asks the host's.
    let networks = attachments.links.iter().filter_map(|link| link.list().ok());
    let named = networks.map(Network::of).filter(|network| network.dns);
    let own: Vec<_> = named
        .flat_map(|network| network.subnets)
        .filter_map(|range| range.gateway)
        .collect();
    if !own.is_empty() {
        // What was asked for is whom that one asks.
        asked.servers = own;
        bare_first(&mut asked.options, &host.options);
    }
    Some(write(&asked, &host))
}

/// Has names without a domain looked for as they are, before they are in a domain of the
/// host's, where somebody else may be called so. Docker does it too.
fn bare_first(asked: &mut Vec<String>, host: &[String]) {
    let dots = |option: &String| option.starts_with("ndots:");
    if asked.iter().any(dots) {
        return;
    }
    if asked.is_empty() {
        asked.extend(host.iter().filter(|option| !dots(option)).cloned());
    }
    asked.push("ndots:0".into());
}

fn write(asked: &NameServers, host: &NameServers) -> String {
    fn either<'a, T>(asked: &'a [T], host: &'a [T]) -> &'a [T] {
        if asked.is_empty() { host } else { asked }
    }
    let mut text = String::new();
    let search = either(&asked.search, &host.search);
    // As Docker has it: one dot says that there are none.
    if !search.is_empty() && search != ["."] {
        text.push_str(&format!("search {}\n", search.join(" ")));
    }
    for server in either(&asked.servers, &host.servers) {
        text.push_str(&format!("nameserver {server}\n"));
    }
    let options = either(&asked.options, &host.options);
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    text
}

/// A file of the host's, as far as it is good for others: whoever listens on the host's
/// loopback, or is named by a link of its, is not there for a container.
fn parse(text: &str) -> NameServers {
    let mut found = NameServers::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(key) = words.next() else { continue };
        let words: Vec<_> = words.map(str::to_owned).collect();
        match key {
            "nameserver" => {
                let server = words.first().and_then(|word| word.parse::<IpAddr>().ok());
                found.servers.extend(server.filter(|ip| !ip.is_loopback()));
            }
            // The last one counts.
            "search" | "domain" => found.search = words,
            "options" => found.options.extend(words),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_goes_before_what_the_host_has() {
        let host = parse(
            "# made\nnameserver 127.0.0.53\nnameserver 192.0.2.53\nnameserver fe80::1%eth0\nnameserver fd00::53\n\
             domain a.test\nsearch b.test c.test\noptions ndots:2 edns0\nsortlist x\n",
        );
        assert_eq!(
            write(&NameServers::default(), &host),
            "search b.test c.test\nnameserver 192.0.2.53\nnameserver fd00::53\noptions ndots:2 edns0\n"
        );
        let asked = NameServers {
            servers: vec!["198.51.100.1".parse().unwrap()],
            search: vec![".".into()],
            options: vec!["ndots:1".into()],
        };
        assert_eq!(
            write(&asked, &host),
            "nameserver 198.51.100.1\noptions ndots:1\n"
        );
        let options = |mut asked: Vec<String>| {
            bare_first(&mut asked, &host.options);
            asked.join(" ")
        };
        assert_eq!(options(vec![]), "edns0 ndots:0");
        assert_eq!(options(vec!["rotate".into()]), "rotate ndots:0");
        assert_eq!(options(vec!["ndots:3".into()]), "ndots:3");
    }
}
