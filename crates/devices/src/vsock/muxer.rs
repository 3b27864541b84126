//! All connections of a device: who they are, whose turn it is, what times out.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use nix::{errno::Errno, sys::epoll::EpollFlags};

use super::{
    Config, Error, HOST_CID, Log, SocketDir, Timeouts,
    connection::{Connection, Key, Read, State},
    host::Listener,
    packet::{Header, Op, SHUTDOWN_BOTH, TYPE_STREAM},
    poller::{Poller, Token},
    ring::{Broken, MAX_BATCH, RxRing},
    sys::IoVec,
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
/// Between two attempts at a listener with a full backlog.
const CONNECT_RETRY: Duration = Duration::from_millis(10);
/// After the process ran out of descriptors, before the next accept.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Turns taken before the caller looks at its other events again.
const TURNS: usize = 512;
/// Host ports of connections that the host began have bit 30 set, bit 31 clear.
const HOST_PORTS: u32 = 1 << 30;

/// Why a pump ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Nothing is left for the guest.
    Idle,
    /// The receive queue is empty.
    Starved,
    /// There is more; others may have waited long enough.
    Again,
}

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
                let again = now + self.timeouts.close;
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

    // --- Packets of the guest.

    /// Takes a packet in. `payload` is `None` when the chain did not hold the
    /// bytes that the header announces.
    ///
    /// # Safety
    /// The pieces of `payload` must be mapped and readable during the call and
    /// hold `header.len` bytes together.
    pub(super) unsafe fn packet(&mut self, header: &Header, payload: Option<&[IoVec]>) {
        if header.dst_cid != HOST_CID || header.src_cid != self.cid {
            self.log.say(format_args!(
                "dropped a packet from CID {} to CID {}",
                header.src_cid, header.dst_cid
            ));
            return;
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let op = Op::from_raw(header.op);
        let id = self.table.get(&key).copied();
        if header.kind != TYPE_STREAM {
            if op != Some(Op::Rst) {
                self.push_reset(key, header.kind);
            }
            return;
        }
        let Some((id, mut conn)) = id.and_then(|id| Some((id, self.take(id)?))) else {
            return match op {
                Some(Op::Rst) => {}
                Some(Op::Request) => self.requested(key, header),
                _ => self.push_reset(key, TYPE_STREAM),
            };
        };
        conn.update_peer(header.buf_alloc, header.fwd_cnt);
        match (op, &conn.state) {
            (Some(Op::Rst), _) => self.end_by_guest(id, conn),
            (Some(Op::Response), State::Requested) if !conn.owe_request => {
                self.accepted_by_guest(id, conn)
            }
            (Some(Op::Rw), State::Established) => {
                let taken = match payload {
                    // SAFETY: passed on from the caller.
                    Some(pieces) => unsafe { conn.take(pieces, header.len) },
                    None => Err(super::connection::Violation),
                };
                match taken {
                    Ok(()) => self.settle(id, conn),
                    Err(_) => self.abort(id, conn, format_args!("the guest sent more than it may")),
                }
            }
            (Some(Op::Shutdown), State::Established) => {
                if conn.guest_shutdown(header.flags) {
                    self.push_reset(key, TYPE_STREAM);
                    self.end_by_guest(id, conn);
                } else {
                    self.settle(id, conn);
                }
            }
            (Some(Op::CreditUpdate), State::Established) => self.settle(id, conn),
            (Some(Op::CreditRequest), State::Established) => {
                conn.owe_credit();
                self.settle(id, conn);
            }
            _ => self.abort(
                id,
                conn,
                format_args!("the guest sent operation {} out of turn", header.op),
            ),
        }
    }

    fn accepted_by_guest(&mut self, id: u64, mut conn: Box<Connection>) {
        self.set_deadline(id, &mut conn, None);
        conn.state = State::Established;
        conn.answer();
        self.settle(id, conn);
    }

    /// The guest wants to connect to a host port.
    fn requested(&mut self, key: Key, header: &Header) {
        let now = Instant::now();
        let until = now + self.timeouts.connect;
        let mut conn = Connection::new(key, State::Connecting { until }, None, self.buffer_size());
        conn.update_peer(header.buf_alloc, header.fwd_cnt);
        match self.insert(conn).and_then(|id| Some((id, self.take(id)?))) {
            Some((id, conn)) => {
                self.table.insert(key, id);
                self.connect(id, conn, until, now);
            }
            None => self.push_reset(key, TYPE_STREAM),
        }
    }

    /// Tries to reach the host's listener.
    fn connect(&mut self, id: u64, mut conn: Box<Connection>, until: Instant, now: Instant) {
        let name = format!("{}_{}", self.name, conn.key.host_port);
        match self.dir.connect(&name) {
            Ok(sock) => {
                conn.sock = Some(sock);
                if self.watch(id, &conn).is_err() {
                    return self.abort(id, conn, format_args!("its socket cannot be watched"));
                }
                conn.state = State::Established;
                conn.owe_response = true;
                self.settle(id, conn);
            }
            Err(Errno::EAGAIN | Errno::EINTR) if now < until => {
                self.set_deadline(id, &mut conn, Some(until.min(now + CONNECT_RETRY)));
                self.settle(id, conn);
            }
            // Nobody listens: an answer, not an incident.
            Err(Errno::ENOENT | Errno::ECONNREFUSED) => {
                self.push_reset(conn.key, TYPE_STREAM);
                self.discard(id, conn);
            }
            Err(e) => self.abort(id, conn, format_args!("cannot connect to {name}: {e}")),
        }
    }

    // --- Packets to the guest.

    /// Gives every connection its turn, until there is nothing to send or no
    /// chain to send it in.
    pub(super) fn pump(&mut self, rx: &mut RxRing<'_>) -> Result<Pumped, Broken> {
        for _ in 0..TURNS {
            if let Some(&(key, kind)) = self.resets.front() {
                if rx.reserve(1)? == 0 {
                    return Ok(Pumped::Starved);
                }
                self.resets.pop_front();
                rx.commit(self.header(key, kind, Op::Rst), 0)?;
                continue;
            }
            let Some(id) = self.ready.pop_front() else {
                return Ok(Pumped::Idle);
            };
            let Some(mut conn) = self.take(id) else {
                continue;
            };
            conn.queued = false;
            if !conn.has_work() {
                self.settle(id, conn);
                continue;
            }
            let reserved = rx.reserve(if conn.bulk { MAX_BATCH } else { 1 });
            if reserved != Ok(0) {
                let served = reserved.and_then(|_| self.serve(id, conn, rx));
                served?;
                continue;
            }
            conn.queued = true;
            self.ready.push_front(id);
            self.settle(id, conn);
            return Ok(Pumped::Starved);
        }
        Ok(Pumped::Again)
    }

    /// One turn: one packet, or one run of data packets.
    fn serve(
        &mut self,
        id: u64,
        mut conn: Box<Connection>,
        rx: &mut RxRing<'_>,
    ) -> Result<(), Broken> {
        let Some((op, flags, len)) = next_packet(&mut conn, rx) else {
            rx.cancel();
            self.settle(id, conn);
            return Ok(());
        };
        let mut header = self.header(conn.key, TYPE_STREAM, op);
        header.flags = flags;
        (header.buf_alloc, header.fwd_cnt) = conn.tell_credit();
        let sent = rx.commit(header, len);
        if op == Op::Shutdown && conn.tell_shutdown(flags) {
            // The host's side is over; only the guest's goodbye is missing.
            conn.sock = None;
            let deadline = Instant::now() + self.timeouts.close;
            self.set_deadline(id, &mut conn, Some(deadline));
        }
        self.settle(id, conn);
        sent
    }

    fn header(&self, key: Key, kind: u16, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind,
            op: op as u16,
            ..Header::default()
        }
    }
}

