//! The devices on their PCI bus, wired to KVM.

use std::{
    ops::Range,
    os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;
use walnut_devices::{
    Log, balloon, block, fs,
    limit::LimitConfig,
    pci::{self, Doorbells, Messages, Root},
    rng,
    vhost::Limits,
    virtio::{self, Memory, MemoryCell, Port, Worker},
    vsock,
};
use walnut_vmm_api::{Device, FdIndex};

use crate::{
    Error,
    irq::{Line, Message, Routes},
    jail::Filter,
    layout,
};

/// Request queues of a file system: one thread serves them anyhow.
const FS_QUEUES: u16 = 1;
/// Host programs and guest programs connected at once.
const VSOCK_CONNECTIONS: usize = 1023;

/// The bus, and the ports of what sits on it.
#[derive(Debug)]
pub(crate) struct Bus {
    root: Root,
    ports: Vec<Port>,
    /// Until they are started, each with its name and system calls. (Locked only
    /// because a device is not `Sync`.)
    workers: Mutex<Vec<(String, Worker, Vec<libc::c_long>)>>,
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    memory: MemoryCell,
}

/// The messages of one function.
#[derive(Debug)]
struct Lines(Vec<Line>);

impl Messages for Lines {
    fn route(&self, vector: usize, message: Option<pci::Message>) {
        let message = message.map(|m| Message {
            address: m.address,
            data: m.data,
        });
        if let Some(line) = self.0.get(vector) {
            // KVM refuses a route only for want of memory: then the guest misses
            // an interrupt, and nobody else.
            let _ = line.route(message);
        }
    }

    fn send(&self, vector: usize) {
        if let Some(line) = self.0.get(vector) {
            line.send();
        }
    }
}

/// Turns the guest's writes to doorbells into kicks, without leaving KVM.
#[derive(Debug)]
struct Kicks {
    vm: Arc<VmFd>,
    kicks: Vec<EventFd>,
    at: Mutex<Option<u64>>,
}

impl Doorbells for Kicks {
    fn moved(&self, first: Option<u64>) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        if *at == first {
            return;
        }
        let address = |first: u64, index: usize| {
            let offset = Self::stride().saturating_mul(index as u64);
            IoEventAddress::Mmio(first.saturating_add(offset))
        };
        // Where KVM refuses, the write leaves it and the transport kicks.
        for (index, kick) in self.kicks.iter().enumerate() {
            if let Some(old) = *at {
                let _ = self
                    .vm
                    .unregister_ioevent(kick, &address(old, index), NoDatamatch);
            }
            if let Some(new) = first {
                let _ = self
                    .vm
                    .register_ioevent(kick, &address(new, index), NoDatamatch);
            }
        }
        *at = first;
    }
}

fn duplicate(fd: impl AsFd) -> Result<EventFd, Error> {
    let fd = fd
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| Error::Host("copy an eventfd", crate::vcpu::errno(&e)))?;
    // SAFETY: the descriptor is ours alone, and of an eventfd.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

impl Bus {
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        routes: &Arc<Routes>,
        memory: &Memory,
        window64: Range<u64>,
    ) -> Self {
        Self {
            root: Root::new(layout::ECAM, window64),
            ports: Vec::new(),
            workers: Mutex::default(),
            vm: Arc::clone(vm),
            routes: Arc::clone(routes),
            memory: MemoryCell::new(memory.clone()),
        }
    }

    /// Adds a device in the next slot. Its thread starts with [`Self::start`].
    pub(crate) fn add(
        &mut self,
        device: &Device,
        take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        let (name, device, calls) = make(device, &self.memory, take)?;
        let (worker, port) = Worker::new(device)?;
        let mut kicks = Vec::new();
        let mut lines = vec![self.routes.line()?];
        for index in 0..port.queue_sizes().len() {
            if let Some(kick) = port.kick(index) {
                kicks.push(duplicate(kick)?);
            }
            lines.push(self.routes.line()?);
        }
        let doorbells = Kicks {
            vm: Arc::clone(&self.vm),
            kicks,
            at: Mutex::new(None),
        };
        self.root
            .add(
                port.clone(),
                self.memory.clone(),
                Arc::new(Lines(lines)),
                Box::new(doorbells),
            )
            .map_err(|e| Error::Config(e.to_string()))?;
        self.ports.push(port);
        self.workers().push((name, worker, calls));
        Ok(())
    }

    /// Starts the devices' threads, each behind its own filter if `jailed`.
    pub(crate) fn start(&mut self, jailed: bool, ended: &Failures) -> Result<(), Error> {
        for (name, worker, calls) in std::mem::take(self.workers()) {
            let filter = match jailed {
                true => Some(Filter::device(&calls)?),
                false => None,
            };
            let (locked_in, hears) = sync_channel(1);
            let ended = ended.clone();
            std::thread::Builder::new()
                .name(name.clone())
                .stack_size(crate::STACK)
                .spawn(move || serve(&name, worker, filter.as_ref(), &locked_in, &ended))
                .map_err(|e| Error::Host("start a device's thread", crate::vcpu::errno(&e)))?;
            match hears.recv() {
                Ok(Ok(())) => {}
                Ok(Err(e)) => return Err(Error::Config(e)),
                Err(_) => return Err(Error::Config("a device's thread died".to_owned())),
            }
        }
        Ok(())
    }

    fn workers(&mut self) -> &mut Vec<(String, Worker, Vec<libc::c_long>)> {
        let workers = self.workers.get_mut();
        workers.unwrap_or_else(PoisonError::into_inner)
    }

    /// The last bus.
    pub(crate) fn last(&self) -> u8 {
        0
    }

    pub(crate) fn resume(&self) {
        for port in &self.ports {
            port.resume();
        }
    }

    /// Lets the devices rest. No vCPU runs.
    pub(crate) fn pause(&self, limit: Duration) -> Result<(), Error> {
        for port in &self.ports {
            port.pause(limit).ok_or_else(|| {
                Error::Config(format!("a device (virtio ID {}) does not rest", port.id()))
            })?;
        }
        Ok(())
    }
}

