use super::{create::NewNetwork, *};

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

#[test]
fn numbers_are_networks_that_do_not_overlap() {
    let all: Vec<_> = (0..subnets::COUNT)
        .map(|n| subnets::nth(n).unwrap())
        .collect();
    assert_eq!(all[0], net("10.64.0.0/22"));
    assert_eq!(all[255], net("10.67.252.0/22"));
    assert_eq!(subnets::nth(subnets::COUNT), None);
    for pair in all.windows(2) {
        assert!(!subnets::overlap(&pair[0], &pair[1]), "{pair:?}");
    }
    assert!(subnets::overlap(&net("10.0.0.0/8"), &all[7]));
    assert!(subnets::overlap(&all[7], &net("10.64.28.0/30")));
    assert!(!subnets::overlap(&net("fd00::/8"), &all[7]));
    let local = subnets::unique_local([1, 2, 3, 4, 5]).unwrap();
    assert_eq!(local, net("fd01:203:405::/64"));
}

#[test]
fn subnets_have_a_gateway_and_room() {
    let got = |subnet: &str, gateway: &str| {
        let gateways: Vec<IpAddr> = gateway
            .split_terminator(' ')
            .map(|g| g.parse().unwrap())
            .collect();
        subnets::range(net(subnet), &gateways).map(|range| range.gateway.unwrap().to_string())
    };
    assert_eq!(got("192.0.2.0/24", "").unwrap(), "192.0.2.1");
    assert_eq!(
        got("192.0.2.0/24", "192.0.2.254 fd00::9").unwrap(),
        "192.0.2.254"
    );
    assert_eq!(got("fd00:1::/64", "").unwrap(), "fd00:1::1");
    for (subnet, gateway, why) in [
        ("192.0.2.1/24", "", "write 192.0.2.0/24"),
        ("192.0.2.0/31", "", "no room"),
        ("192.0.2.0/24", "192.0.2.0", "gateway"),
        ("192.0.2.0/24", "192.0.2.255", "gateway"),
        ("127.0.0.0/8", "", "not for this"),
        ("224.0.0.0/8", "", "not for this"),
        ("fe80::/64", "", "not for this"),
    ] {
        let said = got(subnet, gateway).unwrap_err().to_string();
        assert!(said.contains(why), "{said}");
    }
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let networks = Networks::new(dir.path());
    let new = |name: &str, subnets: &[&str]| NewNetwork {
        name: name.into(),
        subnets: subnets.iter().map(|s| net(s)).collect(),
        ..NewNetwork::default()
    };
    let mtu = |mtu, ipv6| NewNetwork {
        mtu: Some(mtu),
        ipv6,
        ..new("net", &[])
    };
    let gateway = NewNetwork {
        gateways: vec!["198.51.100.1".parse().unwrap()],
        ..new("net", &["192.0.2.0/24"])
    };
    for (new, why) in [
        (new("", &[]), "use 1 to 64"),
        (new("-a", &[]), "use 1 to 64"),
        (new("a/b", &[]), "use 1 to 64"),
        (new("host", &[]), "something else"),
        (
            new("net", &["192.0.2.0/24", "198.51.100.0/24"]),
            "one subnet of IPv4",
        ),
        (mtu(500, false), "from 576"),
        (mtu(1000, true), "from 1280"),
        (gateway, "in no --subnet"),
    ] {
        let said = networks.create(&new).await.unwrap_err().to_string();
        assert!(said.contains(why), "{said}");
    }
    assert!(matches!(networks.find("absent"), Err(Error::Unknown(_))));
    assert!(matches!(networks.find("../x"), Err(Error::Unknown(_))));
    assert_eq!(networks.list().unwrap(), []);
}

#[test]
fn lists_of_others_are_networks_too() {
    let dir = tempfile::tempdir().unwrap();
    let networks = Networks::new(dir.path());
    let list = r#"{"cniVersion":"1.0.0","name":"lan","plugins":[{"type":"macvlan","master":"eth0",
        "ipam":{"type":"host-local","ranges":[[{"subnet":"192.0.2.0/24"}]]}}]}"#;
    fs::write(dir.path().join("10-mine.conflist"), list).unwrap();
    fs::write(dir.path().join("broken.conflist"), "{").unwrap();
    fs::write(
        dir.path().join("bridge.conflist"),
        list.replace("lan", "bridge"),
    )
    .unwrap();
    let names: Vec<_> = networks
        .list()
        .unwrap()
        .into_iter()
        .map(|n| n.name)
        .collect();
    assert_eq!(names, [DEFAULT, "lan"]);
    let lan = networks.find("lan").unwrap();
    assert_eq!(lan.driver, "macvlan");
    assert_eq!(lan.subnets[0].subnet, net("192.0.2.0/24"));
    assert!(!lan.internal && !lan.dns && !lan.is_ours());
    assert_eq!(lan.list.programs(), ["macvlan", "host-local"]);
}
