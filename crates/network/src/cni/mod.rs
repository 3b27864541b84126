//! A runtime's side of the Container Network Interface, version 1.0.0 of its
//! specification: lists of plugins that are executed one after the other, each with what
//! the one before it made.
//!
//! What is kept between `ADD` and `DEL` (list, result, arguments) is the caller's to keep:
//! the namespace may be gone by then, and the list on disk another one.

mod exec;
mod result;

use std::{
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

pub use result::{CniInterface, CniIp, CniResult};

use crate::{Error, Result};

/// The version that is spoken where a list names none.
const OLDEST: &str = "0.1.0";
/// Longest name of an interface that the kernel takes.
const INTERFACE_MAX: usize = 15;

/// A network configuration list (CNI 1.0.0 §1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfList(Map<String, Value>);

impl ConfList {
    /// Reads one. `from` is for messages.
    ///
    /// # Errors
    /// If it is no JSON object with a name and plugins that each have a type.
    pub fn parse(text: &[u8], from: &str) -> Result<Self> {
        let value = serde_json::from_slice(text)
            .map_err(|e| Error::Config(format!("read the network {from}: {e}")))?;
        Self::new(value, from)
    }

    /// The same, from JSON that has been read.
    ///
    /// # Errors
    /// As [`ConfList::parse`].
    pub fn new(value: Value, from: &str) -> Result<Self> {
        let refuse = |why: &str| Error::Config(format!("read the network {from}: {why}"));
        let Value::Object(map) = value else {
            return Err(refuse("it is not a JSON object"));
        };
        let list = Self(map);
        if list.name().is_empty() {
            return Err(refuse("it has no \"name\""));
        }
        let plugins = list.0.get("plugins").and_then(Value::as_array);
        let plugins = plugins.ok_or_else(|| refuse("it has no \"plugins\""))?;
        if plugins.is_empty() {
            return Err(refuse("its list of plugins is empty"));
        }
        for plugin in plugins {
            let kind = plugin.get("type").and_then(Value::as_str).unwrap_or("");
            if kind.is_empty() || kind.contains('/') {
                return Err(refuse(
                    "each plugin must have a \"type\", the name of a program",
                ));
            }
        }
        Ok(list)
    }

    /// The network's name.
    pub fn name(&self) -> &str {
        self.0.get("name").and_then(Value::as_str).unwrap_or("")
    }

    fn version(&self) -> &str {
        let version = self.0.get("cniVersion").and_then(Value::as_str);
        version.unwrap_or(OLDEST)
    }

    fn checked(&self) -> bool {
        self.0.get("disableCheck") != Some(&Value::Bool(true))
    }

    /// The plugins, in the order in which they are added.
    pub fn plugins(&self) -> impl DoubleEndedIterator<Item = &Map<String, Value>> {
        let plugins = self.0.get("plugins").and_then(Value::as_array);
        plugins.into_iter().flatten().filter_map(Value::as_object)
    }

    /// Names of the programs that it needs, with those that assign addresses.
    pub fn programs(&self) -> Vec<&str> {
        let mut all = Vec::new();
        for plugin in self.plugins() {
            let ipam = plugin.get("ipam").and_then(|ipam| ipam.get("type"));
            for kind in [plugin.get("type"), ipam].into_iter().flatten() {
                all.extend(kind.as_str());
            }
        }
        all
    }

    /// As JSON.
    pub fn as_json(&self) -> &Map<String, Value> {
        &self.0
    }
}

/// One attachment of a container's to a network.
#[derive(Debug, Clone, Copy)]
pub struct Attachment<'a> {
    /// The network.
    pub list: &'a ConfList,
    /// The container's ID.
    pub container: &'a str,
    /// The container's network namespace. Only `DEL` does without.
    pub namespace: Option<&'a Path>,
    /// What the interface is called there.
    pub interface: &'a str,
    /// Arguments for those plugins that say that they are capable of them, by capability.
    pub capabilities: &'a Map<String, Value>,
    /// What `ADD` had for a result.
    pub result: Option<&'a Value>,
}

