//! A supervisor that is replaced by another program while its sandbox runs on.
//!
//! The other program is executed in this process (execve(2)): so the sandbox's processes
//! keep their parent, containerd the PID and the socket that it knows, and all files their
//! locks. [`State`] says what this one knew, and which of the descriptors are what.
//!
//! This process has one thread. An upgrade waits for a moment in which nothing is half done
//! that only this program could finish; then it notes the state, has the other program say
//! whether it could go on from it, and executes it, without waiting for anything in between.
//! Nothing is stopped for that: up to the last step, this one goes on if the next is not to
//! be had, as if nobody had asked.
//!
//! [`program`] is the other program; [`heir`] is what it does first.

mod heir;
mod program;
mod state;

pub(crate) use heir::{inherited, take_over};
pub(crate) use program::{about, check};
pub(crate) use state::{FrontState, State};

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::{
    sync::Mutex,
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};
use ttrpc::{Code, r#async::TtrpcContext, get_status};
use walnut_protocol::{
    supervisor::{
        AboutRequest, AboutResponse, AttachRequest, AttachResponse, Program as ProgramMessage,
        UpgradeRequest, UpgradeResponse,
    },
    supervisor_ttrpc::Supervisor,
};
use walnut_sandbox::{
    Way,
    machine::takeover::{Giver, NoState},
};

use self::program::{Build, Program};
use crate::{
    background,
    connections::Connections,
    service::{Reply, SandboxService, TaskService},
};

/// Longest that is waited for a quiet moment. Nobody's request begins meanwhile, and
/// containerd waits ten seconds for most of its own.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);
/// Longest token.
pub(crate) const TOKEN_MAX: usize = 64;

/// The upgrade that this program came by.
#[derive(Debug)]
pub(crate) struct Came {
    pub(crate) token: String,
    pub(crate) from: Build,
}

/// The supervisor's own service.
#[derive(Debug)]
pub(crate) struct Upgrades {
    connections: Arc<Connections>,
    tasks: Arc<TaskService>,
    sandboxes: Option<Arc<SandboxService>>,
    came: Option<Came>,
    upgrading: Mutex<()>,
}

/// Why a program stays.
#[derive(Debug)]
enum Stays {
    /// What it is asked cannot be done now.
    Busy(String),
    /// Nor later.
    Never(String),
}

impl From<NoState> for Stays {
    fn from(none: NoState) -> Self {
        match none {
            NoState::Busy(what) => Self::Busy(what),
            NoState::Never(why) => Self::Never(why),
        }
    }
}

impl From<Stays> for ttrpc::Error {
    fn from(stays: Stays) -> Self {
        let (code, text) = match stays {
            Stays::Busy(what) => (Code::UNAVAILABLE, format!("{what}; try again")),
            Stays::Never(why) => (Code::FAILED_PRECONDITION, why),
        };
        Self::RpcStatus(get_status(code, text))
    }
}

impl Upgrades {
    pub(crate) fn new(
        connections: Arc<Connections>,
        tasks: Arc<TaskService>,
        sandboxes: Option<Arc<SandboxService>>,
        came: Option<Came>,
    ) -> Arc<Self> {
        Arc::new(Self {
            connections,
            tasks,
            sandboxes,
            came,
            upgrading: Mutex::default(),
        })
    }

    /// Becomes another program. Returns if it does not.
    async fn become_program(&self, program: &Program, token: &str, from: &Build) -> Stays {
        let sandbox = match self.tasks.upgradable() {
            Ok(sandbox) => sandbox,
            Err(e) => return e.into(),
        };
        // That there is one says that the next program will find the agent.
        let way = match timeout(PATIENCE, sandbox.way()).await {
            Ok(Ok(way)) => way,
            Ok(Err(e)) => return Stays::Busy(format!("reach the agent: {e}")),
            Err(_) => return Stays::Busy("the agent does not answer".into()),
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut giver = Giver::default();
            // From here on nothing else runs.
            match self.state(&way, (token, from), &mut giver) {
                Ok(state) => return Stays::Never(program.replace(&state, giver)),
                Err(NoState::Busy(_)) if Instant::now() < deadline => sleep(PAUSE).await,
                Err(e) => return e.into(),
            }
        }
    }

    fn state(
        &self,
        way: &Way,
        (token, from): (&str, &Build),
        giver: &mut Giver,
    ) -> Result<State, NoState> {
        let sandbox = self.tasks.upgradable()?;
        Ok(State {
            token: token.to_owned(),
            from: from.clone(),
            connections: self.connections.state(giver)?,
            front: self.tasks.front().state(giver)?,
            sandbox: sandbox.hand_over(way, giver)?,
            tasks: self.tasks.state_of_tasks(),
            pod: match &self.sandboxes {
                Some(sandboxes) => sandboxes.state()?,
                None => None,
            },
            background: background::running(),
        })
    }
}

impl From<&Build> for ProgramMessage {
    fn from(build: &Build) -> Self {
        Self {
            version: build.version.clone(),
            build: build.digest.clone(),
            ..Default::default()
        }
    }
}

/// While it lives nothing begins that would have to end first. (Who asked may go at any
/// moment.)
struct Held<'a>(&'a Upgrades);

