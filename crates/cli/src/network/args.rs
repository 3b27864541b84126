//! The command line of networks.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use walnut_sandbox::{HostEntry, PublishedPort, Transport, networks::IpNet};

use crate::format::ListFormat;

/// Longest range of ports that is published at once.
const RANGE_MAX: u16 = 1024;
/// The word for the host's own address.
const GATEWAY: &str = "host-gateway";

/// What of `walnut run` is of the container's networks.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Network")]
pub(crate) struct NetworkArgs {
    /// Network to be on, or "none", or "container:NAME" for that one's machine and network; several, for a link to each [default: bridge, or the one in
    /// the settings]
    #[arg(long, value_name = "NAME")]
    pub(crate) network: Vec<String>,
    /// Carry what comes to a port of the host to one of the container; ranges of ports as well. Any
    /// free port where none is named (80, or IP::80): `walnut ps` shows it
    #[arg(short, long, value_name = "[[IP:]HOST:]CONTAINER[/tcp|udp]")]
    pub(crate) publish: Vec<PublishArg>,
    /// Address of the container on its first network, of IPv4 or IPv6
    #[arg(long, value_name = "IP")]
    pub(crate) ip: Vec<IpAddr>,
    /// Ethernet address of the container on its first network
    #[arg(long, value_name = "MAC")]
    pub(crate) mac_address: Option<MacArg>,
    /// Name server, instead of the host's
    #[arg(long, value_name = "IP")]
    pub(crate) dns: Vec<IpAddr>,
    /// Domain to look for names in, instead of the host's; "." for none
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) dns_search: Vec<String>,
    /// Option of the resolver's, as ndots:2
    #[arg(long, value_name = "OPTION")]
    pub(crate) dns_option: Vec<String>,
    /// Line for /etc/hosts; "host-gateway" is the host's address on the first network
    #[arg(long, value_name = "NAME:IP")]
    pub(crate) add_host: Vec<AddHostArg>,
    /// Rule for what the container may send, beside the node's; several, of which the first that
    /// fits decides and the last is "allow all" or "deny all", as "allow 10.0.0.0/8 tcp:443"
    #[arg(long, value_name = "RULE")]
    pub(crate) egress: Vec<String>,
}

impl NetworkArgs {
    /// The container whose machine and network it is to share.
    pub(crate) fn joins(&self) -> Result<Option<&str>> {
        let mut joins = self
            .network
            .iter()
            .filter_map(|word| word.strip_prefix("container:"));
        match (joins.next(), self.network.len()) {
            (Some(""), _) => bail!("--network container: name the container: container:NAME"),
            (Some(name), 2..) => {
                bail!("--network container:{name}: it excludes every other network")
            }
            (name, _) => Ok(name),
        }
    }

    /// The first option that says something of a network that there is.
    pub(crate) fn needs_network(&self) -> Option<&'static str> {
        let given = [
            ("--publish", !self.publish.is_empty()),
            ("--ip", !self.ip.is_empty()),
            ("--mac-address", self.mac_address.is_some()),
            ("--dns", !self.dns.is_empty()),
            ("--dns-search", !self.dns_search.is_empty()),
            ("--dns-option", !self.dns_option.is_empty()),
            ("--add-host", !self.add_host.is_empty()),
            ("--egress", !self.egress.is_empty()),
        ];
        let mut given = given.into_iter().filter(|(_, given)| *given);
        given.next().map(|(option, _)| option)
    }
}

/// Networks of containers: bridges of the host's, made by CNI's plugins.
#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// List networks
    Ls(NetworkLsArgs),
    /// Make a network, and print its name
    Create(NetworkCreateArgs),
    /// Remove networks that no container is on
    Rm(NetworkNames),
    /// Show all that is known of networks, as JSON
    Inspect(NetworkNames),
}

