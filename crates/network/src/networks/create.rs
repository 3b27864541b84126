//! The making of a network.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{Handle, packet_route::link::LinkAttribute};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{EXTENSION, Network, Networks, OURS, Range, check_name, subnets};
use crate::{ConfList, Error, Mac, Result, links};

/// What a bridge's name begins with; a number follows.
const BRIDGE: &str = "walnut-br";
/// What is being made.
const MAKING: &str = "making.json";
/// Bytes in a packet: the least that IPv4 works with, and IPv6.
const MTU_MIN: [u32; 2] = [576, 1280];
const MTU_MAX: u32 = 65535;

/// A network to be made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewNetwork {
    /// Its name.
    pub name: String,
    /// Its addresses, of either family; free ones where none are given.
    pub subnets: Vec<IpNet>,
    /// The host's addresses in them; the first ones where none are given.
    pub gateways: Vec<IpAddr>,
    /// It has IPv6 addresses, whether some are given or not.
    pub ipv6: bool,
    /// It reaches nothing else.
    pub internal: bool,
    /// Bytes in a packet at most.
    pub mtu: Option<u32>,
    /// Its containers find each other by their names.
    pub dns: bool,
}

/// A bridge that may be there already, and of which nothing is known yet.
#[derive(Serialize, Deserialize)]
struct Making {
    bridge: String,
    mac: Mac,
}

impl Networks {
    /// Makes a network, with its bridge.
    ///
    /// # Errors
    /// If its name is taken, or addresses of it; if the kernel refuses.
    pub async fn create(&self, new: &NewNetwork) -> Result<Network> {
        check(new)?;
        let _lock = self.lock().await?;
        let there = self.list()?;
        if there.iter().any(|network| network.name == new.name) {
            return Err(Error::Taken(format!(
                "create the network {}: there is one of this name; remove it (walnut network rm {}) or choose another",
                new.name, new.name
            )));
        }
        let handle = links::open()?;
        let taken = Taken {
            routes: links::routes(&handle).await?,
            there,
        };
        for subnet in &new.subnets {
            if let Some(by) = taken.by(subnet) {
                return Err(Error::Config(format!(
                    "create the network {}: the subnet {subnet} overlaps with {by}; choose another --subnet, or leave it out to have a free one",
                    new.name
                )));
            }
        }
        let made = self.make(&handle, new, &taken).await;
        if made.is_err() {
            self.sweep().await?;
        }
        made
    }

    async fn make(&self, handle: &Handle, new: &NewNetwork, taken: &Taken) -> Result<Network> {
        for n in 0..subnets::COUNT {
            let bridge = format!("{BRIDGE}{n}");
            if taken.bridge(&bridge) {
                continue;
            }
            let Some(subnets) = addresses(new, n, taken)? else {
                continue;
            };
            // The bridge's name is what makes networks of different nodes' directories, on one
            // host, differ: only one can have it, and its addresses.
            let mac = address()?;
            self.announce(&Making {
                bridge: bridge.clone(),
                mac,
            })?;
            if !links::make_bridge(handle, &bridge, mac).await? {
                continue;
            }
            let own: Vec<_> = subnets
                .iter()
                .filter_map(|range| Some((range.gateway?, range.subnet.prefix_len())))
                .collect();
            links::furnish(handle, &bridge, &own).await?;
            let list = self.describe(new, &bridge, &subnets);
            let path = self.file(&new.name);
            write(&path, &list)?;
            self.announced()?;
            return ConfList::new(list, &new.name).map(Network::of);
        }
        Err(Error::Config(format!(
            "create the network {}: all of the {} networks that there can be are there; remove some, or give a --subnet",
            new.name,
            subnets::COUNT
        )))
    }

    /// The list of a network's plugins.
    fn describe(&self, new: &NewNetwork, bridge: &str, subnets: &[Range]) -> Value {
        let ranges: Vec<_> = subnets
            .iter()
            .map(|range| json!([{ "subnet": range.subnet.to_string(), "gateway": range.gateway }]))
            .collect();
        let mut routes = Vec::new();
        for (everything, v4) in [("0.0.0.0/0", true), ("::/0", false)] {
            let has = subnets.iter().any(|r| r.subnet.addr().is_ipv4() == v4);
            if has && !new.internal {
                routes.push(json!({ "dst": everything }));
            }
        }
        let mut link = json!({
            "type": "bridge",
            "bridge": bridge,
            "isGateway": true,
            "ipMasq": !new.internal,
            "hairpinMode": true,
            "capabilities": { "mac": true, "ips": true },
            "ipam": {
                "type": "host-local",
                "dataDir": self.leases(),
                "ranges": ranges,
                "routes": routes,
            },
        });
        if let Some(mtu) = new.mtu {
            link["mtu"] = json!(mtu);
        }
        let mut plugins = vec![link];
        if !new.internal {
            plugins.push(json!({
                "type": "portmap", "snat": true, "capabilities": { "portMappings": true },
            }));
        }
        // Only who is on the bridge may begin a conversation with who is on it.
        plugins.push(json!({ "type": "firewall", "ingressPolicy": "same-bridge" }));
        json!({
            "cniVersion": "1.0.0",
            "name": new.name,
            OURS: { "internal": new.internal, "dns": new.dns },
            "plugins": plugins,
        })
    }

    fn announce(&self, making: &Making) -> Result<()> {
        write(&self.dir.join(MAKING), &json!(making))
    }

    fn announced(&self) -> Result<()> {
        let path = self.dir.join(MAKING);
        fs::remove_file(&path).map_err(Error::file("remove", path))
    }

