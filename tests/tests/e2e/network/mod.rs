//! Networks of `walnut run`, made by Debian's plugins.

mod limits;
mod node;
mod shared;
mod weather;

use std::fs;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use walnut_tests::{driver, until};

use node::{HOST, Node, OUTSIDE};

/// nginx at port 80, and at port 7000 who sends datagrams of both families back.
const SERVE: &str = r#"python3 -c '
import socket
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
server.bind(("::", 7000))
while True:
    data, peer = server.recvfrom(65536)
    server.sendto(data, peer)
' & exec nginx -g "daemon off;""#;
const PAGE: &str = "<h1>Walnut</h1>";

/// Gets a page, and prints it.
fn fetch(from: &str) -> String {
    format!(
        "import urllib.request as r; print(r.urlopen('http://{from}/', timeout=60).read().decode().strip())"
    )
}

/// Prints how a connection ends that is not to come about.
fn knocks(address: &str, port: u16) -> String {
    format!(
        "
import socket
try:
    socket.create_connection(('{address}', {port}), 3)
    print('open')
except OSError as e:
    print('closed')
"
    )
}

/// Prints what comes back of a datagram.
fn echoes(address: &str, port: u16) -> String {
    format!(
        "
import socket
family = socket.AF_INET6 if ':' in '{address}' else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as peer:
    peer.settimeout(60)
    peer.sendto(b'x' * 1000, ('{address}', {port}))
    print(len(peer.recv(65536)))
"
    )
}

fn in_shell(python: &str) -> String {
    format!("python3 -c \"{}\"", python.replace('"', "\\\""))
}

#[test]
fn containers_are_reached_by_their_ports_and_names() {
    let node = Node::new();
    let created = node.walnut(&["network", "create", "--ipv6", "--mtu", "1400", "shop"]);
    assert_eq!(created.exits(0).stdout, "shop\n");
    let ports = [
        "-p",
        "8080:80",
        "-p",
        "127.0.0.1:8081:80",
        "-p",
        "7000-7001:7000-7001/udp",
        "-p",
        "80",
    ];
    let names = ["--name", "web", "--hostname", "front", "--network", "shop"];
    let run = ["IMAGE", "sh", "-c", SERVE];
    node.start(&[&names[..], &ports, &run].concat());

    // From the host, by each of the ways in.
    let addresses = node.addresses("shop", "web");
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    let ways = [
        "127.0.0.1:8080".to_owned(),
        "127.0.0.1:8081".into(),
        format!("{}:8080", HOST[0]),
        format!("{}:80", addresses[0]),
        format!("[{}]:80", addresses[1]),
    ];
    until("it serves", || node.on_the_host(&fetch(&ways[3])).code == 0);
    for way in &ways {
        let done = node.on_the_host(&fetch(way)).exits(0);
        assert_eq!(done.stdout.trim(), PAGE, "{way}");
    }
    // What `portmap` does not do: on loopback it publishes over IPv4 alone.
    let done = node.on_the_host(&knocks("::1", 8080)).exits(0);
    assert_eq!(done.stdout, "closed\n");
    // From another host, of both families, streams and datagrams; what is published on
    // loopback is not.
    for host in HOST {
        let bracketed = if host.contains(':') {
            format!("[{host}]")
        } else {
            host.into()
        };
        let done = node.outside(&fetch(&format!("{bracketed}:8080"))).exits(0);
        assert_eq!(done.stdout.trim(), PAGE, "{host}");
        assert_eq!(
            node.outside(&knocks(host, 8081)).exits(0).stdout,
            "closed\n"
        );
        until("datagrams are sent back", || {
            node.outside(&echoes(host, 7000)).stdout == "1000\n"
        });
    }
    let shown = node.json(&["ps", "--format", "json"]);
    assert_eq!(shown[0]["networks"][0]["network"], "shop");
    assert_eq!(shown[0]["ports"].as_array().unwrap().len(), 5, "{shown:#}");
    // The one that the host chose.
    let any = &shown[0]["ports"][4]["hostPort"];
    let way = format!("{}:{any}", HOST[0]);
    assert_ne!(any, 0, "{shown:#}");
    let done = node.outside(&fetch(&way)).exits(0);
    assert_eq!(done.stdout.trim(), PAGE, "{way}");
    let table = node.walnut(&["ps"]).exits(0).stdout;
    assert!(
        table.contains("8080->80/tcp, 127.0.0.1:8081->80/tcp, 7000->7000/udp"),
        "{table}"
    );
    let hosts = node.walnut(&["exec", "web", "cat", "/etc/hosts", "/etc/resolv.conf"]);
    let hosts = hosts.exits(0).stdout;
    for line in [
        format!("{}\tfront web", addresses[0]),
        format!("{}\tfront web", addresses[1]),
        "search example.test".into(),
        "options ndots:0".into(),
    ] {
        assert!(hosts.contains(&line), "{line}: {hosts}");
    }

    // From another container, which knows it by name; and to the outside, which sees the
    // host, and names that are the outside's.
    let script = [
        "cat /sys/class/net/eth0/mtu".to_owned(),
        "getent ahostsv4 web | head -1; getent ahostsv6 web | head -1".into(),
        in_shell(&fetch("web")),
        in_shell(&echoes("web", 7000)),
        in_shell(&fetch(&format!("[{}]", addresses[1]))),
        in_shell(&fetch(&format!("{}:9000", OUTSIDE[0]))),
        "getent ahostsv4 elsewhere.example | head -1".into(),
        "grep -c outside /etc/hosts; grep -c 192.0.2.7 /etc/hosts".into(),
    ];
    let hosts = [
        "--add-host",
        "outside:host-gateway",
        "--add-host",
        "db:192.0.2.7",
    ];
    let said = node.prints(
        &[&["--network", "shop"], &hosts[..]].concat(),
        &script.join("\n"),
    );
    let said: Vec<_> = said.lines().collect();
    assert_eq!(said.len(), 10, "{said:?}");
    assert_eq!(said[0], "1400");
    assert!(said[1].starts_with(&addresses[0]), "{said:?}");
    assert!(said[2].starts_with(&addresses[1]), "{said:?}");
    assert_eq!(said[3..7], [PAGE, "1000", PAGE, HOST[0]]);
    assert!(said[7].starts_with("198.51.100.9"), "{said:?}");
    assert_eq!(said[8..], ["1", "1"]);

    // The name server may be killed: the next command starts it again.
    let pid = fs::read_to_string(node.run.join("names/networks/aardvark.pid")).unwrap();
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    until("it knows names again", || {
        node.walnut(&["ps"]).exits(0);
        node.walnut(&["exec", "web", "getent", "ahostsv4", "elsewhere.example"])
            .code
            == 0
    });
    node.fails(&["network", "rm", "shop"], "in use by web");
    node.walnut(&["rm", "-f", "web"]).exits(0);
    node.assert_nothing_left();
    node.remove(&["shop"]);
}

