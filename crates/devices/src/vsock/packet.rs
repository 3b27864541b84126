//! The packet header (virtio 1.3 §5.10.6): bytes to values and back, no I/O.

/// Bytes of a header on the wire.
pub(super) const HEADER_LEN: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;

/// `SHUTDOWN` flag: the sender of the packet will receive no more.
pub(super) const SHUTDOWN_RCV: u32 = 1;
/// `SHUTDOWN` flag: the sender of the packet will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both directions are over.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// What a packet asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Rst = 3,
    Shutdown = 4,
    Rw = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    /// The operation behind a wire value, if there is one.
    pub(super) fn from_raw(raw: u16) -> Option<Op> {
        Some(match raw {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Rst,
            4 => Op::Shutdown,
            5 => Op::Rw,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`, in host byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload behind the header.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Size of the sender's receive buffer.
    pub(super) buf_alloc: u32,
    /// Bytes, modulo 2^32, that have left the sender's receive buffer.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Decodes; every bit pattern is a header, its fields are to be checked.
    pub(super) fn parse(raw: &[u8; HEADER_LEN]) -> Header {
        let mut at = 0;
        Header {
            src_cid: u64::from_le_bytes(take(raw, &mut at)),
            dst_cid: u64::from_le_bytes(take(raw, &mut at)),
            src_port: u32::from_le_bytes(take(raw, &mut at)),
            dst_port: u32::from_le_bytes(take(raw, &mut at)),
            len: u32::from_le_bytes(take(raw, &mut at)),
            kind: u16::from_le_bytes(take(raw, &mut at)),
            op: u16::from_le_bytes(take(raw, &mut at)),
            flags: u32::from_le_bytes(take(raw, &mut at)),
            buf_alloc: u32::from_le_bytes(take(raw, &mut at)),
            fwd_cnt: u32::from_le_bytes(take(raw, &mut at)),
        }
    }

    /// Encodes.
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        raw[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        raw[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        raw[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        raw[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        raw[24..28].copy_from_slice(&self.len.to_le_bytes());
        raw[28..30].copy_from_slice(&self.kind.to_le_bytes());
        raw[30..32].copy_from_slice(&self.op.to_le_bytes());
        raw[32..36].copy_from_slice(&self.flags.to_le_bytes());
        raw[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        raw[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        raw
    }
}

/// The next `N` bytes of the header; the callers' widths add up to its length.
fn take<const N: usize>(raw: &[u8; HEADER_LEN], at: &mut usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&raw[*at..*at + N]);
    *at += N;
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_the_wire() {
        let mut raw = [0; HEADER_LEN];
        for (i, byte) in raw.iter_mut().enumerate() {
            *byte = u8::try_from(i * 5 + 1).unwrap_or(7);
        }
        assert_eq!(Header::parse(&raw).encode(), raw);
        assert_eq!(
            Header::parse(&raw).src_cid,
            u64::from_le_bytes([1, 6, 11, 16, 21, 26, 31, 36])
        );
    }

    #[test]
    fn operations_are_the_seven_of_the_specification() {
        for raw in 0..=u16::MAX {
            match Op::from_raw(raw) {
                Some(op) => assert_eq!(op as u16, raw),
                None => assert!(raw == 0 || raw > 7),
            }
        }
    }
}
