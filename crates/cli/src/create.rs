//! A new container on disk, and the supervisor that takes it over.

mod join;
mod names;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::DirBuilderExt, net::UnixListener, process::CommandExt},
    },
    path::PathBuf,
    process::Child,
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use oci_spec::{image::Config, runtime::Spec};
use walnut_image::{Image, Lease, Store};
use walnut_sandbox::{
    ANNOTATION_EGRESS, ANNOTATION_LOG, ANNOTATION_TEMPLATE, Assets, Attachments, Checkpoint, Error,
    Handover, ImageRef, Layout, Lock, LogTerms, NamedVolumes, Pools, Record, Settings, Status,
    Terms, Wanted, networks::Networks, now_ns,
};

pub(crate) use join::{Host, check_outlived};
pub(crate) use names::{check_free, check_name, find_live};

use self::names::random_name;
use crate::{args::ContainerArgs, saved, spec, supervisor, values::Cpuset};

/// Largest record of a new container, bytes: half of what is read of one.
const RECORD_MAX: usize = 512 << 10;

/// A container that exists on disk and has no supervisor yet. Dropping it
/// removes it, unless it was there before.
#[derive(Debug)]
pub(crate) struct NewContainer {
    pub(crate) record: Record,
    spec: Spec,
    /// From where another was saved.
    goes_on: bool,
    /// It is on networks.
    networked: bool,
    layout: Layout,
    lock: Option<Lock>,
    lease: Option<Lease>,
    /// What it was, if it was there before.
    before: Option<Record>,
}

/// What a new container is made of.
struct New {
    id: String,
    image: ImageRef,
    command: Vec<String>,
    spec: Spec,
    terms: Terms,
    goes_on: bool,
    attachments: Option<Attachments>,
}

fn random() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("make an ID")?;
    Ok(bytes)
}

pub(crate) fn new_id() -> Result<String> {
    Ok(random()?.iter().map(|b| format!("{b:02x}")).collect())
}

/// A container with a supervisor, which ends it if this is dropped before
/// [`Supervised::release`].
#[derive(Debug)]
pub(crate) struct Supervised {
    pub(crate) record: Record,
    /// Where it was started for this container alone.
    shim: Option<Child>,
    holder: Option<OwnedFd>,
}

impl NewContainer {
    /// Makes the directories, the bundle and the record.
    pub(crate) fn create(
        layout: &Layout,
        args: &ContainerArgs,
        image: &Image,
        mut attachments: Option<Attachments>,
        host: Option<Host>,
    ) -> Result<Self> {
        let lease = image.lease().context("use the image")?;
        let id = new_id()?;
        let empty = Config::default();
        let config = image.config.config().as_ref().unwrap_or(&empty);
        let dir = layout.container(&id);
        let hostname = match (&args.hostname, &host) {
            (_, Some(host)) => host.hostname.clone(),
            (Some(name), None) => name.clone(),
            (None, None) => id[..12].to_owned(),
        };
        if let Some(attachments) = &mut attachments {
            attachments.names.hostname.clone_from(&hostname);
        }
        let mut terms = spec::terms(args, config.labels().as_ref(), image.health.as_ref())?;
        let log = dir.join("container.log");
        let own = spec::Own {
            id: &id,
            hostname: &hostname,
            log: terms.log.kept.then_some(&log),
            volumes: &NamedVolumes::new(layout),
        };
        let (spec, volumes) = spec::build(args, config, &own)?;
        terms.volumes.clone_from(&volumes);
        terms.rootfs = Some(image.rootfs.clone());
        terms.joins = host.map(|host| host.id);
        let image = ImageRef {
            name: args.image.clone(),
            id: image.id.to_string(),
        };
        let command = spec::command(args, config)?;
        let new = New {
            id,
            image,
            command,
            spec,
            terms,
            goes_on: false,
            attachments,
        };
        Self::place(layout, args, lease, new).inspect_err(|_| {
            NamedVolumes::new(layout).remove_anonymous(layout, &volumes);
        })
    }

