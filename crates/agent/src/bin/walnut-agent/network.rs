//! The sandbox's network interfaces, as the host wants them.

mod rules;

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use ttrpc::Code;
use walnut_agent::transports;
use walnut_protocol::agent::{
    Address, ConfigureNetworkRequest, Hop, Interface, Neighbour, ReleaseInterfaceRequest, Route,
};

use crate::netlink::{IS_NEW, Message, Netlink, REPLACES, attribute};
use crate::service::status;

/// Interfaces at most, and addresses, routes and neighbours of each.
const INTERFACES_MAX: usize = 64;
const ENTRIES_MAX: usize = 1024;
/// How long an interface may take to come, and between two looks.
const WITHIN: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);
/// Where the kernel has them, and their driver.
const LINKS: &str = "/sys/class/net";
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";

// linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// Whether the address is somebody else's has been found out on the host.
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTAX_MTU: u16 = 2;
const RT_TABLE_MAIN: u32 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u8 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

/// Why an interface is not as it should be.
#[derive(Debug, thiserror::Error)]
enum Refused {
    /// The request is not what it must be.
    #[error("{0}")]
    Invalid(String),
    /// There is no such interface.
    #[error("no interface has the address {0}")]
    Missing(String),
    /// The kernel did not do it.
    #[error("{0}: {1}")]
    Kernel(String, #[source] io::Error),
}

/// Makes them that as the host asks for it.
pub(crate) async fn serve(request: &ConfigureNetworkRequest) -> ttrpc::Result<()> {
    let configured = configure(request).await;
    configured.map_err(|e| e.status("configure the network"))
}

/// Has the driver of an interface give its device back.
pub(crate) fn release(request: &ReleaseInterfaceRequest) -> ttrpc::Result<()> {
    let released = let_go(&request.mac);
    released.map_err(|e| e.status("release an interface"))
}

impl Refused {
    fn status(&self, what: &str) -> ttrpc::Error {
        let code = match self {
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Missing(_) => Code::NOT_FOUND,
            Self::Kernel(..) => Code::INTERNAL,
        };
        status(code, format!("{what}: {self}"))
    }
}

fn invalid<T>(problem: String) -> Result<T, Refused> {
    Err(Refused::Invalid(problem))
}

/// Makes the interfaces what the request says.
async fn configure(request: &ConfigureNetworkRequest) -> Result<(), Refused> {
    let (wanted, gone) = (&request.interfaces, &request.gone);
    if let Some(many) = [wanted.len(), gone.len()]
        .into_iter()
        .find(|&count| count > INTERFACES_MAX)
    {
        return invalid(format!("{many} interfaces; {INTERFACES_MAX} at most"));
    }
    let wide = [request.routes.len(), request.routes_gone.len()];
    let rules = [request.rules.len(), request.rules_gone.len()];
    let mut counts = wide.into_iter().chain(rules);
    if let Some(many) = counts.find(|&count| count > ENTRIES_MAX) {
        return invalid(format!("{many} entries; {ENTRIES_MAX} at most of a kind"));
    }
    for interface in wanted.iter().chain(gone) {
        check(interface)?;
    }
    let mut kernel =
        Netlink::new().map_err(|e| Refused::Kernel("open a netlink socket".into(), e))?;
    for rule in &request.rules_gone {
        let message = rules::message(RTM_DELRULE, rule)?;
        unless_absent(kernel.ask(message), || rules::shown("take away", rule))?;
    }
    for entry in &request.routes_gone {
        // Whatever its next hops are, some of which may have gone before it.
        let message = route(RTM_DELROUTE, None, entry)?;
        unless_absent(kernel.ask(message), || shown_route("take away", entry))?;
    }
    for interface in gone {
        let link = look(Path::new(LINKS), &text(&interface.mac));
        let link = link.map_err(|e| Refused::Kernel(format!("look for {}", interface.name), e))?;
        // With an interface goes all that it had.
        if let Some(link) = link {
            strip(&mut kernel, link.index, interface)?;
        }
    }
    let mut found = Vec::with_capacity(wanted.len());
    for interface in wanted {
        found.push(wait_for(&interface.mac).await?);
    }
    // Names may be each other's: all go before any comes.
    for (interface, link) in wanted.iter().zip(&found) {
        if link.name != interface.name {
            rename(&mut kernel, link.index, &format!("walnut{}", link.index))?;
        }
    }
    for (interface, link) in wanted.iter().zip(&found) {
        if link.name != interface.name {
            rename(&mut kernel, link.index, &interface.name)?;
        }
        furnish(&mut kernel, link.index, interface)?;
    }
    for entry in &request.routes {
        if let Some(message) = wide_route(entry)? {
            let done = kernel.ask(message);
            done.map_err(|e| Refused::Kernel(shown_route("add", entry), e))?;
        }
    }
    for rule in &request.rules {
        match kernel.ask(rules::message(RTM_NEWRULE, rule)?) {
            Err(e) if e.raw_os_error() != Some(libc::EEXIST) => {
                return Err(Refused::Kernel(rules::shown("add", rule), e));
            }
            _ => {}
        }
    }
    Ok(())
}

fn shown_route(attempt: &str, entry: &Route) -> String {
    let (to, prefix) = (Ip(&entry.destination), entry.prefix);
    format!("{attempt} the route {to}/{prefix}")
}

/// What was to be taken away may not be there, because one thing went with another or the
/// guest has taken it away itself: then it is as it should be.
fn unless_absent(done: io::Result<()>, what: impl FnOnce() -> String) -> Result<(), Refused> {
    match done {
        Err(e) if !is_absence(&e) => Err(Refused::Kernel(what(), e)),
        _ => Ok(()),
    }
}

fn check(interface: &Interface) -> Result<(), Refused> {
    let name = &interface.name;
    let good = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    if !(1..=15).contains(&name.len()) || !name.bytes().all(good) || name == "." || name == ".." {
        return invalid(format!("{name:?} is no name of an interface"));
    }
    if interface.mac.len() != 6 {
        return invalid(format!(
            "{name}: the address has {} bytes, not 6",
            interface.mac.len()
        ));
    }
    let entries = [
        interface.addresses.len(),
        interface.routes.len(),
        interface.neighbours.len(),
    ];
    if let Some(many) = entries.into_iter().find(|&count| count > ENTRIES_MAX) {
        return invalid(format!(
            "{name}: {many} entries; {ENTRIES_MAX} at most of a kind"
        ));
    }
    Ok(())
}

struct Link {
    index: u32,
    name: String,
}

/// An address of an interface, as the kernel shows it.
fn text(mac: &[u8]) -> String {
    let pairs: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    pairs.join(":")
}

/// The interface with this address, which may be on its way.
async fn wait_for(mac: &[u8]) -> Result<Link, Refused> {
    let mac = text(mac);
    let since = Instant::now();
    let mut looked = false;
    loop {
        match look(Path::new(LINKS), &mac) {
            Ok(Some(link)) => return Ok(link),
            Ok(None) if !looked => {
                transports::look_again();
                looked = true;
            }
            Ok(None) if since.elapsed() < WITHIN => tokio::time::sleep(PAUSE).await,
            Ok(None) => return Err(Refused::Missing(mac)),
            Err(e) => return Err(Refused::Kernel(format!("look for {mac}"), e)),
        }
    }
}

fn let_go(mac: &[u8]) -> Result<(), Refused> {
    let mac = text(mac);
    let kernel = |e| Refused::Kernel(format!("let go of {mac}"), e);
    let found = look(Path::new(LINKS), &mac).map_err(kernel)?;
    let Some(link) = found else {
        return Err(Refused::Missing(mac));
    };
    let device = fs::canonicalize(Path::new(LINKS).join(link.name).join("device"));
    let device = device.map_err(kernel)?;
    let name = device.file_name().unwrap_or_default();
    fs::write(Path::new(DRIVER).join("unbind"), name.as_encoded_bytes()).map_err(kernel)
}

fn look(links: &Path, mac: &str) -> io::Result<Option<Link>> {
    for entry in fs::read_dir(links)? {
        let path = entry?.path();
        // What a container has made upon one has the same address, and no device.
        if !path.join("device").exists() {
            continue;
        }
        // One may go meanwhile, or not be quite there yet; then it is not the one.
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        if read("address").trim() != mac {
            continue;
        }
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        if let (Ok(index), Some(name)) = (read("ifindex").trim().parse(), name) {
            return Ok(Some(Link { index, name }));
        }
    }
    Ok(None)
}

/// `struct ifinfomsg` for a change of these flags, each to what it says.
fn link(index: u32, wanted: &[(libc::c_int, bool)]) -> Vec<u8> {
    let (mut flags, mut change) = (0, 0);
    for (flag, on) in wanted {
        let flag = flag.cast_unsigned();
        change |= flag;
        flags |= if *on { flag } else { 0 };
    }
    [0, index, flags, change]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect()
}

fn rename(kernel: &mut Netlink, index: u32, name: &str) -> Result<(), Refused> {
    let zero_ended: Vec<u8> = name.bytes().chain([0]).collect();
    // It must be down for that.
    let message = Message::new(RTM_NEWLINK, 0, &link(index, &[(libc::IFF_UP, false)]))
        .with(IFLA_IFNAME, &zero_ended);
    let done = kernel.ask(message);
    done.map_err(|e| Refused::Kernel(format!("call interface {index} {name}"), e))
}

fn furnish(kernel: &mut Netlink, index: u32, interface: &Interface) -> Result<(), Refused> {
    let name = &interface.name;
    let mut ask = |what: String, message: Message| {
        let done = kernel.ask(message);
        done.map_err(|e| Refused::Kernel(format!("{name}: {what}"), e))
    };
    let flags = [
        (libc::IFF_UP, !interface.down),
        (libc::IFF_NOARP, interface.noarp),
    ];
    let mut up = Message::new(RTM_NEWLINK, 0, &link(index, &flags));
    if interface.mtu > 0 {
        up = up.with(IFLA_MTU, &interface.mtu.to_ne_bytes());
    }
    ask("bring it up".into(), up)?;
    for entry in &interface.addresses {
        let what = format!("add the address {}/{}", Ip(&entry.ip), entry.prefix);
        ask(what, address(RTM_NEWADDR, index, entry)?)?;
    }
    if interface.down {
        return Ok(());
    }
    for entry in &interface.neighbours {
        let what = format!("add the neighbour {}", Ip(&entry.ip));
        ask(what, neighbour(RTM_NEWNEIGH, index, entry)?)?;
    }
    for entry in &interface.routes {
        let message = route(RTM_NEWROUTE, Some(index), entry)?;
        ask(shown_route("add", entry), message)?;
    }
    Ok(())
}

/// Takes away what an interface has no more.
fn strip(kernel: &mut Netlink, index: u32, interface: &Interface) -> Result<(), Refused> {
    let name = &interface.name;
    let mut ask = |what: String, message: Message| {
        unless_absent(kernel.ask(message), || format!("{name}: {what}"))
    };
    for entry in interface.routes.iter().rev() {
        let message = route(RTM_DELROUTE, Some(index), entry)?;
        ask(shown_route("take away", entry), message)?;
    }
    for entry in &interface.neighbours {
        let what = format!("take away the neighbour {}", Ip(&entry.ip));
        ask(what, neighbour(RTM_DELNEIGH, index, entry)?)?;
    }
    for entry in &interface.addresses {
        let what = format!("take away the address {}/{}", Ip(&entry.ip), entry.prefix);
        ask(what, address(RTM_DELADDR, index, entry)?)?;
    }
    Ok(())
}

/// How the kernel says that there is no such route, address, neighbour or link.
fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ESRCH | libc::EADDRNOTAVAIL | libc::ENOENT | libc::ENODEV)
    )
}