impl<'a> Held<'a> {
    fn new(upgrades: &'a Upgrades) -> Self {
        let held = Self(upgrades);
        held.hold(true);
        held
    }

    fn hold(&self, held: bool) {
        self.0.connections.hold(held);
        self.0.tasks.front().hold(held);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.hold(false);
    }
}

fn failed(code: Code, what: impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, what.to_string()))
}

/// Does it on the thread for what takes a while.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Reply<T> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.map_err(|e| failed(Code::INTERNAL, e))?;
    done.map_err(|e| failed(Code::FAILED_PRECONDITION, format!("{e:#}")))
}

#[async_trait]
impl Supervisor for Upgrades {
    async fn about(&self, _: &TtrpcContext, _: AboutRequest) -> Reply<AboutResponse> {
        let own = aside(Build::own).await?;
        let mut about = self.tasks.front().about();
        about.pid = std::process::id();
        about.program = Some((&own).into()).into();
        Ok(about)
    }

    async fn attach(&self, _: &TtrpcContext, req: AttachRequest) -> Reply<AttachResponse> {
        self.tasks.attach(&req)?;
        Ok(AttachResponse::default())
    }

    async fn upgrade(&self, _: &TtrpcContext, req: UpgradeRequest) -> Reply<UpgradeResponse> {
        let answer = |from: &Build, to: &Build| UpgradeResponse {
            from: Some(from.into()).into(),
            to: Some(to.into()).into(),
            ..Default::default()
        };
        let own = aside(Build::own).await?;
        // This is the next program, and the request was the last one's.
        if let Some(came) = &self.came
            && came.token == req.token
        {
            return Ok(answer(&came.from, &own));
        }
        if !(1..=TOKEN_MAX).contains(&req.token.len()) {
            let wrong = format!("upgrade: the token must have 1 to {TOKEN_MAX} bytes");
            return Err(failed(Code::INVALID_ARGUMENT, wrong));
        }
        let Ok(_one) = self.upgrading.try_lock() else {
            return Err(Stays::Busy("it is being upgraded already".into()).into());
        };
        let path = (!req.program.is_empty()).then(|| PathBuf::from(&req.program));
        let program = aside(move || Program::open(path)).await?;
        if program.build == own {
            return Ok(answer(&own, &own));
        }
        info!(
            "to be replaced by {} {}",
            program.build.version, program.build.digest
        );
        let held = Held::new(self);
        let stays = self.become_program(&program, &req.token, &own).await;
        drop(held);
        warn!("not replaced: {stays:?}");
        Err(stays.into())
    }
}
