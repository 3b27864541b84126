//! `walnut upgrade`: supervisors that are older than what is installed become that, while
//! their sandboxes run on.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    context,
};
use walnut_protocol::{
    supervisor::{AboutRequest, AboutResponse, Program, UpgradeRequest},
    supervisor_ttrpc::SupervisorClient,
};
use walnut_sandbox::{Assets, Layout, Pools, Status, list, supervisors};

use crate::{args::Format, output, supervisor};

/// Longest that a supervisor may take to say what it is.
const ABOUT: Duration = Duration::from_secs(10);
/// Longest that it may take to be another program.
const UPGRADE: Duration = Duration::from_secs(120);
/// Of what failed for somebody.
const EXIT_FAILED: u8 = 125;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut upgrade --all                       # after `walnut install` of another version
  walnut upgrade web
  walnut upgrade --all --format json
  walnut upgrade --program /opt/walnut/containerd-shim-walnut-v2 web

A supervisor becomes what now lies where its own program lay: in the same process, with its
containers, their output and whoever waits for them. What cannot be now, or cannot at all, goes on as
it was, and the reason is told. The machine, its kernel and the agent in it stay what they are until
the sandbox ends. A sandbox is a container of `walnut` or `walnut-oci`, or a pod or container of
containerd, by its name or the beginning of its ID.

Exit codes: 0 all run the program now; 125 one does not.")]
pub(crate) struct UpgradeArgs {
    /// All sandboxes of this node
    #[arg(short, long, conflicts_with = "sandboxes")]
    all: bool,
    /// The program, if it is not the one that is where the supervisor's own was
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// How to show what happened
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Sandboxes
    #[arg(required_unless_present = "all")]
    sandboxes: Vec<String>,
}

/// What has become of a supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    /// It is another program now.
    Upgraded,
    /// It was that program before.
    Current,
    /// It goes on as it was.
    Unchanged,
    /// Nobody knows: it does not answer.
    Failed,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Upgraded => "upgraded",
            Self::Current => "current",
            Self::Unchanged => "unchanged",
            Self::Failed => "failed",
        }
    }

    fn is_good(self) -> bool {
        matches!(self, Self::Upgraded | Self::Current)
    }
}

/// A program, in a list.
#[derive(Debug, Clone, Default, Serialize)]
struct Build {
    version: String,
    build: String,
}

impl From<Program> for Build {
    fn from(program: Program) -> Self {
        Self {
            version: program.version,
            build: program.build,
        }
    }
}

/// A supervisor, and what has become of it.
#[derive(Debug, Serialize)]
struct Row {
    sandbox: String,
    /// containerd's.
    #[serde(skip_serializing_if = "String::is_empty")]
    namespace: String,
    front: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    result: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<Build>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<Build>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// A supervisor that runs.
struct Running {
    /// Names of its sandbox.
    names: Vec<String>,
    /// If it says what it is.
    about: Option<AboutResponse>,
    client: Result<SupervisorClient, String>,
}

pub(crate) async fn upgrade(args: UpgradeArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let program = match &args.program {
        Some(program) => {
            let program = fs::canonicalize(program)
                .with_context(|| format!("use the program {}", program.display()))?;
            program.display().to_string()
        }
        None => String::new(),
    };
    let running = running(&layout).await?;
    let mut rows = Vec::new();
    for supervisor in chosen(running, &args.sandboxes)? {
        rows.push(upgraded(supervisor, &program).await?);
    }
    if args.all {
        refill(&layout)?;
    }
    match args.format {
        Format::Json => output::json(&rows)?,
        Format::Table => table(&rows)?,
    }
    match rows.iter().all(|row| row.result.is_good()) {
        true => Ok(0),
        false => Ok(EXIT_FAILED),
    }
}

/// All supervisors of the node.
async fn running(layout: &Layout) -> Result<Vec<Running>> {
    let records = list(layout)?;
    let names: HashMap<_, _> = records
        .iter()
        .map(|r| (r.id.clone(), r.name.clone()))
        .collect();
    // One that has joined another is supervised with it.
    let own = records
        .iter()
        .filter(|r| r.status != Status::Exited || r.outlived)
        .filter(|r| r.terms.joins.is_none());
    let mut sockets: Vec<_> = own
        .map(|r| (layout.task_socket(&r.id), r.id.clone()))
        .collect();
    for dir in supervisors(layout)? {
        // What is not known by another name.
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        sockets.push((dir.join("task.sock"), name.into_owned()));
    }
    let mut all = Vec::new();
    for (socket, name) in sockets {
        let client = match Socket::connect_unix(socket.to_string_lossy()).await {
            Ok(socket) => SupervisorClient::new(Client::new(socket)),
            // It has ended, or has not begun.
            Err(_) => continue,
        };
        let about = context::with_duration(ABOUT);
        let about = client.about(about, &AboutRequest::default()).await;
        let mut supervisor = Running {
            names: vec![name.clone()],
            about: None,
            client: Ok(client),
        };
        match about {
            Ok(about) => {
                if about.front != "walnut" {
                    supervisor.names = vec![about.name.clone()];
                }
                supervisor.about = Some(about);
            }
            Err(e) => supervisor.client = Err(unknown(&e)),
        }
        supervisor.names.extend(names.get(&name).cloned());
        all.push(supervisor);
    }
    Ok(all)
}

/// Why a supervisor does not say what it is.
fn unknown(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) if status.code() == Code::INVALID_ARGUMENT => {
            "its supervisor is of a release that cannot be upgraded; it stays until the sandbox \
             ends"
                .into()
        }
        _ => reason(error),
    }
}

fn reason(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
        error => format!("its supervisor does not answer: {error}"),
    }
}

