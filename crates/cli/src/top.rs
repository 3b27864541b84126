//! `walnut top` and `walnut port`.

use anyhow::{Result, bail};
use clap::Args;
use containerd_shim_protos::protobuf::Message;
use walnut_sandbox::{Attachments, GuestProcess, Layout, Transport, find};

use crate::{client::Supervisor, create::find_live, list::cut, output};

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Container, by name or ID
    pub(crate) container: String,
    /// Options of ps are not taken: the processes are the container's kernel's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(crate) ps_options: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut port web
  walnut port web 80/tcp")]
pub(crate) struct PortArgs {
    /// Container, by name or ID
    pub(crate) container: String,
    /// A port of the container's alone, as 80 or 53/udp
    pub(crate) port: Option<String>,
}

pub(crate) async fn top(args: TopArgs) -> Result<u8> {
    if !args.ps_options.is_empty() {
        bail!(
            "top {}: no ps of the host sees its processes, so that options of ps mean nothing; leave them out, or use `walnut exec {0} ps …`",
            args.container
        );
    }
    let layout = Layout::from_env()?;
    let record = find_live(&layout, &args.container)?;
    let supervisor = Supervisor::connect(&layout, &record).await?;
    let rows: Vec<_> = supervisor
        .processes()
        .await?
        .iter()
        .map(|process| {
            let info = process.info.as_ref();
            let known = info.and_then(|info| GuestProcess::parse_from_bytes(&info.value).ok());
            let known = known.unwrap_or_default();
            [
                known.uid.to_string(),
                process.pid.to_string(),
                known.ppid.to_string(),
                known.state.to_string(),
                time(known.cpu_ms),
                output::binary(known.resident),
                cut(&known.command, 200),
            ]
        })
        .collect();
    output::table(
        ["UID", "PID", "PPID", "STAT", "TIME", "RSS", "COMMAND"],
        &rows,
    )?;
    Ok(0)
}

/// Processor time as ps shows it.
fn time(ms: u64) -> String {
    let seconds = ms / 1000;
    format!(
        "{:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

pub(crate) fn port(args: &PortArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let record = find(&layout, &args.container)?;
    let attachments = Attachments::load(&layout.container(&record.id))?;
    let ports = attachments.map(|a| a.ports).unwrap_or_default();
    let mut found = false;
    for port in &ports {
        let protocol = match port.protocol {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        let name = format!("{}/{protocol}", port.container_port);
        let ip = port
            .host_ip
            .map_or("0.0.0.0".into(), |ip| match ip.is_ipv6() {
                true => format!("[{ip}]"),
                false => ip.to_string(),
            });
        let at = format!("{ip}:{}", port.host_port);
        match &args.port {
            None => println!("{name} -> {at}"),
            Some(wanted) if *wanted == name || format!("{wanted}/tcp") == name => {
                found = true;
                println!("{at}");
            }
            Some(_) => {}
        }
    }
    if let Some(wanted) = args.port.as_ref().filter(|_| !found) {
        bail!("port {}: no port {wanted} of its is published", record.name);
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn times() {
        assert_eq!(super::time(3_661_999), "01:01:01");
    }
}
