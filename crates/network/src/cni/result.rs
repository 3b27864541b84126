//! What a plugin that adds says it has made (CNI 1.0.0 §5).

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

/// A result, as far as a runtime needs it. Older versions' fields that it has no use for
/// are passed over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CniResult {
    /// Interfaces that were made, in the namespace and on the host.
    pub interfaces: Vec<CniInterface>,
    /// Addresses.
    pub ips: Vec<CniIp>,
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CniInterface {
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: String,
    /// The namespace that it is in; empty for the host's.
    pub sandbox: String,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct CniIp {
    /// Address and length of the network's prefix, as `192.0.2.5/24`.
    pub address: String,
    /// The network's gateway.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
}

impl CniIp {
    /// The address and its prefix.
    pub fn parts(&self) -> Option<(IpAddr, u8)> {
        let (ip, prefix) = self.address.split_once('/')?;
        Some((ip.parse().ok()?, prefix.parse().ok()?))
    }
}

impl CniResult {
    /// Of a plugin's result. What cannot be read is as if it were not there.
    pub fn of(result: &Value) -> Self {
        serde_json::from_value(result.clone()).unwrap_or_default()
    }

    /// The addresses with their prefixes.
    pub fn addresses(&self) -> impl Iterator<Item = (IpAddr, u8)> {
        self.ips.iter().filter_map(CniIp::parts)
    }

    /// The Ethernet address of an interface of the namespace's.
    pub fn mac(&self, name: &str) -> Option<&str> {
        let mut inside = self.interfaces.iter().filter(|i| !i.sandbox.is_empty());
        let found = inside.find(|interface| interface.name == name)?;
        Some(found.mac.as_str())
    }
}
