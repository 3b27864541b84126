//! Interrupts: KVM's chips, and messages over irqfds.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

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
    /// KVM hears of changes later. Held in [`Self::together`] alone.
    gate: Gate,
}

/// Keeps what is sent while KVM does not know the routes.
#[derive(Debug, Default)]
struct Gate {
    held: AtomicBool,
    /// Lines that were to send meanwhile, by number.
    late: Mutex<Vec<u32>>,
}

#[derive(Debug, Default)]
struct Table {
    /// One for each number that there is, from [`PINS`] on.
    numbers: Vec<Number>,
}

/// What a number stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    /// Nothing: to be given out again.
    Free,
    /// A line without a message.
    Quiet,
    Sends(Message),
}

/// A number with an eventfd that raises it.
#[derive(Debug)]
pub(crate) struct Line {
    routes: Arc<Routes>,
    number: u32,
    event: EventFd,
}

impl Gate {
    fn hold(&self) {
        self.held.store(true, Ordering::Release);
    }

    fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Whether the line is among those that are sent for at [`Self::open`]; it may send by
    /// itself if not.
    fn keeps(&self, number: u32) -> bool {
        // Outside of a restore that is all that a line ever asks.
        if !self.is_held() {
            return false;
        }
        let mut late = self.late();
        // It may have been opened since; what is added now nobody would send.
        let held = self.is_held();
        if held {
            late.push(number);
        }
        held
    }

    /// Keeps nothing any more; gives what was kept.
    fn open(&self) -> Vec<u32> {
        let mut late = self.late();
        self.held.store(false, Ordering::Release);
        std::mem::take(&mut late)
    }

    fn late(&self) -> MutexGuard<'_, Vec<u32>> {
        // The list is whole whoever panicked.
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// A number that is free, given out.
    fn take(&mut self) -> Option<u32> {
        let free = self.numbers.iter().position(|n| *n == Number::Free);
        let index = free.unwrap_or(self.numbers.len());
        let number = u32::try_from(index).ok()?.checked_add(PINS)?;
        if usize::try_from(number).map_or(true, |n| n >= ROUTES_MAX) {
            return None;
        }
        match self.numbers.get_mut(index) {
            Some(free) => *free = Number::Quiet,
            None => self.numbers.push(Number::Quiet),
        }
        Some(number)
    }

    /// What a number stands for from now on; what it stood for.
    fn put(&mut self, number: u32, to: Number) -> Option<Number> {
        let index = usize::try_from(number.checked_sub(PINS)?).ok()?;
        Some(std::mem::replace(self.numbers.get_mut(index)?, to))
    }
}

impl Routes {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            table: Mutex::default(),
            gate: Gate::default(),
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

    /// An eventfd that raises a pin of the IOAPIC, level-triggered, until the guest
    /// has acknowledged it, which rings `acknowledged`: nothing is lost while the pin
    /// is masked.
    pub(crate) fn latch(&self, pin: u32, acknowledged: &EventFd) -> Result<EventFd, Error> {
        let event = eventfd()?;
        self.vm
            .register_irqfd_with_resample(&event, acknowledged, pin)
            .map_err(|e| Error::Kvm("wire an interrupt", e))?;
        Ok(event)
    }

    /// A line, with no message yet.
    pub(crate) fn line(self: &Arc<Self>) -> Result<Line, Error> {
        let mut table = self.table();
        let number = table
            .take()
            .ok_or_else(|| Error::Config("too many interrupt messages".to_owned()))?;
        let wired = eventfd().and_then(|event| {
            self.vm
                .register_irqfd(&event, number)
                .map(|()| event)
                .map_err(|e| Error::Kvm("wire an interrupt message", e))
        });
        if wired.is_err() {
            table.put(number, Number::Free);
        }
        let event = wired?;
        Ok(Line {
            routes: Arc::clone(self),
            number,
            event,
        })
    }

    fn set(&self, number: u32, to: Number) -> Result<(), Error> {
        let mut table = self.table();
        let Some(old) = table.put(number, to) else {
            return Ok(());
        };
        let sends = |number| matches!(number, Number::Sends(_));
        if self.gate.is_held() || old == to || !(sends(old) || sends(to)) {
            return Ok(());
        }
        self.tell(&table)
    }

    /// Does what changes messages, of which KVM hears once, at the end: at each change
    /// it waits until nobody uses the old routes any more. What is sent meanwhile, by
    /// whatever thread, is sent then. No other thread changes messages.
    pub(crate) fn together(&self, change: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        self.gate.hold();
        // The gate opens when KVM has the routes: without one it drops what it is sent, and
        // a driver that was to be told once is never told.
        let told = change().and_then(|()| self.tell(&self.table()));
        let late = self.gate.open();
        told?;
        late.into_iter()
            .try_for_each(|number| self.vm.set_irq_line(number, true))
            .map_err(|e| Error::Kvm("send an interrupt message", e))
    }

    fn tell(&self, table: &Table) -> Result<(), Error> {
        let mut entries: Vec<_> = (0..PINS).map(pin).collect();
        for (number, to) in (PINS..).zip(&table.numbers) {
            if let Number::Sends(message) = to {
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
        let to = message.map_or(Number::Quiet, Number::Sends);
        self.routes.set(self.number, to)
    }

    /// Sends it.
    pub(crate) fn send(&self) {
        if self.routes.gate.keeps(self.number) {
            return;
        }
        // Fails only when the counter is full: then it has been raised.
        let _ = self.event.write(1);
    }
}

/// Gives the number back. Takes `ioctl`, so a line is dropped by a thread that may.
impl Drop for Line {
    fn drop(&mut self) {
        // KVM refuses only what it does not have.
        let _ = self.routes.vm.unregister_irqfd(&self.event, self.number);
        let _ = self.routes.set(self.number, Number::Free);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_sent_while_held_and_nothing_kept_is_forgotten() {
        for _ in 0..200 {
            let (gate, known) = (Gate::default(), AtomicBool::new(false));
            let begun = std::sync::Barrier::new(2);
            gate.hold();
            std::thread::scope(|scope| {
                let line = scope.spawn(|| {
                    begun.wait();
                    let mut kept = 0;
                    while gate.keeps(kept) {
                        kept += 1;
                    }
                    assert!(
                        known.load(Ordering::Acquire),
                        "sent where there is no route"
                    );
                    kept
                });
                begun.wait();
                // It is in the midst of it.
                while gate.late().len() < 100 {}
                known.store(true, Ordering::Release);
                let late = gate.open();
                let kept = line.join().unwrap();
                assert!(late.into_iter().eq(0..kept));
            });
            assert!(gate.open().is_empty());
        }
    }

    #[test]
    fn numbers_that_come_back_are_given_out_again() {
        let mut table = Table::default();
        let all: Vec<_> = std::iter::from_fn(|| table.take()).collect();
        assert_eq!(all.len(), ROUTES_MAX - 24);
        assert_eq!((all.first(), all.last()), (Some(&24), Some(&4095)));
        assert_eq!(table.put(100, Number::Free), Some(Number::Quiet));
        assert_eq!(table.put(99, Number::Free), Some(Number::Quiet));
        assert_eq!((table.take(), table.take()), (Some(99), Some(100)));
        assert_eq!(table.take(), None);
        // No pin is a message.
        for none in [0, 23, 4096, u32::MAX] {
            assert_eq!(table.put(none, Number::Free), None);
        }
    }
}
