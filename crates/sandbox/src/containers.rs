//! Containers of a sandbox: built, found, taken away.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex as StdMutex, atomic::AtomicBool},
};

use tokio::{sync::Mutex, time::timeout};
use tracing::{debug, warn};
use walnut_protocol::agent::{
    ContainerRequest as AgentContainer, CreateContainerRequest, ProcessRequest, Storage,
};
use walnut_storage::{VirtioFs, Volume};

use crate::{
    ContainerRequest, Error, ExitInfo, PodRequest, ProcessState, Result, Sandbox, SandboxConfig,
    agent::{self, fault, soon},
    cgroup, guest_spec,
    network::Links,
    plan::{FIRST_DISK, Plan, Root},
    pod::{self, First, Role},
    process::Process,
    record::now_ns,
    sandbox::{FAREWELL, lock, open_log},
    sizing::{self, Limits},
    start::{self, Started, Steps},
    stdio::ClientEnds,
};

#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) bundle: PathBuf,
    /// What the agent knows it by: in a clone, the name that it had before.
    pub(crate) guest_id: String,
    /// Goes on where it stood, instead of being started.
    pub(crate) restored: bool,
    /// Serial of the disk that its root file system is on, if it is on one.
    pub(crate) disk: Option<String>,
    /// Its part in its pod.
    pub(crate) role: Role,
    pub(crate) limits: StdMutex<Limits>,
    /// Numbers of its volumes.
    pub(crate) volumes: Vec<usize>,
    pub(crate) init: Arc<Process>,
    pub(crate) execs: StdMutex<HashMap<String, Exec>>,
}

impl Container {
    pub(crate) fn request(&self) -> AgentContainer {
        AgentContainer {
            container_id: self.guest_id.clone(),
            ..Default::default()
        }
    }

    pub(crate) fn process_request(&self, exec_id: &str) -> ProcessRequest {
        ProcessRequest {
            container_id: self.guest_id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        }
    }

    pub(crate) fn exec(&self, id: &str, exec_id: &str) -> Result<Exec> {
        lock(&self.execs)
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("no process {exec_id} in container {id}")))
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Exec {
    pub(crate) process: Arc<Process>,
    /// Taken when it is started.
    pub(crate) request: Arc<Mutex<Option<Vec<u8>>>>,
}

/// A machine with these parts. The server of its volumes ends with the first machine that
/// it serves: where that is a clone that fails, another one is started for one that boots.
async fn machine(
    config: &SandboxConfig,
    mut parts: start::Parts,
    shared: &mut Option<VirtioFs>,
    volumes: &[Volume],
    steps: Steps,
) -> Result<Started> {
    let mut config = config.clone();
    // A template that failed is not there any more, but another one may have come.
    for last in [false, true] {
        if let Some(started) = start::start(&config, parts.clone(), steps).await? {
            return Ok(started);
        }
        config.settings.machine.templates = !last;
        drop(shared.take());
        let again = VirtioFs::start(volumes, &config.run_dir).await?;
        parts.shares = vec![again.share()];
        *shared = Some(again);
    }
    let started = start::start(&config, parts, steps).await?;
    started.ok_or_else(|| Error::Machine("start the machine: it did not boot".into()))
}

impl Sandbox {
    /// Starts a machine sized for the first container, and builds the container
    /// in it. On failure nothing is left.
    pub async fn create(mut config: SandboxConfig, first: &ContainerRequest) -> Result<Arc<Self>> {
        let steps = Steps::new();
        let plan = Plan::new(first, FIRST_DISK)?;
        config.settings = config.settings.asked_by(&plan.spec, first.own)?;
        let size = sizing::size(&plan.spec, &config.settings);
        let ends = ClientEnds::open(&first.stdio)?;
        let cgroup = cgroup::enter(&config, size.memory);
        let volumes = plan.volumes();
        let mut shared = match plan.needs_sharing() {
            true => Some(VirtioFs::start(&volumes, &config.run_dir).await?),
            false => None,
        };
        let mut links = Links::take(
            &config.network,
            &plan.spec,
            size.vcpus,
            config.settings.egress(),
        )
        .await?;
        steps.done("links taken");
        let parts = start::Parts {
            size,
            nics: std::mem::take(&mut links.nics),
            disks: plan.image().iter().map(|root| root.disk.clone()).collect(),
            shares: shared.iter().map(VirtioFs::share).collect(),
        };
        let started = machine(&config, parts, &mut shared, &volumes, steps).await?;
        steps.done("agent greeted");
        let mut sandbox = Self::new(config, started, shared, size, cgroup);
        sandbox.networked = AtomicBool::new(!links.is_empty());
        let volumes = (0..volumes.len()).collect();
        let built = async {
            sandbox.configure(&plan.spec).await?;
            sandbox.configure_network(&links).await?;
            steps.done("sandbox configured");
            sandbox.build(first, plan, ends, volumes).await
        };
        tokio::select! {
            built = built => built?,
            // A guest that has lost its file server waits for it, and says nothing.
            exit = sandbox.ended() => {
                return Err(Error::Machine(format!("create container {}: {exit}", first.id)));
            }
        }
        steps.done("container created");
        let sandbox = Arc::new(sandbox);
        if let Some(inlet) = links.inlet.take() {
            sandbox.carry_ports(inlet)?;
        }
        sandbox.watch_links(links);
        Ok(sandbox)
    }

