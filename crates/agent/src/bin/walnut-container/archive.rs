//! What a process does that copies files of a container: it is in the container as any
//! other, and its root, its links and its mounts are the container's.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    os::fd::AsFd,
    path::Path,
};

use walnut_archive::{FIELD, Kind, Operation, Ownership, Rules, Stat, pack, unpack};

use crate::failure::Failure;

/// What a process is to do, if it is to execute nothing.
pub(crate) fn wanted(process: &[u8]) -> Result<Option<Operation>, Failure> {
    let process: serde_json::Value = serde_json::from_slice(process)
        .map_err(|e| Failure::invalid(format!("the process: {e}")))?;
    let Some(operation) = process.get(FIELD) else {
        return Ok(None);
    };
    serde_json::from_value(operation.clone())
        .map(Some)
        .map_err(|e| Failure::invalid(format!("process.{FIELD}: {e}")))
}

/// Does it; the exit code.
pub(crate) fn run(operation: &Operation) -> i32 {
    match done(operation) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("{e}");
            1
        }
    }
}

fn done(operation: &Operation) -> Result<(), Box<dyn std::error::Error>> {
    let path = Path::new(&operation.path);
    let at = |e: io::Error| format!("{}: {e}", operation.path);
    match operation.kind {
        Kind::Stat => {
            let stat = Stat::of(path, operation.follow).map_err(at)?;
            let mut out = io::stdout().lock();
            out.write_all(&serde_json::to_vec(&stat)?)?;
            // This process ends without a farewell.
            out.flush()?;
        }
        Kind::Pack => {
            let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
            let name = &operation.name;
            pack(path, name, operation.follow, Ownership::Kept, &mut out)?;
            out.flush()?;
        }
        Kind::Unpack => {
            let dir = File::open(path).map_err(at)?;
            if !dir.metadata().map_err(at)?.is_dir() {
                return Err(format!("{}: not a directory", operation.path).into());
            }
            let ownership = match operation.keep_owner {
                true => Ownership::Kept,
                false => Ownership::Of(0, 0),
            };
            let rules = Rules {
                within: None,
                ownership: Some(ownership),
                trusted: true,
                // All that a link can lead to is the container's.
                follow: true,
            };
            unpack(io::stdin().lock(), dir.as_fd(), &rules)?;
        }
    }
    Ok(())
}
