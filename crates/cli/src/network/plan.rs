//! Which links a new container is to have.

use anyhow::{Result, bail};
use serde_json::json;
use walnut_sandbox::{
    Attachments, Layout, NameServers, Names, NetworkLink, Settings,
    networks::{Network, Networks, Resolver, check_programs},
};

use super::NetworkArgs;

/// The word for no network.
const NONE: &str = "none";

/// What the options of a container ask for: nothing, if it is on no network.
pub(crate) async fn plan(
    layout: &Layout,
    args: &NetworkArgs,
    settings: &Settings,
) -> Result<Option<Attachments>> {
    let names = chosen(args, settings)?;
    if names.is_empty() {
        if let Some(option) = args.needs_network() {
            bail!("{option}: the container is on no network; leave it out, or name a --network");
        }
        return Ok(None);
    }
    needs_root(&format!("put the container on the network {}", names[0]))?;
    let networks = Networks::new(&layout.networks());
    let plugins = &settings.network.plugins;
    let mut links = Vec::new();
    for (number, name) in names.iter().enumerate() {
        let network = networks.find_or_make(name).await?;
        check_programs(&network.list, plugins)?;
        if network.dns {
            Resolver::check()?;
        }
        let mut link = NetworkLink::new(&network, &format!("eth{number}"));
        if number == 0 {
            first(&mut link, &network, args)?;
        }
        links.push(link);
    }
    Ok(Some(Attachments {
        version: 1,
        plugins: plugins.clone(),
        links,
        ports: args.publish.iter().flat_map(|p| p.0.clone()).collect(),
        names: Names {
            hosts: args.add_host.iter().map(|h| h.0.clone()).collect(),
            servers: NameServers {
                servers: args.dns.clone(),
                search: args.dns_search.clone(),
                options: args.dns_option.clone(),
            },
            ..Names::default()
        },
    }))
}

/// The networks that are asked for, by their names.
fn chosen<'a>(args: &'a NetworkArgs, settings: &'a Settings) -> Result<Vec<&'a str>> {
    let default = settings.network.default.as_str();
    let mut names = Vec::new();
    for word in &args.network {
        let name = match word.as_str() {
            NONE if args.network.len() > 1 => {
                bail!("--network none: it excludes every other network")
            }
            "host" => bail!(
                "--network host: the container has a kernel of its own, and none of the host's network in it; publish its ports with -p, and reach the host as host-gateway (--add-host NAME:host-gateway)"
            ),
            word => word,
        };
        if names.contains(&name) {
            bail!("--network {name}: it is given twice");
        }
        names.push(name);
    }
    if names.is_empty() {
        names.push(default);
    }
    names.retain(|name| *name != NONE);
    Ok(names)
}

/// What the options say of the first link.
fn first(link: &mut NetworkLink, network: &Network, args: &NetworkArgs) -> Result<()> {
    let name = &network.name;
    if network.internal && !args.publish.is_empty() {
        bail!("--publish: the network {name} is internal, and nothing comes to it from outside");
    }
    let capable = |capability: &str| {
        let mut plugins = network.list.plugins();
        plugins.any(|plugin| {
            let capabilities = plugin.get("capabilities");
            capabilities.and_then(|all| all.get(capability)) == Some(&json!(true))
        })
    };
    for (capability, option, asked) in [
        ("portMappings", "--publish", !args.publish.is_empty()),
        ("ips", "--ip", !args.ip.is_empty()),
        ("mac", "--mac-address", args.mac_address.is_some()),
    ] {
        if asked && !capable(capability) {
            bail!("{option}: no plugin of the network {name} has the capability {capability}");
        }
    }
    for ip in &args.ip {
        let known: Vec<_> = network.subnets.iter().map(|range| range.subnet).collect();
        if !known.is_empty() && !known.iter().any(|subnet| subnet.contains(ip)) {
            let known: Vec<_> = known.iter().map(ToString::to_string).collect();
            bail!(
                "--ip {ip}: it is not an address of the network {name}, {}",
                known.join(", ")
            );
        }
    }
    if !args.ip.is_empty() {
        link.capabilities.insert("ips".into(), json!(args.ip));
    }
    if let Some(mac) = &args.mac_address {
        link.capabilities.insert("mac".into(), json!(mac.0));
    }
    Ok(())
}

/// Refuses who cannot make namespaces, bridges and rules.
pub(super) fn needs_root(attempt: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "{attempt}: that needs root; use --network none, or say so for good: default = \"none\" below [network] in ~/.config/walnut/config.toml"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_chosen_by_name_and_by_the_settings() {
        let mut settings = Settings::default();
        let got = |networks: &[&str], settings: &Settings| {
            let args = NetworkArgs {
                network: networks.iter().map(ToString::to_string).collect(),
                ..NetworkArgs::default()
            };
            let names = chosen(&args, settings).map(|names| names.join(" "));
            names.map_err(|e| e.to_string())
        };
        assert_eq!(got(&[], &settings).unwrap(), "bridge");
        assert_eq!(got(&["none"], &settings).unwrap(), "");
        assert_eq!(got(&["b", "a"], &settings).unwrap(), "b a");
        settings.network.default = "none".into();
        assert_eq!(got(&[], &settings).unwrap(), "");
        assert_eq!(got(&["bridge"], &settings).unwrap(), "bridge");
        for (networks, why) in [
            (&["host"][..], "a kernel of its own"),
            (&["a", "none"], "excludes"),
            (&["a", "a"], "twice"),
        ] {
            let said = got(networks, &settings).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }
}
