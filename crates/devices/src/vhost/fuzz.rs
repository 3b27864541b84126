//! What a fuzz target asks of the wire.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a check fails by panicking"
)]

use std::{io::Write, net::Shutdown, os::unix::net::UnixStream, time::Duration};

use super::{
    Error,
    wire::{Channel, Request},
};

/// The longest reply that is taken, with its header.
const MOST: usize = 12 + 4096;

/// Makes requests, as `plan` says, of a back end that says `answers` and hangs up.
/// Nothing is waited for, and after the first failure there is none that succeeds.
pub fn wire(plan: &[u8], answers: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let answers = &answers[..answers.len().min(64 << 10)];
    theirs.write_all(answers).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let mut channel = Channel::new(ours.into(), Duration::from_secs(60));
    let (mut failed, mut taken) = (false, 0);
    for step in plan.iter().take(64) {
        channel.acks = step & 0x80 != 0;
        let (ok, most) = match step % 6 {
            0 => (channel.ask::<8>(Request::GetFeatures, &[]).is_ok(), 20),
            1 => (channel.ask::<8>(Request::GetQueueNum, &[]).is_ok(), 20),
            2 => (channel.ask::<8>(Request::GetVringBase, &[0; 8]).is_ok(), 20),
            3 => {
                let reply = channel.ask_long(Request::GetConfig, &[0; 72]);
                assert!(reply.as_ref().is_ok_and(|r| r.len() <= MOST) || reply.is_err());
                (reply.is_ok(), MOST)
            }
            4 => match channel.tell(Request::SetOwner, &[], &[]) {
                // An answer like any other.
                Err(Error::Refused(_)) => (true, 20),
                told => (told.is_ok(), if channel.acks { 20 } else { 0 }),
            },
            _ => {
                channel.begin();
                if !failed {
                    // It has spoken, or hung up: it is gone.
                    failed = !channel.alive();
                }
                continue;
            }
        };
        assert!(!(ok && failed), "a dead channel answered");
        failed |= !ok;
        taken += if ok { most } else { 0 };
    }
    assert!(taken <= 64 * MOST);
}
