//! Time from exec to the container's first byte of output.

use std::{
    io::Read,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use crate::{Host, bundle, plot, verdict};

/// Aim under emulation, of what runsc takes.
const AIM: f64 = 0.5;
/// More than these are not booted at once: it takes minutes, and tells nothing new.
const BOOTED_MAX: usize = 8;

/// runsc's leading words: what it can do without KVM and groups of its own.
pub(crate) const RUNSC: [&str; 4] = [
    "runsc",
    "--platform=ptrace",
    "--network=none",
    "--ignore-cgroups",
];

/// What is started, by name and command. Walnut's come first.
fn commands<'a>(
    host: &'a Host,
    walnut: &'a str,
    bundle: &'a str,
) -> Vec<(&'static str, Vec<&'a str>)> {
    let image = host.image.as_str();
    let run = |options: &[&'static str]| {
        let head = [walnut, "run", "--rm"];
        [&head[..], options, &[image, "echo", "x"]].concat()
    };
    vec![
        ("walnut", run(&[])),
        (POOL, run(&[])),
        (BOOTED, run(&["--no-template"])),
        ("crun", [crun(), vec!["run", "-b", bundle]].concat()),
        ("runsc", [&RUNSC[..], &["run", "-bundle", bundle]].concat()),
    ]
}

/// Walnut with machines that stand by, as many as are started at once.
const POOL: &str = "walnut, pool";
/// Walnut without a template.
const BOOTED: &str = "walnut, booted";

/// Runs each in turn, `at_once` side by side, and prints the table.
pub(crate) fn measure(host: &Host, runs: usize, at_once: usize) -> Result<()> {
    let dir = bundle::make(host, &["echo", "x"])?;
    let bundle = dir.path().join("bundle");
    let bundle = bundle.to_str().context("path")?;
    let walnut = host.walnut.to_str().context("path")?;
    // The next one that would boot finds it.
    host.walnut(&["template", "create"])?;
    let mut commands = commands(host, walnut, bundle);
    if at_once > BOOTED_MAX {
        commands.retain(|(name, _)| *name != BOOTED);
    }
    let mut times = vec![Vec::new(); commands.len()];
    let mut walls = vec![0.0; commands.len()];
    // The first round warms caches and is not counted.
    for round in 0..=runs {
        for (n, (name, command)) in commands.iter().enumerate() {
            if *name == POOL {
                host.walnut(&["pool", "set", &at_once.to_string()])?;
            }
            let start = Instant::now();
            let starts = side_by_side(name, command, round, at_once);
            let starts = starts.with_context(|| format!("start with {name}"))?;
            if *name == POOL {
                host.walnut(&["pool", "set", "0"])?;
            }
            if round > 0 {
                let last = starts.iter().map(|s| s.1).max().context("no starts")?;
                walls[n] += (last - start).as_secs_f64();
                times[n].extend(starts.iter().map(|s| s.0));
            }
        }
    }
    for list in &mut times {
        list.sort_by(f64::total_cmp);
    }
    println!(
        "\n## Time to the first byte of output, ms ({runs} runs of {at_once} at once, in turn)\n"
    );
    println!("| runtime | p50 | p95 | p99 | it / runsc | starts per second and core |");
    println!("|---|---|---|---|---|---|");
    let runsc = times.last().map_or(f64::NAN, |list| percentile(list, 50));
    let cores = std::thread::available_parallelism()?.get() as f64;
    for (((name, _), list), wall) in commands.iter().zip(&times).zip(&walls) {
        println!(
            "| {name} | {:.0} | {:.0} | {:.0} | {:.2} | {:.1} |",
            percentile(list, 50),
            percentile(list, 95),
            percentile(list, 99),
            percentile(list, 50) / runsc,
            list.len() as f64 / wall / cores,
        );
    }
    let medians: Vec<_> = commands
        .iter()
        .zip(&times)
        .map(|((name, _), list)| ((*name).to_owned(), percentile(list, 50)))
        .collect();
    let title = format!("First byte of output, {at_once} at once, median");
    println!("\n{}", plot::bars(&title, "ms", &medians));
    for (name, most) in [("walnut", AIM), (POOL, AIM)] {
        let list = commands.iter().position(|(n, _)| *n == name);
        let median = list.map_or(f64::NAN, |n| percentile(&times[n], 50));
        println!(
            "\naim: median of {name}, at most {most} of runsc's: {:.2} {}",
            median / runsc,
            verdict(median / runsc, most)
        );
    }
    Ok(())
}

/// The value that `percent` of a sorted list do not exceed.
pub(crate) fn percentile(list: &[f64], percent: usize) -> f64 {
    let at = (list.len() * percent).div_ceil(100).max(1);
    list.get(at - 1).copied().unwrap_or(f64::NAN)
}

/// Starts a command several times at once; milliseconds and moment of each first byte.
fn side_by_side(
    name: &str,
    command: &[&str],
    round: usize,
    at_once: usize,
) -> Result<Vec<(f64, Instant)>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once)
            .map(|n| {
                let id = format!("walnut-bench-{}-{round}-{n}", std::process::id());
                scope.spawn(move || {
                    let mut command = command.to_vec();
                    if !name.starts_with("walnut") {
                        command.push(&id);
                    }
                    first_byte(&command)
                })
            })
            .collect();
        let joined = threads.into_iter().map(|thread| {
            let result = thread.join();
            result.map_err(|_| anyhow::anyhow!("a thread panicked"))?
        });
        joined.collect()
    })
}

/// Debian's crun refuses a host with both versions of cgroups: there it gets a
/// view without the second, which costs it two execs, some 3 ms.
pub(crate) fn crun() -> Vec<&'static str> {
    const BOTH: &str = "/sys/fs/cgroup/unified";
    const HIDE: &str = "umount /sys/fs/cgroup/unified && exec \"$@\"";
    let mut command = Vec::new();
    if std::path::Path::new(BOTH).exists() {
        command.extend(["unshare", "-m", "sh", "-c", HIDE, "sh"]);
    }
    command.extend(["crun", "--cgroup-manager=disabled"]);
    command
}

/// Milliseconds from before the command is spawned to its first byte of output, and when
/// that was.
fn first_byte(command: &[&str]) -> Result<(f64, Instant)> {
    let start = Instant::now();
    let mut child = Command::new(command[0])
        // Beside others that make no network either.
        .env("WALNUT_NETWORK", "none")
        .args(&command[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", command[0]))?;
    let mut out = child.stdout.take().context("output")?;
    let mut byte = [0];
    let read = out.read(&mut byte)?;
    let first = Instant::now();
    let ms = (first - start).as_secs_f64() * 1000.0;
    let rest = child.wait_with_output()?;
    ensure!(
        read == 1 && byte == *b"x" && rest.status.success(),
        "{}: {}",
        command.join(" "),
        String::from_utf8_lossy(&rest.stderr).trim()
    );
    Ok((ms, first))
}