    /// Takes away the bridge of a network that did not come to be.
    pub(super) async fn sweep(&self) -> Result<()> {
        let path = self.dir.join(MAKING);
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            text => text.map_err(Error::file("read", &path))?,
        };
        if let Ok(making) = serde_json::from_slice::<Making>(&text) {
            let known = self.list()?;
            let known = known
                .iter()
                .any(|n| n.bridge.as_ref() == Some(&making.bridge));
            let handle = links::open()?;
            // Another one's, if it has another address.
            if !known && mac(&handle, &making.bridge).await? == Some(making.mac) {
                links::remove(&handle, &making.bridge).await?;
            }
        }
        self.announced()
    }
}

/// What a network cannot have.
struct Taken {
    routes: Vec<IpNet>,
    there: Vec<Network>,
}

impl Taken {
    fn bridge(&self, name: &str) -> bool {
        let mut bridges = self.there.iter().filter_map(|n| n.bridge.as_deref());
        bridges.any(|bridge| bridge == name)
    }

    /// Who has addresses of a subnet.
    fn by(&self, subnet: &IpNet) -> Option<String> {
        for network in &self.there {
            for range in &network.subnets {
                if subnets::overlap(&range.subnet, subnet) {
                    return Some(format!(
                        "that of the network {}, {}",
                        network.name, range.subnet
                    ));
                }
            }
        }
        let mut routes = self.routes.iter();
        let route = routes.find(|route| subnets::overlap(route, subnet))?;
        Some(format!("a route of this host's, to {route}"))
    }
}

/// Refuses what cannot be.
fn check(new: &NewNetwork) -> Result<()> {
    check_name(&new.name)?;
    let refuse = |why: String| Error::Config(format!("create the network {}: {why}", new.name));
    for (v4, family) in [(true, "IPv4"), (false, "IPv6")] {
        let count = new
            .subnets
            .iter()
            .filter(|s| s.addr().is_ipv4() == v4)
            .count();
        if count > 1 {
            return Err(refuse(format!("give one subnet of {family} at most")));
        }
    }
    for (at, subnet) in new.subnets.iter().enumerate() {
        subnets::range(*subnet, &new.gateways)?;
        let others = new.subnets.get(at + 1..).unwrap_or_default();
        if others.iter().any(|other| subnets::overlap(subnet, other)) {
            return Err(refuse(format!("the subnet {subnet} is given twice")));
        }
    }
    for gateway in &new.gateways {
        if !new.subnets.iter().any(|subnet| subnet.contains(gateway)) {
            return Err(refuse(format!(
                "the gateway {gateway} is in no --subnet that was given"
            )));
        }
    }
    if let Some(mtu) = new.mtu {
        let v6 = new.ipv6 || new.subnets.iter().any(|subnet| subnet.addr().is_ipv6());
        let least = MTU_MIN[usize::from(v6)];
        if !(least..=MTU_MAX).contains(&mtu) {
            return Err(refuse(format!("its MTU must be from {least} to {MTU_MAX}")));
        }
    }
    Ok(())
}

/// The addresses of the network with this number, unless somebody has them.
fn addresses(new: &NewNetwork, n: u32, taken: &Taken) -> Result<Option<Vec<Range>>> {
    let mut subnets = new.subnets.clone();
    if !subnets.iter().any(|subnet| subnet.addr().is_ipv4()) && !only_ipv6(new) {
        match subnets::nth(n) {
            Some(free) if taken.by(&free).is_none() => subnets.insert(0, free),
            _ => return Ok(None),
        }
    }
    if new.ipv6 && !subnets.iter().any(|subnet| subnet.addr().is_ipv6()) {
        let mut random = [0; 5];
        getrandom::fill(&mut random).map_err(|e| Error::system("get random numbers")(e.into()))?;
        subnets.extend(subnets::unique_local(random));
    }
    let ranges = subnets
        .into_iter()
        .map(|s| subnets::range(s, &new.gateways));
    ranges.collect::<Result<_>>().map(Some)
}

/// Who gives one subnet, of IPv6, wants no other.
fn only_ipv6(new: &NewNetwork) -> bool {
    !new.subnets.is_empty() && new.subnets.iter().all(|subnet| subnet.addr().is_ipv6())
}

/// An address that is its own: a bridge that has none takes those of its ports, which come
/// and go.
pub(super) fn address() -> Result<Mac> {
    let mut mac = [0; 6];
    getrandom::fill(&mut mac).map_err(|e| Error::system("get random numbers")(e.into()))?;
    // Locally administered, of one station.
    mac[0] = (mac[0] | 2) & !1;
    Ok(mac)
}

/// The address of a link, if it is there.
async fn mac(handle: &Handle, name: &str) -> Result<Option<Mac>> {
    let get = handle.link().get().match_name(name.to_owned()).execute();
    let found: Result<Vec<_>, _> = get.try_collect().await;
    let Ok(found) = found else { return Ok(None) };
    let attributes = found.iter().flat_map(|link| &link.attributes);
    let mut addresses = attributes.filter_map(|attribute| match attribute {
        LinkAttribute::Address(address) => Mac::try_from(address.as_slice()).ok(),
        _ => None,
    });
    Ok(addresses.next())
}

/// Writes a file so that a reader, or a crash, meets all of it or nothing.
fn write(path: &Path, value: &Value) -> Result<()> {
    let temp: PathBuf = path.with_extension(format!("{EXTENSION}.new"));
    let text = serde_json::to_vec_pretty(value).unwrap_or_default();
    let written = || -> io::Result<()> {
        let file = fs::File::create(&temp)?;
        io::Write::write_all(&mut &file, &text)?;
        file.sync_data()?;
        fs::rename(&temp, path)
    };
    written().map_err(Error::file("write", path))
}
