//! All connections of a device: who they are, how they begin and end, what times
//! out. What the guest sends is taken in `from_guest`; whose turn it is to send
//! to the guest is decided in `to_guest`.

mod from_guest;
mod to_guest;

pub(super) use to_guest::Pumped;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use nix::{errno::Errno, sys::epoll::EpollFlags};

use super::{
    Config, Error, HOST_CID, Log, SocketDir, Timeouts,
    connection::{Connection, Key, State},
    host::Listener,
    packet::TYPE_STREAM,
    poller::{Poller, Token},
};

/// How much of a guest's data is held for each of the first [`FEW`] connections.
/// Four of Linux's largest packets: the guest sends on while one is written.
const LARGE_BUFFER: u32 = 256 << 10;
/// The same for every further one, so that a thousand stuck readers cannot hold
/// a quarter of a gigabyte.
const SMALL_BUFFER: u32 = 64 << 10;
const FEW: usize = 64;
/// Resets that wait for a place in the receive queue. A guest that provokes more
/// without receiving any loses the rest, and notices by its own timeouts.
const MAX_RESETS: usize = 1024;
/// After the process ran out of descriptors, before the next accept.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Between two questions whether the guest has taken all, at the least.
const PROBES_APART: Duration = Duration::from_millis(1);
/// Host ports of connections that the host began have bit 30 set, bit 31 clear.
const HOST_PORTS: u32 = 1 << 30;

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    conn: Option<Box<Connection>>,
}

#[derive(Debug)]
pub(super) struct Muxer {
    cid: u64,
    name: String,
    // Before the directory: dropped first, it removes its file there.
    listener: Listener,
    dir: SocketDir,
    limit: usize,
    timeouts: Timeouts,
    pub(super) poller: Poller,
    accept_again: Option<Instant>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    live: usize,
    table: HashMap<Key, u64>,
    ready: VecDeque<u64>,
    resets: VecDeque<(Key, u16)>,
    timers: BTreeSet<(Instant, u64)>,
    next_port: u32,
    /// The guest's driver serves its queues.
    pub(super) guest_up: bool,
    pub(super) log: Log,
}

impl Muxer {
    pub(super) fn new(config: Config, dir: SocketDir, log: Log) -> Result<Muxer, Error> {
        if config.cid <= HOST_CID || config.cid >= u64::from(u32::MAX) {
            return Err(Error::Cid(config.cid));
        }
        let poller = Poller::new().map_err(|e| Error::Poll(e.into()))?;
        let listener = Listener::bind(&dir, &config.name)?;
        poller
            .add(listener.sock(), Token::Listener, false)
            .map_err(|e| Error::Poll(e.into()))?;
        Ok(Muxer {
            cid: config.cid,
            name: config.name,
            dir,
            limit: config.max_connections,
            timeouts: config.timeouts,
            poller,
            listener,
            accept_again: None,
            slots: Vec::new(),
            free: Vec::new(),
            live: 0,
            table: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            timers: BTreeSet::new(),
            next_port: HOST_PORTS,
            guest_up: false,
            log,
        })
    }

    pub(super) fn cid(&self) -> u64 {
        self.cid
    }

    /// Connections in every state.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// The host port that the next connection from the host gets.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on from another device's [`Self::next_port`]: its guest may still hold
    /// sockets of the ports before.
    pub(super) fn set_next_port(&mut self, port: u32) {
        self.next_port = HOST_PORTS | (port & (HOST_PORTS - 1));
    }

    // --- Slots. A connection is taken out while it is worked on and then either
    // settled or dropped; its identity survives neither.

