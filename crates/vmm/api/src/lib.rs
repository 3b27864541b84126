//! What `walnut-vmm` and the supervisor say to each other.
//!
//! One socket, inherited by the VMM (`SOCK_SEQPACKET`, so a message is a packet):
//! nothing in the file system that others could open. A message is JSON of at
//! most [`MESSAGE_MAX`] bytes; descriptors travel beside it (`SCM_RIGHTS`) and are
//! named in it by their position, [`FdIndex`]. The supervisor sends [`Request`]s,
//! each answered by one [`Message::Reply`] in order; [`Message::Event`]s come in
//! between. End of file on either side ends the other.
//!
//! The types are the whole contract, and [`VERSION`] its number: both ends are of
//! one release, and a VMM refuses a [`Config`] of another version. This crate must
//! never know KVM, devices' insides, or what a machine is used for.

mod socket;

pub use socket::{Channel, ChannelError, FDS_MAX, MESSAGE_MAX, Received, pair};

use serde::{Deserialize, Serialize};

/// The version of this contract.
pub const VERSION: u32 = 3;

/// Longest name of a device, bytes.
pub const NAME_MAX: usize = 64;

/// Position of a descriptor among those that came with the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u8);

/// What the supervisor asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Builds the machine, locks the process in, and lets the guest run. The first
    /// request (or [`Self::Restore`] is), and only once.
    Start(Box<Config>),
    /// Builds the machine that a snapshot describes and locks the process in. Unless it
    /// says that the guest is to run, that waits for [`Self::Resume`].
    Restore(Box<Restore>),
    /// Stops all vCPUs and lets the devices rest.
    Pause,
    /// Undoes [`Self::Pause`].
    Resume,
    /// Adds a device to the running machine. The guest finds it by itself.
    Attach(Box<Attachment>),
    /// Asks the guest to let go of a device. Answered at once;
    /// [`Event::Detached`] says when it has, which a guest may never do.
    Detach {
        /// Its [`Attachment::name`].
        name: String,
    },
    /// Asks the guest to have that much memory: [`Config::memory`] and up to
    /// [`Config::max_memory`]. Answered at once; [`Stats::memory`] says how far it is.
    Resize {
        /// Bytes, a multiple of 2 MiB beyond [`Config::memory`].
        memory: u64,
    },
    /// Saves the machine, which must be paused, to two empty files.
    Snapshot {
        /// Gets the state of everything but memory.
        state: FdIndex,
        /// Gets guest memory, with holes where it is zero.
        memory: FdIndex,
    },
    /// Says what the machine has done so far.
    Stats,
    /// Ends the machine, as pulling the plug does.
    Stop,
}

/// What the VMM says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Message {
    /// The answer to a request: what went wrong, as a sentence, or what it led to.
    Reply(Result<Reply, String>),
    /// Something happened.
    Event(Event),
}

/// What a request led to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reply {
    /// It is done.
    Done,
    /// To [`Request::Stats`].
    Stats(Stats),
}

/// Something that happened unasked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    /// The guest runs no more, and never will. The process exits next.
    Ended(End),
    /// The guest has let go of a device, whose descriptors are closed.
    Detached {
        /// Its [`Attachment::name`].
        name: String,
    },
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum End {
    /// It restarted its machine, powered it off, or met a triple fault.
    Reset,
    /// It was stopped by request.
    Stopped,
    /// It did what the processor or KVM cannot go on from; a sentence.
    Failed(String),
}

/// What a machine is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Config {
    /// [`VERSION`].
    pub version: u32,
    /// An open `/dev/kvm`.
    pub kvm: FdIndex,
    /// vCPUs online at boot.
    pub vcpus: u8,
    /// vCPUs that there are, at least `vcpus`: the guest sees all and may bring
    /// the others online. It boots with `maxcpus=vcpus`, which the VMM says.
    pub max_vcpus: u8,
    /// Guest memory at boot in bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// What guest memory can grow to, at least `memory`; the difference is a
    /// multiple of 2 MiB. More than `memory` takes a slot of the bus, for a device
    /// called `memory`, and excludes devices that another process serves: it would
    /// keep what the guest gives up.
    pub max_memory: u64,
    /// What guest memory is made of.
    pub backing: Backing,
    /// The kernel: an ELF file with a PVH note, or a bzImage.
    pub kernel: FdIndex,
    /// The initramfs.
    pub initramfs: Option<FdIndex>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the guest's serial console is written to; dropped if nowhere.
    pub console: Option<FdIndex>,
    /// Devices, in the order of their slots.
    pub devices: Vec<Attachment>,
    /// What the process gives up before the guest runs.
    pub jail: Jail,
}

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Backing {
    /// Whether another process maps it: then it is a memfd. Needed by
    /// [`Device::Fs`], [`Device::VhostBlock`] and [`Device::VhostNet`].
    pub shared: bool,
    /// Whether it is made of huge pages of 2 MiB, which the host must have set
    /// aside; all of it is taken at once, and stays taken: a balloon gives none back.
    /// Memory is a multiple of 2 MiB then.
    pub huge_pages: bool,
}

