//! A container's links to networks of this node: what it is to have, what of that is made,
//! and how all of it is taken away again, whoever was killed meanwhile.
//!
//! They are written down in the container's directory, in a file that is there for as long
//! as there may be anything to take away. A link is marked before its plugins are
//! executed, and those hold the container's lock: who gets the lock finds all that they
//! have made.

mod names;
mod ports;

use std::{
    fs, io,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;
use tracing::debug;
use walnut_machine::takeover::{Fd, Giver, NoState, Taker};
use walnut_network::{
    Attachment, Cni, CniResult, ConfList, Named, Network as NodeNetwork, Networks, OwnNamespace,
    Resolver,
};

pub use names::{HostEntry, NameServers, Names};
pub use ports::{PublishedPort, Transport};

use crate::{
    Error, Layout, NameFiles, Network, Result,
    file::{read_json, write_json},
};

const FILE: &str = "network.json";
/// What a container is to have each time that it is started.
const WISHES: &str = "network.wishes.json";
/// Largest that is read: lists and results of a few plugins for each link.
const FILE_MAX: u64 = 16 << 20;

/// The links of a container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachments {
    /// Format of this: 1.
    pub version: u32,
    /// Directories with plugins.
    pub plugins: Vec<PathBuf>,
    /// The links.
    pub links: Vec<NetworkLink>,
    /// Ports of the host's that are the container's.
    pub ports: Vec<PublishedPort>,
    /// What its `/etc/hosts` and `/etc/resolv.conf` are to say.
    pub names: Names,
}

/// A link to a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkLink {
    /// Its name in the container.
    pub interface: String,
    /// The network's list, as it was when the link was asked for.
    pub list: Value,
    /// Arguments for its plugins, by capability.
    #[serde(default)]
    pub capabilities: Map<String, Value>,
    /// Plugins may have been executed for it.
    #[serde(default)]
    pub begun: bool,
    /// What they said that they have made.
    #[serde(default)]
    pub result: Option<Value>,
}

impl NetworkLink {
    /// One that is to be made.
    pub fn new(network: &NodeNetwork, interface: &str) -> Self {
        Self {
            interface: interface.into(),
            list: Value::Object(network.list.as_json().clone()),
            capabilities: Map::new(),
            begun: false,
            result: None,
        }
    }

    /// The network's name.
    pub fn network(&self) -> &str {
        self.list.get("name").and_then(Value::as_str).unwrap_or("")
    }

    fn list(&self) -> Result<ConfList> {
        Ok(ConfList::new(self.list.clone(), self.network())?)
    }

    /// What was made, as far as it is known.
    pub fn made(&self) -> CniResult {
        self.result.as_ref().map(CniResult::of).unwrap_or_default()
    }
}

impl Attachments {
    /// What is written down in a container's directory.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            _ => read_json(&path, FILE_MAX).map(Some),
        }
    }

    /// Writes it there, atomically.
    pub fn store(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(FILE), self)
    }

    /// Writes down what a container is to have each time that it is started, and for the
    /// first.
    pub fn wish(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(WISHES), self)?;
        self.store(dir)
    }

    /// Has a container that is started again get what it is to have; whether that is
    /// anything. The caller holds its lock.
    pub fn again(dir: &Path) -> Result<bool> {
        let path = dir.join(WISHES);
        if !path.exists() {
            return Ok(Self::load(dir)?.is_some());
        }
        let wishes: Self = read_json(&path, FILE_MAX)?;
        wishes.store(dir)?;
        Ok(true)
    }

    /// Changes what a container is to have when it is started again.
    pub fn rename(dir: &Path, name: &str) -> Result<()> {
        let path = dir.join(WISHES);
        if !path.exists() {
            return Ok(());
        }
        let mut wishes: Self = read_json(&path, FILE_MAX)?;
        wishes.names.name = name.into();
        write_json(&path, &wishes)
    }

    /// Says that there is nothing any more.
    fn forget(dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
            _ => Ok(()),
        }
    }

    /// Addresses that the container has, of all its links.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let made = self.links.iter().map(NetworkLink::made);
        let addresses = made.flat_map(|made| made.addresses().collect::<Vec<_>>());
        addresses.map(|(ip, _)| ip).collect()
    }

    /// Has plugins make the links.
    fn make(&mut self, at: &Directory<'_>, namespace: &Path) -> Result<()> {
        let mapped = json!(self.ports);
        for index in 0..self.links.len() {
            // Before: a plugin that has begun leaves something, whatever becomes of us.
            self.links[index].begun = true;
            self.store(at.container)?;
            let link = &self.links[index];
            let list = link.list()?;
            let mut capabilities = link.capabilities.clone();
            if index == 0 && !self.ports.is_empty() {
                capabilities.insert("portMappings".into(), mapped.clone());
            }
            let attachment = Attachment {
                list: &list,
                container: at.id,
                namespace: Some(namespace),
                interface: &link.interface,
                capabilities: &capabilities,
                result: None,
            };
            let network = NodeNetwork::of(list.clone());
            Networks::prepare(&network)?;
            let mut made = None;
            let added = at.cni(&self.plugins).add(&attachment, &mut made);
            self.links[index].result = made;
            self.links[index].capabilities = capabilities;
            self.store(at.container)?;
            added?;
            Networks::guard(&network)?;
            self.introduce(at, &network, &self.links[index].made())?;
        }
        Ok(())
    }

    /// Tells the others on a network of the container.
    fn introduce(&self, at: &Directory<'_>, network: &NodeNetwork, made: &CniResult) -> Result<()> {
        if !network.dns {
            return Ok(());
        }
        let servers: Vec<_> = network.subnets.iter().filter_map(|r| r.gateway).collect();
        let addresses: Vec<_> = made.addresses().map(|(ip, _)| ip).collect();
        let names = [&self.names.name, at.id.get(..12).unwrap_or(at.id)];
        let named = Named {
            id: at.id,
            names: &names,
            addresses: &addresses,
            forward: &self.names.servers.servers,
            internal: network.internal,
        };
        Ok(at.resolver().add(&network.name, &servers, &named)?)
    }

    /// Takes away what there is of them. `namespace` is the one that they are in, if it is
    /// there.
    fn unmake(&mut self, at: &Directory<'_>, namespace: Option<&Path>) -> Result<()> {
        let mut failed = None;
        for index in (0..self.links.len()).rev() {
            if !self.links[index].begun {
                continue;
            }
            if self.links[index].result.is_none() {
                // Nobody was left to write it down. Plugins go by it, and some forget more
                // than others do when they are asked a second time.
                self.links[index].result = leased(&self.links[index], at);
                self.store(at.container)?;
            }
            let link = &self.links[index];
            if let Err(e) = unmake(link, &self.plugins, at, namespace) {
                failed = failed.or(Some(e));
                continue;
            }
            self.links[index].begun = false;
            self.links[index].result = None;
            self.store(at.container)?;
        }
        match failed {
            Some(e) => Err(e),
            None => Self::forget(at.container),
        }
    }
}

