//! The runtime in containerd's configuration.
//!
//! containerd before 2.0 takes a plugin's settings from one file only: a drop-in would
//! replace all that the CRI plugin has been told, so that the file itself is amended.
//! From 2.0 on settings of several files are merged, and from 2.2 on the files of
//! `/etc/containerd/conf.d` are read without being named.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use toml_edit::{Array, DocumentMut, Item, Table, value};

use super::{amendment::Amendment, step::Step};

/// The runtime's name in RuntimeClasses' `handler`.
pub(super) const NAME: &str = "walnut";
const RUNTIME_TYPE: &str = "io.containerd.walnut.v2";
/// Annotations that a pod may have Walnut see; which of them it heeds, its own
/// configuration says.
const ANNOTATIONS: &str = "dev.walnut.*";
const DROP_IN_DIR: &str = "conf.d";
const DROP_IN: &str = "walnut.toml";

/// Of containerd: major and minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(u32, u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl Version {
    /// From "1.6.20~ds1" or "v2.1.0".
    pub(super) fn parse(text: &str) -> Result<Self> {
        let number = |part: Option<&str>| -> Option<u32> {
            let part = part?;
            let end = part
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(part.len());
            part.get(..end)?.parse().ok()
        };
        let mut parts = text.trim_start_matches('v').split('.');
        match (number(parts.next()), number(parts.next())) {
            (Some(major), Some(minor)) => Ok(Self(major, minor)),
            _ => bail!("{text:?} is no version of containerd; give one like 1.6 or 2.1"),
        }
    }
}

/// The version of the host's containerd, if it has one.
pub(super) fn installed() -> Result<Option<Version>> {
    let output = match Command::new("containerd").arg("--version").output() {
        Ok(output) => output,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).context("run containerd --version"),
    };
    // containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1
    let text = String::from_utf8_lossy(&output.stdout);
    let Some(version) = text.split_whitespace().nth(2) else {
        bail!("ask containerd for its version: it says {text:?}");
    };
    Version::parse(version).map(Some)
}

/// What tells a containerd of this version, whose configuration is `config`; `at` is where
/// a path lies in the file system that is set up.
pub(super) fn steps(
    version: Version,
    config: &Path,
    at: impl Fn(&Path) -> PathBuf,
) -> Result<Vec<Step>> {
    if version < Version(2, 0) {
        return Ok(vec![Step::Amend {
            file: at(config),
            with: Amendment::Runtime,
        }]);
    }
    let Some(dir) = config.parent() else {
        bail!("{} is no configuration file", config.display());
    };
    let mut steps = vec![Step::Text {
        to: at(&dir.join(DROP_IN_DIR).join(DROP_IN)),
        text: drop_in(),
    }];
    if version < Version(2, 2) {
        steps.push(Step::Amend {
            file: at(config),
            with: Amendment::Import(format!("{}/*.toml", dir.join(DROP_IN_DIR).display())),
        });
    }
    Ok(steps)
}

fn drop_in() -> String {
    format!(
        "# Made by `walnut install`.\nversion = 3\n\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.{NAME}]\n{}",
        runtime()
    )
}

/// What the CRI plugin is told of the runtime. A privileged container is so in its own
/// kernel: devices of the host are not handed to it.
fn runtime() -> Table {
    let mut table = Table::new();
    table["runtime_type"] = value(RUNTIME_TYPE);
    table["privileged_without_host_devices"] = value(true);
    for key in ["pod_annotations", "container_annotations"] {
        table[key] = value(Array::from_iter([ANNOTATIONS]));
    }
    table
}

const RUNTIMES: [&str; 4] = [
    "plugins",
    "io.containerd.grpc.v1.cri",
    "containerd",
    "runtimes",
];