    /// The same for one that goes on where another was saved.
    pub(crate) fn go_on(
        layout: &Layout,
        args: &ContainerArgs,
        saved: &Checkpoint,
        lease: Lease,
        image: ImageRef,
    ) -> Result<Self> {
        let id = new_id()?;
        let mut spec = saved.container.spec.clone();
        spec.set_hostname(Some(saved::hostname(args, saved, &id)));
        let log = layout.container(&id).join("container.log");
        let mut annotations = spec.annotations().clone().unwrap_or_default();
        annotations.insert(ANNOTATION_LOG.into(), log.display().to_string());
        spec.set_annotations(Some(annotations));
        if let Some(signal) = args.stop_signal {
            spec::set_stop_signal(&mut spec, signal);
        }
        let command = saved.command().to_vec();
        let new = New {
            id,
            image,
            command,
            spec,
            terms: spec::terms(args, None, None)?,
            goes_on: true,
            attachments: None,
        };
        Self::place(layout, args, lease, new)
    }

    fn place(layout: &Layout, args: &ContainerArgs, lease: Lease, new: New) -> Result<Self> {
        let New {
            id,
            image,
            command,
            spec,
            terms,
            goes_on,
            mut attachments,
        } = new;
        let record = Record {
            version: 1,
            name: args.name.clone().map_or_else(random_name, Ok)?,
            image,
            command,
            status: Status::Creating,
            created_at: now_ns(),
            started_at: None,
            finished_at: None,
            exit_code: None,
            error: None,
            oom_killed: false,
            auto_remove: args.rm,
            terminal: args.tty,
            stop_signal: spec::stop_signal(&spec)?,
            driver: None,
            memory: None,
            vcpus: None,
            template: None,
            shim_pid: None,
            terms,
            restarts: 0,
            stopped: false,
            health: None,
            outlived: false,
            id,
        };
        check_name(&record.name)?;
        check_size(&record)?;
        if let Some(attachments) = &mut attachments {
            attachments.names.name.clone_from(&record.name);
        }
        let spec_json = serde_json::to_vec(&spec)?;
        let lock = place(layout, &record, &spec_json, attachments.as_ref())?;
        Ok(Self {
            record,
            spec,
            goes_on,
            networked: attachments.is_some(),
            layout: layout.clone(),
            lock: Some(lock),
            lease: Some(lease),
            before: None,
        })
    }

    /// One that was made before and is to be started now.
    pub(crate) fn again(layout: &Layout, store: &Store, record: &Record) -> Result<Self> {
        let dir = layout.container(&record.id);
        let Some(lock) = Lock::try_take(&dir.join("lock"))? else {
            bail!(Error::WrongState(format!(
                "container {} is being started or stopped; try again",
                record.name
            )));
        };
        let path = dir.join("config.json");
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let spec: Spec =
            serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?;
        let Some(rootfs) = &record.terms.rootfs else {
            bail!(
                "start {}: it goes on from a checkpoint, or an older Walnut made it; run its image again ({})",
                record.name,
                record.image.name
            );
        };
        let lease = store.lease(rootfs).with_context(|| {
            format!(
                "start {}: its image {} is gone",
                record.name, record.image.name
            )
        })?;
        let networked = Attachments::again(&dir)?;
        // What a killed supervisor has left.
        let run_dir = layout.sandbox(&record.id);
        let _ = fs::remove_dir_all(&run_dir);
        make_run_dir(run_dir)?;
        let before = Record::load(&dir)?;
        let record = Record::change(&dir, |record| {
            record.status = Status::Creating;
            record.terms.kept = true;
            (record.started_at, record.finished_at) = (None, None);
            (record.exit_code, record.error, record.oom_killed) = (None, None, false);
            (record.stopped, record.restarts, record.health) = (false, 0, None);
            record.outlived = false;
        })?;
        Ok(Self {
            record,
            spec,
            goes_on: false,
            networked,
            layout: layout.clone(),
            lock: Some(lock),
            lease: Some(lease),
            before: Some(before),
        })
    }

    /// Leaves it as it is, for somebody to start it.
    pub(crate) fn rest(mut self) -> Result<Record> {
        let dir = self.layout.container(&self.record.id);
        let record = Record::change(&dir, |record| {
            record.status = Status::Created;
            record.terms.kept = true;
        })?;
        // It is supervised by nobody, and has nothing of what runs.
        let _ = fs::remove_dir_all(self.layout.sandbox(&record.id));
        self.lock = None;
        Ok(record)
    }

