//! Networks of a node's containers: ordinary configuration lists of CNI's, one file each,
//! in a directory of Walnut's own. In `/etc/cni/net.d` they would be the pods' network of a
//! node that has none, or whose own sorts behind.
//!
//! A network that is made here is a bridge of the host's with addresses from `host-local`.
//! A list that somebody else puts into the directory is a network as well.

mod create;
mod firewall;
mod subnets;

use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::Serialize;
use serde_json::Value;

pub use create::NewNetwork;
pub use firewall::check_programs;
pub(crate) use firewall::program;

use crate::{ConfList, Error, Result, links};

/// The network of containers that ask for no other: made on its first use.
pub const DEFAULT: &str = "bridge";
/// Where a list says what is Walnut's alone.
const OURS: &str = "dev.walnut";
const EXTENSION: &str = "conflist";
/// Largest list that is read.
const LIST_MAX: u64 = 1 << 20;
/// Longest name: that of a file, and of a chain's comment.
const NAME_MAX: usize = 64;
/// What `--network` means other things by.
const RESERVED: [&str; 3] = ["none", "host", "container"];

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Network {
    /// Its name.
    pub name: String,
    /// The plugin that makes its links.
    pub driver: String,
    /// Its bridge, if it has one.
    pub bridge: Option<String>,
    /// Its addresses, with the host's in each.
    pub subnets: Vec<Range>,
    /// Nothing but it can be reached over it.
    pub internal: bool,
    /// Its containers find each other by their names.
    pub dns: bool,
    /// Bytes in a packet at most, where that was said.
    pub mtu: Option<u32>,
    /// The list.
    #[serde(skip)]
    pub list: ConfList,
}

/// Addresses of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Range {
    /// All of them.
    #[serde(serialize_with = "as_text")]
    pub subnet: IpNet,
    /// The host's.
    pub gateway: Option<IpAddr>,
}

fn as_text<S: serde::Serializer>(subnet: &IpNet, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.collect_str(subnet)
}

impl Network {
    /// The one that a list describes.
    pub fn of(list: ConfList) -> Self {
        let first = list.plugins().next().cloned().unwrap_or_default();
        let text = |name: &str| Some(first.get(name)?.as_str()?.to_owned());
        let ours = |name: &str| {
            let ours = list.as_json().get(OURS).and_then(|ours| ours.get(name));
            ours == Some(&Value::Bool(true))
        };
        let ranges = first.get("ipam").and_then(|ipam| ipam.get("ranges"));
        let ranges = ranges.and_then(Value::as_array).into_iter().flatten();
        let ranges = ranges.filter_map(Value::as_array).flatten();
        let range = |range: &Value| {
            let text = |name: &str| range.get(name).and_then(Value::as_str);
            Some(Range {
                subnet: text("subnet")?.parse().ok()?,
                gateway: text("gateway").and_then(|text| text.parse().ok()),
            })
        };
        Self {
            name: list.name().to_owned(),
            driver: text("type").unwrap_or_default(),
            bridge: text("bridge"),
            subnets: ranges.filter_map(range).collect(),
            internal: ours("internal"),
            dns: ours("dns"),
            mtu: first
                .get("mtu")
                .and_then(Value::as_u64)
                .and_then(|mtu| mtu.try_into().ok()),
            list,
        }
    }

    /// The host's addresses in it, with their prefixes.
    fn own_addresses(&self) -> Vec<(IpAddr, u8)> {
        let ranges = self.subnets.iter();
        let own = ranges.filter_map(|range| Some((range.gateway?, range.subnet.prefix_len())));
        own.collect()
    }

    /// Its list says that it was made here.
    fn is_ours(&self) -> bool {
        self.list.as_json().contains_key(OURS)
    }
}

/// The networks of a node.
#[derive(Debug, Clone)]
pub struct Networks {
    dir: PathBuf,
}

impl Networks {
    /// Those in this directory, which is made on the first use of one.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    /// Where the addresses that containers have are written down.
    fn leases(&self) -> PathBuf {
        self.dir.join("leases")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.{EXTENSION}"))
    }

