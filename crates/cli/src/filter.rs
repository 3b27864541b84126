//! `--filter` of lists.

use std::{collections::BTreeMap, str::FromStr};

use anyhow::{Result, bail};
use walnut_sandbox::similar;

/// `NAME=VALUE`, with `|` between alternatives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok(Self {
                name: name.to_owned(),
                value: value.to_owned(),
            }),
            _ => Err("write it as NAME=VALUE, as status=exited".into()),
        }
    }
}

impl Filter {
    /// Refuses one that is not among `known`.
    pub(crate) fn check(&self, known: &[&str]) -> Result<()> {
        if known.contains(&self.name.as_str()) {
            return Ok(());
        }
        let hint = similar(&self.name, known.iter().copied());
        let hint = hint.map(|h| format!("did you mean {h}?"));
        bail!(
            "--filter {}: there is no such filter; {}",
            self.name,
            hint.unwrap_or_else(|| format!("use {}", known.join(", ")))
        )
    }

    /// Its alternatives.
    pub(crate) fn values(&self) -> impl Iterator<Item = &str> {
        self.value.split('|')
    }

    /// Whether one of its alternatives fits.
    pub(crate) fn any(&self, fits: impl Fn(&str) -> bool) -> bool {
        self.values().any(fits)
    }

    /// Whether something has the label, with the value if one is given.
    pub(crate) fn fits_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        match self.value.split_once('=') {
            Some((name, value)) => labels.get(name).is_some_and(|v| v == value),
            None => labels.contains_key(&self.value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_and_checked() {
        let filter: Filter = "status=exited|paused".parse().unwrap();
        assert!(filter.any(|v| v == "paused") && !filter.any(|v| v == "running"));
        assert!("status".parse::<Filter>().is_err() && "=x".parse::<Filter>().is_err());
        let slip: Filter = "staus=x".parse().unwrap();
        let said = slip.check(&["status", "name"]).unwrap_err().to_string();
        assert!(said.contains("did you mean status?"), "{said}");
        let labels = BTreeMap::from([("a".to_owned(), "b=c".to_owned())]);
        for (text, fits) in [
            ("label=a", true),
            ("label=a=b=c", true),
            ("label=a=b", false),
            ("label=x", false),
        ] {
            assert_eq!(
                text.parse::<Filter>().unwrap().fits_labels(&labels),
                fits,
                "{text}"
            );
        }
    }
}
