//! A vhost-user back end between a driver and a tap, each frame copied.

#![allow(clippy::unwrap_used, reason = "a test says so by panicking")]

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{Arc, Mutex},
};

use nix::{errno::Errno, fcntl};
use vhost::vhost_user::{Listener, VhostUserProtocolFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// `VIRTIO_NET_F_CSUM`, `_HOST_TSO4`; `VIRTIO_F_VERSION_1`,
/// `VHOST_USER_F_PROTOCOL_FEATURES` and indirect descriptors.
const FEATURES: u64 = 1 | 1 << 11 | 1 << 32 | 1 << 30 | 1 << 28;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Of the tap; one more is the crate's own.
const FRAMES: u16 = 3;
/// `struct virtio_net_hdr_v1` (virtio 1.3 §5.1.6), as the tap has it.
const HEADER: usize = 12;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const LONGEST: usize = HEADER + (64 << 10);

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

struct Relay {
    tap: File,
    memory: Memory,
    frame: Vec<u8>,
}

impl Relay {
    /// Frames of the guest's.
    fn transmit(&mut self, vring: &VringMutex) -> io::Result<()> {
        let memory = self.memory.memory();
        let mut used = false;
        let mut vring = vring.get_mut();
        while let Some(chain) = vring
            .get_queue_mut()
            .iter(memory.clone())
            .map_err(io::Error::other)?
            .next()
        {
            let head = chain.head_index();
            self.frame.clear();
            for part in chain.readable() {
                let at = self.frame.len();
                self.frame.resize(at + part.len() as usize, 0);
                let to = self.frame.get_mut(at..).unwrap_or_default();
                memory
                    .read_slice(to, part.addr())
                    .map_err(io::Error::other)?;
            }
            // A tap that has no room drops it, as a wire would.
            let _ = self.tap.write(&self.frame);
            vring.add_used(head, 0).map_err(io::Error::other)?;
            used = true;
        }
        if used {
            vring.signal_used_queue()?;
        }
        Ok(())
    }

    /// Frames for the guest, as long as it has buffers.
    fn receive(&mut self, vring: &VringMutex) -> io::Result<()> {
        let memory = self.memory.memory();
        let mut used = false;
        let mut vring = vring.get_mut();
        // A frame may come before the driver does.
        while vring.get_queue().ready() {
            let queue = vring.get_queue_mut();
            let chain = queue.iter(memory.clone()).map_err(io::Error::other)?.next();
            let Some(chain) = chain else { break };
            self.frame.resize(LONGEST, 0);
            let len = match self.tap.read(&mut self.frame) {
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    queue.go_to_previous_position();
                    break;
                }
                Err(e) => return Err(e),
            };
            // One buffer a frame.
            if let Some(count) = self.frame.get_mut(HEADER - 2..HEADER) {
                count.copy_from_slice(&1u16.to_le_bytes());
            }
            let mut rest = self.frame.get(..len).unwrap_or_default();
            let head = chain.head_index();
            for part in chain.writable() {
                let (here, later) = rest.split_at(rest.len().min(part.len() as usize));
                memory
                    .write_slice(here, part.addr())
                    .map_err(io::Error::other)?;
                rest = later;
            }
            assert!(rest.is_empty(), "the guest's buffers are too small");
            let len = u32::try_from(len).unwrap();
            vring.add_used(head, len).map_err(io::Error::other)?;
            used = true;
        }
        if used {
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}

impl VhostUserBackendMut for Relay {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _: bool) {}

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn handle_event(
        &mut self,
        event: u16,
        _: EventSet,
        vrings: &[VringMutex],
        _: usize,
    ) -> io::Result<()> {
        match (event, vrings) {
            (TRANSMIT, [_, transmit]) => self.transmit(transmit),
            (RECEIVE | FRAMES, [receive, _]) => self.receive(receive),
            _ => Ok(()),
        }
    }
}

/// A connection to a back end that relays to `tap`, for as long as the test runs. Its
/// socket lies at `socket`.
pub(crate) fn relay(tap: OwnedFd, socket: &Path) -> UnixStream {
    let size = i32::try_from(HEADER).unwrap();
    // SAFETY: the call reads an int.
    let set = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
    Errno::result(set).unwrap();
    fcntl::fcntl(&tap, fcntl::F_SETFL(fcntl::OFlag::O_NONBLOCK)).unwrap();
    let frames = tap.as_raw_fd();
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let relay = Arc::new(Mutex::new(Relay {
        tap: tap.into(),
        memory: memory.clone(),
        frame: Vec::with_capacity(LONGEST),
    }));
    let mut listener = Listener::new(socket, true).unwrap();
    let stream = UnixStream::connect(socket).unwrap();
    let mut daemon = VhostUserDaemon::new("relay".into(), relay, memory).unwrap();
    for handler in daemon.get_epoll_handlers() {
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        handler
            .register_listener(frames, edges, FRAMES.into())
            .unwrap();
    }
    daemon.start(&mut listener).unwrap();
    // Its threads end with the process.
    std::mem::forget(daemon);
    stream
}
