//! Network namespaces: hosts of a test's own.

use std::{
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use crate::client::finish;

/// A process in a network namespace of its own; ends with the test.
#[derive(Debug)]
pub struct Namespace(Child);

impl Namespace {
    /// A new one, with nothing but loopback, which is down.
    pub fn new() -> Self {
        let mut command = Command::new("sleep");
        command.arg("infinity").stdin(Stdio::null());
        // SAFETY: unshare and prctl are system calls and no more.
        unsafe {
            command.pre_exec(|| {
                if libc::unshare(libc::CLONE_NEWNET) != 0
                    || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Self(command.spawn().expect("make a network namespace"))
    }

    /// For who lives in it.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// A file that stands for it.
    pub fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    /// Runs `ip` in it.
    #[track_caller]
    pub fn ip(&self, args: &str) {
        let mut command = self.within("ip");
        command.args(args.split(' '));
        finish(&mut command, b"").exits(0);
    }

    /// A program in it.
    pub fn within(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg(program);
        command
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
