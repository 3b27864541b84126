//! Making a template.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use oci_spec::runtime::Spec;
use tracing::{debug, info};
use walnut_machine::{Driver, DriverChoice, MachineSpec, Programs, SnapshotFiles};

use super::{
    META, RUN_DIR, SPARE_DISKS, Shape, Template, Templates, UNFINISHED, WAITING, shape::Stamp,
};
use crate::{
    Assets, Error, Lock, Result, Settings, agent,
    file::write_json,
    growth,
    record::{now_ns, remove_dir},
    sizing::{self, Size, Span},
};

/// How long the guest gets to finish what its agent starts once it has told the host
/// that it serves: the helper that builds the first container. A clone of a guest that
/// was saved earlier is slower, and otherwise the same.
const SETTLE: Duration = Duration::from_millis(1500);

/// A template that somebody could use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Which driver.
    pub driver: DriverChoice,
    /// Guest memory in bytes.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u32,
}

impl Wanted {
    /// The machine of the template that serves it, which may be smaller.
    pub(super) fn machine(
        &self,
        driver: &dyn Driver,
        run_dir: &Path,
        assets: &Assets,
    ) -> MachineSpec {
        let size = Size {
            vcpus: self.vcpus,
            memory: self.memory,
        };
        machine(
            run_dir,
            assets,
            Span::template(size, growth::ceiling(driver)),
        )
    }

    /// Whether it can have links that come later.
    pub fn takes_links(&self, assets: &Assets, cache: &Path) -> Result<bool> {
        let programs = Programs {
            cache: Some(cache.to_owned()),
            ..Programs::new(&assets.dir)
        };
        Ok(walnut_machine::driver(self.driver, &programs)?.plugs())
    }

    /// For the machine that a container of this spec is given.
    pub fn for_container(settings: &Settings, spec: &Spec) -> Self {
        let Size { memory, vcpus } = sizing::size(spec, settings);
        Self {
            driver: settings.machine.driver,
            memory,
            vcpus,
        }
    }
}

impl Templates {
    /// Makes a template, and returns it; one that is there already if it is good.
    /// There is one at a time on a node: waits for its turn. `None` if somebody waits
    /// already who wants the same one.
    ///
    /// The guest dies with the calling thread.
    pub async fn make(
        &self,
        wanted: &Wanted,
        assets: &Assets,
        cache: Option<PathBuf>,
        boot_deadline: Duration,
    ) -> Result<Option<Template>> {
        let programs = Programs {
            cache,
            ..Programs::new(&assets.dir)
        };
        let driver = walnut_machine::driver(wanted.driver, &programs)?;
        let run_dir = self.run.join(RUN_DIR);
        let spec = wanted.machine(driver.as_ref(), &run_dir, assets);
        let Some(shape) = Shape::of(driver.as_ref(), &spec)? else {
            return Err(Error::Invalid(format!(
                "make a template: the driver {} cannot restore machines",
                driver.name()
            )));
        };
        let id = shape.id();
        let Some(_lock) = self.lock_in_turn(&id).await? else {
            return Ok(None);
        };
        self.sweep_locked()?;
        if let Some(template) = self.find(driver.as_ref(), &spec)? {
            return Ok(Some(template));
        }
        let new = self.dir.join(format!("{UNFINISHED}{id}"));
        for dir in [&run_dir, &new] {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(dir)
                .map_err(Error::io("create directory", dir))?;
        }
        let made = async {
            let files = SnapshotFiles {
                state: new.join("state"),
                memory: new.join("memory"),
            };
            save(driver.as_ref(), spec, &files, boot_deadline).await?;
            let template = Template {
                created_at: now_ns(),
                state: Stamp::of(&files.state)?,
                memory: Stamp::of(&files.memory)?,
                shape,
                id: id.clone(),
            };
            write_json(&new.join(META), &template)?;
            self.remove_stale()?;
            self.evict()?;
            // One that is not good, or it would have been found.
            self.remove(&id)?;
            fs::rename(&new, self.path(&id)).map_err(Error::io("put in place", &new))?;
            Ok(template)
        };
        let result = made.await;
        remove_dir(&run_dir)?;
        if result.is_err() {
            remove_dir(&new)?;
        }
        result.map(Some)
    }
}

impl Templates {
    /// The lock of who makes a template, once it is free. `None` if somebody waits for it
    /// already who wants the same one.
    pub(super) async fn lock_in_turn(&self, id: &str) -> Result<Option<Lock>> {
        if let Some(lock) = self.lock()? {
            return Ok(Some(lock));
        }
        // One that is killed leaves its place to the next; the file goes with a sweep.
        let place = self.dir.join(format!("{WAITING}{id}"));
        let Some(_place) = Lock::try_take(&place)? else {
            return Ok(None);
        };
        let path = self.lock_path();
        let waited = tokio::task::spawn_blocking(move || Lock::take(&path)).await;
        let lock =
            waited.map_err(|e| Error::Invalid(format!("wait to make a template: {e}")))??;
        Ok(Some(lock))
    }
}

/// The machine of a template, and of what is started from it before it has disks.
pub(crate) fn machine(run_dir: &Path, assets: &Assets, span: Span) -> MachineSpec {
    let Span { boot, max } = span;
    MachineSpec {
        id: RUN_DIR.to_owned(),
        run_dir: run_dir.to_owned(),
        kernel: assets.kernel(),
        initramfs: assets.initramfs(),
        cmdline: Vec::new(),
        vcpus: boot.vcpus,
        max_vcpus: max.vcpus,
        memory: boot.memory,
        max_memory: max.memory,
        disks: Vec::new(),
        spare_disks: SPARE_DISKS,
        shares: Vec::new(),
        nics: Vec::new(),
    }
}

/// Boots a machine and saves it when its agent serves.
async fn save(
    driver: &dyn Driver,
    spec: MachineSpec,
    files: &SnapshotFiles,
    boot_deadline: Duration,
) -> Result<()> {
    let began = Instant::now();
    let cannot = |what: &str| {
        Error::Invalid(format!(
            "make a template: machines of the driver {} cannot be {what}",
            driver.name()
        ))
    };
    let machine = driver.start(spec).await?;
    machine.ready(boot_deadline).await?;
    // An agent that does not answer makes no template.
    drop(agent::connect(machine.as_ref()).await?);
    tokio::time::sleep(SETTLE).await;
    let pause = machine.as_pause().ok_or_else(|| cannot("paused"))?;
    let snapshot = machine.as_snapshot().ok_or_else(|| cannot("saved"))?;
    pause.pause().await?;
    debug!(ms = began.elapsed().as_millis(), "template booted");
    snapshot.save(files).await?;
    machine.stop().await;
    // Whole on disk before it has a name.
    for path in [&files.state, &files.memory] {
        let synced = fs::File::open(path).and_then(|file| file.sync_all());
        synced.map_err(Error::io("write", path))?;
    }
    info!(
        driver = driver.name(),
        ms = began.elapsed().as_millis(),
        "template made"
    );
    Ok(())
}