#[test]
fn networks_are_apart_and_a_container_may_have_several_or_none() {
    let node = Node::new();
    node.walnut(&["network", "create", "one"]).exits(0);
    node.walnut(&["network", "create", "--internal", "vault"])
        .exits(0);
    let serve = ["IMAGE", "sh", "-c", SERVE];
    // The default network is there when it is first used.
    assert_eq!(
        node.walnut(&["network", "ls", "-q"]).exits(0).stdout,
        "one\nvault\n"
    );
    let run = ["--name", "plain", "--mac-address", "02:00:00:00:00:07"];
    node.start(&[&run[..], &serve].concat());
    let listed = node.walnut(&["network", "ls", "-q"]).exits(0).stdout;
    assert_eq!(listed, "bridge\none\nvault\n");
    node.start(&[&["--name", "safe", "--network", "vault"], &serve[..]].concat());
    let (plain, safe) = (
        node.addresses("bridge", "plain"),
        node.addresses("vault", "safe"),
    );
    for address in [&plain[0], &safe[0]] {
        until("it serves", || node.on_the_host(&fetch(address)).code == 0);
    }

    // On another network neither is to be reached, and from the internal one nothing is.
    let knock = |address: &str, port| in_shell(&knocks(address, port));
    let script = [
        knock(&plain[0], 80),
        knock(&safe[0], 80),
        knock(OUTSIDE[0], 9000),
    ];
    let said = node.prints(&["--network", "one"], &script.join("\n"));
    assert_eq!(said, "closed\nclosed\nopen\n");
    let script = [
        knock(OUTSIDE[0], 9000),
        in_shell(&fetch("safe")),
        "wc -l </proc/net/route".into(),
        "getent ahostsv4 elsewhere.example || echo nobody".into(),
    ];
    let said = node.prints(&["--network", "vault"], &script.join("\n"));
    assert_eq!(said, format!("closed\n{PAGE}\n2\nnobody\n"));

    // Both, with an address that was asked for.
    let last = node.json(&["network", "inspect", "one"]);
    let subnet = last[0]["subnets"][0]["subnet"].as_str().unwrap();
    let wanted = subnet.replace(".0/22", ".77");
    let script = [
        "ls /sys/class/net".to_owned(),
        in_shell(&fetch("safe")),
        in_shell(&fetch(&format!("{}:9000", OUTSIDE[0]))),
        format!("grep -c '^{wanted}' /etc/hosts"),
    ];
    let both = ["--network", "one", "--network", "vault", "--ip", &wanted];
    let said = node.prints(&both, &script.join("\n"));
    assert_eq!(said, format!("eth0\neth1\nlo\n{PAGE}\n{}\n1\n", HOST[0]));
    let mac = node.walnut(&["exec", "plain", "cat", "/sys/class/net/eth0/address"]);
    assert_eq!(mac.exits(0).stdout, "02:00:00:00:00:07\n");

    let said = node.prints(&["--network", "none"], "ls /sys/class/net; cat /etc/hosts");
    assert!(
        said.starts_with("lo\n") && said.contains("127.0.1.1"),
        "{said}"
    );
    node.walnut(&["rm", "-f", "plain", "safe"]).exits(0);
    node.assert_nothing_left();
    node.remove(&["bridge", "one", "vault"]);
}

