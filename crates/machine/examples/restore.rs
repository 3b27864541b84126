//! Boots a machine, saves it when its agent serves, and restores it:
//! `restore KERNEL INITRAMFS PROGRAMS [RUNS [DRIVER [MIB [SETTLE_MS]]]]`. Prints what each takes,
//! from before its process is spawned to the agent's answer; with
//! `RUST_LOG=walnut_machine=debug` also where the milliseconds go. The drivers but
//! `qemu-tcg` need a KVM that works; the default is `vmm`. A guest that has settled for
//! some seconds has given back what it does not use, and less is saved of it.

use std::{
    error::Error,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use walnut_machine::{DriverChoice, Machine, MachineSpec, Programs, SnapshotFiles};

/// An emulated host: not a figure, a limit.
const LIMIT: Duration = Duration::from_secs(120);

fn spec(dir: &Path, name: &str, args: &[String]) -> Result<MachineSpec, Box<dyn Error>> {
    let memory = args.get(5).map_or(Ok(128), |mib| mib.parse::<u64>())? << 20;
    let run_dir = dir.join(name);
    std::fs::create_dir(&run_dir)?;
    Ok(MachineSpec {
        id: name.to_owned(),
        run_dir,
        kernel: PathBuf::from(&args[0]),
        initramfs: PathBuf::from(&args[1]),
        cmdline: Vec::new(),
        vcpus: 1,
        max_vcpus: 1,
        memory,
        max_memory: memory,
        disks: Vec::new(),
        spare_disks: 0,
        shares: Vec::new(),
        nics: Vec::new(),
    })
}

async fn answered(machine: &dyn Machine, since: Instant) -> Result<f64, Box<dyn Error>> {
    machine.ready(LIMIT).await?;
    drop(machine.connect(walnut_protocol::AGENT_PORT).await?);
    Ok(since.elapsed().as_secs_f64() * 1000.0)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.len() < 3 {
        return Err("usage: restore KERNEL INITRAMFS PROGRAMS [RUNS]".into());
    }
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let runs = args.get(3).map_or(Ok(3), |runs| runs.parse())?;
    let choice = args
        .get(4)
        .map_or(Ok(DriverChoice::Vmm), |name| name.parse())?;
    let driver = walnut_machine::driver(choice, &Programs::new(args[2].as_ref()))?;
    let dir = std::env::temp_dir().join(format!("walnut-restore-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let snapshot = SnapshotFiles {
        state: dir.join("state"),
        memory: dir.join("memory"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        println!("| what | ms | of a boot |\n|---|---|---|");
        let mut boot = 0.0;
        let mut machine = None;
        for run in 0..2 {
            // The first one warms caches, and is not counted.
            let spec = spec(&dir, &format!("boot-{run}"), &args)?;
            let start = Instant::now();
            let booted = driver.start(spec).await?;
            boot = answered(&*booted, start).await?;
            machine = Some(booted);
        }
        println!("| boot | {boot:.1} | 1.00 |");
        let machine = machine.ok_or("no machine")?;
        let (pause, save) = (machine.as_pause(), machine.as_snapshot());
        let (pause, save) = (pause.ok_or("no pause")?, save.ok_or("no save")?);
        let settle = args.get(6).map_or(Ok(0), |ms| ms.parse())?;
        tokio::time::sleep(Duration::from_millis(settle)).await;
        pause.pause().await?;
        let start = Instant::now();
        save.save(&snapshot).await?;
        let took = start.elapsed().as_secs_f64() * 1000.0;
        println!("| save | {took:.1} | {:.2} |", took / boot);
        machine.stop().await;
        let restore = driver.as_restore().ok_or("no restore")?;
        for run in 0..=runs {
            let spec = spec(&dir, &format!("clone-{run}"), &args)?;
            let start = Instant::now();
            let clone = restore.restore(spec, &snapshot).await?;
            let took = answered(&*clone, start).await?;
            if run > 0 {
                println!("| restore | {took:.1} | {:.2} |", took / boot);
            }
            clone.stop().await;
        }
        let size = |path: &Path| {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(path).map(|it| it.blocks() / 2)
        };
        println!(
            "state {} kB, memory {} kB on disk",
            size(&snapshot.state)?,
            size(&snapshot.memory)?
        );
        Ok::<(), Box<dyn Error>>(())
    })?;
    std::fs::remove_dir_all(dir)?;
    Ok(())
}
