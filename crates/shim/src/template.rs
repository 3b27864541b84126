//! Templates: where they lie, and the process that makes one while its first user runs.

use anyhow::{Context, Result};
use walnut_sandbox::{Assets, BOOT_TIMEOUT, Settings, Templates, Wanted};

use crate::{background, front::Place, options::MakeTemplate};

/// The templates to start from.
pub(crate) fn store(place: Place<'_>) -> Option<Templates> {
    let (state, run) = place.node?;
    Some(Templates::new(state, run))
}

/// Starts a process that makes a template. It goes its own way: this sandbox may end
/// before it.
pub(crate) fn make_later(place: Place<'_>, settings: &Settings, wanted: &Wanted) {
    let Some((state, run)) = place.node else {
        return;
    };
    let make = MakeTemplate {
        state_dir: state.to_owned(),
        run_dir: run.to_owned(),
        wanted: wanted.clone(),
    };
    // The sandbox's settings need not be the node's.
    let timeout = settings.machine.boot_timeout.to_string();
    let env = Some((BOOT_TIMEOUT, timeout));
    background::spawn("make a template", true, make.args(), env);
}

/// What that process does.
pub(crate) async fn make(make: MakeTemplate) -> Result<()> {
    let templates = Templates::new(&make.state_dir, &make.run_dir);
    let assets = Assets::find().context("make a template")?;
    let settings = Settings::load().context("make a template")?;
    let cache = Some(make.run_dir.clone());
    templates
        .make(&make.wanted, &assets, cache, settings.boot_timeout())
        .await
        .context("make a template")?;
    Ok(())
}
