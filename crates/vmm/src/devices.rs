//! The devices of `walnut_devices`, made from what the supervisor asks for, each with
//! the system calls that its thread makes beside those of every device.

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

use crate::Error;

/// Request queues of a file system: one thread serves them anyhow.
const FS_QUEUES: u16 = 1;
/// Host programs and guest programs connected at once.
const VSOCK_CONNECTIONS: usize = 1023;

/// The tap's offloads are set when a driver is ready (linux/if_tun.h).
const TUNSETOFFLOAD: u32 = 0x4004_54d0;

/// A device, and the system calls that it makes.
pub(crate) type Made = (Box<dyn virtio::Device>, Calls);

/// What a device's thread calls beside what every device's does.
#[derive(Debug, Clone, Default)]
pub(crate) struct Calls {
    /// Calls, with any arguments.
    pub(crate) any: Vec<libc::c_long>,
    /// Requests of `ioctl`.
    pub(crate) ioctls: Vec<u32>,
}

impl<const N: usize> From<[libc::c_long; N]> for Calls {
    fn from(any: [libc::c_long; N]) -> Self {
        Self {
            any: any.into(),
            ioctls: Vec::new(),
        }
    }
}

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

/// What the front end of a vhost-user back end calls.
fn vhost_calls() -> Calls {
    Calls::from([
        libc::SYS_sendmsg,
        libc::SYS_recvmsg,
        libc::SYS_recvfrom,
        libc::SYS_poll,
        libc::SYS_close,
    ])
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
            let calls = match device.engine() {
                block::Engine::IoUring => Calls::from([libc::SYS_io_uring_enter]),
                _ => Calls::from([
                    libc::SYS_preadv,
                    libc::SYS_pwritev,
                    libc::SYS_fdatasync,
                    libc::SYS_fallocate,
                ]),
            };
            Ok((Box::new(device), calls))
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
            let calls = Calls {
                ioctls: vec![TUNSETOFFLOAD],
                ..Calls::from([libc::SYS_readv, libc::SYS_writev, libc::SYS_poll])
            };
            Ok((Box::new(device), calls))
        }
        Device::Fs { tag, socket } => {
            let limits = vhost::Limits::default();
            let device =
                fs::connect(take(*socket)?, tag, FS_QUEUES, limits, log()).map_err(complain)?;
            Ok((Box::new(device), vhost_calls()))
        }
        Device::VhostBlock { socket, queues } => {
            let limits = vhost::Limits::default();
            let device = vhost::block(take(*socket)?, *queues, limits, log()).map_err(complain)?;
            Ok((Box::new(device), vhost_calls()))
        }
        Device::VhostNet { socket, mac, mtu } => {
            let config = vhost::NetConfig {
                mac: *mac,
                mtu: *mtu,
            };
            let limits = vhost::Limits::default();
            let device = vhost::net(take(*socket)?, config, limits, log()).map_err(complain)?;
            Ok((Box::new(device), vhost_calls()))
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
            let calls = Calls::from([
                libc::SYS_epoll_ctl,
                libc::SYS_recvmsg,
                libc::SYS_sendmsg,
                libc::SYS_recvfrom,
                libc::SYS_accept4,
                libc::SYS_socket,
                libc::SYS_connect,
                libc::SYS_shutdown,
                libc::SYS_close,
            ]);
            Ok((Box::new(vsock::Virtio::new(device)), calls))
        }
        Device::Rng => {
            let device = rng::Rng::new(LimitConfig::default());
            Ok((Box::new(device), Calls::from([libc::SYS_getrandom])))
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
    let (release, calls): (Box<dyn balloon::Release>, Calls) = match huge {
        true => (Box::new(Kept), Calls::default()),
        false => (
            Box::new(balloon::Advise::new(memory.clone())),
            Calls::from([libc::SYS_madvise]),
        ),
    };
    let device = balloon::Balloon::new(config, release).map_err(complain)?;
    Ok((Box::new(device), calls))
}

/// Gives nothing back.
#[derive(Debug)]
struct Kept;

impl balloon::Release for Kept {
    fn release(&self, _at: GuestAddress, _len: u64) {}
}
