//! The program of the container that a pool's machine builds before anybody asks for one.
//!
//! It does what the first moments of most programs are made of, so that the guest has
//! done all of it once: its kernel has the memory for it, and an emulated processor the
//! translation. It needs nothing but `/proc`, and says so if it went well.

use std::{
    fs,
    io::{self, Read, Write},
    process::{Command, ExitCode, Stdio},
    thread,
};

/// What the child is told, so that it has none of its own.
const CHILD: &str = "child";
const GREETING: &[u8] = b"rehearsed\n";

fn main() -> ExitCode {
    let done = match std::env::args().nth(1).as_deref() {
        Some(CHILD) => echo(),
        _ => rehearse(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("walnut-rehearsal: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Passes its input on.
fn echo() -> io::Result<()> {
    io::copy(&mut io::stdin(), &mut io::stdout()).map(drop)
}

/// What a shell does with a pipeline, and a server when it starts.
fn rehearse() -> io::Result<()> {
    let mut child = Command::new("/proc/self/exe")
        .arg(CHILD)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(mut to) = child.stdin.take() {
        to.write_all(GREETING)?;
    }
    let mut answer = Vec::new();
    if let Some(mut from) = child.stdout.take() {
        from.read_to_end(&mut answer)?;
    }
    if !child.wait()?.success() || answer != GREETING {
        return Err(io::Error::other("the child did not answer"));
    }
    let file = "/tmp/walnut-rehearsal";
    let _ = fs::create_dir("/tmp");
    fs::write(file, &answer)?;
    let read = thread::spawn(move || fs::read(file));
    let read = read
        .join()
        .map_err(|_| io::Error::other("the thread failed"))??;
    for entry in fs::read_dir("/proc/self")? {
        entry?;
    }
    io::stdout().write_all(&read)
}
