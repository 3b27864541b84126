//! A vhost-user back end by hand: keeps to the protocol until it is told not to.

#![allow(dead_code, reason = "every test program uses its part")]

use std::{
    fs::File,
    io::{IoSliceMut, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// How it misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Hangup,
    Silence,
    /// The answer is to another request.
    Other,
    /// No answer's flag.
    Flags,
    Short,
    Long,
    Huge,
    Nothing,
    Refuse,
    /// The answer is twice there.
    Twice,
    /// All bits of it are set.
    Ones,
    /// It passes a descriptor along.
    Passes,
}

pub(crate) const FAULTS: [Fault; 12] = [
    Fault::Hangup,
    Fault::Silence,
    Fault::Other,
    Fault::Flags,
    Fault::Short,
    Fault::Long,
    Fault::Huge,
    Fault::Nothing,
    Fault::Refuse,
    Fault::Twice,
    Fault::Ones,
    Fault::Passes,
];

/// What it has been asked.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) requests: Vec<(u32, Vec<u8>)>,
    pub(crate) kicks: Vec<Option<File>>,
    pub(crate) calls: Vec<Option<File>>,
    /// The files of the memory table.
    pub(crate) memory: Vec<File>,
}

impl Seen {
    pub(crate) fn bodies(&self, request: u32) -> Vec<&[u8]> {
        let with = |(number, body): &'_ (u32, Vec<u8>)| (*number == request).then_some(body.len());
        let mut out = Vec::new();
        for entry in &self.requests {
            if with(entry).is_some() {
                out.push(entry.1.as_slice());
            }
        }
        out
    }
}

pub(crate) struct Script {
    pub(crate) features: u64,
    pub(crate) protocol: u64,
    pub(crate) queues: u64,
    pub(crate) config: Vec<u8>,
    /// What is answered to GET_VRING_BASE.
    pub(crate) base: u32,
    /// Which request goes wrong, counted from 0, and how.
    pub(crate) fault: Option<(usize, Fault)>,
}

impl Default for Script {
    fn default() -> Script {
        Script {
            features: 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28,
            protocol: 1 << 0 | 1 << 3 | 1 << 9,
            queues: 4,
            config: vec![0; 60],
            base: 0,
            fault: None,
        }
    }
}

pub(crate) struct Backend {
    pub(crate) seen: Arc<Mutex<Seen>>,
    /// Ends it from this side.
    pub(crate) sock: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.sock.shutdown(std::net::Shutdown::Both);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.expect("the back end panicked");
        }
    }
}

/// A back end on a thread, and our end of its socket.
pub(crate) fn start(script: Script) -> (Backend, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let sock = theirs.try_clone().unwrap();
    let log = seen.clone();
    let thread = std::thread::spawn(move || serve(&theirs, &script, &log));
    let backend = Backend {
        seen,
        sock,
        thread: Some(thread),
    };
    (backend, ours.into())
}

fn receive(sock: &UnixStream, len: usize, files: &mut Vec<File>) -> Option<Vec<u8>> {
    let mut out = vec![0; len];
    let mut have = 0;
    while have < len {
        let mut space = nix::cmsg_space!([i32; 16]);
        let mut iov = [IoSliceMut::new(&mut out[have..])];
        let flags = MsgFlags::empty();
        let message = recvmsg::<()>(sock.as_raw_fd(), &mut iov, Some(&mut space), flags).ok()?;
        for control in message.cmsgs().ok()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: just received, and nobody else's.
                files.extend(fds.iter().map(|fd| unsafe { File::from_raw_fd(*fd) }));
            }
        }
        if message.bytes == 0 {
            return None;
        }
        have += message.bytes;
    }
    Some(out)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn put<T>(into: &mut Vec<Option<T>>, index: usize, what: T) {
    while into.len() <= index {
        into.push(None);
    }
    into[index] = Some(what);
}

fn serve(sock: &UnixStream, script: &Script, seen: &Mutex<Seen>) {
    for number in 0.. {
        let mut files = Vec::new();
        let Some(header) = receive(sock, 12, &mut files) else {
            return;
        };
        let (request, flags) = (word(&header, 0), word(&header, 4));
        let size = usize::try_from(word(&header, 8)).unwrap();
        let Some(body) = receive(sock, size, &mut files) else {
            return;
        };
        let answer = answer(script, request, &body);
        {
            let mut seen = seen.lock().unwrap();
            let index = body.first().copied().unwrap_or(0).into();
            match request {
                5 => seen.memory = files,
                12 => put(&mut seen.kicks, index, files.pop().unwrap()),
                13 => put(&mut seen.calls, index, files.pop().unwrap()),
                _ => assert!(files.is_empty()),
            }
            seen.requests.push((request, body));
        }
        let needed = flags & 8 != 0;
        let Some(answer) = answer.or_else(|| needed.then(|| vec![0; 8])) else {
            continue;
        };
        let fault = script.fault.filter(|(at, _)| *at == number);
        if !reply(sock, request, answer, fault.map(|(_, fault)| fault)) {
            return;
        }
    }
}

fn answer(script: &Script, request: u32, body: &[u8]) -> Option<Vec<u8>> {
    Some(match request {
        1 => script.features.to_le_bytes().to_vec(),
        11 => [&body[..4], &script.base.to_le_bytes()].concat(),
        15 => script.protocol.to_le_bytes().to_vec(),
        17 => script.queues.to_le_bytes().to_vec(),
        24 => [&body[..12], &script.config].concat(),
        _ => return None,
    })
}

fn reply(sock: &UnixStream, request: u32, mut body: Vec<u8>, fault: Option<Fault>) -> bool {
    let (mut request, mut flags) = (request, 5u32);
    let mut size = None;
    match fault {
        Some(Fault::Hangup) => return false,
        Some(Fault::Silence) => return true,
        Some(Fault::Other) => request += 1,
        Some(Fault::Flags) => flags = 1,
        Some(Fault::Short) => drop(body.pop()),
        Some(Fault::Long) => body.push(0),
        Some(Fault::Huge) => size = Some(u32::MAX),
        Some(Fault::Nothing) => body.clear(),
        Some(Fault::Refuse) => body[0] = 1,
        Some(Fault::Ones) => body.fill(0xff),
        Some(Fault::Twice | Fault::Passes) | None => {}
    }
    let mut message = Vec::new();
    let size = size.unwrap_or(u32::try_from(body.len()).unwrap());
    for word in [request, flags, size] {
        message.extend(word.to_le_bytes());
    }
    message.extend(body);
    if fault == Some(Fault::Twice) {
        message.extend(message.clone());
    }
    if fault == Some(Fault::Passes) {
        use nix::sys::socket::{ControlMessage, sendmsg};
        let rights = [sock.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&rights)];
        let iov = [std::io::IoSlice::new(&message)];
        return sendmsg::<()>(sock.as_raw_fd(), &iov, &control, MsgFlags::empty(), None).is_ok();
    }
    (&*sock).write_all(&message).is_ok()
}
