//! Threads that are there before what they serve.
//!
//! To start a thread and to load its filter takes the kernel a while, which passes
//! while KVM makes the machine. So all threads that a machine needs come first, each
//! behind its filter, and wait.

use std::sync::{
    Arc, Condvar, Mutex, PoisonError,
    atomic::{AtomicI32, Ordering},
    mpsc::{Receiver, sync_channel},
};

use crate::{
    Error,
    jail::{Filter, calls::Thread},
};

/// What a thread is to serve, one thing at a time.
#[derive(Debug)]
pub(crate) struct Inbox<T> {
    task: Mutex<Option<T>>,
    filled: Condvar,
}

impl<T> Inbox<T> {
    pub(crate) fn put(&self, task: T) {
        let mut place = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Some(task);
        drop(place);
        self.filled.notify_one();
    }

    /// Waits for it.
    pub(crate) fn take(&self) -> T {
        loop {
            let place = self.task.lock().unwrap_or_else(PoisonError::into_inner);
            let mut place = self
                .filled
                .wait_while(place, |task| task.is_none())
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(task) = place.take() {
                return task;
            }
        }
    }
}

/// A thread that waits.
#[derive(Debug)]
pub(crate) struct Post<T> {
    inbox: Arc<Inbox<T>>,
    tid: Arc<AtomicI32>,
    /// Whether it is behind its filter.
    locked_in: Receiver<Result<(), String>>,
}

impl<T: Send + 'static> Post<T> {
    /// Starts a thread called `name` that will `serve` what comes, behind its filter
    /// if it is `jailed`. It never ends, which would take calls that it need not have.
    pub(crate) fn open(
        name: String,
        kind: &Thread,
        jailed: bool,
        serve: impl FnOnce(&Inbox<T>) + Send + 'static,
    ) -> Result<Self, Error> {
        let filter = jailed.then(|| Filter::of(kind)).transpose()?;
        let inbox = Arc::new(Inbox {
            task: Mutex::new(None),
            filled: Condvar::new(),
        });
        let tid = Arc::<AtomicI32>::default();
        let (tell, locked_in) = sync_channel(1);
        let (its_inbox, its_tid) = (Arc::clone(&inbox), Arc::clone(&tid));
        let run = move || {
            its_tid.store(nix::unistd::gettid().as_raw(), Ordering::Release);
            let result = filter.as_ref().map_or(Ok(()), Filter::install);
            let ready = result.is_ok();
            // If nobody hears it, nobody sends anything either.
            let _ = tell.send(result);
            if ready {
                serve(&its_inbox);
            }
            loop {
                std::thread::park();
            }
        };
        std::thread::Builder::new()
            .name(name)
            .stack_size(crate::STACK)
            .spawn(run)
            .map_err(|e| Error::Host("start a thread", crate::vcpu::errno(&e)))?;
        Ok(Self {
            inbox,
            tid,
            locked_in,
        })
    }

    /// Waits until the thread is behind its filter. What it is to serve goes into the
    /// inbox.
    pub(crate) fn ready(self) -> Result<Ready<T>, Error> {
        match self.locked_in.recv() {
            Ok(Ok(())) => Ok(Ready {
                inbox: self.inbox,
                tid: self.tid.load(Ordering::Acquire),
            }),
            Ok(Err(e)) => Err(Error::Config(e)),
            Err(_) => Err(Error::Config("a thread died at its start".to_owned())),
        }
    }
}

/// A thread that is behind its filter.
#[derive(Debug)]
pub(crate) struct Ready<T> {
    pub(crate) inbox: Arc<Inbox<T>>,
    /// The kernel's number for it.
    pub(crate) tid: i32,
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::jail::calls;

    #[test]
    fn a_thread_waits_for_one_thing_after_the_other() {
        let (tell, heard) = channel();
        let post = Post::open(
            "waits".to_owned(),
            &calls::RNG_THREAD,
            false,
            move |inbox| {
                let first: u32 = inbox.take();
                tell.send((first, nix::unistd::gettid().as_raw())).unwrap();
                tell.send((inbox.take(), 0)).unwrap();
            },
        );
        let ready = post.unwrap().ready().unwrap();
        ready.inbox.put(7);
        assert_eq!(heard.recv(), Ok((7, ready.tid)));
        ready.inbox.put(8);
        assert_eq!(heard.recv(), Ok((8, 0)));
    }
}