/// Where the links of a container are written down.
struct Directory<'a> {
    id: &'a str,
    container: &'a Path,
    /// Of the node.
    run: &'a Path,
    lock: BorrowedFd<'a>,
}

impl Directory<'_> {
    fn cni<'a>(&'a self, path: &'a [PathBuf]) -> Cni<'a> {
        Cni {
            path,
            lock: Some(self.lock),
        }
    }

    fn resolver(&self) -> Resolver {
        resolver(self.run)
    }

    /// The node's networks: a container's directory is in one beside theirs.
    fn networks(&self) -> Option<Networks> {
        let state = self.container.parent()?.parent()?;
        Some(Networks::new(&networks_dir(state)))
    }
}

/// What the run directory's part for names is called.
pub(crate) const NAMES_DIR: &str = "names";

/// The name server of a node's networks.
pub(crate) fn resolver(run: &Path) -> Resolver {
    Resolver::new(&run.join(NAMES_DIR))
}

/// Where a node's networks are written down.
pub(crate) fn networks_dir(state: &Path) -> PathBuf {
    state.join("networks")
}

/// What plugins have made for a link, by the addresses that were leased for it; nothing, if
/// there are none.
fn leased(link: &NetworkLink, at: &Directory<'_>) -> Option<Value> {
    let leased = at.networks()?.leased(link.network(), at.id);
    let whole = |ip: IpAddr| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 });
    let address = |ip: &IpAddr| json!({ "interface": 0, "address": whole(*ip) });
    let ips: Vec<_> = leased.iter().map(address).collect();
    let version = link.list.get("cniVersion");
    let made = json!({
        "cniVersion": version,
        "interfaces": [{ "name": link.interface, "sandbox": "/" }],
        "ips": ips,
    });
    (!ips.is_empty()).then_some(made)
}

fn unmake(
    link: &NetworkLink,
    plugins: &[PathBuf],
    at: &Directory<'_>,
    namespace: Option<&Path>,
) -> Result<()> {
    let list = link.list()?;
    at.resolver().remove(list.name(), at.id)?;
    let stand_in = match namespace {
        Some(_) => None,
        None => {
            let addresses: Vec<_> = link.made().addresses().collect();
            Some(OwnNamespace::stand_in(&link.interface, &addresses)?)
        }
    };
    let stand_in = stand_in.as_ref().map(OwnNamespace::path);
    let attachment = Attachment {
        list: &list,
        container: at.id,
        namespace: namespace.or(stand_in.as_deref()),
        interface: &link.interface,
        capabilities: &link.capabilities,
        result: link.result.as_ref(),
    };
    Ok(at.cni(plugins).del(&attachment)?)
}

/// Takes away the links of a container that has no supervisor any more. The caller holds
/// its lock.
pub(crate) fn release(layout: &Layout, id: &str, lock: BorrowedFd<'_>) -> Result<()> {
    let dir = layout.container(id);
    let Some(mut attachments) = Attachments::load(&dir)? else {
        return Ok(());
    };
    let at = Directory {
        id,
        container: &dir,
        run: &layout.run,
        lock,
    };
    attachments.unmake(&at, None)
}

