//! What a sandbox costs the host: PSS of each of its processes, with the guest's
//! own memory apart; and the agent's resident size in the guest.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    Host,
    beside::{self, Other},
    guest, run, verdict,
};

/// Aims, kB.
const SHIM_AIM: f64 = 5.0 * 1024.0;
const AGENT_AIM: f64 = 1.5 * 1024.0;
/// Boots in which the agent's size is read.
const AGENT_BOOTS: usize = 9;

/// PSS of a process in kB: its own, and its share of the guest's memory.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Pss {
    pub(crate) own: u64,
    guest: u64,
}

/// One runtime's processes by name.
pub(crate) type Rows = Vec<(String, Pss)>;

/// A sandbox that is removed when dropped.
#[derive(Debug)]
pub(crate) struct Sandbox<'a> {
    host: &'a Host,
    name: String,
    id: String,
}

impl<'a> Sandbox<'a> {
    /// Runs a command behind.
    pub(crate) fn start(host: &'a Host, name: &str, command: &[&str]) -> Result<Self> {
        Self::start_with(host, name, &[], command)
    }

    fn start_with(host: &'a Host, name: &str, options: &[&str], command: &[&str]) -> Result<Self> {
        let head = ["run", "-d", "--name", name];
        let id = host.walnut(&[&head, options, &[&host.image], command].concat())?;
        Ok(Self {
            host,
            name: name.to_owned(),
            id,
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Sandbox<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.host.walnut(&["rm", "-f", &self.name]) {
            eprintln!("remove {}: {e:#}", self.name);
        }
    }
}

/// Starts a container with each runtime, reads, prints the tables.
pub(crate) fn measure(host: &Host) -> Result<()> {
    let walnut = walnut(host, false)?;
    let mut all = vec![("walnut", walnut)];
    for (name, words) in beside::runtimes() {
        let other = Other::start(host, name, words)?;
        all.push((name, settled(other.bundle()?, Some(other.pid))?));
    }
    ensure!(
        all[2].1.iter().any(|(process, _)| process == "runsc-gofer"),
        "runsc's gofer was not found among {:?}",
        all[2].1
    );
    beside_each_other(&all);
    let rows = walnut_with_volume(host)?;
    let shim = rows
        .iter()
        .find(|(process, _)| process.starts_with("containerd-shim"));
    let (_, shim) = shim.with_context(|| format!("the supervisor is not among {rows:?}"))?;
    let shim = f64::from(u32::try_from(shim.own)?);
    println!(
        "\naim: shim at most {SHIM_AIM:.0} kB: {shim:.0} {}",
        verdict(shim, SHIM_AIM)
    );
    // Fault-around maps what lies near a touched page, by address, and addresses
    // are random: the size differs by a tenth from boot to boot.
    let mut sizes = (0..AGENT_BOOTS)
        .map(|_| agent())
        .collect::<Result<Vec<f64>>>()?;
    sizes.sort_by(f64::total_cmp);
    let (least, agent, most) = (sizes[0], sizes[AGENT_BOOTS / 2], sizes[AGENT_BOOTS - 1]);
    println!(
        "aim: agent at most {AGENT_AIM:.0} kB resident: median {agent:.0} of {AGENT_BOOTS} boots \
         ({least:.0}–{most:.0}) {}",
        verdict(agent, AGENT_AIM)
    );
    Ok(())
}

fn walnut_with_volume(host: &Host) -> Result<Rows> {
    let rows = walnut(host, true)?;
    println!("\n## Host memory of one sandbox with a volume, PSS in kB\n");
    println!("| process | its own | guest memory |\n|---|---|---|");
    print_rows(&rows);
    Ok(rows)
}

fn print_rows(rows: &Rows) {
    for (process, pss) in rows {
        println!("| {process} | {} | {} |", pss.own, pss.guest);
    }
    let sum = sum(rows);
    println!("| together | {} | {} |", sum.own, sum.guest);
}

/// A sandbox's processes. Without a volume, as the other runtimes have none,
/// also prints where the guest's memory goes.
fn walnut(host: &Host, volume: bool) -> Result<Rows> {
    let name = format!("walnut-bench-{}", std::process::id());
    let share = tempfile::tempdir()?;
    let share = format!("{}:/data", share.path().display());
    let options: &[&str] = if volume { &["-v", &share] } else { &[] };
    let sandbox = Sandbox::start_with(host, &name, options, &beside::SLEEP)?;
    let id = sandbox.id();
    if volume {
        return settled(id, None);
    }
    let rows = settled(id, None)?;
    let meminfo = host.walnut(&["exec", &name, "cat", "/proc/meminfo"])?;
    let memory = family(id, None)?
        .iter()
        .find_map(|process| guest::Memory::of(process))
        .context("no process of the sandbox has the guest's memory open")?;
    guest::print(memory, &meminfo)?;
    Ok(rows)
}

fn beside_each_other(all: &[(&str, Rows)]) {
    println!("\n## Host memory of one container without a volume, PSS in kB\n");
    println!("| runtime | process | its own | memory file of the guest |\n|---|---|---|---|");
    for (name, rows) in all {
        for (process, pss) in rows {
            println!("| {name} | {process} | {} | {} |", pss.own, pss.guest);
        }
    }
    println!("\n| runtime | its own | memory file | together | walnut / it, own | together |");
    println!("|---|---|---|---|---|---|");
    let kb = |kb: u64| f64::from(u32::try_from(kb).unwrap_or(u32::MAX));
    let base = all.first().map(|(_, rows)| sum(rows)).unwrap_or_default();
    for (name, rows) in all {
        let sum = sum(rows);
        let both = sum.own + sum.guest;
        println!(
            "| {name} | {} | {} | {both} | {:.2} | {:.2} |",
            sum.own,
            sum.guest,
            kb(base.own) / kb(sum.own),
            kb(base.own + base.guest) / kb(both)
        );
    }
}

fn sum(rows: &Rows) -> Pss {
    rows.iter().fold(Pss::default(), |sum, (_, pss)| Pss {
        own: sum.own + pss.own,
        guest: sum.guest + pss.guest,
    })
}

/// The processes once two readings, half a second apart, differ by under 1 %.
pub(crate) fn settled(id: &str, first: Option<u32>) -> Result<Rows> {
    let mut last = 0;
    for _ in 0..40 {
        let rows = processes(id, first)?;
        let now = sum(&rows).own + sum(&rows).guest;
        if !rows.is_empty() && now.abs_diff(last) * 100 < now {
            return Ok(rows);
        }
        last = now;
        std::thread::sleep(Duration::from_millis(500));
    }
    bail!("the memory of {id} did not settle in 20 s; last {last} kB")
}

fn processes(id: &str, first: Option<u32>) -> Result<Rows> {
    let mut rows = Vec::new();
    for process in family(id, first)? {
        let name = program(&process);
        if let Some(pss) = pss(&process.join("smaps")) {
            rows.push((name, pss));
        }
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(rows)
}

/// What a process runs.
pub(crate) fn program(process: &Path) -> String {
    let line = fs::read_to_string(process.join("cmdline")).unwrap_or_default();
    let program = line.split('\0').next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    // runsc's stubs, which run the container's code, have no command line.
    if name.is_empty() {
        let comm = fs::read_to_string(process.join("comm")).unwrap_or_default();
        return format!("[{}]", comm.trim());
    }
    name.to_owned()
}

/// The processes whose command line has `id`, the process `first`, and what these started.
pub(crate) fn family(id: &str, first: Option<u32>) -> Result<Vec<PathBuf>> {
    let mut all: Vec<(u32, u32, bool)> = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let named = String::from_utf8_lossy(&line).contains(id);
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let parent = status.lines().find_map(|l| l.strip_prefix("PPid:"));
        let parent = parent.and_then(|p| p.trim().parse().ok()).unwrap_or(0);
        all.push((pid, parent, named || Some(pid) == first));
    }
    loop {
        let ours: HashSet<u32> = all.iter().filter(|p| p.2).map(|p| p.0).collect();
        for process in &mut all {
            process.2 |= ours.contains(&process.1);
        }
        if all.iter().filter(|p| p.2).count() == ours.len() {
            return Ok(ours
                .iter()
                .map(|pid| format!("/proc/{pid}").into())
                .collect());
        }
    }
}

fn pss(smaps: &std::path::Path) -> Option<Pss> {
    let mut pss = Pss::default();
    let mut guest = false;
    for line in fs::read_to_string(smaps).ok()?.lines() {
        if let Some(rest) = line.strip_prefix("Pss:") {
            let kb: u64 = rest.trim().trim_end_matches(" kB").parse().ok()?;
            if guest {
                pss.guest += kb;
            } else {
                pss.own += kb;
            }
        } else if line.as_bytes().first().is_some_and(u8::is_ascii_hexdigit) && line.contains('-') {
            // virtiofsd and the vsock device map it under their own names.
            guest = line.contains("/memfd:");
        }
    }
    Some(pss)
}

/// The agent's resident kB, as its own guest test prints it: a container of the
/// product does not see the agent.
fn agent() -> Result<f64> {
    let out = run(&[
        "cargo",
        "test",
        "--release",
        "--quiet",
        "-p",
        "walnut-agent",
        "--features",
        "guest-tests",
        "--test",
        "guest",
        "figures",
        "--",
        "--nocapture",
    ])?;
    out.lines()
        .find_map(|line| line.trim().strip_prefix("Rss:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|kb| kb.parse().ok())
        .context("the agent's test printed no Rss")
}
