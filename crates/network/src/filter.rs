//! Rules for what a guest may send, as programs for the kernel's traffic control. One
//! decides for each frame that leaves a tap, and passes it on. One sees what comes in, so
//! that the guest can answer: rules are about flows that the guest begins.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use crate::{
    Mac,
    bpf::{self, Assembler, Label, op},
    egress::{Rule, Rules, Verdict},
};

// linux/bpf.h, linux/pkt_cls.h
const PROG_SCHED_CLS: u32 = 3;
const MAP_LRU_HASH: u32 = 9;
const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const SKB_LOAD_BYTES: i32 = 26;
const REDIRECT: i32 = 23;
const DROP: i32 = 2;
/// Of `struct __sk_buff`.
const PROTOCOL: i16 = 16;
/// Its `cb`, which is the program's own.
const NOTED_ABOVE: i16 = 48;
const NOTED_PORT: i16 = 52;

// Registers. The first five are a call's arguments, and lost with it.
const RESULT: u8 = 0;
const ARGUMENTS: [u8; 4] = [1, 2, 3, 4];
const FRAME: u8 = 6;
/// The protocol above IP, or [`UNKNOWN`].
const ABOVE: u8 = 7;
/// The port that a packet is sent to, or [`UNKNOWN`].
const PORT: u8 = 8;
const SCRATCH: u8 = 9;
const STACK: u8 = 10;

/// A value that no protocol and no port has: a fragment but the first has no ports, and
/// what is behind IPv6's extension headers is not looked for.
const UNKNOWN: i32 = 0x1_0000;

/// Where a header is on the stack, when it has been read.
const HEADER: i16 = -48;
const HEADER_MAX: i32 = 40;
const ETHERNET: i32 = 14;
/// Where on the stack is what packets of one flow have in common, in both directions: the
/// other end's address (4 words, IPv4's in the first), family and protocol, the other end's
/// port and the guest's.
const FLOW: i16 = -72;
const FLOW_KIND: i16 = FLOW + 16;
const FLOW_PORTS: i16 = FLOW + 20;
const FLOW_SIZE: u32 = 24;
/// Where on the stack a flow's entry is made.
const ENTRY: i16 = -80;
/// Flows that are remembered. The one that was not seen for longest is forgotten.
const FLOWS_MAX: u32 = 8192;

/// What a link's two filters have in common: flows that others have begun, whose packets a
/// guest may answer.
#[derive(Debug)]
pub(crate) struct Flows(OwnedFd);

impl Flows {
    pub(crate) fn new() -> io::Result<Self> {
        let value_size = 4;
        let map = [MAP_LRU_HASH, FLOW_SIZE, value_size, FLOWS_MAX];
        bpf::call_fd(bpf::MAP_CREATE, &bpf::words(&map)).map(Self)
    }

    /// A program that sends frames of this source out of the link `to` if all lists allow
    /// it, or if they belong to a flow that is known, and drops the others. ARP and IPv6's
    /// neighbour discovery, which do not leave a link, are sent whatever lists say.
    pub(crate) fn way_out(&self, mac: Mac, to: u32, lists: &[&Rules]) -> io::Result<OwnedFd> {
        load(&way_out(self.0.as_raw_fd(), mac, to, lists)?)
    }

    /// A program that remembers the flows of all frames, and sends them to the tap `to`.
    pub(crate) fn way_in(&self, to: u32) -> io::Result<OwnedFd> {
        load(&way_in(self.0.as_raw_fd(), to)?)
    }
}

fn load(code: &[u8]) -> io::Result<OwnedFd> {
    bpf::load(PROG_SCHED_CLS, 0, code)
}

/// The two families of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    /// What distinguishes a flow's family from the other's, beside its protocol.
    fn bits(self) -> i32 {
        match self {
            Self::V4 => 0x400,
            Self::V6 => 0x600,
        }
    }

    fn icmp(self) -> i32 {
        match self {
            Self::V4 => libc::IPPROTO_ICMP,
            Self::V6 => libc::IPPROTO_ICMPV6,
        }
    }
}

