//! A guest on the network: a tap, its queues, its offloads and its limits.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;
mod support_grow;
mod support_net;

use std::{
    fs::OpenOptions,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nix::{
    errno::Errno,
    sched,
    sys::socket::{setsockopt, sockopt},
};
use support_grow::{Guest, Spec, number};
use walnut_vmm_api::{Bucket, Device, Limits};

const TUNSETIFF: u64 = 0x4004_54ca;
const IFF_TAP: i16 = 2;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const IFF_MULTI_QUEUE: i16 = 0x0100;
/// The guest's address on link `n` ends in it.
const MAC: [u8; 5] = [2, 0, 0, 0, 9];

/// `struct ifreq`: a name of 16 bytes, then 24 of anything.
fn ioctl(fd: &impl AsRawFd, number: u64, name: &str, value: &[u8]) {
    let mut raw = [0u8; 40];
    raw[..name.len()].copy_from_slice(name.as_bytes());
    raw[16..16 + value.len()].copy_from_slice(value);
    // SAFETY: every call here takes a struct ifreq, of 40 bytes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, raw.as_mut_ptr()) };
    Errno::result(result).unwrap();
}

/// The thread's own network: nothing is shared with the host or other tests.
fn leave_network() {
    sched::unshare(sched::CloneFlags::CLONE_NEWNET).expect("tests of taps run as root");
}

fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, n, 1)
}

/// A tap with so many queues, up, with the host's address of link `n`.
fn tap(n: u8, queues: usize) -> Vec<OwnedFd> {
    let name = format!("t{n}");
    let mut flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    if queues > 1 {
        flags |= IFF_MULTI_QUEUE;
    }
    let open = || {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        ioctl(&file, TUNSETIFF, &name, &flags.to_ne_bytes());
        file.into()
    };
    let taps = (0..queues).map(|_| open()).collect();
    let control = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let family = u16::try_from(libc::AF_INET).unwrap().to_ne_bytes();
    let sockaddr = |ip: Ipv4Addr| [&family[..], &[0, 0], &ip.octets()].concat();
    let mask = Ipv4Addr::new(255, 255, 255, 0);
    ioctl(&control, libc::SIOCSIFADDR, &name, &sockaddr(address(n)));
    ioctl(&control, libc::SIOCSIFNETMASK, &name, &sockaddr(mask));
    let up = u16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap();
    ioctl(&control, libc::SIOCSIFFLAGS, &name, &up.to_ne_bytes());
    taps
}

fn attach(spec: &mut Spec, n: u8, queues: usize, receive: Limits, send: Limits) {
    let taps = tap(n, queues);
    let taps = taps.into_iter().map(|tap| spec.fd(tap)).collect();
    let [a, b, c, d, e] = MAC;
    spec.device(
        &format!("net-{n}"),
        Device::Net {
            taps,
            mac: [a, b, c, d, e, n],
            mtu: Some(1400),
            only_own_mac: true,
            receive,
            send,
        },
    );
}

fn byte(at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16).to_le_bytes()[0]
}

/// The host's side of link `n`: answers datagrams, sends a stream and takes one,
/// perhaps with so many bytes under way at most. How
/// many bytes a frame of the guest's stream had.
fn serve(n: u8, bytes: usize, window: Option<usize>) -> f64 {
    let udp = UdpSocket::bind((address(n), 5000)).unwrap();
    let tcp = TcpListener::bind((address(n), 5000)).unwrap();
    if let Some(window) = window {
        setsockopt(&tcp, sockopt::RcvBuf, &window).unwrap();
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Looks up now and then: nobody says when the last datagram came.
            udp.set_read_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            let mut said = [0; 16];
            while !over.load(Ordering::Relaxed) {
                if let Ok((len, from)) = udp.recv_from(&mut said) {
                    assert_eq!(&said[..len], b"marco");
                    udp.send_to(b"polo", from).unwrap();
                }
            }
        });
        let (mut stream, _) = tcp.accept().unwrap();
        let data: Vec<u8> = (0..bytes).map(byte).collect();
        stream.write_all(&data).unwrap();
        let before = frames(n);
        let mut back = vec![0; bytes];
        stream.read_exact(&mut back).unwrap();
        assert!(back == data, "the guest's bytes are not the host's");
        // The tap is there until the guest knows that it is through.
        let after = frames(n);
        stream.write_all(b"!").unwrap();
        over.store(true, Ordering::Relaxed);
        (after.0 - before.0) / (after.1 - before.1)
    })
}

/// Bytes and frames that link `n` has had from the guest so far.
fn frames(n: u8) -> (f64, f64) {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let prefix = format!("t{n}:");
    let line = table.lines().map(str::trim);
    let line = line
        .filter_map(|line| line.strip_prefix(&prefix))
        .next()
        .unwrap();
    let mut figures = line.split_whitespace().map(|it| it.parse::<f64>().unwrap());
    (figures.next().unwrap(), figures.next().unwrap())
}

