//! Machines that grow: so one template serves all sizes, and a sandbox gets more when it
//! gets another container, or one of its gets more. When it has less to do, it gives that
//! back.

use std::{
    fs::File,
    io::Read,
    sync::{Arc, Mutex as StdMutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Mutex, MutexGuard};
use tracing::{debug, info, warn};
use walnut_machine::{Driver, Machine, Resize};
use walnut_protocol::{
    agent::{Empty, OnlineCpusRequest},
    agent_ttrpc::AgentClient,
};

use crate::{
    Error, Result, Sandbox,
    agent::{fault, soon},
    cgroup, host_memory,
    sandbox::lock,
    sizing::{Limits, STEP, Size, VCPUS_MAX},
};

/// Room for more memory than that is not kept. It costs its guest nothing, and its
/// monitor two bytes of address space and a bit of each snapshot for every 2 MiB.
const MEMORY_MAX: u64 = 256 << 30;
/// Longest a guest may take to have the memory that it was given.
const DEADLINE: Duration = Duration::from_secs(20);
/// The first pause before its memory is looked at again, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// What machines of a driver can grow to on this host, if they can.
///
/// No guest has use for more than there is: as many vCPUs as processors (and two, for
/// a guest is often asked to have them), and memory as the host's, up to the next power
/// of two, so that a kernel that takes a little more for itself does not make all
/// templates anew. vCPUs that are not online have a thread of the monitor's each, which
/// sleeps.
pub(crate) fn ceiling(driver: &dyn Driver) -> Option<Size> {
    if !driver.grows() {
        return None;
    }
    let (_, memory) = host_memory()?;
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
    Some(limited(memory, processors, address_bits()))
}

fn limited(memory: u64, processors: usize, address_bits: u32) -> Size {
    // Above memory there must be addresses left for devices.
    let reach = 1 << address_bits.clamp(33, 52) >> 1;
    Size {
        memory: memory.next_power_of_two().min(reach).min(MEMORY_MAX),
        vcpus: u32::try_from(processors)
            .unwrap_or(VCPUS_MAX)
            .clamp(2, VCPUS_MAX),
    }
}

/// Bits of the processor's physical addresses; the fewest there are, if it does not say.
fn address_bits() -> u32 {
    const ENOUGH: u64 = 16 << 10;
    let mut text = String::new();
    // The first processor's lines.
    let read = File::open("/proc/cpuinfo").map(|file| file.take(ENOUGH).read_to_string(&mut text));
    let line = text.lines().find(|line| line.starts_with("address sizes"));
    let bits = line.and_then(|line| line.split_once(':')?.1.split_whitespace().next());
    match (read, bits.and_then(|bits| bits.parse().ok())) {
        (Ok(_), Some(bits)) => bits,
        _ => 36,
    }
}

/// How long what containers have no use for is kept: one that is started again finds its
/// machine as it left it.
const LINGER: Duration = Duration::from_secs(10);
/// What a guest keeps of the memory that it does not use, when it gives the rest back.
const KEPT: u64 = 64 << 20;

/// How large a sandbox's machine is.
#[derive(Debug)]
pub(crate) struct Sizes {
    now: StdMutex<Size>,
    /// What it was asked to be, whatever containers it has.
    pub(crate) least: Size,
    pub(crate) max: Size,
    /// Held while it changes.
    changing: Mutex<()>,
}

impl Sizes {
    pub(crate) fn new(now: Size, least: Size, max: Size) -> Self {
        Self {
            now: StdMutex::new(now),
            least,
            max,
            changing: Mutex::default(),
        }
    }

    pub(crate) fn now(&self) -> Size {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, size: Size) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = size;
    }

    async fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().await
    }
}

impl Sandbox {
    /// Guest memory in bytes, and vCPUs, that it can grow to; what it has if it cannot.
    pub fn max_size(&self) -> (u64, u32) {
        let Size { memory, vcpus } = self.size.max;
        (memory, vcpus)
    }

