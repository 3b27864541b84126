//! The devices of `walnut_devices`, made from what the supervisor asks for, each with
//! the list of calls that its thread makes.

use std::{fmt::Display, os::fd::OwnedFd, time::Duration};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use walnut_devices::{
    Log, balloon, block, fs,
    limit::{BucketConfig, LimitConfig},
    net, rng, vhost,
    virtio::{self, MemoryCell},
    vsock,
};
use walnut_vmm_api::{Bucket, Device, FdIndex, Limits};

use crate::{
    Error,
    jail::calls::{self, Thread},
};

/// Request queues of a file system: one thread serves them anyhow.
const FS_QUEUES: u16 = 1;
/// Host programs and guest programs connected at once.
const VSOCK_CONNECTIONS: usize = 1023;

/// A device, and what its thread is to the jail.
pub(crate) type Made = (Box<dyn virtio::Device>, &'static Thread);

fn log() -> Log {
    Log::new(|message| eprintln!("walnut-vmm: {message}"))
}

fn complain(e: impl Display) -> Error {
    Error::Config(e.to_string())
}

fn limit(limits: &Limits) -> LimitConfig {
    let bucket = |bucket: Bucket| BucketConfig {
        size: bucket.size,
        burst: bucket.burst,
        refill: Duration::from_millis(bucket.refill_ms),
    };
    LimitConfig {
        bytes: limits.bytes.map(bucket),
        operations: limits.operations.map(bucket),
    }
}

/// Whether another process maps guest memory to serve it.
pub(crate) fn shares_memory(device: &Device) -> bool {
    matches!(
        device,
        Device::Fs { .. } | Device::VhostBlock { .. } | Device::VhostNet { .. }
    )
}

/// Makes a device. `take` gives the descriptors that came with the request.
pub(crate) fn make(
    device: &Device,
    memory: &MemoryCell,
    mut take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
) -> Result<Made, Error> {
    match device {
        Device::Block {
            serial,
            read_only,
            file,
            queues,
            limits,
        } => {
            let mut config = block::Config {
                read_only: *read_only,
                queues: *queues,
                limit: limit(limits),
                ..block::Config::default()
            };
            if serial.len() > config.serial.len() {
                return Err(Error::Config(format!("disk serial {serial:?} is too long")));
            }
            for (to, from) in config.serial.iter_mut().zip(serial.bytes()) {
                *to = from;
            }
            let device = block::Block::new(take(*file)?, config).map_err(complain)?;
            let thread = match device.engine() {
                block::Engine::IoUring => &calls::BLOCK_URING,
                _ => &calls::BLOCK_PLAIN,
            };
            Ok((Box::new(device), thread))
        }
        Device::Net {
            taps,
            mac,
            mtu,
            only_own_mac,
            receive,
            send,
        } => {
            let taps: Result<Vec<_>, _> = taps.iter().map(|tap| take(*tap)).collect();
            let config = net::Config {
                mac: *mac,
                mtu: *mtu,
                only_own_mac: *only_own_mac,
                offloads: true,
                receive: limit(receive),
                send: limit(send),
            };
            let device = net::Net::new(taps?, config, log()).map_err(complain)?;
            Ok((Box::new(device), &calls::NET_THREAD))
        }
        Device::Fs { tag, socket } => {
            let limits = vhost::Limits::default();
            let device =
                fs::connect(take(*socket)?, tag, FS_QUEUES, limits, log()).map_err(complain)?;
            Ok((Box::new(device), &calls::VHOST_THREAD))
        }
        Device::VhostBlock { socket, queues } => {
            let limits = vhost::Limits::default();
            let device = vhost::block(take(*socket)?, *queues, limits, log()).map_err(complain)?;
            Ok((Box::new(device), &calls::VHOST_THREAD))
        }
        Device::VhostNet { socket, mac, mtu } => {
            let config = vhost::NetConfig {
                mac: *mac,
                mtu: *mtu,
            };
            let limits = vhost::Limits::default();
            let device = vhost::net(take(*socket)?, config, limits, log()).map_err(complain)?;
            Ok((Box::new(device), &calls::VHOST_THREAD))
        }
        Device::Vsock { cid, dir, name } => {
            // The directory becomes the root: here and there it is the working
            // directory, so its sockets have the same names.
            let dir = take(*dir)?;
            nix::unistd::fchdir(&dir).map_err(|e| Error::Host("enter the socket directory", e))?;
            let config = vsock::Config {
                cid: *cid,
                name: name.clone(),
                max_connections: VSOCK_CONNECTIONS,
                timeouts: vsock::Timeouts::default(),
            };
            let device = vsock::Device::new(config, vsock::SocketDir::current(), log())?;
            let device = vsock::Virtio::new(device);
            Ok((Box::new(device), &calls::VSOCK_THREAD))
        }
        Device::Rng => {
            let device = rng::Rng::new(LimitConfig::default());
            Ok((Box::new(device), &calls::RNG_THREAD))
        }
        Device::Balloon => balloon(memory),
    }
}

/// A balloon. Huge pages stay the machine's: nobody could promise one that is given
/// back again, and a touch without one would end the machine. So none is reported.
fn balloon(memory: &MemoryCell) -> Result<Made, Error> {
    let huge = memory
        .memory()
        .iter()
        .any(|region| region.is_hugetlbfs() == Some(true));
    let config = balloon::Config {
        reporting: !huge,
        ..balloon::Config::default()
    };
    let release: Box<dyn balloon::Release> = match huge {
        true => Box::new(Kept),
        false => Box::new(balloon::Advise::new(memory.clone())),
    };
    let device = balloon::Balloon::new(config, release).map_err(complain)?;
    Ok((Box::new(device), &calls::BALLOON_THREAD))
}

/// Gives nothing back.
#[derive(Debug)]
struct Kept;

impl balloon::Release for Kept {
    fn release(&self, _at: GuestAddress, _len: u64) {}
}