/// How a request of this kind treats what is there already.
fn flags(kind: u16) -> u16 {
    match kind {
        RTM_NEWADDR | RTM_NEWROUTE | RTM_NEWNEIGH => REPLACES,
        // A second one beside it would be of no use.
        RTM_NEWRULE => IS_NEW,
        _ => 0,
    }
}

/// The family of an address, whose prefix must fit it.
fn family(ip: &[u8], prefix: u32) -> Result<(u8, u8), Refused> {
    let (family, bits) = match ip.len() {
        4 => (libc::AF_INET, 32),
        16 => (libc::AF_INET6, 128),
        length => return invalid(format!("an IP address of {length} bytes")),
    };
    match (u8::try_from(family), u8::try_from(prefix)) {
        (Ok(family), Ok(prefix)) if prefix <= bits => Ok((family, prefix)),
        _ => invalid(format!("{}/{prefix} is no network", Ip(ip))),
    }
}

/// Refuses an address of another family.
fn same_family(ip: &[u8], others: &[&[u8]]) -> Result<(), Refused> {
    match others.iter().find(|o| !o.is_empty() && o.len() != ip.len()) {
        Some(other) => invalid(format!("{} and {} do not go together", Ip(ip), Ip(other))),
        None => Ok(()),
    }
}

fn address(kind: u16, index: u32, entry: &Address) -> Result<Message, Refused> {
    let (family, prefix) = family(&entry.ip, entry.prefix)?;
    same_family(&entry.ip, &[&entry.peer, &entry.broadcast])?;
    // struct ifaddrmsg
    let mut body = vec![family, prefix, IFA_F_NODAD, 0];
    body.extend(index.to_ne_bytes());
    let other_end = match entry.peer.is_empty() {
        true => &entry.ip,
        false => &entry.peer,
    };
    Ok(Message::new(kind, flags(kind), &body)
        .with(IFA_LOCAL, &entry.ip)
        .with(IFA_ADDRESS, other_end)
        .with(IFA_BROADCAST, &entry.broadcast))
}