/// Executes plugins.
#[derive(Debug, Clone)]
pub struct Cni<'a> {
    /// Directories that are searched for plugins.
    pub path: &'a [PathBuf],
    /// A lock that plugins hold as well: who waits for it waits for those that run.
    pub lock: Option<BorrowedFd<'a>>,
}

impl Cni<'_> {
    /// Where a plugin is.
    ///
    /// # Errors
    /// If it is nowhere; the error names the package that has it.
    pub fn find(&self, kind: &str) -> Result<PathBuf> {
        let places = self.path.iter().map(|dir| dir.join(kind));
        let mut found = places.filter(|file| file.is_file());
        found.next().ok_or_else(|| Error::Plugin {
            name: kind.to_owned(),
            places: self.path.to_vec(),
        })
    }

    /// Adds the container to the network. `made` is the result of the last plugin then.
    ///
    /// # Errors
    /// If a plugin is missing or refuses. `made` is what plugins before it have made: a
    /// `DEL` with it is to follow.
    pub fn add(&self, attachment: &Attachment<'_>, made: &mut Option<Value>) -> Result<()> {
        check_interface(attachment.interface)?;
        for plugin in attachment.list.plugins() {
            let config = config(attachment, plugin, made.as_ref());
            let said = self.execute("ADD", attachment, plugin, &config)?;
            let result: Value = serde_json::from_slice(&said).map_err(|e| Error::Refused {
                network: attachment.list.name().to_owned(),
                plugin: kind(plugin).to_owned(),
                attempt: "add to",
                why: format!("its result is not JSON: {e}"),
            })?;
            *made = Some(result);
        }
        Ok(())
    }

    /// Whether all that `ADD` made is as it was.
    ///
    /// # Errors
    /// If it is not.
    pub fn check(&self, attachment: &Attachment<'_>) -> Result<()> {
        if !attachment.list.checked() {
            return Ok(());
        }
        for plugin in attachment.list.plugins() {
            let config = config(attachment, plugin, attachment.result);
            self.execute("CHECK", attachment, plugin, &config)?;
        }
        Ok(())
    }

    /// Takes the container from the network, whatever of it is there.
    ///
    /// # Errors
    /// The first of a plugin's; all are executed.
    pub fn del(&self, attachment: &Attachment<'_>) -> Result<()> {
        let mut failed = None;
        for plugin in attachment.list.plugins().rev() {
            let config = config(attachment, plugin, attachment.result);
            if let Err(e) = self.execute("DEL", attachment, plugin, &config) {
                failed = failed.or(Some(e));
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

fn kind(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or("")
}

/// A plugin's execution configuration (§3).
fn config(
    attachment: &Attachment<'_>,
    plugin: &Map<String, Value>,
    previous: Option<&Value>,
) -> Map<String, Value> {
    let mut config = plugin.clone();
    let list = attachment.list;
    config.insert("cniVersion".into(), list.version().into());
    config.insert("name".into(), list.name().into());
    let capable = config.remove("capabilities");
    let capable = capable.as_ref().and_then(Value::as_object);
    let arguments: Map<_, _> = attachment
        .capabilities
        .iter()
        .filter(|(name, _)| capable.and_then(|all| all.get(*name)) == Some(&Value::Bool(true)))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !arguments.is_empty() {
        config.insert("runtimeConfig".into(), arguments.into());
    }
    if let Some(previous) = previous {
        config.insert("prevResult".into(), previous.clone());
    }
    config
}

/// A name that can be an interface's (§2, CNI_IFNAME).
fn check_interface(name: &str) -> Result<()> {
    let fine = |c: char| !c.is_whitespace() && !matches!(c, '/' | ':') && !c.is_control();
    if name.is_empty()
        || name.len() > INTERFACE_MAX
        || name.starts_with('.')
        || !name.chars().all(fine)
    {
        return Err(Error::Config(format!(
            "call an interface {name:?}: use 1 to {INTERFACE_MAX} characters, without \"/\", \":\" and spaces"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
