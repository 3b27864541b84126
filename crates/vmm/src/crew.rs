//! The threads of a machine that is not there yet: each behind its filter, and waiting.

use std::sync::Arc;

use crate::{
    Error,
    bus::Failures,
    jail::calls::Thread,
    nursery::{self, Nursery, Queue},
    post::Ready,
    snapshot::scribe::{self, Scribe},
    threads::Threads,
    vcpu::{self, Vcpus},
};

/// They.
#[derive(Debug)]
pub(crate) struct Crew {
    /// Of devices, each of which has a thread of its kind here.
    pub(crate) devices: Threads,
    pub(crate) nursery: Ready<nursery::Duty>,
    pub(crate) scribe: Ready<scribe::Duty>,
    pub(crate) vcpus: Vec<Ready<vcpu::Vcpu>>,
    /// By which the nursery's and the devices' threads get jobs.
    pub(crate) queue: Arc<Queue>,
}

impl Crew {
    /// Starts them; each behind its own filter if `jailed`. `devices` are names and
    /// kinds of threads.
    pub(crate) fn muster<'a>(
        jailed: bool,
        devices: impl Iterator<Item = (&'a str, &'static Thread)>,
        vcpus: u8,
        failed: Failures,
    ) -> Result<Self, Error> {
        let queue = Arc::new(Queue::new());
        let mut threads = Threads::new(jailed, failed, Arc::clone(&queue));
        // All are started before the first is waited for.
        let (nursery, scribe) = (Nursery::post(jailed)?, Scribe::post(jailed)?);
        let vcpus: Result<Vec<_>, _> = (0..vcpus).map(|n| Vcpus::post(n, jailed)).collect();
        threads.fill(devices)?;
        Ok(Self {
            devices: threads,
            nursery: nursery.ready()?,
            scribe: scribe.ready()?,
            vcpus: vcpus?
                .into_iter()
                .map(|vcpu| vcpu.ready())
                .collect::<Result<_, _>>()?,
            queue,
        })
    }
}