#[derive(Debug, Args)]
pub(crate) struct NetworkLsArgs {
    /// Show names alone
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// How to show them: table, json, a Go template, or a table of one
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub(crate) format: ListFormat,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut network create shop
  walnut network create --ipv6 --mtu 1400 shop
  walnut network create --subnet 192.168.77.0/24 --subnet fd00:77::/64 lab
  walnut network create --internal vault     # nothing outside can be reached from it
  walnut run -d --network shop --name web nginx

A network is a configuration list of CNI's, in the directory networks/ of WALNUT_ROOT, and a bridge.
A list that is put there by hand is a network too, whatever its plugins.")]
pub(crate) struct NetworkCreateArgs {
    /// Addresses of its containers, one subnet of each family [default: a free one of IPv4]
    #[arg(long, value_name = "CIDR")]
    pub(crate) subnet: Vec<IpNet>,
    /// The host's address in a subnet [default: its first]
    #[arg(long, value_name = "IP")]
    pub(crate) gateway: Vec<IpAddr>,
    /// Give its containers IPv6 addresses too
    #[arg(long)]
    pub(crate) ipv6: bool,
    /// Let its containers reach each other and the host alone
    #[arg(long)]
    pub(crate) internal: bool,
    /// Bytes in a packet at most [default: 1500]
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<u32>,
    /// Do not let its containers find each other by their names
    #[arg(long)]
    pub(crate) disable_dns: bool,
    /// Its name
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct NetworkNames {
    /// Networks, by name
    #[arg(required = true)]
    pub(crate) networks: Vec<String>,
}

/// `[[IP:]HOST:]CONTAINER[/tcp|udp]` or `IP::CONTAINER`, each port may be a range. Without
/// one of the host's, it is any that is free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublishArg(pub(crate) Vec<PublishedPort>);

impl FromStr for PublishArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let usage = || {
            "write it as HOST:CONTAINER, IP:HOST:CONTAINER or with /udp behind, as 8080:80; without HOST (80, IP::80) it is any free port".to_owned()
        };
        let (ports, protocol) = match text.rsplit_once('/') {
            None => (text, Transport::Tcp),
            Some((ports, "tcp")) => (ports, Transport::Tcp),
            Some((ports, "udp")) => (ports, Transport::Udp),
            Some((_, other)) => return Err(format!("unknown protocol {other:?}; use tcp or udp")),
        };
        let (ip, host, container) = match ports.rsplit_once(':') {
            None => (None, None, ports),
            Some((host, container)) => match host.rsplit_once(':') {
                None if host.is_empty() => return Err(usage()),
                None => (None, Some(host), container),
                Some((ip, "")) => (Some(address(ip)?), None, container),
                Some((ip, host)) => (Some(address(ip)?), Some(host), container),
            },
        };
        let container = range(container)?;
        let host = host.map(range).transpose()?;
        let size = |(first, last): (u16, u16)| last - first;
        if host.is_some_and(|host| size(host) != size(container)) {
            return Err("both ranges must have as many ports".into());
        }
        if size(container) >= RANGE_MAX {
            return Err(format!("a range has {RANGE_MAX} ports at most"));
        }
        let ports = (container.0..=container.1).map(|container_port| PublishedPort {
            host_port: host.map_or(0, |(first, _)| first + (container_port - container.0)),
            container_port,
            protocol,
            host_ip: ip,
        });
        Ok(Self(ports.collect()))
    }
}

fn address(text: &str) -> std::result::Result<IpAddr, String> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
    bare.unwrap_or(text)
        .parse()
        .map_err(|_| format!("{text:?} is not an IP address"))
}

fn range(text: &str) -> std::result::Result<(u16, u16), String> {
    let port = |text: &str| {
        let port = text.parse::<u16>().ok().filter(|port| *port > 0);
        port.ok_or_else(|| format!("{text:?} is not a port, from 1 to 65535"))
    };
    match text.split_once('-') {
        None => port(text).map(|port| (port, port)),
        Some((first, last)) => {
            let (first, last) = (port(first)?, port(last)?);
            match first <= last {
                true => Ok((first, last)),
                false => Err(format!("{text}: its end is before its beginning")),
            }
        }
    }
}

