//! The vhost-user protocol on one side, the device on the other.

use std::{
    fs::File,
    io::{self, Write},
};

use vhost::vhost_user::{
    Backend as BackendChannel, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    message::{
        VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
        VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures,
        VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion,
        VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
    },
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use walnut_devices::vsock::{Device, FEATURES, Memory, QUEUES};

type RegionBase = u64;

/// A part of guest memory, as the front end addresses it.
#[derive(Debug)]
struct Mapping {
    user_addr: u64,
    guest_addr: u64,
    size: u64,
}

/// Where a queue stood when it was stopped.
#[derive(Debug, Default, PartialEq, Eq)]
struct Position {
    next_avail: u16,
    desc_table: u64,
    used_ring: u64,
}

impl Position {
    fn of(queue: &Queue) -> Position {
        Position {
            next_avail: queue.next_avail(),
            desc_table: queue.desc_table(),
            used_ring: queue.used_ring(),
        }
    }
}

/// A ring's protocol state (vhost-user, "Ring states").
#[derive(Debug, Default)]
struct Ring {
    kick: Option<File>,
    call: Option<File>,
    started: bool,
    enabled: bool,
    running: bool,
    /// The driver chose a size or an address that no queue may have. The ring
    /// never runs; the driver has only itself to blame, so the process lives.
    unusable: bool,
    stopped_at: Option<Position>,
}

/// Serves one front end. Everything happens on one thread.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) device: Device,
    mappings: Vec<Mapping>,
    memory: Option<Memory>,
    rings: [Ring; QUEUES],
    features: u64,
}

fn other(e: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(e))
}

impl Backend {
    pub(crate) fn new(device: Device) -> Backend {
        Backend {
            device,
            mappings: Vec::new(),
            memory: None,
            rings: Default::default(),
            features: 0,
        }
    }

