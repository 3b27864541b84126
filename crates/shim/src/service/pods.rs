//! A machine made for a pod before any container: the Task service's part in it.

use std::sync::{Arc, atomic::Ordering};

use walnut_sandbox::{ContainerStats, Error, GuestMemoryResponse, PodRequest, Sandbox, Settings};

use super::{Reply, TaskService, fault};
use crate::{front::Count, pressure};

impl TaskService {
    /// A pod is to be made: until it is, nothing may make another machine here, and
    /// whoever deletes a container does not end it.
    pub(crate) async fn announce_pod(&self) -> Reply<()> {
        let _one = self.creating.lock().await;
        let taken = self.announced.swap(true, Ordering::AcqRel);
        if taken || self.sandbox().is_ok() {
            let there = "create the sandbox: there is one here already";
            return Err(fault(&Error::AlreadyExists(there.into())));
        }
        Ok(())
    }

    /// There is one, which the program before made.
    pub(crate) fn announced(&self) {
        self.announced.store(true, Ordering::Release);
    }

    /// Makes the machine of the pod `id`.
    pub(crate) async fn start_pod(
        &self,
        id: &str,
        settings: Settings,
        request: &PodRequest,
    ) -> Reply<Arc<Sandbox>> {
        let _one = self.creating.lock().await;
        let made = Sandbox::create_pod(self.config(settings), request).await;
        let sandbox = made.map_err(|e| fault(&e))?;
        *self.sandbox.lock().unwrap_or_else(|e| e.into_inner()) = Some(sandbox.clone());
        self.front.up(&sandbox, id);
        pressure::watch(&sandbox, id);
        Ok(sandbox)
    }

    /// The PID that stands for all processes of the machine.
    pub(crate) fn pod_pid(&self) -> u32 {
        self.front.pid(0)
    }

    /// The figures of all containers together, and what the guest says of its memory.
    pub(crate) async fn pod_stats(&self) -> Reply<(ContainerStats, GuestMemoryResponse)> {
        let sandbox = self.sandbox()?;
        let mut sum = ContainerStats::default();
        for id in sandbox.container_ids() {
            // One that has just gone has no part in it.
            if let Ok(stats) = sandbox.stats(&id).await {
                sum.cpu_usage_us += stats.cpu_usage_us;
                sum.cpu_user_us += stats.cpu_user_us;
                sum.cpu_system_us += stats.cpu_system_us;
                sum.cpu_throttled_us += stats.cpu_throttled_us;
                sum.memory_current += stats.memory_current;
                sum.memory_swap += stats.memory_swap;
                sum.memory_inactive_file += stats.memory_inactive_file;
                sum.pids_current += stats.pids_current;
                sum.oom_kills += stats.oom_kills;
                sum.io_read += stats.io_read;
                sum.io_written += stats.io_written;
            }
        }
        let guest = sandbox.guest_memory().await.map_err(|e| fault(&e))?;
        Ok((sum, guest))
    }

    /// Ends the supervisor, unless containers that no pod was made for need it.
    pub(crate) async fn end_pod(&self) {
        let _one = self.creating.lock().await;
        let all = match self.announced.load(Ordering::Acquire) {
            true => 0,
            false => self.tasks.ids().len(),
        };
        self.front
            .shutdown(self.front.place().id, true, Count { all, alive: 0 });
    }
}