/// Where frames go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// Away from the guest.
    Out,
    In,
}

fn way_out(map: i32, mac: Mac, to: u32, lists: &[&Rules]) -> io::Result<Vec<u8>> {
    let mut all = Assembler::default();
    let (send, drop) = (all.label(), all.label());
    all.add(op::MOVE, (FRAME, 1), 0, 0);
    // Who has sent it.
    read(&mut all, Position::At(0), ETHERNET, drop);
    let [a, b, c, d, e, f] = mac;
    // Half a word at a time: the kernel wants what is on the stack to be aligned.
    for (half, at) in [([a, b], 6), ([c, d], 8), ([e, f], 10)] {
        all.add(op::LOAD_HALF, (SCRATCH, STACK), HEADER + at, 0);
        let value = u16::from_ne_bytes(half).into();
        all.jump(op::UNLESS_WORD_EQUAL, SCRATCH, value, drop);
    }
    let families = by_family(&mut all, send);
    // Of anything else nothing can be told but whether all may be sent.
    let closed = lists.iter().any(|list| list.otherwise() == Verdict::Deny);
    all.jump(op::JUMP, 0, 0, if closed { drop } else { send });
    for (family, here) in families {
        all.here(here);
        let denied = all.label();
        packet(&mut all, family, Direction::Out, send, drop);
        decide(&mut all, lists, family, denied);
        all.jump(op::JUMP, 0, 0, send);
        all.here(denied);
        unless_flow(&mut all, family, drop);
        look_up(&mut all, map);
        all.jump(op::IF_EQUAL, RESULT, 0, drop);
        all.jump(op::JUMP, 0, 0, send);
    }
    all.here(send);
    redirect(&mut all, to);
    all.here(drop);
    all.add(op::MOVE_VALUE, (RESULT, 0), 0, DROP);
    all.add(op::EXIT, (0, 0), 0, 0);
    all.finish()
}

fn way_in(map: i32, to: u32) -> io::Result<Vec<u8>> {
    let mut all = Assembler::default();
    let send = all.label();
    all.add(op::MOVE, (FRAME, 1), 0, 0);
    let families = by_family(&mut all, send);
    all.jump(op::JUMP, 0, 0, send);
    for (family, here) in families {
        all.here(here);
        packet(&mut all, family, Direction::In, send, send);
        unless_flow(&mut all, family, send);
        // What is looked up is what was seen last.
        look_up(&mut all, map);
        all.jump(op::UNLESS_EQUAL, RESULT, 0, send);
        all.add(op::STORE_WORD, (STACK, 0), ENTRY, 0);
        argument_map(&mut all, map);
        argument_place(&mut all, ARGUMENTS[1], FLOW);
        argument_place(&mut all, ARGUMENTS[2], ENTRY);
        all.add(op::MOVE_VALUE, (ARGUMENTS[3], 0), 0, 0);
        all.add(op::CALL, (0, 0), 0, MAP_UPDATE_ELEM);
        all.jump(op::JUMP, 0, 0, send);
    }
    all.here(send);
    redirect(&mut all, to);
    all.finish()
}

fn redirect(all: &mut Assembler, to: u32) {
    all.add(op::MOVE_VALUE, (ARGUMENTS[0], 0), 0, to.cast_signed());
    all.add(op::MOVE_VALUE, (ARGUMENTS[1], 0), 0, 0);
    all.add(op::CALL, (0, 0), 0, REDIRECT);
    all.add(op::EXIT, (0, 0), 0, 0);
}

