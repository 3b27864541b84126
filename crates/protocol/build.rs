//! Generates the messages, clients and servers of `proto/`.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    let protos = ["../../proto/agent.proto", "../../proto/supervisor.proto"];
    for proto in protos {
        println!("cargo:rerun-if-changed={proto}");
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .inputs(protos)
        .include("../../proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().lite_runtime(true))
        .run()?;
    // `include!` takes no inner attributes; lib.rs sets them from outside.
    for file in [
        "agent.rs",
        "agent_ttrpc.rs",
        "supervisor.rs",
        "supervisor_ttrpc.rs",
    ] {
        let path = out.join(file);
        let code: String = fs::read_to_string(&path)?
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(path, code)?;
    }
    Ok(())
}
