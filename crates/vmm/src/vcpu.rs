//! The vCPUs' threads.

use std::{
    fmt,
    mem::ManuallyDrop,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::errno::Errno;
use vmm_sys_util::eventfd::EventFd;
use walnut_vmm_api::End;

use crate::{
    Error,
    jail::calls,
    ports::{Ports, Wish},
    post::{Inbox, Post, Ready},
};

/// What a vCPU's accesses reach. No method may wait.
pub(crate) trait Bus: Send + Sync + fmt::Debug {
    /// Fills `data` with what is at a physical address, all ones where nothing is.
    fn read(&self, address: u64, data: &mut [u8]);
    /// Writes to a physical address.
    fn write(&self, address: u64, data: &[u8]);
}

/// What all vCPUs shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Wait,
    Run,
    Leave,
}

#[derive(Debug)]
struct Muster {
    order: Order,
    /// vCPUs inside of, or on the way to, the guest. Each counts itself.
    running: usize,
    end: Option<End>,
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    muster: Mutex<Muster>,
    changed: Condvar,
    /// Rung when `end` is set.
    ended: EventFd,
    exits: AtomicU64,
    ports: Arc<Ports>,
    bus: Arc<dyn Bus>,
}

impl Shared {
    fn muster(&self) -> MutexGuard<'_, Muster> {
        // Each change is one assignment: whole whoever panicked.
        self.muster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, end: End) {
        let mut muster = self.muster();
        muster.order = Order::Leave;
        muster.end.get_or_insert(end);
        drop(muster);
        self.changed.notify_all();
        let _ = self.ended.write(1);
    }
}

/// A thread, and the byte by which its vCPU is called out of the guest.
#[derive(Debug)]
struct Thread {
    /// The kernel's number for it.
    tid: i32,
    immediate_exit: ImmediateExit,
}

/// `kvm_run.immediate_exit` of a vCPU.
#[derive(Debug, Clone, Copy)]
struct ImmediateExit(*const AtomicU8);

// SAFETY: it points to a byte of a mapping that is never unmapped (a vCPU's
// thread keeps its descriptor and mapping, and never ends), and is accessed
// atomically.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn of(vcpu: &mut VcpuFd) -> Self {
        let byte: *mut u8 = &raw mut vcpu.get_kvm_run().immediate_exit;
        Self(byte.cast_const().cast())
    }

    fn set(self, value: u8) {
        // SAFETY: see `Send` above.
        unsafe { (*self.0).store(value, Ordering::Release) };
    }
}

/// All vCPUs of a machine.
#[derive(Debug)]
pub(crate) struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    /// Asked for while that could still be asked.
    pid: u32,
}

/// The signal that calls a vCPU out of the guest.
pub(crate) fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: i32) {}

impl Vcpus {
    /// Starts the thread of vCPU `n`, behind its filter if `jailed`.
    pub(crate) fn post(n: u8, jailed: bool) -> Result<Post<Vcpu>, Error> {
        let serve = |inbox: &Inbox<Vcpu>| {
            // It stays for good: its mapping holds the byte that others may still set.
            let mut vcpu = ManuallyDrop::new(inbox.take());
            vcpu.serve();
        };
        Post::open(format!("vcpu{n}"), &calls::VCPU_THREAD, jailed, serve)
    }

    /// Gives each vCPU to its thread, where it waits for [`Self::run`]. `ended` is rung
    /// when the guest has ended.
    pub(crate) fn new(
        posts: &[Ready<Vcpu>],
        vcpus: Vec<Arc<Mutex<VcpuFd>>>,
        ports: Arc<Ports>,
        bus: Arc<dyn Bus>,
        ended: EventFd,
    ) -> Result<Self, Error> {
        install_kick()?;
        let shared = Arc::new(Shared {
            muster: Mutex::new(Muster {
                order: Order::Wait,
                running: 0,
                end: None,
            }),
            changed: Condvar::new(),
            ended,
            exits: AtomicU64::new(0),
            ports,
            bus,
        });
        let mut threads = Vec::new();
        for (post, fd) in posts.iter().zip(vcpus) {
            let immediate_exit = ImmediateExit::of(&mut lock(&fd));
            post.inbox.put(Vcpu {
                fd,
                immediate_exit,
                shared: Arc::clone(&shared),
                inside: false,
            });
            threads.push(Thread {
                tid: post.tid,
                immediate_exit,
            });
        }
        Ok(Self {
            shared,
            threads,
            pid: std::process::id(),
        })
    }

    /// Lets the guest run.
    pub(crate) fn run(&self) {
        let mut muster = self.shared.muster();
        if muster.order == Order::Wait {
            muster.order = Order::Run;
        }
        drop(muster);
        self.shared.changed.notify_all();
    }

