//! One stream: its socket, its two directions, its credit (virtio 1.3 §5.10.6.3).

use std::{
    collections::VecDeque,
    num::Wrapping,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Instant,
};

use nix::{errno::Errno, sys::socket::Shutdown};

use super::{
    handshake::{BadLine, Line},
    packet::{SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND},
    sys::{self, IoVec},
};

/// Both ports of a connection: how the guest names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// Where a connection is in its life.
#[derive(Debug)]
pub(super) enum State {
    /// A host program has connected and not yet said which port it wants.
    Handshake(Line),
    /// The guest has been, or is about to be, asked to accept.
    Requested,
    /// The guest has asked; the host's listener has no room yet.
    Connecting {
        /// When to give up.
        until: Instant,
    },
    /// Data flows.
    Established,
    /// The guest has forgotten it; what it sent is still on its way to the host.
    Draining,
}

/// A protocol violation by the guest; the connection is reset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// What an attempt to read from the host brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// So many bytes.
    Data(usize),
    /// Nothing now.
    Empty,
    /// The host will send no more.
    End,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) state: State,
    pub(super) sock: Option<OwnedFd>,
    /// In the muxer's list of connections with something for the guest.
    pub(super) queued: bool,
    /// When the muxer must look at it again.
    pub(super) deadline: Option<Instant>,
    /// Room to write is being watched for.
    pub(super) watching_output: bool,

    // Guest to host.
    buffer: VecDeque<u8>,
    buf_alloc: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    /// The host's side will take no more.
    write_closed: bool,
    /// We have told the host that no more comes.
    write_shut: bool,

    // Host to guest.
    sent: Wrapping<u32>,
    peer_alloc: u32,
    peer_forwarded: Wrapping<u32>,
    /// There may be something to read.
    pub(super) readable: bool,
    /// Everything that the host will ever send has been read.
    eof: bool,
    /// The end has been announced and will not be again: read up to it, whatever
    /// the counts suggest.
    ending: bool,
    /// The last read was as long as it could be.
    pub(super) bulk: bool,

    // What the guest said of its directions, and what we said of the host's.
    guest_shut: u32,
    shut_told: u32,
    // Packets owed to the guest.
    pub(super) owe_request: bool,
    pub(super) owe_response: bool,
    owe_credit: bool,
    /// The guest is to be asked what it has taken.
    pub(super) owe_probe: bool,
    credit_asked: bool,
}

impl Connection {
    /// `buf_alloc` is how much of the guest's data is held for a host that does
    /// not read, in bytes.
    pub(super) fn new(key: Key, state: State, sock: Option<OwnedFd>, buf_alloc: u32) -> Connection {
        Connection {
            key,
            state,
            sock,
            queued: false,
            deadline: None,
            watching_output: false,
            buffer: VecDeque::new(),
            buf_alloc,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            write_closed: false,
            write_shut: false,
            sent: Wrapping(0),
            peer_alloc: 0,
            peer_forwarded: Wrapping(0),
            readable: true,
            eof: false,
            ending: false,
            bulk: false,
            guest_shut: 0,
            shut_told: 0,
            owe_request: false,
            owe_response: false,
            owe_credit: false,
            owe_probe: false,
            credit_asked: false,
        }
    }

    /// Whether data may flow.
    pub(super) fn is_established(&self) -> bool {
        matches!(self.state, State::Established)
    }

    // --- Credit.

    /// Takes in what a packet of the guest says of its buffer.
    pub(super) fn update_peer(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        let before = self.credit();
        self.peer_alloc = buf_alloc;
        self.peer_forwarded = Wrapping(fwd_cnt);
        if self.credit() > before {
            self.credit_asked = false;
        }
    }