    fn insert(&mut self, conn: Connection) -> Option<u64> {
        if self.live >= self.limit {
            self.log.say(format_args!(
                "refused a connection: all {} are in use",
                self.limit
            ));
            return None;
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.slots.len()).ok()?;
                self.slots.push(Slot::default());
                index
            }
        };
        let slot = self.slots.get_mut(usize::try_from(index).ok()?)?;
        slot.conn = Some(Box::new(conn));
        self.live += 1;
        Some(u64::from(slot.generation) << 32 | u64::from(index))
    }

    fn slot(&mut self, id: u64) -> Option<&mut Slot> {
        let index = usize::try_from(id & u64::from(u32::MAX)).ok()?;
        self.slots
            .get_mut(index)
            .filter(|slot| u64::from(slot.generation) == id >> 32)
    }

    fn take(&mut self, id: u64) -> Option<Box<Connection>> {
        self.slot(id)?.conn.take()
    }

    /// Ends a connection that was taken out; its socket closes.
    fn discard(&mut self, id: u64, mut conn: Box<Connection>) {
        self.set_deadline(id, &mut conn, None);
        self.forget(id, &conn);
        if let Some(slot) = self.slot(id) {
            // 31 bits, so that no identity looks like another token.
            slot.generation = slot.generation.wrapping_add(1) & 0x7fff_ffff;
            self.live -= 1;
            if let Ok(index) = u32::try_from(id & u64::from(u32::MAX)) {
                self.free.push(index);
            }
        }
    }

    /// Takes the connection's name from the guest.
    fn forget(&mut self, id: u64, conn: &Connection) {
        if self.table.get(&conn.key) == Some(&id) {
            self.table.remove(&conn.key);
        }
    }

    /// Puts a connection back, queued if the guest is owed something and watched
    /// for room to write if the host is.
    fn settle(&mut self, id: u64, mut conn: Box<Connection>) {
        if matches!(conn.state, State::Draining) && !conn.has_unsent() {
            return self.discard(id, conn);
        }
        let output = conn.has_unsent();
        if output != conn.watching_output
            && let Some(sock) = &conn.sock
        {
            conn.watching_output = output;
            if let Err(e) = self.poller.modify(sock, Token::Connection(id), output) {
                return self.abort(id, conn, format_args!("epoll failed: {e}"));
            }
        }
        if !conn.queued && conn.has_work() {
            conn.queued = true;
            self.ready.push_back(id);
        }
        if let Some(slot) = self.slot(id) {
            slot.conn = Some(conn);
        }
    }

    fn set_deadline(&mut self, id: u64, conn: &mut Connection, when: Option<Instant>) {
        if let Some(old) = conn.deadline {
            self.timers.remove(&(old, id));
        }
        if let Some(new) = when {
            self.timers.insert((new, id));
        }
        conn.deadline = when;
    }

    fn push_reset(&mut self, key: Key, kind: u16) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back((key, kind));
        } else {
            self.log.say(format_args!(
                "dropped a reset: the guest does not receive them"
            ));
        }
    }

    /// Resets a connection that was taken out.
    fn abort(&mut self, id: u64, conn: Box<Connection>, why: std::fmt::Arguments<'_>) {
        self.log.say(format_args!(
            "reset the connection of guest port {} and host port {}: {why}",
            conn.key.guest_port, conn.key.host_port
        ));
        self.push_reset(conn.key, TYPE_STREAM);
        self.discard(id, conn);
    }

    /// The guest is done with a connection: what it sent is still delivered.
    fn end_by_guest(&mut self, id: u64, mut conn: Box<Connection>) {
        if !conn.is_established() || conn.sock.is_none() || !conn.has_unsent() {
            return self.discard(id, conn);
        }
        self.set_deadline(id, &mut conn, None);
        self.forget(id, &conn);
        conn.end_read();
        conn.state = State::Draining;
        self.settle(id, conn);
    }

    /// The guest's driver is gone, and with it every connection.
    pub(super) fn reset(&mut self) {
        self.resets.clear();
        let ids: Vec<u64> = self.table.values().copied().collect();
        for id in ids {
            if let Some(conn) = self.take(id) {
                self.end_by_guest(id, conn);
            }
        }
    }

    // --- Time.

    /// When [`Self::expire`] must be called next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let timer = self.timers.first().map(|(when, _)| *when);
        match (timer, self.accept_again) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Acts on every deadline that has passed.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.accept_again.is_some_and(|when| when <= now) {
            self.accept();
        }
        while let Some(&(when, id)) = self.timers.first()
            && when <= now
        {
            self.timers.pop_first();
            if let Some(mut conn) = self.take(id) {
                conn.deadline = None;
                self.expired(id, conn, now);
            }
        }
    }

    fn expired(&mut self, id: u64, mut conn: Box<Connection>, now: Instant) {
        match conn.state {
            State::Handshake(_) => self.discard(id, conn),
            State::Requested => self.abort(id, conn, format_args!("the guest does not answer")),
            State::Connecting { until } => self.connect(id, conn, until, now),
            State::Established if conn.in_flight() == 0 => {
                // Everything has arrived; the guest just does not close.
                self.push_reset(conn.key, TYPE_STREAM);
                self.discard(id, conn);
            }
            State::Established => {
                conn.owe_probe = true;
                // Later than now, whatever is set: what is due is looked for until nothing is.
                let again = now + self.timeouts.close.max(PROBES_APART);
                self.set_deadline(id, &mut conn, Some(again));
                self.settle(id, conn);
            }
            State::Draining => self.settle(id, conn),
        }
    }

    // --- Events of the host.

    /// Something happened on a socket.
    pub(super) fn event(&mut self, token: Token, flags: EpollFlags) {
        let id = match token {
            Token::Listener => return self.accept(),
            Token::Connection(id) => id,
            Token::External(_) => return,
        };
        let Some(mut conn) = self.take(id) else {
            return;
        };
        conn.readable = true;
        if flags.contains(EpollFlags::EPOLLRDHUP) {
            conn.expect_end();
        }
        if flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            conn.hang_up();
        }
        match conn.state {
            State::Handshake(_) => self.handshake(id, conn),
            State::Draining if flags.contains(EpollFlags::EPOLLHUP) => self.discard(id, conn),
            _ => {
                if flags.contains(EpollFlags::EPOLLOUT) {
                    conn.flush();
                }
                self.settle(id, conn);
            }
        }
    }

    fn accept(&mut self) {
        self.accept_again = None;
        loop {
            match self.listener.accept() {
                Ok(sock) => self.accepted(sock),
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(Errno::EAGAIN) => return,
                Err(e) => {
                    self.log
                        .say(format_args!("cannot accept a connection: {e}"));
                    self.accept_again = Some(Instant::now() + ACCEPT_RETRY);
                    return;
                }
            }
        }
    }

    fn accepted(&mut self, sock: OwnedFd) {
        let key = Key {
            host_port: 0,
            guest_port: 0,
        };
        let state = State::Handshake(Default::default());
        let conn = Connection::new(key, state, Some(sock), self.buffer_size());
        let Some((id, mut conn)) = self.insert(conn).and_then(|id| Some((id, self.take(id)?)))
        else {
            return;
        };
        let deadline = Instant::now() + self.timeouts.handshake;
        self.set_deadline(id, &mut conn, Some(deadline));
        if self.watch(id, &conn).is_err() {
            return self.discard(id, conn);
        }
        // The line is often there already.
        self.handshake(id, conn);
    }

    fn buffer_size(&self) -> u32 {
        if self.live < FEW {
            LARGE_BUFFER
        } else {
            SMALL_BUFFER
        }
    }

    fn watch(&mut self, id: u64, conn: &Connection) -> Result<(), Errno> {
        let Some(sock) = &conn.sock else {
            return Ok(());
        };
        let result = self.poller.add(sock, Token::Connection(id), false);
        if let Err(e) = result {
            self.log.say(format_args!("cannot watch a socket: {e}"));
        }
        result
    }

    fn handshake(&mut self, id: u64, mut conn: Box<Connection>) {
        let port = match conn.read_line() {
            Ok(Some(port)) => port,
            Ok(None) => return self.settle(id, conn),
            Err(_) => return self.discard(id, conn),
        };
        let key = self.host_port(port);
        let (true, Some(key)) = (self.guest_up, key) else {
            return self.discard(id, conn);
        };
        conn.key = key;
        conn.state = State::Requested;
        conn.readable = true;
        conn.owe_request = true;
        self.table.insert(key, id);
        let deadline = Instant::now() + self.timeouts.request;
        self.set_deadline(id, &mut conn, Some(deadline));
        self.settle(id, conn);
    }

    /// A free host port for a connection to `guest_port`.
    fn host_port(&mut self, guest_port: u32) -> Option<Key> {
        for _ in 0..=self.limit {
            let key = Key {
                host_port: self.next_port,
                guest_port,
            };
            self.next_port = HOST_PORTS | (self.next_port.wrapping_add(1) & (HOST_PORTS - 1));
            if !self.table.contains_key(&key) {
                return Some(key);
            }
        }
        None
    }
}
