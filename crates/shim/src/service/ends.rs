//! Who waits for processes' ends, to tell of them.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::timeout;
use walnut_sandbox::Sandbox;

use super::TaskService;
use crate::{
    front::{Event, Front},
    tasks::Tasks,
};

/// How long the end of a container waits for those of its other processes, which its
/// kernel ends with it.
const STRAGGLERS: Duration = Duration::from_secs(2);

impl TaskService {
    /// Waits for a process's end, to tell of it.
    pub(super) fn follow(&self, sandbox: &Arc<Sandbox>, id: &str, exec_id: &str) {
        follow(&self.front, &self.tasks, sandbox, id, exec_id);
    }

    /// Tells of the end of a container that nobody starts before its machine ends.
    pub(super) fn watch(&self, sandbox: &Arc<Sandbox>, id: &str) {
        let (front, tasks, sandbox) = (self.front.clone(), self.tasks.clone(), sandbox.clone());
        let name = id.to_owned();
        let watching = tokio::spawn(async move {
            sandbox.ended().await;
            if sandbox.end_unstarted(&name) {
                follow(&front, &tasks, &sandbox, &name, "");
            }
        });
        self.tasks.watched(id, watching.abort_handle());
    }
}

fn follow(
    front: &Arc<dyn Front>,
    tasks: &Arc<Tasks>,
    sandbox: &Arc<Sandbox>,
    id: &str,
    exec_id: &str,
) {
    tasks.follow(id, exec_id, |told| {
        let (front, tasks, sandbox) = (front.clone(), tasks.clone(), sandbox.clone());
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        tokio::spawn(async move {
            let Ok(exit) = sandbox.wait(&id, &exec_id).await else {
                return;
            };
            if exec_id.is_empty() {
                for follower in tasks.followers(&id, false) {
                    let _ = timeout(STRAGGLERS, follower).await;
                }
                if exit.oom_killed {
                    front.tell(Event::OutOfMemory { id: &id });
                }
            }
            let (id, exec_id, exit) = (&*id, &*exec_id, &exit);
            front.tell(Event::Exited { id, exec_id, exit });
            told.store(true, Ordering::Relaxed);
        })
    });
}
