//! A sandbox's network: the links of a namespace of the host's, in the guest.

mod diff;
mod told;
mod watching;

use std::{path::PathBuf, sync::Arc};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use walnut_machine::Nic;
use walnut_network::{Connection, Inlet, Link, Namespace, Routing, Rules, Watch};
use walnut_protocol::agent::ConfigureNetworkRequest;

use crate::{Error, Result, Sandbox, agent::soon};
use watching::Known;
pub(crate) use watching::{Watching, WatchingState};

/// Queues of a tap at most: each is a descriptor, and two rings of the guest's.
const QUEUES_MAX: u16 = 8;

/// Where a sandbox's network comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Network {
    /// There is none: the guest has loopback.
    #[default]
    None,
    /// The namespace whose path the first container's spec has, if it has one.
    Named,
    /// The network namespace that the caller lives in.
    Own,
    /// The one that this file stands for.
    At(PathBuf),
}

impl Network {
    /// The namespace that a sandbox with this first container takes its links from.
    fn namespace(&self, spec: &Spec) -> Option<Namespace> {
        match self {
            Self::None => None,
            Self::Own => Some(Namespace::Own),
            Self::Named => named(spec).map(Namespace::At),
            Self::At(path) => Some(Namespace::At(path.clone())),
        }
    }
}

/// The network namespace that a spec names.
pub(crate) fn named(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let network = namespaces
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?;
    network.path().clone()
}

/// What a machine needs to be on the network, and what its guest must know of it.
#[derive(Debug, Default)]
pub(crate) struct Links {
    pub(crate) nics: Vec<Nic>,
    known: Vec<Known>,
    routing: Routing,
    /// Connections to the namespace's loopback.
    pub(crate) inlet: Option<Inlet>,
    /// Tells what becomes of them.
    pub(crate) watch: Option<Watch>,
}

/// Queues of a tap, for a machine of so many vCPUs.
fn queues(vcpus: u32) -> u16 {
    u16::try_from(vcpus).unwrap_or(QUEUES_MAX).min(QUEUES_MAX)
}

/// A machine's device for a link.
fn nic(link: Link) -> Result<(Nic, Known)> {
    let Link {
        index,
        tap,
        interface,
        taps,
    } = link;
    let mtu = u16::try_from(interface.mtu).map_err(|_| {
        Error::Invalid(format!(
            "connect the link {} to a machine: its MTU is {}, a machine's is 65535 at most",
            interface.name, interface.mtu
        ))
    })?;
    let nic = Nic {
        mac: interface.mac,
        mtu,
        taps: taps.into_iter().map(Arc::new).collect(),
    };
    let known = Known {
        index,
        tap,
        mtu_max: mtu,
        interface,
    };
    Ok((nic, known))
}

impl Links {
    /// Takes over the links of the namespace; `egress` is for what its guest sends.
    pub(crate) async fn take(
        network: &Network,
        spec: &Spec,
        vcpus: u32,
        egress: Vec<Rules>,
    ) -> Result<Self> {
        let Some(namespace) = network.namespace(spec) else {
            return Ok(Self::default());
        };
        let connected = walnut_network::connect(&namespace, queues(vcpus), egress).await?;
        let Connection {
            links,
            routing,
            inlet,
            watch,
        } = connected;
        let mut all = Self {
            routing,
            inlet,
            watch: Some(watch),
            ..Self::default()
        };
        for link in links {
            let (nic, known) = nic(link)?;
            all.nics.push(nic);
            all.known.push(known);
        }
        Ok(all)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}

impl Sandbox {
    /// Tells the guest what its links are.
    pub(crate) async fn configure_network(&self, links: &Links) -> Result<()> {
        let request = ConfigureNetworkRequest {
            interfaces: links.known.iter().map(Known::told).collect(),
            routes: links.routing.routes.iter().map(told::wide_route).collect(),
            rules: links.routing.rules.iter().map(told::rule).collect(),
            ..Default::default()
        };
        match links.is_empty() {
            true => Ok(()),
            false => self.tell_network(&request).await,
        }
    }

    async fn tell_network(&self, request: &ConfigureNetworkRequest) -> Result<()> {
        let reply = self.agent.configure_network(soon(), request).await;
        self.call("configure the network", reply).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_taken_from_where_the_front_end_says() {
        let spec = |namespaces: &str| -> Spec {
            let json = format!(
                r#"{{"ociVersion":"1.0.2","process":{{"cwd":"/","args":["a"],"user":{{"uid":0,"gid":0}}}},"root":{{"path":"r"}},"linux":{{"namespaces":[{namespaces}]}}}}"#
            );
            serde_json::from_str(&json).unwrap()
        };
        let pod = spec(r#"{"type":"pid"},{"type":"network","path":"/run/netns/x"}"#);
        let at = Namespace::At("/run/netns/x".into());
        assert_eq!(Network::Named.namespace(&pod), Some(at));
        assert_eq!(Network::Own.namespace(&pod), Some(Namespace::Own));
        assert_eq!(Network::None.namespace(&pod), None);
        let held = Network::At("/proc/self/fd/3".into());
        let at = Namespace::At("/proc/self/fd/3".into());
        assert_eq!(held.namespace(&pod), Some(at));
        // A namespace that is new has nothing in it, and the host's is not named.
        assert_eq!(
            Network::Named.namespace(&spec(r#"{"type":"network"}"#)),
            None
        );
        assert_eq!(Network::Named.namespace(&spec(r#"{"type":"pid"}"#)), None);
    }
}