#[test]
fn rules_say_what_a_container_may_send() {
    let node = Node::new();
    node.walnut(&["network", "create", "--ipv6", "both"])
        .exits(0);
    let serve = ["--network", "both", "IMAGE", "sh", "-c", SERVE];
    node.start(&[&["--name", "server"], &serve[..]].concat());
    let server = node.addresses("both", "server");
    until("it serves", || {
        node.on_the_host(&fetch(&server[0])).code == 0
    });
    let script = [&server[0], &server[1]]
        .map(|address| in_shell(&knocks(address, 80)))
        .join("\n");
    let says = |rules: &[&str]| {
        let rules = rules.iter().flat_map(|rule| ["--egress", rule]);
        let options: Vec<_> = ["--network", "both"].into_iter().chain(rules).collect();
        node.prints(&options, &script)
    };
    assert_eq!(says(&[]), "open\nopen\n");
    assert_eq!(says(&["deny all"]), "closed\nclosed\n");
    let one = format!("allow {} tcp:80", server[1]);
    assert_eq!(says(&[&one, "deny all"]), "closed\nopen\n");
    let but_one = format!("deny {}", server[1]);
    assert_eq!(says(&[&but_one, "allow all"]), "open\nclosed\n");
    // Who may begin nothing answers all the same.
    let quiet = ["--name", "quiet", "--egress", "deny all"];
    node.start(&[&quiet[..], &serve].concat());
    for address in node.addresses("both", "quiet") {
        let address = match address.contains(':') {
            true => format!("[{address}]"),
            false => address,
        };
        until("it serves", || node.on_the_host(&fetch(&address)).code == 0);
    }
    let half = ["--network", "both", "--egress", "allow 10.0.0.0/8"];
    let refused = [&["run", "--rm"], &half[..], &["IMAGE", "true"]].concat();
    node.fails(&refused, "the last rule");
    node.walnut(&["rm", "-f", "server", "quiet"]).exits(0);
    node.assert_nothing_left();
    node.remove(&["both"]);
}

