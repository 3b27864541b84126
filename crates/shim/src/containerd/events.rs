//! Events for containerd: forwarded over its ttrpc socket, in their order, each
//! until containerd has taken it.

use std::time::Duration;

use containerd_shim_protos::{
    api::ForwardRequest,
    protobuf::{MessageDyn, MessageField, well_known_types::any::Any},
    shim::event::Envelope,
    shim_async::EventsClient,
};
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::{
    sync::{Mutex, mpsc},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};
use ttrpc::{Code, asynchronous::Client, context};

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
    queue: std::sync::Mutex<Option<mpsc::Sender<Envelope>>>,
    sender: Mutex<Option<JoinHandle<()>>>,
}

impl Publisher {
    /// To the ttrpc socket at `address`; without one, events go nowhere.
    pub(crate) fn new(namespace: &str, address: Option<&str>) -> Self {
        let (queue, events) = mpsc::channel(QUEUE);
        let sender = address.map(|address| {
            let address = match address.strip_prefix("unix://") {
                Some(_) => address.to_owned(),
                None => format!("unix://{address}"),
            };
            tokio::spawn(send(address, events))
        });
        Self {
            namespace: namespace.into(),
            queue: std::sync::Mutex::new(sender.is_some().then_some(queue)),
            sender: Mutex::new(sender),
        }
    }

    /// Publishes an event; never waits.
    pub(crate) fn publish(&self, topic: &str, event: &dyn MessageDyn) {
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
        let queue = self.queue.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(queue) = &*queue
            && queue.try_send(envelope).is_err()
        {
            warn!("an event is lost, since {QUEUE} wait for containerd: {topic}");
        }
    }

    /// Returns when all events are with containerd, or when `limit` has passed.
    pub(crate) async fn close(&self, limit: Duration) {
        drop(self.queue.lock().unwrap_or_else(|e| e.into_inner()).take());
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
async fn send(address: String, mut events: mpsc::Receiver<Envelope>) {
    let mut client: Option<EventsClient> = None;
    while let Some(envelope) = events.recv().await {
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..Default::default()
        };
        let mut pause = PAUSE.0;
        loop {
            match forward(&address, &mut client, &request).await {
                Ok(()) => break,
                Err(ttrpc::Error::RpcStatus(status)) if is_final(status.code()) => {
                    let topic = &request.envelope.topic;
                    warn!("containerd refused the event {topic}: {}", status.message());
                    break;
                }
                Err(e) => {
                    debug!("forward an event: {e}");
                    client = None;
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
            }
        }
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
    use std::sync::{Arc, Mutex as StdMutex};

    use async_trait::async_trait;
    use containerd_shim_protos::{
        events::task::TaskOOM,
        protobuf::Message,
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
