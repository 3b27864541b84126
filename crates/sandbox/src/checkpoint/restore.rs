//! A sandbox that goes on where a container was saved.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex as StdMutex},
};

use oci_spec::runtime::Spec;
use walnut_machine::{Disk, Driver, DriverChoice, Programs};
use walnut_protocol::agent::{AdoptContainerRequest, Empty};

use super::{Attached, Checkpoint, file::Content, files};
use crate::{
    ContainerRequest, Error, Result, Sandbox, SandboxConfig, Shape,
    agent::soon,
    cgroup,
    containers::Container,
    guest_spec,
    pod::Role,
    process::Process,
    sandbox::open_log,
    sizing::Limits,
    start::{self, Started, Steps},
    stdio::ClientEnds,
    template::{self, Stamp},
};

/// What is to go on, and with what.
struct Plan {
    saved: Checkpoint,
    spec: Spec,
    disks: Vec<Disk>,
}

impl Plan {
    /// Refuses a request that the saved container cannot fulfil.
    fn new(config: &SandboxConfig, request: &ContainerRequest, from: &Path) -> Result<Self> {
        let saved = Checkpoint::load(from)?;
        let spec = guest_spec::load(&request.bundle)?;
        let refuse = |why: String| {
            Err(Error::Invalid(format!(
                "restore container {} from {}: {why}",
                request.id,
                from.display()
            )))
        };
        if let Some(what) = difference(&saved.container.spec, &spec) {
            return refuse(format!(
                "its {what} must be what was saved, for its processes run already"
            ));
        }
        if request.stdio.terminal != saved.container.terminal {
            let has = if saved.container.terminal { "a" } else { "no" };
            return refuse(format!("it has {has} terminal"));
        }
        if request.stdio.stdin.is_some() && !saved.container.stdin {
            return refuse("its standard input was not open when it was saved".into());
        }
        let [mount] = request.rootfs.as_slice() else {
            return refuse("its root file system must be one mount".into());
        };
        if mount.kind != "erofs" {
            return refuse("its root file system must be an EROFS image".into());
        }
        // Files that the request and this installation name: no path of the record's is
        // opened.
        let rehearsal = config.assets.rehearsal();
        let mut disks = Vec::new();
        for disk in &saved.disks {
            let own = disk.serial == saved.container.disk;
            let path = if own { &mount.source } else { &rehearsal };
            if !Stamp::of(path)?.same_content(&disk.file) {
                return refuse(format!(
                    "{} is not the image file that it was saved with",
                    path.display()
                ));
            }
            disks.push(Disk {
                serial: disk.serial.clone(),
                path: path.clone(),
                read_only: true,
            });
        }
        Ok(Self { saved, spec, disks })
    }
}

/// What processes that run already cannot be given anew, and differs; the rest is this
/// container's own.
fn difference(saved: &Spec, wanted: &Spec) -> Option<&'static str> {
    let read_only = |spec: &Spec| {
        let root = spec.root().as_ref();
        root.and_then(|root| root.readonly()).unwrap_or(false)
    };
    [
        ("process", saved.process() == wanted.process()),
        ("mounts", saved.mounts() == wanted.mounts()),
        ("Linux settings", saved.linux() == wanted.linux()),
        ("root", read_only(saved) == read_only(wanted)),
    ]
    .into_iter()
    .find_map(|(what, same)| (!same).then_some(what))
}

/// The driver that a checkpoint is of, if that is the one that is asked for.
fn driver(config: &SandboxConfig, saved: &Checkpoint) -> Result<Box<dyn Driver>> {
    let of: DriverChoice = saved.shape.driver.parse()?;
    let asked = config.settings.machine.driver;
    if asked != DriverChoice::Auto && asked != of {
        return Err(Error::Invalid(format!(
            "restore container {}: it was saved by the driver {}, and {} cannot read that",
            config.id,
            of.as_str(),
            asked.as_str()
        )));
    }
    let programs = Programs {
        cache: config.cache.clone(),
        ..Programs::new(&config.assets.dir)
    };
    Ok(walnut_machine::driver(of, &programs)?)
}

