//! Links of real namespaces, taken over. Needs root.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    io::{Read, Write},
    net::IpAddr,
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use walnut_network::{
    Address, Error, Hop, Interface, Link, Mac, Namespace, Neighbour, Route, Rule, Seen, Watch,
    connect, is_meant,
};

const MAC: Mac = [2, 0, 0, 0, 0, 1];
/// Longest anything here may take.
const WITHIN: Duration = Duration::from_secs(60);

/// A network namespace, as long as it is in scope.
struct Net(Child);

impl Net {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo; exec sleep infinity"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        // It is there when the shell speaks.
        let mut newline = [0];
        let stdout = child.stdout.as_mut().unwrap();
        stdout.read_exact(&mut newline).unwrap();
        Self(child)
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }

    fn at(&self) -> Namespace {
        Namespace::At(self.path())
    }

    /// What `ip` says there.
    fn ip(&self, words: &str) -> String {
        let net = format!("--net={}", self.path().display());
        let mut command = Command::new("nsenter");
        let done = command.args([&net, "ip"]).args(words.split(' '));
        let done = done.output().unwrap();
        assert!(done.status.success(), "ip {words}: {done:?}");
        String::from_utf8(done.stdout).unwrap()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pod's namespace, and that of a node with the address 10.0.0.1.
fn pod_and_node() -> (Net, Net) {
    let (pod, node) = (Net::new(), Net::new());
    pod.ip("link add eth0 address 02:00:00:00:00:01 mtu 1300 type veth peer name pod");
    pod.ip(&format!("link set pod netns {}", node.0.id()));
    pod.ip("link set lo up");
    pod.ip("link set eth0 up");
    node.ip("link set pod up");
    node.ip("address add 10.0.0.1/24 dev pod");
    pod.ip("address add 10.0.0.2/24 broadcast 10.0.0.255 dev eth0");
    (pod, node)
}

async fn only(namespace: &Namespace, queues: u16) -> Link {
    let mut links = connect(namespace, queues, Vec::new()).await.unwrap().links;
    assert_eq!(links.len(), 1, "{links:?}");
    links.remove(0)
}

/// A tap, read and written with a virtio-net header before each frame.
struct Tap(std::fs::File);

const HEADER: usize = 10;

impl Tap {
    fn new(tap: OwnedFd) -> Self {
        Self(tap.into())
    }

    fn send(&mut self, frame: &[u8]) {
        let all = [&[0; HEADER], frame].concat();
        assert_eq!(self.0.write(&all).unwrap(), all.len());
    }

    /// The next frame that `wanted` says yes to.
    fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let since = Instant::now();
        let mut room = vec![0; 70_000];
        while since.elapsed() < WITHIN {
            match self.0.read(&mut room) {
                Ok(length) if wanted(&room[HEADER..length]) => {
                    return room[HEADER..length].to_vec();
                }
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => panic!("read the tap: {e}"),
            }
        }
        panic!("no such frame");
    }
}

/// "Who has 10.0.0.1?"
fn question(from: Mac) -> Vec<u8> {
    let mut frame = [[0xff; 6], from].concat();
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(from);
    frame.extend([10, 0, 0, 2]);
    frame.extend([0; 6]);
    frame.extend([10, 0, 0, 1]);
    frame
}

fn is_answer(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 6]) && frame.get(20..22) == Some(&[0, 2])
}

#[tokio::test]
async fn frames_go_both_ways_and_none_that_is_forged() {
    let (pod, node) = pod_and_node();
    for queues in [1, 3] {
        let mut link = only(&pod.at(), queues).await;
        assert_eq!(link.taps.len(), usize::from(queues));
        let mut tap = Tap::new(link.taps.remove(0));
        // A forged frame comes back, and nobody else has seen it.
        let forged: Mac = [2, 0, 0, 0, 0, 9];
        tap.send(&question(forged));
        if queues == 1 {
            tap.receive(|frame| frame == question(forged));
        }
        tap.send(&question(MAC));
        if queues == 1 {
            let answer = tap.receive(is_answer);
            assert_eq!(answer[..6], MAC);
        }
        let since = Instant::now();
        while !node.ip("neighbour").contains("02:00:00:00:00:01") {
            assert!(since.elapsed() < WITHIN, "{}", node.ip("neighbour"));
        }
        assert!(!node.ip("neighbour").contains("02:00:00:00:00:09"));
        node.ip("neighbour flush all");
        // The next machine takes over what this one leaves.
        drop((tap, link));
        let since = Instant::now();
        while pod.ip("link").contains("walnut") {
            assert!(since.elapsed() < WITHIN, "the tap outlives its descriptors");
        }
    }
}