/// Goes where each family's packets are dealt with; ARP goes to `send`. A VLAN's tag has
/// been taken off.
fn by_family(all: &mut Assembler, send: Label) -> [(Family, Label); 2] {
    let (v4, v6) = (all.label(), all.label());
    all.add(op::LOAD_WORD, (SCRATCH, FRAME), PROTOCOL, 0);
    for (kind, label) in [
        (libc::ETH_P_IP, v4),
        (libc::ETH_P_IPV6, v6),
        (libc::ETH_P_ARP, send),
    ] {
        let kind = u16::try_from(kind).unwrap_or(0).to_be();
        all.jump(op::IF_EQUAL, SCRATCH, kind.into(), label);
    }
    [(Family::V4, v4), (Family::V6, v6)]
}

/// Goes on if it can be told which flow a packet belongs to: by its ports, or as an ICMP
/// message to or from an address.
fn unless_flow(all: &mut Assembler, family: Family, label: Label) {
    let known = all.label();
    all.jump(op::IF_EQUAL, ABOVE, family.icmp(), known);
    all.jump(op::IF_EQUAL, PORT, UNKNOWN, label);
    all.here(known);
    all.add(op::MOVE, (SCRATCH, ABOVE), 0, 0);
    all.add(op::ADD_VALUE, (SCRATCH, 0), 0, family.bits());
    all.add(op::STORE_WORD_OF, (STACK, SCRATCH), FLOW_KIND, 0);
}

fn argument_map(all: &mut Assembler, map: i32) {
    // The second half of a load of 64 bits; source 1 says "a map".
    all.add(op::LOAD_MAP, (ARGUMENTS[0], 1), 0, map);
    all.add(0, (0, 0), 0, 0);
}

fn argument_place(all: &mut Assembler, argument: u8, at: i16) {
    all.add(op::MOVE, (argument, STACK), 0, 0);
    all.add(op::ADD_VALUE, (argument, 0), 0, at.into());
}

fn look_up(all: &mut Assembler, map: i32) {
    argument_map(all, map);
    argument_place(all, ARGUMENTS[1], FLOW);
    all.add(op::CALL, (0, 0), 0, MAP_LOOKUP_ELEM);
}

/// Where bytes of a frame are.
enum Position {
    At(i32),
    /// In this register.
    In(u8),
}

/// Reads bytes of the frame to [`HEADER`]; drops a frame that does not have them.
fn read(all: &mut Assembler, from: Position, count: i32, drop: Label) {
    all.add(op::MOVE, (ARGUMENTS[0], FRAME), 0, 0);
    match from {
        Position::At(at) => all.add(op::MOVE_VALUE, (ARGUMENTS[1], 0), 0, at),
        Position::In(register) => all.add(op::MOVE, (ARGUMENTS[1], register), 0, 0),
    }
    argument_place(all, ARGUMENTS[2], HEADER);
    all.add(op::MOVE_VALUE, (ARGUMENTS[3], 0), 0, count.min(HEADER_MAX));
    all.add(op::CALL, (0, 0), 0, SKB_LOAD_BYTES);
    all.jump(op::IF_SIGNED_LESS, RESULT, 0, drop);
}

/// The protocols that have ports, which are at the same place in all of them.
const WITH_PORTS: [i32; 3] = [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_SCTP];

