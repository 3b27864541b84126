//! Templates: where they lie, and the process that makes one while its first user runs.

use std::{path::Path, process::Stdio};

use anyhow::{Context, Result};
use tokio::process::Command;
use tracing::{debug, warn};
use walnut_sandbox::{Assets, Templates, Wanted, boot_deadline};

use crate::{options::MakeTemplate, owner::Owner};

/// Set to `off`, it makes every sandbox of this supervisor boot.
const SWITCH: &str = "WALNUT_TEMPLATES";
/// linux/close_range.h.
const CLOSE_RANGE_CLOEXEC: u32 = 4;

/// The node's state and run directories, as the container's tell.
fn dirs(owner: &Owner) -> Option<(&Path, &Path)> {
    let state = owner.container_dir.parent()?.parent()?;
    Some((state, owner.run_dir.parent()?))
}

/// The templates to start from, unless that is switched off.
pub(crate) fn store(owner: &Owner) -> Option<Templates> {
    if std::env::var_os(SWITCH).is_some_and(|value| value == "off") {
        return None;
    }
    let (state, run) = dirs(owner)?;
    Some(Templates::new(state, run))
}

/// Starts a process that makes a template. It goes its own way: this sandbox may end
/// before it.
pub(crate) fn make_later(owner: &Owner, wanted: &Wanted) {
    let Some((state, run)) = dirs(owner) else {
        return;
    };
    let make = MakeTemplate {
        state_dir: state.to_owned(),
        run_dir: run.to_owned(),
        wanted: wanted.clone(),
    };
    let mut command = Command::new("/proc/self/exe");
    command
        .args(make.args())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: between fork and exec only async-signal-safe calls are made.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            // Others are waiting for their containers; nobody waits for this.
            libc::nice(10);
            // What this sandbox holds (locks, its image) it shall not hold as well.
            match libc::syscall(libc::SYS_close_range, 3, u32::MAX, CLOSE_RANGE_CLOEXEC) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    match command.spawn() {
        // The runtime reaps it; after this process, init does.
        Ok(child) => debug!(pid = child.id(), "a template is being made"),
        Err(e) => warn!("start the making of a template: {e}"),
    }
}

/// What that process does.
pub(crate) async fn make(make: MakeTemplate) -> Result<()> {
    let templates = Templates::new(&make.state_dir, &make.run_dir);
    let assets = Assets::find().context("make a template")?;
    let deadline = boot_deadline()?;
    let cache = Some(make.run_dir.clone());
    templates
        .make(&make.wanted, &assets, cache, deadline)
        .await
        .context("make a template")?;
    Ok(())
}