    /// Starts a machine for a pod, whose containers are to come ([`Self::add`]). On failure
    /// nothing is left.
    pub async fn create_pod(mut config: SandboxConfig, pod: &PodRequest) -> Result<Arc<Self>> {
        let steps = Steps::new();
        let spec = pod.spec()?;
        config.settings = config.settings.asked_by(&spec, false)?;
        let size = sizing::size(&spec, &config.settings);
        let cgroup = cgroup::enter(&config, size.memory);
        let mut shared = Some(VirtioFs::start(&[], &config.run_dir).await?);
        let egress = config.settings.egress();
        let mut links = Links::take(&config.network, &spec, size.vcpus, egress).await?;
        steps.done("links taken");
        let parts = start::Parts {
            size,
            nics: std::mem::take(&mut links.nics),
            disks: Vec::new(),
            shares: shared.iter().map(VirtioFs::share).collect(),
        };
        let started = machine(&config, parts, &mut shared, &[], steps).await?;
        steps.done("agent greeted");
        let mut sandbox = Self::new(config, started, shared, size, cgroup);
        sandbox.networked = AtomicBool::new(!links.is_empty());
        sandbox.pod = Some(pod.parts());
        sandbox.configure(&spec).await?;
        sandbox.configure_network(&links).await?;
        steps.done("sandbox configured");
        let sandbox = Arc::new(sandbox);
        if let Some(inlet) = links.inlet.take() {
            sandbox.carry_ports(inlet)?;
        }
        sandbox.watch_links(links);
        Ok(sandbox)
    }

    /// Builds another container. On failure nothing of it is left.
    pub async fn add(self: &Arc<Self>, request: &ContainerRequest) -> Result<()> {
        let steps = Steps::new();
        if lock(&self.containers).contains_key(&request.id) {
            return Err(Error::AlreadyExists(format!(
                "create container {}: there is one of this name in the sandbox",
                request.id
            )));
        }
        let plan = Plan::new(request, self.next_disk())?;
        let ends = ClientEnds::open(&request.stdio)?;
        let limits = Limits::of(&plan.spec);
        self.make_room(&request.id, limits).await;
        // No machine is saved between what it is given and what is known of it.
        let whole = self.saving.read().await;
        let disk = plan.image().map(|root| root.disk.clone());
        if let Some(disk) = &disk {
            self.attach(disk).await?;
        }
        let built = async {
            let volumes = self.share(&request.id, &plan.volumes()).await?;
            let built = self.build(request, plan, ends, volumes.clone()).await;
            if built.is_err() {
                self.unshare(&volumes).await;
            }
            built
        };
        let built = built.await;
        if let (Some(disk), Err(_)) = (&disk, &built) {
            self.release(&disk.serial).await;
        }
        drop(whole);
        match built {
            // It may have given back meanwhile what nobody was known to need.
            Ok(()) => self.make_room(&request.id, limits).await,
            // Nor is the room needed.
            Err(_) => self.give_back_later(),
        }
        steps.done("container created");
        built
    }

    /// Shows the guest directories and files of the host. On failure, none.
    async fn share(&self, id: &str, volumes: &[Volume]) -> Result<Vec<usize>> {
        let mut numbers = Vec::with_capacity(volumes.len());
        if volumes.is_empty() {
            return Ok(numbers);
        }
        let Some(shared) = &self.shared else {
            return Err(Error::Invalid(format!(
                "create container {id}: it needs directories of the host, and its machine was started without a way to share them"
            )));
        };
        for volume in volumes {
            match shared.add(volume).await {
                Ok(number) => numbers.push(number),
                Err(e) => {
                    self.unshare(&numbers).await;
                    return Err(e.into());
                }
            }
        }
        Ok(numbers)
    }

    async fn unshare(&self, volumes: &[usize]) {
        let Some(shared) = &self.shared else { return };
        for &number in volumes {
            if let Err(e) = shared.remove(number).await {
                warn!("{e}");
            }
        }
    }

