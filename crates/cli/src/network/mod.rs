//! `walnut network`, and the networks of `walnut run`.

mod args;
mod plan;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;
use walnut_sandbox::{
    Attachments, Journal, Layout, Lock, list,
    networks::{Network, Networks, NewNetwork, Resolver},
};

pub(crate) use args::{NetworkArgs, NetworkCommand, shown};
pub(crate) use plan::plan;

use crate::{
    format::{List, row},
    network::args::{NetworkCreateArgs, NetworkLsArgs},
    output,
    signal::each,
};

pub(crate) async fn network(command: NetworkCommand) -> Result<u8> {
    let layout = Layout::from_env()?;
    let networks = Networks::new(&layout.networks());
    match command {
        NetworkCommand::Ls(args) => ls(&layout, &networks, &args)?,
        NetworkCommand::Create(args) => {
            let name = args.name.clone();
            create(&networks, args).await?;
            Journal::new(&layout.state).other("network", &name, "create");
        }
        NetworkCommand::Rm(args) => {
            return each(&args.networks, async |name| {
                // No container is made meanwhile.
                let _names = Lock::take(&layout.state.join("names.lock"))?;
                let users: Vec<_> = members(&layout, name)?
                    .into_iter()
                    .map(|m| m.name)
                    .collect();
                networks.remove(name, &users).await?;
                Journal::new(&layout.state).other("network", name, "destroy");
                Ok(())
            })
            .await;
        }
        NetworkCommand::Inspect(args) => {
            let mut found = Vec::new();
            for name in &args.networks {
                let network = networks.find(name)?;
                found.push(Shown {
                    containers: members(&layout, name)?,
                    list: network.list.as_json().clone(),
                    network,
                });
            }
            output::json(&found)?;
        }
    }
    Ok(0)
}

/// A network with who is on it.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    network: Network,
    containers: Vec<Member>,
    list: serde_json::Map<String, serde_json::Value>,
}

/// A container on a network.
#[derive(Serialize)]
struct Member {
    id: String,
    name: String,
    interface: String,
    mac: Option<String>,
    addresses: Vec<String>,
}

/// Containers that are on a network, or about to be.
fn members(layout: &Layout, network: &str) -> Result<Vec<Member>> {
    let mut members = Vec::new();
    for record in list(layout)? {
        let Ok(Some(attachments)) = Attachments::load(&layout.container(&record.id)) else {
            continue;
        };
        for link in attachments.links.iter().filter(|l| l.network() == network) {
            let made = link.made();
            members.push(Member {
                id: record.id.clone(),
                name: record.name.clone(),
                interface: link.interface.clone(),
                mac: made.mac(&link.interface).map(str::to_owned),
                addresses: made.ips.into_iter().map(|ip| ip.address).collect(),
            });
        }
    }
    Ok(members)
}

fn ls(layout: &Layout, networks: &Networks, args: &NetworkLsArgs) -> Result<()> {
    let all = networks.list()?;
    if args.quiet {
        for network in &all {
            println!("{}", network.name);
        }
        return Ok(());
    }
    let mut rows = Vec::new();
    for network in &all {
        let subnets = network.subnets.iter().map(|r| r.subnet.to_string());
        rows.push(row(json!({
            "Name": network.name,
            "Driver": network.driver,
            "Subnets": subnets.collect::<Vec<_>>().join(", "),
            "Internal": network.internal,
            "Containers": members(layout, &network.name)?.len(),
            "Bridge": network.bridge.as_deref().unwrap_or("-"),
        })));
    }
    let json = || Ok(serde_json::to_value(&all)?);
    LIST.show(&args.format, &rows, json)
}

/// What `network ls` shows; Docker's names where Docker has them.
const LIST: List<'_> = List {
    fields: &[
        ("Name", "NETWORK"),
        ("Driver", "DRIVER"),
        ("Subnets", "SUBNETS"),
        ("Internal", "INTERNAL"),
        ("Containers", "CONTAINERS"),
        ("Bridge", "BRIDGE"),
    ],
    columns: &[
        "Name",
        "Driver",
        "Subnets",
        "Internal",
        "Containers",
        "Bridge",
    ],
};

async fn create(networks: &Networks, args: NetworkCreateArgs) -> Result<()> {
    plan::needs_root("create a network")?;
    let new = NewNetwork {
        name: args.name,
        subnets: args.subnet,
        gateways: args.gateway,
        ipv6: args.ipv6,
        internal: args.internal,
        mtu: args.mtu,
        dns: !args.disable_dns,
    };
    if new.dns {
        Resolver::check()?;
    }
    let network = networks.create(&new).await?;
    println!("{}", network.name);
    Ok(())
}
