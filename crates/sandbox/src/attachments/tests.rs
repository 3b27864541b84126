use std::net::TcpListener;

use super::*;
use crate::Lock;

fn attachments() -> Attachments {
    let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "absent"}]});
    Attachments {
        version: 1,
        plugins: vec!["/nowhere".into()],
        links: vec![NetworkLink {
            interface: "eth0".into(),
            list,
            capabilities: Map::new(),
            begun: false,
            result: None,
        }],
        ports: vec![PublishedPort {
            host_port: 8080,
            container_port: 80,
            protocol: Transport::Tcp,
            host_ip: None,
        }],
        names: Names::default(),
    }
}

#[test]
fn ports_are_in_the_words_of_the_convention() {
    let mut port = attachments().ports.remove(0);
    assert_eq!(
        json!(port),
        json!({"hostPort": 8080, "containerPort": 80, "protocol": "tcp"})
    );
    assert_eq!(port.to_string(), "8080/tcp");
    port.host_ip = Some("::1".parse().unwrap());
    port.protocol = Transport::Udp;
    assert_eq!(json!(port)["hostIP"], "::1");
    assert_eq!(port.to_string(), "[::1]:8080/udp");
}

#[test]
fn a_port_is_one_containers_alone() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut port = attachments().ports.remove(0);
    port.host_port = listener.local_addr().unwrap().port();
    let said = ports::reserve(std::slice::from_mut(&mut port))
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("in use") && said.contains(&port.to_string()),
        "{said}"
    );
    drop(listener);
    let held = ports::reserve(std::slice::from_mut(&mut port)).unwrap();
    assert!(ports::reserve(std::slice::from_mut(&mut port)).is_err());
    assert!(TcpListener::bind(("127.0.0.1", port.host_port)).is_err());
    port.protocol = Transport::Udp;
    let datagrams = ports::reserve(std::slice::from_mut(&mut port)).unwrap();
    assert!(ports::reserve(std::slice::from_mut(&mut port)).is_err());
    drop((held, datagrams));
    port.host_ip = Some("192.0.2.77".parse().unwrap());
    let said = ports::reserve(&mut [port]).unwrap_err().to_string();
    assert!(said.contains("does not have this address"), "{said}");
}

#[test]
fn any_port_becomes_one_that_is_free_everywhere() {
    let any = |protocol| PublishedPort {
        host_port: 0,
        container_port: 80,
        protocol,
        host_ip: None,
    };
    let mut ports = [
        any(Transport::Tcp),
        any(Transport::Tcp),
        any(Transport::Udp),
    ];
    let held = ports::reserve(&mut ports).unwrap();
    assert!(ports.iter().all(|port| port.host_port > 0), "{ports:?}");
    assert_ne!(ports[0].host_port, ports[1].host_port);
    // They are this container's from now on, each at every address.
    for port in &mut ports {
        assert!(ports::reserve(std::slice::from_mut(port)).is_err());
    }
    drop(held);
    ports::reserve(&mut ports).unwrap();
}

#[test]
fn what_was_never_begun_needs_no_plugin_to_go() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(dir.path().join("s"), dir.path().join("r")).unwrap();
    let container = layout.container("c");
    fs::create_dir(&container).unwrap();
    let lock = Lock::take(&container.join("lock")).unwrap();
    let mut attachments = attachments();
    attachments.store(&container).unwrap();
    let loaded = Attachments::load(&container).unwrap();
    assert_eq!(loaded.unwrap(), attachments);
    release(&layout, "c", lock.as_fd()).unwrap();
    assert_eq!(Attachments::load(&container).unwrap(), None);
    release(&layout, "c", lock.as_fd()).unwrap();

    // What was is not forgotten before it is gone.
    attachments.links[0].begun = true;
    attachments.store(&container).unwrap();
    release(&layout, "c", lock.as_fd()).unwrap_err();
    assert!(Attachments::load(&container).unwrap().is_some());
}

#[test]
fn hosts_know_the_container_by_all_of_its_names() {
    let mut attachments = attachments();
    attachments.links[0].result = Some(json!({"cniVersion": "1.0.0",
        "ips": [{"address": "192.0.2.5/24", "gateway": "192.0.2.1"}, {"address": "fd00::5/64"}]}));
    let entry = |name: &str, ip: Option<&str>| HostEntry {
        name: name.into(),
        ip: ip.map(|ip| ip.parse().unwrap()),
    };
    attachments.names.hosts = vec![entry("db", Some("198.51.100.7")), entry("outside", None)];
    attachments.names.name = "web".into();
    attachments.names.hostname = "host".into();
    assert_eq!(
        names::hosts(&attachments),
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         198.51.100.7\tdb\n192.0.2.1\toutside\n192.0.2.5\thost web\nfd00::5\thost web\n"
    );
}
