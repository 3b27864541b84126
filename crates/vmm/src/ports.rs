//! The few I/O ports: a serial console that only speaks, the reset register, and the
//! slots of the bus.

use std::{
    fs::File,
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
};

use vm_superio::{Serial, SerialState, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    Error,
    slots::{self, Slots},
};

/// The first serial port, where every kernel looks for it.
pub(crate) const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = SERIAL + 7;
/// Its interrupt.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// The reset register of ACPI, at the place and with the value of PCI chipsets.
pub(crate) const RESET: u16 = 0xcf9;
/// What is written to it.
pub(crate) const RESET_VALUE: u8 = 0x06;
/// The keyboard controller, by whose command 0xfe a machine resets as well.
const KEYBOARD: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// The registers of the bus's slots, at the place that other monitors gave them.
pub(crate) const SLOTS: u16 = 0xae00;
const SLOTS_END: u16 = SLOTS + slots::PORTS - 1;
/// The pin by which they are heard of.
pub(crate) const SLOTS_PIN: u32 = 16;

/// Raises the serial port's interrupt.
#[derive(Debug)]
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the console goes. A reader that is slow slows the guest, and one that
/// has gone costs nothing.
#[derive(Debug)]
struct Console(Option<File>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(file) = &mut self.0
            && file.write_all(bytes).is_err()
        {
            self.0 = None;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// All ports. Any vCPU may access them.
#[derive(Debug)]
pub(crate) struct Ports {
    serial: Mutex<Serial<Irq, NoEvents, Console>>,
    slots: Arc<Slots>,
}

/// What a write asks for, beyond its effect on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    None,
    Reset,
}

impl Ports {
    /// `irq` is wired to [`SERIAL_IRQ`].
    pub(crate) fn new(console: Option<File>, irq: EventFd, slots: Arc<Slots>) -> Self {
        Self {
            serial: Mutex::new(Serial::new(Irq(irq), Console(console))),
            slots,
        }
    }

    /// As [`Self::new`], as the port was when `state` was taken.
    pub(crate) fn restore(
        console: Option<File>,
        irq: EventFd,
        slots: Arc<Slots>,
        state: &SerialState,
    ) -> Result<Self, Error> {
        Serial::from_state(state, Irq(irq), NoEvents, Console(console))
            .map(|serial| Self {
                serial: Mutex::new(serial),
                slots,
            })
            .map_err(|e| Error::Config(format!("restore the serial port: {e:?}")))
    }

    /// What the serial port is now.
    pub(crate) fn state(&self) -> SerialState {
        self.serial().state()
    }

    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        // Nothing there: the bus floats high. A keyboard controller with nothing
        // to say, so that no kernel waits for it.
        data.fill(if port == KEYBOARD { 0 } else { 0xff });
        match (data, port) {
            ([byte], SERIAL..=SERIAL_END) => {
                let offset = u8::try_from(port - SERIAL).unwrap_or(0);
                *byte = self.serial().read(offset);
            }
            (data, SLOTS..=SLOTS_END) => self.slots.read(port - SLOTS, data),
            _ => {}
        }
    }

    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Wish {
        match (port, data) {
            (SERIAL..=SERIAL_END, [byte]) => {
                let offset = u8::try_from(port - SERIAL).unwrap_or(0);
                // Fails if the loopback buffer is full: the byte is lost, as on
                // a real line.
                let _ = self.serial().write(offset, *byte);
                Wish::None
            }
            (SLOTS..=SLOTS_END, _) => {
                self.slots.write(port - SLOTS, data);
                Wish::None
            }
            (RESET, [value]) if value & 0x04 != 0 => Wish::Reset,
            (KEYBOARD, [KEYBOARD_RESET]) => Wish::Reset,
            _ => Wish::None,
        }
    }

    fn serial(&self) -> std::sync::MutexGuard<'_, Serial<Irq, NoEvents, Console>> {
        // A register is whole whoever panicked.
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
