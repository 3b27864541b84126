//! What a sandbox costs the host: PSS of each of its processes, with the guest's
//! own memory apart; and the agent's resident size in the guest.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::{Host, run, verdict};

/// Aims, kB.
const SHIM_AIM: f64 = 5.0 * 1024.0;
const AGENT_AIM: f64 = 1.5 * 1024.0;

/// PSS of a process in kB: its own, and its share of the guest's memory.
#[derive(Debug, Default, Clone, Copy)]
struct Pss {
    own: u64,
    guest: u64,
}

/// Starts one sandbox, reads, prints the table.
pub(crate) fn measure(host: &Host) -> Result<()> {
    let name = format!("walnut-bench-{}", std::process::id());
    let share = tempfile::tempdir()?;
    let volume = format!("{}:/data", share.path().display());
    let id = host.walnut(&[
        "run",
        "-d",
        "--name",
        &name,
        "-v",
        &volume,
        &host.image,
        "sleep",
        "infinity",
    ])?;
    let rows = processes(&id);
    host.walnut(&["rm", "-f", &name])?;
    let rows = rows?;
    println!("\n## Host memory of one sandbox with a volume, PSS in kB\n");
    println!("| process | its own | guest memory |\n|---|---|---|");
    let mut sum = Pss::default();
    let mut shim = 0.0;
    for (process, pss) in &rows {
        println!("| {process} | {} | {} |", pss.own, pss.guest);
        sum.own += pss.own;
        sum.guest += pss.guest;
        if process.starts_with("containerd-shim") {
            shim = f64::from(u32::try_from(pss.own)?);
        }
    }
    println!("| together | {} | {} |", sum.own, sum.guest);
    ensure!(shim > 0.0, "the supervisor was not found among {rows:?}");
    println!(
        "\naim: shim at most {SHIM_AIM:.0} kB: {shim:.0} {}",
        verdict(shim, SHIM_AIM)
    );
    let agent = agent()?;
    println!(
        "aim: agent at most {AGENT_AIM:.0} kB resident: {agent:.0} {}",
        verdict(agent, AGENT_AIM)
    );
    Ok(())
}

/// The sandbox's processes by name.
fn processes(id: &str) -> Result<Vec<(String, Pss)>> {
    let mut rows = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(line) = fs::read_to_string(entry.path().join("cmdline")) else {
            continue;
        };
        if !line.contains(id) {
            continue;
        }
        let program = line.split('\0').next().unwrap_or_default();
        let name = program.rsplit('/').next().unwrap_or_default().to_owned();
        if let Some(pss) = pss(&entry.path().join("smaps")) {
            rows.push((name, pss));
        }
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(rows)
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
            guest = line.contains("memfd:memory-backend") || line.contains("/memfd:");
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
