//! A function's configuration space: bytes, and which bits of them are writable
//! (PCI 3.0 §6).

/// Size of a function's space in the ECAM.
pub(super) const SIZE: usize = 4096;
/// What is implemented; the rest reads as zero.
pub(super) const USED: usize = 256;

const COMMAND: usize = 0x04;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES: usize = 0x34;
/// Of the command register: memory decoding.
const MEMORY: u8 = 1 << 1;
/// Of the command register: memory decoding, bus mastering, INTx disable.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const BAR0: usize = 0x10;
/// The first capability's place.
const FIRST: usize = 0x40;
/// A 64-bit BAR.
const BAR_64: u8 = 0x4;

/// Who a function says it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) revision: u8,
    /// Class, subclass, programming interface.
    pub(super) class: [u8; 3],
    pub(super) subsystem: u16,
}

/// Bytes and writable bits.
#[derive(Debug)]
pub(super) struct Config {
    bytes: [u8; USED],
    writable: [u8; USED],
    /// Where the next capability goes, and the pointer that will lead to it.
    next: usize,
    link: usize,
}

impl Config {
    pub(super) fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: [0; USED],
            writable: [0; USED],
            next: FIRST,
            link: CAPABILITIES,
        };
        config.set(0x00, &identity.vendor.to_le_bytes());
        config.set(0x02, &identity.device.to_le_bytes());
        config.set(0x08, &[identity.revision]);
        let [class, subclass, interface] = identity.class;
        config.set(0x09, &[interface, subclass, class]);
        config.set(0x2c, &identity.vendor.to_le_bytes());
        config.set(0x2e, &identity.subsystem.to_le_bytes());
        config.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Cache line size and interrupt line: written by kernels, used by nobody.
        config.allow(0x0c, &[0xff]);
        config.allow(0x3c, &[0xff]);
        config
    }

    /// Makes BAR 0 and 1 a 64-bit memory BAR of `size` bytes, a power of two.
    pub(super) fn add_bar(&mut self, size: u64) {
        self.or(BAR0, BAR_64);
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Places the BAR, and lets it be decoded.
    pub(super) fn place_bar(&mut self, address: u64) {
        self.set(BAR0, &address.to_le_bytes());
        self.or(BAR0, BAR_64);
        self.or(COMMAND, MEMORY);
    }

    /// Where the BAR is, if it is decoded.
    pub(super) fn bar(&self) -> Option<u64> {
        if self.byte(COMMAND) & MEMORY == 0 {
            return None;
        }
        let mut address = [0; 8];
        self.read(BAR0, &mut address);
        Some(u64::from_le_bytes(address) & !0xf)
    }

    /// Appends a capability: its ID and what follows the link; the offset of its
    /// first byte.
    pub(super) fn capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        self.or(0x06, STATUS_CAPABILITIES);
        self.set(self.link, &[u8::try_from(at).unwrap_or(0)]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Makes bits writable.
    pub(super) fn allow(&mut self, at: usize, bits: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(bits) {
            *to = *from;
        }
    }

    pub(super) fn set(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn or(&mut self, at: usize, bits: u8) {
        if let Some(byte) = self.bytes.get_mut(at) {
            *byte |= bits;
        }
    }

    /// All bytes, for a snapshot. What a driver may write of them comes back by
    /// [`Self::write`].
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    pub(super) fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0)
    }

    pub(super) fn read(&self, at: usize, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(at)) {
            *to = *from;
        }
    }

    /// The driver's write: the writable bits change, the others stay.
    pub(super) fn write(&mut self, at: usize, data: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in bytes.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }
}
