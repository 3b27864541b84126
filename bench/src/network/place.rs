//! Who answers, and where.

use std::{
    fmt, fs,
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use crate::{
    Host,
    beside::{Bundle, Other},
    run, start,
};

/// Where the program lies in every container.
const AT: &str = "/bench";
const PROGRAM: &str = "/bench/echo";

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Process,
    Crun,
    Walnut,
}

impl Target {
    pub(super) const ALL: [Self; 3] = [Self::Process, Self::Crun, Self::Walnut];
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Process => "a process",
            Self::Crun => "crun",
            Self::Walnut => "walnut",
        })
    }
}

/// The directory of the program that answers, compiled.
pub(super) fn program() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir().context("make a directory")?;
    let out = dir.path().join("echo");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/echo.c");
    let out = out.to_str().context("path")?;
    run(&["cc", "-static", "-O2", "-Wall", "-o", out, source])?;
    Ok(dir)
}

/// A network of Walnut's; it is removed when dropped.
#[derive(Debug)]
pub(super) struct Network<'a> {
    host: &'a Host,
    pub(super) name: String,
    bridge: String,
    /// Of its subnet.
    last: Ipv4Addr,
    prefix: u32,
}

impl<'a> Network<'a> {
    pub(super) fn create(host: &'a Host) -> Result<Self> {
        let name = format!("walnut-bench-{}", std::process::id());
        host.walnut(&["network", "create", "--disable-dns", &name])?;
        let mut network = Self {
            host,
            name,
            bridge: String::new(),
            last: Ipv4Addr::UNSPECIFIED,
            prefix: 0,
        };
        let found = host.walnut(&["network", "inspect", &network.name])?;
        let found: Value = serde_json::from_str(&found).context("walnut network inspect")?;
        let word = |value: &Value| value.as_str().map(str::to_owned);
        network.bridge = word(&found[0]["bridge"]).context("the network's bridge")?;
        let subnet = word(&found[0]["subnets"][0]["subnet"]).context("its subnet")?;
        let (first, prefix) = subnet.split_once('/').context("a subnet")?;
        let first: Ipv4Addr = first.parse().context("a subnet's address")?;
        network.prefix = prefix.parse().context("a subnet's length")?;
        let size = u32::MAX.checked_shr(network.prefix).context("a subnet")?;
        network.last = Ipv4Addr::from_bits(first.to_bits() | size);
        Ok(network)
    }

    /// An address that none of its containers has: they get theirs from the other end.
    fn address(&self) -> (Ipv4Addr, u32) {
        static GIVEN: AtomicU32 = AtomicU32::new(1);
        let number = GIVEN.fetch_add(1, Ordering::Relaxed);
        (Ipv4Addr::from_bits(self.last.to_bits() - number), number)
    }
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.host.walnut(&["network", "rm", &self.name]) {
            eprintln!("{e:#}");
        }
    }
}

/// A network namespace with one link, to a network's bridge; it goes when dropped.
#[derive(Debug)]
pub(super) struct Namespace {
    name: String,
    address: Ipv4Addr,
}

impl Namespace {
    /// There must be a container on the network: with it comes the bridge.
    pub(super) fn on(network: &Network<'_>) -> Result<Self> {
        let (address, number) = network.address();
        let name = format!("walnut-bench-{}-{number}", std::process::id());
        let outer = format!("wb{}-{number}", std::process::id() % 1_000_000);
        run(&["ip", "netns", "add", &name])?;
        let namespace = Self { name, address };
        let inside = format!("{address}/{}", network.prefix);
        let name = namespace.name.as_str();
        for command in [
            format!("link add {outer} type veth peer name eth0 netns {name}"),
            format!("link set {outer} master {} up", network.bridge),
            format!("-n {name} link set lo up"),
            format!("-n {name} address add {inside} dev eth0"),
            format!("-n {name} link set eth0 up"),
        ] {
            let words: Vec<_> = ["ip"].into_iter().chain(command.split(' ')).collect();
            run(&words)?;
        }
        Ok(namespace)
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Does something in it.
    pub(super) fn within<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = fs::File::open(self.path()).context("open a network namespace")?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(file, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
                act()
            });
            let result = inside.join();
            result.map_err(|_| anyhow::anyhow!("a thread panicked"))?
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(e) = run(&["ip", "netns", "delete", &self.name]) {
            eprintln!("{e:#}");
        }
    }
}

