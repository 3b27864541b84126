//! A device's configuration space (virtio 1.3 §2.5).

use std::{
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

/// The bytes that the driver reads, shared by transport and device. Reads and
/// writes of any width at any offset are safe; what lies beyond reads as zero.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Mutex<Box<[u8]>>,
    writable: Range<usize>,
    generation: AtomicU8,
}

impl ConfigSpace {
    /// A space that holds `bytes`, of which the driver may write those in
    /// `writable` (`0..0` for none).
    pub fn new(bytes: impl Into<Box<[u8]>>, writable: Range<usize>) -> Self {
        Self {
            bytes: Mutex::new(bytes.into()),
            writable,
            generation: AtomicU8::new(0),
        }
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Changes with every [`Self::set`] (`config_generation`).
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// What the driver reads at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.lock();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, byte) in data.iter_mut().zip(bytes.iter().skip(from)) {
            *to = *byte;
        }
    }

    /// What the driver writes at `offset`; false if no byte of it is writable,
    /// then nothing has changed.
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let mut bytes = self.lock();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut written = false;
        for (n, byte) in data.iter().enumerate() {
            let at = from.saturating_add(n);
            if self.writable.contains(&at)
                && let Some(to) = bytes.get_mut(at)
            {
                *to = *byte;
                written = true;
            }
        }
        written
    }

    /// What the device says at `offset` from now on. Call
    /// [`super::Interrupt::config`] afterwards.
    pub fn set(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.lock();
        for (to, byte) in bytes.iter_mut().skip(offset).zip(data) {
            *to = *byte;
        }
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// The whole of it.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().to_vec()
    }

    fn lock(&self) -> MutexGuard<'_, Box<[u8]>> {
        // A byte is whole whoever panicked.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_access_is_safe_and_only_writable_bytes_change() {
        let space = ConfigSpace::new([1, 2, 3, 4], 2..3);
        for offset in [0, 1, 3, 4, 5, u64::from(u32::MAX), u64::MAX] {
            for len in 0..9 {
                let mut data = [0xff; 9];
                space.read(offset, &mut data[..len]);
                for (n, byte) in data[..len].iter().enumerate() {
                    let at = usize::try_from(offset).unwrap().saturating_add(n);
                    assert_eq!(*byte, [1, 2, 3, 4].get(at).copied().unwrap_or(0));
                }
            }
        }
        assert!(!space.write(0, &[9, 9]) && !space.write(u64::MAX, &[9; 8]));
        assert!(space.write(0, &[9; 8]));
        assert_eq!(space.bytes(), [1, 2, 9, 4]);
        assert_eq!(space.generation(), 0);
        space.set(3, &[7, 7]);
        assert_eq!((space.bytes(), space.generation()), (vec![1, 2, 9, 7], 1));
    }
}
