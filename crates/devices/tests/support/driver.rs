//! A guest's driver by hand: two split rings in guest memory, and the packets in
//! them. It keeps to the specification unless a test makes it misbehave.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress};
use walnut_devices::vsock::Memory;

pub(crate) const GUEST_CID: u64 = 3;
pub(crate) const QUEUE_SIZE: u16 = 128;
/// A chain is a header descriptor and a data descriptor, as Linux 6.1 has it.
pub(crate) const CHAINS: u16 = QUEUE_SIZE / 2;
pub(crate) const RX_BUFFER: u32 = 4096;
pub(crate) const TX_BUFFER: u32 = 64 << 10;
/// Guest memory that rings and buffers take, from address 0.
pub(crate) const MEMORY: usize = 8 << 20;

pub(crate) const REQUEST: u16 = 1;
pub(crate) const RESPONSE: u16 = 2;
pub(crate) const RST: u16 = 3;
pub(crate) const SHUTDOWN: u16 = 4;
pub(crate) const RW: u16 = 5;
pub(crate) const CREDIT_UPDATE: u16 = 6;
pub(crate) const CREDIT_REQUEST: u16 = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) src_cid: u64,
    pub(crate) dst_cid: u64,
    pub(crate) src_port: u32,
    pub(crate) dst_port: u32,
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
}

