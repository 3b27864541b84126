//! From a container's limits to the size of its machine.

use oci_spec::runtime::Spec;

/// vCPUs a machine may have.
pub(crate) const VCPUS_MAX: u32 = 32;
const MIB: u64 = 1 << 20;
/// Guest memory where the container has no limit of its own.
const MEMORY_DEFAULT: u64 = 512 * MIB;
/// Kernel, agent and page tables, beyond what containers may use. A container
/// at its limit must meet its own OOM killer, not the guest's.
const MEMORY_RESERVE: u64 = 96 * MIB;
/// Smallest guest that boots with room to work.
const MEMORY_MIN: u64 = 128 * MIB;

/// vCPUs and bytes of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) vcpus: u32,
    pub(crate) memory: u64,
}

/// Size of a machine for one container: its limits, plus what the guest itself
/// needs.
pub(crate) fn size(spec: &Spec) -> Size {
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    let limit = resources
        .and_then(|r| r.memory().as_ref())
        .and_then(|m| m.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|&limit| limit > 0);
    let memory = match limit {
        // One page structure of 64 bytes for each 4 KiB.
        Some(limit) => limit
            .saturating_add(limit / 64)
            .saturating_add(MEMORY_RESERVE),
        None => MEMORY_DEFAULT,
    }
    .max(MEMORY_MIN)
    .div_ceil(MIB)
    .saturating_mul(MIB);
    let cpu = resources.and_then(|r| r.cpu().as_ref());
    let quota = cpu.and_then(|c| c.quota()).filter(|&q| q > 0);
    let period = cpu.and_then(|c| c.period()).filter(|&p| p > 0);
    let vcpus = match quota.and_then(|q| u64::try_from(q).ok()) {
        Some(quota) => quota.div_ceil(period.unwrap_or(100_000)),
        None => 1,
    };
    Size {
        vcpus: u32::try_from(vcpus)
            .unwrap_or(VCPUS_MAX)
            .clamp(1, VCPUS_MAX),
        memory,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(resources: &str) -> Size {
        let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
        size(&serde_json::from_str(&spec).unwrap())
    }

    #[test]
    fn limits_become_sizes() {
        let default = sized("{}");
        assert_eq!((default.vcpus, default.memory), (1, MEMORY_DEFAULT));
        let small =
            sized(r#"{"memory":{"limit":67108864},"cpu":{"quota":150000,"period":100000}}"#);
        assert_eq!((small.vcpus, small.memory), (2, 161 * MIB));
        assert_eq!(sized(r#"{"memory":{"limit":-1}}"#).memory, MEMORY_DEFAULT);
        assert_eq!(sized(r#"{"memory":{"limit":1}}"#).memory, MEMORY_MIN);
        assert_eq!(sized(r#"{"cpu":{"quota":9000000000}}"#).vcpus, VCPUS_MAX);
    }
}
