//! Events for containerd: forwarded over its ttrpc socket, in their order, each
//! until containerd has taken it.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex as StdMutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    api::ForwardRequest,
    protobuf::{Message, MessageDyn, MessageField, well_known_types::any::Any},
    shim::event::Envelope,
    shim_async::EventsClient,
};
use protobuf::well_known_types::timestamp::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Mutex, Notify},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};
use ttrpc::{Code, asynchronous::Client, context};
use walnut_sandbox::machine::takeover::{NoState, hex};

/// Events that wait at most while containerd is away.
const QUEUE: usize = 4096;
/// Longest containerd may take for one.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts: first, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The way to containerd.
#[derive(Debug)]
pub(crate) struct Publisher {
    namespace: String,
    address: Option<String>,
    queue: Arc<Queue>,
    sender: Mutex<Option<JoinHandle<()>>>,
}

/// Events that containerd has not taken.
#[derive(Debug, Default)]
struct Queue {
    waiting: StdMutex<VecDeque<Envelope>>,
    closed: AtomicBool,
    /// None is sent.
    held: AtomicBool,
    /// The first has been sent, and containerd has not said whether it takes it.
    sent: AtomicBool,
    /// Something of this has changed.
    changed: Notify,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first that waits, once it may be sent; none when there will be no more.
    async fn first(&self) -> Option<Envelope> {
        loop {
            // One that changes from here on is seen.
            let changed = self.changed.notified();
            if !self.held.load(Ordering::Relaxed) {
                let first = self.waiting().front().cloned();
                if first.is_some() || self.closed.load(Ordering::Relaxed) {
                    return first;
                }
            }
            changed.await;
        }
    }
}

/// An event in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct EventState(#[serde(with = "hex")] Vec<u8>);

impl Publisher {
    /// To the ttrpc socket at `address`; without one, events go nowhere.
    pub(crate) fn new(namespace: &str, address: Option<&str>) -> Self {
        Self::begin(namespace, address, VecDeque::new())
    }

    fn begin(namespace: &str, address: Option<&str>, waiting: VecDeque<Envelope>) -> Self {
        let queue = Arc::new(Queue {
            waiting: StdMutex::new(waiting),
            ..Queue::default()
        });
        let sender = address.map(|address| {
            let address = match address.strip_prefix("unix://") {
                Some(_) => address.to_owned(),
                None => format!("unix://{address}"),
            };
            tokio::spawn(send(address, queue.clone()))
        });
        Self {
            namespace: namespace.into(),
            address: address.map(str::to_owned),
            queue,
            sender: Mutex::new(sender),
        }
    }

    /// That of the program before, with the events that wait.
    pub(crate) fn take_over(
        namespace: &str,
        address: Option<&str>,
        events: Vec<EventState>,
    ) -> anyhow::Result<Self> {
        let events = events
            .into_iter()
            .map(|event| Envelope::parse_from_bytes(&event.0));
        let events: Result<_, _> = events.collect();
        Ok(Self::begin(namespace, address, events?))
    }

    /// Where events go.
    pub(crate) fn address(&self) -> Option<&str> {
        self.address.as_deref()
    }

    /// From now on none is sent, or, again, they are.
    pub(crate) fn hold(&self, held: bool) {
        self.queue.held.store(held, Ordering::Relaxed);
        self.queue.changed.notify_one();
    }

    /// The events that wait, for the next program.
    pub(crate) fn state(&self) -> Result<Vec<EventState>, NoState> {
        if self.queue.sent.load(Ordering::Relaxed) {
            return Err(NoState::busy("containerd is being told of something"));
        }
        let waiting = self.queue.waiting();
        let events = waiting.iter().map(|event| {
            let bytes = event.write_to_bytes();
            let bytes = bytes.map_err(|e| NoState::never(format!("encode an event: {e}")));
            bytes.map(EventState)
        });
        events.collect()
    }

    /// Publishes an event; never waits.
    pub(crate) fn publish(&self, topic: &str, event: &dyn MessageDyn) {
        if self.address.is_none() || self.queue.closed.load(Ordering::Relaxed) {
            return;
        }
        let value = match event.write_to_bytes_dyn() {
            Ok(value) => value,
            Err(e) => return warn!("encode the event {topic}: {e}"),
        };
        let any = Any {
            type_url: event.descriptor_dyn().full_name().into(),
            value,
            ..Default::default()
        };
        let now = walnut_sandbox::now_ns();
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(now)),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: MessageField::some(any),
            ..Default::default()
        };
        let mut waiting = self.queue.waiting();
        if waiting.len() >= QUEUE {
            return warn!("an event is lost, since {QUEUE} wait for containerd: {topic}");
        }
        waiting.push_back(envelope);
        drop(waiting);
        self.queue.changed.notify_one();
    }

    /// Returns when all events are with containerd, or when `limit` has passed.
    pub(crate) async fn close(&self, limit: Duration) {
        self.queue.closed.store(true, Ordering::Relaxed);
        self.queue.changed.notify_one();
        if let Some(sender) = self.sender.lock().await.take()
            && timeout(limit, sender).await.is_err()
        {
            warn!("containerd did not take all events in time");
        }
    }
}