#[tokio::test]
async fn a_guest_hears_of_all_that_a_link_has() {
    let (pod, _node) = pod_and_node();
    for words in [
        "link set eth0 down",
        "address add fd00::2/64 dev eth0 nodad",
        "address add 10.9.0.1 peer 10.9.0.9/32 dev eth0",
        "link set eth0 up",
        // As calico has it: a gateway on no network.
        "route add 169.254.1.1 dev eth0 scope link",
        "route add default via 169.254.1.1 dev eth0",
        "route add 10.5.0.0/16 via 10.0.0.1 src 10.0.0.2 metric 7 mtu 1200 dev eth0",
        "route add 10.6.0.0/16 via 192.0.2.1 onlink dev eth0",
        "route add default via fd00::1 dev eth0",
        "route add 10.7.0.0/16 dev eth0 table 100",
        "route add blackhole 10.8.0.0/16",
        "rule add from 10.9.0.1/32 table 100 priority 77",
        "neighbour add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee nud permanent dev eth0",
        "link add idle type veth peer name other",
    ] {
        pod.ip(words);
    }
    let Interface {
        name,
        mac,
        mtu,
        up,
        noarp,
        addresses,
        routes,
        neighbours,
    } = only(&pod.at(), 1).await.interface;
    assert_eq!((name.as_str(), mac, mtu, up), ("eth0", MAC, 1300, true));
    assert!(!noarp);
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let address = |text, prefix, peer: Option<&str>, broadcast: Option<&str>| Address {
        ip: ip(text),
        prefix,
        peer: peer.map(ip),
        broadcast: broadcast.map(ip),
        learned: false,
    };
    assert_eq!(
        addresses,
        [
            address("10.0.0.2", 24, None, Some("10.0.0.255")),
            address("10.9.0.1", 32, Some("10.9.0.9"), None),
            address("fd00::2", 64, None, None),
        ]
    );
    let route = |destination, prefix, gateway: Option<&str>| Route {
        table: 254,
        destination: ip(destination),
        prefix,
        gateway: gateway.map(ip),
        onlink: false,
        source: None,
        scope: 0,
        metric: 0,
        mtu: 0,
        learned: false,
    };
    let on_link = Route {
        scope: 253,
        ..route("169.254.1.1", 32, None)
    };
    let elsewhere = Route {
        table: 100,
        scope: 253,
        ..route("10.7.0.0", 16, None)
    };
    let wanted = [
        on_link,
        elsewhere,
        Route {
            source: Some(ip("10.0.0.2")),
            metric: 7,
            mtu: 1200,
            ..route("10.5.0.0", 16, Some("10.0.0.1"))
        },
        Route {
            onlink: true,
            ..route("10.6.0.0", 16, Some("192.0.2.1"))
        },
        route("0.0.0.0", 0, Some("169.254.1.1")),
        Route {
            metric: 1024,
            ..route("::", 0, Some("fd00::1"))
        },
    ];
    assert_eq!(routes, wanted);
    let gateway = Neighbour {
        ip: ip("169.254.1.1"),
        mac: [0xee; 6],
    };
    assert_eq!(neighbours, [gateway]);
}

#[tokio::test]
async fn what_cannot_be_taken_over_is_refused_and_nothing_stays() {
    let host = Namespace::At("/proc/self/ns/net".into());
    let error = connect(&host, 1, Vec::new()).await.unwrap_err();
    assert!(matches!(error, Error::Host(_)), "{error}");
    let nowhere = Namespace::At("/proc/self/there-is-none".into());
    let error = connect(&nowhere, 1, Vec::new())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("there-is-none: No such file"), "{error}");
    let file = Namespace::At("/proc/self/status".into());
    let error = connect(&file, 1, Vec::new()).await.unwrap_err().to_string();
    assert!(error.contains("Invalid argument"), "{error}");

    let (pod, _node) = pod_and_node();
    pod.ip("tuntap add dev point mode tun");
    pod.ip("link set point up");
    let error = connect(&pod.at(), 1, Vec::new())
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("link point to a machine: it is not"),
        "{error}"
    );
    assert!(!pod.ip("link").contains("walnut"));

    let empty = Net::new();
    empty.ip("link set lo up");
    let connection = connect(&empty.at(), 1, Vec::new()).await.unwrap();
    assert!(connection.links.is_empty() && connection.inlet.is_none());
}

