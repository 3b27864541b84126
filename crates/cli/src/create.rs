//! A new container on disk, and the supervisor that takes it over.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::DirBuilderExt, net::UnixListener, process::CommandExt},
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use oci_spec::image::Config;
use walnut_image::{Image, Lease};
use walnut_sandbox::{Assets, Error, ImageRef, Layout, Lock, Record, Status, find, list, now_ns};

use crate::{args::RunArgs, spec};

/// A container that exists on disk and has no supervisor yet. Dropping it
/// removes it.
#[derive(Debug)]
pub(crate) struct NewContainer {
    pub(crate) record: Record,
    layout: Layout,
    lock: Option<Lock>,
    lease: Option<Lease>,
}

/// A container with a supervisor, which ends it if this is dropped before
/// [`Supervised::release`].
#[derive(Debug)]
pub(crate) struct Supervised {
    pub(crate) record: Record,
    pub(crate) shim: Child,
    holder: Option<OwnedFd>,
}

impl NewContainer {
    /// Makes the directories, the bundle and the record.
    pub(crate) fn create(layout: &Layout, args: &RunArgs, image: &Image) -> Result<Self> {
        let lease = image.lease().context("use the image")?;
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).context("make an ID")?;
        let id: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let empty = Config::default();
        let config = image.config.config().as_ref().unwrap_or(&empty);
        let dir = layout.container(&id);
        let hostname = match &args.hostname {
            Some(name) => name.clone(),
            None => id[..12].to_owned(),
        };
        let spec = spec::build(args, config, &hostname, &dir.join("container.log"))?;
        let record = Record {
            version: 1,
            name: args.name.clone().unwrap_or_else(|| random_name(&bytes)),
            image: ImageRef {
                name: args.image.clone(),
                id: image.id.to_string(),
            },
            command: spec::command(args, config)?,
            status: Status::Creating,
            created_at: now_ns(),
            started_at: None,
            finished_at: None,
            exit_code: None,
            error: None,
            oom_killed: false,
            auto_remove: args.rm,
            terminal: args.tty,
            driver: None,
            memory: None,
            vcpus: None,
            template: None,
            shim_pid: None,
            id,
        };
        check_name(&record.name)?;
        let lock = place(layout, &record, &serde_json::to_vec(&spec)?)?;
        Ok(Self {
            record,
            layout: layout.clone(),
            lock: Some(lock),
            lease: Some(lease),
        })
    }

    /// Starts the supervisor, with the Task API's socket listening already.
    pub(crate) fn supervise(mut self, args: &RunArgs) -> Result<Supervised> {
        let assets = Assets::find()?;
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
        let mut command = Command::new(assets.shim());
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
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| {
                let name = name.to_string_lossy();
                name == "PATH" || name.starts_with("WALNUT_")
            }))
            .env("WALNUT_LIB", &assets.dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(driver) = &args.driver {
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
                // A session of its own: ^C is for the command in front.
                if libc::setsid() < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let shim = command
            .spawn()
            .with_context(|| format!("start the supervisor {}", assets.shim().display()))?;
        Ok(Supervised {
            record: self.record.clone(),
            shim,
            holder: Some(holder),
        })
    }
}

impl Drop for NewContainer {
    fn drop(&mut self) {
        // Without the lock it is the supervisor's.
        if self.lock.is_some() {
            let _ = walnut_sandbox::remove(&self.layout, &self.record.id);
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
        let status = self.shim.try_wait().ok().flatten()?;
        (!status.success()).then(|| status.to_string())
    }
}

/// Puts the container's directory in place, whole and locked, under a name
/// that is free.
fn place(layout: &Layout, record: &Record, spec: &[u8]) -> Result<Lock> {
    let _names = Lock::take(&layout.state.join("names.lock"))?;
    if let Some(other) = list(layout)?.iter().find(|r| r.name == record.name) {
        bail!(
            "the name {:?} is in use by container {}; remove it (walnut rm {}) or choose another",
            record.name,
            other.short_id(),
            record.name
        );
    }
    let new = layout.containers().join(format!("new-{}", record.id));
    let made = (|| -> Result<Lock> {
        fs::DirBuilder::new().mode(0o700).create(&new)?;
        fs::write(new.join("config.json"), spec)?;
        record.store(&new)?;
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

fn check_name(name: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !starts || name.len() < 2 || name.len() > 128 || !name.chars().all(fine) {
        bail!("--name {name:?}: use 2 to 128 of [a-zA-Z0-9_.-], beginning with a letter or digit");
    }
    Ok(())
}

/// An adjective and a nut, with two digits that make a clash unlikely.
fn random_name(random: &[u8; 16]) -> String {
    const ADJECTIVES: [&str; 16] = [
        "amber", "brisk", "calm", "deft", "eager", "fresh", "gentle", "hardy", "keen", "lively",
        "mellow", "noble", "quiet", "sturdy", "swift", "wise",
    ];
    const NUTS: [&str; 16] = [
        "acorn",
        "almond",
        "beech",
        "brazil",
        "cashew",
        "chestnut",
        "cob",
        "filbert",
        "hazel",
        "hickory",
        "kola",
        "macadamia",
        "peanut",
        "pecan",
        "pine",
        "pistachio",
    ];
    let pick = |list: [&'static str; 16], byte: u8| list[usize::from(byte % 16)];
    format!(
        "{}_{}{:02}",
        pick(ADJECTIVES, random[0]),
        pick(NUTS, random[1]),
        random[2] % 100
    )
}

/// The container with this name or ID, which must have a supervisor.
pub(crate) fn find_live(layout: &Layout, name: &str) -> Result<Record> {
    let record = find(layout, name)?;
    if record.status == Status::Exited {
        return Err(Error::WrongState(format!("container {} is not running", record.name)).into());
    }
    Ok(record)
}