/// All that answer, each in a namespace of its own.
#[derive(Debug)]
pub(super) struct Servers<'a> {
    walnut: Walnut<'a>,
    _process: Process,
    _crun: Other,
    namespaces: Vec<Namespace>,
}

/// A process of this host's, killed when dropped.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A container of Walnut's, removed when dropped.
#[derive(Debug)]
struct Walnut<'a> {
    host: &'a Host,
    id: String,
    address: Ipv4Addr,
}

impl Drop for Walnut<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.host.walnut(&["rm", "-f", &self.id]) {
            eprintln!("{e:#}");
        }
    }
}

impl<'a> Servers<'a> {
    pub(super) fn start(
        host: &'a Host,
        network: &Network<'_>,
        program: &tempfile::TempDir,
    ) -> Result<Self> {
        let dir = program.path().to_str().context("path")?;
        let walnut = Walnut::start(host, network, dir)?;
        let namespaces = [(); 2].map(|()| Namespace::on(network));
        let namespaces = namespaces.into_iter().collect::<Result<Vec<_>>>()?;
        let [first, second] = namespaces.as_slice() else {
            anyhow::bail!("two namespaces");
        };
        let process = first.within(|| {
            let child = Command::new(program.path().join("echo"))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn();
            Ok(Process(child.context("start the program")?))
        })?;
        let bundle = Bundle::make(host, &[PROGRAM])?;
        bundle.change(|config| furnish(config, dir, &second.path()))?;
        let crun = Other::start_in(&bundle, "crun", start::crun())?;
        Ok(Self {
            walnut,
            _process: process,
            _crun: crun,
            namespaces,
        })
    }

    /// With their addresses, in the order of [`Target::ALL`].
    pub(super) fn all(&self) -> Vec<(Target, Ipv4Addr)> {
        let targets = [Target::Process, Target::Crun].into_iter();
        let addresses = self.namespaces.iter().map(|namespace| namespace.address);
        let walnut = (Target::Walnut, self.walnut.address);
        targets.zip(addresses).chain([walnut]).collect()
    }
}

impl<'a> Walnut<'a> {
    fn start(host: &'a Host, network: &Network<'_>, dir: &str) -> Result<Self> {
        let volume = format!("{dir}:{AT}:ro");
        let options = ["run", "-d", "--network", &network.name, "-v", &volume];
        let id = host.walnut(&[&options[..], &[&host.image, PROGRAM]].concat())?;
        let mut walnut = Self {
            host,
            id,
            address: Ipv4Addr::UNSPECIFIED,
        };
        let found = host.walnut(&["network", "inspect", &network.name])?;
        let found: Value = serde_json::from_str(&found).context("walnut network inspect")?;
        let address = found[0]["containers"][0]["addresses"][0].as_str();
        let address = address.and_then(|a| a.split('/').next()?.parse().ok());
        walnut.address = address.context("the container's address")?;
        Ok(walnut)
    }
}

/// The program in a bundle, and a network namespace that is there already.
fn furnish(config: &mut Value, dir: &str, namespace: &str) {
    if let Some(mounts) = config["mounts"].as_array_mut() {
        let options = ["bind", "ro"];
        mounts.push(json!({"destination": AT, "type": "bind", "source": dir, "options": options}));
    }
    if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|n| n["type"] != "network");
        namespaces.push(json!({"type": "network", "path": namespace}));
    }
}

/// All of them must be there for a comparison.
pub(super) fn ensure_tools() -> Result<()> {
    for tool in ["ip", "cc", "crun"] {
        let found = std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).exists()));
        ensure!(found, "{tool} is missing: run `make deps` first");
    }
    Ok(())
}
