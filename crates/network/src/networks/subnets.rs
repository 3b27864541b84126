//! Which addresses a network gets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::Range;
use crate::{Error, Result};

/// Networks that nobody said the addresses of have a part each of 10.64.0.0/14. Docker's,
/// podman's and Kubernetes' own are elsewhere.
const FIRST: u32 = 0x0a40_0000;
/// A bridge has 1024 ports at most.
const PREFIX: u8 = 22;
/// How many there are.
pub(super) const COUNT: u32 = 1 << (PREFIX - 14);

/// The addresses of the `n`th network.
pub(super) fn nth(n: u32) -> Option<IpNet> {
    let base = FIRST + (n << (32 - u32::from(PREFIX)));
    let net = Ipv4Net::new(Ipv4Addr::from(base), PREFIX).ok()?;
    (n < COUNT).then_some(net.into())
}

/// A network of unique local addresses (RFC 4193), by these 40 random bits.
pub(super) fn unique_local(random: [u8; 5]) -> Option<IpNet> {
    let mut bytes = [0; 16];
    bytes[0] = 0xfd;
    bytes[1..6].copy_from_slice(&random);
    Some(Ipv6Net::new(Ipv6Addr::from(bytes), 64).ok()?.into())
}

/// A network's addresses with the host's, which is the first unless another is asked for.
pub(super) fn range(subnet: IpNet, gateways: &[IpAddr]) -> Result<Range> {
    let refuse = |why: String| Error::Config(format!("use the subnet {subnet}: {why}"));
    if subnet.trunc() != subnet {
        return Err(refuse(format!(
            "it has bits behind its prefix; write {}",
            subnet.trunc()
        )));
    }
    // The network's own, the host's, one container's, and IPv4's broadcast.
    if subnet.max_prefix_len() - subnet.prefix_len() < 2 {
        return Err(refuse("there is no room for a container in it".into()));
    }
    let ip = subnet.network();
    let odd = ip.is_multicast() || ip.is_loopback() || ip.is_unspecified();
    if odd || matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
        return Err(refuse("its addresses are not for this".into()));
    }
    let mut given = gateways.iter().filter(|gateway| subnet.contains(*gateway));
    let gateway = match given.next() {
        Some(gateway) => *gateway,
        None => first(subnet),
    };
    if gateway == subnet.network() || (subnet.addr().is_ipv4() && gateway == subnet.broadcast()) {
        return Err(refuse(format!("its gateway cannot be {gateway}")));
    }
    Ok(Range {
        subnet,
        gateway: Some(gateway),
    })
}

/// The address behind the network's own.
fn first(subnet: IpNet) -> IpAddr {
    match subnet.network() {
        IpAddr::V4(ip) => Ipv4Addr::from(u32::from(ip) | 1).into(),
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip) | 1).into(),
    }
}

/// Whether two networks have an address in common.
pub(super) fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}