    /// One change at a time. What a change left that was killed is taken away first.
    async fn lock(&self) -> Result<File> {
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&self.dir);
        made.map_err(Error::file("create the directory", &self.dir))?;
        let path = self.dir.join(".lock");
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(Error::file("open", &path))?;
        lock.lock().map_err(Error::file("lock", &path))?;
        self.sweep().await?;
        Ok(lock)
    }

    /// All of them, the default one first. Files that are no lists are passed over.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Network>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::file("list", &self.dir))?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::file("list", &self.dir))?.path();
            if path.extension().is_some_and(|e| e == EXTENSION)
                && let Ok(list) = read(&path)
            {
                all.push(Network::of(list));
            }
        }
        all.sort_by(|a, b| (a.name != DEFAULT, &a.name).cmp(&(b.name != DEFAULT, &b.name)));
        Ok(all)
    }

    /// The network of this name.
    ///
    /// # Errors
    /// If there is none, or its list is not one.
    pub fn find(&self, name: &str) -> Result<Network> {
        let unknown = || {
            Error::Unknown(format!(
                "no such network: {name} (`walnut network ls` lists them, `walnut network create {name}` makes it)"
            ))
        };
        check_name(name).map_err(|_| unknown())?;
        let path = self.file(name);
        if path.exists() {
            return read(&path).map(Network::of);
        }
        // A file that is somebody else's may be called otherwise.
        let mut all = self.list()?.into_iter();
        all.find(|network| network.name == name).ok_or_else(unknown)
    }

    /// The network of this name; if that is the default one's, it is made where it is not
    /// there.
    ///
    /// # Errors
    /// As [`Networks::find`] and [`Networks::create`].
    pub async fn find_or_make(&self, name: &str) -> Result<Network> {
        match self.find(name) {
            Err(Error::Unknown(_)) if name == DEFAULT => {
                let new = NewNetwork {
                    name: DEFAULT.into(),
                    ..NewNetwork::default()
                };
                match self.create(&new).await {
                    // Another one was quicker.
                    Err(Error::Taken(_)) => self.find(name),
                    made => made,
                }
            }
            found => found,
        }
    }

    /// Removes a network, with its bridge. `users` are the containers that are attached to
    /// it; the caller sees to it that there will be no others.
    ///
    /// # Errors
    /// If it is in use, or is not there.
    pub async fn remove(&self, name: &str, users: &[String]) -> Result<()> {
        let _lock = self.lock().await?;
        let network = self.find(name)?;
        if !users.is_empty() {
            return Err(Error::Config(format!(
                "remove the network {name}: it is in use by {}; remove them first (walnut rm -f {})",
                users.join(", "),
                users.join(" ")
            )));
        }
        if network.is_ours()
            && let Some(bridge) = &network.bridge
        {
            let handle = links::open()?;
            links::remove(&handle, bridge).await?;
            firewall::forget(bridge);
        }
        let leases = self.leases().join(name);
        match fs::remove_dir_all(&leases) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::file("remove", leases)(e));
            }
            _ => {}
        }
        // Last: until then it can be removed again.
        let path = self.file(name);
        fs::remove_file(&path).map_err(Error::file("remove", path))
    }

    /// Addresses that a container has of a network, as they are written down.
    pub fn leased(&self, network: &str, container: &str) -> Vec<IpAddr> {
        let entries = fs::read_dir(self.leases().join(network));
        let entries = entries.into_iter().flatten().flatten();
        let leased = entries.filter_map(|entry| {
            let ip = entry.file_name().to_str()?.parse().ok()?;
            let holder = fs::read_to_string(entry.path()).ok()?;
            (holder.lines().next()?.trim() == container).then_some(ip)
        });
        leased.collect()
    }

    /// Makes a network's bridge where it is not there any more, as after a boot.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn prepare(network: &Network) -> Result<()> {
        let Some(bridge) = network.bridge.clone().filter(|_| network.is_ours()) else {
            return Ok(());
        };
        let own = network.own_addresses();
        links::on_a_thread(move || async move {
            let handle = links::open()?;
            if links::make_bridge(&handle, &bridge, create::address()?).await? {
                links::furnish(&handle, &bridge, &own).await?;
            }
            Ok(())
        })
    }

    /// What a network's containers are to have beside what its plugins make.
    ///
    /// # Errors
    /// If the firewall refuses.
    pub fn guard(network: &Network) -> Result<()> {
        match &network.bridge {
            Some(bridge) if network.internal => firewall::close(bridge),
            _ => Ok(()),
        }
    }
}

fn read(path: &Path) -> Result<ConfList> {
    let from = path.display().to_string();
    let size = fs::metadata(path).map_err(Error::file("read", path))?.len();
    if size > LIST_MAX {
        return Err(Error::Config(format!(
            "read the network {from}: larger than {LIST_MAX} bytes"
        )));
    }
    let text = fs::read(path).map_err(Error::file("read", path))?;
    ConfList::parse(&text, &from)
}

/// A name that a network can have (CNI 1.0.0 §1).
fn check_name(name: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !starts || name.len() > NAME_MAX || !name.chars().all(fine) {
        return Err(Error::Config(format!(
            "call a network {name:?}: use 1 to {NAME_MAX} of [a-zA-Z0-9_.-], beginning with a letter or digit"
        )));
    }
    if RESERVED.contains(&name) {
        return Err(Error::Config(format!(
            "call a network {name:?}: `--network {name}` means something else; choose another name"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
