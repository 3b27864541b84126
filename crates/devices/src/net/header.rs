//! The beginning of a frame that the guest sends: is it one that it may send?

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::{ETHERNET, HEADER};

/// A frame's headers: virtio's and Ethernet's.
pub(super) const FRONT: usize = HEADER + ETHERNET;
/// Where the sender's address is.
const SOURCE: usize = HEADER + 6;

/// Why a frame is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// It asks for an offload that was not agreed on, or for none that exists.
    Offload,
    /// It comes from another address.
    Source,
}

/// What a guest may send.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rules {
    /// Features agreed on.
    pub(super) features: u64,
    /// The only source address.
    pub(super) source: Option<[u8; 6]>,
}

impl Rules {
    fn agreed(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Checks a frame's front, and clears what is not the guest's to say.
    pub(super) fn check(&self, front: &mut [u8; FRONT]) -> Result<(), Refused> {
        // §5.1.6.2: NEEDS_CSUM is the only flag of a driver's.
        let csum = u32::from(front[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM;
        if csum != 0 && !self.agreed(VIRTIO_NET_F_CSUM) {
            return Err(Refused::Offload);
        }
        front[0] &= VIRTIO_NET_HDR_F_NEEDS_CSUM.to_le_bytes()[0];
        let gso = u32::from(front[1]);
        let needed = match gso & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => None,
            VIRTIO_NET_HDR_GSO_TCPV4 => Some(VIRTIO_NET_F_HOST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => Some(VIRTIO_NET_F_HOST_TSO6),
            VIRTIO_NET_HDR_GSO_UDP_L4 => Some(VIRTIO_NET_F_HOST_USO),
            _ => return Err(Refused::Offload),
        };
        let ecn = gso & VIRTIO_NET_HDR_GSO_ECN != 0;
        // Segments without a partial checksum make no sense (§5.1.6.2).
        let allowed = needed.is_none_or(|feature| self.agreed(feature) && csum != 0)
            && (!ecn || (needed.is_some() && self.agreed(VIRTIO_NET_F_HOST_ECN)));
        if !allowed {
            return Err(Refused::Offload);
        }
        // The number of buffers, which a driver leaves alone.
        front[10..12].fill(0);
        match self.source {
            Some(source) if front[SOURCE..SOURCE + 6] != source => Err(Refused::Source),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every flag and every kind of segment, with every set of features.
    #[test]
    fn only_what_was_agreed_on_passes() {
        let features = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_HOST_ECN,
        ];
        for set in 0u32..32 {
            let agreed = |n: usize| set & 1 << n != 0;
            let features = (0..5).filter(|n| agreed(*n)).map(|n| 1u64 << features[n]);
            let rules = Rules {
                features: features.sum(),
                source: None,
            };
            for flags in 0..=255u8 {
                for gso in 0..=255u8 {
                    let mut front = [0xff; FRONT];
                    (front[0], front[1]) = (flags, gso);
                    let csum = flags & 1 != 0;
                    let kind = match gso & 0x7f {
                        0 => true,
                        1 => agreed(1) && csum,
                        4 => agreed(2) && csum,
                        5 => agreed(3) && csum,
                        _ => false,
                    };
                    let ecn = gso & 0x80 == 0 || (agreed(4) && gso & 0x7f != 0);
                    let expected = (!csum || agreed(0)) && kind && ecn;
                    assert_eq!(rules.check(&mut front).is_ok(), expected, "{flags} {gso}");
                    if expected {
                        assert_eq!((front[0], &front[10..12]), (flags & 1, &[0, 0][..]));
                    }
                }
            }
        }
    }

    #[test]
    fn only_the_guests_own_address_passes() {
        let source = [2, 0, 0, 0, 0, 9];
        let rules = Rules {
            features: 0,
            source: Some(source),
        };
        let mut front = [0; FRONT];
        front[SOURCE..SOURCE + 6].copy_from_slice(&source);
        assert_eq!(rules.check(&mut front), Ok(()));
        for at in SOURCE..SOURCE + 6 {
            let mut front = front;
            front[at] ^= 1;
            assert_eq!(rules.check(&mut front), Err(Refused::Source));
        }
    }
}
