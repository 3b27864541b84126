//! Disks and networks, as the guest sees them.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{TcpListener, UdpSocket},
};

use anyhow::{Context, Result, bail};

use crate::{
    Files, float, head,
    machine::{self, Guest, Monitor},
    row,
};

const DISK: usize = 64 << 20;
const TAP: &str = "bench0";

/// Figures of the guest's, by name.
type Figures = BTreeMap<String, u64>;

/// Runs the guest to its end.
fn figures(guest: &Guest<'_>, monitor: Monitor) -> Result<Figures> {
    eprintln!("{} on {}", guest.words, monitor.name());
    let mut running = guest.start(monitor)?;
    let mut figures = Figures::new();
    for line in running.lines()? {
        if line.starts_with("failed ") {
            bail!("the guest on {}: {line}", monitor.name());
        }
        let mut words = line.split(' ');
        if let (Some("figure"), Some(name), Some(value)) =
            (words.next(), words.next(), words.next())
        {
            figures.insert(name.to_owned(), value.parse()?);
        }
    }
    Ok(figures)
}

/// Prints a figure of nanoseconds, and what it means for a MiB as MiB/s.
fn print(what: &str, name: &str, per_mib: bool, both: &[Figures; 2]) -> Result<()> {
    let [walnut, qemu] = both;
    let of = |figures: &Figures| {
        let ns = figures
            .get(name)
            .with_context(|| format!("the guest said no {name}"));
        ns.map(|ns| float(*ns))
    };
    let (walnut, qemu) = (of(walnut)?, of(qemu)?);
    match per_mib {
        true => row(what, "MiB/s", 1e9 / walnut, 1e9 / qemu),
        false => row(what, "µs", walnut / 1000.0, qemu / 1000.0),
    }
    Ok(())
}

/// Latency and throughput of a disk.
pub(crate) fn disk(files: &Files) -> Result<()> {
    let disk = tempfile::NamedTempFile::new()?;
    disk.as_file().write_all(&vec![7; DISK])?;
    let guest = Guest {
        disk: Some(disk.path()),
        ..files.guest("bench=block")
    };
    let both = [
        figures(&guest, Monitor::Walnut)?,
        figures(&guest, Monitor::Qemu)?,
    ];
    head("A disk: one read at a time, past the guest's page cache, of a file in the host's memory");
    print("4 KiB at random, one", "block-4k-ns", false, &both)?;
    print("1 MiB in sequence", "block-1m-ns", true, &both)?;
    Ok(())
}

/// Latency and throughput of a network.
pub(crate) fn net(files: &Files) -> Result<()> {
    start_peers()?;
    let net = |monitor| -> Result<Figures> {
        let tap = machine::tap(TAP)?;
        let guest = Guest {
            tap: Some(&tap),
            ..files.guest("bench=net")
        };
        figures(&guest, monitor)
    };
    let both = [net(Monitor::Walnut)?, net(Monitor::Qemu)?];
    head("A network: a tap, without vhost");
    print("UDP there and back", "net-ping-ns", false, &both)?;
    print("TCP to the guest", "net-receive-ns", true, &both)?;
    print("TCP from the guest", "net-send-ns", true, &both)?;
    Ok(())
}

/// Starts what the guests talk to: an echo, a source and a sink, until this process
/// ends.
fn start_peers() -> Result<()> {
    let any = std::net::Ipv4Addr::UNSPECIFIED;
    let echo = UdpSocket::bind((any, 1)).context("bind the echo")?;
    let source = TcpListener::bind((any, 2)).context("bind the source")?;
    let sink = TcpListener::bind((any, 3)).context("bind the sink")?;
    std::thread::spawn(move || {
        let chunk = vec![7; 1 << 20];
        for mut guest in source.incoming().flatten() {
            // Fails when the guest has what it wants.
            while guest.write_all(&chunk).is_ok() {}
        }
    });
    std::thread::spawn(move || {
        let mut chunk = vec![0; 1 << 20];
        for mut guest in sink.incoming().flatten() {
            while guest.read(&mut chunk).is_ok_and(|n| n > 0) {}
        }
    });
    std::thread::spawn(move || {
        let mut packet = [0; 64];
        while let Ok((len, from)) = echo.recv_from(&mut packet) {
            // A guest that is gone hears nothing.
            let _ = echo.send_to(packet.get(..len).unwrap_or_default(), from);
        }
    });
    Ok(())
}
