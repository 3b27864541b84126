//! Whether a container can have the network that was made for it.

use std::{fs, io};

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

/// The network namespace that the container's PID shall be in; none is the host's own.
pub(super) fn namespace(spec: &Spec) -> Option<&LinuxNamespace> {
    let linux = spec.linux().as_ref()?;
    let listed = linux.namespaces().as_deref().unwrap_or_default();
    listed
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
}

/// Refuses a namespace that leads anywhere: a guest has loopback, and a program that was
/// promised a network must not find that out by itself. `pid` is in the namespace, and
/// whoever sets it up has done so.
pub(super) fn check(spec: &Spec, pid: u32) -> Result<()> {
    if namespace(spec).is_none() || is_ours(pid).context("find the container's network")? {
        return Ok(());
    }
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/net/{file}"));
    // A host without IPv6 has no such file.
    let (routes, addresses) = (read("route"), read("if_inet6").unwrap_or_default());
    let routes = routes.context("read the container's routes")?;
    if let Some(interface) = interface(&routes, &addresses) {
        bail!(
            "the container's network namespace has the interface {interface}, and containers have no network but loopback yet: give it none (podman, docker: --network=none)"
        );
    }
    Ok(())
}

/// Without privileges the supervisor stays in the namespace that it was started in.
fn is_ours(pid: u32) -> io::Result<bool> {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/net"));
    Ok(namespace("self")? == namespace(&pid.to_string())?)
}

/// An interface that has a route (proc(5) "/proc/net/route") or an address
/// ("/proc/net/if_inet6"), other than loopback.
fn interface<'a>(routes: &'a str, addresses: &'a str) -> Option<&'a str> {
    let routed = routes.lines().skip(1).map(|l| l.split_whitespace().next());
    let addressed = addresses.lines().map(|l| l.split_whitespace().next_back());
    routed.chain(addressed).flatten().find(|name| *name != "lo")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_that_lead_somewhere_are_seen() {
        let head = "Iface\tDestination\tGateway \tFlags\n";
        let lo = "00000000000000000000000000000001 01 80 10 80       lo\n";
        assert_eq!(interface(head, ""), None);
        assert_eq!(interface(head, lo), None);
        let routes = format!("{head}eth0\t0000580A\t00000000\t0001\n");
        assert_eq!(interface(&routes, lo), Some("eth0"));
        let addresses = format!("{lo}fe80000000000000d41d8cfffe98ecf8 02 40 20 80     eth1\n");
        assert_eq!(interface(head, &addresses), Some("eth1"));
    }
}
