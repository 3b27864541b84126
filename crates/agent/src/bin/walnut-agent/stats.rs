//! A container's figures, from its cgroup.

use walnut_protocol::agent::ContainerStatsResponse;

use crate::cgroup::{Cgroup, keyed, single};

/// Reads them all.
pub(crate) fn read(cgroup: &Cgroup) -> ContainerStatsResponse {
    let cpu = cgroup.read("cpu.stat");
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
        ..ContainerStatsResponse::default()
    }
}
