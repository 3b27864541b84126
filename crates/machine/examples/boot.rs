//! Boots a machine some times and prints where the milliseconds go:
//! `boot KERNEL INITRAMFS WALNUT-VSOCK [RUNS [WORD…]]`; words go to the
//! kernel's command line. The initramfs must say the
//! agent's ready line.

use std::{error::Error, path::PathBuf, time::Duration, time::Instant};

use walnut_machine::{DriverChoice, MachineSpec, Programs};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, own, ..] = args.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS PROGRAMS [RUNS [WORD…]]".into());
    };
    let runs = args.get(3).map_or(Ok(5), |runs| runs.parse())?;
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .without_time()
        .init();
    let driver = walnut_machine::driver(DriverChoice::QemuTcg, &Programs::new(own.as_ref()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut times = Vec::new();
    for run in 0..runs {
        let run_dir =
            std::env::temp_dir().join(format!("walnut-boot-{}-{run}", std::process::id()));
        std::fs::create_dir(&run_dir)?;
        let spec = MachineSpec {
            id: format!("boot-{run}"),
            run_dir: run_dir.clone(),
            kernel: PathBuf::from(kernel),
            initramfs: PathBuf::from(initramfs),
            cmdline: args.iter().skip(4).cloned().collect(),
            vcpus: 1,
            max_vcpus: 1,
            memory: 128 << 20,
            max_memory: 128 << 20,
            disks: Vec::new(),
            spare_disks: 0,
            shares: Vec::new(),
            nics: Vec::new(),
        };
        runtime.block_on(async {
            let start = Instant::now();
            let machine = driver.start(spec).await?;
            machine.ready(Duration::from_secs(30)).await?;
            times.push(start.elapsed());
            machine.stop().await;
            Ok::<(), Box<dyn Error>>(())
        })?;
        std::fs::remove_dir(run_dir)?;
    }
    times.sort_unstable();
    let (best, median) = (times.first(), times.get(times.len() / 2));
    println!("{runs} runs: best {best:?}, median {median:?}");
    Ok(())
}
