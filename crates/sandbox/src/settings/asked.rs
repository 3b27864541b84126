//! What a pod decides for itself: annotations under one prefix, each of which the node
//! must allow. One that it does not allow is refused, for a pod that runs otherwise than
//! it was asked to is worse than one that does not.

use std::str::FromStr;

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use walnut_network::Rules;

use super::{Bytes, Least, OFF, Settings};
use crate::{Error, Result, sizing::VCPUS_MAX};

/// Of all annotations that mean something here.
const PREFIX: &str = "dev.walnut.";

/// What a pod may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Annotation {
    /// The machine's driver.
    Driver,
    /// Memory that its guest has at least.
    Memory,
    /// vCPUs that it has at least.
    Vcpus,
    /// `off`: it boots, even where a template could spare it that.
    Template,
    /// Rules for what its guest may send, beside the node's.
    Egress,
}

impl FromStr for Annotation {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "driver" => Ok(Self::Driver),
            "memory" => Ok(Self::Memory),
            "vcpus" => Ok(Self::Vcpus),
            "template" => Ok(Self::Template),
            "egress" => Ok(Self::Egress),
            _ => Err(()),
        }
    }
}

impl Settings {
    /// With what the annotations of a sandbox's first container say. Those of bundles
    /// that Walnut has written (`own`) say other things as well, and need no permission.
    pub(crate) fn asked_by(&self, spec: &Spec, own: bool) -> Result<Self> {
        let mut settings = self.clone();
        for (key, value) in spec.annotations().iter().flatten() {
            let Some(name) = key.strip_prefix(PREFIX) else {
                continue;
            };
            let refuse = |why: &str| Error::Invalid(format!("annotation {key}={value}: {why}"));
            let Ok(annotation) = name.parse::<Annotation>() else {
                if own {
                    continue;
                }
                return Err(refuse(
                    "there is no such; there are driver, memory, vcpus, template and egress",
                ));
            };
            if !own && !self.annotations.allow.contains(&annotation) {
                return Err(refuse(&format!(
                    "this node does not allow it; add {name:?} to \"allow\" of [annotations] in /etc/walnut/config.toml"
                )));
            }
            match annotation {
                Annotation::Driver => settings.machine.driver = value.parse()?,
                Annotation::Template => match value.as_str() {
                    OFF => settings.machine.templates = false,
                    _ => return Err(refuse("must be \"off\", or not there")),
                },
                Annotation::Egress => {
                    let rules: Vec<_> = value.split(';').map(str::trim).collect();
                    let rules = Rules::parse(&rules).map_err(|e| refuse(&e))?;
                    settings.own_egress = Some(rules);
                }
                Annotation::Memory => {
                    let memory: Bytes = value.parse().map_err(|e: String| refuse(&e))?;
                    settings.least.memory = memory.0;
                }
                Annotation::Vcpus => {
                    let vcpus = value.parse().ok();
                    let vcpus = vcpus.filter(|vcpus| (1..=VCPUS_MAX).contains(vcpus));
                    settings.least.vcpus =
                        vcpus.ok_or_else(|| refuse(&format!("must be from 1 to {VCPUS_MAX}")))?;
                }
            }
        }
        Ok(settings)
    }

    /// What a pod has asked for, beside what its containers' limits come to.
    pub(crate) fn least(&self) -> Least {
        self.least
    }
}

#[cfg(test)]
mod tests {
    use walnut_machine::DriverChoice;

    use super::*;

    fn asked(settings: &Settings, key: &str, value: &str, own: bool) -> Result<Settings> {
        let spec = format!(r#"{{"ociVersion":"1.0.2","annotations":{{"{key}":"{value}"}}}}"#);
        settings.asked_by(&serde_json::from_str(&spec).unwrap(), own)
    }

    #[test]
    fn what_is_allowed_is_heeded_and_the_rest_refused() {
        let mut all = Settings::default();
        all.annotations.allow = [
            Annotation::Driver,
            Annotation::Memory,
            Annotation::Vcpus,
            Annotation::Template,
            Annotation::Egress,
        ]
        .into();
        let with = |key, value| asked(&all, key, value, false);
        let driver = with("dev.walnut.driver", "vmm").unwrap().machine.driver;
        assert_eq!(driver, DriverChoice::Vmm);
        assert!(
            !with("dev.walnut.template", "off")
                .unwrap()
                .machine
                .templates
        );
        let egress = with("dev.walnut.egress", "allow 10.0.0.0/8 tcp:443; deny all").unwrap();
        assert_eq!(egress.egress().len(), 2);
        assert_eq!(egress.egress()[1].to_texts().len(), 2);
        let said = with("dev.walnut.egress", "allow 10.0.0.0/8").unwrap_err();
        assert!(said.to_string().contains("last rule"), "{said}");
        let least = with("dev.walnut.memory", "1g").unwrap().least();
        assert_eq!((least.memory, least.vcpus), (1 << 30, 0));
        assert_eq!(with("dev.walnut.vcpus", "3").unwrap().least().vcpus, 3);
        assert_eq!(with("io.other.vcpus", "99").unwrap(), all);
        for (key, value) in [
            ("dev.walnut.driver", "best"),
            ("dev.walnut.template", "on"),
            ("dev.walnut.memory", "much"),
            ("dev.walnut.vcpus", "33"),
            ("dev.walnut.vcpus", "0"),
            ("dev.walnut.log", "/etc/shadow"),
            ("dev.walnut.", ""),
        ] {
            let error = with(key, value).unwrap_err().to_string();
            assert!(error.contains(value), "{error}");
        }
        for name in ["driver", "memory", "vcpus"] {
            let key = format!("dev.walnut.{name}");
            let error = asked(&Settings::default(), &key, "1", false).unwrap_err();
            assert!(error.to_string().contains("allow"), "{error}");
        }
        // Walnut's own say what they like.
        let own = asked(&Settings::default(), "dev.walnut.log", "/log", true);
        assert_eq!(own.unwrap(), Settings::default());
        let own = asked(&Settings::default(), "dev.walnut.vcpus", "2", true);
        assert_eq!(own.unwrap().least().vcpus, 2);
    }
}
