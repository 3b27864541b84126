//! `walnut-oci events`: figures as runc prints them.

use std::{
    io::{self, Write},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use serde_json::{Value, json};
use walnut_sandbox::BundleStatus;

use super::{args::Events, context::Context};

pub(super) async fn events(context: &Context, args: &Events) -> Result<()> {
    let interval = interval(&args.interval)?;
    let state = context.bundles.find(&args.id)?;
    let supervisor = context.supervisor(&state).await?;
    let mut killed = 0;
    loop {
        let figures = supervisor.stats().await;
        let (metrics, _) = match figures {
            Ok(figures) => figures,
            Err(_) if !args.stats && has_ended(context, &args.id) => return Ok(()),
            Err(e) => return Err(e),
        };
        let mut out = io::stdout().lock();
        let kills = metrics.memory_events.oom_kill;
        if !args.stats && kills > killed {
            writeln!(out, "{}", json!({"type": "oom", "id": args.id}))?;
        }
        killed = kills;
        let event = json!({"type": "stats", "id": args.id, "data": data(&metrics)});
        writeln!(out, "{event}")?;
        drop(out);
        if args.stats {
            return Ok(());
        }
        tokio::time::sleep(interval).await;
    }
}

fn has_ended(context: &Context, id: &str) -> bool {
    let state = context.bundles.find(id);
    state.is_ok_and(|state| state.status == BundleStatus::Stopped)
}

/// runc's shape, of what the container's kernel counts.
fn data(metrics: &Metrics) -> Value {
    let memory = &metrics.memory;
    let cpu = &metrics.cpu;
    let ns = |us: u64| us.saturating_mul(1000);
    let io = |op: &str, bytes: u64| json!({"major": 0, "minor": 0, "op": op, "value": bytes});
    let read = metrics.io.usage.iter().map(|u| u.rbytes).sum();
    let written = metrics.io.usage.iter().map(|u| u.wbytes).sum();
    json!({
        "cpu": {
            "usage": {
                "total": ns(cpu.usage_usec),
                "kernel": ns(cpu.system_usec),
                "user": ns(cpu.user_usec),
            },
            "throttling": {
                "periods": cpu.nr_periods,
                "throttledPeriods": cpu.nr_throttled,
                "throttledTime": ns(cpu.throttled_usec),
            },
        },
        "memory": {
            "usage": {
                "limit": memory.usage_limit,
                "usage": memory.usage,
                "max": memory.max_usage,
                "failcnt": metrics.memory_events.oom_kill,
            },
            "swap": {"limit": 0, "usage": memory.swap_usage, "failcnt": 0},
            "kernel": {"limit": 0, "failcnt": 0},
            "kernelTCP": {"limit": 0, "failcnt": 0},
            "raw": {"inactive_file": memory.inactive_file},
        },
        "pids": {"current": metrics.pids.current, "limit": pids(metrics.pids.limit)},
        "blkio": {"ioServiceBytesRecursive": [io("Read", read), io("Write", written)]},
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

/// runc has 0 for none.
fn pids(limit: u64) -> u64 {
    match limit {
        u64::MAX => 0,
        limit => limit,
    }
}

/// A duration as Go writes it, of one unit.
fn interval(text: &str) -> Result<Duration> {
    let at = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let scale = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => bail!("--interval {text}: write it as 5s, 500ms or 1m"),
    };
    let number: f64 = number
        .parse()
        .with_context(|| format!("--interval {text}"))?;
    let seconds = number * scale;
    if !(0.001..=86_400.0).contains(&seconds) {
        bail!("--interval {text}: from 1ms to 24h");
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals() {
        assert_eq!(interval("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(interval("1.5m").unwrap(), Duration::from_secs(90));
        assert_eq!(interval("500ms").unwrap(), Duration::from_millis(500));
        for bad in ["", "5", "s", "-1s", "0s", "1d", "nans", "infs"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }
}
