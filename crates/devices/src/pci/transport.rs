//! virtio's registers in a PCI function (virtio 1.3 §4.1.4), and the state
//! machine that guards them (§2.1, §3.1).

use std::{
    fmt::Debug,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_queue::{Queue, QueueState, QueueT};

use super::{
    Messages,
    config::{self, Config, Identity},
    msix::{self, Msix},
    state::{FunctionState, StateError},
};
use crate::virtio::{Activation, Interrupt, MemoryCell, Port, Quiesced};

/// Size of the one BAR.
pub(super) const BAR_SIZE: u64 = 0x8000;
const COMMON: usize = 0;
const COMMON_SIZE: usize = 0x40;
const ISR: usize = 0x1000;
const DEVICE: usize = 0x2000;
const NOTIFY: usize = 0x3000;
const TABLE: usize = 0x4000;
const PENDING: usize = 0x5000;
const REGION: usize = 0x1000;
/// Bytes between two queues' doorbells.
const DOORBELL: usize = 4;
/// No vector.
const NO_VECTOR: u16 = 0xffff;
/// Of the ISR: a queue has used buffers; the configuration has changed.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Who wants to know where the doorbells are.
pub trait Doorbells: Send + Sync + Debug {
    /// They are `DOORBELL * n` bytes after `first`, for queue `n`; or nowhere.
    fn moved(&self, first: Option<u64>);
    /// Bytes between two of them.
    fn stride() -> u64
    where
        Self: Sized,
    {
        DOORBELL as u64
    }
}

/// One queue's registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

#[derive(Debug)]
struct Registers {
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// The way back to the driver.
#[derive(Debug)]
struct Back {
    msix: Mutex<Msix>,
    isr: AtomicU8,
    /// How many times the driver has begun with the device: one more than resets.
    term: AtomicU64,
    /// The term in which the device broke last; 0 if it never did.
    broke: AtomicU64,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Registers are whole whoever panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Back {
    fn raise(&self, vector: u16) {
        if vector != NO_VECTOR {
            lock(&self.msix).raise(vector.into());
        }
    }
}

impl Back {
    fn term(&self) -> u64 {
        self.term.load(Ordering::Acquire)
    }

    fn queue(&self, index: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        if let Some(vector) = self.queue_vectors.get(index) {
            self.raise(vector.load(Ordering::Acquire));
        }
    }

    fn config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.raise(self.config_vector.load(Ordering::Acquire));
    }

    fn needs_reset(&self) -> bool {
        self.broke.load(Ordering::Acquire) == self.term()
    }

    fn break_in(&self, term: u64) {
        self.broke.fetch_max(term, Ordering::AcqRel);
        self.config();
    }
}

/// The way back for as long as the driver does not begin anew. A device learns of a
/// reset later than it happens: what it says meanwhile is of a driver that has gone, and
/// must not be the next one's.
#[derive(Debug)]
struct Line {
    back: Arc<Back>,
    term: u64,
}

impl Line {
    fn is_up(&self) -> bool {
        self.back.term() == self.term
    }
}

impl Interrupt for Line {
    fn queue(&self, index: usize) {
        if self.is_up() {
            self.back.queue(index);
        }
    }

    fn config(&self) {
        if self.is_up() {
            self.back.config();
        }
    }

    fn needs_reset(&self) {
        if self.is_up() {
            self.back.break_in(self.term);
        }
    }
}

/// A virtio device as a PCI function.
#[derive(Debug)]
pub struct VirtioPci {
    port: Port,
    memory: MemoryCell,
    config: Mutex<Place>,
    registers: Mutex<Registers>,
    back: Arc<Back>,
    doorbells: Box<dyn Doorbells>,
}

/// The configuration space, and where the BAR is.
#[derive(Debug)]
struct Place {
    config: Config,
    bar: Option<u64>,
    msix: usize,
}

fn class(id: u32) -> [u8; 3] {
    match id {
        1 => [0x02, 0x00, 0x00],
        2 => [0x01, 0x80, 0x00],
        3 => [0x07, 0x80, 0x00],
        _ => [0xff, 0x00, 0x00],
    }
}

impl VirtioPci {
    pub(super) fn new(
        port: Port,
        memory: MemoryCell,
        messages: Arc<dyn Messages>,
        doorbells: Box<dyn Doorbells>,
        bar: Option<u64>,
    ) -> Self {
        let count = port.queue_sizes().len();
        let msix = Msix::new(count + 1, messages);
        let id = u16::try_from(port.id()).unwrap_or(0);
        let mut config = Config::new(Identity {
            vendor: 0x1af4,
            device: 0x1040 + id,
            revision: 1,
            class: class(port.id()),
            subsystem: 0x40 + id,
        });
        config.add_bar(BAR_SIZE);
        if let Some(bar) = bar {
            config.place_bar(bar);
        }
        for (kind, at, len) in [
            (1u8, COMMON, COMMON_SIZE),
            (3, ISR, 1),
            (4, DEVICE, REGION),
            (2, NOTIFY, REGION),
        ] {
            let number = |n: usize| u32::try_from(n).unwrap_or(0).to_le_bytes();
            let mut body = vec![if kind == 2 { 20 } else { 16 }, kind, 0, 0, 0, 0];
            body.extend(number(at));
            body.extend(number(len));
            if kind == 2 {
                body.extend(number(DOORBELL));
            }
            config.capability(0x09, &body);
        }
        let body = lock_free(&msix);
        let at = config.capability(msix::CAPABILITY, &body);
        config.allow(at + 3, &[0xc0]);
        let back = Back {
            msix: Mutex::new(msix),
            isr: AtomicU8::new(0),
            term: AtomicU64::new(1),
            broke: AtomicU64::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..count).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        };
        let registers = Registers::new(&port);
        if let Some(bar) = bar {
            doorbells.moved(bar.checked_add(NOTIFY as u64));
        }
        Self {
            port,
            memory,
            config: Mutex::new(Place {
                config,
                bar,
                msix: at,
            }),
            registers: Mutex::new(registers),
            back: Arc::new(back),
            doorbells,
        }
    }

    /// The way to its device.
    pub fn port(&self) -> &Port {
        &self.port
    }

    /// Lets go of the doorbells. Called when it is off the bus.
    pub fn unplug(&self) {
        lock(&self.config).bar = None;
        self.doorbells.moved(None);
    }

    /// The offset in the BAR of an address that it decodes.
    pub(super) fn decodes(&self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(lock(&self.config).bar?)?;
        (offset < BAR_SIZE).then(|| usize::try_from(offset).ok())?
    }

    /// What the function is while its device rests; `rest` is what the device said.
    pub(super) fn save(&self, rest: &Quiesced) -> FunctionState {
        let registers = lock(&self.registers);
        let position = |queue: &QueueState| (queue.next_avail, queue.next_used);
        let vectors = self.back.queue_vectors.iter();
        FunctionState {
            id: self.port.id(),
            config: lock(&self.config).config.bytes(),
            status: registers.status,
            device_feature_select: registers.device_feature_select,
            driver_feature_select: registers.driver_feature_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            queues: registers.queues.clone(),
            isr: self.back.isr.load(Ordering::Acquire),
            needs_reset: self.back.needs_reset(),
            config_vector: self.back.config_vector.load(Ordering::Acquire),
            queue_vectors: vectors.map(|v| v.load(Ordering::Acquire)).collect(),
            msix: lock(&self.back.msix).save(),
            positions: (rest.queues.as_ref()).map(|queues| queues.iter().map(position).collect()),
        }
    }

    /// Undoes [`Self::save`] on a new function whose device rests. The device goes
    /// into service when it is resumed; until then this is where it stands.
    pub(super) fn restore(
        &self,
        state: &FunctionState,
    ) -> Result<Option<Vec<QueueState>>, StateError> {
        self.check(state)?;
        {
            let mut registers = lock(&self.registers);
            *registers = Registers {
                status: state.status,
                device_feature_select: state.device_feature_select,
                driver_feature_select: state.driver_feature_select,
                driver_features: state.driver_features,
                queue_select: state.queue_select,
                queues: state.queues.clone(),
            };
            self.back.isr.store(state.isr, Ordering::Release);
            let broke = if state.needs_reset {
                self.back.term()
            } else {
                0
            };
            self.back.broke.store(broke, Ordering::Release);
            (self.back.config_vector).store(state.config_vector, Ordering::Release);
            for (to, from) in self.back.queue_vectors.iter().zip(&state.queue_vectors) {
                to.store(*from, Ordering::Release);
            }
        }
        // Checked before; and as a driver would write it, for what follows from it.
        let _ = lock(&self.back.msix).restore(&state.msix);
        self.write_config(0, &state.config);
        let Some(positions) = &state.positions else {
            return Ok(None);
        };
        let registers = lock(&self.registers);
        let places = registers.queues.iter().zip(self.port.queue_sizes());
        let queues: Result<Vec<_>, _> = places
            .zip(positions)
            .map(|((queue, max), (next_avail, next_used))| {
                let mut queue = queue.build(*max)?;
                queue.set_next_avail(*next_avail);
                queue.set_next_used(*next_used);
                Ok(queue)
            })
            .collect();
        let stands = queues
            .as_ref()
            .ok()
            .map(|q| q.iter().map(Queue::state).collect());
        self.hand_over(&registers, queues);
        drop(registers);
        // An interrupt on its way when the state was saved may be in neither half.
        for index in 0..state.queues.len() {
            self.back.queue(index);
        }
        Ok(stands)
    }

    fn check(&self, state: &FunctionState) -> Result<(), StateError> {
        if state.id != self.port.id() {
            return Err(StateError::Kind {
                found: state.id,
                expected: self.port.id(),
            });
        }
        let count = self.port.queue_sizes().len();
        let vectors = lock(&self.back.msix).vectors();
        for (what, found, expected) in [
            ("bytes of configuration", state.config.len(), config::USED),
            ("queues", state.queues.len(), count),
            ("queue vectors", state.queue_vectors.len(), count),
            (
                "queue positions",
                state.positions.as_ref().map_or(count, Vec::len),
                count,
            ),
            ("messages", state.msix.vectors(), vectors),
        ] {
            if found != expected {
                return Err(StateError::Count {
                    what,
                    found,
                    expected,
                });
            }
        }
        if !legal(state.status) {
            return Err(StateError::Status(state.status));
        }
        let has = |step| state.status & bit(step) != 0;
        let (wanted, offered) = (state.driver_features, self.port.features());
        if has(FEATURES_OK) && !self.features_fit(wanted) {
            return Err(StateError::Features { wanted, offered });
        }
        if state.positions.is_some() && !has(DRIVER_OK) {
            return Err(StateError::Status(state.status));
        }
        let vector = |v: &u16| usize::from(*v) < vectors || *v == NO_VECTOR;
        if !vector(&state.config_vector) || !state.queue_vectors.iter().all(vector) {
            return Err(StateError::Register("message vector"));
        }
        let mut sizes = state.queues.iter().zip(self.port.queue_sizes());
        if !sizes.all(|(queue, max)| queue.size.is_power_of_two() && queue.size <= *max) {
            return Err(StateError::Register("queue size"));
        }
        Ok(())
    }

    pub(super) fn read_config(&self, at: usize, data: &mut [u8]) {
        lock(&self.config).config.read(at, data);
    }

    pub(super) fn write_config(&self, at: usize, data: &[u8]) {
        let mut place = lock(&self.config);
        place.config.write(at, data);
        lock(&self.back.msix).control(place.config.byte(place.msix + 3));
        let bar = place.config.bar();
        if bar != place.bar {
            place.bar = bar;
            let first = NOTIFY as u64;
            self.doorbells
                .moved(bar.and_then(|bar| bar.checked_add(first)));
        }
    }

    pub(super) fn read_bar(&self, at: usize, data: &mut [u8]) {
        data.fill(0);
        match at & !(REGION - 1) {
            COMMON => self.read_common(at, data),
            ISR => {
                if let (ISR, Some(byte)) = (at, data.first_mut()) {
                    *byte = self.back.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE => self.port.config().read((at - DEVICE) as u64, data),
            TABLE => lock(&self.back.msix).read_table(at - TABLE, data),
            PENDING => lock(&self.back.msix).read_pending(at - PENDING, data),
            _ => {}
        }
    }

    pub(super) fn write_bar(&self, at: usize, data: &[u8]) {
        match at & !(REGION - 1) {
            COMMON => self.write_common(at, data),
            DEVICE if self.port.config().write((at - DEVICE) as u64, data) => {
                self.port.config_written();
            }
            // A doorbell that no eventfd stands for.
            NOTIFY => {
                if let Some(kick) = self.port.kick((at - NOTIFY) / DOORBELL) {
                    // Fails only when the counter is full: then it was rung.
                    let _ = kick.write(1);
                }
            }
            TABLE => lock(&self.back.msix).write_table(at - TABLE, data),
            _ => {}
        }
    }

    fn read_common(&self, at: usize, data: &mut [u8]) {
        let registers = lock(&self.registers);
        let queue = registers.queues.get(usize::from(registers.queue_select));
        let vector = |vector: Option<&AtomicU16>| {
            vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
        };
        let mut bytes = [0; COMMON_SIZE];
        let mut put = |at: usize, value: &[u8]| {
            for (to, from) in bytes.iter_mut().skip(at).zip(value) {
                *to = *from;
            }
        };
        let select = registers.device_feature_select;
        put(0x00, &select.to_le_bytes());
        put(0x04, &half(self.port.features(), select).to_le_bytes());
        let select = registers.driver_feature_select;
        put(0x08, &select.to_le_bytes());
        put(0x0c, &half(registers.driver_features, select).to_le_bytes());
        put(0x10, &vector(Some(&self.back.config_vector)).to_le_bytes());
        let count = u16::try_from(registers.queues.len()).unwrap_or(0);
        put(0x12, &count.to_le_bytes());
        put(
            0x14,
            &[self.status(&registers), self.port.config().generation()],
        );
        put(0x16, &registers.queue_select.to_le_bytes());
        if let Some(queue) = queue {
            let index = usize::from(registers.queue_select);
            put(0x18, &queue.size.to_le_bytes());
            put(
                0x1a,
                &vector(self.back.queue_vectors.get(index)).to_le_bytes(),
            );
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &registers.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.driver.to_le_bytes());
            put(0x30, &queue.device.to_le_bytes());
        }
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(at)) {
            *to = *from;
        }
    }

    /// While a reset is under way the driver reads what it was (§4.1.4.3.2).
    fn status(&self, registers: &Registers) -> u8 {
        let mut status = registers.status;
        if self.back.needs_reset() {
            status |= bit(NEEDS_RESET);
        }
        if status == 0 && self.port.resetting() {
            status = bit(ACKNOWLEDGE);
        }
        status
    }

    fn write_common(&self, at: usize, data: &[u8]) {
        let mut registers = lock(&self.registers);
        // Nothing is heard while a reset is under way.
        if self.port.resetting() && at != 0x14 {
            return;
        }
        match (at, data.len()) {
            (0x00, 4) => registers.device_feature_select = word(data),
            (0x08, 4) => registers.driver_feature_select = word(data),
            (0x0c, 4) if registers.status & bit(DRIVER | FEATURES_OK) == bit(DRIVER) => {
                let select = registers.driver_feature_select;
                set_half(&mut registers.driver_features, select, word(data));
            }
            (0x10, 2) => {
                let vector = self.vector(data);
                self.back.config_vector.store(vector, Ordering::Release);
            }
            (0x14, 1) => self.write_status(&mut registers, data.first().copied().unwrap_or(0)),
            (0x16, 2) => registers.queue_select = short(data),
            (0x1a, 2) => {
                let index = usize::from(registers.queue_select);
                if let Some(to) = self.back.queue_vectors.get(index) {
                    to.store(self.vector(data), Ordering::Release);
                }
            }
            (0x18..0x38, _) => self.write_queue(&mut registers, at, data),
            _ => {}
        }
    }

    /// A vector that there is, or none (§4.1.5.1.2).
    fn vector(&self, data: &[u8]) -> u16 {
        let vector = short(data);
        match usize::from(vector) < lock(&self.back.msix).vectors() {
            true => vector,
            false => NO_VECTOR,
        }
    }

    /// Queue registers can be written between `FEATURES_OK` and `DRIVER_OK`, and
    /// only while the queue is not enabled.
    fn write_queue(&self, registers: &mut Registers, at: usize, data: &[u8]) {
        if registers.status & bit(FEATURES_OK | DRIVER_OK) != bit(FEATURES_OK) {
            return;
        }
        let index = usize::from(registers.queue_select);
        let max = self.port.queue_sizes().get(index).copied().unwrap_or(0);
        let Some(queue) = registers.queues.get_mut(index).filter(|q| !q.enabled) else {
            return;
        };
        match (at, data.len()) {
            (0x18, 2) => {
                let size = short(data);
                if size.is_power_of_two() && size <= max {
                    queue.size = size;
                }
            }
            (0x1c, 2) => queue.enabled = short(data) == 1,
            (0x20, _) => set_address(&mut queue.descriptors, 0, data),
            (0x24, _) => set_address(&mut queue.descriptors, 1, data),
            (0x28, _) => set_address(&mut queue.driver, 0, data),
            (0x2c, _) => set_address(&mut queue.driver, 1, data),
            (0x30, _) => set_address(&mut queue.device, 0, data),
            (0x34, _) => set_address(&mut queue.device, 1, data),
            _ => {}
        }
    }

    fn write_status(&self, registers: &mut Registers, status: u8) {
        if status == 0 {
            // A device that was never used has nothing to forget.
            if registers.status != 0 {
                self.port.reset();
            }
            *registers = Registers::new(&self.port);
            self.back.term.fetch_add(1, Ordering::AcqRel);
            self.back.isr.store(0, Ordering::Release);
            self.back.config_vector.store(NO_VECTOR, Ordering::Release);
            for vector in &self.back.queue_vectors {
                vector.store(NO_VECTOR, Ordering::Release);
            }
            return;
        }
        // Bits are only ever added, in their order.
        let (old, new) = (registers.status, status & !bit(NEEDS_RESET));
        if self.port.resetting() || old & !new != 0 || !legal(new) {
            return;
        }
        let added = new & !old;
        if added & bit(FEATURES_OK) != 0 && !self.features_fit(registers.driver_features) {
            registers.status = new & !bit(FEATURES_OK | DRIVER_OK);
            return;
        }
        registers.status = new;
        if added & bit(DRIVER_OK) != 0 {
            self.activate(registers);
        }
    }

    fn features_fit(&self, features: u64) -> bool {
        features & !self.port.features() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&self, registers: &Registers) {
        let sizes = self.port.queue_sizes();
        let queues: Result<Vec<_>, _> = registers
            .queues
            .iter()
            .zip(sizes)
            .map(|(queue, max)| queue.build(*max))
            .collect();
        self.hand_over(registers, queues);
    }

    fn hand_over(&self, registers: &Registers, queues: Result<Vec<Queue>, virtio_queue::Error>) {
        match queues {
            Ok(queues) => self.port.activate(Activation {
                memory: self.memory.clone(),
                features: registers.driver_features,
                queues,
                interrupt: Arc::new(Line {
                    back: Arc::clone(&self.back),
                    term: self.back.term(),
                }),
            }),
            Err(_) => self.back.break_in(self.back.term()),
        }
    }
}

fn lock_free(msix: &Msix) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap_or(0);
    msix.capability(number(TABLE), number(PENDING))
}

