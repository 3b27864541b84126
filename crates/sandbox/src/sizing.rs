//! From a container's limits to the size of its machine.

use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use crate::{Settings, pod::Role, settings::Needs};

/// vCPUs a machine may have.
pub(crate) const VCPUS_MAX: u32 = 32;
const MIB: u64 = 1 << 20;
/// What guest memory is a multiple of: blocks of it come and go.
pub(crate) const STEP: u64 = 2 * MIB;
/// CFS period where none is given, microseconds.
const CPU_PERIOD: u64 = 100_000;
/// Most guest memory that a template which serves all sizes is saved with.
const TEMPLATE_MEMORY: u64 = 512 * MIB;
/// Kernel, agent and page tables, beyond what containers may use. A container
/// at its limit must meet its own OOM killer, not the guest's.
const MEMORY_RESERVE: u64 = 96 * MIB;
/// Smallest guest that boots with room to work.
pub(crate) const MEMORY_MIN: u64 = 128 * MIB;

/// vCPUs and bytes of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Size {
    pub(crate) vcpus: u32,
    pub(crate) memory: u64,
}

impl Size {
    /// As large as the larger of both, in memory and in vCPUs.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.max(other.vcpus),
            memory: self.memory.max(other.memory),
        }
    }

    /// No larger than `other`, in memory and in vCPUs.
    pub(crate) fn within(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.min(other.vcpus),
            memory: self.memory.min(other.memory),
        }
    }

    /// It has all that `other` has.
    pub(crate) fn holds(self, other: Self) -> bool {
        self.or(other) == self
    }
}

/// What a machine boots with, and what it can grow to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) boot: Size,
    pub(crate) max: Size,
}

impl Span {
    /// Of a machine that boots with `size`. `ceiling` is what machines of its driver and
    /// host can grow to, if they can.
    pub(crate) fn open(size: Size, ceiling: Option<Size>) -> Self {
        Self {
            boot: size,
            max: ceiling.map_or(size, |ceiling| ceiling.or(size)),
        }
    }

    /// Of the template for machines of `size`: of this size, unless its clones can grow to
    /// it. Then one with a single vCPU and no more than the default memory serves all.
    pub(crate) fn template(size: Size, ceiling: Option<Size>) -> Self {
        match ceiling {
            Some(ceiling) if ceiling.holds(size) => {
                let boot = Size {
                    vcpus: 1,
                    memory: size.memory.min(TEMPLATE_MEMORY),
                };
                Self::open(boot, Some(ceiling))
            }
            _ => Self::open(size, None),
        }
    }
}

/// What containerd's CRI plugin says of all of a pod's containers (1.7 and newer), in
/// bytes and as a CFS quota and period.
const POD_MEMORY_LIMIT: &str = "io.kubernetes.cri.sandbox-memory";
const POD_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// Bounds of all of a pod's containers together; 0 and less is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodLimits {
    /// Bytes.
    pub memory: i64,
    /// CFS quota and period, microseconds.
    pub cpu_quota: i64,
    /// 0: the usual one.
    pub cpu_period: i64,
}

impl PodLimits {
    /// As containerd's CRI plugin says them.
    pub(crate) fn annotations(self) -> impl Iterator<Item = (String, String)> {
        [
            (POD_MEMORY_LIMIT, self.memory),
            (POD_CPU_QUOTA, self.cpu_quota),
            (POD_CPU_PERIOD, self.cpu_period),
        ]
        .into_iter()
        .map(|(name, value)| (name.into(), value.to_string()))
    }
}

/// Size of a machine for its first container: the limits of one that is alone, those of
/// the pod for a pod's; plus what the guest itself needs. Without limits it is the node's
/// to say, and in any case as large as the pod asked for.
pub(crate) fn size(spec: &Spec, settings: &Settings) -> Size {
    let size = match Role::of(spec) {
        Role::First => pod_size(spec, settings.pod),
        Role::Alone | Role::Member => own_size(spec, settings.container),
    };
    let least = settings.least();
    size.or(Size::new(least.memory, least.vcpus.into()))
}

fn pod_size(spec: &Spec, usual: Needs) -> Size {
    let annotations = spec.annotations().as_ref();
    let number = |name: &str| -> Option<u64> {
        let value: i64 = annotations?.get(name)?.parse().ok()?;
        u64::try_from(value).ok().filter(|&value| value > 0)
    };
    let memory = match number(POD_MEMORY_LIMIT) {
        Some(limit) => with_reserve(limit),
        None => usual.memory.0,
    };
    let vcpus = match number(POD_CPU_QUOTA) {
        Some(quota) => quota.div_ceil(number(POD_CPU_PERIOD).unwrap_or(CPU_PERIOD)),
        None => usual.vcpus.into(),
    };
    Size::new(memory, vcpus)
}

