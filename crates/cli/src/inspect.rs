//! `walnut inspect`: all that is known of a thing, with the names that Docker has for it.

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::{Map, Value, json};
use walnut_image::{Image, Store};
use walnut_sandbox::{
    Attachments, Error, Layout, NamedVolumes, Record, Status, VolumeRecord, find,
    networks::Networks, similar,
};

use crate::{format::Template, images, output};

/// Kinds of things, in the order in which a name is looked for among them.
const KINDS: [&str; 4] = ["container", "image", "volume", "network"];

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut inspect web
  walnut inspect --format '{{.State.Status}} {{.State.ExitCode}}' web
  walnut inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' web
  walnut inspect --format '{{json .Mounts}}' web
  walnut inspect --type image debian

Names of fields are Docker's; what is Walnut's own is in .Walnut.")]
pub(crate) struct InspectArgs {
    /// Show it by a Go template
    #[arg(short, long, value_name = "TEMPLATE")]
    pub(crate) format: Option<Template>,
    /// What it is [default: a container, an image, a volume or a network, the first that has
    /// the name]
    #[arg(long, value_name = "KIND", value_parser = KINDS)]
    pub(crate) r#type: Option<String>,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
}

pub(crate) fn inspect(args: &InspectArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let kinds: Vec<&str> = match &args.r#type {
        Some(kind) => vec![kind],
        None => KINDS.to_vec(),
    };
    let each = args.names.iter().map(|name| one(&layout, &kinds, name));
    show(each, args.format.as_ref())
}

/// Shows what is there of several, and says what is not; the exit code.
pub(crate) fn show(
    values: impl Iterator<Item = Result<Value>>,
    format: Option<&Template>,
) -> Result<u8> {
    let (mut found, mut code) = (Vec::new(), 0);
    for value in values {
        let shown = value.and_then(|value| match format {
            None => {
                found.push(value);
                Ok(())
            }
            Some(template) => {
                println!("{}", template.of(&value)?);
                Ok(())
            }
        });
        if let Err(e) = shown {
            eprintln!("walnut: {e:#}");
            code = 1;
        }
    }
    if format.is_none() {
        output::json(&found)?;
    }
    Ok(code)
}

fn one(layout: &Layout, kinds: &[&str], name: &str) -> Result<Value> {
    let mut first = None;
    for kind in kinds {
        let found = match *kind {
            "container" => find(layout, name)
                .map_err(anyhow::Error::from)
                .and_then(|record| container(layout, &record)),
            "image" => {
                let store = Store::open(layout.images())?;
                images::find(&store, name).map(|image| as_image(&image))
            }
            "volume" => {
                let volumes = NamedVolumes::new(layout);
                let found = volumes.find(name).map_err(anyhow::Error::from);
                found.map(|record| volume(&volumes, &record))
            }
            _ => network(layout, name),
        };
        match found {
            Ok(value) => return Ok(value),
            // One that is there and cannot be read is not looked for elsewhere.
            Err(e) if matches!(e.downcast_ref(), Some(Error::Io { .. })) => return Err(e),
            Err(e) => first = first.or(Some(e)),
        }
    }
    match (kinds, first) {
        ([_], Some(e)) => Err(e),
        _ => Err(anyhow!(
            "no such container, image, volume or network: {name}{}",
            hint(layout, name)
        )),
    }
}

fn hint(layout: &Layout, name: &str) -> String {
    let all = walnut_sandbox::list(layout).unwrap_or_default();
    match similar(name, all.iter().map(|r| r.name.as_str())) {
        Some(other) => format!("; did you mean {other}?"),
        None => String::new(),
    }
}

fn network(layout: &Layout, name: &str) -> Result<Value> {
    let network = Networks::new(&layout.networks()).find(name)?;
    Ok(Value::Object(network.list.as_json().clone()))
}

/// A volume, with Docker's names.
pub(crate) fn volume(volumes: &NamedVolumes, record: &VolumeRecord) -> Value {
    json!({
        "Name": record.name,
        "Driver": "local",
        "Scope": "local",
        "Mountpoint": volumes.data(&record.name),
        "CreatedAt": output::time(record.created_at),
        "Labels": record.labels,
        "Options": {},
        "Anonymous": record.anonymous,
    })
}

fn as_image(image: &Image) -> Value {
    let names: Vec<_> = image.names.iter().map(|n| n.familiar()).collect();
    let digests = image
        .names
        .iter()
        .map(|n| format!("{}@{}", n.familiar_name(), image.digest));
    json!({
        "Id": image.id.to_string(),
        "RepoTags": names,
        "RepoDigests": digests.collect::<Vec<_>>(),
        "Created": image.created,
        "Architecture": image.config.architecture().to_string(),
        "Os": image.config.os().to_string(),
        "Author": image.config.author(),
        "Size": image.size,
        "Config": image.config.config(),
        "RootFS": { "Type": "layers", "Layers": image.config.rootfs().diff_ids() },
        "Walnut": { "RootFile": image.rootfs, "Checkpoint": image.checkpoint },
    })
}