/// An Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MacArg(pub(crate) String);

impl FromStr for MacArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts: Vec<_> = text.split(':').collect();
        let byte = |part: &&str| match part.len() {
            2 => u8::from_str_radix(part, 16).ok(),
            _ => None,
        };
        let bytes: Vec<_> = parts.iter().filter_map(byte).collect();
        if parts.len() != 6 || bytes.len() != 6 {
            return Err("write it as 02:00:00:aa:bb:cc".into());
        }
        if bytes[0] & 1 == 1 || bytes.iter().all(|byte| *byte == 0) {
            return Err("it is not the address of one station".into());
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

/// `NAME:IP`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddHostArg(pub(crate) HostEntry);

impl FromStr for AddHostArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (name, ip) = text.split_once(':').ok_or("write it as NAME:IP")?;
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(format!("{name:?} is not a host's name"));
        }
        let ip = match ip {
            GATEWAY => None,
            ip => Some(address(ip)?),
        };
        Ok(Self(HostEntry {
            name: name.into(),
            ip,
        }))
    }
}

/// A port as a table shows it.
pub(crate) fn shown(port: &PublishedPort) -> String {
    let ip = port
        .host_ip
        .map(|ip| SocketAddr::new(ip, port.host_port).to_string());
    let host = ip.unwrap_or_else(|| port.host_port.to_string());
    let protocol = match port.protocol {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    match port.host_port {
        // Not chosen yet.
        0 => format!("{}/{protocol}", port.container_port),
        _ => format!("{host}->{}/{protocol}", port.container_port),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports() {
        let got = |text: &str| {
            let PublishArg(ports) = text.parse()?;
            Ok::<_, String>(ports.iter().map(shown).collect::<Vec<_>>().join(" "))
        };
        for (text, ports) in [
            ("8080:80", "8080->80/tcp"),
            ("8080:80/udp", "8080->80/udp"),
            ("127.0.0.1:53:53/tcp", "127.0.0.1:53->53/tcp"),
            ("[fd00::1]:80:8080", "[fd00::1]:80->8080/tcp"),
            ("8000-8002:80-82", "8000->80/tcp 8001->81/tcp 8002->82/tcp"),
            ("80", "80/tcp"),
            ("80-81/udp", "80/udp 81/udp"),
            ("127.0.0.1::80", "80/tcp"),
            ("[::1]::80", "80/tcp"),
        ] {
            assert_eq!(got(text).unwrap(), ports, "{text}");
        }
        for (text, why) in [
            (":80", "HOST:CONTAINER"),
            ("127.0.0.1::", "from 1 to 65535"),
            ("127.0.0.1", "from 1 to 65535"),
            ("1-2000", "at most"),
            ("0:80", "from 1 to 65535"),
            ("80:65536", "from 1 to 65535"),
            ("80:80/sctp", "sctp"),
            ("x:80:80", "not an IP address"),
            ("80-81:80", "as many"),
            ("81-80:1-2", "before its beginning"),
            ("1-2000:1-2000", "at most"),
        ] {
            let said = got(text).unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }

    #[test]
    fn addresses_and_hosts() {
        assert_eq!(
            "02:00:00:AA:bb:CC".parse(),
            Ok(MacArg("02:00:00:aa:bb:cc".into()))
        );
        for text in [
            "",
            "02:00",
            "03:00:00:00:00:01",
            "00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "02:00:00:00:00:0g",
        ] {
            assert!(text.parse::<MacArg>().is_err(), "{text}");
        }
        let AddHostArg(entry) = "db:fd00::5".parse().unwrap();
        assert_eq!(
            (entry.name.as_str(), entry.ip),
            ("db", Some("fd00::5".parse().unwrap()))
        );
        let AddHostArg(entry) = "outside:host-gateway".parse().unwrap();
        assert_eq!(entry.ip, None);
        for text in ["db", ":192.0.2.1", "a b:192.0.2.1", "db:x"] {
            assert!(text.parse::<AddHostArg>().is_err(), "{text}");
        }
    }
}