/// What the connection sends next: operation, flags and bytes of payload, which
/// are in the reserved chains already.
fn next_packet(conn: &mut Connection, rx: &mut RxRing<'_>) -> Option<(Op, u32, usize)> {
    if std::mem::take(&mut conn.owe_request) {
        return Some((Op::Request, 0, 0));
    }
    if std::mem::take(&mut conn.owe_response) {
        return Some((Op::Response, 0, 0));
    }
    if conn.can_read() && conn.credit() > 0 {
        let credit = usize::try_from(conn.credit()).unwrap_or(usize::MAX);
        let room = rx.room(credit.min(rx.capacity()));
        // SAFETY: the pieces belong to chains that `rx` has reserved in guest
        // memory, which stays mapped for as long as `rx` borrows it.
        if let Read::Data(n) = unsafe { conn.read(&room) } {
            return Some((Op::Rw, 0, n));
        }
    }
    let flags = conn.shutdown_owed();
    debug_assert!(flags & !SHUTDOWN_BOTH == 0);
    if flags != 0 {
        return Some((Op::Shutdown, flags, 0));
    }
    if conn.ask_credit() {
        return Some((Op::CreditRequest, 0, 0));
    }
    (conn.is_established() && conn.owes_credit()).then_some((Op::CreditUpdate, 0, 0))
}