/// One page structure of 64 bytes for each 4 KiB.
fn with_reserve(limit: u64) -> u64 {
    limit
        .saturating_add(limit / 64)
        .saturating_add(MEMORY_RESERVE)
}

impl Size {
    fn new(memory: u64, vcpus: u64) -> Self {
        Self {
            vcpus: u32::try_from(vcpus)
                .unwrap_or(VCPUS_MAX)
                .clamp(1, VCPUS_MAX),
            memory: memory.max(MEMORY_MIN).div_ceil(STEP).saturating_mul(STEP),
        }
    }
}

fn own_size(spec: &Spec, usual: Needs) -> Size {
    let Limits { memory, cpu } = Limits::of(spec);
    let memory = memory.map_or(usual.memory.0, with_reserve);
    Size::new(memory, cpu.map_or(usual.vcpus.into(), vcpus))
}

/// Thousandths of a processor, in whole ones.
fn vcpus(thousandths: u64) -> u64 {
    thousandths.div_ceil(1000)
}

/// What a container may use at most, where that has a bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Limits {
    /// Bytes.
    memory: Option<u64>,
    /// Thousandths of a processor.
    cpu: Option<u64>,
}

impl Limits {
    pub(crate) fn of(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
        resources.map_or(Self::default(), |resources| {
            Self::default().changed_by(resources)
        })
    }

    /// What they are when `resources` has been set, which may be silent about some; 0 and
    /// less is none.
    pub(crate) fn changed_by(self, resources: &LinuxResources) -> Self {
        let bound = |value: i64| u64::try_from(value).ok().filter(|&bound| bound > 0);
        let memory = resources.memory().as_ref().and_then(|m| m.limit());
        let cpu = resources.cpu().as_ref();
        let quota = cpu.and_then(|c| c.quota());
        let period = cpu.and_then(|c| c.period()).filter(|&p| p > 0);
        let thousandths = |quota: u64| {
            quota
                .saturating_mul(1000)
                .div_ceil(period.unwrap_or(CPU_PERIOD))
        };
        Self {
            memory: memory.map_or(self.memory, bound),
            cpu: quota.map_or(self.cpu, |quota| bound(quota).map(thousandths)),
        }
    }

