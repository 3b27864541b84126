//! The device: whose turn it is.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Instant,
};

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
        VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
        VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;

use super::{
    Config, Counters, Error, Link, MAX_PAIRS, QUEUE_SIZE, control,
    header::Rules,
    ring::Vring,
    rx::{Layout, Rx, Taps},
    tap::{self, Tap},
    tx::{Count, Outcome, Tx, Way},
};
use crate::{
    Log,
    limit::Limit,
    virtio::{Activation, Broken, ConfigSpace, Device, Event, Interrupt, MemoryCell},
};

/// Token of [`Link`]; taps have the number of their pair.
const LINK: u32 = u32::MAX;
/// Version of what is saved.
const STATE_VERSION: u8 = 1;
const MIN_MTU: u16 = 68;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

const ALWAYS: u64 = bit(VIRTIO_F_VERSION_1)
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_RING_F_INDIRECT_DESC)
    | bit(VIRTIO_NET_F_MAC)
    | bit(VIRTIO_NET_F_STATUS)
    | bit(VIRTIO_NET_F_MRG_RXBUF);
const OFFLOADS: u64 = bit(VIRTIO_NET_F_CSUM)
    | bit(VIRTIO_NET_F_GUEST_CSUM)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_ECN)
    | bit(VIRTIO_NET_F_HOST_TSO4)
    | bit(VIRTIO_NET_F_HOST_TSO6)
    | bit(VIRTIO_NET_F_HOST_ECN);
const GUEST_USO: u64 = bit(VIRTIO_NET_F_GUEST_USO4) | bit(VIRTIO_NET_F_GUEST_USO6);
const USO: u64 = GUEST_USO | bit(VIRTIO_NET_F_HOST_USO);
const MULTIQUEUE: u64 = bit(VIRTIO_NET_F_MQ) | bit(VIRTIO_NET_F_CTRL_VQ);

/// What the tap may leave to a guest with these features.
fn offload(features: u64) -> u32 {
    let has = |feature: u32| features & bit(feature) != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = tap::CSUM;
    if has(VIRTIO_NET_F_GUEST_TSO4) {
        flags |= tap::TSO4;
    }
    if has(VIRTIO_NET_F_GUEST_TSO6) {
        flags |= tap::TSO6;
    }
    if flags != tap::CSUM && has(VIRTIO_NET_F_GUEST_ECN) {
        flags |= tap::ECN;
    }
    // The kernel knows only both.
    if features & GUEST_USO == GUEST_USO {
        flags |= tap::USO;
    }
    flags
}

/// A queue's place in the device.
#[derive(Debug, Clone, Copy)]
enum Role {
    Receive(usize),
    Send(usize),
    Control,
    None,
}

/// A receive and a transmit queue, and when each wants to go on by itself.
#[derive(Debug)]
struct Pair {
    rx: Rx,
    tx: Tx,
    rx_due: Option<Instant>,
    tx_due: Option<Instant>,
}

#[derive(Debug)]
struct Active {
    memory: MemoryCell,
    interrupt: Arc<dyn Interrupt>,
    rules: Rules,
    /// Queues without a role, by their index.
    unused: Vec<(usize, Queue)>,
}

/// A network device on a tap.
#[derive(Debug)]
pub struct Net {
    taps: Vec<Tap>,
    pairs: Vec<Pair>,
    control: Vring,
    control_due: bool,
    /// Pairs that the driver uses, 1 or more.
    in_use: u16,
    features: u64,
    /// What the tap has been told.
    offload: u32,
    config: Arc<ConfigSpace>,
    queue_sizes: Vec<u16>,
    source: Option<[u8; 6]>,
    link: Link,
    counters: Arc<Counters>,
    receive: Limit,
    send: Limit,
    active: Option<Active>,
    log: Log,
}