/// Reads a packet's protocol and port, and leaves on the stack what its flow is. One that is
/// no packet goes to `bad`, neighbour discovery to `send`.
fn packet(all: &mut Assembler, family: Family, direction: Direction, send: Label, bad: Label) {
    let length = match family {
        Family::V4 => 20,
        Family::V6 => 40,
    };
    read(all, Position::At(ETHERNET), length, bad);
    let (protocol, source, words) = match family {
        Family::V4 => (9, 12, 1),
        Family::V6 => (6, 8, 4),
    };
    let other = match direction {
        Direction::Out => source + 4 * words,
        Direction::In => source,
    };
    all.add(op::LOAD_BYTE, (ABOVE, STACK), HEADER + protocol, 0);
    all.add(op::MOVE_VALUE, (PORT, 0), 0, UNKNOWN);
    for word in 0..4 {
        let at = FLOW + 4 * word;
        if word < words {
            all.add(
                op::LOAD_WORD,
                (SCRATCH, STACK),
                HEADER + other + 4 * word,
                0,
            );
            all.add(op::STORE_WORD_OF, (STACK, SCRATCH), at, 0);
        } else {
            all.add(op::STORE_WORD, (STACK, 0), at, 0);
        }
    }
    all.add(op::STORE_WORD, (STACK, 0), FLOW_PORTS, 0);
    let header = match family {
        Family::V4 => above_v4(all, bad),
        Family::V6 => above_v6(all, send, bad),
    };
    // Here come those that have ports. What is too short for them arrives nowhere.
    let (theirs, guests) = match direction {
        Direction::Out => (2, 0),
        Direction::In => (0, 2),
    };
    read(all, header.at, 4, bad);
    all.add(op::LOAD_HALF, (PORT, STACK), HEADER + guests, 0);
    all.add(op::STORE_HALF_OF, (STACK, PORT), FLOW_PORTS + 2, 0);
    all.add(op::LOAD_HALF, (PORT, STACK), HEADER + theirs, 0);
    all.add(op::STORE_HALF_OF, (STACK, PORT), FLOW_PORTS, 0);
    all.add(op::TO_BIG_ENDIAN, (PORT, 0), 0, 16);
    all.here(header.none);
}

/// Where the header above IP's is.
struct Above {
    at: Position,
    /// Where packets without ports have gone.
    none: Label,
}

fn above_v4(all: &mut Assembler, bad: Label) -> Above {
    let done = all.label();
    // Only the first fragment has ports.
    let with_ports = all.label();
    all.add(op::LOAD_HALF, (SCRATCH, STACK), HEADER + 6, 0);
    all.add(op::TO_BIG_ENDIAN, (SCRATCH, 0), 0, 16);
    all.add(op::AND_VALUE, (SCRATCH, 0), 0, 0x1fff);
    all.jump(op::UNLESS_EQUAL, SCRATCH, 0, done);
    for number in WITH_PORTS {
        all.jump(op::IF_EQUAL, ABOVE, number, with_ports);
    }
    all.jump(op::JUMP, 0, 0, done);
    all.here(with_ports);
    // The header's length, in words.
    all.add(op::LOAD_BYTE, (SCRATCH, STACK), HEADER, 0);
    all.add(op::AND_VALUE, (SCRATCH, 0), 0, 0xf);
    all.jump(op::IF_LESS, SCRATCH, 5, bad);
    all.add(op::SHIFT_LEFT_VALUE, (SCRATCH, 0), 0, 2);
    all.add(op::ADD_VALUE, (SCRATCH, 0), 0, ETHERNET);
    Above {
        at: Position::In(SCRATCH),
        none: done,
    }
}

fn above_v6(all: &mut Assembler, send: Label, bad: Label) -> Above {
    const ABOVE_IT: Position = Position::At(ETHERNET + 40);
    let (done, with_ports, discovery) = (all.label(), all.label(), all.label());
    for number in WITH_PORTS {
        all.jump(op::IF_EQUAL, ABOVE, number, with_ports);
    }
    all.jump(op::IF_EQUAL, ABOVE, libc::IPPROTO_ICMPV6, discovery);
    // Extension headers, where the protocol is the last one's.
    for number in [
        libc::IPPROTO_HOPOPTS,
        libc::IPPROTO_ROUTING,
        libc::IPPROTO_FRAGMENT,
        libc::IPPROTO_AH,
        libc::IPPROTO_DSTOPTS,
        libc::IPPROTO_MH,
    ] {
        let other = all.label();
        all.jump(op::UNLESS_EQUAL, ABOVE, number, other);
        all.add(op::MOVE_VALUE, (ABOVE, 0), 0, UNKNOWN);
        all.jump(op::JUMP, 0, 0, done);
        all.here(other);
    }
    all.jump(op::JUMP, 0, 0, done);
    all.here(discovery);
    read(all, ABOVE_IT, 1, bad);
    all.add(op::LOAD_BYTE, (SCRATCH, STACK), HEADER, 0);
    // Solicitations and advertisements of routers and neighbours (RFC 4861), which are
    // good for one link.
    for kind in 133..=136 {
        all.jump(op::IF_EQUAL, SCRATCH, kind, send);
    }
    all.jump(op::JUMP, 0, 0, done);
    all.here(with_ports);
    Above {
        at: ABOVE_IT,
        none: done,
    }
}

