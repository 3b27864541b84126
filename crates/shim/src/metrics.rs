//! A container's figures as containerd wants them: `io.containerd.cgroups.v2.Metrics`.

use containerd_shim_protos::{
    cgroups_v2::metrics::{CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat},
    protobuf::{self, Message, MessageField},
};
use walnut_sandbox::{ContainerStats, GuestMemoryResponse, METRICS_GUEST_MEMORY};

/// What they are, as containerd names it.
pub(crate) const KIND: &str = "io.containerd.cgroups.v2.Metrics";

/// The container's figures, with what the guest says of all its memory beside them.
pub(crate) fn encode(
    container: &ContainerStats,
    guest: &GuestMemoryResponse,
) -> protobuf::Result<Vec<u8>> {
    let mut metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: container.pids_current,
            limit: limit(container.pids_limit),
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: container.cpu_usage_us,
            user_usec: container.cpu_user_us,
            system_usec: container.cpu_system_us,
            throttled_usec: container.cpu_throttled_us,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            usage: container.memory_current,
            usage_limit: limit(container.memory_limit),
            max_usage: container.memory_peak,
            swap_usage: container.memory_swap,
            inactive_file: container.memory_inactive_file,
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            oom_kill: container.oom_kills,
            ..Default::default()
        }),
        io: MessageField::some(IOStat {
            usage: vec![IOEntry {
                rbytes: container.io_read,
                wbytes: container.io_written,
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    metrics
        .mut_unknown_fields()
        .add_length_delimited(METRICS_GUEST_MEMORY, guest.write_to_bytes()?);
    metrics.write_to_bytes()
}

/// A limit as the kernel's `max` reads to containerd, which subtracts from it.
fn limit(limit: u64) -> u64 {
    match limit {
        0 => u64::MAX,
        limit => limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_reads_it_and_we_find_the_guest() {
        let container = ContainerStats {
            cpu_usage_us: 7,
            memory_inactive_file: 9,
            io_written: 11,
            ..Default::default()
        };
        let guest = GuestMemoryResponse {
            total: 5,
            ..Default::default()
        };
        let bytes = encode(&container, &guest).unwrap();
        let metrics = Metrics::parse_from_bytes(&bytes).unwrap();
        assert_eq!(metrics.cpu.usage_usec, 7);
        assert_eq!(metrics.memory.inactive_file, 9);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(metrics.io.usage[0].wbytes, 11);
        let field = metrics.unknown_fields().get(METRICS_GUEST_MEMORY);
        let Some(protobuf::UnknownValueRef::LengthDelimited(guest)) = field else {
            unreachable!("{field:?}");
        };
        assert_eq!(
            GuestMemoryResponse::parse_from_bytes(guest).unwrap().total,
            5
        );
    }
}
