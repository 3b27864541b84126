//! Packets to the guest: resets first, then every connection in its turn.

use std::time::Instant;

use super::{Connection, Key, Muxer};
use crate::vsock::{
    HOST_CID,
    connection::Read,
    packet::{Header, Op, SHUTDOWN_BOTH, TYPE_STREAM},
    ring::{Broken, MAX_BATCH, RxRing},
};

/// Turns taken before the caller looks at its other events again.
const TURNS: usize = 512;

/// Why a pump ended.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::vsock) enum Pumped {
    /// Nothing is left for the guest.
    Idle,
    /// The receive queue is empty.
    Starved,
    /// There is more; others may have waited long enough.
    Again,
}

impl Muxer {
    /// Gives every connection its turn, until there is nothing to send or no
    /// chain to send it in.
    pub(in crate::vsock) fn pump(&mut self, rx: &mut RxRing<'_>) -> Result<Pumped, Broken> {
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
            match rx.reserve(if conn.bulk { MAX_BATCH } else { 1 }) {
                Ok(0) => {
                    conn.queued = true;
                    self.ready.push_front(id);
                    self.settle(id, conn);
                    return Ok(Pumped::Starved);
                }
                Ok(_) => self.serve(id, conn, rx)?,
                // The connection is the next driver's to end: lost here, its place would be
                // taken for good.
                Err(broken) => {
                    self.settle(id, conn);
                    return Err(broken);
                }
            }
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
