//! The two files of a snapshot: what surrounds the state, and guest memory.
//!
//! Both are hostile input when they are read. The state file is small and read
//! whole: a header that bounds and digests what follows ([`envelope`]). The memory
//! file is guest RAM at its own offsets, with holes, so that a restore can map it;
//! a page behind it says which state it belongs to ([`memory`]). The state itself is
//! [`state`], read from KVM and written back to it by [`cpu`] and
//! [`crate::machine`]. [`scribe`] is the thread that saves.

pub(crate) mod cpu;
mod envelope;
mod memory;
pub(crate) mod scribe;
pub(crate) mod state;

use std::fs::File;

use walnut_devices::virtio::Memory;
use walnut_vmm_api::Backing;

use state::State;

/// The state and the memory of a snapshot, checked against each other.
pub(crate) fn read(
    state: &File,
    memory: &File,
    backing: Backing,
) -> Result<(State, Memory), crate::Error> {
    let envelope = envelope::Envelope::read(state)?;
    let size = envelope.memory;
    let state = State::decode(&envelope.body)?;
    memory::check(memory, &envelope.identity, size)?;
    let memory = memory::map(memory, size, backing)?;
    Ok((state, memory))
}

/// Why a snapshot's file could not be written or must not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The host failed.
    #[error("{0}: {1}")]
    Io(&'static str, #[source] std::io::Error),
    /// Not one of ours.
    #[error("the {0} file is not a Walnut snapshot; take a new one")]
    Foreign(&'static str),
    /// Of another release.
    #[error(
        "the snapshot is of format {found}, this VMM reads {}; take a new one",
        envelope::FORMAT
    )]
    Format { found: u32 },
    /// Longer or shorter than it says.
    #[error("the {what} file has {found} bytes instead of {expected}; it was cut or added to")]
    Length {
        what: &'static str,
        found: u64,
        expected: u64,
    },
    /// More than any machine's state has.
    #[error(
        "{found} bytes of state are more than the {} that a snapshot may have",
        envelope::BODY_MAX
    )]
    TooLong { found: u64 },
    /// Changed since it was written.
    #[error("the state file does not match its digest; it is damaged")]
    Damaged,
    /// The state of one snapshot, the memory of another.
    #[error("the memory file belongs to another snapshot than the state file")]
    Mismatch,
    /// The body says what cannot be.
    #[error("the snapshot's state makes no sense: {0}; take a new one")]
    State(String),
    /// Guest memory is not where it is said to be.
    #[error("guest memory cannot be read at {0:#x}")]
    Memory(u64),
}
