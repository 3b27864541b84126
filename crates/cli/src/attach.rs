//! `walnut attach`.

use std::{
    fs,
    future::ready,
    io::IsTerminal,
    os::unix::fs::OpenOptionsExt,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use walnut_protocol::supervisor::AttachRequest;
use walnut_sandbox::{Error, Layout, Record, Status, find};

use crate::{
    args::KeysArgs,
    client::Supervisor,
    create::{find_live, new_id},
    io::{Fifos, Typed},
    run::{Signals, attend, resize_to},
    terminal::{self, Raw},
};

/// Output that ends sooner was not there.
const QUICK: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut attach shell                        # ctrl-p ctrl-q leaves it again
  walnut attach --no-stdin web

Ends as the container ends, with its exit code; signals are passed on to it.")]
pub(crate) struct AttachArgs {
    #[command(flatten)]
    pub(crate) keys: KeysArgs,
    /// Do not connect standard input
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// Do not pass signals on
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub(crate) sig_proxy: bool,
    /// Container, by name or ID
    pub(crate) container: String,
}

pub(crate) async fn attach(args: AttachArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let record = find_live(&layout, &args.container)?;
    let paused = record.status == Status::Paused;
    if paused || record.status == Status::Restarting {
        bail!(Error::WrongState(format!(
            "container {} is {}; {}",
            record.name,
            record.status.as_str(),
            if paused {
                "unpause it first"
            } else {
                "try again when it runs"
            }
        )));
    }
    let input = record.terms.stdin && !args.no_stdin;
    if record.terminal && input && !std::io::stdin().is_terminal() {
        bail!("the input is not a terminal; use --no-stdin");
    }
    let dir = layout.sandbox(&record.id).join(format!("at-{}", new_id()?));
    let result = attached(&layout, &args, &record, &dir, input).await;
    // Gone already when the sandbox is.
    let _ = fs::remove_dir_all(&dir);
    result
}

async fn attached(
    layout: &Layout,
    args: &AttachArgs,
    record: &Record,
    dir: &std::path::Path,
    input: bool,
) -> Result<u8> {
    let supervisor = Supervisor::connect(layout, record).await?;
    let stdin = layout.sandbox(&record.id).join("io/stdin");
    let fifo = match input {
        // Whoever ran it keeps its other end, or its supervisor does.
        true => {
            let mut options = fs::OpenOptions::new();
            options.write(true).custom_flags(libc::O_NONBLOCK);
            let file = options.open(&stdin);
            let file = file.with_context(|| format!("open the input of {}", record.name))?;
            blocking(&file)?;
            Some(file)
        }
        false => None,
    };
    let raw = match record.terminal && input {
        true => Raw::enter()?,
        false => None,
    };
    let typed = Typed::default();
    let mut fifo = fifo;
    let shown = async {
        // What has closed its output ends at once, each time.
        let mut at_once = 0;
        while at_once < 3 {
            let began = Instant::now();
            let fifos = Fifos::create(dir, false, record.terminal)?;
            let request = AttachRequest {
                stdout: fifos.path("stdout"),
                stderr: fifos.path("stderr"),
                ..Default::default()
            };
            supervisor.attach(request).await?;
            // Not before: what it is answered with would be nobody's.
            if let Some(fifo) = fifo.take() {
                let keys = raw.as_ref().map(|_| args.keys.detach_keys.clone());
                typed.copy(fifo, keys);
            }
            if record.terminal {
                redraw(&supervisor).await;
            }
            fifos.attach().await;
            // A supervisor that was replaced has let go of it; the next one is asked again.
            match find(layout, &record.id) {
                Ok(now) if now.status == Status::Running => {}
                _ => return anyhow::Ok(()),
            }
            if Supervisor::connect(layout, record).await.is_err() {
                return Ok(());
            }
            match began.elapsed() < QUICK {
                true => at_once += 1,
                false => at_once = 0,
            }
        }
        Ok(())
    };
    let whole = async {
        let code = supervisor.wait("");
        let (code, shown) = tokio::join!(code, shown);
        // What cannot be shown any more has ended meanwhile.
        if let (Err(e), Err(_)) = (&shown, &code) {
            bail!("{e:#}");
        }
        code
    };
    let code = tokio::select! {
        code = attended(&supervisor, record, args, whole) => code,
        () = typed.detached() => Ok(0),
    };
    drop(raw);
    code
}

/// Passes signals and window sizes on meanwhile.
async fn attended(
    supervisor: &Supervisor,
    record: &Record,
    args: &AttachArgs,
    whole: impl Future<Output = Result<u8>>,
) -> Result<u8> {
    if !args.sig_proxy {
        return whole.await;
    }
    let signals = Signals::new()?;
    tokio::select! {
        code = whole => code,
        code = attend(supervisor, "", record.terminal, signals, std::future::pending(), ready(Ok(()))) => code,
    }
}

/// Has a program that draws on its terminal draw again: the size changes, and changes back.
async fn redraw(supervisor: &Supervisor) {
    if let Some((columns, rows)) = terminal::size() {
        let more = (columns, rows.saturating_add(1));
        resize_to(&supervisor.task, &supervisor.id, "", more).await;
        resize_to(&supervisor.task, &supervisor.id, "", (columns, rows)).await;
    }
}

fn blocking(file: &fs::File) -> Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(file, FcntlArg::F_SETFL(OFlag::empty())).context("use the container's input")?;
    Ok(())
}