#[test]
fn whoever_is_killed_nothing_of_a_network_stays() {
    let node = Node::new();
    node.walnut(&["network", "create", "--ipv6", "shop"])
        .exits(0);
    let idle = ["IMAGE", "sleep", "infinity"];
    let run = ["--network", "shop", "-p", "8080:80", "-p", "5353:53/udp"];
    let supervisor = "containerd-shim-walnut-v2";
    let (machine, _) = walnut_tests::machine();
    for (victim, before) in [(supervisor, false), (machine, false), (supervisor, true)] {
        let id = node.start(&[&run[..], &idle].concat());
        if before {
            // As if it were killed before plugins have answered: what they made is known by
            // their leases alone.
            let path = node.root.join("containers").join(&id).join("network.json");
            let text = fs::read_to_string(&path).unwrap();
            let mut network: Value = serde_json::from_str(&text).unwrap();
            network["links"][0]["result"] = json!(null);
            fs::write(&path, network.to_string()).unwrap();
        }
        node.kill(&id, victim);
        until("it has ended", || {
            let all = node.json(&["ps", "-a", "--format", "json"]);
            let ours = all.as_array().unwrap().iter().find(|c| c["id"] == *id);
            ours.unwrap()["status"] == "exited"
        });
        node.assert_nothing_left();
        node.walnut(&["rm", &id]).exits(0);
    }

    // The command in front.
    let mut front = node.command(&[&["run", "--name", "front"], &run[..], &idle].concat());
    let mut front = front.spawn().unwrap();
    until("it runs", || {
        let all = node.json(&["ps", "--format", "json"]);
        all.as_array()
            .unwrap()
            .iter()
            .any(|c| c["status"] == "running")
    });
    front.kill().unwrap();
    front.wait().unwrap();
    until("it has ended", || {
        let all = node.json(&["ps", "-a", "--format", "json"]);
        all.as_array()
            .unwrap()
            .iter()
            .all(|c| c["status"] == "exited")
    });
    node.assert_nothing_left();
    node.walnut(&["rm", "front"]).exits(0);

    // After a boot there is no bridge, and no rule; the network is there all the same.
    let bridge = node.json(&["network", "inspect", "shop"]);
    let bridge = bridge[0]["bridge"].as_str().unwrap().to_owned();
    node.host_has("ip", &["link", "del", &bridge]);
    let said = node.prints(
        &["--network", "shop"],
        &in_shell(&fetch(&format!("{}:9000", OUTSIDE[0]))),
    );
    assert_eq!(said.trim(), HOST[0]);
    node.assert_nothing_left();
    node.remove(&["shop"]);
}

#[test]
fn what_cannot_be_had_is_refused_in_one_sentence() {
    let node = Node::new();
    let create =
        |args: &[&str], part: &str| node.fails(&[&["network", "create"], args].concat(), part);
    // Room for one.
    let tiny = ["network", "create", "--subnet", "10.99.0.0/30", "tiny"];
    node.walnut(&tiny).exits(0);
    create(&["tiny"], "there is one of this name");
    create(
        &["--subnet", "10.99.0.0/16", "wide"],
        "that of the network tiny, 10.99.0.0/30",
    );
    create(
        &["--subnet", "192.0.2.128/25", "wide"],
        "a route of this host's, to 192.0.2.0/24",
    );
    create(&["none"], "choose another name");
    node.fails(&["network", "rm", "absent"], "no such network: absent");
    node.fails(&["network", "inspect", "absent"], "no such network: absent");

    let run = |args: &[&str], part: &str| {
        node.fails(&[&["run", "--rm"], args, &["IMAGE", "true"]].concat(), part);
    };
    run(&["--network", "absent"], "walnut network create absent");
    run(&["--network", "host"], "a kernel of its own");
    run(&["--network", "container:absent"], "no such container");
    run(&["--network", "none", "-p", "80:80"], "on no network");
    run(&["--network", "tiny", "--network", "none"], "excludes");
    run(
        &["--network", "tiny", "--ip", "10.1.1.1"],
        "not an address of the network tiny",
    );
    assert_eq!(node.walnut(&["run", "-p", ":80", "IMAGE"]).code, 2);

    let idle = ["IMAGE", "sleep", "infinity"];
    let publish = ["--name", "only", "--network", "tiny", "-p", "8080:80"];
    node.start(&[&publish[..], &idle].concat());
    let port = node.walnut(&["port", "only", "80/tcp"]).exits(0);
    assert_eq!(port.stdout, "0.0.0.0:8080\n");
    let renamed = node.walnut(&["rename", "only", "other"]);
    assert!(renamed.code == 125 && renamed.stderr.contains("others find it"));
    // Started again it has all of that again.
    let before = node.addresses("tiny", "only");
    node.walnut(&["restart", "-t", "0", "only"]).exits(0);
    assert_eq!(node.addresses("tiny", "only"), before);
    let of = "{{.NetworkSettings.Networks.tiny.IPAddress}} {{json .NetworkSettings.Ports}}";
    let shown = node.walnut(&["inspect", "-f", of, "only"]).exits(0);
    let ports = r#"{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}"#;
    assert_eq!(shown.stdout, format!("{} {ports}\n", before[0]));
    run(
        &["--network", "tiny"],
        "every address of the network is in use",
    );
    run(
        &["-p", "8080:80"],
        "publish the port 8080/tcp: it is in use",
    );
    // And by another program.
    let listen = "
import socket, sys
server = socket.create_server(('127.0.0.1', 8090))
sys.stdin.read()
";
    let mut listener = node.on_the_host_behind(listen);
    until("it listens", || {
        node.on_the_host(&knocks("127.0.0.1", 8090)).stdout == "open\n"
    });
    run(&["-p", "8090:80"], "it is in use on this host");
    listener.kill().unwrap();
    listener.wait().unwrap();

    // A node without plugins.
    let settings = node.root.join("config.toml");
    fs::write(&settings, "[network]\nplugins = [\"/nowhere\"]\n").unwrap();
    let mut without = node.command(&["run", "--rm", "IMAGE", "true"]);
    let said = walnut_tests::client::finish(without.env("WALNUT_CONFIG", &settings), b"");
    assert!(
        said.stderr
            .contains("install the package containernetworking-plugins"),
        "{said:#?}"
    );
    assert_eq!(said.exits(125).stderr.lines().count(), 1);
    fs::write(&settings, "[network]\ndefault = \"none\"\n").unwrap();
    let mut none = node.command(&["run", "--rm", "IMAGE", "ls", "/sys/class/net"]);
    let said = walnut_tests::client::finish(none.env("WALNUT_CONFIG", &settings), b"");
    assert_eq!(said.exits(0).stdout, "lo\n");

    node.walnut(&["rm", "-f", "only"]).exits(0);
    node.assert_nothing_left();
    node.remove(&["bridge", "tiny"]);
}