/// From what a machine is restored. What the snapshot says counts; what is said
/// here must fit it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Restore {
    /// [`VERSION`].
    pub version: u32,
    /// An open `/dev/kvm`.
    pub kvm: FdIndex,
    /// The state file.
    pub state: FdIndex,
    /// The memory file. It is mapped copy-on-write, and must not change while the
    /// machine lives.
    pub memory: FdIndex,
    /// What guest memory is made of. Shared memory is a copy of the file.
    pub backing: Backing,
    /// Where the guest's serial console is written to; dropped if nowhere.
    pub console: Option<FdIndex>,
    /// The devices that the snapshot has, by their names. A disk has the queues that
    /// it had. The one called `memory` is not named here.
    pub devices: Vec<Attachment>,
    /// What the process gives up before the guest runs.
    pub jail: Jail,
    /// Whether the guest runs on at once. Else it is paused.
    pub run: bool,
}

/// A device with its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Attachment {
    /// What requests call it: of a machine's own, 1 to [`NAME_MAX`] bytes.
    pub name: String,
    /// What it is.
    pub device: Device,
}

/// How much a guest may move: no limit where nothing is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Limits {
    /// Bytes.
    pub bytes: Option<Bucket>,
    /// Operations: requests of a disk, frames of a network.
    pub operations: Option<Bucket>,
}

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Bucket {
    /// Tokens when full.
    pub size: u64,
    /// Tokens that can be spent once, beyond the rate.
    pub burst: u64,
    /// Milliseconds that an empty bucket takes to be full.
    pub refill_ms: u64,
}

/// A device of the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Device {
    /// virtio-blk over a raw file or block device.
    Block {
        /// What the guest finds it by, at most 20 bytes.
        serial: String,
        /// Refuses writes, whatever the descriptor allows.
        read_only: bool,
        /// The open file.
        file: FdIndex,
        /// Queues, 1 to 32; as many as vCPUs is best.
        queues: u16,
        /// How much the guest may move.
        limits: Limits,
    },
    /// virtio-net on a tap.
    Net {
        /// The tap's queues, one for each pair: descriptors of `/dev/net/tun`, made
        /// with `IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR`, and `IFF_MULTI_QUEUE` for more
        /// than one.
        taps: Vec<FdIndex>,
        /// The guest's address.
        mac: [u8; 6],
        /// The link's MTU in bytes, if the driver is to know it.
        mtu: Option<u16>,
        /// Drop frames of the guest's that do not come from `mac`.
        only_own_mac: bool,
        /// What the guest may receive.
        receive: Limits,
        /// What the guest may send.
        send: Limits,
    },
    /// virtio-fs, served by a vhost-user back end. Needs shared memory.
    Fs {
        /// What the guest mounts it by, at most 36 bytes.
        tag: String,
        /// A connection to the back end.
        socket: FdIndex,
    },
    /// virtio-blk, served by a vhost-user back end. Needs shared memory.
    VhostBlock {
        /// A connection to the back end.
        socket: FdIndex,
        /// Queues at most.
        queues: u16,
    },
    /// virtio-net, served by a vhost-user back end. Needs shared memory.
    VhostNet {
        /// A connection to the back end.
        socket: FdIndex,
        /// The guest's address.
        mac: [u8; 6],
        /// The link's MTU in bytes, if the driver is to know it.
        mtu: Option<u16>,
    },
    /// virtio-vsock, whose host side are Unix sockets in a directory.
    Vsock {
        /// The guest's context identifier, 3 or more.
        cid: u64,
        /// The directory.
        dir: FdIndex,
        /// The name, in the directory, of the socket that the host connects to.
        name: String,
    },
    /// virtio-rng.
    Rng,
    /// virtio-balloon with free-page reporting.
    Balloon,
}

/// What the process gives up before the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Jail {
    /// All that it can do without.
    Full {
        /// The user and group to become, where the process may.
        user: Option<u32>,
    },
    /// Nothing: for measuring and for debuggers.
    Off,
}

/// What a machine has done since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stats {
    /// Times that vCPUs left the guest for the VMM (not for KVM).
    pub exits: u64,
    /// Guest memory that is there now, in bytes: at boot, and plugged since.
    pub memory: u64,
}
