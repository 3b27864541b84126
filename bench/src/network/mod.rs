//! What a pod's network costs: one end in a namespace of its own, the other a process
//! beside it, a container of crun's and one of Walnut's, all on one bridge. Each
//! measurement meets all of them in turn. runsc is left out: Debian's takes each network
//! namespace for the host's where the kernel is newer than it, and refuses it.

mod place;
mod probe;

use std::{fmt, time::Duration};

use anyhow::{Context, Result};

use crate::{Host, start::percentile, steps, verdict};
use place::{Namespace, Network, Servers, Target};
use probe::Probe;

/// Longest that the attaching of a link may take beyond its plugins, milliseconds.
const ATTACH_AIM: f64 = 5.0;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figure {
    Ping,
    UdpEcho,
    TcpEcho,
    Connect,
    TcpTo,
    TcpFrom,
    UdpTo,
}

impl Figure {
    const ALL: [Self; 7] = [
        Self::Ping,
        Self::UdpEcho,
        Self::TcpEcho,
        Self::Connect,
        Self::TcpTo,
        Self::TcpFrom,
        Self::UdpTo,
    ];
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ping => "ping, µs",
            Self::UdpEcho => "UDP there and back (UDP_RR), µs",
            Self::TcpEcho => "TCP there and back (TCP_RR), µs",
            Self::Connect => "TCP connect, ask, close (TCP_CRR), µs",
            Self::TcpTo => "TCP to it, MiB/s",
            Self::TcpFrom => "TCP from it, MiB/s",
            Self::UdpTo => "UDP to it, 1400 bytes each, arrived of all sent, thousands/s",
        })
    }
}

/// Measures every figure `runs` times, each for about `seconds`, and prints the table.
pub(crate) fn measure(host: &Host, runs: usize, seconds: u32) -> Result<()> {
    place::ensure_tools()?;
    let program = place::program()?;
    let network = Network::create(host)?;
    let servers = Servers::start(host, &network, &program)?;
    let client = Namespace::on(&network)?;
    let targets = servers.all();
    let probe = Probe {
        seconds: Duration::from_secs(seconds.into()),
    };
    let mut table = Figure::ALL.map(|_| Target::ALL.map(|_| Vec::new()));
    client.within(|| {
        for (target, address) in &targets {
            probe::until_it_answers(*address).with_context(|| target.to_string())?;
        }
        for run in 0..=runs {
            for (figure, row) in Figure::ALL.iter().zip(&mut table) {
                for ((target, address), cell) in targets.iter().zip(row) {
                    let found = probe
                        .measure(*figure, *address)
                        .with_context(|| format!("{figure}: {target}"))?;
                    // The first warms up.
                    if run > 0 {
                        cell.push(found);
                    }
                }
            }
        }
        Ok(())
    })?;
    print(&table, runs, seconds);
    attach(host, &network, runs)
}

/// What the supervisor takes over a link that the plugins have made, beside the rest of a
/// start.
fn attach(host: &Host, network: &Network<'_>, runs: usize) -> Result<()> {
    let mut times = Vec::new();
    for _ in 0..runs {
        let steps = steps::steps(host, &["--network", &network.name])?;
        let taken = steps.into_iter().find(|(step, _)| step == "links taken");
        times.push(taken.context("the log says nothing of links")?.1);
    }
    let median = median(&times);
    println!(
        "\naim: attaching a link takes at most {ATTACH_AIM} ms beyond CNI's plugins: median {median:.1} {}",
        verdict(median, ATTACH_AIM)
    );
    Ok(())
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    percentile(&sorted, 50)
}

fn print(table: &[[Vec<f64>; Target::ALL.len()]], runs: usize, seconds: u32) {
    println!(
        "\n### Network: from another namespace of the same bridge (medians of {runs}, {seconds} s each, in turn)\n"
    );
    print!("| |");
    for target in Target::ALL {
        print!(" {target} |");
    }
    println!(" walnut / crun |");
    println!("|---|{}", "---|".repeat(Target::ALL.len() + 1));
    for (figure, row) in Figure::ALL.iter().zip(table) {
        print!("| {figure} |");
        let medians = row.each_ref().map(|cell| median(cell));
        for median in medians {
            print!(" {median:.1} |");
        }
        let [_, crun, walnut] = medians;
        println!(" {:.2} |", walnut / crun);
    }
}
