//! A container's figures, from its cgroup.

use walnut_protocol::agent::ContainerStatsResponse;

use crate::cgroup::{Cgroup, keyed, single};

/// Reads them all.
pub(crate) fn read(cgroup: &Cgroup) -> ContainerStatsResponse {
    let cpu = cgroup.read("cpu.stat");
    let (io_read, io_written) = io(&cgroup.read("io.stat"));
    ContainerStatsResponse {
        cpu_usage_us: keyed(&cpu, "usage_usec"),
        cpu_user_us: keyed(&cpu, "user_usec"),
        cpu_system_us: keyed(&cpu, "system_usec"),
        cpu_throttled_us: keyed(&cpu, "throttled_usec"),
        memory_current: single(&cgroup.read("memory.current")),
        memory_peak: single(&cgroup.read("memory.peak")),
        memory_limit: single(&cgroup.read("memory.max")),
        memory_swap: single(&cgroup.read("memory.swap.current")),
        pids_current: single(&cgroup.read("pids.current")),
        pids_limit: single(&cgroup.read("pids.max")),
        oom_kills: cgroup.oom_kills(),
        memory_inactive_file: keyed(&cgroup.read("memory.stat"), "inactive_file"),
        io_read,
        io_written,
        ..ContainerStatsResponse::default()
    }
}

/// Bytes read and written, of all devices together.
fn io(text: &str) -> (u64, u64) {
    let sum = |key: &str| {
        text.split_whitespace()
            .filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok())
            .fold(0, u64::saturating_add)
    };
    (sum("rbytes="), sum("wbytes="))
}

#[cfg(test)]
mod tests {
    use super::io;

    #[test]
    fn devices_are_added_up() {
        let text = "254:0 rbytes=3633152 wbytes=0 rios=91 wios=0 dbytes=7 dios=0\n\
                    254:16 rbytes=8 wbytes=5 rios=1\n";
        assert_eq!(io(text), (3_633_160, 5));
        assert_eq!(io(""), (0, 0));
    }
}
