//! bpf(2), and programs for it.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

// linux/bpf.h
pub(crate) const MAP_CREATE: libc::c_int = 0;
const PROG_LOAD: libc::c_int = 5;

/// Operations of instructions (Documentation/bpf/standardization/instruction-set.rst).
pub(crate) mod op {
    pub(crate) const MOVE: u8 = 0xbf;
    pub(crate) const MOVE_VALUE: u8 = 0xb7;
    pub(crate) const ADD_VALUE: u8 = 0x07;
    pub(crate) const AND_VALUE: u8 = 0x57;
    pub(crate) const SHIFT_LEFT_VALUE: u8 = 0x67;
    /// The lower half with a value; the upper one is 0 then.
    pub(crate) const AND_WORD_VALUE: u8 = 0x54;
    /// To the byte order of networks; the value says how many bits.
    pub(crate) const TO_BIG_ENDIAN: u8 = 0xdc;
    pub(crate) const LOAD_WORD: u8 = 0x61;
    pub(crate) const LOAD_HALF: u8 = 0x69;
    pub(crate) const LOAD_BYTE: u8 = 0x71;
    pub(crate) const STORE_WORD: u8 = 0x62;
    /// A register.
    pub(crate) const STORE_WORD_OF: u8 = 0x63;
    pub(crate) const STORE_HALF_OF: u8 = 0x6b;
    pub(crate) const LOAD_MAP: u8 = 0x18;
    pub(crate) const JUMP: u8 = 0x05;
    pub(crate) const IF_EQUAL: u8 = 0x15;
    pub(crate) const UNLESS_EQUAL: u8 = 0x55;
    /// Of the lower halves.
    pub(crate) const UNLESS_WORD_EQUAL: u8 = 0x56;
    pub(crate) const IF_GREATER: u8 = 0x25;
    pub(crate) const IF_LESS: u8 = 0xa5;
    pub(crate) const IF_SIGNED_LESS: u8 = 0xc5;
    pub(crate) const CALL: u8 = 0x85;
    pub(crate) const EXIT: u8 = 0x95;
}

/// One instruction: operation, registers (destination, source), offset, value.
pub(crate) fn instruction(code: u8, registers: (u8, u8), offset: i16, value: i32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[0] = code;
    bytes[1] = registers.0 | (registers.1 << 4);
    bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
    bytes[4..8].copy_from_slice(&value.to_ne_bytes());
    bytes
}

/// A place in a program that can be jumped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// A program that is being written. What nothing leads to is left out: the kernel takes no
/// program with it.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    code: Vec<[u8; 8]>,
    places: Vec<Option<usize>>,
    /// Instructions with the labels they jump to.
    jumps: Vec<(usize, Label)>,
    /// Nothing leads to what comes next.
    dead: bool,
}

impl Assembler {
    /// A label whose place is not known yet.
    pub(crate) fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// What comes next is at the label.
    pub(crate) fn here(&mut self, label: Label) {
        self.dead &= !self.jumps.iter().any(|(_, to)| *to == label);
        if let Some(place) = self.places.get_mut(label.0) {
            *place = Some(self.code.len());
        }
    }

    pub(crate) fn add(&mut self, code: u8, registers: (u8, u8), offset: i16, value: i32) {
        if !self.dead {
            self.code.push(instruction(code, registers, offset, value));
            self.dead = matches!(code, op::JUMP | op::EXIT);
        }
    }

    /// A jump, with the register and the value that its condition compares.
    pub(crate) fn jump(&mut self, code: u8, register: u8, value: i32, to: Label) {
        if !self.dead {
            self.jumps.push((self.code.len(), to));
        }
        self.add(code, (register, 0), 0, value);
    }

    /// The program.
    pub(crate) fn finish(mut self) -> io::Result<Vec<u8>> {
        for (at, label) in self.jumps {
            let place = self.places.get(label.0).copied().flatten();
            let distance = place.and_then(|place| i16::try_from(place.checked_sub(at + 1)?).ok());
            let (Some(distance), Some(jump)) = (distance, self.code.get_mut(at)) else {
                return Err(io::Error::other("a jump that leads nowhere or too far"));
            };
            jump[2..4].copy_from_slice(&distance.to_ne_bytes());
        }
        Ok(self.code.concat())
    }
}

/// bpf(2) with the beginning of its union of attributes; the rest is zero.
pub(crate) fn call(command: libc::c_int, attributes: &[u8]) -> io::Result<i64> {
    let length = libc::c_uint::try_from(attributes.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes, which are there; what they point to is alive
    // in every caller.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), length) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// The same with a command that makes a descriptor.
pub(crate) fn call_fd(command: libc::c_int, attributes: &[u8]) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(call(command, attributes)?).map_err(io::Error::other)?;
    // SAFETY: these commands return a new descriptor, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn words(all: &[u32]) -> Vec<u8> {
    all.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(crate) fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Loads a program of a kind, to be attached where `attach` says.
pub(crate) fn load(kind: u32, attach: u32, code: &[u8]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let count = u32::try_from(code.len() / 8).map_err(io::Error::other)?;
    let mut attributes = words(&[kind, count]);
    for pointer in [
        code.as_ptr().expose_provenance(),
        license.as_ptr().expose_provenance(),
    ] {
        attributes.extend(u64::try_from(pointer).unwrap_or(0).to_ne_bytes());
    }
    // Log level, size and buffer; kernel version and flags; name; interface: none.
    attributes.extend([0; 16 + 8 + 16 + 4]);
    attributes.extend(attach.to_ne_bytes());
    call_fd(PROG_LOAD, &attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_lead_to_their_labels() {
        let mut all = Assembler::default();
        let (end, lost) = (all.label(), all.label());
        all.jump(op::IF_EQUAL, 1, 0, end);
        all.add(op::MOVE_VALUE, (0, 0), 0, 1);
        all.here(end);
        all.add(op::EXIT, (0, 0), 0, 0);
        // Nothing leads here.
        all.jump(op::JUMP, 0, 0, lost);
        all.add(op::EXIT, (0, 0), 0, 0);
        let code = all.finish().unwrap();
        assert_eq!((code.len(), &code[2..4]), (24, &1i16.to_ne_bytes()[..]));
        let mut all = Assembler::default();
        all.label();
        let _ = all.label();
        all.jump(op::JUMP, 0, 0, lost);
        all.finish().unwrap_err();
    }
}
