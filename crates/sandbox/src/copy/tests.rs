use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::AtomicUsize,
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::{
    Input, Output, StdioTargets,
    log::LogWriter,
    stdio::{ClientEnds, open_sender},
};

fn running() -> watch::Receiver<bool> {
    // Whether its sender is there makes no difference to what is written in time.
    watch::Sender::new(false).subscribe()
}

fn fifo(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path
}

#[tokio::test]
async fn stdin_reaches_the_guest_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "in");
    let writer = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let copy = input(ours, Source::Pipe(client), Arc::<Closing>::default());
    Write::write_all(&mut &writer, b"hello").unwrap();
    drop(writer);
    let mut got = String::new();
    guest.read_to_string(&mut got).await.unwrap();
    assert_eq!(got, "hello");
    copy.task.unwrap().await.unwrap();
}

/// What else there is is seen to between two turns of a stream that never ends, however
/// much of it is there.
#[tokio::test]
async fn a_stream_without_end_lets_others_have_their_turn() {
    static LINES: [u8; 64 << 10] = [b'\n'; 64 << 10];
    let dir = tempfile::tempdir().unwrap();
    let log = LogWriter::open(&dir.path().join("log")).unwrap();
    let (ours, guest) = UnixStream::pair().unwrap();
    let mut guest = guest.into_std().unwrap();
    guest.set_nonblocking(false).unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let sending = std::thread::spawn({
        let sent = sent.clone();
        move || {
            while guest.write_all(&LINES).is_ok() {
                sent.fetch_add(LINES.len(), Ordering::SeqCst);
            }
        }
    });
    let log = Arc::new(std::sync::Mutex::new(log));
    let copy = output(ours, None, Some(log), Stream::Stdout, running());
    let (near, far) = UnixStream::pair().unwrap();
    let far = far.into_std().unwrap();
    for _ in 0..200 {
        // What is there from now on, the runtime has yet to find.
        assert!(near.try_read(&mut [0]).is_err());
        let before = sent.load(Ordering::SeqCst);
        Write::write_all(&mut &far, b"x").unwrap();
        near.readable().await.unwrap();
        let passed = sent.load(Ordering::SeqCst) - before;
        assert_eq!(near.try_read(&mut [0]).unwrap(), 1);
        // A turn or two, and what the socket holds; not all that tokio lets a task do.
        assert!(passed < 32 * CHUNK, "{passed} bytes passed meanwhile");
    }
    copy.task.unwrap().abort();
    drop(copy.copy);
    while !sending.is_finished() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn close_io_delivers_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "in");
    let writer = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let close = Arc::<Closing>::default();
    Write::write_all(&mut &writer, b"all of it").unwrap();
    close.ask();
    let copy = input(ours, Source::Pipe(client), close);
    let mut got = String::new();
    guest.read_to_string(&mut got).await.unwrap();
    assert_eq!(got, "all of it");
    copy.task.unwrap().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_closed_ends_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "in");
    let _writer = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    let (ours, guest) = UnixStream::pair().unwrap();
    let copy = input(ours, Source::Pipe(client), Arc::<Closing>::default());
    drop(guest);
    copy.task.unwrap().await.unwrap();
}

#[tokio::test]
async fn a_client_that_went_does_not_stop_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let reader = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    let client = Sink::Pipe(open_sender(&path, false).unwrap());
    drop(reader);
    let log = dir.path().join("log");
    let writer = Arc::new(Mutex::new(LogWriter::open(&log).unwrap()));
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let copy = output(ours, Some(client), Some(writer), Stream::Stdout, running());
    guest.write_all(b"one\n").await.unwrap();
    guest.write_all(b"two").await.unwrap();
    drop(guest);
    copy.task.unwrap().await.unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("one\\n") && text.contains("two"), "{text}");
}

#[tokio::test]
async fn input_of_a_client_that_returns_ends_when_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "in");
    let targets = StdioTargets {
        stdin: Some(Input::Path(path.clone())),
        returns: true,
        ..StdioTargets::default()
    };
    // Nobody has opened it for writing yet.
    let client = ClientEnds::open(&targets).unwrap().stdin.unwrap();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let close = Arc::<Closing>::default();
    let copy = input(ours, client, close.clone());
    let write = |text: &str| {
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        Write::write_all(&mut &writer, text.as_bytes()).unwrap();
    };
    let mut got = [0; 3];
    for text in ["one", "two"] {
        write(text);
        guest.read_exact(&mut got).await.unwrap();
        assert_eq!(got, text.as_bytes());
    }
    close.ask();
    assert_eq!(guest.read(&mut got).await.unwrap(), 0);
    copy.task.unwrap().await.unwrap();
}

