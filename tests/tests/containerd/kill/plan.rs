//! Who is killed, when: drawn from a seed, so that it can be drawn again.

use std::time::Duration;

/// A generator of numbers (SplitMix64), the same ones for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).unwrap();
        usize::try_from(self.next() % limit).unwrap()
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// A step of a pod's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    RunPod,
    CreateFirst,
    StartFirst,
    Exec,
    CreateSecond,
    StartSecond,
    StopFirst,
    RemoveFirst,
    StopPod,
    RemovePod,
}

impl Step {
    pub(crate) const ALL: [Self; 10] = [
        Self::RunPod,
        Self::CreateFirst,
        Self::StartFirst,
        Self::Exec,
        Self::CreateSecond,
        Self::StartSecond,
        Self::StopFirst,
        Self::RemoveFirst,
        Self::StopPod,
        Self::RemovePod,
    ];
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Containerd,
    Shim,
    Machine,
    /// QEMU's vsock device; `walnut-vmm` has its own within.
    Vsock,
    /// Either process of virtiofsd.
    FileServer,
    /// The guest's kernel panics, as it does when its first process, the agent, dies.
    Guest,
    /// The command that starts a shim, or cleans up after one; at a moment of its own life,
    /// which is short.
    Command,
    /// The shim, while containerd is away.
    ShimUnseen,
    /// The machine, while containerd is away.
    MachineUnseen,
}

/// One kill.
#[derive(Debug, Clone)]
pub(crate) struct Kill {
    pub(crate) seed: u64,
    pub(crate) step: Step,
    /// Percent of the step's usual duration.
    pub(crate) at: u32,
    pub(crate) victim: Victim,
    /// How long containerd is away, if it is it.
    pub(crate) away: Duration,
}

impl Kill {
    pub(crate) fn drawn(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let step = random.pick(&Step::ALL);
        let at = u32::try_from(random.below(120)).unwrap();
        let away = Duration::from_millis(u64::try_from(random.below(1500)).unwrap());
        let mut victims = vec![
            Victim::Containerd,
            Victim::Containerd,
            Victim::Shim,
            Victim::Shim,
            Victim::Machine,
            Victim::FileServer,
            Victim::ShimUnseen,
            Victim::MachineUnseen,
        ];
        if walnut_tests::machine().0 == "qemu" {
            victims.push(Victim::Vsock);
        }
        // Where a program runs in the guest that can bring it down.
        let first = [
            Step::Exec,
            Step::CreateSecond,
            Step::StartSecond,
            Step::StopFirst,
        ];
        if first.contains(&step) || [Step::RemoveFirst, Step::StopPod].contains(&step) {
            victims.extend([Victim::Guest; 2]);
        }
        // Where such a command runs.
        let commands = [
            Step::RunPod,
            Step::StartFirst,
            Step::StartSecond,
            Step::StopFirst,
            Step::StopPod,
        ];
        if commands.contains(&step) {
            victims.push(Victim::Command);
        }
        Self {
            seed,
            step,
            at,
            victim: random.pick(&victims),
            away,
        }
    }
}
