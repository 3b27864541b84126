//! What leaves a tap, and what does not. Needs root.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs::File,
    io::{Read, Write},
    net::IpAddr,
    os::fd::AsRawFd,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};
use walnut_network::{Link, Mac, Namespace, Rules, connect};

const MAC: Mac = [2, 0, 0, 0, 0, 1];
/// Before each frame of a machine's tap.
const HEADER: usize = 10;
/// Longest anything here may take.
const WITHIN: Duration = Duration::from_secs(60);

/// A pod's namespace, whose link's other end is here.
struct Pod {
    holder: Child,
    wire: File,
}

nix::ioctl_write_ptr_bad!(
    set_interface,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

impl Pod {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo; exec sleep infinity"]);
        let mut holder = command.stdout(Stdio::piped()).spawn().unwrap();
        // It is there when the shell speaks.
        let mut newline = [0];
        let stdout = holder.stdout.as_mut().unwrap();
        stdout.read_exact(&mut newline).unwrap();
        let net = File::open(format!("/proc/{}/ns/net", holder.id())).unwrap();
        let wire = std::thread::spawn(move || {
            setns(net, CloneFlags::CLONE_NEWNET).unwrap();
            let mut options = File::options();
            let wire = options.read(true).write(true).open("/dev/net/tun").unwrap();
            // SAFETY: an ifreq of zeroes is valid.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(b"eth0") {
                *to = from.cast_signed();
            }
            let flags = libc::IFF_TAP | libc::IFF_NO_PI;
            request.ifr_ifru.ifru_flags = flags.try_into().unwrap();
            // SAFETY: the ioctl reads name and flags of `request`.
            unsafe { set_interface(wire.as_raw_fd(), &raw const request) }.unwrap();
            wire
        });
        let pod = Self {
            wire: wire.join().unwrap(),
            holder,
        };
        pod.ip("link set eth0 address 02:00:00:00:00:01 up");
        pod
    }

    fn ip(&self, words: &str) {
        let net = format!("--net=/proc/{}/ns/net", self.holder.id());
        let mut command = Command::new("nsenter");
        let done = command.args([&net, "ip"]).args(words.split(' ')).output();
        let done = done.unwrap();
        assert!(done.status.success(), "ip {words}: {done:?}");
    }

    async fn machine(&self, lists: &[&[&str]]) -> Machine {
        let lists = lists.iter().map(|list| Rules::parse(list).unwrap());
        let at = Namespace::At(format!("/proc/{}/ns/net", self.holder.id()).into());
        let mut links = connect(&at, 1, lists.collect()).await.unwrap().links;
        let Link { mut taps, .. } = links.remove(0);
        Machine {
            tap: taps.remove(0).into(),
            wire: self.wire.try_clone().unwrap(),
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A machine's side of a link, and the wire's.
struct Machine {
    tap: File,
    wire: File,
}

impl Machine {
    fn send(&mut self, frame: &[u8]) {
        let all = [&[0; HEADER], frame].concat();
        assert_eq!(self.tap.write(&all).unwrap(), all.len());
    }

    /// A frame from the wire arrives.
    fn receives(&mut self, frame: &[u8]) {
        assert_eq!(self.wire.write(frame).unwrap(), frame.len());
        let (mut room, since) = (vec![0; 70_000], Instant::now());
        while since.elapsed() < WITHIN {
            match self.tap.read(&mut room) {
                Ok(length) if room[HEADER..length] == *frame => return,
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => panic!("read the tap: {e}"),
            }
        }
        panic!("{frame:x?} does not arrive");
    }

    /// Whether a frame of the machine's is on the wire before the next one is.
    fn sends(&mut self, frame: &[u8]) -> bool {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let last = ethernet(0x0806, &number.to_be_bytes());
        self.send(frame);
        self.send(&last);
        let (mut room, mut seen) = (vec![0; 70_000], false);
        let since = Instant::now();
        while since.elapsed() < WITHIN {
            let length = self.wire.read(&mut room).unwrap();
            let got = &room[..length];
            if got == last {
                return seen;
            }
            seen |= got == frame;
        }
        panic!("what was sent last does not arrive");
    }
}

fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [[2, 0, 0, 0, 0, 2], MAC].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame.resize(frame.len().max(60), 0);
    frame
}

/// A packet to `to`; of `fragment` 8 bytes each are before it.
fn packet(to: &str, protocol: u8, fragment: u16, above: &[u8]) -> Vec<u8> {
    match to.parse().unwrap() {
        IpAddr::V4(to) => {
            // With an option, so that ports are not where they usually are.
            let mut packet = vec![0x46, 0, 0, 0, 0, 0];
            packet.extend(fragment.to_be_bytes());
            packet.extend([64, protocol, 0, 0, 10, 0, 0, 2]);
            packet.extend(to.octets());
            packet.extend([1, 1, 1, 0]);
            packet.extend(above);
            ethernet(0x0800, &packet)
        }
        IpAddr::V6(to) => {
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend(u16::try_from(above.len()).unwrap().to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend([0xfd; 16]);
            packet.extend(to.octets());
            packet.extend(above);
            ethernet(0x86dd, &packet)
        }
    }
}

const TCP: u8 = 6;
const UDP: u8 = 17;

fn to_port(to: &str, protocol: u8, port: u16) -> Vec<u8> {
    let above = [&[0x12, 0x34], &port.to_be_bytes()[..], &[0; 16]].concat();
    packet(to, protocol, 0, &above)
}

#[tokio::test]
async fn the_first_rule_that_fits_decides() {
    let pod = Pod::new();
    let rules = [
        "allow 10.1.0.0/16 tcp:443",
        "allow 10.1.2.3 udp:1000-2000",
        "deny 10.1.0.0/16",
        "allow 10.0.0.0/8",
        "allow fd00:1::/33 tcp:443",
        "deny fd00:1::/32",
        "allow fd00::/8",
        "allow all icmp",
        "deny all",
    ];
    let mut machine = pod.machine(&[&rules]).await;
    for (frame, wanted, what) in [
        (to_port("10.1.9.9", TCP, 443), true, "a port"),
        (to_port("10.1.9.9", TCP, 444), false, "another port"),
        (to_port("10.1.9.9", UDP, 443), false, "another protocol"),
        (to_port("10.1.2.3", UDP, 999), false, "before the range"),
        (to_port("10.1.2.3", UDP, 1000), true, "the range's first"),
        (to_port("10.1.2.3", UDP, 2000), true, "the range's last"),
        (to_port("10.1.2.3", UDP, 2001), false, "after the range"),
        (to_port("10.1.2.4", UDP, 1500), false, "another address"),
        (to_port("10.2.0.1", UDP, 1), true, "a network"),
        (to_port("11.0.0.1", TCP, 443), false, "none of them"),
        (packet("11.0.0.1", 1, 0, &[8; 8]), true, "ICMP"),
        (packet("11.0.0.1", 47, 0, &[0; 8]), false, "GRE"),
        (to_port("fd00:1::9", TCP, 443), true, "a port, IPv6"),
        (to_port("fd00:1:8000::9", TCP, 443), false, "a bit further"),
        (to_port("fd00:1::9", TCP, 80), false, "another port, IPv6"),
        (to_port("fd00:2::9", UDP, 80), true, "a network, IPv6"),
        (to_port("2001:db8::9", TCP, 443), false, "none, IPv6"),
        (packet("2001:db8::9", 58, 0, &[128; 8]), true, "ICMPv6"),
        (ethernet(0x88cc, &[1; 50]), false, "no IP"),
        (ethernet(0x0806, &[9; 28]), true, "ARP"),
        (ethernet(0x0800, &[0x41; 30]), false, "a header too short"),
        (ethernet(0x0800, &[])[..20].to_vec(), false, "cut"),
    ] {
        assert_eq!(machine.sends(&frame), wanted, "{what}: {frame:x?}");
    }
    let mut forged = to_port("10.2.0.1", UDP, 1);
    forged[11] = 9;
    assert!(!machine.sends(&forged));
}

#[tokio::test]
async fn what_cannot_be_told_is_not_allowed() {
    let pod = Pod::new();
    let fragment = packet("10.0.0.1", TCP, 100, &[0; 20]);
    let first = {
        let above = [&[0x12, 0x34], &443u16.to_be_bytes()[..], &[0; 16]].concat();
        packet("10.0.0.1", TCP, 0x2000, &above)
    };
    // Destination options, and TCP behind them.
    let above = [
        &[TCP, 0, 1, 4, 0, 0, 0, 0, 0x12, 0x34, 1, 187][..],
        &[0; 16],
    ]
    .concat();
    let behind = packet("fd00::1", 60, 0, &above);
    let solicitation = packet("ff02::1:ff00:1", 58, 0, &[135; 24]);
    // Only a port may be reached.
    let mut machine = pod.machine(&[&["allow all tcp:443", "deny all"]]).await;
    assert!(machine.sends(&first) && !machine.sends(&fragment) && !machine.sends(&behind));
    assert!(machine.sends(&solicitation));
    drop(machine);
    // A port may not be.
    let mut machine = pod.machine(&[&["deny all tcp:443", "allow all"]]).await;
    assert!(!machine.sends(&first) && !machine.sends(&fragment) && !machine.sends(&behind));
    assert!(machine.sends(&packet("10.0.0.1", UDP, 100, &[0; 20])));
    assert!(machine.sends(&solicitation));
    assert!(machine.sends(&ethernet(0x88cc, &[1; 50])));
}

#[tokio::test]
async fn every_list_has_to_allow_it() {
    let pod = Pod::new();
    let node: &[&str] = &["deny 169.254.169.254", "allow all"];
    let pods: &[&str] = &["allow 169.254.0.0/16", "deny all"];
    for lists in [[node, pods], [pods, node]] {
        let mut machine = pod.machine(&lists).await;
        assert!(!machine.sends(&to_port("169.254.169.254", TCP, 80)));
        assert!(machine.sends(&to_port("169.254.169.253", TCP, 80)));
        assert!(!machine.sends(&to_port("8.8.8.8", TCP, 80)));
    }
    let mut machine = pod.machine(&[&["allow all"]]).await;
    assert!(machine.sends(&to_port("169.254.169.254", TCP, 80)));
    drop(machine);
    // These are other filters.
    let more: &[&str] = &["deny fd00:ec2::/32", "deny 10.1.0.0/16", "allow all"];
    let mut machine = pod.machine(&[node, more]).await;
    for (to, wanted) in [
        ("169.254.169.254", false),
        ("169.254.169.253", true),
        ("10.1.255.1", false),
        ("10.2.0.1", true),
        ("fd00:ec2:8::1", false),
        ("fd00:ec3::1", true),
    ] {
        assert_eq!(machine.sends(&to_port(to, TCP, 80)), wanted, "{to}");
    }
    assert!(machine.sends(&ethernet(0x88cc, &[1; 50])));
}

#[tokio::test]
async fn what_others_begin_is_answered() {
    /// Of a machine's packet `to`, the one that it answers.
    fn asked(answer: &[u8]) -> Vec<u8> {
        let mut frame = answer.to_vec();
        let (source, length, ports) = match frame[12..14] {
            [8, 0] => (26, 4, 14 + 24),
            _ => (22, 16, 14 + 40),
        };
        for n in 0..length {
            frame.swap(source + n, source + length + n);
        }
        frame.swap(ports, ports + 2);
        frame.swap(ports + 1, ports + 3);
        frame
    }
    let pod = Pod::new();
    let mut machine = pod.machine(&[&["deny all"]]).await;
    for to in ["10.1.0.1", "fd00::1"] {
        for protocol in [TCP, UDP] {
            let answer = to_port(to, protocol, 443);
            assert!(!machine.sends(&answer), "{to} {protocol}");
            machine.receives(&asked(&answer));
            assert!(machine.sends(&answer), "{to} {protocol}");
            // To where nobody has asked from.
            assert!(!machine.sends(&to_port(to, protocol, 444)));
            let other = if to.contains(':') {
                "fd00::2"
            } else {
                "10.1.0.2"
            };
            assert!(!machine.sends(&to_port(other, protocol, 443)));
        }
    }
    let (echo, answer) = ([8; 20], [0; 20]);
    assert!(!machine.sends(&packet("10.1.0.1", 1, 0, &answer)));
    machine.receives(&asked(&packet("10.1.0.1", 1, 0, &echo)));
    assert!(machine.sends(&packet("10.1.0.1", 1, 0, &answer)));
    assert!(!machine.sends(&packet("10.1.0.2", 1, 0, &answer)));
    // What is no packet comes in all the same.
    machine.receives(&ethernet(0x0800, &[0x41; 30]));
    machine.receives(&ethernet(0x88cc, &[1; 50]));
}

#[tokio::test]
async fn as_many_rules_as_can_be_are_loaded() {
    let pod = Pod::new();
    let mut rules: Vec<_> = (0..walnut_network::RULES_MAX - 1)
        .map(|n| format!("allow fd00:{n:x}::/47 tcp:{}-{}", n + 1, n + 1000))
        .collect();
    rules.push("deny all".into());
    let list: Vec<&str> = rules.iter().map(String::as_str).collect();
    let mut machine = pod.machine(&[&list, &list]).await;
    assert!(machine.sends(&to_port("fd00:7c::1", TCP, 130)));
    assert!(!machine.sends(&to_port("fd00:7c::1", TCP, 1)));
}
