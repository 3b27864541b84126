//! `walnut reclaim`.

use anyhow::Result;
use clap::Args;
use walnut_sandbox::Layout;

use crate::{client::Supervisor, create::find_live, signal::each};

#[derive(Debug, Args)]
#[command(
    after_help = "What a guest has free goes back to the host by itself, some seconds later. This drops its page \
                  cache as well; what is needed again is read again, mostly from the host's own."
)]
pub(crate) struct ReclaimArgs {
    /// Containers, by name or ID
    #[arg(required = true)]
    containers: Vec<String>,
}

pub(crate) async fn reclaim(args: ReclaimArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    each(&args.containers, async |name| {
        let record = find_live(&layout, name)?;
        let supervisor = Supervisor::connect(&layout, &record).await?;
        supervisor.reclaim().await
    })
    .await
}