    /// Bytes that the guest has room for. A guest that contradicts itself gets
    /// nothing.
    pub(super) fn credit(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.in_flight())
    }

    /// Bytes sent that the guest has not taken, as far as it has said.
    pub(super) fn in_flight(&self) -> u32 {
        (self.sent - self.peer_forwarded).0
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that is about to be sent.
    pub(super) fn tell_credit(&mut self) -> (u32, u32) {
        self.owe_credit = false;
        self.forwarded_told = self.forwarded;
        (self.buf_alloc, self.forwarded.0)
    }

    /// The guest asked how much room there is.
    pub(super) fn owe_credit(&mut self) {
        self.owe_credit = true;
    }

    /// The guest should hear of freed room: it asked, or it believes that less
    /// than half is free.
    pub(super) fn owes_credit(&self) -> bool {
        let told_free = self
            .buf_alloc
            .saturating_sub((self.received - self.forwarded_told).0);
        self.owe_credit || (self.forwarded != self.forwarded_told && told_free < self.buf_alloc / 2)
    }

    /// Whether to ask the guest for room; true once for every time it runs out.
    pub(super) fn ask_credit(&mut self) -> bool {
        let stalled = self.can_read() && self.credit() == 0 && !self.credit_asked;
        self.credit_asked |= stalled;
        stalled || std::mem::take(&mut self.owe_probe)
    }

    // --- Guest to host.

    /// Takes a packet's payload of `len` bytes.
    ///
    /// # Safety
    /// `pieces` must be mapped and readable during the call, `len` bytes together.
    pub(super) unsafe fn take(&mut self, pieces: &[IoVec], len: u32) -> Result<(), Violation> {
        let held = (self.received - self.forwarded).0;
        let fits = held.checked_add(len).is_some_and(|n| n <= self.buf_alloc);
        if !fits || self.guest_shut & SHUTDOWN_SEND != 0 {
            return Err(Violation);
        }
        self.received += len;
        if self.write_closed {
            self.forwarded += len;
            return Ok(());
        }
        let mut written = 0;
        if self.buffer.is_empty()
            && let Some(sock) = &self.sock
        {
            // SAFETY: passed on from the caller.
            match unsafe { sys::send(sock.as_fd(), pieces) } {
                Ok(n) => written = n,
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(_) => {
                    self.close_write();
                    return Ok(());
                }
            }
            self.forwarded += u32::try_from(written).unwrap_or(len);
        }
        // SAFETY: passed on from the caller.
        unsafe { self.keep(pieces, written) };
        Ok(())
    }

    /// Buffers the pieces from the `skip`th byte on.
    ///
    /// # Safety
    /// As for [`Self::take`].
    unsafe fn keep(&mut self, pieces: &[IoVec], mut skip: usize) {
        let mut chunk = [0; 4096];
        for piece in pieces {
            let mut at = skip.min(piece.iov_len);
            skip -= at;
            while at < piece.iov_len {
                let part = chunk.len().min(piece.iov_len - at);
                // SAFETY: at + part <= iov_len, and the caller vouches for the
                // piece; the copy goes through `chunk` so that no reference into
                // memory that the guest may change ever exists.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        piece.iov_base.cast::<u8>().add(at),
                        chunk.as_mut_ptr(),
                        part,
                    );
                }
                self.buffer.extend(&chunk[..part]);
                at += part;
            }
        }
    }

    /// Writes what is buffered, as far as the host takes it, and then passes the
    /// end on if the guest has sent it.
    pub(super) fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let Some(sock) = &self.sock else { break };
            let (a, b) = self.buffer.as_slices();
            // SAFETY: both pieces are slices of our own buffer.
            match unsafe { sys::send(sock.as_fd(), &[sys::piece(a), sys::piece(b)]) } {
                Ok(n) => {
                    self.buffer.drain(..n);
                    self.forwarded += u32::try_from(n).unwrap_or(0);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => self.close_write(),
            }
        }
        if self.buffer.is_empty() {
            // A burst's buffer is not kept for a stream that may idle for days.
            self.buffer = VecDeque::new();
            self.shut_write();
        }
    }

    /// Bytes of the guest wait for the host.
    pub(super) fn has_unsent(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// The host takes no more: what is buffered has nowhere to go.
    pub(super) fn close_write(&mut self) {
        self.write_closed = true;
        self.buffer = VecDeque::new();
        self.forwarded = self.received;
    }

    fn shut_write(&mut self) {
        if self.guest_shut & SHUTDOWN_SEND != 0 && !self.write_shut && self.buffer.is_empty() {
            self.write_shut = true;
            self.shut(Shutdown::Write);
        }
    }

    fn shut(&self, how: Shutdown) {
        if let Some(sock) = &self.sock {
            // Fails only when the peer is gone already, which reads will tell.
            let _ = nix::sys::socket::shutdown(sock.as_raw_fd(), how);
        }
    }

    /// The guest has closed directions; true when both are closed now.
    pub(super) fn guest_shutdown(&mut self, flags: u32) -> bool {
        self.guest_shut |= flags & SHUTDOWN_BOTH;
        if self.guest_shut == SHUTDOWN_BOTH {
            return true;
        }
        if flags & SHUTDOWN_RCV != 0 {
            self.end_read();
        }
        self.shut_write();
        false
    }

    /// Nothing more is read from the host, which learns it when it writes.
    pub(super) fn end_read(&mut self) {
        self.shut(Shutdown::Read);
        self.eof = true;
        self.readable = false;
    }

    // --- Host to guest.

    /// Whether a read may bring something that the guest wants.
    pub(super) fn can_read(&self) -> bool {
        self.is_established() && self.readable && !self.eof
    }

    /// The host will send no more than what can be read now.
    pub(super) fn expect_end(&mut self) {
        self.ending = true;
    }

    /// The host has hung up both directions.
    pub(super) fn hang_up(&mut self) {
        self.expect_end();
        if self.is_established() {
            self.close_write();
        }
    }

    /// Reads into `room`, which must not exceed the credit.
    ///
    /// # Safety
    /// Every piece of `room` must be mapped and writable during the call.
    pub(super) unsafe fn read(&mut self, room: &[IoVec]) -> Read {
        let wanted: usize = room.iter().map(|piece| piece.iov_len).sum();
        let Some(sock) = &self.sock else {
            return Read::Empty;
        };
        // SAFETY: passed on from the caller.
        match unsafe { sys::receive(sock.as_fd(), room) } {
            Ok((0, _)) => {
                self.eof = true;
                self.readable = false;
                Read::End
            }
            Ok((n, cut)) => {
                // A short read has emptied the socket; more will be an edge.
                self.readable = n == wanted || cut || self.ending;
                self.bulk = n == wanted;
                self.sent += u32::try_from(n).unwrap_or(0);
                Read::Data(n)
            }
            Err(Errno::EAGAIN) => {
                self.readable = false;
                Read::Empty
            }
            Err(Errno::EINTR) => Read::Empty,
            Err(_) => {
                // ECONNRESET: the host closed with our data unread.
                self.close_write();
                self.eof = true;
                self.readable = false;
                Read::End
            }
        }
    }

    /// Flags of a shutdown that the guest has not been told of, or 0.
    pub(super) fn shutdown_owed(&self) -> u32 {
        if !self.is_established() {
            return 0;
        }
        let mut flags = 0;
        if self.eof {
            flags |= SHUTDOWN_SEND;
        }
        if self.write_closed || (self.eof && self.write_shut) {
            flags |= SHUTDOWN_RCV;
        }
        if flags & !self.shut_told == 0 {
            0
        } else {
            flags
        }
    }

    /// The guest has been told; true when it now knows that all is over.
    pub(super) fn tell_shutdown(&mut self, flags: u32) -> bool {
        self.shut_told |= flags;
        self.shut_told == SHUTDOWN_BOTH
    }

    /// Whether anything is owed to the guest that could be sent now.
    pub(super) fn has_work(&self) -> bool {
        self.owe_request
            || self.owe_response
            || self.owe_probe
            || (self.can_read() && (self.credit() > 0 || !self.credit_asked))
            || self.shutdown_owed() != 0
            || (self.is_established() && self.owes_credit())
    }

    // --- Handshake.

    /// Reads the `CONNECT` line and not a byte more; `None` while incomplete.
    pub(super) fn read_line(&mut self) -> Result<Option<u32>, BadLine> {
        let (State::Handshake(line), Some(sock)) = (&mut self.state, &self.sock) else {
            return Err(BadLine);
        };
        loop {
            let mut buf = [0; super::handshake::MAX_LINE];
            let buf = &mut buf[..line.room()];
            let n = match sys::read(sock.as_fd(), buf, true) {
                Ok(0) => return Err(BadLine),
                Ok(n) => n,
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => continue,
                Err(_) => return Err(BadLine),
            };
            let (taken, port) = line.push(&buf[..n])?;
            // What follows the line stays in the socket, for the guest.
            match sys::read(sock.as_fd(), &mut buf[..taken], false) {
                Ok(n) if n == taken => {}
                _ => return Err(BadLine),
            }
            if port.is_some() {
                return Ok(port);
            }
        }
    }

    /// Tells the host program that the guest has accepted.
    pub(super) fn answer(&mut self) {
        let text = format!("OK {}\n", self.key.host_port);
        let Some(sock) = &self.sock else { return };
        // SAFETY: the piece is our own text. Nothing was ever written to this
        // socket, so a short line cannot fail to fit.
        if unsafe { sys::send(sock.as_fd(), &[sys::piece(text.as_bytes())]) } != Ok(text.len()) {
            self.close_write();
        }
    }
}
