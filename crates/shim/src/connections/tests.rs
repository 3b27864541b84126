use containerd_shim_protos::protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn frame(kind: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(body);
    bytes
}

fn asked(stream: u32, method: &str, payload: usize) -> Vec<u8> {
    let request = Request {
        service: "containerd.task.v2.Task".into(),
        method: method.into(),
        payload: vec![7; payload],
        ..Default::default()
    };
    frame(
        MESSAGE_TYPE_REQUEST,
        stream,
        &request.write_to_bytes().unwrap(),
    )
}

fn answered(stream: u32) -> Vec<u8> {
    frame(MESSAGE_TYPE_RESPONSE, stream, b"answer")
}

/// Connections with one, whose other end is the client's.
async fn one() -> (Arc<Connections>, Watched, UnixStream, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let connections = Connections::new(listener).unwrap();
    let client = UnixStream::connect(&path).await.unwrap();
    let mut stream = Box::pin(connections.clone().stream(Vec::new()));
    let watched = stream.next().await.unwrap().unwrap();
    (connections, watched, client, dir)
}

fn open(connections: &Connections) -> Result<Vec<usize>, NoState> {
    let state = connections.state(&mut Giver::default())?;
    let all = state.all.iter().map(|connection| {
        assert_eq!(connection.problem(), None);
        connection.open.len()
    });
    Ok(all.collect())
}

/// Other numbers for the descriptors of a state, since this program has them still.
fn again(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Number(number) => {
            let fd = i32::try_from(number.as_i64().unwrap()).unwrap();
            // SAFETY: whose state it is has it open.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
            let fd = fd.try_clone_to_owned().unwrap();
            *value = std::os::fd::IntoRawFd::into_raw_fd(fd).into();
        }
        serde_json::Value::Object(map) => map.values_mut().for_each(again),
        serde_json::Value::Array(all) => all.iter_mut().for_each(again),
        _ => {}
    }
}

#[tokio::test]
async fn it_is_known_what_has_been_asked_and_not_answered() {
    let (connections, mut watched, mut client, _dir) = one().await;
    assert_eq!(open(&connections).unwrap(), [0]);
    let (wait, kill) = (asked(1, "Wait", 10), asked(3, "Kill", 10));
    client.write_all(&wait).await.unwrap();
    let mut got = vec![0; wait.len()];
    // Byte by byte: in the middle of a frame nobody is to take over.
    watched.read_exact(&mut got[..4]).await.unwrap();
    assert!(matches!(open(&connections), Err(NoState::Busy(_))));
    watched.read_exact(&mut got[4..]).await.unwrap();
    assert_eq!(got, wait);
    assert_eq!(open(&connections).unwrap(), [1]);
    client.write_all(&kill).await.unwrap();
    watched.read_exact(&mut vec![0; kill.len()]).await.unwrap();
    let busy = open(&connections).unwrap_err().to_string();
    assert!(busy.contains("Kill"), "{busy}");
    let answer = answered(3);
    watched.write_all(&answer[..12]).await.unwrap();
    assert!(matches!(open(&connections), Err(NoState::Busy(_))));
    watched.write_all(&answer[12..]).await.unwrap();
    assert_eq!(open(&connections).unwrap(), [1]);
    watched.write_all(&answered(1)).await.unwrap();
    assert_eq!(open(&connections).unwrap(), [0]);
    // One that is too long to be kept is waited for, whatever it is.
    let long = asked(5, "Wait", KEPT_MAX + 1);
    let (sent, read) = (client.write_all(&long), async {
        watched.read_exact(&mut vec![0; long.len()]).await
    });
    let (sent, read) = tokio::join!(sent, read);
    sent.unwrap();
    read.unwrap();
    assert!(matches!(open(&connections), Err(NoState::Busy(_))));
    drop(watched);
    assert!(open(&connections).unwrap().is_empty());
}

#[tokio::test]
async fn while_connections_are_held_no_request_begins() {
    let (connections, mut watched, mut client, _dir) = one().await;
    let (first, second) = (asked(1, "State", 3), asked(3, "State", 3));
    client.write_all(&first[..5]).await.unwrap();
    let mut got = vec![0; first.len()];
    watched.read_exact(&mut got[..5]).await.unwrap();
    connections.hold(true);
    // What has begun comes to its end.
    client.write_all(&first[5..]).await.unwrap();
    client.write_all(&second).await.unwrap();
    watched.read_exact(&mut got[5..]).await.unwrap();
    let mut next = vec![0; second.len()];
    let mut reading = Box::pin(watched.read_exact(&mut next));
    tokio::select! {
        biased;
        _ = &mut reading => unreachable!("it is held"),
        () = tokio::task::yield_now() => {}
    }
    connections.hold(false);
    reading.await.unwrap();
    assert_eq!(next, second);
}

#[tokio::test]
async fn the_next_program_is_asked_again() {
    let (connections, mut watched, mut client, _dir) = one().await;
    let (wait, state) = (asked(1, "Wait", 9), asked(3, "State", 9));
    client.write_all(&wait).await.unwrap();
    watched.read_exact(&mut vec![0; wait.len()]).await.unwrap();
    connections.hold(true);
    // It comes after the old one has stopped reading.
    client.write_all(&state).await.unwrap();
    let mut giver = Giver::default();
    let kept = connections.state(&mut giver).unwrap();
    let mut kept = serde_json::to_value(&kept).unwrap();
    again(&mut kept);
    drop((connections, watched));
    let kept: ConnectionsState = serde_json::from_value(kept).unwrap();
    let (connections, mut all) = Connections::take_over(kept, &mut Taker::default()).unwrap();
    let mut watched = all.pop().unwrap();
    let mut got = vec![0; wait.len() + state.len()];
    watched.read_exact(&mut got).await.unwrap();
    assert_eq!(got, [wait, state].concat());
    let busy = open(&connections).unwrap_err().to_string();
    assert!(busy.contains("State"), "{busy}");
    for stream in [3, 1] {
        watched.write_all(&answered(stream)).await.unwrap();
    }
    let mut got = vec![0; 2 * answered(1).len()];
    client.read_exact(&mut got).await.unwrap();
    assert_eq!(got, [answered(3), answered(1)].concat());
    assert_eq!(open(&connections).unwrap(), [0]);
}

#[test]
fn only_whole_requests_that_wait_are_asked_again() {
    let state = |frames: Vec<Vec<u8>>| ConnectionState {
        stream: serde_json::from_str("7").unwrap(),
        open: frames.into_iter().map(OpenState).collect(),
    };
    assert!(state(vec![]).problem().is_none());
    let good = asked(1, "Wait", 3);
    assert!(state(vec![good.clone()]).problem().is_none());
    for bad in [
        Vec::new(),
        good[..9].to_vec(),
        good[..good.len() - 1].to_vec(),
        [good.clone(), good.clone()].concat(),
        asked(1, "Kill", 3),
        answered(1),
        frame(MESSAGE_TYPE_REQUEST, 1, &[0xff; 4]),
        vec![0xff; 64],
    ] {
        assert!(state(vec![good.clone(), bad]).problem().is_some());
    }
}