/// The time of what has not happened, as Docker says it.
fn moment(ns: Option<i64>) -> String {
    let never = || "0001-01-01T00:00:00Z".to_owned();
    ns.map_or_else(never, |ns| {
        let time = chrono::DateTime::from_timestamp_nanos(ns);
        time.to_rfc3339_opts(chrono::SecondsFormat::Nanos, true)
    })
}

fn state(record: &Record) -> Value {
    let is = |status| record.status == status;
    let mut state = json!({
        "Status": record.status.as_str(),
        "Running": is(Status::Running) || is(Status::Paused),
        "Paused": is(Status::Paused),
        "Restarting": is(Status::Restarting),
        "OOMKilled": record.oom_killed,
        "Dead": false,
        "Pid": record.shim_pid.unwrap_or(0),
        "ExitCode": record.exit_code.unwrap_or(0),
        "Error": record.error.as_deref().unwrap_or(""),
        "StartedAt": moment(record.started_at),
        "FinishedAt": moment(record.finished_at),
    });
    if let Some(health) = &record.health {
        let log = health.checks.iter().map(|check| {
            json!({
                "Start": moment(Some(check.start)),
                "End": moment(Some(check.end)),
                "ExitCode": check.code,
                "Output": check.output,
            })
        });
        state["Health"] = json!({
            "Status": health.status.as_str(),
            "FailingStreak": health.failing,
            "Log": log.collect::<Vec<_>>(),
        });
    }
    state
}

fn container(layout: &Layout, record: &Record) -> Result<Value> {
    let dir = layout.container(&record.id);
    let path = dir.join("config.json");
    let bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let spec: Value =
        serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?;
    let Some((program, args)) = record.command.split_first() else {
        bail!("inspect {}: its record names no program", record.name);
    };
    let attachments = Attachments::load(&dir)?;
    let terms = &record.terms;
    let log = terms.log.kept.then(|| dir.join("container.log"));
    Ok(json!({
        "Id": record.id,
        "Created": moment(Some(record.created_at)),
        "Path": program,
        "Args": args,
        "State": state(record),
        "Image": record.image.id,
        "Name": format!("/{}", record.name),
        "RestartCount": record.restarts,
        "Driver": "erofs",
        "Platform": "linux",
        "LogPath": log,
        "HostConfig": host_config(record, &spec, attachments.as_ref()),
        "Mounts": mounts(record, &spec),
        "Config": config(record, &spec),
        "NetworkSettings": network_settings(attachments.as_ref()),
        "Walnut": {
            "Driver": record.driver,
            "MachineMemory": record.memory,
            "MachineCpus": record.vcpus,
            "Template": record.template,
            "Bundle": dir,
        },
    }))
}

fn host_config(record: &Record, spec: &Value, attachments: Option<&Attachments>) -> Value {
    let terms = &record.terms;
    let resources = &spec["linux"]["resources"];
    let number = |value: &Value| value.as_i64().unwrap_or(0);
    let maximum = match terms.restart {
        walnut_sandbox::RestartPolicy::OnFailure(most) => most.unwrap_or(0),
        _ => 0,
    };
    let network = attachments
        .and_then(|a| a.links.first())
        .map(|l| l.network().to_owned());
    let joins = terms.joins.as_ref().map(|id| format!("container:{id}"));
    let network = joins.or(network);
    let quota = number(&resources["cpu"]["quota"]);
    json!({
        "AutoRemove": record.auto_remove,
        "RestartPolicy": { "Name": terms.restart.name(), "MaximumRetryCount": maximum },
        "Memory": number(&resources["memory"]["limit"]),
        "MemorySwap": number(&resources["memory"]["swap"]),
        "NanoCpus": quota.saturating_mul(10_000),
        "CpusetCpus": terms.cpuset.as_deref().unwrap_or(""),
        "PidsLimit": resources["pids"]["limit"],
        "ReadonlyRootfs": spec["root"]["readonly"],
        "Privileged": false,
        "NetworkMode": network.unwrap_or_else(|| "none".into()),
        "PortBindings": ports(attachments),
        "LogConfig": {
            "Type": if terms.log.kept { "json-file" } else { "none" },
            "Config": { "max-size": terms.log.max_size.to_string(), "max-file": terms.log.max_file.to_string() },
        },
        "Ulimits": spec["process"]["rlimits"],
        "Sysctls": spec["linux"]["sysctl"],
        "Runtime": "walnut",
        "Isolation": "vm",
    })
}