/// Nanoseconds since the epoch as protobuf has them.
pub(crate) fn timestamp(ns: i64) -> Timestamp {
    Timestamp {
        seconds: ns.div_euclid(1_000_000_000),
        nanos: i32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or(0),
        ..Default::default()
    }
}

/// Forwards one event after the other.
async fn send(address: String, queue: Arc<Queue>) {
    let mut client: Option<EventsClient> = None;
    let mut pause = PAUSE.0;
    while let Some(envelope) = queue.first().await {
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..Default::default()
        };
        queue.sent.store(true, Ordering::Relaxed);
        let forwarded = forward(&address, &mut client, &request).await;
        queue.sent.store(false, Ordering::Relaxed);
        match forwarded {
            Ok(()) => {}
            Err(ttrpc::Error::RpcStatus(status)) if is_final(status.code()) => {
                let topic = &request.envelope.topic;
                warn!("containerd refused the event {topic}: {}", status.message());
            }
            Err(e) => {
                debug!("forward an event: {e}");
                client = None;
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE.1);
                continue;
            }
        }
        queue.waiting().pop_front();
        pause = PAUSE.0;
    }
}

/// Whether asking again cannot help.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::INVALID_ARGUMENT | Code::UNIMPLEMENTED | Code::PERMISSION_DENIED
    )
}

async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let events = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    events
        .forward(context::with_duration(PATIENCE), request)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use containerd_shim_protos::{
        events::task::TaskOOM,
        shim_async::{Events, create_events},
    };
    use protobuf::well_known_types::empty::Empty;
    use ttrpc::{
        asynchronous::{Server, TtrpcContext},
        get_status,
    };

    use super::*;

    /// A containerd that fails the first time it is asked.
    #[derive(Default)]
    struct Moody {
        taken: StdMutex<Vec<String>>,
        asked: StdMutex<u32>,
    }

    #[async_trait]
    impl Events for Moody {
        async fn forward(&self, _: &TtrpcContext, req: ForwardRequest) -> ttrpc::Result<Empty> {
            let mut asked = self.asked.lock().unwrap();
            *asked += 1;
            if *asked == 1 {
                let status = get_status(Code::UNAVAILABLE, "not now".to_owned());
                return Err(ttrpc::Error::RpcStatus(status));
            }
            let any = req.envelope.event.clone().unwrap();
            assert_eq!(any.type_url, "containerd.events.TaskOOM");
            let event = TaskOOM::parse_from_bytes(&any.value).unwrap();
            let mut taken = self.taken.lock().unwrap();
            taken.push(format!("{} {}", req.envelope.namespace, event.container_id));
            Ok(Empty::new())
        }
    }

    async fn serve(address: &str, moody: &Arc<Moody>) -> Server {
        let server = Server::new().bind(address).unwrap();
        let mut server = server.register_service(create_events(moody.clone()));
        server.start().await.unwrap();
        server
    }

    #[tokio::test]
    async fn events_wait_for_containerd_and_keep_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let address = format!("unix://{}", path.display());
        let publisher = Publisher::new("space", Some(path.to_str().unwrap()));
        let tell = |id: String| {
            let event = TaskOOM {
                container_id: id,
                ..Default::default()
            };
            publisher.publish("/tasks/oom", &event);
        };
        for n in 0..5 {
            tell(n.to_string());
        }
        let moody = Arc::new(Moody::default());
        let mut server = serve(&address, &moody).await;
        while moody.taken.lock().unwrap().len() < 5 {
            tokio::task::yield_now().await;
            sleep(Duration::from_millis(1)).await;
        }
        server.shutdown().await.unwrap();
        drop(server);
        let _ = std::fs::remove_file(&path);
        for n in 5..10 {
            tell(n.to_string());
        }
        let server = serve(&address, &moody).await;
        publisher.close(Duration::from_secs(60)).await;
        let want: Vec<_> = (0..10).map(|n| format!("space {n}")).collect();
        assert_eq!(*moody.taken.lock().unwrap(), want);
        drop(server);
    }

    #[tokio::test]
    async fn without_an_address_nothing_waits() {
        let publisher = Publisher::new("space", None);
        publisher.publish("/tasks/oom", &TaskOOM::default());
        publisher.close(Duration::from_secs(60)).await;
    }
}