    /// Starts the supervisor, with the Task API's socket listening already.
    pub(crate) fn supervise(mut self) -> Result<Supervised> {
        if let Some(host) = self.record.terms.joins.clone() {
            return self.join(&host);
        }
        let assets = Assets::find()?;
        let cpus = processors(&self.record.terms)?;
        let run_dir = self.layout.sandbox(&self.record.id);
        let socket = self.layout.task_socket(&self.record.id);
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("create socket {}", socket.display()))?;
        let (lease, holder) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .context("make the supervisor's lease")?;
        let dir = self.layout.container(&self.record.id);
        let log = File::create(dir.join("shim.log")).context("create the supervisor's log")?;
        let lock = self.lock.take().context("the container's lock is taken")?;
        let image = self.lease.take();
        if let Some(image) = &image
            && !self.goes_on
            && let Some(wanted) = pooled(&self.record.terms, &self.spec)?
            && (!self.networked
                // Links of one that stands by keep to the node's rules alone.
                || annotation(&self.spec, ANNOTATION_EGRESS).is_none()
                    && wanted.takes_links(&assets, &self.layout.run)?)
        {
            let handover = Handover {
                id: self.record.id.clone(),
                container_dir: dir.clone(),
                run_dir: run_dir.clone(),
            };
            let fds = [
                listener.as_fd(),
                lock.as_fd(),
                lease.as_fd(),
                log.as_fd(),
                image.file().as_fd(),
            ];
            let pools = Pools::new(&self.layout.state, &self.layout.run);
            if pools.take(&wanted, &assets.dir, &handover, &fds)?.is_some() {
                return Ok(Supervised {
                    record: self.record.clone(),
                    shim: None,
                    holder: Some(holder),
                });
            }
        }
        let mut command = supervisor::command(&assets);
        command
            .arg("serve")
            .args(["--id", &self.record.id])
            .arg("--container-dir")
            .arg(&dir)
            .arg("--run-dir")
            .arg(&run_dir)
            .args(["--socket-fd", &listener.as_raw_fd().to_string()])
            .args(["--lock-fd", &lock.as_fd().as_raw_fd().to_string()])
            .args(["--lease-fd", &lease.as_raw_fd().to_string()])
            .stderr(log);
        if let Some(driver) = &self.record.terms.driver {
            command.env("WALNUT_DRIVER", driver);
        }
        let mut inherit = vec![
            listener.as_raw_fd(),
            lock.as_fd().as_raw_fd(),
            lease.as_raw_fd(),
        ];
        inherit.extend(image.as_ref().map(|i| i.file().as_raw_fd()));
        // SAFETY: between fork and exec only async-signal-safe calls are made, on
        // descriptors that the parent keeps open until the child has executed.
        unsafe {
            command.pre_exec(move || {
                for fd in &inherit {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                // All that it starts runs there too.
                match &cpus {
                    Some(cpus) => Ok(sched_setaffinity(Pid::from_raw(0), cpus)?),
                    None => Ok(()),
                }
            });
        }
        supervisor::session(&mut command);
        let shim = command
            .spawn()
            .with_context(|| format!("start the supervisor {}", assets.shim().display()))?;
        Ok(Supervised {
            record: self.record.clone(),
            shim: Some(shim),
            holder: Some(holder),
        })
    }
}

impl NewContainer {
    /// Hands it to the supervisor of another one's machine.
    fn join(mut self, host: &str) -> Result<Supervised> {
        let (Some(lock), Some(image)) = (&self.lock, &self.lease) else {
            bail!("start {}: it is supervised already", self.record.name);
        };
        let holder = join::join(&self.layout, &self.record, host, lock, image)?;
        self.lock = None;
        Ok(Supervised {
            record: self.record.clone(),
            shim: None,
            holder: Some(holder),
        })
    }
}

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a String> {
    spec.annotations().as_ref()?.get(name)
}

/// The machine that could stand by for the container, if one may.
fn pooled(terms: &Terms, spec: &Spec) -> Result<Option<Wanted>> {
    let mut mounts = spec.mounts().iter().flatten();
    let shares = mounts.any(|mount| mount.typ().as_deref() == Some("bind"));
    let boots = annotation(spec, ANNOTATION_TEMPLATE).is_some();
    let mut settings = Settings::load()?;
    if shares || boots || terms.cpuset.is_some() || !settings.machine.templates {
        return Ok(None);
    }
    if let Some(driver) = &terms.driver {
        settings.machine.driver = driver.parse()?;
    }
    Ok(Some(Wanted::for_container(&settings, spec)))
}

