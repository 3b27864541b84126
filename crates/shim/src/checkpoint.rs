//! What a client wants of a checkpoint.

use containerd_shim_protos::{
    protobuf::{Message, well_known_types::any::Any},
    shim::oci,
};
use serde::Deserialize;
use walnut_sandbox::{CheckpointOptions, Error, Result};

/// Options of `walnut`'s own, in JSON.
const OWN: &str = "dev.walnut.CheckpointOptions";
/// Options that containerd passes to runc's shim; all that means something here is `exit`.
const RUNC: &str = "containerd.runc.v1.CheckpointOptions";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    exit: bool,
    lasting: bool,
}

/// The options of a request. Without any, the container runs on.
pub(crate) fn options(any: Option<&Any>) -> Result<CheckpointOptions> {
    let lasting = CheckpointOptions {
        exit: false,
        lasting: true,
    };
    let Some(any) = any else {
        return Ok(lasting);
    };
    let bad = |e: &dyn std::fmt::Display| Error::Invalid(format!("options of a checkpoint: {e}"));
    match any.type_url.trim_start_matches("type.googleapis.com/") {
        OWN => {
            let Own { exit, lasting } = serde_json::from_slice(&any.value).map_err(|e| bad(&e))?;
            Ok(CheckpointOptions { exit, lasting })
        }
        RUNC => {
            let options = oci::CheckpointOptions::parse_from_bytes(&any.value);
            let exit = options.map_err(|e| bad(&e))?.exit;
            Ok(CheckpointOptions { exit, ..lasting })
        }
        other => Err(bad(&format!("of an unknown kind, {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(kind: &str, value: &[u8]) -> Any {
        Any {
            type_url: kind.into(),
            value: value.into(),
            ..Any::default()
        }
    }

    #[test]
    fn options_are_understood_or_refused() {
        let said = |exit, lasting| CheckpointOptions { exit, lasting };
        assert_eq!(options(None).unwrap(), said(false, true));
        let own = any(OWN, br#"{"exit":true,"lasting":false}"#);
        assert_eq!(options(Some(&own)).unwrap(), said(true, false));
        // Field 1, varint, 1.
        let runc = any(RUNC, &[8, 1]);
        assert_eq!(options(Some(&runc)).unwrap(), said(true, true));
        let odd: [(&str, &[u8]); 4] = [
            (OWN, b"{}"),
            (OWN, br#"{"exit":true,"lasting":false,"x":1}"#),
            (RUNC, &[0xff]),
            ("x", b""),
        ];
        for (kind, value) in odd {
            assert!(options(Some(&any(kind, value))).is_err(), "{kind}");
        }
    }
}
