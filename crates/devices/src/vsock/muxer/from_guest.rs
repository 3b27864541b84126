//! Packets that the guest sends: each belongs to a connection, begins one, or is
//! answered with a reset.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{Connection, Key, Muxer, State};
use crate::vsock::{
    HOST_CID,
    connection::Violation,
    packet::{Header, Op, TYPE_STREAM},
    sys::IoVec,
};

/// Between two attempts at a listener with a full backlog.
const CONNECT_RETRY: Duration = Duration::from_millis(10);

impl Muxer {
    /// Takes a packet in. `payload` is `None` when the chain did not hold the
    /// bytes that the header announces.
    ///
    /// # Safety
    /// The pieces of `payload` must be mapped and readable during the call and
    /// hold `header.len` bytes together.
    pub(in crate::vsock) unsafe fn packet(&mut self, header: &Header, payload: Option<&[IoVec]>) {
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
                    None => Err(Violation),
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
    pub(super) fn connect(
        &mut self,
        id: u64,
        mut conn: Box<Connection>,
        until: Instant,
        now: Instant,
    ) {
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
}
