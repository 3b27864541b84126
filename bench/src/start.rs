//! Time from exec to the container's first byte of output.

use std::{
    io::Read,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use crate::{Host, bundle, verdict};

/// Aim under emulation, milliseconds.
const AIM_MS: f64 = 1200.0;

/// runsc's leading words: what it can do without KVM and groups of its own.
pub(crate) const RUNSC: [&str; 4] = [
    "runsc",
    "--platform=ptrace",
    "--network=none",
    "--ignore-cgroups",
];

/// Runs each in turn and prints the table.
pub(crate) fn measure(host: &Host, runs: usize) -> Result<()> {
    let dir = bundle::make(host, &["echo", "x"])?;
    let bundle = dir.path().join("bundle");
    let bundle = bundle.to_str().context("path")?;
    let walnut = host.walnut.to_str().context("path")?;
    let image = host.image.as_str();
    // The next one that would boot finds it.
    host.walnut(&["template", "create"])?;
    let run = |options: &[&'static str]| {
        let head = [walnut, "run", "--rm"];
        [&head[..], options, &[image, "echo", "x"]].concat()
    };
    let commands: [(&str, Vec<&str>); 4] = [
        ("walnut", run(&[])),
        ("walnut, booted", run(&["--no-template"])),
        ("crun", [crun(), vec!["run", "-b", bundle]].concat()),
        ("runsc", [&RUNSC[..], &["run", "-bundle", bundle]].concat()),
    ];
    let mut times = vec![Vec::new(); commands.len()];
    // The first round warms caches and is not counted.
    for round in 0..=runs {
        for (n, (name, command)) in commands.iter().enumerate() {
            let id = format!("walnut-bench-{}-{round}", std::process::id());
            let mut command = command.clone();
            if !name.starts_with("walnut") {
                command.push(&id);
            }
            let ms = first_byte(&command).with_context(|| format!("start with {name}"))?;
            if round > 0 {
                times[n].push(ms);
            }
        }
    }
    for list in &mut times {
        list.sort_by(f64::total_cmp);
    }
    let median = |list: &[f64]| list[list.len() / 2];
    let (base, booted) = (median(&times[0]), median(&times[1]));
    println!("\n## Time to the first byte of output, ms ({runs} runs each, in turn)\n");
    println!("| runtime | min | median | max | walnut / it |\n|---|---|---|---|---|");
    for ((name, _), list) in commands.iter().zip(&times) {
        println!(
            "| {name} | {:.0} | {:.0} | {:.0} | {:.2} |",
            list[0],
            median(list),
            list[list.len() - 1],
            base / median(list)
        );
    }
    println!(
        "\naim: median of walnut, booted, at most {AIM_MS:.0} ms emulated: {booted:.0} {}",
        verdict(booted, AIM_MS)
    );
    Ok(())
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

/// Milliseconds from before the command is spawned to its first byte of output.
fn first_byte(command: &[&str]) -> Result<f64> {
    let start = Instant::now();
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", command[0]))?;
    let mut out = child.stdout.take().context("output")?;
    let mut byte = [0];
    let read = out.read(&mut byte)?;
    let ms = start.elapsed().as_secs_f64() * 1000.0;
    let rest = child.wait_with_output()?;
    ensure!(
        read == 1 && byte == *b"x" && rest.status.success(),
        "{}: {}",
        command.join(" "),
        String::from_utf8_lossy(&rest.stderr).trim()
    );
    Ok(ms)
}
