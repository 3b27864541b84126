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
pub const VERSION: u32 = 1;

/// Position of a descriptor among those that came with the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u8);

/// What the supervisor asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Builds the machine, locks the process in, and lets the guest run. The first
    /// request, and only once.
    Start(Box<Config>),
    /// Stops all vCPUs and lets the devices rest.
    Pause,
    /// Undoes [`Self::Pause`].
    Resume,
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
    /// vCPUs the guest may bring online later, at least `vcpus`.
    pub max_vcpus: u8,
    /// Guest memory in bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// Whether another process maps guest memory: then it is a memfd.
    pub shared_memory: bool,
    /// The kernel: an ELF file with a PVH note, or a bzImage.
    pub kernel: FdIndex,
    /// The initramfs.
    pub initramfs: Option<FdIndex>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the guest's serial console is written to; dropped if nowhere.
    pub console: Option<FdIndex>,
    /// Devices, in the order of their slots.
    pub devices: Vec<Device>,
    /// What the process gives up before the guest runs.
    pub jail: Jail,
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
    },
    /// virtio-fs, served by a vhost-user back end. Needs shared memory.
    Fs {
        /// What the guest mounts it by, at most 36 bytes.
        tag: String,
        /// A connection to the back end.
        socket: FdIndex,
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
}