impl Sandbox {
    /// Starts a machine where the one stood that was saved to `from`. The container in it
    /// stands still until [`Sandbox::start`]. On failure nothing is left.
    pub async fn restore(
        config: SandboxConfig,
        first: &ContainerRequest,
        from: &Path,
    ) -> Result<Self> {
        let steps = Steps::new();
        let Plan { saved, spec, disks } = Plan::new(&config, first, from)?;
        let ends = ClientEnds::open(&first.stdio)?;
        let driver = driver(&config, &saved)?;
        let span = saved.shape.span();
        let size = span.boot;
        let mut machine = template::machine(&config.run_dir, &config.assets, span);
        machine.id.clone_from(&config.id);
        machine.spare_disks = 0;
        let shape = Shape::of(driver.as_ref(), &machine)?;
        if shape.as_ref() != Some(&saved.shape) {
            let why = saved.stale();
            return Err(Error::Invalid(format!(
                "restore container {} from {}: this host cannot go on from it: {}",
                first.id,
                from.display(),
                why.unwrap_or_else(|| "it is of another machine".into())
            )));
        }
        let files = files(from);
        let verify = {
            let (saved, files) = (saved.clone(), files.clone());
            move || -> Result<()> {
                saved.state.verify(&files.state, Content::Plain)?;
                saved.memory.verify(&files.memory, Content::Pages)
            }
        };
        tokio::task::spawn_blocking(verify)
            .await
            .unwrap_or_else(|e| Err(Error::Machine(format!("read the checkpoint: {e}"))))?;
        steps.done("checkpoint verified");
        machine.disks.clone_from(&disks);
        let cgroup = cgroup::enter(&config, size.memory);
        let (machine, agent) = start::clone(driver.as_ref(), machine, &files, None, steps).await?;
        let started = Started {
            driver: driver.name(),
            machine,
            agent,
            template: None,
            wanted: None,
            max: span.max,
            shape,
            disks: disks.into_iter().map(Attached::new).collect(),
        };
        let sandbox = Self::new(config, started, None, size, cgroup);
        // Before anything of the container's runs: its randomness, its time.
        sandbox.configure(&spec).await?;
        let container = sandbox.adopt_clone(first, &saved, &spec, ends).await?;
        let containers = HashMap::from([(first.id.clone(), Arc::new(container))]);
        *sandbox.containers.lock().unwrap_or_else(|e| e.into_inner()) = containers;
        steps.done("container adopted");
        Ok(sandbox)
    }

    /// Gives the container that goes on its streams and its name.
    async fn adopt_clone(
        &self,
        request: &ContainerRequest,
        saved: &Checkpoint,
        spec: &Spec,
        ends: ClientEnds,
    ) -> Result<Container> {
        let guest_id = saved.container.guest_id.clone();
        let process = Arc::new(Process::new(request.stdio.clone()));
        let log = match request.own {
            true => open_log(spec)?,
            false => None,
        };
        let stdio = self.open_streams(&process, ends, log).await?;
        let files = guest_spec::files(spec, &guest_id, None, None);
        let adopt = AdoptContainerRequest {
            container_id: guest_id.clone(),
            stdio: Some(stdio).into(),
            hostname: spec.hostname().clone().unwrap_or_default(),
            files: files.into_iter().map(|(file, _)| file).collect(),
            ..Default::default()
        };
        let reply = self.agent.adopt_container(soon(), &adopt).await;
        let reply = self.call("go on with the container", reply).await?;
        process.set_pid(reply.pid);
        Ok(Container {
            bundle: request.bundle.clone(),
            guest_id,
            restored: true,
            disk: Some(saved.container.disk.clone()),
            role: Role::Alone,
            limits: StdMutex::new(Limits::of(spec)),
            volumes: Vec::new(),
            init: process,
            execs: StdMutex::default(),
        })
    }

    /// Lets a restored container run.
    pub(crate) async fn let_go_on(&self, container: &Container) -> Result<()> {
        let open = self.agent.release_streams(soon(), &Empty::default()).await;
        self.call("open the container's streams", open).await?;
        let thawed = self
            .agent
            .resume_container(soon(), &container.request())
            .await;
        self.call("let the container go on", thawed).await?;
        Ok(())
    }
}
