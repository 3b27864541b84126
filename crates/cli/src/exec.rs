//! `walnut exec`.

use std::{future::ready, io::IsTerminal};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::{
    api::ExecProcessRequest,
    protobuf::{MessageField, well_known_types::any::Any},
};
use serde_json::{Value, json};
use walnut_sandbox::{Error, Layout, Record, Status};

use crate::{
    args::ExecArgs,
    client::Supervisor,
    create::find_live,
    io::Fifos,
    run::{Signals, attend, resize},
    spec,
    terminal::Raw,
};

pub(crate) async fn exec(args: ExecArgs) -> Result<u8> {
    if args.tty && args.interactive && !std::io::stdin().is_terminal() {
        bail!("the input is not a terminal; leave -t out, or use -i alone");
    }
    let layout = Layout::from_env()?;
    let record = find_live(&layout, &args.container)?;
    if record.status == Status::Paused {
        bail!(Error::WrongState(format!(
            "container {} is paused; unpause it first",
            record.name
        )));
    }
    let supervisor = Supervisor::connect(&layout, &record).await?;
    let mut id = [0; 8];
    getrandom::fill(&mut id).context("make an ID")?;
    let exec_id: String = id.iter().map(|b| format!("{b:02x}")).collect();
    let dir = layout.sandbox(&record.id).join(&exec_id);
    let result = in_container(&layout, &args, &record, &supervisor, &exec_id, &dir).await;
    // Gone already when the sandbox is.
    let _ = std::fs::remove_dir_all(&dir);
    result
}

async fn in_container(
    layout: &Layout,
    args: &ExecArgs,
    record: &Record,
    supervisor: &Supervisor,
    exec_id: &str,
    dir: &std::path::Path,
) -> Result<u8> {
    let process = process(layout, args, record)?;
    let fifos = match args.detach {
        true => None,
        false => Some(Fifos::create(dir, args.interactive, args.tty)?),
    };
    let path = |name: &str| fifos.as_ref().map(|f| f.path(name)).unwrap_or_default();
    let request = ExecProcessRequest {
        id: record.id.clone(),
        exec_id: exec_id.into(),
        terminal: args.tty,
        stdin: path("stdin"),
        stdout: path("stdout"),
        stderr: path("stderr"),
        spec: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: serde_json::to_vec(&process)?,
            ..Default::default()
        }),
        ..Default::default()
    };
    supervisor.exec(request).await?;
    let Some(fifos) = fifos else {
        supervisor.start(exec_id).await?;
        return Ok(0);
    };
    let raw = if args.tty { Raw::enter()? } else { None };
    let signals = Signals::new()?;
    supervisor.start(exec_id).await?;
    if args.tty {
        resize(&supervisor.task, &supervisor.id, exec_id).await;
    }
    let stdin = fifos.path("stdin");
    let keys = raw.as_ref().map(|_| args.keys.detach_keys.clone());
    let (output, keys) = fifos.attach_with(true, keys);
    let left = async {
        keys.await;
        // It goes on with its input open, though nobody types any more.
        supervisor.hold_stdin(exec_id, &stdin).await?;
        Ok(0)
    };
    let done = ready(Ok(()));
    let code = tokio::select! {
        code = attend(supervisor, exec_id, args.tty, signals, output, done) => code,
        code = left => code,
    };
    drop(raw);
    code
}

/// The container's own process, with what the command line changes.
fn process(layout: &Layout, args: &ExecArgs, record: &Record) -> Result<Value> {
    let path = layout.container(&record.id).join("config.json");
    let bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let spec: Value =
        serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?;
    let mut process = spec["process"].clone();
    let env: Vec<String> = serde_json::from_value(process["env"].clone()).unwrap_or_default();
    let mut base = Vec::new();
    if args.tty {
        base.push("TERM=xterm".to_owned());
    }
    let given = spec::variables(&args.env_file, &args.env)?;
    process["env"] = json!(spec::merge_env(&base, env.iter(), &given));
    process["args"] = json!(args.command);
    process["terminal"] = json!(args.tty);
    if let Some(dir) = &args.workdir {
        if !dir.starts_with('/') {
            bail!("--workdir {dir}: must be an absolute path in the container");
        }
        process["cwd"] = json!(dir);
    }
    if let Some(user) = &args.user {
        process["user"] = spec::user_value(Some(user));
    }
    Ok(process)
}
