//! A machine of KVM's, made while this process does other things.
//!
//! To create one, KVM starts a thread of its own and puts it into our cgroups, which
//! the kernel does when every processor has passed through a grace period of its: some
//! 10 ms in which nothing is computed. Another process asks for the machine meanwhile,
//! one that shares this one's memory, which makes the machine ours, and descriptors.
//! It is no thread of ours, because who has threads cannot leave the host; it makes
//! that one call and ends.

use std::{
    arch::asm,
    ffi::{c_int, c_void},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicI32, Ordering},
};

use kvm_ioctls::{Kvm, VmFd};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
    sys::wait::{WaitPidFlag, waitpid},
    unistd::Pid,
};

use crate::Error;

/// linux/kvm.h
const KVM_CREATE_VM: usize = 0xae01;
/// It is interrupted by signals that a busy host's timers send.
const TRIES: u32 = 5;
/// How long the other process has the processor, in milliseconds.
const LEAD_MS: u8 = 1;
/// Bytes of the other process's stack, which one call of a function needs.
const STACK: usize = 16 << 10;

/// What both processes know. Aligned as the beginning of a stack must be.
#[derive(Debug)]
#[repr(C, align(16))]
struct Order {
    stack: MaybeUninit<[u8; STACK]>,
    kvm: RawFd,
    /// The machine's descriptor, or what went wrong, negated.
    result: AtomicI32,
}

/// The other process, and what it has of this one's memory as long as it lives.
#[derive(Debug)]
struct Maker {
    order: *mut Order,
    pid: Option<Pid>,
}

/// A machine in the making.
#[derive(Debug)]
pub(crate) struct Creation {
    kvm: Kvm,
    maker: Maker,
}

impl Creation {
    /// Has a machine made of `kvm`, which is to be `/dev/kvm`.
    pub(crate) fn start(kvm: OwnedFd) -> Result<Self, Error> {
        let kvm = open(kvm)?;
        let maker = Maker::start(kvm.as_raw_fd())
            .map_err(|e| Error::Host("start a process that creates a machine", e))?;
        Ok(Self { kvm, maker })
    }

    /// What the machine is made of.
    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The machine, when it is there.
    pub(crate) fn finish(self) -> Result<(Kvm, VmFd), Error> {
        let Self { kvm, mut maker } = self;
        let failed = |e| Error::Kvm("create a machine", e);
        let machine = match maker.result() {
            result @ 0.. => result,
            errno => return Err(failed(kvm_ioctls::Error::new(-errno))),
        };
        // SAFETY: the descriptor is a machine's, and nobody else knows it.
        let machine = unsafe { kvm.create_vmfd_from_rawfd(machine) }.map_err(failed)?;
        Ok((kvm, machine))
    }
}

impl Maker {
    fn start(kvm: RawFd) -> Result<Self, Errno> {
        let order = Box::new(Order {
            stack: MaybeUninit::uninit(),
            kvm,
            result: AtomicI32::new(-libc::ECHILD),
        });
        let mut maker = Self {
            order: Box::into_raw(order),
            pid: None,
        };
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_PIDFD;
        let mut pidfd: RawFd = -1;
        // SAFETY: the function keeps to its stack, which grows down from where the
        // array ends, and to the order; both are there until the process has ended.
        let pid = unsafe {
            let top = (&raw mut (*maker.order).stack).add(1);
            libc::clone(
                create,
                top.cast(),
                flags,
                maker.order.cast(),
                &raw mut pidfd,
            )
        };
        maker.pid = Some(Pid::from_raw(Errno::result(pid)?));
        // SAFETY: the kernel has just made it for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        // A kernel that lets nobody wait is done by then. Another has begun to wait,
        // which it would not where there is one processor and this process kept it.
        let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut ended, LEAD_MS);
        Ok(maker)
    }

    fn result(&mut self) -> i32 {
        self.wait();
        // SAFETY: it is there until the drop.
        unsafe { (*self.order).result.load(Ordering::Acquire) }
    }

    /// Waits for the other process's end.
    fn wait(&mut self) {
        if let Some(pid) = self.pid.take() {
            // It ends without a signal.
            let any = Some(WaitPidFlag::__WALL);
            while waitpid(pid, any) == Err(Errno::EINTR) {}
        }
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.wait();
        // SAFETY: it came of a box, and nobody uses it any more.
        drop(unsafe { Box::from_raw(self.order) });
    }
}

/// The other process. It has this one's thread-local variables as well, and must not
/// touch them: the C library would, for an error.
extern "C" fn create(order: *mut c_void) -> c_int {
    // SAFETY: it is an order, which is there until this process has ended; that its
    // stack is used meanwhile is nobody's business but the stack's.
    let (kvm, result) = unsafe {
        let order: *const Order = order.cast();
        ((*order).kvm, &raw const (*order).result)
    };
    let mut answer = -libc::EINTR;
    for _ in 0..TRIES {
        answer = create_vm(kvm);
        if answer != -libc::EINTR {
            break;
        }
    }
    // SAFETY: as above.
    unsafe { (*result).store(answer, Ordering::Release) };
    0
}

/// `ioctl(kvm, KVM_CREATE_VM, 0)`: the machine, or the error, negated.
fn create_vm(kvm: RawFd) -> i32 {
    let answer: i64;
    // SAFETY: the call takes numbers, and changes these registers alone.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") libc::SYS_ioctl => answer,
            in("rdi") kvm,
            in("rsi") KVM_CREATE_VM,
            in("rdx") 0,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    i32::try_from(answer).unwrap_or(-libc::EOVERFLOW)
}

fn open(fd: OwnedFd) -> Result<Kvm, Error> {
    // SAFETY: the descriptor is ours, and Kvm takes it over. If it is not
    // /dev/kvm, the version below says so.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    match kvm.get_api_version() {
        12 => Ok(kvm),
        _ => Err(Error::Config(
            "the descriptor given as /dev/kvm is not KVM's stable API".to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn the_other_process_says_what_the_call_did_and_is_gone() {
        let null = File::open("/dev/null").unwrap();
        for (fd, errno) in [(null.as_raw_fd(), libc::ENOTTY), (-1, libc::EBADF)] {
            let mut maker = Maker::start(fd).unwrap();
            let pid = maker.pid.unwrap();
            assert_eq!(maker.result(), -errno);
            assert_eq!(waitpid(pid, Some(WaitPidFlag::__WALL)), Err(Errno::ECHILD));
        }
    }

    #[test]
    fn what_is_not_kvm_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let refused = Creation::start(null.into()).map(drop);
        assert!(matches!(refused, Err(Error::Config(_))), "{refused:?}");
    }
}
