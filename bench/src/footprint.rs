//! What a sandbox costs besides its guest's memory: the agent, the supervisor, each further
//! exec. With `--check` it fails where one has grown by a fifth since it was recorded in
//! `bench/footprint.json`, which `--record` writes.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    Host, beside,
    memory::{Sandbox, settled},
    run, verdict,
};

const RECORDED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/footprint.json");
/// Aims, kB.
const AGENT_AIM: f64 = 1.1 * 1024.0;
const SHIM_AIM: f64 = 3.0 * 1024.0;
/// What a figure may be of the recorded one.
const GROWTH: f64 = 1.2;
/// Fault-around maps what lies near a touched page, by address, and addresses are random:
/// the agent's size differs from boot to boot.
const BOOTS: usize = 5;
/// Execs of which the cost of one is an average.
const EXECS: u32 = 16;

/// By name; kB, or bytes where the name says so.
type Figures = BTreeMap<String, f64>;

const AGENT: &str = "agent, resident kB";
const AGENT_EXEC: &str = "agent, bytes for each exec";
const SHIM: &str = "shim with one container, PSS kB";
const SHIM_EXEC: &str = "shim, kB for each exec behind";
const SHIM_STREAMS: &str = "shim, kB for each exec with three streams";
const VSOCK_STREAMS: &str = "vsock device, kB for each exec with three streams";

/// What is done with the figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    Show,
    Check,
    Record,
}

pub(crate) fn measure(host: &Host, then: Then) -> Result<()> {
    let mut figures = agent()?;
    sandbox(host, &mut figures)?;
    let recorded: Figures = match fs::read(RECORDED) {
        Ok(json) => serde_json::from_slice(&json).with_context(|| RECORDED)?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Figures::new(),
        Err(e) => return Err(e).context(RECORDED),
    };
    println!("\n## Footprint\n\n| | it is | recorded | at most |\n|---|---|---|---|");
    let mut grown = Vec::new();
    for (name, figure) in &figures {
        let before = recorded.get(name).copied();
        let most = before.map(|before| before * GROWTH);
        let shown = |n: Option<f64>| n.map_or("-".into(), |n| format!("{n:.0}"));
        println!(
            "| {name} | {figure:.0} | {} | {} |",
            shown(before),
            shown(most)
        );
        if most.is_none_or(|most| *figure > most) {
            grown.push(name.as_str());
        }
    }
    println!();
    for (name, aim) in [(AGENT, AGENT_AIM), (SHIM, SHIM_AIM)] {
        let figure = figures[name];
        println!(
            "aim: {name}: at most {aim:.0}: {figure:.0} {}",
            verdict(figure, aim)
        );
    }
    match then {
        Then::Check if !grown.is_empty() => bail!(
            "grown by more than a fifth, or not recorded: {}; walnut-bench footprint --record if that is meant",
            grown.join("; ")
        ),
        Then::Record => {
            let json = serde_json::to_string_pretty(&figures)?;
            fs::write(RECORDED, json + "\n").context(RECORDED)
        }
        Then::Check | Then::Show => Ok(()),
    }
}

/// As the agent's own guest test prints them: a container of the product does not see the
/// agent. Medians.
fn agent() -> Result<Figures> {
    let mut all: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..BOOTS {
        // The packages and features of `make test`: nothing is built for this alone.
        let out = run(&[
            "cargo",
            "test",
            "--release",
            "--quiet",
            "--workspace",
            "--features",
            "walnut-agent/guest-tests",
            "--test",
            "guest",
            "footprint",
            "--",
            "--nocapture",
        ])?;
        for (name, line) in [(AGENT, "agent resident:"), (AGENT_EXEC, "agent per exec:")] {
            let figure = out
                .lines()
                .find_map(|l| l.trim().split_once(line)?.1.split_whitespace().next())
                .and_then(|number| number.parse().ok())
                .with_context(|| format!("the agent's test did not print {line:?}"))?;
            all.entry(name).or_default().push(figure);
        }
    }
    let median = |(name, mut figures): (&str, Vec<f64>)| {
        figures.sort_by(f64::total_cmp);
        (name.to_owned(), figures[BOOTS / 2])
    };
    Ok(all.into_iter().map(median).collect())
}

fn sandbox(host: &Host, figures: &mut Figures) -> Result<()> {
    let name = format!("walnut-footprint-{}", std::process::id());
    let sandbox = Sandbox::start(host, &name, &beside::SLEEP)?;
    let own = |process: &str| -> Result<f64> {
        let rows = settled(sandbox.id(), None)?;
        let row = rows.iter().find(|(name, _)| name.starts_with(process));
        let (_, pss) = row.with_context(|| format!("no {process} among {rows:?}"))?;
        Ok(f64::from(u32::try_from(pss.own)?))
    };
    const SUPERVISOR: &str = "containerd-shim";
    const DEVICE: &str = "walnut-v";
    let each = |after: f64, before: f64| (after - before).max(0.0) / f64::from(EXECS);
    figures.insert(SHIM.into(), own(SUPERVISOR)?);
    // Each touches what the next of its kind finds touched.
    let behind = || host.walnut(&[&["exec", "-d", &name], &beside::SLEEP[..]].concat());
    behind()?;
    let mut attached = vec![Attached::start(host, &name)?];
    let before = own(SUPERVISOR)?;
    for _ in 0..EXECS {
        behind()?;
    }
    let between = (own(SUPERVISOR)?, own(DEVICE)?);
    for _ in 0..EXECS {
        attached.push(Attached::start(host, &name)?);
    }
    let after = (own(SUPERVISOR)?, own(DEVICE)?);
    figures.insert(SHIM_EXEC.into(), each(between.0, before));
    figures.insert(SHIM_STREAMS.into(), each(after.0, between.0));
    figures.insert(VSOCK_STREAMS.into(), each(after.1, between.1));
    Ok(())
}

/// An exec in front.
struct Attached(Child);

impl Attached {
    fn start(host: &Host, name: &str) -> Result<Self> {
        let child = Command::new(&host.walnut)
            .args(["exec", "-i", name, "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("run walnut exec")?;
        let mut this = Self(child);
        let stdin = this.0.stdin.as_mut().context("piped")?;
        stdin.write_all(b"there\n")?;
        let stdout = this.0.stdout.as_mut().context("piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line == "there\n", "cat answered {line:?}");
        Ok(this)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