/// Who hears of a device's thread that cannot go on.
pub(crate) type Failures = Arc<dyn Fn(String) + Send + Sync>;

/// A device's thread.
fn serve(
    name: &str,
    worker: Worker,
    filter: Option<&Filter>,
    locked_in: &SyncSender<Result<(), String>>,
    failed: &Failures,
) {
    let result = filter.map_or(Ok(()), Filter::install);
    let ready = result.is_ok();
    // The other end waits for it.
    let _ = locked_in.send(result);
    if ready && let Err(e) = worker.run() {
        failed(format!("{name}: {e}"));
    }
    // To end a thread takes system calls that it need not have.
    loop {
        std::thread::park();
    }
}

impl crate::vcpu::Bus for Bus {
    fn read(&self, address: u64, data: &mut [u8]) {
        self.root.read(address, data);
    }

    fn write(&self, address: u64, data: &[u8]) {
        self.root.write(address, data);
    }
}

type Made = (String, Box<dyn virtio::Device>, Vec<libc::c_long>);

fn log() -> Log {
    Log::new(|message| eprintln!("walnut-vmm: {message}"))
}

/// A device, its thread's name, and the system calls that it makes.
fn make(
    device: &Device,
    memory: &MemoryCell,
    mut take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
) -> Result<Made, Error> {
    let complain = |what: &str, e: &dyn std::fmt::Display| Error::Config(format!("{what}: {e}"));
    match device {
        Device::Block {
            serial,
            read_only,
            file,
        } => {
            let mut config = block::Config {
                read_only: *read_only,
                ..block::Config::default()
            };
            if serial.len() > config.serial.len() {
                return Err(Error::Config(format!("disk serial {serial:?} is too long")));
            }
            for (to, from) in config.serial.iter_mut().zip(serial.bytes()) {
                *to = from;
            }
            let device = block::Block::new(take(*file)?, config)
                .map_err(|e| complain(&format!("disk {serial}"), &e))?;
            let calls = match device.engine() {
                block::Engine::IoUring => vec![libc::SYS_io_uring_enter],
                _ => vec![
                    libc::SYS_preadv,
                    libc::SYS_pwritev,
                    libc::SYS_fdatasync,
                    libc::SYS_fallocate,
                ],
            };
            Ok((format!("disk {serial}"), Box::new(device), calls))
        }
        Device::Fs { tag, socket } => {
            let device = fs::connect(take(*socket)?, tag, FS_QUEUES, Limits::default(), log())
                .map_err(|e| complain(&format!("file system {tag}"), &e))?;
            let calls = vec![
                libc::SYS_sendmsg,
                libc::SYS_recvmsg,
                libc::SYS_recvfrom,
                libc::SYS_poll,
                libc::SYS_close,
            ];
            Ok((format!("fs {tag}"), Box::new(device), calls))
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
            let calls = vec![
                libc::SYS_epoll_ctl,
                libc::SYS_recvmsg,
                libc::SYS_sendmsg,
                libc::SYS_recvfrom,
                libc::SYS_accept4,
                libc::SYS_socket,
                libc::SYS_connect,
                libc::SYS_shutdown,
                libc::SYS_close,
            ];
            let device = vsock::Virtio::new(device);
            Ok(("vsock".to_owned(), Box::new(device), calls))
        }
        Device::Rng => {
            let device = rng::Rng::new(LimitConfig::default());
            Ok((
                "rng".to_owned(),
                Box::new(device),
                vec![libc::SYS_getrandom],
            ))
        }
        Device::Balloon => {
            let release = balloon::Advise::new(memory.clone());
            let device = balloon::Balloon::new(balloon::Config::default(), Box::new(release))
                .map_err(|e| complain("balloon", &e))?;
            Ok((
                "balloon".to_owned(),
                Box::new(device),
                vec![libc::SYS_madvise],
            ))
        }
    }
}
