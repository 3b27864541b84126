//! What the host is told unasked: containers that ran out of memory.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use walnut_protocol::agent::{Event, OomEvent, event};

use crate::cgroup::Cgroup;
use crate::power::Fatal;

/// Events kept while nobody asks.
const KEPT: usize = 128;

/// The queue of events.
#[derive(Debug, Default)]
pub(crate) struct Events {
    queue: Mutex<Queue>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    oom: VecDeque<String>,
    dropped: u64,
}

impl Events {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, container: String) {
        let mut queue = self.queue();
        if queue.oom.len() == KEPT {
            queue.oom.pop_front();
            queue.dropped += 1;
        }
        queue.oom.push_back(container);
        drop(queue);
        self.more.notify_waiters();
    }

    fn take(&self) -> Option<event::Event> {
        let mut queue = self.queue();
        let dropped = std::mem::take(&mut queue.dropped);
        if dropped > 0 {
            return Some(event::Event::Dropped(dropped));
        }
        let container_id = queue.oom.pop_front()?;
        Some(event::Event::Oom(OomEvent {
            container_id,
            ..OomEvent::default()
        }))
    }

    /// The next event, as soon as there is one.
    pub(crate) async fn next(&self) -> Event {
        loop {
            let more = self.more.notified();
            if let Some(event) = self.take() {
                return Event {
                    event: Some(event),
                    ..Event::default()
                };
            }
            more.await;
        }
    }
}

/// Watches `memory.events` of every container.
#[derive(Debug)]
pub(crate) struct OomWatch {
    inotify: AsyncFd<Polled>,
    watched: Mutex<HashMap<WatchDescriptor, Watched>>,
    events: Arc<Events>,
}

#[derive(Debug)]
struct Watched {
    container: String,
    cgroup: Cgroup,
    seen: u64,
}

impl OomWatch {
    /// Starts watching; nothing is watched yet.
    pub(crate) fn start(events: Arc<Events>) -> Result<Arc<Self>, Fatal> {
        let fail = |e: std::io::Error| Fatal::new("watch for the OOM killer", e);
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .map_err(|e| fail(e.into()))?;
        // SAFETY: `Polled` owns the one descriptor it reports, and keeps it.
        let inotify = unsafe { AsyncFd::register(Polled(inotify)) };
        let watch = Arc::new(Self {
            inotify: inotify.map_err(|e| fail(e.into()))?,
            watched: Mutex::default(),
            events,
        });
        let watcher = Arc::clone(&watch);
        tokio::spawn(async move { watcher.run().await });
        Ok(watch)
    }

    fn watched(&self) -> std::sync::MutexGuard<'_, HashMap<WatchDescriptor, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a container; the watch ends with its cgroup.
    pub(crate) fn add(&self, container: &str, cgroup: Cgroup) {
        let path = cgroup.file("memory.events");
        // Fails in a kernel without the memory controller: then nothing is
        // killed for a container's limit either.
        if let Ok(descriptor) = self
            .inotify
            .get_ref()
            .0
            .add_watch(&path, AddWatchFlags::IN_MODIFY)
        {
            let watched = Watched {
                container: container.to_owned(),
                seen: cgroup.oom_kills(),
                cgroup,
            };
            self.watched().insert(descriptor, watched);
        }
    }

    async fn run(&self) {
        while let Ok(mut ready) = self.inotify.readable().await {
            let read = ready.try_io(|i| i.get_ref().0.read_events().map_err(Into::into));
            let Ok(Ok(changes)) = read else { continue };
            for change in changes {
                self.look(change.wd, change.mask.contains(AddWatchFlags::IN_IGNORED));
            }
        }
    }

    fn look(&self, descriptor: WatchDescriptor, gone: bool) {
        let mut all = self.watched();
        if gone {
            all.remove(&descriptor);
            return;
        }
        let Some(watched) = all.get_mut(&descriptor) else {
            return;
        };
        let kills = watched.cgroup.oom_kills();
        if kills > watched.seen {
            watched.seen = kills;
            self.events.push(watched.container.clone());
        }
    }
}

/// The runtime wants raw descriptors as well.
#[derive(Debug)]
struct Polled(Inotify);

impl AsFd for Polled {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Polled {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn old_events_are_dropped_and_counted() {
        let events = Events::default();
        for n in 0..130 {
            events.push(n.to_string());
        }
        assert_eq!(events.next().await.event, Some(event::Event::Dropped(2)));
        let Some(event::Event::Oom(first)) = events.next().await.event else {
            panic!("no event");
        };
        assert_eq!(first.container_id, "2");
    }

    #[tokio::test]
    async fn an_event_wakes_who_waits() {
        let events = Arc::new(Events::default());
        let waiter = Arc::clone(&events);
        let next = tokio::spawn(async move { waiter.next().await });
        tokio::task::yield_now().await;
        events.push("c".into());
        assert!(next.await.unwrap().has_oom());
    }
}