    /// Calls all vCPUs out of the guest; returns when none runs.
    pub(crate) fn pause(&self) {
        self.order(Order::Wait);
        self.gather();
    }

    /// Calls all vCPUs out of the guest for good.
    pub(crate) fn stop(&self) {
        self.order(Order::Leave);
        self.gather();
    }

    /// How the guest ended, if it has.
    pub(crate) fn end(&self) -> Option<End> {
        self.shared.muster().end.clone()
    }

    /// Times that a vCPU left the guest for this process.
    pub(crate) fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    fn order(&self, order: Order) {
        let mut muster = self.shared.muster();
        if muster.order != Order::Leave {
            muster.order = order;
        }
        drop(muster);
        self.shared.changed.notify_all();
        for thread in &self.threads {
            // First the byte, for a vCPU on its way in; then the signal, for one
            // that is inside.
            thread.immediate_exit.set(1);
            // SAFETY: takes numbers; the thread is one of ours and never ends.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid, thread.tid, kick_signal()) };
        }
    }

    /// Waits until no vCPU runs.
    fn gather(&self) {
        self.wait_for(|muster| muster.running == 0);
    }

    fn wait_for(&self, done: impl Fn(&Muster) -> bool) {
        let muster = self.shared.muster();
        drop(
            self.shared
                .changed
                .wait_while(muster, |muster| !done(muster))
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A descriptor is whole whoever panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// A handler that does nothing: its signal only interrupts KVM_RUN.
fn install_kick() -> Result<(), Error> {
    // SAFETY: a zeroed sigaction is valid, and the handler makes no calls.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as usize;
        libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut())
    };
    Errno::result(result)
        .map(drop)
        .map_err(|e| Error::Host("install a signal handler", e))
}

/// One vCPU, on its own thread.
#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    immediate_exit: ImmediateExit,
    shared: Arc<Shared>,
    /// Counted as running.
    inside: bool,
}

impl Vcpu {
    fn serve(&mut self) {
        while self.wait() {
            if let Some(end) = self.enter() {
                self.shared.end(end);
            }
        }
    }

    /// Waits until the guest shall run; false when the thread shall leave.
    fn wait(&mut self) -> bool {
        // Before the look at the order: one that comes later sets it again.
        self.immediate_exit.set(0);
        let shared = &self.shared;
        let mut muster = shared.muster();
        if muster.order == Order::Run && self.inside {
            return true;
        }
        if self.inside {
            self.inside = false;
            muster.running = muster.running.saturating_sub(1);
        }
        shared.changed.notify_all();
        muster = shared
            .changed
            .wait_while(muster, |muster| muster.order == Order::Wait)
            .unwrap_or_else(PoisonError::into_inner);
        if muster.order == Order::Leave {
            return false;
        }
        muster.running += 1;
        self.inside = true;
        true
    }

    /// Runs the guest until it wants something, and gives it that.
    fn enter(&mut self) -> Option<End> {
        // Held in the guest only: whoever saves the vCPU takes it in a pause.
        let mut fd = lock(&self.fd);
        loop {
            let exit = match fd.run() {
                Ok(exit) => exit,
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => return None,
                // Nothing is mapped there for KVM: see `growth`.
                Err(e) if e.errno() == libc::EFAULT => {
                    return Some(End::Failed(
                        "the guest used memory that it has given up".to_owned(),
                    ));
                }
                Err(e) => return Some(End::Failed(format!("KVM cannot run the guest: {e}"))),
            };
            self.shared.exits.fetch_add(1, Ordering::Relaxed);
            match exit {
                VcpuExit::IoIn(port, data) => self.shared.ports.read(port, data),
                VcpuExit::IoOut(port, data) => {
                    if self.shared.ports.write(port, data) == Wish::Reset {
                        return Some(End::Reset);
                    }
                }
                VcpuExit::MmioRead(address, data) => self.shared.bus.read(address, data),
                VcpuExit::MmioWrite(address, data) => self.shared.bus.write(address, data),
                // A triple fault, by which Linux restarts as well; or a reset.
                VcpuExit::Shutdown | VcpuExit::SystemEvent(..) => return Some(End::Reset),
                VcpuExit::Intr => return None,
                VcpuExit::Hlt => {}
                VcpuExit::FailEntry(reason, _) => {
                    return Some(End::Failed(format!(
                        "the processor refused the guest's state (reason {reason:#x})"
                    )));
                }
                VcpuExit::InternalError => {
                    return Some(End::Failed(
                        "the guest did what KVM cannot emulate".to_owned(),
                    ));
                }
                other => {
                    return Some(End::Failed(format!(
                        "the guest left in a way that is not known: {other:?}"
                    )));
                }
            }
        }
    }
}