/// What the guest is told.
fn words(links: usize, bytes: usize, window: Option<usize>) -> String {
    let window = window.unwrap_or(0);
    format!("test=net links={links} bytes={bytes} window={window}")
}

/// A guest with links of so many queues, served until it is through, and the bytes
/// per frame on each link.
fn exchange(
    mut spec: Spec,
    queues: &[(usize, Limits, Limits)],
    bytes: usize,
    window: Option<usize>,
) -> (Guest, Vec<f64>) {
    leave_network();
    for (n, (queues, receive, send)) in (0u8..).zip(queues) {
        attach(&mut spec, n, *queues, *receive, *send);
    }
    spec.words = words(queues.len(), bytes, window);
    let guest = spec.start();
    let served = (0u8..).zip(queues).map(|(n, _)| serve(n, bytes, window));
    let means = served.collect();
    (guest, means)
}

const NONE: Limits = Limits {
    bytes: None,
    operations: None,
};

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_guest_talks_over_one_queue_pair_and_over_two() {
    const BYTES: usize = 1 << 20;
    for pairs in [1, 2] {
        let mut spec = Spec::new("");
        spec.vcpus = 2;
        spec.max_vcpus = 2;
        let (mut guest, means) = exchange(spec, &[(pairs, NONE, NONE)], BYTES, None);
        let link = guest.line("eth0 mac");
        assert!(
            link.contains(&format!("mac 02:00:00:00:09:00 mtu 1400 pairs {pairs} ")),
            "{link}"
        );
        assert!(link.contains("tx-csum 1 rx-csum 1 tso 1"), "{link}");
        assert_eq!(guest.line("udp"), "udp polo");
        guest.line(&format!("link 0 received {BYTES}"));
        guest.line(&format!("link 0 sent {BYTES}"));
        // Segments larger than the link's are the offload at work.
        assert!(means[0] > 1500.0, "{means:?} bytes a frame");
        guest.ends();
    }
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_guest_talks_by_another_process() {
    const BYTES: usize = 1 << 20;
    leave_network();
    let dir = tempfile::tempdir().unwrap();
    let tap = tap(0, 1).pop().unwrap();
    let socket = support_net::relay(tap, &dir.path().join("net"));
    let mut spec = Spec::new(&words(1, BYTES, None));
    spec.backing.shared = true;
    let socket = spec.fd(socket);
    let [a, b, c, d, e] = MAC;
    let net = Device::VhostNet {
        socket,
        mac: [a, b, c, d, e, 0],
        mtu: Some(1400),
    };
    spec.device("net-0", net);
    let mut guest = spec.start();
    let mean = serve(0, BYTES, None);
    let link = guest.line("eth0 mac");
    assert!(
        link.contains("mac 02:00:00:00:09:00 mtu 1400 pairs 1 tx-csum 1 rx-csum 1 tso 1"),
        "{link}"
    );
    assert_eq!(guest.line("udp"), "udp polo");
    guest.line(&format!("link 0 received {BYTES}"));
    guest.line(&format!("link 0 sent {BYTES}"));
    assert!(mean > 1500.0, "{mean} bytes a frame");
    guest.ends();
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_limit_holds_in_its_direction_alone() {
    const BYTES: usize = 48 << 10;
    // No frame is longer: what is longer than a bucket passes when it is full.
    const WINDOW: usize = 4 << 10;
    const RATE: f64 = (8 << 10) as f64;
    let limit = Limits {
        bytes: Some(Bucket {
            size: 8 << 10,
            burst: 0,
            refill_ms: 1000,
        }),
        operations: None,
    };
    let links = [(1, NONE, NONE), (1, limit, NONE), (1, NONE, limit)];
    let (mut guest, _) = exchange(Spec::new(""), &links, BYTES, Some(WINDOW));
    let mut took = |n: u8, what: &str| {
        let line = guest.line(&format!("link {n} {what} {BYTES}"));
        number(&line, "in")
    };
    let mut times = Vec::new();
    for n in 0..3 {
        times.push((took(n, "received"), took(n, "sent")));
    }
    println!("received, sent: {times:?}");
    // A full bucket goes at once, the last frame on credit, and the rest by the rate.
    let least = (BYTES as f64 - RATE) / RATE - 1.0;
    let (free, received, sent) = (times[0], times[1], times[2]);
    assert!(received.0 > least, "{times:?}");
    assert!(sent.1 > least, "{times:?}");
    // Beside them in the same run, whatever the host is busy with.
    assert!(free.0.max(sent.0) < received.0, "{times:?}");
    assert!(free.1.max(received.1) < sent.1, "{times:?}");
    guest.ends();
}