/// A file with the runtime in it (configuration version 2).
pub(super) fn add_runtime(text: &str) -> Result<String> {
    let mut file = parse(text)?;
    let mut table = file.as_table_mut();
    for name in RUNTIMES {
        let entry = table.entry(name).or_insert_with(|| {
            let mut table = Table::new();
            table.set_implicit(true);
            Item::Table(table)
        });
        let Some(inner) = entry.as_table_mut() else {
            bail!("{name} is not written as a table; set the runtime up by hand");
        };
        table = inner;
    }
    if !is_same(table.get(NAME)) {
        table.insert(NAME, Item::Table(runtime()));
    }
    Ok(file.to_string())
}

/// The file without it.
pub(super) fn remove_runtime(text: &str) -> Result<String> {
    let mut file = parse(text)?;
    let runtimes = RUNTIMES
        .iter()
        .try_fold(file.as_item_mut(), |at, name| at.get_mut(name));
    if let Some(runtimes) = runtimes.and_then(Item::as_table_like_mut) {
        runtimes.remove(NAME);
    }
    Ok(unless_hollow(&file, text))
}

pub(super) fn has_runtime(text: &str) -> bool {
    let Ok(file) = text.parse::<DocumentMut>() else {
        return false;
    };
    let runtimes = RUNTIMES
        .iter()
        .try_fold(file.as_item(), |at, name| at.get(name));
    runtimes.and_then(|runtimes| runtimes.get(NAME)).is_some()
}

/// A file that has these read as well.
pub(super) fn add_import(text: &str, files: &str) -> Result<String> {
    let mut file = parse(text)?;
    let imports = file.entry("imports").or_insert(value(Array::new()));
    let Some(imports) = imports.as_array_mut() else {
        bail!("imports is not a list");
    };
    if !imports.iter().any(|import| import.as_str() == Some(files)) {
        imports.push(files);
    }
    Ok(file.to_string())
}

/// The file without that.
pub(super) fn remove_import(text: &str, files: &str) -> Result<String> {
    let mut file = parse(text)?;
    if let Some(imports) = file.get_mut("imports").and_then(Item::as_array_mut) {
        imports.retain(|import| import.as_str() != Some(files));
        if imports.is_empty() {
            file.remove("imports");
        }
    }
    Ok(unless_hollow(&file, text))
}

pub(super) fn has_import(text: &str, files: &str) -> bool {
    let Ok(file) = text.parse::<DocumentMut>() else {
        return false;
    };
    let imports = file.get("imports").and_then(Item::as_array);
    imports.is_some_and(|all| all.iter().any(|one| one.as_str() == Some(files)))
}

/// What is left of `text`; nothing, if it says no more than its version: it was made for us.
fn unless_hollow(file: &DocumentMut, text: &str) -> String {
    let only_version = file
        .iter()
        .all(|(key, item)| key == "version" || is_hollow(item));
    match only_version && !text.contains('#') {
        true => String::new(),
        false => file.to_string(),
    }
}

/// Says all that it should; more is the administrator's.
fn is_same(there: Option<&Item>) -> bool {
    let Some(there) = there.and_then(Item::as_table_like) else {
        return false;
    };
    runtime().iter().all(|(key, wanted)| {
        let has = there
            .get(key)
            .map(|item| item.to_string().trim().to_owned());
        has == Some(wanted.to_string().trim().to_owned())
    })
}

fn is_hollow(item: &Item) -> bool {
    item.as_table()
        .is_some_and(|table| table.iter().all(|(_, item)| is_hollow(item)))
}

/// Of version 2 or 3; a new one if there is nothing.
fn parse(text: &str) -> Result<DocumentMut> {
    if text.trim().is_empty() {
        let mut new = DocumentMut::new();
        new["version"] = value(2);
        return Ok(new);
    }
    let file: DocumentMut = text.parse().context("it is not TOML")?;
    match file.get("version").and_then(Item::as_integer) {
        Some(2 | 3) => Ok(file),
        version => bail!(
            "its configuration version is {}; convert it with `containerd config migrate`",
            version.unwrap_or(1)
        ),
    }
}
