//! Warm pools: the process that fills them, and the one that stands by until it is given
//! a container.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::Command,
};
use tracing::{info, warn};
use walnut_sandbox::{
    Assets, Given, Lock, Network, Place, Pools, Sandbox, SandboxConfig, Settings, Templates, Visit,
    Wanted, host_memory, leave,
    machine::takeover::{Fd, Giver, Taker},
};

use crate::{
    background,
    options::{self, Fill, Options, StandBy},
    pressure,
};

/// What a member writes when it can be had.
const READY: &str = "ready";
/// Longest that is read of what a member that failed had to say.
const COMPLAINT_MAX: u64 = 4 << 10;
/// Of the host's memory so much stays for others: pools stop growing before.
const RESERVE: u64 = 8;
/// How long a container that has just been started is left alone before its machine is
/// replaced.
const PAUSE: Duration = Duration::from_millis(500);
/// How much longer than a boot a member may take: it runs a container as well.
const REHEARSAL: Duration = Duration::from_secs(60);

fn pools(run_dir: &Path, state_dir: &Path) -> Pools {
    Pools::new(state_dir, run_dir)
}

/// Starts a process that fills the pools, if there are any.
pub(crate) fn fill_later(node: Option<(&Path, &Path)>) {
    let Some((state, run)) = node else {
        return;
    };
    if pools(run, state).is_wanted() {
        let fill = Fill {
            state_dir: state.to_owned(),
            run_dir: run.to_owned(),
            pause: PAUSE,
        };
        // Not kind: what it starts becomes a container's.
        background::spawn("fill the pools", false, fill.args(), None);
    }
}

/// What that process does: members that are too many or too old are told to go, then one
/// after the other is started until there are enough. One at a time is the bound on their
/// rate, the host's free memory the one on their number.
pub(crate) async fn fill(fill: Fill) -> Result<()> {
    let pools = pools(&fill.run_dir, &fill.state_dir);
    let templates = Templates::new(&fill.state_dir, &fill.run_dir);
    let assets = Assets::find().context("fill the pools")?;
    let settings = Settings::load().context("fill the pools")?;
    let current = |wanted: &Wanted| {
        let found = templates.current(wanted, &assets, &fill.run_dir);
        found.ok().flatten()
    };
    tokio::time::sleep(fill.pause).await;
    loop {
        // Whoever has it does what is to be done.
        let Some(lock) = pools.filler().context("fill the pools")? else {
            return Ok(());
        };
        let (missing, excess) = pools.balance(current).context("fill the pools")?;
        for member in &excess {
            pools.retire(member);
        }
        let Some(wanted) = missing.first() else {
            drop(lock);
            // Somebody may have taken one, and found that we were at it.
            match pools
                .balance(current)
                .context("fill the pools")?
                .0
                .is_empty()
            {
                true => return Ok(()),
                false => continue,
            }
        };
        if pressure::is_high(&settings) {
            bail!("fill the pools: the host is short of memory");
        }
        if let Some((available, total)) = host_memory()
            && available.saturating_sub(wanted.memory) < total / RESERVE
        {
            bail!(
                "fill the pools: {} MiB of the host's {} are free, too few for one more machine of {} MiB",
                available >> 20,
                total >> 20,
                wanted.memory >> 20
            );
        }
        template(&fill, &templates, &assets, &settings, wanted).await?;
        start(&fill, &settings, wanted).await?;
    }
}

/// Sees to it that there is a template for a member to begin from.
async fn template(
    fill: &Fill,
    templates: &Templates,
    assets: &Assets,
    settings: &Settings,
    wanted: &Wanted,
) -> Result<()> {
    loop {
        let cache = Some(fill.run_dir.clone());
        let made = templates.make(wanted, assets, cache, settings.boot_timeout());
        if made.await.context("fill the pools")?.is_some() {
            return Ok(());
        }
        let waiting = templates.clone();
        tokio::task::spawn_blocking(move || waiting.wait_for_maker())
            .await
            .context("fill the pools")??;
    }
}

/// Starts a member, and returns when it can be had.
async fn start(fill: &Fill, settings: &Settings, wanted: &Wanted) -> Result<()> {
    let stand_by = StandBy {
        state_dir: fill.state_dir.clone(),
        run_dir: fill.run_dir.clone(),
        wanted: wanted.clone(),
    };
    let mut command = Command::new("/proc/self/exe");
    command
        .args(stand_by.args())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: between fork and exec only async-signal-safe calls are made.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    let mut member = command.spawn().context("start a machine to stand by")?;
    let said = member.stdout.take().context("listen to the member")?;
    let mut lines = BufReader::new(said.take(COMPLAINT_MAX)).lines();
    let limit = settings.boot_timeout() + REHEARSAL;
    let line = tokio::time::timeout(limit, lines.next_line()).await;
    if let Ok(Ok(Some(line))) = &line
        && line == READY
    {
        // It goes its own way.
        return Ok(());
    }
    let _ = member.start_kill();
    let mut complaint = String::new();
    if let Some(stderr) = member.stderr.take() {
        let mut stderr = stderr.take(COMPLAINT_MAX);
        let _ = stderr.read_to_string(&mut complaint).await;
    }
    let _ = member.wait().await;
    bail!(
        "start a machine to stand by: {}",
        match (complaint.trim(), line) {
            ("", Err(_)) => "it took too long",
            ("", Ok(_)) => "it ended without a word",
            (complaint, _) => complaint,
        }
    )
}

