//! The thread that brings devices up and takes them apart while the guest runs.
//!
//! To do so takes system calls that no other thread should have: descriptors and
//! mappings are made and closed, interrupts wired, threads started. This one has
//! them, and touches nothing that the guest wrote. It gets jobs from the control
//! thread (attach), from vCPUs (the guest has let go of a slot) and from devices'
//! threads (a worker has stopped), and waits for nobody but a back end's handshake.
//!
//! A device goes in this order: the guest ejects its slot, the function leaves the
//! bus; its doorbells go, its worker is told to stop, and comes back when nothing is
//! in flight; then all of it is dropped here, and the control thread hears of it.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc::SyncSender},
};

use vmm_sys_util::eventfd::EventFd;
use walnut_devices::{pci::VirtioPci, virtio::Worker};
use walnut_vmm_api::Attachment;

use crate::{
    Error,
    bus::{Fitted, Member, Wiring},
    jail::calls,
    machine::Fds,
    post::{Inbox, Post},
    prepared::{Prepared, When},
    slots::{Ejected, Slots},
    threads::{Seat, Threads},
};

/// Jobs that there is room for at once; no thread that must not wait allocates then.
const JOBS: usize = 128;

/// Something to do.
#[derive(Debug)]
pub(crate) enum Job {
    /// Add a device.
    Attach {
        attachment: Box<Attachment>,
        /// What came with the request.
        fds: Fds,
        reply: SyncSender<Result<Member, Error>>,
    },
    /// The guest has let go of a device.
    Ejected(Box<VirtioPci>),
    /// A device has stopped.
    Returned { id: u64, worker: Box<Worker> },
}

/// What is to do, and what has been done.
#[derive(Debug)]
pub(crate) struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    filled: Condvar,
    /// Names of devices that are gone.
    gone: Mutex<Vec<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Lists are whole whoever panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self {
            jobs: Mutex::new(VecDeque::with_capacity(JOBS)),
            filled: Condvar::new(),
            gone: Mutex::default(),
        }
    }

    pub(crate) fn push(&self, job: Job) {
        lock(&self.jobs).push_back(job);
        self.filled.notify_one();
    }

    /// The devices that have gone since the last call.
    pub(crate) fn take_gone(&self) -> Vec<String> {
        mem::take(&mut *lock(&self.gone))
    }

    fn next(&self) -> Option<Job> {
        self.filled
            .wait_while(lock(&self.jobs), |jobs| jobs.is_empty())
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }
}

impl Ejected for Queue {
    fn ejected(&self, function: Box<VirtioPci>) {
        self.push(Job::Ejected(function));
    }
}

/// A device that is served, or on its way out.
#[derive(Debug)]
struct Resident {
    id: u64,
    member: Member,
    seat: Seat,
    /// Off the bus, and kept until the worker has come back: it holds what the
    /// worker uses, and must be dropped here.
    function: Option<Box<VirtioPci>>,
}

/// What the thread is given, once.
pub(crate) type Duty = (Nursery, Arc<Queue>);

/// The thread's state.
#[derive(Debug)]
pub(crate) struct Nursery {
    wiring: Arc<Wiring>,
    slots: Arc<Slots>,
    threads: Threads,
    residents: Vec<Resident>,
    next_id: u64,
    bell: EventFd,
}

impl Nursery {
    /// `bell` is rung when a device is gone.
    pub(crate) fn new(
        wiring: Arc<Wiring>,
        slots: Arc<Slots>,
        threads: Threads,
        bell: EventFd,
    ) -> Self {
        Self {
            wiring,
            slots,
            threads,
            residents: Vec::new(),
            next_id: 0,
            bell,
        }
    }

    /// Starts the thread of a device.
    pub(crate) fn adopt(&mut self, fitted: Fitted) -> Result<Member, Error> {
        let seat = match self.threads.seat(&fitted.member.name, fitted.thread) {
            Ok(seat) => seat,
            Err(e) => {
                self.wiring.remove(fitted);
                return Err(e);
            }
        };
        let id = self.next_id;
        self.next_id += 1;
        // Before it can be active, and not before there is somebody who answers.
        self.wiring.site().back_ends.add(&fitted.member.port);
        seat.serve(id, &fitted.member.name, fitted.worker);
        self.residents.push(Resident {
            id,
            member: fitted.member.clone(),
            seat,
            function: None,
        });
        Ok(fitted.member)
    }

    /// Starts the thread, behind its filter if `jailed`: it does the jobs of the queue
    /// that it gets.
    pub(crate) fn post(jailed: bool) -> Result<Post<Duty>, Error> {
        let serve = |inbox: &Inbox<Duty>| {
            let (mut nursery, queue) = inbox.take();
            while let Some(job) = queue.next() {
                nursery.work(&queue, job);
            }
        };
        Post::open("nursery".to_owned(), &calls::NURSERY_THREAD, jailed, serve)
    }

    fn work(&mut self, queue: &Queue, job: Job) {
        match job {
            Job::Attach {
                attachment,
                fds,
                reply,
            } => {
                // The other end waits for it.
                let _ = reply.send(self.attach(&attachment, fds));
            }
            Job::Ejected(function) => self.eject(function),
            Job::Returned { id, worker } => {
                if let Some(name) = self.bury(id, *worker) {
                    lock(&queue.gone).push(name);
                    // Fails only when the counter is full: then it has been rung.
                    let _ = self.bell.write(1);
                }
            }
        }
    }

    fn attach(&mut self, attachment: &Attachment, mut fds: Fds) -> Result<Member, Error> {
        let take = |fd| fds.take(fd);
        let prepared = Prepared::new(self.wiring.site(), attachment, When::Running, take)?;
        let fitted = self.wiring.fit(prepared)?;
        let member = self.adopt(fitted)?;
        self.slots.came(member.slot);
        Ok(member)
    }

    fn eject(&mut self, function: Box<VirtioPci>) {
        function.unplug();
        let mut residents = self.residents.iter_mut();
        if let Some(resident) = residents.find(|one| one.member.port.same(function.port())) {
            resident.function = Some(function);
            resident.member.port.stop();
        }
    }

    /// Drops what is left of a device; its name.
    fn bury(&mut self, id: u64, worker: Worker) -> Option<String> {
        let at = self.residents.iter().position(|one| one.id == id)?;
        let Resident {
            member,
            seat,
            function,
            ..
        } = self.residents.swap_remove(at);
        self.wiring.site().back_ends.remove(&member.port);
        drop(worker);
        drop(function);
        self.threads.give_back(seat);
        Some(member.name)
    }
}