/// What a container has for being linked.
#[derive(Debug, Clone)]
pub struct Furnished {
    /// Where its machine finds its links.
    pub network: Network,
    /// What it is told of them.
    pub names: NameFiles,
}

/// The links of a container, as its supervisor holds them.
#[derive(Debug, Clone)]
pub struct ContainerLinks(Arc<Mutex<Held>>);

#[derive(Debug)]
struct Held {
    id: String,
    dir: PathBuf,
    run: PathBuf,
    lock: OwnedFd,
    namespace: Option<OwnNamespace>,
    /// Keep others from its ports of the host's.
    ports: Vec<OwnedFd>,
    attachments: Option<Attachments>,
}

/// A container's links in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinksState {
    namespace: Option<Fd>,
    /// The reserved ports.
    ports: Vec<Fd>,
}

impl ContainerLinks {
    /// None are made yet. `dir` is the container's directory, `run` the node's; `lock` is the
    /// container's, and held.
    pub fn new(id: &str, dir: &Path, run: &Path, lock: BorrowedFd<'_>) -> Result<Self> {
        let lock = lock.try_clone_to_owned().map_err(Error::io("keep", dir))?;
        Ok(Self(Arc::new(Mutex::new(Held {
            id: id.into(),
            dir: dir.into(),
            run: run.into(),
            lock,
            namespace: None,
            ports: Vec::new(),
            attachments: None,
        }))))
    }

    /// What the program that takes this one's place needs of them.
    pub fn state(&self, giver: &mut Giver) -> std::result::Result<LinksState, NoState> {
        let Ok(held) = self.0.try_lock() else {
            return Err(NoState::busy("its networks are being made or taken away"));
        };
        Ok(LinksState {
            namespace: held
                .namespace
                .as_ref()
                .map(|namespace| giver.give(namespace)),
            ports: held.ports.iter().map(|port| giver.give(port)).collect(),
        })
    }

    /// Those of the program before.
    pub fn take_over(&self, state: LinksState, taker: &mut Taker) -> Result<()> {
        let mut held = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let lost = |e| Error::io("take over the networks of", &held.dir)(e);
        let namespace = state.namespace.map(|fd| taker.take(fd)).transpose();
        let namespace = namespace.map_err(lost)?.map(OwnNamespace::from);
        let ports = state.ports.into_iter().map(|fd| taker.take(fd));
        let ports = ports.collect::<std::io::Result<_>>().map_err(lost)?;
        if namespace.is_some() {
            held.attachments = Attachments::load(&held.dir)?;
        }
        (held.namespace, held.ports) = (namespace, ports);
        Ok(())
    }

    /// Makes those that the container is to have, if it is to have any.
    pub async fn make(&self) -> Result<Option<Furnished>> {
        self.elsewhere(Held::make).await
    }

    /// Takes them away.
    pub async fn unmake(&self) -> Result<()> {
        self.elsewhere(Held::unmake).await
    }

    /// On a thread of its own: plugins take their time, and others wait for nothing of
    /// them. Work that nobody waits for any more comes to its end all the same, and before
    /// other work.
    async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Held) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (tell, told) = oneshot::channel();
        let held = self.0.clone();
        let thread = move || {
            let mut held = held.lock().unwrap_or_else(|e| e.into_inner());
            let _ = tell.send(work(&mut held));
        };
        std::thread::Builder::new()
            .name("links".into())
            .spawn(thread)
            .map_err(|e| Error::Machine(format!("start a thread: {e}")))?;
        let lost =
            |_| Error::Machine("connect the container to its networks: the thread died".into());
        told.await.map_err(lost)?
    }
}

impl Held {
    fn make(&mut self) -> Result<Option<Furnished>> {
        let Some(mut attachments) = Attachments::load(&self.dir)? else {
            return Ok(None);
        };
        self.ports = ports::reserve(&mut attachments.ports)?;
        let namespace = OwnNamespace::new()?;
        let path = namespace.path();
        self.namespace = Some(namespace);
        let at = Directory {
            id: &self.id,
            container: &self.dir,
            run: &self.run,
            lock: self.lock.as_fd(),
        };
        let made = attachments.make(&at, &path);
        let furnished = made.map(|()| Furnished {
            network: Network::At(path),
            names: NameFiles {
                hosts: names::hosts(&attachments),
                resolv_conf: names::resolv_conf(&attachments),
            },
        });
        self.attachments = Some(attachments);
        furnished.map(Some)
    }

    fn unmake(&mut self) -> Result<()> {
        let Some(mut attachments) = self.attachments.take() else {
            // It was never to have any, or they were not begun.
            return Attachments::forget(&self.dir);
        };
        let at = Directory {
            id: &self.id,
            container: &self.dir,
            run: &self.run,
            lock: self.lock.as_fd(),
        };
        let path = self.namespace.as_ref().map(OwnNamespace::path);
        let result = attachments.unmake(&at, path.as_deref());
        debug!(id = self.id, ?result, "links taken away");
        self.namespace = None;
        self.ports.clear();
        result
    }
}

#[cfg(test)]
mod tests;
