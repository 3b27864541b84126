//! A sandbox that goes from one program to the next in the same process, which is how its
//! supervisor is upgraded ([`walnut_machine::takeover`]).
//!
//! Nothing is stopped for it. [`Sandbox::hand_over`] looks, in a moment in which nothing is
//! half done, and changes nothing; if the next program does not come, this one goes on.
//! The next one asks the agent again for whatever ends are waited for: an agent keeps them.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex as StdMutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    net::UnixStream,
    sync::{Mutex, RwLock},
    time::sleep,
};
use tracing::warn;
use walnut_machine::{
    DriverKind, Machine, MachineState,
    process::{self, Cgroup},
    takeover::{Fd, Giver, NoState, Taker, hex},
};
use walnut_protocol::{AGENT_PORT, agent_ttrpc::AgentClient};
use walnut_storage::{VirtioFs, VirtioFsState};

use crate::{
    Error, NameFiles, ProcessState, Result, Sandbox, Settings, Shape, agent,
    checkpoint::Attached,
    containers::{Container, Exec},
    copy,
    growth::Sizes,
    network::{Watching, WatchingState},
    pod::Role,
    pod_request::PodParts,
    ports::{Carrying, CarryingState},
    process::{Process, State as ProcessPart},
    sandbox::lock,
    sizing::{Limits, Size},
};

/// Between two attempts to greet an agent.
const AGAIN: Duration = Duration::from_millis(100);
/// How often it is tried.
const TRIES: u32 = 100;

/// The error of what could not be taken over.
pub(crate) fn taken(error: io::Error) -> Error {
    Error::Machine(format!("take the sandbox over: {error}"))
}

