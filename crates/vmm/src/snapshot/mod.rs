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
pub(crate) mod memory;
pub(crate) mod scribe;
pub(crate) mod state;

use std::fs::File;

use walnut_devices::{mem::Saved, virtio::Memory};
use walnut_vmm_api::Backing;

use crate::{layout, sizes};
use state::{MEMORY, Room, State};

/// A snapshot whose parts were checked against each other.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) state: State,
    /// What the machine booted with.
    pub(crate) memory: Memory,
    /// What it had besides, if its memory can grow.
    pub(crate) plugged: Option<Plugged>,
}

/// Memory that was plugged: the blocks lie in the file one after the other.
#[derive(Debug)]
pub(crate) struct Plugged {
    pub(crate) saved: Saved,
    pub(crate) file: File,
    /// Where the first block lies.
    pub(crate) offset: u64,
}

impl Snapshot {
    /// Reads the two files.
    pub(crate) fn read(state: &File, file: File, backing: Backing) -> Result<Self, crate::Error> {
        let envelope = envelope::Envelope::read(state)?;
        let state = State::decode(&envelope.body)?;
        let saved = state.room.map(|room| saved(&state, room)).transpose()?;
        let (boot, plugged) = match (&state.room, &saved) {
            (Some(room), Some(saved)) => (room.memory, saved.bytes_plugged()),
            _ => (envelope.memory, 0),
        };
        if boot.checked_add(plugged) != Some(envelope.memory) {
            return Err(Error::State(format!(
                "{boot} bytes of memory and {plugged} that were plugged are not {}",
                envelope.memory
            ))
            .into());
        }
        memory::check(&file, &envelope.identity, envelope.memory)?;
        let memory = memory::map(&file, boot, backing)?;
        let plugged = saved.map(|saved| Plugged {
            saved,
            file,
            offset: boot,
        });
        Ok(Self {
            state,
            memory,
            plugged,
        })
    }
}

/// What a snapshot says of the memory device, whose place follows from `room`.
fn saved(state: &State, room: Room) -> Result<Saved, crate::Error> {
    sizes::check(&room)?;
    let device = state.devices.iter().find(|device| device.name == MEMORY);
    let saved = device.and_then(|device| Saved::parse(&device.own));
    let place = layout::growth(room.memory, room.max_memory);
    match saved {
        Some(saved) if saved.region == crate::growth::region(&place) => Ok(saved),
        _ => {
            let what = "what it says of memory that was plugged cannot be";
            Err(Error::State(what.to_owned()).into())
        }
    }
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