impl Net {
    /// A device for the tap whose queues `taps` are, one per queue pair.
    pub fn new(taps: Vec<OwnedFd>, config: Config, log: Log) -> Result<Self, Error> {
        let pairs = u16::try_from(taps.len()).unwrap_or(u16::MAX);
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(Error::Pairs(taps.len()));
        }
        if let Some(mtu) = config.mtu
            && mtu < MIN_MTU
        {
            return Err(Error::Mtu(mtu));
        }
        let taps = taps
            .into_iter()
            .map(Tap::new)
            .collect::<Result<Vec<_>, _>>()?;
        let (features, offload) = set_up(&taps, config.offloads)?;
        Self::on(taps, config, log, features, offload)
    }

    /// A device whose frames go to sockets, a message each, in a tap's place.
    #[cfg(feature = "fuzzing")]
    #[doc(hidden)]
    pub fn on_sockets(sockets: Vec<OwnedFd>, config: Config, log: Log) -> Result<Self, Error> {
        let taps = sockets.into_iter().map(Tap::stand_in).collect();
        // A socket cannot be told what its reader takes.
        let features = (ALWAYS | OFFLOADS | USO) & !bit(VIRTIO_NET_F_GUEST_CSUM);
        Self::on(taps, config, log, features, 0)
    }

    fn on(
        taps: Vec<Tap>,
        config: Config,
        log: Log,
        mut features: u64,
        offload: u32,
    ) -> Result<Self, Error> {
        let pairs = u16::try_from(taps.len()).unwrap_or(u16::MAX);
        if config.mtu.is_some() {
            features |= bit(VIRTIO_NET_F_MTU);
        }
        let mut queues = 2 * taps.len();
        if pairs > 1 {
            features |= MULTIQUEUE;
            queues += 1;
        }
        let mut bytes = config.mac.to_vec();
        bytes.extend_from_slice(&VIRTIO_NET_S_LINK_UP.to_le_bytes()[..2]);
        bytes.extend(pairs.to_le_bytes());
        bytes.extend(config.mtu.unwrap_or(0).to_le_bytes());
        let space = Arc::new(ConfigSpace::new(bytes, 0..0));
        let now = Instant::now();
        Ok(Self {
            pairs: taps.iter().map(|_| Pair::new()).collect(),
            taps,
            control: Vring::default(),
            control_due: false,
            in_use: 1,
            features,
            offload,
            link: Link::new(Arc::clone(&space))?,
            config: space,
            queue_sizes: vec![QUEUE_SIZE; queues],
            source: config.only_own_mac.then_some(config.mac),
            counters: Arc::default(),
            receive: Limit::new(config.receive, now),
            send: Limit::new(config.send, now),
            active: None,
            log,
        })
    }

    /// A handle to the cable, for other threads.
    pub fn link(&self) -> Link {
        self.link.clone()
    }

    /// What the device has done so far, for other threads.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    fn role(&self, index: usize, features: u64) -> Role {
        // §5.1.2: without multi-queue the control queue follows the first pair.
        let control = match features & MULTIQUEUE {
            MULTIQUEUE => 2 * self.pairs.len(),
            some if some == bit(VIRTIO_NET_F_CTRL_VQ) => 2,
            _ => usize::MAX,
        };
        let pairs = if features & MULTIQUEUE == MULTIQUEUE {
            self.pairs.len()
        } else {
            1
        };
        match index {
            index if index == control => Role::Control,
            index if index >= 2 * pairs => Role::None,
            index if index.is_multiple_of(2) => Role::Receive(index / 2),
            index => Role::Send(index / 2),
        }
    }

    fn run(&mut self, role: Role) -> Result<(), Broken> {
        match role {
            Role::Receive(pair) => self.run_rx(pair),
            Role::Send(pair) => self.run_tx(pair),
            Role::Control => self.run_control(),
            Role::None => Ok(()),
        }
    }

    fn run_rx(&mut self, index: usize) -> Result<(), Broken> {
        let in_use = usize::from(self.in_use);
        let (Some(active), Some(pair)) = (&self.active, self.pairs.get_mut(index)) else {
            return Ok(());
        };
        pair.rx_due = None;
        if index >= in_use {
            return Ok(());
        }
        let mem = active.memory.memory();
        let mut count = Count::default();
        let mut way = Way {
            mem: &mem,
            limit: &mut self.receive,
            count: &mut count,
            up: self.link.up(),
        };
        // Queues of the tap that the driver does not use are not lost: the ones it
        // does use share them.
        let mut taps = Taps::new(&mut self.taps, index, in_use);
        let result = pair.rx.run(&mut taps, &mut way);
        self.counters.receive(&count);
        if let Some(why) = pair.rx.complaint.take() {
            self.log
                .say(format_args!("dropped a frame for the guest: {why}"));
        }
        pair.rx_due = due(result?);
        if pair.rx.ring.signal(&mem) {
            active.interrupt.queue(2 * index);
        }
        Ok(())
    }

    fn run_tx(&mut self, index: usize) -> Result<(), Broken> {
        let (Some(active), Some(pair), Some(tap)) = (
            &self.active,
            self.pairs.get_mut(index),
            self.taps.get(index),
        ) else {
            return Ok(());
        };
        let mem = active.memory.memory();
        let mut count = Count::default();
        let mut way = Way {
            mem: &mem,
            limit: &mut self.send,
            count: &mut count,
            up: self.link.up(),
        };
        let result = pair.tx.run(tap, &active.rules, &mut way);
        self.counters.send(&count);
        if let Some(why) = pair.tx.complaint.take() {
            self.log
                .say(format_args!("dropped a frame of the guest's: {why}"));
        }
        pair.tx_due = due(result?);
        if pair.tx.ring.signal(&mem) {
            active.interrupt.queue(2 * index + 1);
        }
        Ok(())
    }

    fn run_control(&mut self) -> Result<(), Broken> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        self.control_due = false;
        if !self.control.queue.ready() {
            return Ok(());
        }
        let mem = active.memory.memory();
        let most = u16::try_from(self.pairs.len()).unwrap_or(1);
        let before = self.in_use;
        self.control_due = control::run(&mut self.control, &mem, most, &mut self.in_use)?;
        if self.control.signal(&mem) {
            let index = 2 * self.pairs.len();
            let multiqueue = active.rules.features & MULTIQUEUE == MULTIQUEUE;
            active.interrupt.queue(if multiqueue { index } else { 2 });
        }
        if self.in_use != before {
            // Frames may wait in taps that now belong to other queues.
            for index in 0..usize::from(self.in_use) {
                self.run_rx(index)?;
            }
        }
        Ok(())
    }

    /// A tap has frames, or room.
    fn tap(&mut self, index: usize) -> Result<(), Broken> {
        let Some(tap) = self.taps.get_mut(index) else {
            return Ok(());
        };
        tap.readable = true;
        self.run_rx(index % usize::from(self.in_use))?;
        if self.pairs.get(index).is_some_and(|pair| pair.tx.blocked) {
            self.run_tx(index)?;
        }
        Ok(())
    }

    /// Tells the driver of the link, if it has changed.
    fn tell(&self) {
        if let Some(active) = &self.active
            && self.link.changed()
        {
            active.interrupt.config();
        }
    }

    fn everything(&mut self) -> Result<(), Broken> {
        for index in 0..self.pairs.len() {
            self.run_rx(index)?;
            self.run_tx(index)?;
        }
        Ok(())
    }

    fn everything_due(&mut self) -> Result<(), Broken> {
        let now = Instant::now();
        let past = |due: Option<Instant>| due.is_some_and(|at| at <= now);
        for index in 0..self.pairs.len() {
            let Some(pair) = self.pairs.get(index) else {
                break;
            };
            let (rx, tx) = (past(pair.rx_due), past(pair.tx_due));
            if rx {
                self.run_rx(index)?;
            }
            if tx {
                self.run_tx(index)?;
            }
        }
        if self.control_due {
            self.run_control()?;
        }
        Ok(())
    }
}