/// A route over an interface, or over none.
fn route(kind: u16, index: Option<u32>, entry: &Route) -> Result<Message, Refused> {
    let (family, prefix) = family(&entry.destination, entry.prefix)?;
    same_family(&entry.destination, &[&entry.gateway, &entry.source])?;
    let scope =
        u8::try_from(entry.scope).or_else(|_| invalid(format!("{} is no scope", entry.scope)))?;
    let leads = match entry.kind {
        0 => RTN_UNICAST,
        kind => u8::try_from(kind).or_else(|_| invalid(format!("{kind} is no kind of a route")))?,
    };
    let table = match entry.table {
        0 => RT_TABLE_MAIN,
        table => table,
    };
    // struct rtmsg; the table is below.
    let mut body = vec![family, prefix, 0, 0, 0, RTPROT_BOOT, scope, leads];
    body.extend([if entry.onlink { RTNH_F_ONLINK } else { 0 }, 0, 0, 0]);
    let mut message = Message::new(kind, flags(kind), &body)
        .with(RTA_TABLE, &table.to_ne_bytes())
        .with(RTA_GATEWAY, &entry.gateway)
        .with(RTA_PREFSRC, &entry.source);
    if let Some(index) = index {
        message = message.with(RTA_OIF, &index.to_ne_bytes());
    }
    if prefix > 0 {
        message = message.with(RTA_DST, &entry.destination);
    }
    if entry.metric > 0 {
        message = message.with(RTA_PRIORITY, &entry.metric.to_ne_bytes());
    }
    if entry.mtu > 0 {
        message = message.with(RTA_METRICS, &attribute(RTAX_MTU, &entry.mtu.to_ne_bytes()));
    }
    Ok(message)
}

