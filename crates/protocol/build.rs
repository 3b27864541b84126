//! Generates the messages, client and server of `proto/agent.proto`.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    let proto = "../../proto/agent.proto";
    println!("cargo:rerun-if-changed={proto}");
    let out = PathBuf::from(env::var("OUT_DIR")?).join("agent");
    fs::create_dir_all(&out)?;
    Codegen::new()
        .out_dir(&out)
        .input(proto)
        .include("../../proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            gen_mod: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .run()?;
    Ok(())
}