#[test]
fn clones_have_links_and_so_does_who_stands_by_where_links_can_come() {
    let node = Node::new();
    node.walnut(&["template", "create"]).exits(0);
    node.walnut(&["pool", "set", "1"]).exits(0);
    let idle = ["IMAGE", "sleep", "infinity"];
    let supervisor = |name: &str| {
        let all = node.json(&["ps", "--format", "json"]);
        let mut all = all.as_array().unwrap().iter();
        all.find(|c| c["name"] == name).unwrap()["shim_pid"].clone()
    };
    let ready = || {
        let member = node.json(&["pool", "ls", "--format", "json"])[0]["members"][0].clone();
        (member["ready"] == true).then_some(member)
    };
    let member = ready().unwrap();
    node.start(&[&["--name", "linked"], &idle[..]].concat());
    let all = node.json(&["ps", "--format", "json"]);
    assert_eq!(all[0]["template"], member["template"], "{all:#}");
    let plugs = driver() == "vmm";
    assert_eq!(supervisor("linked") == member["pid"], plugs);
    let script = in_shell(&fetch(&format!("{}:9000", OUTSIDE[0])));
    let said = node.walnut(&["exec", "linked", "sh", "-c", &script]);
    assert_eq!(said.exits(0).stdout.trim(), HOST[0]);
    // Its name as well, and rules of its own, for which nobody stands by.
    let hosts = node.walnut(&["exec", "linked", "cat", "/etc/hosts"]);
    assert!(hosts.exits(0).stdout.contains("linked"));
    until("one stands by", || ready().is_some());
    let member = ready().unwrap();
    let ruled = ["--name", "ruled", "--egress", "deny all"];
    node.start(&[&ruled[..], &idle[..]].concat());
    assert_ne!(supervisor("ruled"), member["pid"]);
    until("one stands by", || ready().is_some());
    let member = ready().unwrap();
    node.start(&[&["--name", "alone", "--network", "none"], &idle[..]].concat());
    assert_eq!(supervisor("alone"), member["pid"]);
    node.fails(&["checkpoint", "linked", "--as", "saved"], "--network none");

    node.walnut(&["pool", "set", "0"]).exits(0);
    node.walnut(&["rm", "-f", "linked", "ruled", "alone"])
        .exits(0);
    node.assert_nothing_left();
    node.remove(&["bridge"]);
}