/// A route of no single interface; `None` if all interfaces that it is over are not there.
fn wide_route(entry: &Route) -> Result<Option<Message>, Refused> {
    let message = route(RTM_NEWROUTE, None, entry)?;
    if entry.hops.is_empty() {
        return Ok(Some(message));
    }
    let mut hops = Vec::new();
    for entry_hop in &entry.hops {
        let mac = text(&entry_hop.mac);
        let link = look(Path::new(LINKS), &mac);
        if let Some(link) = link.map_err(|e| Refused::Kernel(format!("look for {mac}"), e))? {
            hops.extend(hop(link.index, &entry.destination, entry_hop)?);
        }
    }
    Ok((!hops.is_empty()).then(|| message.with(RTA_MULTIPATH, &hops)))
}

/// `struct rtnexthop` with its attributes.
fn hop(index: u32, destination: &[u8], entry: &Hop) -> Result<Vec<u8>, Refused> {
    same_family(destination, &[&entry.gateway])?;
    let weight = u8::try_from(entry.weight)
        .or_else(|_| invalid(format!("{} is no weight of a next hop", entry.weight)))?;
    let gateway = match entry.gateway.is_empty() {
        true => Vec::new(),
        false => attribute(RTA_GATEWAY, &entry.gateway),
    };
    let length = u16::try_from(8 + gateway.len()).unwrap_or(u16::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend([if entry.onlink { RTNH_F_ONLINK } else { 0 }, weight]);
    bytes.extend(index.to_ne_bytes());
    bytes.extend(gateway);
    Ok(bytes)
}

fn neighbour(kind: u16, index: u32, entry: &Neighbour) -> Result<Message, Refused> {
    let (family, _) = family(&entry.ip, 0)?;
    // struct ndmsg
    let mut body = vec![family, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(NUD_PERMANENT.to_ne_bytes());
    body.extend([0, 0]);
    Ok(Message::new(kind, flags(kind), &body)
        .with(NDA_DST, &entry.ip)
        .with(NDA_LLADDR, &entry.mac))
}

/// Shows an IP address.
struct Ip<'a>(&'a [u8]);

impl std::fmt::Display for Ip<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Ok(bytes) = <[u8; 4]>::try_from(self.0) {
            write!(f, "{}", std::net::Ipv4Addr::from(bytes))
        } else if let Ok(bytes) = <[u8; 16]>::try_from(self.0) {
            write!(f, "{}", std::net::Ipv6Addr::from(bytes))
        } else {
            write!(f, "{:?}", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> Interface {
        Interface {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            ..Default::default()
        }
    }

    #[test]
    fn odd_requests_are_refused_with_a_sentence() {
        let refused = |change: fn(&mut Interface)| {
            let mut interface = interface();
            change(&mut interface);
            check(&interface).unwrap_err().to_string()
        };
        assert!(check(&interface()).is_ok());
        assert!(refused(|i| i.name = "a/b".into()).contains("no name"));
        assert!(refused(|i| i.name = "..".into()).contains("no name"));
        assert!(refused(|i| i.name = "sixteen-letters-".into()).contains("no name"));
        assert!(refused(|i| i.mac = vec![1]).contains("1 bytes, not 6"));
        assert!(refused(|i| i.routes = vec![Route::default(); 1025]).contains("1025 entries"));
    }

    #[test]
    fn addresses_must_fit_their_families() {
        let error = |result: Result<Message, Refused>| result.unwrap_err().to_string();
        let ip = vec![10, 0, 0, 1];
        let address = |ip: Vec<u8>, prefix, peer| {
            let entry = Address {
                ip,
                prefix,
                peer,
                ..Default::default()
            };
            super::address(RTM_NEWADDR, 2, &entry)
        };
        assert!(address(ip.clone(), 32, vec![]).is_ok());
        assert!(address(vec![0; 16], 128, vec![]).is_ok());
        assert!(error(address(ip.clone(), 33, vec![])).contains("10.0.0.1/33"));
        assert!(error(address(vec![0; 5], 1, vec![])).contains("5 bytes"));
        assert!(error(address(ip.clone(), 8, vec![0; 16])).contains("10.0.0.1 and ::"));
        let entry = Route {
            destination: ip,
            scope: 300,
            ..Default::default()
        };
        assert!(error(route(RTM_DELROUTE, Some(2), &entry)).contains("300 is no scope"));
    }

    #[test]
    fn next_hops_are_as_the_kernel_has_them() {
        let entry = Hop {
            gateway: vec![10, 0, 0, 1],
            weight: 2,
            onlink: true,
            ..Default::default()
        };
        let mut wanted = vec![16, 0, 4, 2, 9, 0, 0, 0];
        wanted.extend([8, 0, 5, 0, 10, 0, 0, 1]);
        assert_eq!(hop(9, &[0; 4], &entry).unwrap(), wanted);
        assert!(hop(9, &[0; 16], &entry).is_err());
        let heavy = Hop {
            weight: 256,
            ..Default::default()
        };
        assert_eq!(
            hop(9, &[0; 4], &heavy).unwrap_err().to_string(),
            "256 is no weight of a next hop"
        );
    }

    #[test]
    fn links_are_known_by_their_addresses() {
        let dir = tempfile::tempdir().unwrap();
        for (name, mac, index) in [
            ("lo", "00:00:00:00:00:00", "1"),
            ("eth7", "02:00:00:00:00:0a", "9"),
            ("eth7.5", "02:00:00:00:00:0a", "10"),
            ("macvlan0", "02:00:00:00:00:0b", "11"),
        ] {
            let link = dir.path().join(name);
            fs::create_dir(&link).unwrap();
            if name == "eth7" {
                fs::create_dir(link.join("device")).unwrap();
            }
            fs::write(link.join("address"), format!("{mac}\n")).unwrap();
            fs::write(link.join("ifindex"), format!("{index}\n")).unwrap();
        }
        let found = look(dir.path(), "02:00:00:00:00:0a").unwrap().unwrap();
        assert_eq!((found.index, found.name.as_str()), (9, "eth7"));
        assert!(look(dir.path(), "02:00:00:00:00:0b").unwrap().is_none());
    }
}
