//! The machine boundary: *something in which an agent answers*.
//!
//! A [`Driver`] starts a [`Machine`] from a [`MachineSpec`]; a machine
//! connects and stops. What only some machines can do (pause, hot-plug,
//! snapshot, resize) is a capability trait of its own that a caller asks for,
//! so that no driver carries a method it cannot honour.
//!
//! [`driver`] makes the driver a caller chose, [`choose`] answers `auto` after
//! [`kvm_probe`] has tried KVM, and [`HostReport`] says what the host can do.
//! [`process`] is how every helper process of a sandbox is spawned.
//!
//! This crate knows hypervisors and nothing of containers, images or front
//! ends.

mod agent;
mod console;
mod error;
mod files;
mod host;
pub mod kvm_probe;
pub mod process;
pub mod qemu;
mod select;
mod spec;
pub mod takeover;
pub mod vmm;

use std::{fmt, os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

pub use error::Error;
pub use host::{Assets, HostItem, HostReport, Level};
pub use select::{Chosen, DriverChoice, DriverKind, Programs, choose, driver};
use takeover::{Giver, NoState, Taker};

/// What a machine is made of. Sizes are bytes, paths are on the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Name of the sandbox, for process titles and messages.
    pub id: String,
    /// A directory of the sandbox's own, mode 0700: sockets and logs of the
    /// machine's processes live here and nowhere else.
    pub run_dir: PathBuf,
    /// Uncompressed kernel (ELF with a PVH note).
    pub kernel: PathBuf,
    /// Initramfs (newc) that holds the agent.
    pub initramfs: PathBuf,
    /// Appended to the driver's own kernel command line.
    pub cmdline: Vec<String>,
    /// vCPUs online at boot, 1–32.
    pub vcpus: u32,
    /// vCPUs that there are, `vcpus`–32: the agent can bring the others online. More
    /// than `vcpus` needs a driver whose machines have [`Resize`].
    pub max_vcpus: u32,
    /// Guest memory at boot in bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// What it can grow to, at least `memory`; the difference is a multiple of 2 MiB.
    /// More than `memory` needs a driver whose machines have [`Resize`], and no shares.
    pub max_memory: u64,
    /// Block devices, in order.
    pub disks: Vec<Disk>,
    /// Disks that this machine may be given later ([`SpareDisks`]), or a clone of it from
    /// the start ([`Restore`]), beyond `disks`. QEMU's guests see them from the start, as
    /// disks of no size, and they must be read-only; of the driver `vmm` a machine with
    /// spare disks has no others.
    pub spare_disks: u32,
    /// virtio-fs devices.
    pub shares: Vec<Share>,
    /// Network interfaces, in order.
    pub nics: Vec<Nic>,
}

/// A virtio-net device on a tap.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// The guest's address on the link.
    pub mac: [u8; 6],
    /// Bytes in a packet at most.
    pub mtu: u16,
    /// The tap's queues: descriptors of `/dev/net/tun`, made with `IFF_TAP`, `IFF_NO_PI`,
    /// `IFF_VNET_HDR`, and `IFF_MULTI_QUEUE` for more than one. What else has them keeps
    /// the tap alive. In a state ([`takeover`]) there are none: the machine has them.
    #[serde(skip)]
    pub taps: Vec<Arc<OwnedFd>>,
}

/// A raw block device. Formats are never detected: raw means raw.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// virtio-blk serial by which the guest finds it, 1–20 bytes of [A-Za-z0-9_-].
    pub serial: String,
    /// File or block device.
    pub path: PathBuf,
    /// Refuse writes.
    pub read_only: bool,
}

/// A directory shared over virtio-fs, served by a vhost-user back end.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Tag by which the guest mounts it, 1–36 bytes.
    pub tag: String,
    /// Socket on which the back end (virtiofsd) listens.
    pub socket: PathBuf,
}

/// A device that may come and go while a machine runs.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Pluggable {
    /// Known by its serial.
    Disk(Disk),
    /// Known by its tag.
    Share(Share),
    /// Known by its address.
    Nic(Nic),
}

/// Why and how a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered off, or was asked to stop.
    Stopped,
    /// The guest's kernel panicked; the sentence is the last of its words.
    Panicked(String),
    /// A process of the machine died or broke; the sentence says which and how.
    Failed(String),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("the guest stopped"),
            Self::Panicked(words) => write!(f, "the guest's kernel panicked: {words}"),
            Self::Failed(sentence) => f.write_str(sentence),
        }
    }
}

/// Starts machines of one kind.
#[async_trait]
pub trait Driver: fmt::Debug + Send + Sync {
    /// Name for people: `qemu-tcg`, `qemu-kvm`.
    fn name(&self) -> &'static str;