impl Packet {
    /// A packet of the guest's to the host.
    pub(crate) fn new(guest_port: u32, host_port: u32, op: u16) -> Packet {
        Packet {
            src_cid: GUEST_CID,
            dst_cid: 2,
            src_port: guest_port,
            dst_port: host_port,
            len: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.src_cid.to_le_bytes());
        out.extend(self.dst_cid.to_le_bytes());
        for word in [self.src_port, self.dst_port, self.len] {
            out.extend(word.to_le_bytes());
        }
        out.extend(self.kind.to_le_bytes());
        out.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            out.extend(word.to_le_bytes());
        }
        assert_eq!(out.len(), 44);
        out
    }

    fn parse(raw: &[u8]) -> Packet {
        let u64_at = |at: usize| u64::from_le_bytes(raw[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(raw[at..at + 2].try_into().unwrap());
        Packet {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }
}

/// One split virtqueue seen from the driver.
pub(crate) struct Ring {
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    headers: u64,
    buffers: u64,
    buffer: u32,
    avail_idx: u16,
    used_idx: u16,
    free: Vec<u16>,
}

impl Ring {
    /// A ring at `base` whose buffers hold `buffer` bytes each.
    pub(crate) fn new(base: u64, buffer: u32) -> Ring {
        Ring {
            desc: base,
            avail: base + 0x1000,
            used: base + 0x2000,
            headers: base + 0x3000,
            buffers: base + 0x8000,
            buffer,
            avail_idx: 0,
            used_idx: 0,
            free: (0..CHAINS).rev().collect(),
        }
    }

    pub(crate) fn write_desc(mem: &Memory, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        mem.write_obj(addr, GuestAddress(at)).unwrap();
        mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn header_at(&self, chain: u16) -> u64 {
        self.headers + u64::from(chain) * 64
    }

    fn buffer_at(&self, chain: u16) -> u64 {
        self.buffers + u64::from(chain) * u64::from(self.buffer)
    }

    /// Makes a head available.
    pub(crate) fn publish(&mut self, mem: &Memory, head: u16) {
        let slot = self.avail + 4 + u64::from(self.avail_idx % QUEUE_SIZE) * 2;
        mem.write_obj(head, GuestAddress(slot)).unwrap();
        fence(Ordering::SeqCst);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        mem.store(
            self.avail_idx,
            GuestAddress(self.avail + 2),
            Ordering::Release,
        )
        .unwrap();
        // With EVENT_IDX: interrupt at the very next use.
        mem.store(
            self.used_idx,
            GuestAddress(self.avail + 4 + u64::from(QUEUE_SIZE) * 2),
            Ordering::Release,
        )
        .unwrap();
    }

    /// The next chain that the device has used.
    pub(crate) fn pop_used(&mut self, mem: &Memory) -> Option<(u16, u32)> {
        let idx: u16 = mem
            .load(GuestAddress(self.used + 2), Ordering::Acquire)
            .unwrap();
        if idx == self.used_idx {
            return None;
        }
        let slot = self.used + 4 + u64::from(self.used_idx % QUEUE_SIZE) * 8;
        self.used_idx = self.used_idx.wrapping_add(1);
        let head: u32 = mem.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = mem.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }
}

/// The driver of one device.
pub(crate) struct Driver {
    pub(crate) mem: Memory,
    pub(crate) rx: Ring,
    pub(crate) tx: Ring,
    /// Receive buffers are given back as soon as they have been read.
    pub(crate) refill: bool,
}

impl Driver {
    /// Rings and buffers from address 0 on.
    pub(crate) fn new(mem: Memory) -> Driver {
        let mut driver = Driver {
            mem,
            rx: Ring::new(0x1000, RX_BUFFER),
            tx: Ring::new(0x10_0000, TX_BUFFER),
            refill: true,
        };
        for chain in 0..CHAINS {
            driver.give(chain);
        }
        driver
    }

    /// Offers a receive buffer.
    pub(crate) fn give(&mut self, chain: u16) {
        let at = self.rx.desc + u64::from(chain) * 32;
        let (header, buffer) = (self.rx.header_at(chain), self.rx.buffer_at(chain));
        Ring::write_desc(&self.mem, at, header, 44, 3, chain * 2 + 1);
        Ring::write_desc(&self.mem, at + 16, buffer, RX_BUFFER, 2, 0);
        self.rx.publish(&self.mem, chain * 2);
    }

    /// Sends a packet; false when every buffer is in flight.
    pub(crate) fn send(&mut self, mut packet: Packet, data: &[u8]) -> bool {
        self.reclaim();
        let Some(chain) = self.tx.free.pop() else {
            return false;
        };
        packet.len = u32::try_from(data.len()).unwrap();
        self.send_raw(chain, &packet, data);
        true
    }

    /// Sends a packet whose header may say anything.
    pub(crate) fn send_raw(&mut self, chain: u16, packet: &Packet, data: &[u8]) {
        let at = self.tx.desc + u64::from(chain) * 32;
        let (header, buffer) = (self.tx.header_at(chain), self.tx.buffer_at(chain));
        self.mem
            .write_slice(&packet.bytes(), GuestAddress(header))
            .unwrap();
        self.mem.write_slice(data, GuestAddress(buffer)).unwrap();
        let flags = u16::from(!data.is_empty());
        Ring::write_desc(&self.mem, at, header, 44, flags, chain * 2 + 1);
        let len = u32::try_from(data.len()).unwrap();
        Ring::write_desc(&self.mem, at + 16, buffer, len, 0, 0);
        self.tx.publish(&self.mem, chain * 2);
    }

    pub(crate) fn take_chain(&mut self) -> Option<u16> {
        self.reclaim();
        self.tx.free.pop()
    }

    pub(crate) fn reclaim(&mut self) {
        while let Some((head, _)) = self.tx.pop_used(&self.mem) {
            self.tx.free.push(head / 2);
        }
    }

    /// Everything that has arrived.
    pub(crate) fn receive(&mut self) -> Vec<(Packet, Vec<u8>)> {
        let mut out = Vec::new();
        while let Some((head, len)) = self.rx.pop_used(&self.mem) {
            let chain = head / 2;
            let mut raw = [0; 44];
            self.mem
                .read_slice(&mut raw, GuestAddress(self.rx.header_at(chain)))
                .unwrap();
            let packet = Packet::parse(&raw);
            assert_eq!(packet.len + 44, len, "used length");
            let mut data = vec![0; usize::try_from(packet.len).unwrap()];
            self.mem
                .read_slice(&mut data, GuestAddress(self.rx.buffer_at(chain)))
                .unwrap();
            out.push((packet, data));
            if self.refill {
                self.give(chain);
            }
        }
        out
    }
}