/// What is being done that another program could not finish.
#[derive(Debug, Clone, Default)]
pub struct Busy(Arc<StdMutex<Vec<&'static str>>>);

/// Something that is being done, until this is dropped.
#[derive(Debug)]
pub struct Doing(Busy, &'static str);

impl Busy {
    /// Does `what`, as long as the result lives.
    pub fn with(&self, what: &'static str) -> Doing {
        lock(&self.0).push(what);
        Doing(self.clone(), what)
    }

    /// An error that says what is being done, if something is.
    pub fn quiet(&self) -> std::result::Result<(), NoState> {
        match lock(&self.0).first() {
            Some(what) => Err(NoState::busy(*what)),
            None => Ok(()),
        }
    }
}

impl Drop for Doing {
    fn drop(&mut self) {
        let mut all = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = all.iter().position(|what| *what == self.1) {
            all.swap_remove(at);
        }
    }
}

/// A connection to the agent on which nothing has been said, for the next program.
#[derive(Debug)]
pub struct Way(UnixStream);

/// A sandbox in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxState {
    id: String,
    settings: Settings,
    machine: MachineState,
    driver: DriverKind,
    agent: Fd,
    shared: Option<VirtioFsState>,
    containers: Vec<ContainerPart>,
    streams: u32,
    disk: u32,
    template: Option<String>,
    shape: Option<Shape>,
    disks: Vec<Attached>,
    networked: bool,
    names: Option<NameFiles>,
    carrying: Option<CarryingState>,
    watching: Option<WatchingState>,
    size: Size,
    /// Programs that only made machines larger do not say.
    least: Option<Size>,
    max: Size,
    pod: Option<PodParts>,
    cgroup: Option<Vec<PathBuf>>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContainerPart {
    id: String,
    bundle: PathBuf,
    guest_id: String,
    restored: bool,
    disk: Option<String>,
    role: Role,
    limits: Limits,
    volumes: Vec<usize>,
    init: ProcessPart,
    execs: Vec<ExecPart>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExecPart {
    id: String,
    process: ProcessPart,
    /// Until it is started.
    request: Option<Request>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct Request(#[serde(with = "hex")] Vec<u8>);

impl Container {
    fn part(&self, id: &str, giver: &mut Giver) -> std::result::Result<ContainerPart, NoState> {
        let mut execs = Vec::new();
        for (id, exec) in &*lock(&self.execs) {
            let request = exec.request.try_lock();
            let request = request.map_err(|_| NoState::busy("a process is being started"))?;
            execs.push(ExecPart {
                id: id.clone(),
                process: exec.process.handed_over(giver),
                request: request.clone().map(Request),
            });
        }
        Ok(ContainerPart {
            id: id.to_owned(),
            bundle: self.bundle.clone(),
            guest_id: self.guest_id.clone(),
            restored: self.restored,
            disk: self.disk.clone(),
            role: self.role,
            limits: *lock(&self.limits),
            volumes: self.volumes.clone(),
            init: self.init.handed_over(giver),
            execs,
        })
    }
}

/// Processes whose ends somebody shall learn of.
type Followed = Vec<(Arc<Container>, String, Arc<Process>)>;

impl ContainerPart {
    fn take_over(self, followed: &mut Followed, taker: &mut Taker) -> Result<Arc<Container>> {
        let mut process = |part: ProcessPart| -> Result<(Arc<Process>, bool)> {
            let follow = part.followed;
            let process = Arc::new(Process::take_over(part, taker)?);
            let over = matches!(process.state(), ProcessState::Stopped(_));
            Ok((process, follow && !over))
        };
        let (init, follow_init) = process(self.init)?;
        let mut wanted = vec![(String::new(), init.clone(), follow_init)];
        let mut execs = std::collections::HashMap::new();
        for part in self.execs {
            let (process, follow) = process(part.process)?;
            wanted.push((part.id.clone(), process.clone(), follow));
            let request = part.request.map(|request| request.0);
            let request = Arc::new(Mutex::new(request));
            execs.insert(part.id, Exec { process, request });
        }
        let container = Arc::new(Container {
            bundle: self.bundle,
            guest_id: self.guest_id,
            restored: self.restored,
            disk: self.disk,
            role: self.role,
            limits: StdMutex::new(self.limits),
            volumes: self.volumes,
            init,
            execs: StdMutex::new(execs),
        });
        let wanted = wanted.into_iter().filter(|(.., follow)| *follow);
        followed.extend(wanted.map(|(id, process, _)| (container.clone(), id, process)));
        Ok(container)
    }
}

impl Sandbox {
    /// A way to the agent for the next program; that there is one shows that it will find
    /// the agent.
    pub async fn way(&self) -> Result<Way> {
        Ok(Way(self.machine.connect(AGENT_PORT).await?))
    }

    /// What the next program makes the sandbox its own from ([`SandboxState::take_over`]).
    pub fn hand_over(
        &self,
        way: &Way,
        giver: &mut Giver,
    ) -> std::result::Result<SandboxState, NoState> {
        self.busy.quiet()?;
        let changing = || NoState::busy("the sandbox is being changed");
        let _whole = self.saving.try_write().map_err(|_| changing())?;
        let heritable = self.machine.as_heritable();
        let heritable = heritable.ok_or_else(|| {
            NoState::never(format!(
                "machines of the driver {} stay with the program that started them",
                self.driver
            ))
        })?;
        let machine = heritable.state(giver)?;
        let driver = match self.driver {
            "vmm" => DriverKind::Vmm,
            "qemu-kvm" => DriverKind::QemuKvm,
            _ => DriverKind::QemuTcg,
        };
        let mut containers = Vec::new();
        for (id, container) in &*lock(&self.containers) {
            containers.push(container.part(id, giver)?);
        }
        let cgroup = lock(&self.cgroup);
        Ok(SandboxState {
            id: self.id.clone(),
            settings: self.settings.clone(),
            machine,
            driver,
            agent: giver.give(&way.0),
            shared: match &self.shared {
                Some(shared) => Some(shared.state(giver)?),
                None => None,
            },
            containers,
            streams: self.streams.load(Ordering::Relaxed),
            disk: self.disk.load(Ordering::Relaxed),
            template: self.template.clone(),
            shape: self.shape.clone(),
            disks: lock(&self.disks).clone(),
            networked: self.networked.load(Ordering::Relaxed),
            names: self.names.get().cloned(),
            carrying: lock(&self.carrying).as_ref().map(|it| it.state(giver)),
            watching: match &*lock(&self.watching) {
                Some(watching) => Some(watching.state(giver)?),
                None => None,
            },
            size: self.size.now(),
            least: Some(self.size.least),
            max: self.size.max,
            pod: self.pod.clone(),
            cgroup: cgroup.as_ref().map(|cgroup| cgroup.dirs().to_vec()),
        })
    }
}

impl SandboxState {
    /// The sandbox that the program before had. Needs the thread that was that program's
    /// first.
    pub async fn take_over(self, taker: &mut Taker) -> Result<Arc<Sandbox>> {
        let machine = self.machine.take_over(taker)?;
        let shared = self.shared.map(|shared| VirtioFs::take_over(shared, taker));
        let shared = shared.transpose()?;
        let cgroup = self.cgroup.map(Cgroup::existing);
        if let Some(cgroup) = &cgroup
            && let Err(e) = process::confine(cgroup)
        {
            warn!("the host does not limit what the sandbox starts from now on: {e}");
        }
        let mut followed = Followed::new();
        let mut containers = std::collections::HashMap::new();
        for part in self.containers {
            let id = part.id.clone();
            containers.insert(id, part.take_over(&mut followed, taker)?);
        }
        let way = copy::stream(self.agent, taker).map_err(taken)?;
        let agent = greeted(machine.as_ref(), way).await?;
        let sandbox = Arc::new(Sandbox {
            id: self.id,
            settings: self.settings,
            machine,
            agent,
            shared,
            containers: StdMutex::new(containers),
            streams: AtomicU32::new(self.streams),
            disk: AtomicU32::new(self.disk),
            driver: self.driver.name(),
            template: self.template,
            wanted: None,
            shape: self.shape,
            disks: StdMutex::new(self.disks),
            networked: AtomicBool::new(self.networked),
            names: self.names.map(OnceLock::from).unwrap_or_default(),
            carrying: StdMutex::default(),
            watching: StdMutex::default(),
            saving: RwLock::default(),
            size: Sizes::new(self.size, self.least.unwrap_or(self.size), self.max),
            pod: self.pod,
            cgroup: StdMutex::new(cgroup),
            busy: Busy::default(),
        });
        if let Some(state) = self.carrying {
            let carrying = Carrying::take_over(state, &sandbox, taker).map_err(taken)?;
            *lock(&sandbox.carrying) = Some(carrying);
        }
        if let Some(state) = self.watching {
            let watching = Watching::take_over(state, &sandbox, taker).await?;
            *lock(&sandbox.watching) = Some(watching);
        }
        // Whoever was about to has gone.
        sandbox.give_back_later();
        for (container, exec_id, process) in followed {
            sandbox.follow(container, &exec_id, process);
        }
        Ok(sandbox)
    }
}

/// The agent at the end of a way that was handed over; where it has broken off meanwhile,
/// of another one.
async fn greeted(machine: &dyn Machine, way: UnixStream) -> Result<AgentClient> {
    let mut greeting = agent::greet(way).await;
    let mut tries = 0;
    while let Err(e) = &greeting
        && tries < TRIES
    {
        warn!("greet the agent, as the sandbox is taken over: {e}; trying again");
        sleep(AGAIN).await;
        greeting = agent::connect(machine).await;
        tries += 1;
    }
    greeting
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_is_told_until_it_is() {
        let busy = Busy::default();
        let first = busy.with("one");
        let second = busy.with("two");
        drop(first);
        assert!(matches!(busy.quiet(), Err(NoState::Busy(what)) if what == "two"));
        drop(second);
        assert!(busy.quiet().is_ok());
    }
}
