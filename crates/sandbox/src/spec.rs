//! Reads configurations of the OCI runtime-spec as other runtimes do: a capability that is
//! not known is left out, and no error. Whoever writes them knows of newer kernels.

use oci_spec::runtime::{Capability, Spec};
use serde::Deserialize as _;
use serde_json::Value;
use tracing::warn;

const SETS: [&str; 5] = [
    "bounding",
    "effective",
    "permitted",
    "inheritable",
    "ambient",
];

/// Parses a `config.json`.
pub fn parse_spec(json: &[u8]) -> serde_json::Result<Spec> {
    serde_json::from_slice(json).or_else(|error| {
        // Rare, and so the usual configuration is not read twice.
        let mut value: Value = serde_json::from_slice(json)?;
        let process = value.get_mut("process");
        match process.is_some_and(leave_out_unknown) {
            true => serde_json::from_value(value),
            false => Err(error),
        }
    })
}

/// The `process` of an exec without what nobody knows.
pub(crate) fn known_process(json: Vec<u8>) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<Value>(&json) else {
        return json;
    };
    match leave_out_unknown(&mut value) {
        true => value.to_string().into_bytes(),
        false => json,
    }
}

/// Removes names of a `process` that are no capability's; whether there were any.
fn leave_out_unknown(process: &mut Value) -> bool {
    let mut unknown = Vec::new();
    for set in SETS {
        let names = process.pointer_mut(&format!("/capabilities/{set}"));
        if let Some(Value::Array(names)) = names {
            names.retain(|name| {
                let known = !name.is_string() || Capability::deserialize(name).is_ok();
                if !known && !unknown.contains(name) {
                    unknown.push(name.clone());
                }
                known
            });
        }
    }
    let found = !unknown.is_empty();
    if found {
        let unknown = Value::Array(unknown);
        warn!("unknown capabilities are left out: {unknown}");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(bounding: &Value) -> Vec<u8> {
        let config = json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0},
                "capabilities": {"bounding": bounding}},
        });
        config.to_string().into_bytes()
    }

    #[test]
    fn unknown_capabilities_are_left_out() {
        let known = parse_spec(&config(&json!(["CAP_CHOWN"]))).unwrap();
        let spec = parse_spec(&config(&json!(["CAP_CHOWN", "CAP_NONSENSE"]))).unwrap();
        assert_eq!(spec, known);
        // What is wrong otherwise is an error as before.
        assert!(parse_spec(&config(&json!([5, "CAP_NONSENSE"]))).is_err());
        assert!(parse_spec(br#"{"process": 5}"#).is_err());
        assert!(parse_spec(b"{").is_err());
    }

    #[test]
    fn of_execs_too() {
        let process = br#"{"capabilities":{"bounding":["CAP_X","CAP_KILL"]}}"#;
        let known = known_process(process.to_vec());
        assert_eq!(known, br#"{"capabilities":{"bounding":["CAP_KILL"]}}"#);
        for same in [&b"{"[..], br#"{ "capabilities": {"bounding": ["KILL"]} }"#] {
            assert_eq!(known_process(same.to_vec()), same);
        }
    }
}
