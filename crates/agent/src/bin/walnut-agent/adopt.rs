//! What the agent does around the saving of its machine, and in the clone.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use walnut_agent::names::below_guest_root;
use walnut_protocol::agent::{AdoptContainerRequest, GuestFile};

use crate::container::Container;
use crate::gate::Gate;
use crate::system;
use crate::table::Table;

/// How long what processes have written may take to leave for the host, and between two
/// looks whether it has.
const LEAVES_WITHIN: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(2);
/// How long a pump may be under way, unless it waits for the host to read.
const RESTS_WITHIN: Duration = Duration::from_millis(200);
/// Largest file, in bytes; most files.
const SIZE_MAX: usize = 1 << 20;
const COUNT_MAX: usize = 64;

/// Lets output leave and shuts the gate. Processes that write are paused, else this has
/// no end but the deadline.
pub(crate) async fn hold(table: &Table, gate: &Gate) {
    let deadline = Instant::now() + LEAVES_WITHIN;
    let unread = || {
        let containers = table.all();
        let mut processes = containers.iter().flat_map(|c| c.processes());
        processes.any(|process| process.has_unread())
    };
    while (gate.is_busy() || unread()) && Instant::now() < deadline {
        sleep(LOOK).await;
    }
    gate.shut(RESTS_WITHIN).await;
}

/// Gives a container the name that it has in this machine.
pub(crate) fn rename(
    container: &Container,
    first: u32,
    request: &AdoptContainerRequest,
) -> io::Result<()> {
    if request.files.len() > COUNT_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} files: at most {COUNT_MAX} are taken",
                request.files.len()
            ),
        ));
    }
    for file in &request.files {
        rewrite(container, file)?;
    }
    match request.hostname.as_str() {
        "" => Ok(()),
        name => system::set_hostname_of(first, name),
    }
}

/// Writes over a file that is there, which may be bound elsewhere.
fn rewrite(container: &Container, file: &GuestFile) -> io::Result<()> {
    let refused = |why: &str| {
        let text = format!("file {:?}: {why}", file.path);
        io::Error::new(io::ErrorKind::InvalidInput, text)
    };
    below_guest_root(&file.path).map_err(|e| refused(&e.to_string()))?;
    if !std::path::Path::new(&file.path).starts_with(container.paths.bundle()) {
        return Err(refused("not in the container's own folder"));
    }
    if file.data.len() > SIZE_MAX {
        return Err(refused("larger than 1 MiB"));
    }
    let mut out = OpenOptions::new()
        .write(true)
        .truncate(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&file.path)?;
    out.write_all(&file.data)
}
