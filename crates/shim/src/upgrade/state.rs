//! What a supervisor leaves to the program that takes its place.
//!
//! A few bytes that say what it is, then JSON. It comes from this process's own memory and
//! is sealed, so nobody has changed it; but it may be another version's. A field that is
//! not known is refused, in the dry run that precedes: so one that is added later has a
//! default, with which a state of before can be read, and [`FORMAT`] grows when one that
//! is read would mean something else.

use serde::{Deserialize, Serialize};
use walnut_sandbox::SandboxState;

use super::{TOKEN_MAX, program::Build};
use crate::{
    connections::ConnectionsState,
    containerd::PodState,
    oci::BundleFront,
    owner::OwnerState,
    service::{SandboxPod, ServiceState},
};

/// Of the state.
pub(crate) const FORMAT: u32 = 1;
/// Largest state that is read, in bytes.
pub(crate) const STATE_MAX: u64 = 64 << 20;
/// How it begins.
const MAGIC: &[u8; 12] = b"walnut-state";
const HEADER: usize = MAGIC.len() + 4;

/// All that a supervisor knows.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// Of the request for the upgrade.
    pub(crate) token: String,
    /// The program that was.
    pub(crate) from: Build,
    pub(crate) connections: ConnectionsState,
    pub(crate) front: FrontState,
    pub(crate) sandbox: SandboxState,
    pub(crate) tasks: ServiceState,
    /// Where containerd asked for the sandbox by itself.
    pub(crate) pod: Option<SandboxPod>,
    /// Processes that go their own way, and are this one's children.
    pub(crate) background: Vec<u32>,
}

/// Whom it works for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum FrontState {
    Owner(OwnerState),
    Pod(PodState),
    Bundle(BundleFront),
}

impl State {
    /// As bytes.
    pub(crate) fn pack(&self) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::from(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        serde_json::to_writer(&mut bytes, self).map_err(|e| format!("write the state: {e}"))?;
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > STATE_MAX {
            return Err(format!(
                "write the state: it is larger than {STATE_MAX} bytes"
            ));
        }
        Ok(bytes)
    }

    /// Of such bytes, or what is wrong with them.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > STATE_MAX {
            return Err(format!(
                "read the state: it is larger than {STATE_MAX} bytes"
            ));
        }
        let (header, json) = bytes.split_at_checked(HEADER).ok_or("it is no state")?;
        let (magic, format) = header.split_at(MAGIC.len());
        let format = format.try_into().map(u32::from_le_bytes);
        if magic != MAGIC {
            return Err("read the state: it is none".into());
        }
        match format {
            Ok(FORMAT) => {}
            format => {
                let format = format.unwrap_or_default();
                return Err(format!(
                    "read the state: it is of format {format}, and this program knows {FORMAT}"
                ));
            }
        }
        let state: Self =
            serde_json::from_slice(json).map_err(|e| format!("read the state: {e}"))?;
        match state.problem() {
            None => Ok(state),
            Some(problem) => Err(format!("read the state: {problem}")),
        }
    }

    /// What no state can say.
    fn problem(&self) -> Option<&'static str> {
        if !(1..=TOKEN_MAX).contains(&self.token.len()) {
            return Some("its token is too long, or there is none");
        }
        let mut connections = self.connections.all.iter();
        connections.find_map(|connection| connection.problem())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// The fuzzer's seeds: states of every front end and driver.
    fn seeds() -> Vec<Vec<u8>> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/takeover");
        let all = fs::read_dir(dir).unwrap();
        let all: Vec<_> = all
            .map(|file| fs::read(file.unwrap().path()).unwrap())
            .collect();
        assert!(all.len() >= 4);
        all
    }

    fn packed(format: u32, json: &[u8]) -> Vec<u8> {
        [MAGIC, &format.to_le_bytes()[..], json].concat()
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        for json in seeds() {
            let state = State::parse(&packed(FORMAT, &json)).unwrap();
            let again = state.pack().unwrap();
            let value = |json: &[u8]| serde_json::from_slice::<serde_json::Value>(json).unwrap();
            assert_eq!(value(&again[HEADER..]), value(&json));
        }
    }

    #[test]
    fn what_is_no_state_of_this_version_is_refused() {
        let good = seeds().remove(0);
        let text = String::from_utf8(good.clone()).unwrap();
        let changed = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            packed(FORMAT, text.replacen(from, to, 1).as_bytes())
        };
        for (bytes, says) in [
            (Vec::new(), "no state"),
            (vec![0; 100], "it is none"),
            (
                packed(FORMAT + 1, &good),
                "of format 2, and this program knows 1",
            ),
            (packed(FORMAT, b"{}"), "missing field"),
            (packed(FORMAT, &good[..good.len() - 1]), "EOF"),
            (
                changed("{\"token\"", "{\"later\":1,\"token\""),
                "unknown field `later`",
            ),
            (changed("\"streams\":", "\"streams\":-"), "invalid value"),
            (
                changed("\"pid\":", "\"more\":0,\"pid\":"),
                "unknown field `more`",
            ),
            (
                changed("\"c0ffee\"", "\"\""),
                "its token is too long, or there is none",
            ),
        ] {
            let error = State::parse(&bytes).unwrap_err();
            assert!(error.contains(says), "{says}: {error}");
        }
    }
}