/// Ports of the container's, and those of the host's that lead to them.
fn ports(attachments: Option<&Attachments>) -> Map<String, Value> {
    let mut ports = Map::new();
    for port in attachments.iter().flat_map(|a| &a.ports) {
        let (key, binding) = binding(port);
        let list = ports.entry(key).or_insert_with(|| json!([]));
        list.as_array_mut()
            .into_iter()
            .for_each(|l| l.push(binding.clone()));
    }
    ports
}

fn binding(port: &walnut_sandbox::PublishedPort) -> (String, Value) {
    let protocol = match port.protocol {
        walnut_sandbox::Transport::Tcp => "tcp",
        walnut_sandbox::Transport::Udp => "udp",
    };
    let ip = port.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
    let binding = json!({ "HostIp": ip, "HostPort": port.host_port.to_string() });
    (format!("{}/{protocol}", port.container_port), binding)
}

fn mounts(record: &Record, spec: &Value) -> Vec<Value> {
    let all = spec["mounts"].as_array().into_iter().flatten();
    let shown = all.filter_map(|mount| {
        let options = mount["options"].as_array().into_iter().flatten();
        let read_only = options.clone().any(|o| o == "ro");
        let target = mount["destination"].as_str()?;
        let named = record
            .terms
            .volumes
            .iter()
            .find(|v| v.target.as_os_str() == target);
        let kind = match (mount["type"].as_str()?, named) {
            ("bind", Some(_)) => "volume",
            ("bind", None) => "bind",
            // What every container has is no mount of anybody's.
            ("tmpfs", _) if !target.starts_with("/dev") => "tmpfs",
            _ => return None,
        };
        let mut shown = json!({
            "Type": kind,
            "Source": if kind == "tmpfs" { json!("") } else { mount["source"].clone() },
            "Destination": target,
            "Mode": if read_only { "ro" } else { "" },
            "RW": !read_only,
            "Propagation": if kind == "bind" { "rprivate" } else { "" },
        });
        if let Some(volume) = named {
            shown["Name"] = json!(volume.name);
            shown["Driver"] = json!("local");
        }
        Some(shown)
    });
    shown.collect()
}

fn config(record: &Record, spec: &Value) -> Value {
    let terms = &record.terms;
    let process = &spec["process"];
    let health = terms.health.as_ref().map(|check| {
        let ns = |ms: u64| ms.saturating_mul(1_000_000);
        let test: Vec<_> = std::iter::once("CMD")
            .chain(check.command.iter().map(String::as_str))
            .collect();
        json!({
            "Test": test, "Interval": ns(check.interval_ms), "Timeout": ns(check.timeout_ms),
            "StartPeriod": ns(check.start_period_ms), "Retries": check.retries,
        })
    });
    json!({
        "Hostname": spec["hostname"],
        "User": process["user"]["username"].as_str().unwrap_or(""),
        "Tty": record.terminal,
        "OpenStdin": terms.stdin,
        "Env": process["env"],
        "Cmd": record.command,
        "Image": record.image.name,
        "WorkingDir": process["cwd"],
        "Labels": terms.labels,
        "StopSignal": record.stop_signal.unwrap_or(15).to_string(),
        "StopTimeout": terms.stop_timeout,
        "Healthcheck": health,
    })
}

fn network_settings(attachments: Option<&Attachments>) -> Value {
    let mut networks = Map::new();
    let mut first = json!({});
    for link in attachments.iter().flat_map(|a| &a.links) {
        let made = link.made();
        let addresses = made.addresses().collect::<Vec<_>>();
        let of = |v4: bool| addresses.iter().find(|(ip, _)| ip.is_ipv4() == v4);
        let ip = |v4| of(v4).map(|(ip, _)| ip.to_string()).unwrap_or_default();
        let prefix = |v4| of(v4).map_or(0, |(_, prefix)| *prefix);
        let shown = json!({
            "IPAddress": ip(true),
            "IPPrefixLen": prefix(true),
            "GlobalIPv6Address": ip(false),
            "GlobalIPv6PrefixLen": prefix(false),
        });
        if networks.is_empty() {
            first = shown.clone();
        }
        networks.insert(link.network().to_owned(), shown);
    }
    let text = |name: &str| first[name].as_str().unwrap_or("").to_owned();
    json!({
        "IPAddress": text("IPAddress"),
        "IPPrefixLen": first["IPPrefixLen"].as_u64().unwrap_or(0),
        "GlobalIPv6Address": text("GlobalIPv6Address"),
        "Ports": ports(attachments),
        "Networks": networks,
    })
}
