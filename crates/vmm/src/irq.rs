//! Interrupts: KVM's chips, and messages over irqfds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Error;

/// Pins of the IOAPIC; messages have the numbers after them.
const PINS: u32 = 24;
/// Routes that KVM holds at most.
const ROUTES_MAX: usize = 4096;

/// An interrupt message (PCI 3.0 §6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// The routes of a machine, from numbers to pins and messages.
#[derive(Debug)]
pub(crate) struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// One for each number given out, from [`PINS`] on.
    messages: Vec<Option<Message>>,
}

/// A number with an eventfd that raises it.
#[derive(Debug)]
pub(crate) struct Line {
    routes: Arc<Routes>,
    number: u32,
    event: EventFd,
}

impl Routes {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            table: Mutex::default(),
        }
    }

    /// An eventfd that raises a pin of the IOAPIC.
    pub(crate) fn pin(&self, pin: u32) -> Result<EventFd, Error> {
        let event = eventfd()?;
        self.vm
            .register_irqfd(&event, pin)
            .map_err(|e| Error::Kvm("wire an interrupt", e))?;
        Ok(event)
    }

    /// A new line, with no message yet.
    pub(crate) fn line(self: &Arc<Self>) -> Result<Line, Error> {
        let mut table = self.table();
        let number = PINS + u32::try_from(table.messages.len()).unwrap_or(u32::MAX - PINS);
        if usize::try_from(number).map_or(true, |n| n >= ROUTES_MAX) {
            return Err(Error::Config("too many interrupt messages".to_owned()));
        }
        let event = eventfd()?;
        self.vm
            .register_irqfd(&event, number)
            .map_err(|e| Error::Kvm("wire an interrupt message", e))?;
        table.messages.push(None);
        Ok(Line {
            routes: Arc::clone(self),
            number,
            event,
        })
    }

    fn set(&self, number: u32, message: Option<Message>) -> Result<(), Error> {
        let mut table = self.table();
        let index = usize::try_from(number.saturating_sub(PINS)).unwrap_or(usize::MAX);
        match table.messages.get_mut(index) {
            Some(slot) if *slot != message => *slot = message,
            _ => return Ok(()),
        }
        let mut entries: Vec<_> = (0..PINS).map(pin).collect();
        for (message, number) in table.messages.iter().zip(PINS..) {
            if let Some(message) = message {
                entries.push(routed(number, *message));
            }
        }
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Config("too many interrupt messages".to_owned()))?;
        self.vm
            .set_gsi_routing(&routing)
            .map_err(|e| Error::Kvm("route an interrupt message", e))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A slot is whole whoever panicked.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// What the line sends from now on.
    pub(crate) fn route(&self, message: Option<Message>) -> Result<(), Error> {
        self.routes.set(self.number, message)
    }

    /// Sends it.
    pub(crate) fn send(&self) {
        // Fails only when the counter is full: then it has been raised.
        let _ = self.event.write(1);
    }
}

fn eventfd() -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|e| {
        Error::Host(
            "make an eventfd",
            nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(0)),
        )
    })
}

fn pin(number: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: number,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip {
        irqchip: KVM_IRQCHIP_IOAPIC,
        pin: number,
    };
    entry
}

fn routed(number: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: number,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let address = message.address.to_le_bytes();
    let half = |at: usize| {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(address.iter().skip(at)) {
            *to = *from;
        }
        u32::from_le_bytes(bytes)
    };
    entry.u.msi.address_lo = half(0);
    entry.u.msi.address_hi = half(4);
    entry.u.msi.data = message.data;
    entry
}