impl Registers {
    fn new(port: &Port) -> Self {
        let queue = |size: &u16| QueueRegisters {
            size: *size,
            ..QueueRegisters::default()
        };
        Self {
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: port.queue_sizes().iter().map(queue).collect(),
        }
    }
}

impl QueueRegisters {
    fn build(self, max: u16) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(max)?;
        let low_high = |address: u64| {
            let low = u32::try_from(address & 0xffff_ffff).unwrap_or(0);
            let high = u32::try_from(address >> 32).unwrap_or(0);
            (Some(low), Some(high))
        };
        queue.set_size(self.size);
        let (low, high) = low_high(self.descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = low_high(self.driver);
        queue.set_avail_ring_address(low, high);
        let (low, high) = low_high(self.device);
        queue.set_used_ring_address(low, high);
        queue.set_ready(self.enabled);
        Ok(queue)
    }
}

fn bit(bits: u32) -> u8 {
    u8::try_from(bits).unwrap_or(0)
}

/// Whether a driver may be in this state: each step includes those before it.
fn legal(status: u8) -> bool {
    let steps = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK].map(bit);
    let mut rest = status & !bit(FAILED);
    for step in steps.into_iter().rev() {
        if rest & step != 0 {
            let before: u8 = match step {
                s if s == bit(ACKNOWLEDGE) => 0,
                s if s == bit(DRIVER) => bit(ACKNOWLEDGE),
                s if s == bit(FEATURES_OK) => bit(ACKNOWLEDGE | DRIVER),
                _ => bit(ACKNOWLEDGE | DRIVER | FEATURES_OK),
            };
            if status & before != before {
                return false;
            }
            rest &= !step;
        }
    }
    rest == 0
}

fn word(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u32::from_le_bytes(bytes)
}

fn short(data: &[u8]) -> u16 {
    let mut bytes = [0; 2];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u16::from_le_bytes(bytes)
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => u32::try_from(value & 0xffff_ffff).unwrap_or(0),
        1 => u32::try_from(value >> 32).unwrap_or(0),
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}

/// A half of an address by a 4-byte access, or all of it by an 8-byte one.
fn set_address(value: &mut u64, half: u32, data: &[u8]) {
    match (half, data.len()) {
        (_, 4) => set_half(value, half, word(data)),
        (0, 8) => {
            set_half(value, 0, word(data));
            set_half(value, 1, word(data.get(4..).unwrap_or_default()));
        }
        _ => {}
    }
}
