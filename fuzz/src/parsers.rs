//! Parsers, by themselves.

use std::fmt::Debug;

use nix::sys::socket::{MsgFlags, send};
use serde::{Serialize, de::DeserializeOwned};
use std::os::fd::AsRawFd;
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{block, mem, net, vhost, vsock};
use walnut_vmm_api::{Channel, MESSAGE_MAX, Message, Received, Request, pair};

use super::driver::{DATA, Input, memory};

/// The first byte says how long the plan is, what follows it is answered.
pub(crate) fn wire(data: &[u8]) {
    let mut input = Input(data);
    let len = usize::from(input.u8() % 32).min(input.0.len());
    let (plan, rest) = input.0.split_at(len);
    if rest.first().is_none_or(|byte| byte % 4 == 0) {
        return vhost::fuzz::wire(plan, rest);
    }
    // Answers with right headers, mostly.
    let mut input = Input(rest);
    let mut answers = Vec::new();
    for step in plan {
        let request = match step % 6 {
            0 => 1u32,
            1 => 17,
            2 => 11,
            3 => 24,
            4 => 3,
            _ => continue,
        };
        let wrong = input.u8();
        let len = match wrong {
            0 => input.u32(),
            1..16 => u32::from(wrong),
            _ if request == 24 => u32::from(input.u16() % 4200),
            _ => 8,
        };
        let flags = if wrong == 16 { input.u32() } else { 5 };
        let request = request ^ u32::from(wrong == 17);
        for word in [request, flags, len] {
            answers.extend(word.to_le_bytes());
        }
        answers.extend((0..len.min(5000)).map(|_| input.u8()));
    }
    vhost::fuzz::wire(plan, &answers);
}

/// A checkpoint's record: what is taken is written so that it is taken again, and says the same.
pub(crate) fn checkpoint(data: &[u8]) {
    let json = |bytes: &[u8]| -> serde_json::Value {
        let mut value = serde_json::from_slice(bytes).unwrap();
        sorted(&mut value);
        value
    };
    let Ok(written) = walnut_sandbox::fuzz::checkpoint(data) else {
        return;
    };
    let again = walnut_sandbox::fuzz::checkpoint(&written).unwrap();
    assert_eq!(json(&written), json(&again));
}

/// A supervisor's state: what is taken is what it says, and is written so that it is taken
/// again.
pub(crate) fn takeover(data: &[u8]) {
    let json = |bytes: &[u8]| -> serde_json::Value {
        let at = bytes.iter().position(|byte| *byte == b'{').unwrap();
        let mut value = serde_json::from_slice(&bytes[at..]).unwrap();
        sorted(&mut value);
        value
    };
    // Most begins rightly.
    let mut bytes = b"walnut-state\x01\0\0\0".to_vec();
    bytes.extend(data);
    for input in [data, &bytes] {
        let Ok(written) = walnut_shim::fuzz::state(input) else {
            continue;
        };
        let again = walnut_shim::fuzz::state(&written).unwrap();
        assert_eq!(json(&written), json(&again));
    }
}

/// Sets have no order.
fn sorted(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Array(all) => {
            all.iter_mut().for_each(sorted);
            all.sort_by_key(ToString::to_string);
        }
        serde_json::Value::Object(map) => map.values_mut().for_each(sorted),
        _ => {}
    }
}

/// A line and where it is cut.
pub(crate) fn handshake(data: &[u8]) {
    let Some((&len, rest)) = data.split_first() else {
        return;
    };
    let (cuts, line) = rest.split_at(usize::from(len % 8).min(rest.len()));
    vsock::fuzz::handshake(line, cuts);
}

fn hear<T: Serialize + DeserializeOwned + PartialEq + Debug>(from: &Channel) -> Option<T> {
    let Ok(Some(Received { message, fds })) = from.receive::<T>() else {
        return None;
    };
    assert!(fds.is_empty());
    let again = serde_json::to_vec(&message).unwrap();
    // Escapes can make it longer than it came, by no more than six.
    assert!(again.len() <= 6 * MESSAGE_MAX + 4096);
    assert_eq!(serde_json::from_slice::<T>(&again).unwrap(), message);
    Some(message)
}

/// A packet, as the VMM and as the supervisor take it.
pub(crate) fn control(data: &[u8]) {
    let (ours, theirs) = pair().unwrap();
    if data.is_empty() {
        return;
    }
    for _ in 0..2 {
        let sent = send(theirs.as_raw_fd(), data, MsgFlags::MSG_DONTWAIT);
        if sent.is_err() {
            return;
        }
    }
    let request = hear::<Request>(&ours);
    let message = hear::<Message>(&ours);
    assert!(request.is_none() || message.is_none());
    if let Some(request) = request {
        theirs.send(&request, &[]).ok();
    }
}

/// The first byte says of which device.
pub(crate) fn requests(data: &[u8]) {
    let mut input = Input(data);
    match input.u8() % 4 {
        0 => {
            let memory = memory();
            for n in 0..4u64 {
                let at = DATA + 64 * n * 7;
                let head = [u64::from(input.u8()), u64::from(input.u32()) << (8 * n)];
                memory.write_obj(head[0], GuestAddress(at)).unwrap();
                memory.write_obj(head[1], GuestAddress(at + 8)).unwrap();
            }
            let endless = input.u8() == 1;
            let mut chain = Vec::new();
            while !input.0.is_empty() && chain.len() < 256 {
                chain.push((input.address(), input.len(), input.u8() % 2 == 0));
            }
            // In order, as often as not.
            if chain.len() % 2 == 0 {
                chain.sort_by_key(|part| part.2);
            }
            block::fuzz::request(&memory, &chain, endless);
        }
        1 => {
            let block = 1u64 << (input.u8() % 64);
            let region = mem::Region {
                addr: (u64::from(input.u32()) << 32 | u64::from(input.u32())) & !(block - 1),
                size: block.saturating_mul(u64::from(input.u16())),
                block,
            };
            let mut raw = [0; 24];
            raw.fill_with(|| input.u8());
            if raw[20] % 2 == 0 {
                let at = region
                    .addr
                    .wrapping_add(block.wrapping_mul(u64::from(raw[8])));
                raw[8..16].copy_from_slice(&at.to_le_bytes());
            }
            mem::fuzz::request(&raw, &region);
        }
        2 => {
            let features = u64::from(input.u32()) << 32 | u64::from(input.u32());
            let mut raw = [0; net::fuzz::LEN];
            raw.fill_with(|| input.u8());
            let own = [18, 19, 20, 21, 22, 23].map(|n: usize| raw[n]);
            let source = match input.u8() % 3 {
                0 => None,
                1 => Some(own),
                _ => Some([2; 6]),
            };
            net::fuzz::front(&raw, features, source);
        }
        _ => {
            let mut raw = [0; 44];
            raw.fill_with(|| input.u8());
            vsock::fuzz::header(&raw);
        }
    }
}
