//! The supervisor's program, as it is started from here.

use std::{
    io,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use walnut_sandbox::Assets;

/// The program with the part of the environment that is for it.
pub(crate) fn command(assets: &Assets) -> Command {
    let mut command = Command::new(assets.shim());
    command
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| {
            let name = name.to_string_lossy();
            name == "PATH" || name.starts_with("WALNUT_")
        }))
        .env("WALNUT_LIB", &assets.dir)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// In a session of its own: ^C is for the command in front.
pub(crate) fn session(command: &mut Command) {
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
}
