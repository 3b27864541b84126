//! Machines that wait for their container: a clone of a template that runs, and has built
//! and run a container of ours, so that it has done everything once.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use oci_spec::runtime::Spec;

use crate::{
    ANNOTATION_LOG, ContainerRequest, Error, Furnished, Result, RootfsMount, Sandbox,
    SandboxConfig, Settings, StdioTargets, Wanted, cgroup,
    network::{self, Links},
    plan::{FIRST_DISK, Plan},
    sizing::{self, Size},
    start::{self, Parts, Steps},
    stdio::ClientEnds,
};

/// The container of the rehearsal: what most containers have, as Docker has it.
const SPEC: &str = include_str!("rehearsal.json");
const REHEARSAL: &str = "rehearsal";
/// Longest output of it that is quoted.
const QUOTE_MAX: usize = 512;

impl Sandbox {
    /// A machine without a container, for [`Sandbox::adopt`]. There must be a template
    /// for it, for only a clone has room for a disk that comes later on every driver.
    pub async fn standby(config: SandboxConfig, wanted: &Wanted) -> Result<Self> {
        let steps = Steps::new();
        let size = Size {
            memory: wanted.memory,
            vcpus: wanted.vcpus,
        };
        let cgroup = cgroup::enter(&config, size.memory);
        let parts = Parts {
            size,
            disks: Vec::new(),
            shares: Vec::new(),
            nics: Vec::new(),
        };
        let started = start::start(&config, parts, steps).await?;
        let started = started.ok_or_else(|| {
            Error::Machine("keep a machine ready: its template does not work".into())
        })?;
        let sandbox = Self::new(config, started, None, size, cgroup);
        if sandbox.template().is_none() {
            sandbox.kill_machine().await;
            return Err(Error::NotFound(
                "keep a machine ready: there is no template of its size that works".into(),
            ));
        }
        steps.done("machine stands by");
        Ok(sandbox)
    }

    /// Builds a container from `image` (EROFS, with the program `/rehearsal`), and sees it
    /// to its end. `dir` is a directory for what that needs on the host.
    ///
    /// The guest keeps what it built. Were it removed, the pages of its code would become
    /// somebody's data: an emulator that has translated code in a page does every write
    /// to that page by hand, which made half of the time of the start that was to come.
    pub async fn rehearse(self: &Arc<Self>, image: &Path, dir: &Path) -> Result<()> {
        let bundle = dir.join(REHEARSAL);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&bundle)
            .map_err(Error::io("create directory", &bundle))?;
        let log = bundle.join("log");
        write_bundle(&bundle, &log)?;
        let request = ContainerRequest {
            own: true,
            named: true,
            id: REHEARSAL.into(),
            bundle: bundle.clone(),
            rootfs: vec![RootfsMount {
                kind: "erofs".into(),
                read_only: true,
                source: image.to_owned(),
            }],
            stdio: StdioTargets::default(),
        };
        self.furnish(&request, FIRST_DISK + 1, &Links::default())
            .await?;
        self.start(REHEARSAL, "").await?;
        let exit = self.wait(REHEARSAL, "").await?;
        self.forget(REHEARSAL);
        if exit.code != 0 {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let said: String = said.chars().take(QUOTE_MAX).collect();
            let why = exit.error.unwrap_or(said);
            return Err(Error::Machine(format!(
                "rehearse a container: it ended with code {}: {why}",
                exit.code
            )));
        }
        fs::remove_dir_all(&bundle).map_err(Error::io("remove", &bundle))?;
        // For what comes now the agent has a helper ready again.
        self.configure(&Spec::default()).await
    }

    /// Whether a machine that stands by can be this container's, where `settings` hold now;
    /// `networked`: it is to have links of its own.
    pub fn fits(
        &self,
        request: &ContainerRequest,
        settings: &Settings,
        networked: bool,
    ) -> Result<bool> {
        let plan = Plan::new(request, FIRST_DISK)?;
        let asked = settings.asked_by(&plan.spec, request.own)?;
        let size = sizing::size(&plan.spec, &asked);
        let plugs = || {
            self.machine
                .as_plug_nics()
                .is_some_and(|it| it.takes_more())
        };
        Ok(self.size.max.holds(size)
            && size.holds(self.size.now())
            && !plan.needs_sharing()
            && (request.own || network::named(&plan.spec).is_none())
            // Its links keep to the rules that it was made with.
            && (!networked || plugs() && asked.egress() == self.settings.egress())
            && asked.machine == self.settings.machine)
    }

    /// Gives a machine that stands by its container, and the links of a network. It can be
    /// used for nothing else if that fails.
    pub async fn adopt(
        self: &Arc<Self>,
        request: &ContainerRequest,
        furnished: Option<Furnished>,
    ) -> Result<()> {
        let steps = Steps::new();
        let plan = Plan::new(request, FIRST_DISK)?;
        let asked = self.settings.asked_by(&plan.spec, request.own)?;
        let size = sizing::size(&plan.spec, &asked);
        let mut links = Links::default();
        if let Some(Furnished { network, names }) = furnished {
            // It had none before.
            let _ = self.names.set(names);
            let egress = self.settings.egress();
            links = Links::take(&network, &plan.spec, size.vcpus, egress).await?;
        }
        self.grow(size.memory, size.vcpus).await?;
        for nic in std::mem::take(&mut links.nics) {
            let plug = self.machine.as_plug_nics().ok_or_else(|| {
                Error::Invalid(format!(
                    "connect a machine that stands by to a network: the driver {} cannot",
                    self.driver()
                ))
            })?;
            plug.attach_nic(&nic).await?;
        }
        self.networked.store(!links.is_empty(), Ordering::Relaxed);
        steps.done("links taken");
        self.furnish(request, FIRST_DISK, &links).await?;
        steps.done("container created");
        if let Some(inlet) = links.inlet.take() {
            self.carry_ports(inlet)?;
        }
        self.watch_links(links);
        Ok(())
    }

    async fn furnish(&self, request: &ContainerRequest, disk: u32, links: &Links) -> Result<()> {
        let plan = Plan::new(request, disk)?;
        let ends = ClientEnds::open(&request.stdio)?;
        // No machine is saved between the disk and what is known of it.
        let _whole = self.saving.read().await;
        if let Some(root) = plan.image() {
            self.attach(&root.disk).await?;
        }
        self.configure(&plan.spec).await?;
        self.configure_network(links).await?;
        self.build(request, plan, ends, Vec::new()).await
    }
}

fn write_bundle(bundle: &Path, log: &Path) -> Result<()> {
    let path: PathBuf = bundle.join("config.json");
    let fail = |e: &dyn std::fmt::Display| Error::Invalid(format!("describe the rehearsal: {e}"));
    let mut spec: Spec = serde_json::from_str(SPEC).map_err(|e| fail(&e))?;
    let log = (ANNOTATION_LOG.to_owned(), log.display().to_string());
    spec.set_annotations(Some([log].into()));
    let json = serde_json::to_vec(&spec).map_err(|e| fail(&e))?;
    fs::write(&path, json).map_err(Error::io("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rehearsal_has_a_valid_bundle() {
        let dir = tempfile::tempdir().unwrap();
        write_bundle(dir.path(), Path::new("/log")).unwrap();
        let spec = crate::guest_spec::load(dir.path()).unwrap();
        assert_eq!(spec.annotations().as_ref().unwrap()[ANNOTATION_LOG], "/log");
    }
}
