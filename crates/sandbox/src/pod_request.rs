//! A pod whose machine comes before any container of it, as containerd's Sandbox API asks
//! for one. Nothing stands for the pod in the guest: what its containers have in common is
//! the guest's own, or the agent's.

use std::{collections::HashMap, path::PathBuf};

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{Error, Result, sizing::PodLimits};

/// What a pod is to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodRequest {
    /// Host name of its machine; empty for the usual one.
    pub hostname: String,
    /// Kernel settings of its machine, with their dotted names.
    pub sysctls: HashMap<String, String>,
    /// What it asks of its node; of other names nothing is heeded.
    pub annotations: HashMap<String, String>,
    /// The network namespace on the host that is the pod's; none for the host's own.
    pub network_namespace: Option<PathBuf>,
    /// `/etc/resolv.conf` of its containers, of those that bring none.
    pub resolv_conf: Option<String>,
    /// Bounds of all its containers together.
    pub limits: PodLimits,
}

/// What the containers of such a pod get from it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PodParts {
    pub(crate) hostname: String,
    pub(crate) resolv_conf: Option<String>,
}

impl PodRequest {
    /// The specification that the pod's first container would have had, as far as it is of
    /// the pod.
    pub(crate) fn spec(&self) -> Result<Spec> {
        let mut annotations = self.annotations.clone();
        annotations.extend(self.limits.annotations());
        let sandbox = ("io.kubernetes.cri.container-type", "sandbox");
        annotations.insert(sandbox.0.into(), sandbox.1.into());
        let mut namespaces: Vec<Value> = ["ipc", "uts", "mount"]
            .map(|kind| json!({"type": kind}))
            .into();
        if let Some(path) = &self.network_namespace {
            namespaces.push(json!({"type": "network", "path": path}));
        }
        let mut spec = Map::new();
        spec.insert("ociVersion".into(), "1.1.0".into());
        spec.insert("annotations".into(), json!(annotations));
        let linux = json!({"sysctl": self.sysctls, "namespaces": namespaces});
        spec.insert("linux".into(), linux);
        if !self.hostname.is_empty() {
            spec.insert("hostname".into(), json!(self.hostname));
        }
        serde_json::from_value(Value::Object(spec))
            .map_err(|e| Error::Invalid(format!("describe the pod: {e}")))
    }

    pub(crate) fn parts(&self) -> PodParts {
        PodParts {
            hostname: self.hostname.clone(),
            resolv_conf: self.resolv_conf.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Settings, pod, sizing};

    #[test]
    fn it_is_described_as_its_first_container_would_describe_it() {
        let request = PodRequest {
            hostname: "web".into(),
            sysctls: HashMap::from([("net.core.somaxconn".into(), "512".into())]),
            annotations: HashMap::from([("dev.walnut.vcpus".into(), "2".into())]),
            network_namespace: Some("/var/run/netns/x".into()),
            resolv_conf: None,
            limits: PodLimits {
                memory: 64 << 20,
                cpu_quota: 250_000,
                cpu_period: 100_000,
            },
        };
        let spec = request.spec().unwrap();
        assert_eq!(pod::Role::of(&spec), pod::Role::First);
        assert_eq!(spec.hostname().as_deref(), Some("web"));
        assert_eq!(pod::sysctls(&spec), request.sysctls);
        let annotations = spec.annotations().clone().unwrap();
        assert_eq!(annotations["dev.walnut.vcpus"], "2");
        let size = sizing::size(&spec, &Settings::default());
        assert_eq!((size.vcpus, size.memory), (3, 162 << 20));
        let linux = spec.linux().clone().unwrap();
        let paths: Vec<_> = linux
            .namespaces()
            .iter()
            .flatten()
            .filter_map(|namespace| namespace.path().clone())
            .collect();
        assert_eq!(paths, [PathBuf::from("/var/run/netns/x")]);
    }

    #[test]
    fn nothing_asked_is_the_usual_pod() {
        let spec = PodRequest::default().spec().unwrap();
        assert_eq!(spec.hostname(), &None);
        let usual = Settings::default();
        let size = sizing::size(&spec, &usual);
        assert_eq!(size.memory, usual.pod.memory.0);
        // The role is not the pod's to say.
        let other = HashMap::from([(
            "io.kubernetes.cri.container-type".to_owned(),
            "container".to_owned(),
        )]);
        let request = PodRequest {
            annotations: other,
            ..Default::default()
        };
        let role = pod::Role::of(&request.spec().unwrap());
        assert_eq!(role, pod::Role::First);
    }
}
