//! The devices' threads. Each serves one device at a time behind a filter of its own,
//! and never ends: when its device is gone it waits for another that makes the same
//! system calls. So there are at most as many of a kind as slots.

use std::sync::{
    Arc, Condvar, Mutex, PoisonError,
    mpsc::{SyncSender, sync_channel},
};

use walnut_devices::virtio::Worker;

use crate::{
    Error,
    bus::Failures,
    jail::{Filter, calls::Thread},
    nursery::{Job, Queue},
};

/// A thread, as its tasks reach it.
#[derive(Debug)]
pub(crate) struct Seat {
    /// What its filter admits.
    kind: &'static Thread,
    inbox: Arc<Inbox>,
}

/// A device to serve.
#[derive(Debug)]
struct Task {
    /// What the nursery knows it by.
    id: u64,
    name: String,
    worker: Worker,
}

#[derive(Debug, Default)]
struct Inbox {
    task: Mutex<Option<Task>>,
    filled: Condvar,
}

impl Inbox {
    fn put(&self, task: Task) {
        let mut place = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Some(task);
        drop(place);
        self.filled.notify_one();
    }

    fn take(&self) -> Option<Task> {
        let place = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        self.filled
            .wait_while(place, |task| task.is_none())
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// All threads of devices.
pub(crate) struct Threads {
    idle: Vec<Seat>,
    jailed: bool,
    failed: Failures,
    queue: Arc<Queue>,
}

impl Threads {
    pub(crate) fn new(jailed: bool, failed: Failures, queue: Arc<Queue>) -> Self {
        Self {
            idle: Vec::new(),
            jailed,
            failed,
            queue,
        }
    }

    /// A thread of a kind, behind its filter: one that has nothing to do, or a new
    /// one.
    pub(crate) fn seat(&mut self, name: &str, kind: &'static Thread) -> Result<Seat, Error> {
        let same = |seat: &Seat| std::ptr::eq(seat.kind, kind);
        if let Some(at) = self.idle.iter().position(same) {
            return Ok(self.idle.swap_remove(at));
        }
        let filter = match self.jailed {
            true => Some(Filter::of(kind)?),
            false => None,
        };
        let inbox = Arc::<Inbox>::default();
        let (locked_in, hears) = sync_channel(1);
        let (its_inbox, queue) = (Arc::clone(&inbox), Arc::clone(&self.queue));
        let failed = self.failed.clone();
        std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(crate::STACK)
            .spawn(move || serve(&its_inbox, filter.as_ref(), &locked_in, &queue, &failed))
            .map_err(|e| Error::Host("start a device's thread", crate::vcpu::errno(&e)))?;
        match hears.recv() {
            Ok(Ok(())) => Ok(Seat { kind, inbox }),
            Ok(Err(e)) => Err(Error::Config(e)),
            Err(_) => Err(Error::Config("a device's thread died".to_owned())),
        }
    }

    /// Takes a thread back that has nothing to do any more.
    pub(crate) fn give_back(&mut self, seat: Seat) {
        self.idle.push(seat);
    }
}

impl Seat {
    /// Lets the thread serve a device. When that has been stopped, its worker comes
    /// back as [`Job::Returned`].
    pub(crate) fn serve(&self, id: u64, name: &str, worker: Worker) {
        self.inbox.put(Task {
            id,
            name: name.to_owned(),
            worker,
        });
    }
}

/// A device's thread.
fn serve(
    inbox: &Inbox,
    filter: Option<&Filter>,
    locked_in: &SyncSender<Result<(), String>>,
    queue: &Queue,
    failed: &Failures,
) {
    let result = filter.map_or(Ok(()), Filter::install);
    let mut ready = result.is_ok();
    // The other end waits for it.
    let _ = locked_in.send(result);
    while ready && let Some(mut task) = inbox.take() {
        match task.worker.serve() {
            Ok(()) => queue.push(Job::Returned {
                id: task.id,
                worker: Box::new(task.worker),
            }),
            Err(e) => {
                failed(format!("{}: {e}", task.name));
                // To drop it takes system calls that this thread has not.
                std::mem::forget(task);
                ready = false;
            }
        }
    }
    // To end a thread takes system calls that it need not have.
    loop {
        std::thread::park();
    }
}
