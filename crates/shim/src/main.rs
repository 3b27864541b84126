//! `containerd-shim-walnut-v2`, see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    walnut_shim::main()
}
