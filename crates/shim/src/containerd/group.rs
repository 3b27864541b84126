//! Which containers share a sandbox, as their bundles say.

use std::{collections::HashMap, fs, io, path::Path};

use serde::Deserialize;

/// Largest `config.json` that is read.
const SPEC_MAX: u64 = 4 << 20;

/// Annotations that name the sandbox of a container: the first that is there counts.
const GROUPS: [&str; 4] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.sandbox.id",
];

/// As much of a bundle's `config.json` as matters here.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Outline {
    #[serde(default)]
    annotations: HashMap<String, String>,
    #[serde(default)]
    process: Process,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Process {
    #[serde(default)]
    oom_score_adj: Option<i32>,
}

impl Outline {
    /// Reads a bundle's.
    pub(crate) fn load(bundle: &Path) -> io::Result<Self> {
        let path = bundle.join("config.json");
        let size = fs::metadata(&path)?.len();
        if size > SPEC_MAX {
            return Err(io::Error::other(format!(
                "{size} bytes, more than {SPEC_MAX}"
            )));
        }
        Ok(serde_json::from_slice(&fs::read(&path)?)?)
    }

    /// Name of the sandbox of the container `id`: its own, unless it belongs to another.
    pub(crate) fn group<'a>(&'a self, id: &'a str) -> &'a str {
        GROUPS
            .iter()
            .find_map(|name| self.annotations.get(*name))
            .map_or(id, String::as_str)
    }

    /// How readily the kernel shall kill it when memory is short.
    pub(crate) fn oom_score_adj(&self) -> Option<i32> {
        self.process.oom_score_adj
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_in_the_sandbox_that_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let outline = |text: &str| {
            fs::write(dir.path().join("config.json"), text).unwrap();
            Outline::load(dir.path())
        };
        assert_eq!(outline("{}").unwrap().group("own"), "own");
        let cri = r#"{"annotations":{"io.kubernetes.cri.container-type":"container",
            "io.kubernetes.cri.sandbox-id":"pod"},"process":{"oomScoreAdj":-998}}"#;
        let cri = outline(cri).unwrap();
        assert_eq!((cri.group("own"), cri.oom_score_adj()), ("pod", Some(-998)));
        let both = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod",
            "io.containerd.runc.v2.group":"group"}}"#;
        let both = outline(both).unwrap();
        assert_eq!(both.group("own"), "group");
        assert!(outline("{").is_err());
    }
}
