//! What the runtime says of itself.

use containerd_shim_protos::{
    protobuf::{self, Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

/// `RuntimeInfo`, with the options that were given.
pub(crate) fn info(options: &[u8]) -> protobuf::Result<Vec<u8>> {
    let options = match options {
        [] => MessageField::none(),
        bytes => MessageField::some(Any::parse_from_bytes(bytes)?),
    };
    RuntimeInfo {
        name: "io.containerd.walnut.v2".into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        options,
        ..Default::default()
    }
    .write_to_bytes()
}