/// Those that are named; all, if none is.
fn chosen(mut running: Vec<Running>, wanted: &[String]) -> Result<Vec<Running>> {
    if wanted.is_empty() {
        return Ok(running);
    }
    let mut chosen = Vec::new();
    for wanted in wanted {
        let is = |s: &Running| s.names.iter().any(|name| name == wanted);
        let begins = |s: &Running| s.names.iter().any(|name| name.starts_with(wanted.as_str()));
        let at = match running.iter().position(is) {
            Some(at) => at,
            None => {
                let mut all = running.iter().enumerate().filter(|(_, s)| begins(s));
                match (all.next(), all.next()) {
                    (Some((at, _)), None) => at,
                    (Some(_), Some(_)) => {
                        bail!("{wanted} is the beginning of several sandboxes' names")
                    }
                    _ => bail!("no sandbox is called {wanted} that runs"),
                }
            }
        };
        chosen.push(running.swap_remove(at));
    }
    Ok(chosen)
}

/// Has it done.
async fn upgraded(supervisor: Running, program: &str) -> Result<Row> {
    let about = supervisor.about.unwrap_or_default();
    let from = about.program.into_option().map(Build::from);
    let mut row = Row {
        sandbox: supervisor.names.last().cloned().unwrap_or_default(),
        namespace: about.namespace,
        front: match about.front.is_empty() {
            true => "-".into(),
            false => about.front,
        },
        pid: Some(about.pid).filter(|pid| *pid > 0),
        result: Outcome::Unchanged,
        from,
        to: None,
        reason: None,
    };
    let client = match supervisor.client {
        Ok(client) => client,
        Err(why) => {
            row.reason = Some(why);
            return Ok(row);
        }
    };
    let mut token = [0; 16];
    getrandom::fill(&mut token).context("make a token")?;
    let request = UpgradeRequest {
        token: token.iter().map(|byte| format!("{byte:02x}")).collect(),
        program: program.to_owned(),
        ..Default::default()
    };
    match client
        .upgrade(context::with_duration(UPGRADE), &request)
        .await
    {
        Ok(reply) => {
            let to = reply.to.into_option().map(Build::from);
            row.from = reply.from.into_option().map(Build::from).or(row.from);
            let same = row.from.as_ref().map(|b| &b.build) == to.as_ref().map(|b| &b.build);
            row.result = match same {
                true => Outcome::Current,
                false => Outcome::Upgraded,
            };
            row.to = to;
        }
        Err(e) => {
            if !matches!(e, ttrpc::Error::RpcStatus(_)) {
                row.result = Outcome::Failed;
            }
            row.reason = Some(reason(&e));
        }
    }
    Ok(row)
}

/// Machines that stand by and are of another program make way for new ones.
fn refill(layout: &Layout) -> Result<()> {
    let pools = Pools::new(&layout.state, &layout.run);
    if !pools.is_wanted() {
        return Ok(());
    }
    let assets = Assets::find()?;
    let file = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let current = file(&assets.shim());
    for member in pools.members()?.iter().filter(|member| member.ready) {
        if file(Path::new(&format!("/proc/{}/exe", member.pid))) != current {
            pools.retire(member);
        }
    }
    let mut fill = supervisor::command(&assets);
    fill.arg("fill-pools")
        .arg("--state-dir")
        .arg(&layout.state)
        .arg("--run-dir")
        .arg(&layout.run)
        .stderr(Stdio::null());
    supervisor::session(&mut fill);
    fill.spawn().context("start the filling of the pools")?;
    Ok(())
}

fn table(rows: &[Row]) -> Result<()> {
    let build = |build: &Option<Build>| match build {
        Some(Build { version, build }) => format!("{version} ({build})"),
        None => "-".into(),
    };
    let cells: Vec<_> = rows
        .iter()
        .map(|row| {
            [
                row.sandbox.chars().take(32).collect(),
                row.front.clone(),
                row.result.as_str().to_owned(),
                build(&row.from),
                build(&row.to),
                row.reason.clone().unwrap_or_default(),
            ]
        })
        .collect();
    let head = ["SANDBOX", "FRONT END", "RESULT", "FROM", "TO", ""];
    Ok(output::table(head, &cells)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn called(names: &[&str]) -> Running {
        Running {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            about: None,
            client: Err("no".into()),
        }
    }

    #[test]
    fn sandboxes_are_chosen_by_name_or_the_beginning_of_an_id() {
        let all = || vec![called(&["abc", "web"]), called(&["abd"]), called(&["ab"])];
        let names = |wanted: &[&str]| {
            let wanted: Vec<_> = wanted.iter().map(|name| (*name).to_owned()).collect();
            let chosen = chosen(all(), &wanted);
            chosen.map(|all| all.iter().map(|s| s.names.join("/")).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), 3);
        assert_eq!(names(&["web"]).unwrap(), ["abc/web"]);
        assert_eq!(names(&["ab", "abd"]).unwrap(), ["ab", "abd"]);
        assert!(names(&["a"]).unwrap_err().to_string().contains("several"));
        assert!(
            names(&["x"])
                .unwrap_err()
                .to_string()
                .contains("no sandbox")
        );
        // Once.
        assert!(names(&["web", "web"]).is_err());
    }

    #[tokio::test]
    async fn one_that_does_not_know_what_is_asked_stays() {
        let status = ttrpc::get_status(Code::INVALID_ARGUMENT, "no such service");
        let mut old = called(&["abc", "web"]);
        old.client = Err(unknown(&ttrpc::Error::RpcStatus(status)));
        let row = upgraded(old, "").await.unwrap();
        assert_eq!((row.result, &*row.sandbox), (Outcome::Unchanged, "web"));
        assert!(row.reason.unwrap().contains("until the sandbox ends"));
        assert!(!row.result.is_good());
    }
}
