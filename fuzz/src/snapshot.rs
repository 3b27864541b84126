//! What a snapshot says: the state of each device, and the state file's header.
//!
//! State that the VMM itself decodes (vCPUs, the bus) has its parsers in the binary
//! `walnut-vmm`; as far as such a file stands by itself it is taken in here, as the
//! header is.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    socket::{AddressFamily, SockFlag, SockType, socketpair},
};
use vm_memory::GuestAddress;
use walnut_devices::{
    Log,
    balloon::{self, Balloon},
    block::{self, Block},
    limit::LimitConfig,
    mem::Mem,
    net::{self, Net},
    rng::Rng,
    virtio::{Activation, Device, Event, Memory, MemoryCell},
    vsock::{self, SocketDir, Virtio},
};

use super::{
    blocks::{Owner, REGION},
    driver::Input,
    rig::{Bell, Vring},
};

fn device(kind: u8, cell: &MemoryCell) -> (Box<dyn Device>, Option<tempfile::TempDir>) {
    let memfd = || File::from(memfd_create("disk", MFdFlags::MFD_CLOEXEC).unwrap());
    let device: Box<dyn Device> = match kind % 6 {
        0 => {
            let owner = Owner {
                cell: cell.clone(),
                busy: Arc::default(),
                calls: Arc::default(),
            };
            Box::new(Mem::new(REGION, Box::new(owner)).unwrap())
        }
        1 => {
            let socket = || {
                let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
                let flags = SockFlag::SOCK_NONBLOCK;
                socketpair(family, kind, None, flags).unwrap().0
            };
            let config = net::Config::default();
            let sockets = vec![socket(), socket()];
            Box::new(Net::on_sockets(sockets, config, Log::new(|_| {})).unwrap())
        }
        2 => {
            let config = block::Config {
                engine: block::Engine::Plain,
                ..block::Config::default()
            };
            Box::new(Block::new(memfd().into(), config).unwrap())
        }
        3 => Box::new(Rng::new(LimitConfig::default())),
        4 => {
            let release = Box::new(balloon::Advise::new(cell.clone()));
            Box::new(Balloon::new(balloon::Config::default(), release).unwrap())
        }
        _ => {
            let dir = tempfile::tempdir().unwrap();
            let config = vsock::Config {
                cid: 3,
                name: "v".into(),
                max_connections: 8,
                timeouts: vsock::Timeouts::default(),
            };
            let sockets = SocketDir::open(dir.path()).unwrap();
            let inner = vsock::Device::new(config, sockets, Log::new(|_| {})).unwrap();
            return (Box::new(Virtio::new(inner)), Some(dir));
        }
    };
    (device, None)
}

/// A device takes a state or refuses it; what it took it gives back, and it works.
pub(crate) fn restore(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.u8();
    let memory = Memory::from_ranges(&[(GuestAddress(0), 0x4_0000)]).unwrap();
    let cell = MemoryCell::new(memory.clone());
    let (mut first, _dir) = device(kind, &cell);
    // Often a state that is nearly right.
    let mut state = input.0.to_vec();
    if kind >= 128 {
        state = first.save();
        while !input.0.is_empty() && !state.is_empty() {
            let at = usize::from(input.u8()) % state.len();
            match input.u8() {
                0 => state.truncate(at),
                1 => state.push(0),
                n => state[at] ^= n,
            }
        }
    }
    let taken = first.restore(&state).is_ok();
    if taken {
        let saved = first.save();
        let fresh = MemoryCell::new(memory.clone());
        let (mut second, _dir) = device(kind, &fresh);
        assert!(second.restore(&saved).is_ok(), "what was saved is refused");
        assert_eq!(second.save(), saved);
    }
    let rings: Vec<_> = (0..)
        .zip(first.queue_sizes())
        .map(|(n, max)| Vring::new(&memory, 0x1000 + 0x4000 * n, 16).queue(*max, true))
        .collect();
    let count = rings.len();
    let activation = Activation {
        memory: cell,
        features: first.features(),
        queues: rings,
        interrupt: Arc::new(Bell::default()),
    };
    if first.activate(activation).is_ok() {
        for index in 0..count {
            let _ = first.event(Event::Queue(index));
        }
        assert_eq!(first.deactivate().len(), count);
        first.reset();
    }
}

/// Why a state file is refused, as in `walnut-vmm`.
#[derive(Debug, thiserror::Error)]
#[error("{self:?}")]
#[allow(
    dead_code,
    reason = "the header's reader makes them, nobody here asks why"
)]
pub(crate) enum Error {
    Io(&'static str, #[source] std::io::Error),
    Foreign(&'static str),
    Format {
        found: u32,
    },
    Length {
        what: &'static str,
        found: u64,
        expected: u64,
    },
    TooLong {
        found: u64,
    },
    Damaged,
    State(String),
}

#[path = "../../crates/vmm/src/snapshot/state.rs"]
#[allow(dead_code, reason = "the VMM uses the rest")]
mod body;
#[path = "../../crates/vmm/src/snapshot/envelope.rs"]
mod header;

/// The body of a state file: what is taken is within its bounds, and written as it was
/// read.
pub(crate) fn state(data: &[u8]) {
    if let Ok(state) = body::State::decode(data) {
        assert!((1..=32).contains(&state.vcpus.len()) && state.devices.len() <= 31);
        let bytes = state.encode().unwrap();
        let again = body::State::decode(&bytes).unwrap().encode().unwrap();
        assert_eq!(bytes, again);
    }
}

/// A state file, whose digest is made right half of the time.
pub(crate) fn envelope(data: &[u8]) {
    use sha2::{Digest, Sha256};
    let Some((&kind, rest)) = data.split_first() else {
        return;
    };
    let mut bytes = rest.to_vec();
    if kind % 2 == 0 && bytes.len() >= 72 {
        if kind % 4 == 0 {
            bytes[..8].copy_from_slice(b"WALNUTSS");
            bytes[8..12].copy_from_slice(&header::FORMAT.to_le_bytes());
            let len = u32::try_from(bytes.len() - 72).unwrap();
            bytes[12..16].copy_from_slice(&len.to_le_bytes());
        }
        let mut hash = Sha256::new();
        hash.update(&bytes[..40]);
        hash.update(&bytes[72..]);
        let digest: [u8; 32] = hash.finalize().into();
        bytes[40..72].copy_from_slice(&digest);
    }
    let file = File::from(memfd_create("state", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all_at(&bytes, 0).unwrap();
    let read = header::Envelope::read(&file);
    if kind % 4 == 0 && bytes.len() >= 72 {
        assert!(read.is_ok());
    }
    if let Ok(envelope) = read {
        assert!(envelope.body.len() <= usize::try_from(header::BODY_MAX).unwrap());
        // What was read is written again, byte by byte.
        let again = File::from(memfd_create("again", MFdFlags::MFD_CLOEXEC).unwrap());
        envelope.write(&again).unwrap();
        let mut written = vec![0; bytes.len()];
        again.read_exact_at(&mut written, 0).unwrap();
        assert_eq!(written, bytes);
    }
}
