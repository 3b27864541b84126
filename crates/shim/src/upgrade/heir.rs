//! What the next program does first: it makes what the one before it had its own.

use std::{
    env,
    fs::File,
    io::{Read, Seek},
    os::fd::OwnedFd,
    sync::Arc,
};

use anyhow::{Context, Result, anyhow};
use walnut_sandbox::machine::{process, takeover::Taker};

use super::{
    Came, FrontState, State, Upgrades,
    program::{VARIABLE, unblock},
    state::STATE_MAX,
};
use crate::{
    connections::Connections,
    containerd::{self, Pod},
    front::Front,
    oci, options,
    owner::{self, Owner},
    server,
    service::{SandboxService, TaskService},
};

/// As this program's name shows in lists of processes: it was executed by a number.
const NAME: &std::ffi::CStr = c"containerd-shim";

/// The state that this program was executed with, if it was to take over from another one.
/// Call it before any thread exists.
pub(crate) fn inherited() -> Result<Option<OwnedFd>> {
    let Some(number) = env::var_os(VARIABLE) else {
        return Ok(None);
    };
    // SAFETY: no other thread exists.
    unsafe { env::remove_var(VARIABLE) };
    let number = number.to_str().unwrap_or_default();
    let fd = options::inherited(VARIABLE, number).map_err(|e| anyhow!(e))?;
    Ok(Some(fd))
}

/// A supervisor's life from there on; its exit code.
pub(crate) async fn take_over(memory: OwnedFd) -> Result<u8> {
    // SAFETY: takes a string that outlives the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, NAME.as_ptr()) };
    let mut memory = File::from(memory);
    memory.rewind().context("read the state")?;
    let mut bytes = Vec::new();
    let read = memory.take(STATE_MAX + 1).read_to_end(&mut bytes);
    read.context("read the state")?;
    let state = State::parse(&bytes).map_err(|e| anyhow!(e))?;
    drop(bytes);
    let mut taker = Taker::default();
    for pid in state.background {
        tokio::spawn(process::reap(pid));
    }
    let sandbox = state.sandbox.take_over(&mut taker).await?;
    let (connections, first) = Connections::take_over(state.connections, &mut taker)
        .context("take over the connections")?;
    let came = Some(Came {
        token: state.token,
        from: state.from,
    });
    let service = |front: Arc<dyn Front>| {
        Arc::new(TaskService::take_over(front, sandbox.clone(), state.tasks))
    };
    let code = match state.front {
        FrontState::Owner(front) => {
            let owner = Arc::new(Owner::take_over(front, sandbox.clone(), &mut taker)?);
            owner.look_after();
            let service = service(owner.clone());
            let upgrades = Upgrades::new(connections.clone(), service.clone(), None, came);
            let server = server::start(connections, first, &service, None, upgrades).await?;
            unblock()?;
            owner::run(owner, service, server).await?;
            0
        }
        FrontState::Pod(front) => {
            let pod = Pod::take_over(front, sandbox.clone(), &mut taker)?;
            let options = containerd::kept_options(pod.dir())?;
            let service = service(pod.clone());
            let sandboxes = SandboxService::new(service.clone(), options);
            let sandboxes = Arc::new(sandboxes);
            if let Some(state) = state.pod {
                sandboxes.take_over(state, &sandbox);
            }
            let upgrades = Upgrades::new(
                connections.clone(),
                service.clone(),
                Some(sandboxes.clone()),
                came,
            );
            let server =
                server::start(connections, first, &service, Some(sandboxes), upgrades).await?;
            unblock()?;
            containerd::run(pod, server).await?;
            0
        }
        FrontState::Bundle(front) => {
            let bundle = oci::Bundle::take_over(front, sandbox.clone(), &mut taker)?;
            let service = service(bundle.clone());
            let upgrades = Upgrades::new(connections.clone(), service.clone(), None, came);
            let server = server::start(connections, first, &service, None, upgrades).await?;
            unblock()?;
            oci::run(bundle, server).await?
        }
    };
    Ok(code)
}
