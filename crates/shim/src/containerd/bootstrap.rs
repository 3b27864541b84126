//! What containerd and a shim say to each other when one starts the other. It
//! has been said in three ways so far:
//!
//! - containerd 1.6 reads an address, and nothing else;
//! - 1.7 to 2.2 say in `MAX_SHIM_VERSION` which Task API they speak at most, and read
//!   JSON that says which it shall be. They all say 2, also those that speak 3, which
//!   they do when their configuration says so
//!   (`env` of `io.containerd.shim.v1.manager`);
//! - 2.3 and later write `BootstrapParams` to the standard input, where the others
//!   write the runtime's options, and read a `BootstrapResult`.

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult, Extension},
    protobuf::{self, Message},
};

/// The newest Task API that is served.
const NEWEST: i32 = 3;
/// What containerd speaks that does not say more.
const OLDEST: i32 = 2;

/// How the answer is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// The address alone.
    Plain,
    /// JSON, with the version of the Task API.
    Json(i32),
    /// Protobuf.
    Protobuf,
}

/// What containerd asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bootstrap {
    pub(crate) dialect: Dialect,
    /// Where events go.
    pub(crate) ttrpc_address: Option<String>,
    /// The runtime's options, an encoded `Any`; empty if there are none.
    pub(crate) options: Vec<u8>,
}

impl Bootstrap {
    /// From the standard input, the command line's names and the environment.
    pub(crate) fn read(
        input: &[u8],
        (id, namespace): (&str, &str),
        env: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let ttrpc_address = env("TTRPC_ADDRESS").filter(|address| !address.is_empty());
        // Options may happen to read as parameters: both have strings in the same fields.
        if let Ok(params) = BootstrapParams::parse_from_bytes(input)
            && params.instance_id == id
            && params.namespace == namespace
        {
            let told = params.containerd_ttrpc_address;
            return Self {
                dialect: Dialect::Protobuf,
                ttrpc_address: (!told.is_empty()).then_some(told).or(ttrpc_address),
                options: extension(&params.extensions),
            };
        }
        let dialect = match env("MAX_SHIM_VERSION") {
            None => Dialect::Plain,
            Some(most) => Dialect::Json(
                most.parse()
                    .map_or(OLDEST, |n: i32| n.clamp(OLDEST, NEWEST)),
            ),
        };
        Self {
            dialect,
            ttrpc_address,
            options: input.into(),
        }
    }
}

/// The extension that is a runtime's options.
fn extension(all: &[Extension]) -> Vec<u8> {
    let mut options = all.iter().filter_map(|one| one.value.as_ref());
    let found = options.find(|any| any.type_url.ends_with("v1.Options"));
    found
        .and_then(|any| any.write_to_bytes().ok())
        .unwrap_or_default()
}

impl Dialect {
    /// The answer: a supervisor listens at `address`.
    pub(crate) fn answer(&self, address: &str) -> protobuf::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(address.into()),
            Self::Json(version) => {
                let reply = serde_json::json!({
                    "version": version,
                    "address": address,
                    "protocol": "ttrpc",
                });
                Ok(reply.to_string().into_bytes())
            }
            Self::Protobuf => BootstrapResult {
                version: NEWEST,
                address: address.into(),
                protocol: "ttrpc".into(),
                ..Default::default()
            }
            .write_to_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::{MessageField, well_known_types::any::Any};

    use super::*;

    const NAMES: (&str, &str) = ("abc", "k8s.io");

    fn none(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn containerd_1_6_gets_an_address() {
        let ttrpc = |name: &str| (name == "TTRPC_ADDRESS").then(|| "/c.ttrpc".to_owned());
        let asked = Bootstrap::read(b"", NAMES, ttrpc);
        assert_eq!(asked.dialect, Dialect::Plain);
        assert_eq!(asked.ttrpc_address.as_deref(), Some("/c.ttrpc"));
        assert_eq!(asked.dialect.answer("unix:///s").unwrap(), b"unix:///s");
    }

    #[test]
    fn who_names_a_version_gets_json() {
        // Options of the runtime on the standard input are no parameters.
        let options = Any {
            type_url: "abc".into(),
            value: b"x".to_vec(),
            ..Default::default()
        };
        let options = options.write_to_bytes().unwrap();
        for (most, version) in [("2", 2), ("3", 3), ("9", 3), ("1", 2), ("x", 2)] {
            let env = |name: &str| (name == "MAX_SHIM_VERSION").then(|| most.to_owned());
            let asked = Bootstrap::read(&options, NAMES, env);
            assert_eq!(asked.dialect, Dialect::Json(version), "{most}");
            assert_eq!(asked.options, options);
        }
        let reply = Dialect::Json(2).answer("unix:///s").unwrap();
        let reply: serde_json::Value = serde_json::from_slice(&reply).unwrap();
        let want = serde_json::json!({"version":2,"address":"unix:///s","protocol":"ttrpc"});
        assert_eq!(reply, want);
    }

    #[test]
    fn who_sends_parameters_gets_protobuf() {
        let any = |kind: &str| Any {
            type_url: kind.into(),
            value: b"x".to_vec(),
            ..Default::default()
        };
        let extension = |kind: &str| Extension {
            value: MessageField::some(any(kind)),
            ..Default::default()
        };
        let options = "type.googleapis.com/runtimeoptions.v1.Options";
        let params = BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            extensions: vec![extension("other.v1.Config"), extension(options)],
            containerd_ttrpc_address: "/told".into(),
            ..Default::default()
        };
        let bytes = params.write_to_bytes().unwrap();
        let asked = Bootstrap::read(&bytes, NAMES, none);
        assert_eq!(asked.dialect, Dialect::Protobuf);
        assert_eq!(asked.ttrpc_address.as_deref(), Some("/told"));
        assert_eq!(asked.options, any(options).write_to_bytes().unwrap());
        let reply = asked.dialect.answer("unix:///s").unwrap();
        let reply = BootstrapResult::parse_from_bytes(&reply).unwrap();
        assert_eq!((reply.version, &*reply.protocol), (3, "ttrpc"));
        // Another's parameters are none.
        let other = Bootstrap::read(&bytes, ("abd", "k8s.io"), none);
        assert_eq!(other.dialect, Dialect::Plain);
    }
}