impl Pair {
    fn new() -> Self {
        Self {
            rx: Rx::new(),
            tx: Tx::new(),
            rx_due: None,
            tx_due: None,
        }
    }
}

/// Tells the tap what a guest that takes every offload takes. The features that
/// can be offered, and what the tap has been told.
fn set_up(taps: &[Tap], offloads: bool) -> Result<(u64, u32), Error> {
    let candidates = if offloads {
        vec![ALWAYS | OFFLOADS | USO, ALWAYS | OFFLOADS, ALWAYS]
    } else {
        vec![ALWAYS]
    };
    let mut result = Err(Error::Pairs(0));
    for features in candidates {
        let flags = offload(features);
        result = taps
            .first()
            .map_or(Ok(()), |tap| tap.set_offload(flags))
            .map(|()| (features, flags))
            .map_err(|e| Error::Tap("set the offloads", e.into()));
        if result.is_ok() {
            break;
        }
    }
    result
}

fn due(outcome: Outcome) -> Option<Instant> {
    match outcome {
        Outcome::Rest => None,
        Outcome::Again => Some(Instant::now()),
        Outcome::Limited(at) => Some(at),
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn watched(&self) -> Vec<(BorrowedFd<'_>, u32)> {
        let taps = self.taps.iter().zip(0..).map(|(tap, n)| (tap.fd(), n));
        taps.chain([(self.link.fd(), LINK)]).collect()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let features = activation.features;
        let has = |feature: u32| features & bit(feature) != 0;
        let wanted = offload(features);
        let mut result = Ok(());
        if wanted != self.offload {
            result = self
                .taps
                .first()
                .map_or(Ok(()), |tap| tap.set_offload(wanted).map_err(|_| Broken));
            self.offload = wanted;
        }
        let event_idx = has(VIRTIO_RING_F_EVENT_IDX);
        let layout = Layout {
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            large: wanted & !tap::CSUM != 0,
            flags: has(VIRTIO_NET_F_GUEST_CSUM),
        };
        let mut unused = Vec::new();
        for (index, queue) in activation.queues.into_iter().enumerate() {
            match self.role(index, features) {
                Role::Receive(pair) => self.pairs[pair].rx.start(queue, event_idx, layout),
                Role::Send(pair) => self.pairs[pair].tx.start(queue, event_idx),
                Role::Control => self.control = Vring::new(queue, event_idx),
                Role::None => unused.push((index, queue)),
            }
        }
        for tap in &mut self.taps {
            // Frames that came while nobody was interested.
            tap.readable = true;
        }
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            rules: Rules {
                features,
                source: self.source,
            },
            unused,
        });
        // The link may have changed during a pause.
        self.tell();
        result
    }

    fn event(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Queue(index) => {
                let features = self.active.as_ref().map_or(0, |it| it.rules.features);
                self.run(self.role(index, features))
            }
            Event::Watched(LINK) => {
                self.tell();
                self.everything()
            }
            Event::Watched(index) => self.tap(usize::try_from(index).unwrap_or(usize::MAX)),
            Event::Deadline => self.everything_due(),
            Event::Config => Ok(()),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        if self.control_due {
            return Some(Instant::now());
        }
        self.pairs
            .iter()
            .flat_map(|pair| [pair.rx_due, pair.tx_due])
            .flatten()
            .min()
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some(active) = self.active.take() else {
            return Vec::new();
        };
        let mut unused = active.unused;
        let queues = (0..self.queue_sizes.len())
            .map(|index| match self.role(index, active.rules.features) {
                Role::Receive(pair) => self.pairs[pair].rx.stop(),
                Role::Send(pair) => self.pairs[pair].tx.stop(),
                Role::Control => std::mem::take(&mut self.control).queue,
                Role::None => unused
                    .iter()
                    .position(|(at, _)| *at == index)
                    .map(|at| unused.swap_remove(at).1)
                    .unwrap_or_default(),
            })
            .collect();
        for pair in &mut self.pairs {
            (pair.rx_due, pair.tx_due) = (None, None);
        }
        self.control_due = false;
        queues
    }

    fn reset(&mut self) {
        self.in_use = 1;
    }

    fn save(&self) -> Vec<u8> {
        let [low, high] = self.in_use.to_le_bytes();
        vec![STATE_VERSION, low, high]
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Broken> {
        let &[STATE_VERSION, low, high] = state else {
            return Err(Broken);
        };
        let in_use = u16::from_le_bytes([low, high]);
        if in_use == 0 || usize::from(in_use) > self.pairs.len() {
            return Err(Broken);
        }
        self.in_use = in_use;
        Ok(())
    }
}