    /// The machine in which all of these find what they may use. Those without a bound
    /// take what is there.
    pub(crate) fn room_for(all: impl IntoIterator<Item = Self>) -> Size {
        let sum = |total: Option<u64>, one: Option<u64>| match (total, one) {
            (Some(total), Some(one)) => Some(total.saturating_add(one)),
            (total, one) => total.or(one),
        };
        let total = all.into_iter().fold(Self::default(), |total, one| Self {
            memory: sum(total.memory, one.memory),
            cpu: sum(total.cpu, one.cpu),
        });
        Size::new(
            total.memory.map_or(0, with_reserve),
            total.cpu.map_or(0, vcpus),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Annotation, Bytes};

    fn sized(resources: &str) -> Size {
        let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
        size(&serde_json::from_str(&spec).unwrap(), &Settings::default())
    }

    #[test]
    fn a_pod_says_what_all_of_it_needs() {
        let pod = |annotations: &str| {
            let role = r#""io.kubernetes.cri.container-type":"sandbox""#;
            let spec = format!(r#"{{"ociVersion":"1.0.2","annotations":{{{role}{annotations}}}}}"#);
            size(&serde_json::from_str(&spec).unwrap(), &Settings::default())
        };
        assert_eq!((pod("").vcpus, pod("").memory), (1, 2048 * MIB));
        let told = pod(
            r#","io.kubernetes.cri.sandbox-memory":"67108864","io.kubernetes.cri.sandbox-cpu-quota":"250000","io.kubernetes.cri.sandbox-cpu-period":"100000""#,
        );
        assert_eq!((told.vcpus, told.memory), (3, 162 * MIB));
        let odd = pod(r#","io.kubernetes.cri.sandbox-memory":"much""#);
        assert_eq!(odd.memory, 2048 * MIB);
    }

    #[test]
    fn the_node_says_what_those_without_limits_get_and_pods_ask_for_more() {
        let mut settings = Settings::default();
        settings.container.memory = Bytes(256 * MIB);
        settings.pod.vcpus = 2;
        settings.annotations.allow = [Annotation::Memory].into();
        let spec = |more: &str| -> Spec {
            serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2"{more}}}"#)).unwrap()
        };
        assert_eq!(size(&spec(""), &settings).memory, 256 * MIB);
        let pod = spec(r#","annotations":{"io.kubernetes.cri.container-type":"sandbox"}"#);
        assert_eq!(size(&pod, &settings).vcpus, 2);
        let asked = spec(r#","annotations":{"dev.walnut.memory":"1g"}"#);
        let settings = settings.asked_by(&asked, false).unwrap();
        let expected = Size {
            vcpus: 1,
            memory: 1024 * MIB,
        };
        assert_eq!(size(&asked, &settings), expected);
    }

    #[test]
    fn limits_become_sizes() {
        let default = sized("{}");
        assert_eq!((default.vcpus, default.memory), (1, 512 * MIB));
        let small =
            sized(r#"{"memory":{"limit":67108864},"cpu":{"quota":150000,"period":100000}}"#);
        assert_eq!((small.vcpus, small.memory), (2, 162 * MIB));
        assert_eq!(sized(r#"{"memory":{"limit":-1}}"#).memory, 512 * MIB);
        assert_eq!(sized(r#"{"memory":{"limit":1}}"#).memory, MEMORY_MIN);
        assert_eq!(sized(r#"{"cpu":{"quota":9000000000}}"#).vcpus, VCPUS_MAX);
    }

    #[test]
    fn what_an_update_is_silent_about_stays() {
        let all = Limits {
            memory: Some(64 * MIB),
            cpu: Some(1500),
        };
        let changed = |resources: &str| all.changed_by(&serde_json::from_str(resources).unwrap());
        assert_eq!(changed("{}"), all);
        assert_eq!(changed(r#"{"cpu":{"shares":7},"memory":{"swap":9}}"#), all);
        let memory = Some(128 * MIB);
        let more = changed(r#"{"memory":{"limit":134217728}}"#);
        assert_eq!(more, Limits { memory, ..all });
        let none = changed(r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#);
        assert_eq!(none, Limits::default());
        let less = changed(r#"{"cpu":{"quota":50000,"period":200000}}"#);
        assert_eq!(less.cpu, Some(250));
    }

    #[test]
    fn room_is_made_for_the_sum_of_what_has_bounds() {
        let limits = |memory: Option<u64>, cpu| Limits {
            memory: memory.map(|mib| mib * MIB),
            cpu,
        };
        let room = |all: &[Limits]| Limits::room_for(all.iter().copied());
        let least = Size {
            vcpus: 1,
            memory: MEMORY_MIN,
        };
        assert_eq!(room(&[]), least);
        assert_eq!(room(&[Limits::default()]), least);
        let two = room(&[
            limits(Some(64), Some(600)),
            Limits::default(),
            limits(Some(192), Some(600)),
        ]);
        let expected = Size {
            vcpus: 2,
            memory: 356 * MIB,
        };
        assert_eq!(two, expected);
        let endless = room(&[limits(None, Some(u64::MAX)), limits(None, Some(1))]);
        assert_eq!(endless.vcpus, VCPUS_MAX);
    }

    #[test]
    fn one_template_serves_all_sizes_that_it_can_grow_to() {
        let size = |vcpus, mib| Size {
            vcpus,
            memory: mib * MIB,
        };
        let ceiling = size(4, 8192);
        let of = |asked| Span::template(asked, Some(ceiling));
        let default = Span {
            boot: size(1, 512),
            max: ceiling,
        };
        for asked in [size(1, 512), size(4, 512), size(1, 514), size(4, 8192)] {
            assert_eq!(of(asked), default, "{asked:?}");
        }
        // It cannot shrink.
        assert_eq!(of(size(2, 128)).boot, size(1, 128));
        assert_eq!(of(size(2, 128)).max, ceiling);
        // More than the host has, or a driver whose machines stay as they are.
        for (asked, ceiling) in [
            (size(5, 512), Some(ceiling)),
            (size(1, 8194), Some(ceiling)),
            (size(2, 1024), None),
        ] {
            let fixed = Span {
                boot: asked,
                max: asked,
            };
            assert_eq!(Span::template(asked, ceiling), fixed);
        }
        // One that boots larger than the ceiling stays what it is.
        let large = size(1, 16384);
        assert_eq!(Span::open(large, Some(ceiling)).max, size(4, 16384));
        assert_eq!(Span::open(size(1, 600), Some(ceiling)).max, ceiling);
    }
}