/// Goes on with a packet that all lists allow.
fn decide(all: &mut Assembler, lists: &[&Rules], family: Family, denied: Label) {
    // The kernel proves every way through a program, and what it knows of a register is a
    // part of the way: after each rule there would be ways for every range of ports. Of
    // what it finds in a frame's notes it knows nothing.
    all.add(op::STORE_WORD_OF, (FRAME, ABOVE), NOTED_ABOVE, 0);
    all.add(op::STORE_WORD_OF, (FRAME, PORT), NOTED_PORT, 0);
    for list in lists {
        let allowed = all.label();
        for rule in list.rules() {
            let verdict = match rule.verdict {
                Verdict::Allow => allowed,
                Verdict::Deny => denied,
            };
            apply(all, rule, family, verdict);
        }
        if list.otherwise() == Verdict::Deny {
            all.jump(op::JUMP, 0, 0, denied);
        }
        all.here(allowed);
    }
}

/// Goes to `verdict` if the rule fits. A packet of which it cannot be told fits a rule
/// that denies, and none that allows.
fn apply(all: &mut Assembler, rule: &Rule, family: Family, verdict: Label) {
    let next = all.label();
    if let Some(to) = rule.to {
        let (address, mask) = match (to, family) {
            (ipnet::IpNet::V4(net), Family::V4) => (
                net.network().octets().to_vec(),
                net.netmask().octets().to_vec(),
            ),
            (ipnet::IpNet::V6(net), Family::V6) => (
                net.network().octets().to_vec(),
                net.netmask().octets().to_vec(),
            ),
            _ => return,
        };
        let word = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).map_or(0, i32::from_ne_bytes);
        let words = address.chunks(4).map(word).zip(mask.chunks(4).map(word));
        for (n, (value, mask)) in words.enumerate().filter(|(_, (_, mask))| *mask != 0) {
            let at = FLOW + i16::try_from(4 * n).unwrap_or(0);
            all.add(op::LOAD_WORD, (SCRATCH, STACK), at, 0);
            if mask != -1 {
                all.add(op::AND_WORD_VALUE, (SCRATCH, 0), 0, mask);
            }
            all.jump(op::UNLESS_WORD_EQUAL, SCRATCH, value, next);
        }
    }
    let denies = rule.verdict == Verdict::Deny;
    if let Some(protocol) = rule.protocol {
        let (v4, v6) = protocol.numbers();
        let number = if family == Family::V4 { v4 } else { v6 };
        all.add(op::LOAD_WORD, (SCRATCH, FRAME), NOTED_ABOVE, 0);
        if denies {
            all.jump(op::IF_EQUAL, SCRATCH, UNKNOWN, verdict);
        }
        all.jump(op::UNLESS_EQUAL, SCRATCH, number, next);
    }
    if let Some(ports) = &rule.ports {
        all.add(op::LOAD_WORD, (SCRATCH, FRAME), NOTED_PORT, 0);
        if denies {
            all.jump(op::IF_EQUAL, SCRATCH, UNKNOWN, verdict);
        }
        all.jump(op::IF_LESS, SCRATCH, (*ports.start()).into(), next);
        all.jump(op::IF_GREATER, SCRATCH, (*ports.end()).into(), next);
    }
    all.jump(op::JUMP, 0, 0, verdict);
    all.here(next);
}
