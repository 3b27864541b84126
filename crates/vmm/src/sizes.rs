//! How much memory a machine has, and may have.

use std::{ops::Range, sync::Arc};

use kvm_ioctls::VmFd;
use walnut_devices::mem::Target;
use walnut_vmm_api::Backing;

use crate::{
    Error, growth,
    jail::calls::Thread,
    layout,
    prepared::{Place, Prepared, Site},
    snapshot::{
        Plugged,
        state::{MEMORY, Room},
    },
};

/// How much memory may be added, bytes.
const GROWTH_MAX: u64 = 1 << 40;
/// How much memory there may be at boot, bytes: what processors address.
const BOOT_MAX: u64 = 1 << 46;

/// Whether a machine can have, and grow to, these sizes.
pub(crate) fn check(room: &Room) -> Result<(), Error> {
    let Room { memory, max_memory } = *room;
    let complain = |what: String| Err(Error::Config(what));
    let more = max_memory.checked_sub(memory);
    if more.is_none_or(|more| !more.is_multiple_of(2 << 20) || more > GROWTH_MAX) {
        return complain(format!(
            "memory cannot grow from {memory} bytes to {max_memory}: the difference must be a \
             multiple of 2 MiB, and 1 TiB at most"
        ));
    }
    if memory < 32 << 20 || !memory.is_multiple_of(1 << 20) || memory > BOOT_MAX {
        return complain(format!(
            "{memory} bytes of memory are not a multiple of 1 MiB, less than 32 MiB, or more \
             than 64 TiB"
        ));
    }
    Ok(())
}

/// A machine's memory, and how to ask for more, if there may be more.
#[derive(Debug)]
pub(crate) struct Sizes {
    pub(crate) room: Room,
    target: Option<Target>,
}

impl Sizes {
    /// Of a machine that does not grow.
    pub(crate) fn fixed(memory: u64) -> Self {
        let room = Room {
            memory,
            max_memory: memory,
        };
        Self { room, target: None }
    }

    /// Where what may be added comes to lie; empty if nothing may.
    pub(crate) fn place(room: &Room) -> Range<u64> {
        layout::growth(room.memory, room.max_memory)
    }

    /// Of a machine that grows, and the device that it has for that.
    pub(crate) fn growing(
        room: Room,
        backing: Backing,
        vm: &Arc<VmFd>,
        site: &Site,
        plugged: Option<&Plugged>,
    ) -> Result<(Self, Prepared), Error> {
        let (device, target) = growth::device(Self::place(&room), backing, vm, site, plugged)?;
        let device = Prepared {
            name: MEMORY.to_owned(),
            device: Box::new(device),
            thread: growth::thread(backing),
            place: Place::Next,
        };
        let target = Some(target);
        Ok((Self { room, target }, device))
    }

    /// What the memory device's thread is called, and what it calls, if there is one.
    pub(crate) fn thread(room: &Room, backing: Backing) -> Option<(&'static str, &'static Thread)> {
        (!Self::place(room).is_empty()).then(|| (MEMORY, growth::thread(backing)))
    }

    /// What a snapshot must know to make the device again.
    pub(crate) fn saved(&self) -> Option<Room> {
        self.target.as_ref().map(|_| self.room)
    }

    /// Memory that is there now, bytes.
    pub(crate) fn now(&self) -> u64 {
        self.room.memory + self.target.as_ref().map_or(0, Target::plugged)
    }

    /// Asks the guest to have that much memory.
    pub(crate) fn resize(&self, memory: u64) -> Result<(), Error> {
        let Room {
            memory: boot,
            max_memory,
        } = self.room;
        let more = memory.checked_sub(boot).ok_or_else(|| {
            Error::Config(format!(
                "{memory} bytes of memory are less than the machine booted with, {boot}"
            ))
        })?;
        match &self.target {
            _ if memory > max_memory => Err(Error::Config(format!(
                "{memory} bytes of memory are more than the machine was made for, {max_memory}"
            ))),
            Some(target) => target.set(more).map_err(|e| Error::Config(e.to_string())),
            // As much as there is.
            None => Ok(()),
        }
    }
}
