//! A container of another runtime, kept running beside Walnut's to be measured.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    rc::Rc,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{Host, bundle, run, start};

/// What runs in every container whose memory is measured.
pub(crate) const SLEEP: [&str; 2] = ["sleep", "infinity"];

/// The image unpacked, with a command: several containers may run from one.
#[derive(Debug, Clone)]
pub(crate) struct Bundle(Rc<tempfile::TempDir>);

impl Bundle {
    pub(crate) fn make(host: &Host, command: &[&str]) -> Result<Self> {
        Ok(Self(Rc::new(bundle::make(host, command)?)))
    }

    /// Changes its configuration.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let path = self.0.path().join("bundle/config.json");
        let text = fs::read(&path).context("read a bundle")?;
        let mut config = serde_json::from_slice(&text).context("read a bundle")?;
        change(&mut config);
        fs::write(&path, serde_json::to_vec(&config)?).context("write a bundle")
    }

    /// What its containers' command lines have in common: runsc's gofer knows the
    /// bundle alone.
    pub(crate) fn path(&self) -> Result<&str> {
        self.0.path().to_str().context("path")
    }
}

/// A running container; it is deleted when dropped.
#[derive(Debug)]
pub(crate) struct Other {
    runtime: Vec<&'static str>,
    id: String,
    /// Its first process.
    pub(crate) pid: u32,
    bundle: Bundle,
}

impl Other {
    /// What its processes' command lines have in common.
    pub(crate) fn bundle(&self) -> Result<&str> {
        self.bundle.path()
    }

    /// Its name, which runsc's processes have in their command lines, the gofer's apart.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Starts a container by a runtime's leading words, say `crun --debug`.
    pub(crate) fn start(host: &Host, name: &str, runtime: Vec<&'static str>) -> Result<Self> {
        Self::start_in(&Bundle::make(host, &SLEEP)?, name, runtime)
    }

    /// Starts one more from a bundle.
    pub(crate) fn start_in(
        bundle: &Bundle,
        name: &str,
        runtime: Vec<&'static str>,
    ) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut other = Self {
            runtime,
            id: format!("walnut-bench-{name}-{}-{count}", std::process::id()),
            pid: 0,
            bundle: bundle.clone(),
        };
        let pid_file = bundle.0.path().join(format!("pid-{count}"));
        other.run(&pid_file)?;
        let pid = fs::read_to_string(&pid_file).with_context(|| format!("{name}'s pid file"))?;
        other.pid = pid.trim().parse().context("a pid file's number")?;
        Ok(other)
    }

    /// Its output goes to a file: a pipe would be held open by the container.
    fn run(&self, pid_file: &Path) -> Result<()> {
        let dir = self.bundle.0.path();
        let log = fs::File::create(dir.join("log")).context("make a log")?;
        let status = Command::new(self.runtime[0])
            .args(&self.runtime[1..])
            .args(["run", "--detach", "--pid-file"])
            .arg(pid_file)
            .arg("--bundle")
            .arg(dir.join("bundle"))
            .arg(&self.id)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .status()
            .with_context(|| format!("run {}", self.runtime[0]))?;
        ensure!(
            status.success(),
            "{}: {}",
            self.runtime.join(" "),
            fs::read_to_string(dir.join("log")).unwrap_or_default()
        );
        Ok(())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let mut words = self.runtime.clone();
        words.extend(["delete", "--force", &self.id]);
        if let Err(e) = run(&words) {
            eprintln!("delete {}: {e:#}", self.id);
        }
    }
}

/// crun, runsc: a name and the leading words of each.
pub(crate) fn runtimes() -> [(&'static str, Vec<&'static str>); 2] {
    [("crun", start::crun()), ("runsc", start::RUNSC.to_vec())]
}