    /// Moves packets and interrupts the driver where it asked for that.
    pub(crate) fn run(&mut self) {
        let signals = self.device.run();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if signals.contains(index)
                && let Some(call) = &mut ring.call
            {
                // An eventfd write fails only when the counter is full, and then
                // the driver has been told often enough.
                let _ = call.write(&1u64.to_ne_bytes());
            }
        }
    }

    fn ring(&mut self, index: u32) -> Result<(usize, &mut Ring)> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        let ring = self.rings.get_mut(index).ok_or(Error::InvalidParam)?;
        Ok((index, ring))
    }

    /// Brings the device's queue into the state that the ring should have.
    fn update(&mut self, index: usize) {
        let Some(ring) = self.rings.get_mut(index) else {
            return;
        };
        let run = ring.started && ring.enabled && !ring.unusable;
        if run == ring.running {
            return;
        }
        ring.running = run;
        if !run {
            self.device.stop(index);
            return;
        }
        // The same queue at the same place: the machine was paused. Anything else
        // is a driver that has begun anew and knows of no connection, or one of a
        // machine that was restored, whose starter tells it that they are gone.
        let position = self
            .device
            .queue_mut(index)
            .map(|queue| Position::of(queue));
        if ring.stopped_at.take() != position {
            self.device.reset();
        }
        self.device.start(index);
    }

    /// Changes a queue's configuration, which must not happen while it runs.
    fn configure(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Queue, Option<&Memory>) -> std::result::Result<(), virtio_queue::Error>,
    ) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        let running = std::mem::take(&mut ring.running);
        if running {
            self.device.stop(index);
        }
        let memory = self.memory.as_ref();
        let queue = self.device.queue_mut(index).ok_or(Error::InvalidParam)?;
        let done = change(queue, memory);
        let position = Position::of(queue);
        let ring = &mut self.rings[index];
        ring.unusable = done.is_err();
        if running {
            ring.stopped_at = Some(position);
        }
        self.update(index);
        Ok(())
    }

    fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.mappings.iter().find_map(|mapping| {
            let offset = user.checked_sub(mapping.user_addr)?;
            (offset < mapping.size).then_some(())?;
            Some(GuestAddress(mapping.guest_addr.checked_add(offset)?))
        })
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        for index in 0..QUEUES {
            let ring = &mut self.rings[index];
            ring.started = false;
            ring.enabled = false;
            ring.stopped_at = None;
            self.update(index);
        }
        self.features = 0;
        self.device.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if features & !(FEATURES | protocol) != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for index in 0..QUEUES {
            if let Some(queue) = self.device.queue_mut(index) {
                queue.set_event_idx(event_idx);
            }
            if features & protocol == 0 {
                self.rings[index].enabled = true;
                self.update(index);
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<RegionBase>>> {
        let mut mapped = Vec::new();
        let mut mappings = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let address = GuestAddress(region.guest_phys_addr);
            let map = region.mmap_region(file)?;
            mapped.push(GuestRegionMmap::new(map, address).ok_or(Error::InvalidParam)?);
            mappings.push(Mapping {
                user_addr: region.user_addr,
                guest_addr: region.guest_phys_addr,
                size: region.memory_size,
            });
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(other)?;
        self.mappings = mappings;
        self.memory = Some(memory.clone());
        self.device.set_memory(memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.configure(index, |queue, _| {
            let size = u16::try_from(num).map_err(|_| virtio_queue::Error::InvalidSize)?;
            queue.try_set_size(size)
        })
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = (
            self.guest_address(descriptor),
            self.guest_address(available),
            self.guest_address(used),
        );
        let (Some(descriptor), Some(available), Some(used)) = addresses else {
            return Err(Error::InvalidParam);
        };
        self.configure(index, |queue, memory| {
            queue.try_set_desc_table_address(descriptor)?;
            queue.try_set_avail_ring_address(available)?;
            queue.try_set_used_ring_address(used)?;
            // SET_VRING_BASE carries only the available index; the used index is
            // where the ring itself says it is.
            let memory = memory.ok_or(virtio_queue::Error::QueueNotReady)?;
            let index = queue.used_idx(memory, std::sync::atomic::Ordering::Relaxed)?;
            queue.set_next_used(index.0);
            // QEMU's device starts at 0 in a machine that was restored. Nothing is
            // ever in flight when a queue of ours stops: it goes on where it ended.
            if queue.next_avail() == 0 {
                queue.set_next_avail(index.0);
            }
            Ok(())
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        let (index, _) = self.ring(index)?;
        if let Some(queue) = self.device.queue_mut(index) {
            queue.set_next_avail(base);
        }
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (i, ring) = self.ring(index)?;
        ring.started = false;
        if let Some(kick) = ring.kick.take() {
            self.device.unwatch(&kick);
        }
        self.rings[i].call = None;
        self.update(i);
        let queue = self.device.queue_mut(i).ok_or(Error::InvalidParam)?;
        let position = Position::of(queue);
        let base = u32::from(position.next_avail);
        self.rings[i].stopped_at = Some(position);
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let number = u32::from(index);
        let (i, ring) = self.ring(number)?;
        if let Some(old) = ring.kick.take() {
            self.device.unwatch(&old);
        }
        if let Some(file) = file {
            // Edge-triggered: every kick is an edge, so the counter need not be
            // read.
            self.device.watch(&file, number, true).map_err(other)?;
            self.rings[i].kick = Some(file);
        }
        self.rings[i].started = true;
        self.update(i);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (_, ring) = self.ring(u32::from(index))?;
        ring.call = file;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        self.ring(u32::from(index)).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::try_from(QUEUES).unwrap_or(0))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        ring.enabled = enable;
        if !enable && let Some(queue) = self.device.queue_mut(index) {
            self.rings[index].stopped_at = Some(Position::of(queue));
        }
        self.update(index);
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let space = self.device.config_space();
        let start = usize::try_from(offset).map_err(|_| Error::InvalidParam)?;
        let size = usize::try_from(size).map_err(|_| Error::InvalidParam)?;
        let end = start.checked_add(size).ok_or(Error::InvalidParam)?;
        let part = space.get(start..end).ok_or(Error::InvalidParam)?;
        Ok(part.to_vec())
    }

    fn set_config(
        &mut self,
        _offset: u32,
        _buf: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<()> {
        // The device's configuration is read-only (virtio 1.3 §5.10.4).
        Ok(())
    }

    // What follows belongs to protocol features that are not offered.

    fn set_backend_req_fd(&mut self, _backend: BackendChannel) {}

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("not a GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("shared objects are not offered"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("in-flight tracking is not offered"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidOperation("in-flight tracking is not offered"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Error::InvalidOperation("memory slots are not offered"))
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<RegionBase>> {
        Err(Error::InvalidOperation("memory slots are not offered"))
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidOperation("memory slots are not offered"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("device state is not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("device state is not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory is not offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("dirty logging is not offered"))
    }
}