    /// Starts a machine and returns as soon as its processes run; the guest may
    /// still be booting. Nothing is left behind on failure. Every process it
    /// starts dies with the caller's process, however that ends.
    async fn start(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, Error>;

    /// Whether its machines, and what it restores of them, have [`Resize`].
    fn grows(&self) -> bool {
        false
    }

    /// Whether its machines, and what it restores of them, have [`HotPlug`].
    fn plugs(&self) -> bool {
        false
    }

    /// The driver's ability to restore snapshots, if it has it.
    fn as_restore(&self) -> Option<&dyn Restore> {
        None
    }
}

/// The files of a snapshot, on the host.
#[derive(Debug, Clone)]
pub struct SnapshotFiles {
    /// Everything but memory; small.
    pub state: PathBuf,
    /// Guest memory, with holes where it is zero. Clones map it, so it must not
    /// change while one lives. (QEMU's copy it as they start: their memory is shared
    /// with a vhost-user back end, and what is shared is not copied on write.)
    pub memory: PathBuf,
}

/// Makes machines from snapshots that machines of the same driver wrote.
#[async_trait]
pub trait Restore: fmt::Debug + Send + Sync {
    /// The programs that wrote a snapshot and are to read it: other ones may not.
    fn programs(&self) -> Vec<PathBuf>;

    /// Whether a clone of a machine that was saved with spare disks can have the shares and
    /// network interfaces of `spec`, which is otherwise the saved machine's.
    fn has_room(&self, spec: &MachineSpec) -> bool;

    /// Starts a machine where the saved one stood. `spec` says what its devices are
    /// now: it must name the same ones, and may name up to [`MachineSpec::spare_disks`]
    /// disks more, after the others. A machine that was saved with spare disks had neither
    /// shares nor network interfaces; those of `spec` come as the disks do, as far as
    /// there is room ([`Restore::has_room`]). Kernel, sizes, spare disks and command line are
    /// the snapshot's (a disk that comes later has as many queues as `spec` has vCPUs,
    /// for a machine that is about to grow). The guest's kernel hears that it is a clone, and reseeds its
    /// random numbers, before anything else (QEMU's cannot hear it: there the agent's
    /// `ConfigureSandbox` must come first); connections are gone; its wall clock
    /// stands where it stood, until the agent is told the time. Nothing is left behind
    /// on failure, and what the files say is not trusted.
    async fn restore(
        &self,
        spec: MachineSpec,
        from: &SnapshotFiles,
    ) -> Result<Box<dyn Machine>, Error>;
}

/// A running machine. Dropping it kills its processes and removes its sockets.
#[async_trait]
pub trait Machine: fmt::Debug + Send + Sync {
    /// Returns when the agent has said that it serves, with the protocol it
    /// speaks. Fails as soon as the machine ends, or when `deadline` has passed.
    async fn ready(&self, deadline: Duration) -> Result<u32, Error>;

    /// A connection to a vsock port of the guest.
    async fn connect(&self, port: u32) -> Result<UnixStream, Error>;

    /// Returns when the machine has ended, and says how. May be called by
    /// several tasks at once and again after the end.
    ///
    /// What a guest says about itself (a panic's words) is the guest's claim.
    async fn wait(&self) -> Exit;

    /// Ends the machine now, as pulling the plug does, and returns when its
    /// processes are gone. A guest that should sync is asked through its agent
    /// first. Idempotent.
    async fn stop(&self);