#[tokio::test]
async fn connections_to_loopback_are_the_callers() {
    let (pod, _node) = pod_and_node();
    let inlet = connect(&pod.at(), 1, Vec::new())
        .await
        .unwrap()
        .inlet
        .unwrap();
    let (listener, attachment) = inlet.into_parts();
    let python = |code: &str| {
        let net = format!("--net={}", pod.path().display());
        let mut command = Command::new("nsenter");
        command.args([&net, "python3", "-c", code]);
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    // Nobody listens on any of these.
    for (address, meant) in [
        ("127.0.0.1", true),
        ("127.9.9.9", true),
        ("::1", true),
        ("10.0.0.2", false),
    ] {
        let says = format!(
            "import socket; print(socket.create_connection(('{address}', 1234), 60).recv(9))"
        );
        let child = python(&says);
        let since = Instant::now();
        let (mut stream, _) = loop {
            match listener.accept() {
                Ok(accepted) => break accepted,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    assert!(since.elapsed() < WITHIN, "{address}: no connection");
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => panic!("{e}"),
            }
        };
        let to = stream.local_addr().unwrap();
        assert_eq!((to.port(), is_meant(to)), (1234, meant), "{to}");
        stream.write_all(b"hello").unwrap();
        drop(stream);
        let said = child.wait_with_output().unwrap().stdout;
        assert_eq!(String::from_utf8_lossy(&said), "b'hello'\n");
    }
    // It goes with its descriptors.
    drop((listener, attachment));
    let refused = python(
        "import socket
try: socket.create_connection(('127.0.0.1', 1234), 60)
except ConnectionRefusedError: print('refused')",
    );
    let said = refused.wait_with_output().unwrap().stdout;
    assert_eq!(String::from_utf8_lossy(&said), "refused\n");
}

/// The links that are there once `done` says so of them.
async fn changed(watch: &Watch, done: impl Fn(&[Seen]) -> bool) -> Vec<Seen> {
    let change = async {
        loop {
            let links = watch.look().await.unwrap().links;
            if done(&links) {
                return links;
            }
            watch.changed().await.unwrap();
        }
    };
    tokio::time::timeout(WITHIN, change).await.unwrap()
}

fn named<'a>(links: &'a [Seen], name: &str) -> Option<&'a Interface> {
    let all = links.iter().filter_map(|seen| seen.interface.as_ref().ok());
    all.into_iter().find(|interface| interface.name == name)
}

#[tokio::test]
async fn what_becomes_of_links_is_told() {
    let (pod, node) = pod_and_node();
    let connection = connect(&pod.at(), 1, Vec::new()).await.unwrap();
    let watch = connection.watch;
    // The tap is none of them.
    assert_eq!(watch.look().await.unwrap().links.len(), 1);

    pod.ip("address delete 10.0.0.2/24 dev eth0");
    pod.ip("address add 10.0.0.9/24 dev eth0");
    pod.ip("route add 10.5.0.0/16 via 10.0.0.1 dev eth0");
    let links = changed(&watch, |links| {
        named(links, "eth0").is_some_and(|eth0| eth0.routes.len() == 1)
    });
    let links = links.await;
    let addresses = &named(&links, "eth0").unwrap().addresses;
    assert_eq!(addresses.len(), 1, "{addresses:?}");
    assert_eq!(addresses[0].ip, IpAddr::from([10, 0, 0, 9]));
    pod.ip("link set eth0 down");
    let down = |links: &[Seen]| named(links, "eth0").is_some_and(|eth0| !eth0.up);
    let links = changed(&watch, down).await;
    assert!(named(&links, "eth0").unwrap().routes.is_empty());

    // One that comes is there before it is up, and can be taken over when it is.
    pod.ip("link add eth1 address 02:00:00:00:00:02 mtu 1400 type veth peer name other");
    pod.ip(&format!("link set other netns {}", node.0.id()));
    node.ip("link set other up");
    node.ip("address add 10.1.0.1/24 dev other");
    pod.ip("link set eth1 up");
    let up = |links: &[Seen]| named(links, "eth1").is_some_and(|eth1| eth1.up);
    let links = changed(&watch, up).await;
    let index = links.iter().map(|seen| seen.index).max().unwrap();
    let mut link = watch
        .connect(index, named(&links, "eth1").unwrap())
        .await
        .unwrap();
    watch.set_mtu(link.tap, 1280).await.unwrap();
    assert!(pod.ip("link show walnut1").contains("mtu 1280"));
    let mut tap = Tap::new(link.taps.remove(0));
    let mac = link.interface.mac;
    let mut who_has = question(mac);
    let length = who_has.len();
    who_has[length - 4..].copy_from_slice(&[10, 1, 0, 1]);
    tap.send(&who_has);
    assert_eq!(tap.receive(is_answer)[..6], mac);

    // What no guest can have is told of when it is up.
    pod.ip("tuntap add dev point mode tun");
    pod.ip("link set point up");
    let odd = |links: &[Seen]| links.iter().any(|seen| seen.interface.is_err());
    changed(&watch, odd).await;

    // Whoever takes this one's place goes on from the namespace alone.
    let namespace = std::os::fd::AsFd::as_fd(&watch).try_clone_to_owned();
    drop(watch);
    let watch = Watch::resume(namespace.unwrap(), 1, Vec::new())
        .await
        .unwrap();
    pod.ip("link delete eth1");
    changed(&watch, |links| named(links, "eth1").is_none()).await;
    // What cannot be taken over any more leaves no tap.
    let error = watch.connect(index, &link.interface).await.unwrap_err();
    assert!(error.to_string().contains("No such device"), "{error}");
    drop((tap, link));
    let since = Instant::now();
    while pod.ip("link").matches("walnut").count() > 1 {
        assert!(since.elapsed() < WITHIN, "{}", pod.ip("link"));
    }
}