#[tokio::test]
async fn output_waits_for_a_client_that_returns() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let client = Sink::open(&Output::Path(path.clone()), true).unwrap();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let copy = output(ours, Some(client), None, Stream::Stdout, running());
    let reader = || {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap()
    };
    drop(reader());
    guest.write_all(b"kept").await.unwrap();
    let again = pipe::Receiver::from_file(reader()).unwrap();
    drop(guest);
    let mut text = String::new();
    let mut again = again;
    again.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "kept");
    copy.task.unwrap().await.unwrap();
}

#[tokio::test]
async fn output_is_appended_to_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "old ").unwrap();
    let client = Sink::open(&Output::Path(path.clone()), true).unwrap();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let copy = output(ours, Some(client), None, Stream::Stdout, running());
    guest.write_all(b"new").await.unwrap();
    drop(guest);
    copy.task.unwrap().await.unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "old new");
}

/// What the next program gets of it: the same descriptors, under other numbers as this one
/// has them still.
fn passed_on(state: impl Serialize) -> (serde_json::Value, Taker) {
    fn again(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Number(number) => {
                let fd = i32::try_from(number.as_i64().unwrap()).unwrap();
                // SAFETY: the copy in this process has it open.
                let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
                let again = fd.try_clone_to_owned().unwrap();
                *value = std::os::fd::IntoRawFd::into_raw_fd(again).into();
            }
            serde_json::Value::Object(map) => map.values_mut().for_each(again),
            _ => {}
        }
    }
    let mut value = serde_json::to_value(state).unwrap();
    again(&mut value);
    (value, Taker::default())
}

#[tokio::test]
async fn output_goes_on_with_the_next_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let client = Sink::open(&Output::Path(path.clone()), true).unwrap();
    let reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    let mut reader = pipe::Receiver::from_file(reader).unwrap();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let first = output(ours, Some(client), None, Stream::Stdout, running());
    // More than the FIFO has room for, so that some is on its way.
    let text: Vec<u8> = (0..300_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let told = tokio::spawn({
        let text = text.clone();
        async move { guest.write_all(&text).await.unwrap() }
    });
    let copy = first.copy.upgrade().unwrap();
    while copy.pending.is_empty() {
        tokio::task::yield_now().await;
    }
    let mut giver = Giver::default();
    let (state, mut taker) = passed_on(copy.state(&mut giver));
    drop(copy);
    assert_ne!(state["pending"], "");
    first.task.unwrap().abort();
    let state: OutputState = serde_json::from_value(state).unwrap();
    let second = state.take_over(None, running(), &mut taker).unwrap();
    let mut got = vec![0; text.len()];
    reader.read_exact(&mut got).await.unwrap();
    assert!(got == text);
    told.await.unwrap();
    second.task.unwrap().await.unwrap();
    // All that belongs to it has gone with it.
    assert!(second.copy.upgrade().is_none());
}

#[tokio::test]
async fn input_goes_on_with_the_next_byte_and_still_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "in");
    let client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
    let text: Vec<u8> = (0..300_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let writer = std::thread::spawn({
        let text = text.clone();
        move || {
            let mut file = OpenOptions::new().write(true).open(&path).unwrap();
            Write::write_all(&mut file, &text).unwrap();
        }
    });
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let first = input(ours, Source::Pipe(client), Arc::default());
    let copy = first.copy.upgrade().unwrap();
    while copy.pending.is_empty() {
        tokio::task::yield_now().await;
    }
    let mut giver = Giver::default();
    let (state, mut taker) = passed_on(copy.state(&mut giver));
    drop(copy);
    first.task.unwrap().abort();
    let state: InputState = serde_json::from_value(state).unwrap();
    let second = state.take_over(Arc::default(), &mut taker).unwrap();
    let mut got = Vec::new();
    guest.read_to_end(&mut got).await.unwrap();
    assert!(got == text);
    second.task.unwrap().await.unwrap();
    writer.join().unwrap();
}