    /// Makes the sandbox's machine at least so large: guest memory in bytes, which is
    /// rounded up to 2 MiB, and vCPUs online. Nothing gets less by it. Returns when the guest
    /// has both. Fails if its machine is of a driver that cannot, or was not made for so
    /// much ([`Self::max_size`]).
    pub async fn grow(&self, memory: u64, vcpus: u32) -> Result<()> {
        let _one = self.size.changing().await;
        let now = self.size.now();
        let memory = memory.div_ceil(STEP).saturating_mul(STEP);
        let wanted = now.or(Size { vcpus, memory });
        if wanted == now {
            return Ok(());
        }
        if !self.size.max.holds(wanted) {
            return Err(self.too_small(wanted));
        }
        // No machine is saved with memory that nobody knows of.
        let _whole = self.saving.read().await;
        self.with_cgroup(|cgroup| cgroup::resize(cgroup, wanted.memory));
        grow(self.machine.as_ref(), &self.agent, now, wanted).await?;
        self.size.set(wanted);
        Ok(())
    }

    /// What all containers may use, with the bounds `own` for the container `id`, or without
    /// it.
    fn room(&self, id: &str, own: Option<Limits>) -> Size {
        let containers = lock(&self.containers);
        let others = containers.iter().filter(|(other, _)| *other != id);
        let others = others.map(|(_, container)| *lock(&container.limits));
        Limits::room_for(others.chain(own))
    }

    /// Makes the machine large enough for the containers that it has and one more, or one
    /// that gets more, as far as it can grow. Where it cannot, they share what there is, as more containers than
    /// a node has memory for would.
    pub(crate) async fn make_room(&self, id: &str, more: Limits) {
        let wanted = self.room(id, Some(more));
        let now = self.size.now();
        let most = wanted.within(self.size.max).or(now);
        if !most.holds(wanted) {
            let Size { memory, vcpus } = self.size.max;
            info!(
                "the containers may use {} MiB and {} vCPUs together with {id}, and their machine can have {} MiB and {vcpus}",
                wanted.memory >> 20,
                wanted.vcpus,
                memory >> 20,
            );
        }
        if let Err(e) = self.grow(most.memory, most.vcpus).await {
            warn!("make room for {id}: {e}");
        }
    }

    /// Gives back, in a while, what its containers have no use for by then.
    pub(crate) fn give_back_later(self: &Arc<Self>) {
        if self.machine.as_resize().is_none() || self.size.now() == self.size.least {
            return;
        }
        let sandbox = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            if let Some(sandbox) = sandbox.upgrade()
                && let Err(e) = sandbox.give_back().await
            {
                debug!("make the machine smaller: {e}");
            }
        });
    }

    /// Makes the machine as small as its containers let it be, and no smaller than it was
    /// asked to be when it was started.
    async fn give_back(&self) -> Result<()> {
        let Some(resize) = self.machine.as_resize() else {
            return Ok(());
        };
        let _one = self.size.changing().await;
        let mut size = self.size.now();
        let wanted = self.room("", None).or(self.size.least).within(size);
        if wanted == size {
            return Ok(());
        }
        let _whole = self.saving.read().await;
        if wanted.vcpus < size.vcpus {
            size.vcpus = offline(&self.agent, wanted.vcpus).await?.min(size.vcpus);
            self.size.set(size);
        }
        if wanted.memory < size.memory {
            size.memory = shrink(resize, &self.agent, size.memory, wanted.memory).await?;
            self.size.set(size);
            self.with_cgroup(|cgroup| cgroup::resize(cgroup, size.memory));
        }
        info!(
            "the machine has {} MiB and {} vCPUs again",
            size.memory >> 20,
            size.vcpus
        );
        Ok(())
    }

    fn too_small(&self, wanted: Size) -> Error {
        let Size { memory, vcpus } = self.size.max;
        let why = match self.machine.as_resize() {
            None => format!(
                "machines of the driver {} keep the size they started with",
                self.driver()
            ),
            Some(_) => "it was not made for more".to_owned(),
        };
        Error::Invalid(format!(
            "let the sandbox have {} MiB of memory and {} vCPUs: it has {} MiB and {vcpus}, and \
             {why}",
            wanted.memory >> 20,
            wanted.vcpus,
            memory >> 20,
        ))
    }
}