#[tokio::test]
async fn routes_of_no_single_link_and_rules_are_told() {
    let (pod, _node) = pod_and_node();
    for words in [
        "link add eth1 address 02:00:00:00:00:02 type veth peer name other",
        "link set other up",
        "link set eth1 up",
        "address add 10.1.0.2/24 dev eth1",
        "address add fd00:1::2/64 dev eth1 nodad",
        "address add fd00::2/64 dev eth0 nodad",
        "route add 10.5.0.0/16 nexthop via 10.0.0.1 dev eth0 weight 3 nexthop via 10.1.0.1 dev eth1",
        "route add fd05::/16 nexthop via fd00::1 dev eth0 nexthop via fd00:1::1 dev eth1",
        "route add unreachable 10.8.0.0/16 table 1000 metric 5",
        "rule add from 10.1.0.0/24 table 1000 priority 100",
        "rule add not to 10.1.0.9 iif eth1 fwmark 5/7 ipproto tcp dport 80-81 uidrange 1-2 table 5 priority 101",
        "rule add table main suppress_prefixlength 0 priority 102",
        "rule add goto 102 tos 8 priority 99",
        "-6 rule add from fd00:1::/64 prohibit priority 103",
    ] {
        pod.ip(words);
    }
    let connection = connect(&pod.at(), 1, Vec::new()).await.unwrap();
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let hop = |mac, gateway, weight| Hop {
        mac,
        gateway: Some(ip(gateway)),
        onlink: false,
        weight,
    };
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    let mut routes = connection.routing.routes;
    routes.sort_by_key(|wide| wide.route.destination);
    let [v4, nowhere, v6] = routes.try_into().unwrap();
    assert_eq!((v4.kind, v4.route.destination), (1, ip("10.5.0.0")));
    assert_eq!(
        v4.hops,
        [hop(MAC, "10.0.0.1", 2), hop(OTHER, "10.1.0.1", 0)]
    );
    assert_eq!((nowhere.kind, nowhere.hops.len()), (7, 0));
    assert_eq!((nowhere.route.table, nowhere.route.metric), (1000, 5));
    assert_eq!(
        v6.hops,
        [hop(MAC, "fd00::1", 0), hop(OTHER, "fd00:1::1", 0)]
    );
    let rule = |priority, table, action| Rule {
        priority,
        table,
        action,
        ..Rule::default()
    };
    let wanted = [
        Rule {
            tos: 8,
            target: Some(102),
            ..rule(99, 0, 2)
        },
        Rule {
            source: Some((ip("10.1.0.0"), 24)),
            ..rule(100, 1000, 1)
        },
        Rule {
            invert: true,
            destination: Some((ip("10.1.0.9"), 32)),
            incoming: "eth1".into(),
            mark: 5,
            mask: 7,
            protocol: 6,
            destination_ports: Some((80, 81)),
            users: Some((1, 2)),
            ..rule(101, 5, 1)
        },
        Rule {
            suppress_prefix: Some(0),
            ..rule(102, 254, 1)
        },
        Rule {
            ipv6: true,
            source: Some((ip("fd00:1::"), 64)),
            ..rule(103, 0, 8)
        },
    ];
    assert_eq!(connection.routing.rules, wanted);
    // Changes of rules are told as well.
    pod.ip("rule delete priority 100");
    let watch = connection.watch;
    let gone = async {
        while watch.look().await.unwrap().routing.rules.len() != 4 {
            watch.changed().await.unwrap();
        }
    };
    tokio::time::timeout(WITHIN, gone).await.unwrap();
}

