//! The devices' threads. Each serves one device at a time behind a filter of its own,
//! and never ends: when its device is gone it waits for another that makes the same
//! system calls. So there are at most as many of a kind as slots.

use std::{fmt, sync::Arc};

use walnut_devices::virtio::Worker;

use crate::{
    Error,
    bus::Failures,
    jail::calls::Thread,
    nursery::{Job, Queue},
    post::{Inbox, Post},
};

/// A thread, as its tasks reach it.
#[derive(Debug)]
pub(crate) struct Seat {
    /// What its filter admits.
    kind: &'static Thread,
    inbox: Arc<Inbox<Task>>,
}

/// A device to serve.
#[derive(Debug)]
struct Task {
    /// What the nursery knows it by.
    id: u64,
    name: String,
    worker: Worker,
}

/// All threads of devices.
pub(crate) struct Threads {
    idle: Vec<Seat>,
    jailed: bool,
    failed: Failures,
    queue: Arc<Queue>,
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threads")
            .field("idle", &self.idle)
            .finish_non_exhaustive()
    }
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

    /// Starts a thread for each of `devices`, names and kinds, that will have one.
    pub(crate) fn fill<'a>(
        &mut self,
        devices: impl Iterator<Item = (&'a str, &'static Thread)>,
    ) -> Result<(), Error> {
        let posts: Result<Vec<_>, Error> = devices
            .map(|(name, kind)| Ok((kind, self.open(name, kind)?)))
            .collect();
        for (kind, post) in posts? {
            let inbox = post.ready()?.inbox;
            self.idle.push(Seat { kind, inbox });
        }
        Ok(())
    }

    /// A thread of a kind, behind its filter: the first that has nothing to do, or a
    /// new one.
    pub(crate) fn seat(&mut self, name: &str, kind: &'static Thread) -> Result<Seat, Error> {
        let same = |seat: &Seat| std::ptr::eq(seat.kind, kind);
        if let Some(at) = self.idle.iter().position(same) {
            return Ok(self.idle.remove(at));
        }
        let inbox = self.open(name, kind)?.ready()?.inbox;
        Ok(Seat { kind, inbox })
    }

    fn open(&self, name: &str, kind: &'static Thread) -> Result<Post<Task>, Error> {
        let (queue, failed) = (Arc::clone(&self.queue), self.failed.clone());
        let serve = move |inbox: &Inbox<Task>| serve(inbox, &queue, &failed);
        Post::open(name.to_owned(), kind, self.jailed, serve)
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
fn serve(inbox: &Inbox<Task>, queue: &Queue, failed: &Failures) {
    loop {
        let mut task = inbox.take();
        match task.worker.serve() {
            Ok(()) => queue.push(Job::Returned {
                id: task.id,
                worker: Box::new(task.worker),
            }),
            Err(e) => {
                failed(format!("{}: {e}", task.name));
                // To drop it takes system calls that this thread has not.
                std::mem::forget(task);
                return;
            }
        }
    }
}