/// A member's life up to the moment in which it is given a container. `None` if it never
/// was.
pub(crate) async fn stand_by(stand_by: StandBy) -> Result<Option<Adopted>> {
    let pools = pools(&stand_by.run_dir, &stand_by.state_dir);
    let assets = Assets::find().context("stand by")?;
    let place = pools
        .place(&stand_by.wanted, &assets.dir)
        .context("stand by")?;
    let templates = Templates::new(&stand_by.state_dir, &stand_by.run_dir);
    let result = prepared(&stand_by, &place, &assets, &templates).await;
    let sandbox = match result {
        Ok(sandbox) => sandbox,
        Err(e) => {
            let _ = std::fs::remove_dir_all(&place.dir);
            return Err(e);
        }
    };
    let given = offered(&stand_by, &place, &sandbox, &templates).await;
    match given {
        Ok(Some(given)) => Ok(Some(Adopted {
            sandbox,
            given: *given,
            place,
        })),
        other => {
            sandbox.kill_machine().await;
            let _ = std::fs::remove_dir_all(&place.dir);
            other.map(|_| None)
        }
    }
}

/// A member that has been given a container.
#[derive(Debug)]
pub(crate) struct Adopted {
    pub(crate) sandbox: Arc<Sandbox>,
    given: Given,
    place: Place,
}

impl Adopted {
    /// What a supervisor begins with; the sandbox that it has, and what it must keep.
    pub(crate) fn into_parts(self) -> (Options, Arc<Sandbox>, Kept) {
        let Given {
            handover,
            socket,
            lock,
            lease,
            log,
            image,
        } = self.given;
        options::log_to(&log);
        let options = Options {
            id: handover.id,
            container_dir: handover.container_dir,
            run_dir: handover.run_dir,
            socket,
            lock: Lock::inherited(lock),
            lease,
        };
        let kept = Kept {
            dir: self.place.dir,
            place: self.place.lock,
            image,
        };
        (options, self.sandbox, kept)
    }
}

/// The same in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeptState {
    dir: PathBuf,
    place: Fd,
    image: Fd,
}

impl Kept {
    /// For the next program.
    pub(crate) fn state(&self, giver: &mut Giver) -> KeptState {
        KeptState {
            dir: self.dir.clone(),
            place: giver.give(&self.place),
            image: giver.give(&self.image),
        }
    }

    /// What the program before had.
    pub(crate) fn take_over(state: KeptState, taker: &mut Taker) -> io::Result<Self> {
        Ok(Self {
            dir: state.dir,
            place: Lock::inherited(taker.take(state.place)?),
            image: taker.take(state.image)?,
        })
    }
}

/// What a supervisor that was a member has beyond the others. Dropping it removes the
/// member's directory.
#[derive(Debug)]
pub(crate) struct Kept {
    dir: PathBuf,
    place: Lock,
    image: OwnedFd,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.dir) {
            warn!("remove {}: {e}", self.dir.display());
        }
    }
}

/// A machine that has rehearsed.
async fn prepared(
    stand_by: &StandBy,
    place: &Place,
    assets: &Assets,
    templates: &Templates,
) -> Result<Arc<Sandbox>> {
    let mut settings = Settings::load()?;
    settings.machine.driver = stand_by.wanted.driver;
    let config = SandboxConfig {
        id: place.id.clone(),
        run_dir: place.dir.clone(),
        assets: assets.clone(),
        settings,
        cache: Some(stand_by.run_dir.clone()),
        templates: Some(templates.clone()),
        network: Network::None,
        names: None,
    };
    let sandbox = Sandbox::standby(config, &stand_by.wanted)
        .await
        .context("stand by")?;
    let sandbox = Arc::new(sandbox);
    if let Err(e) = sandbox.rehearse(&assets.rehearsal(), &place.dir).await {
        sandbox.kill_machine().await;
        return Err(e).context("stand by");
    }
    Ok(sandbox)
}

/// Waits for a container.
async fn offered(
    stand_by: &StandBy,
    place: &Place,
    sandbox: &Sandbox,
    templates: &Templates,
) -> Result<Option<Box<Given>>> {
    let pools = pools(&stand_by.run_dir, &stand_by.state_dir);
    let template = sandbox.template().unwrap_or_default();
    let post = pools
        .offer(place, template, sandbox.max_size())
        .context("stand by")?;
    println!("{READY}");
    // The filler goes, and with it whoever would read what is written.
    quiet();
    let (visit, visitor) = tokio::select! {
        visit = post.visit() => visit.context("stand by")?,
        exit = sandbox.ended() => bail!("stand by: {exit}"),
        // Containers need the memory more.
        () = pressure::lasting(sandbox.settings()) => return Ok(None),
    };
    let Visit::Given(given) = visit else {
        visitor.accept().await;
        return Ok(None);
    };
    // A machine of another kernel, agent or host is nobody's any more.
    let current = templates.current(&stand_by.wanted, &Assets::find()?, &stand_by.run_dir);
    let refusal = match current {
        Ok(Some(id)) if sandbox.template() == Some(&id) => None,
        Ok(_) => Some("its template is not in use any more".to_owned()),
        Err(e) => Some(e.to_string()),
    };
    if let Some(refusal) = refusal {
        visitor.refuse(&refusal).await;
        return Ok(None);
    }
    drop(post);
    if !visitor.accept().await {
        return Ok(None);
    }
    leave(&place.dir);
    info!(id = given.handover.id, "given a container");
    Ok(Some(given))
}

/// From here on standard output and error go nowhere.
fn quiet() {
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        for fd in [1, 2] {
            // SAFETY: both are descriptors of this process.
            unsafe { libc::dup2(null.as_raw_fd(), fd) };
        }
    }
}