/// A pod with a link of this kind upon a node's link `wire`, which leads to another host,
/// 10.0.0.1.
fn pod_upon(kind: &str) -> (Net, Net, Net) {
    let (pod, node, other) = (Net::new(), Net::new(), Net::new());
    node.ip("link add wire address 02:00:00:00:00:aa type veth peer name far");
    node.ip(&format!("link set far netns {}", other.0.id()));
    node.ip(&format!("link add pod0 link wire type {kind}"));
    node.ip(&format!("link set pod0 netns {} name eth0", pod.0.id()));
    node.ip("link set wire up");
    node.ip("address add 10.0.0.254/24 dev wire");
    other.ip("address add 10.0.0.1/24 dev far");
    other.ip("link set far up");
    pod.ip("address add 10.0.0.2/24 dev eth0");
    pod.ip("link set eth0 up");
    (pod, node, other)
}

#[tokio::test]
async fn links_upon_others_are_taken_over_as_well() {
    for kind in [
        "macvlan mode bridge",
        "macvlan mode vepa",
        "macvtap mode bridge",
    ] {
        let (pod, _node, _other) = pod_upon(kind);
        let mut link = only(&pod.at(), 1).await;
        let mac = link.interface.mac;
        assert_ne!(mac, [2, 0, 0, 0, 0, 0xaa], "{kind}");
        assert!(!link.interface.noarp, "{kind}");
        let mut tap = Tap::new(link.taps.remove(0));
        tap.send(&question(mac));
        let answer = tap.receive(is_answer);
        assert_eq!(answer[..6], mac, "{kind}");
    }
}

/// A kernel's module may not be there: then whoever asks is told so, and the rest is for the
/// lab.
fn has_ipvlan() -> bool {
    let node = Net::new();
    node.ip("link add wire type veth peer name far");
    let net = format!("--net={}", node.path().display());
    let words = [
        "ip", "link", "add", "pod0", "link", "wire", "type", "ipvlan",
    ];
    let done = Command::new("nsenter")
        .arg(net)
        .args(words)
        .output()
        .unwrap();
    if !done.status.success() {
        eprintln!("skipped: this kernel makes no ipvlan; the lab's does");
    }
    done.status.success()
}

/// A datagram from 10.0.0.2 to 10.0.0.1, port 7.
fn datagram(mac: Mac) -> Vec<u8> {
    let mut ip = vec![
        0x45, 0, 0, 29, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1,
    ];
    let sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    // Without a checksum of its own.
    ip.extend([0, 7, 0, 7, 0, 9, 0, 0, b'x']);
    [&mac[..], &mac, &[8, 0], &ip].concat()
}

#[tokio::test]
async fn ipvlan_is_taken_over_in_its_modes_or_refused() {
    if !has_ipvlan() {
        return;
    }
    // As any other link, with its parent's address.
    let (pod, _node, _other) = pod_upon("ipvlan mode l2");
    let mut link = only(&pod.at(), 1).await;
    let parent = [2, 0, 0, 0, 0, 0xaa];
    assert_eq!((link.interface.mac, link.interface.noarp), (parent, false));
    let mut tap = Tap::new(link.taps.remove(0));
    tap.send(&question(parent));
    tap.receive(is_answer);

    // Nobody answers for Ethernet addresses, and nobody has to.
    let (pod, _node, other) = pod_upon("ipvlan mode l3");
    other.ip("neighbour add 10.0.0.2 lladdr 02:00:00:00:00:aa dev far");
    let mut link = only(&pod.at(), 1).await;
    assert_eq!((link.interface.mac, link.interface.noarp), (parent, true));
    let mut tap = Tap::new(link.taps.remove(0));
    tap.send(&datagram(parent));
    // The node routes it. Port 7 is nobody's.
    let refusal =
        tap.receive(|frame| frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&1));
    assert_eq!(refusal[34..36], [3, 3], "port unreachable");

    let (pod, _node, _other) = pod_upon("ipvlan mode l3s");
    let error = connect(&pod.at(), 1, Vec::new()).await.unwrap_err();
    assert!(error.to_string().contains("use mode l3 or l2"), "{error}");

    // Two of one parent are one to a guest.
    let (pod, node, _other) = pod_upon("ipvlan mode l2");
    node.ip("link add pod1 link wire type ipvlan mode l2");
    node.ip(&format!("link set pod1 netns {} name eth1", pod.0.id()));
    pod.ip("link set eth1 up");
    let error = connect(&pod.at(), 1, Vec::new()).await.unwrap_err();
    assert!(error.to_string().contains("use macvlan"), "{error}");
    assert!(!pod.ip("link").contains("walnut"));
}