/// Makes a machine larger. Returns when its guest has the memory and the vCPUs.
pub(crate) async fn grow(
    machine: &dyn Machine,
    agent: &AgentClient,
    from: Size,
    to: Size,
) -> Result<()> {
    let resize = machine
        .as_resize()
        .ok_or_else(|| Error::Invalid("make the machine larger: its driver cannot".to_owned()))?;
    let more = to.memory.saturating_sub(from.memory);
    let mut before = 0;
    if more > 0 {
        before = total(agent).await?;
        resize.set_memory(to.memory).await?;
    }
    // Meanwhile the guest takes the memory.
    if to.vcpus > from.vcpus {
        let request = OnlineCpusRequest {
            count: to.vcpus,
            ..Default::default()
        };
        let reply = agent.online_cpus(soon(), &request).await;
        reply.map_err(|e| fault("bring vCPUs online", e))?;
    }
    match more {
        0 => Ok(()),
        _ => taken(resize, agent, to.memory, before.saturating_add(more)).await,
    }
}

/// Has the guest do with so many vCPUs; how many it has.
async fn offline(agent: &AgentClient, vcpus: u32) -> Result<u32> {
    let request = OnlineCpusRequest {
        count: vcpus,
        exact: true,
        ..Default::default()
    };
    let reply = agent.online_cpus(soon(), &request).await;
    let reply = reply.map_err(|e| fault("take vCPUs offline", e))?;
    // An agent of an earlier release takes none.
    Ok(reply.online)
}

/// Has the guest give memory back, but none that it uses; what it has in the end.
async fn shrink(resize: &dyn Resize, agent: &AgentClient, from: u64, to: u64) -> Result<u64> {
    let memory = agent.guest_memory(soon(), &Empty::default()).await;
    let memory = memory.map_err(|e| fault("ask for the guest's memory", e))?;
    let spare = memory.available.saturating_sub(KEPT) / STEP * STEP;
    let to = to.max(from.saturating_sub(spare));
    if to >= from {
        return Ok(from);
    }
    resize.set_memory(to).await?;
    let (mut pause, longest) = PAUSES;
    let began = Instant::now();
    let mut has = resize.memory().await?;
    while has > to && began.elapsed() < DEADLINE {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
        has = resize.memory().await?;
    }
    if has > to {
        // What lies there cannot move; it is not asked for that again and again.
        resize.set_memory(has).await?;
    }
    total(agent).await?;
    Ok(has)
}

/// Returns when the guest has all its memory plugged, and gives it out.
async fn taken(resize: &dyn Resize, agent: &AgentClient, memory: u64, total_: u64) -> Result<()> {
    // The kernel keeps some of what it is given at times.
    let enough = total_ - total_ / 64;
    let (mut pause, longest) = PAUSES;
    let began = Instant::now();
    loop {
        let has = resize.memory().await?;
        if has >= memory && total(agent).await? >= enough {
            return Ok(());
        }
        if began.elapsed() > DEADLINE {
            return Err(Error::Machine(format!(
                "make the machine larger: its guest has {} MiB of {} after {} s",
                has >> 20,
                memory >> 20,
                DEADLINE.as_secs()
            )));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

/// Memory that the guest's kernel has to give out, as it says, and that its containers
/// together may use from now on.
async fn total(agent: &AgentClient) -> Result<u64> {
    let reply = agent.adjust_memory(soon(), &Empty::default()).await;
    let reply = reply.map_err(|e| fault("let containers have the guest's memory", e))?;
    Ok(reply.total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_is_the_hosts_and_leaves_addresses() {
        let gib = |n: u64| n << 30;
        let memory = |host, bits| limited(host, 2, bits).memory;
        assert_eq!(memory(gib(24) - 12345, 46), gib(32));
        assert_eq!(memory(gib(32), 46), gib(32));
        assert_eq!(memory(gib(64), 36), gib(32));
        assert_eq!(memory(gib(3000), 52), MEMORY_MAX);
        assert!(memory(u64::MAX >> 1, u32::MAX) <= MEMORY_MAX);
        let vcpus = |processors| limited(1, processors, 46).vcpus;
        assert_eq!((vcpus(0), vcpus(2), vcpus(1024)), (2, 2, VCPUS_MAX));
        assert!((32..=57).contains(&address_bits()));
    }
}