    /// PIDs of the machine's processes with their roles ("qemu", "vsock").
    fn processes(&self) -> Vec<(&'static str, u32)>;

    /// What the guest wrote to its console last, at most 64 KiB.
    fn console_tail(&self) -> String;

    /// The machine's ability to pause, if it has it.
    fn as_pause(&self) -> Option<&dyn Pause> {
        None
    }

    /// The machine's ability to be saved, if it has it.
    fn as_snapshot(&self) -> Option<&dyn Snapshot> {
        None
    }

    /// The machine's ability to have devices come and go, if it has it.
    fn as_hot_plug(&self) -> Option<&dyn HotPlug> {
        None
    }

    /// The machine's ability to be given disks while it runs, if it has it.
    fn as_spare_disks(&self) -> Option<&dyn SpareDisks> {
        None
    }

    /// The machine's ability to have network interfaces come and go, if it has it.
    fn as_plug_nics(&self) -> Option<&dyn PlugNics> {
        None
    }

    /// The machine's ability to change its size, if it has it.
    fn as_resize(&self) -> Option<&dyn Resize> {
        None
    }

    /// The machine's ability to be another program's, if it has it.
    fn as_heritable(&self) -> Option<&dyn Heritable> {
        None
    }
}

/// Leaves a machine to the program that takes this one's place ([`takeover`]).
pub trait Heritable: Send + Sync {
    /// What that program makes the machine its own from ([`MachineState::take_over`]). The
    /// machine goes on; nothing is changed.
    fn state(&self, giver: &mut Giver) -> Result<MachineState, NoState>;
}

/// A running machine in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum MachineState {
    /// Of the driver [`qemu::Qemu`].
    Qemu(Box<qemu::State>),
    /// Of the driver [`vmm::Vmm`].
    Vmm(Box<vmm::State>),
}

impl MachineState {
    /// The machine that the program before had. Needs a tokio runtime, and the thread that
    /// was that program's first.
    pub fn take_over(self, taker: &mut Taker) -> Result<Box<dyn Machine>, Error> {
        match self {
            Self::Qemu(state) => state.take_over(taker),
            Self::Vmm(state) => state.take_over(taker),
        }
    }
}

/// Saves a machine.
#[async_trait]
pub trait Snapshot: Send + Sync {
    /// Writes the machine, which must be paused ([`Pause::pause`]), to two new files
    /// that only their owner can read. They are removed again on failure. The machine
    /// can go on; some must, before they are saved again.
    async fn save(&self, to: &SnapshotFiles) -> Result<(), Error>;
}

/// Adds devices to a running machine and takes them away.
#[async_trait]
pub trait HotPlug: Send + Sync {
    /// Returns when the device is there; the guest finds it by itself, some
    /// milliseconds later. Fails if the machine has a device of this serial, tag or address,
    /// no room for another, or, for a share, memory of its own alone: a machine
    /// whose memory is shared started with a share.
    async fn attach(&self, device: &Pluggable) -> Result<(), Error>;

    /// Asks the guest to let go of a device, and returns when it has and the machine
    /// holds nothing of it any more. What is mounted should be unmounted first.
    ///
    /// Fails when `deadline` has passed: the device stays until the guest does let
    /// go, which it may never. May be asked again, and then also succeeds if it has
    /// let go meanwhile.
    async fn detach(&self, device: &Pluggable, deadline: Duration) -> Result<(), Error>;
}

/// Gives disks to a running machine, which has them to its end.
#[async_trait]
pub trait SpareDisks: Send + Sync {
    /// Returns when the disk is there; the guest finds it when it looks for it. Fails if
    /// the machine has a disk of this serial, or as many as it can have: of the driver
    /// `vmm` what its bus has room for, of QEMU its [`MachineSpec::spare_disks`], less, in
    /// a clone, those that it began with. A machine of QEMU that failed to is ended.
    async fn attach_disk(&self, disk: &Disk) -> Result<(), Error>;
}

/// Takes network interfaces away from a running machine, and gives it others.
#[async_trait]
pub trait PlugNics: Send + Sync {
    /// Whether it can be given others: machines of the driver `vmm`, and not QEMU's.
    fn takes_more(&self) -> bool;

    /// Returns when the interface is there; the guest finds it by itself, some
    /// milliseconds later. Fails as [`HotPlug::attach`] does, and where the machine takes
    /// no more.
    async fn attach_nic(&self, nic: &Nic) -> Result<(), Error>;

    /// Returns when the machine holds nothing of the interface with this address any
    /// more. The guest should have let go of it. Of the driver `vmm` it is asked to, and
    /// this fails when `deadline` has passed, as [`HotPlug::detach`] does; a guest of
    /// QEMU's keeps a device without a link.
    async fn detach_nic(&self, mac: [u8; 6], deadline: Duration) -> Result<(), Error>;
}

/// Changes a machine's size while it runs, within what it was made for
/// ([`MachineSpec::max_memory`], [`MachineSpec::max_vcpus`]).
#[async_trait]
pub trait Resize: Send + Sync {
    /// Asks the guest to have that much memory, in bytes, at least what it booted
    /// with. Returns when it has been asked: growing takes a moment, and a guest that
    /// uses its memory may never give all of it back.
    async fn set_memory(&self, bytes: u64) -> Result<(), Error>;

    /// Guest memory that is there now, in bytes.
    async fn memory(&self) -> Result<u64, Error>;

    /// vCPUs that there are. Those that are not online cost nothing; to bring them
    /// online is the agent's (`OnlineCpus`).
    fn vcpus(&self) -> u32;
}

/// Stops and continues all vCPUs.
#[async_trait]
pub trait Pause: Send + Sync {
    /// Returns when no vCPU runs.
    async fn pause(&self) -> Result<(), Error>;
    /// Returns when the vCPUs run again.
    async fn resume(&self) -> Result<(), Error>;
}
