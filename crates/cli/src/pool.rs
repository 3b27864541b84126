//! `walnut pool`.

use std::process::Stdio;

use anyhow::{Context, Result, bail};
use walnut_sandbox::{Assets, Layout, Pools};

use crate::{
    args::{Format, PoolCommand, PoolLsArgs, PoolSetArgs},
    output, supervisor, template,
};

pub(crate) fn pool(command: PoolCommand) -> Result<u8> {
    let layout = Layout::from_env()?;
    let pools = Pools::new(&layout.state, &layout.run);
    match command {
        PoolCommand::Ls(args) => ls(&pools, &args)?,
        PoolCommand::Set(args) => set(&layout, &pools, &args)?,
    }
    Ok(0)
}

fn ls(pools: &Pools, args: &PoolLsArgs) -> Result<()> {
    let all = pools.list()?;
    if args.format == Format::Json {
        return Ok(output::json(&all)?);
    }
    let rows: Vec<_> = all
        .iter()
        .map(|pool| {
            [
                pool.size.driver.as_str().to_owned(),
                output::bytes(pool.size.memory),
                pool.size.vcpus.to_string(),
                pool.size.size.to_string(),
                pool.ready().to_string(),
                (pool.members.len() - pool.ready()).to_string(),
            ]
        })
        .collect();
    let head = ["DRIVER", "MEMORY", "VCPUS", "WANTED", "READY", "STARTING"];
    Ok(output::table(head, &rows)?)
}

fn set(layout: &Layout, pools: &Pools, args: &PoolSetArgs) -> Result<()> {
    pools.set(&template::wanted(&args.machine)?, args.size)?;
    let assets = Assets::find()?;
    loop {
        let mut fill = supervisor::command(&assets);
        fill.arg("fill-pools")
            .arg("--state-dir")
            .arg(&layout.state)
            .arg("--run-dir")
            .arg(&layout.run);
        if args.detach {
            fill.stderr(Stdio::null());
            supervisor::session(&mut fill);
            fill.spawn().context("start the filling of the pools")?;
            return Ok(());
        }
        let done = fill.output().context("fill the pools")?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            let said = said.trim();
            let why = said.rsplit_once("ERROR ").map_or(said, |(_, why)| why);
            bail!("{}", why.split_once(": ").map_or(why, |(_, why)| why));
        }
        // It leaves the work to one that is at it already.
        pools.wait_for_filler()?;
        let full = pools
            .list()?
            .iter()
            .all(|pool| u32::try_from(pool.ready()).is_ok_and(|n| n >= pool.size.size));
        if full {
            return Ok(());
        }
    }
}