/// The processors that its machine is to run on, if that is said.
fn processors(terms: &Terms) -> Result<Option<CpuSet>> {
    let Some(text) = &terms.cpuset else {
        return Ok(None);
    };
    let wanted: Cpuset = text.parse().map_err(anyhow::Error::msg)?;
    let here = sched_getaffinity(Pid::from_raw(0)).context("ask for this host's processors")?;
    let mut set = CpuSet::new();
    for number in wanted.numbers() {
        if !here.is_set(number).unwrap_or(false) {
            bail!("--cpuset-cpus {text}: there is no processor {number} to run on here");
        }
        set.set(number)
            .with_context(|| format!("--cpuset-cpus {text}"))?;
    }
    Ok(Some(set))
}

impl Drop for NewContainer {
    fn drop(&mut self) {
        // Without the lock it is the supervisor's.
        let Some(lock) = &self.lock else { return };
        match &self.before {
            Some(before) => {
                let dir = self.layout.container(&self.record.id);
                let _ = Record::change(&dir, |record| *record = before.clone());
                let _ = fs::remove_dir_all(self.layout.sandbox(&self.record.id));
            }
            None => {
                let _ = walnut_sandbox::remove(&self.layout, &self.record.id, lock);
                let volumes = NamedVolumes::new(&self.layout);
                volumes.remove_anonymous(&self.layout, &self.record.terms.volumes);
            }
        }
    }
}

impl Supervised {
    /// Lets the container outlive this program.
    pub(crate) fn release(&mut self) -> Result<()> {
        if let Some(holder) = self.holder.take() {
            nix::unistd::write(&holder, b"d").context("let the container go its own way")?;
        }
        Ok(())
    }

    /// Ends the container, unless it has been released.
    pub(crate) fn abandon(&mut self) {
        self.holder = None;
    }

    /// How the supervisor ended, if it has.
    pub(crate) fn shim_end(&mut self) -> Option<String> {
        let status = self.shim.as_mut()?.try_wait().ok().flatten()?;
        (!status.success()).then(|| status.to_string())
    }
}

/// Puts the container's directory in place, whole and locked, under a name
/// that is free.
fn place(
    layout: &Layout,
    record: &Record,
    spec: &[u8],
    attachments: Option<&Attachments>,
) -> Result<Lock> {
    let _names = Lock::take(&layout.state.join("names.lock"))?;
    check_free(layout, &record.name)?;
    let networks = Networks::new(&layout.networks());
    for link in attachments.iter().flat_map(|a| &a.links) {
        // Until here somebody may have removed it.
        networks.find(link.network())?;
    }
    let new = layout.containers().join(format!("new-{}", record.id));
    let made = (|| -> Result<Lock> {
        fs::DirBuilder::new().mode(0o700).create(&new)?;
        fs::write(new.join("config.json"), spec)?;
        record.store(&new)?;
        if let Some(attachments) = attachments {
            attachments.wish(&new)?;
        }
        if record.terms.log != LogTerms::default() {
            record.terms.log.store(&new.join("container.log"))?;
        }
        let volumes = NamedVolumes::new(layout);
        for volume in &record.terms.volumes {
            // Until here somebody may have removed it.
            volumes.ensure(&volume.name, BTreeMap::new(), volume.anonymous)?;
        }
        let lock = Lock::try_take(&new.join("lock"))?.context("somebody holds the new lock")?;
        make_run_dir(layout.sandbox(&record.id))?;
        fs::rename(&new, layout.container(&record.id))?;
        Ok(lock)
    })();
    if made.is_err() {
        let _ = fs::remove_dir_all(&new);
        let _ = fs::remove_dir_all(layout.sandbox(&record.id));
    }
    made.with_context(|| format!("create the container in {}", layout.containers().display()))
}

fn make_run_dir(path: PathBuf) -> Result<()> {
    fs::DirBuilder::new().mode(0o700).create(&path)?;
    // Known to belong to a container that is being put in place.
    File::create(path.join("bundle"))?;
    Ok(())
}

/// Refuses a record that grows too large to be read again: an image says what it likes.
fn check_size(record: &Record) -> Result<()> {
    let size = serde_json::to_vec(record)?.len();
    if size > RECORD_MAX {
        bail!(
            "the command, the labels and the check of the container have {size} bytes, more than {RECORD_MAX}"
        );
    }
    Ok(())
}