    /// Builds a container whose disk the machine has, and whose volumes it sees under
    /// these numbers, in the order of [`Plan::volumes`].
    pub(crate) async fn build(
        &self,
        request: &ContainerRequest,
        plan: Plan,
        ends: ClientEnds,
        volumes: Vec<usize>,
    ) -> Result<()> {
        let id = &request.id;
        let mut paths = Vec::new();
        let mut storages: Vec<Storage> = Vec::new();
        if let Some(shared) = &self.shared {
            storages.push(shared.storage());
            for &number in &volumes {
                storages.push(shared.volume_storage(number));
                paths.push(shared.guest_path(number));
            }
        }
        let mut paths = paths.into_iter();
        let (root, disk) = match &plan.root {
            Root::Image(rootfs) => {
                storages.extend(rootfs.storages.iter().cloned());
                (rootfs.guest_path.clone(), Some(rootfs.disk.serial.clone()))
            }
            Root::Directory(_) => {
                let root = paths.next().unwrap_or_default();
                (root.display().to_string(), None)
            }
        };
        let mut binds: Vec<_> = plan.binds.iter().map(|b| b.mount).zip(paths).collect();
        let first = self.first();
        if let Some(shm) = &plan.shm {
            let owner = match plan.role {
                Role::First => Some(id),
                _ => first.as_ref().map(|first| &first.guest_id),
            };
            if plan.role == Role::First {
                storages.push(pod::shm_storage(id, &shm.source)?);
            }
            if let Some(owner) = owner {
                binds.push((shm.mount, pod::shm_path(owner)));
            }
        }
        let log = match request.own {
            true => open_log(&plan.spec)?,
            false => None,
        };
        let files = match plan.role {
            Role::First => Vec::new(),
            _ if !request.named => Vec::new(),
            _ => guest_spec::files(&plan.spec, id, self.pod.as_ref(), self.names.get()),
        };
        let place = guest_spec::Place {
            root: &root,
            binds: &binds,
            files: &files,
            role: plan.role,
            first: first.as_ref(),
            guests_shm: self.pod.is_some() && plan.role == Role::Member,
        };
        let limits = Limits::of(&plan.spec);
        let spec = guest_spec::translate(plan.spec, id, &place)?;
        let process = Arc::new(Process::new(request.stdio.clone()));
        let stdio = self.open_streams(&process, ends, log).await?;
        let create = CreateContainerRequest {
            container_id: id.clone(),
            spec,
            storages,
            stdio: Some(stdio).into(),
            files: files.into_iter().map(|(file, _)| file).collect(),
            ..Default::default()
        };
        let reply = self
            .call(
                "create the container",
                self.agent.create_container(soon(), &create).await,
            )
            .await?;
        process.set_pid(reply.pid);
        let container = Container {
            bundle: request.bundle.clone(),
            guest_id: id.clone(),
            restored: false,
            disk,
            role: plan.role,
            limits: StdMutex::new(limits),
            volumes,
            init: process,
            execs: StdMutex::default(),
        };
        lock(&self.containers).insert(id.clone(), Arc::new(container));
        Ok(())
    }

    /// The pod's first container, while it runs.
    fn first(&self) -> Option<First> {
        let containers = lock(&self.containers);
        let first = containers.values().find(|c| c.role == Role::First)?;
        let there = !matches!(first.init.state(), ProcessState::Stopped(_));
        there.then(|| First {
            guest_id: first.guest_id.clone(),
            pid: first.init.pid(),
        })
    }

    /// Removes an ended container, or forgets an ended exec. Returns its PID and
    /// its end.
    pub async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<(u32, ExitInfo)> {
        let process = self.process(id, exec_id)?;
        let exit = match process.state() {
            ProcessState::Stopped(exit) => exit,
            // Never started: deleting it is how it ends.
            ProcessState::Created => ExitInfo {
                code: 0,
                at: now_ns(),
                oom_killed: false,
                error: None,
            },
            _ => {
                return Err(Error::WrongState(format!(
                    "delete {id}: it is running; kill it first"
                )));
            }
        };
        let pid = process.pid();
        let _whole = self.saving.read().await;
        let container = self.container(id)?;
        if !exec_id.is_empty() {
            lock(&container.execs).remove(exec_id);
            let request = container.process_request(exec_id);
            if let Err(e) = self.agent.remove_process(soon(), &request).await {
                debug!(exec_id, "forget the process: {e}");
            }
            return Ok((pid, exit));
        }
        let removed = self.remove(&container).await;
        // The guest may have failed; what it had of the host's goes all the same.
        self.unshare(&container.volumes).await;
        // The last one's goes with the machine.
        let others = self.pod.is_some() || !lock(&self.containers).is_empty();
        if let Some(disk) = container.disk.as_ref().filter(|_| others) {
            self.release(disk).await;
        }
        self.give_back_later();
        removed.map(|()| (pid, exit))
    }

    async fn remove(&self, container: &Container) -> Result<()> {
        lock(&self.containers).retain(|_, other| !std::ptr::eq(&**other, container));
        let request = container.request();
        let removed = timeout(FAREWELL, self.agent.remove_container(soon(), &request)).await;
        match removed {
            Ok(Err(e)) if !agent::is_broken(&e) => Err(fault("remove the container", e)),
            _ => Ok(()),
        }
    }

    /// Knows nothing of a container any more.
    pub(crate) fn forget(&self, id: &str) {
        lock(&self.containers).remove(id);
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("no container {id} in this sandbox")))
    }

    /// Names of its containers.
    pub fn container_ids(&self) -> Vec<String> {
        lock(&self.containers).keys().cloned().collect()
    }

    pub(crate) fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>> {
        let container = self.container(id)?;
        if exec_id.is_empty() {
            return Ok(container.init.clone());
        }
        Ok(container.exec(id, exec_id)?.process)
    }
}
