//! Frames from a link to a tap and back, by the kernel.

use std::{fs, os::fd::OwnedFd};

use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::{
    Handle, LinkUnspec,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{
            TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption,
            TcActionOption, TcActionType, TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption,
            TcFilterU32Option, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
            TcU32Selector, TcU32SelectorFlags,
        },
    },
};
use tracing::warn;

use crate::{Error, Interface, Mac, Result, Rules, bpf, error, filter::Flows, tap};

/// Our filters' places in the order of an ingress qdisc's. Others may have some before.
const DENIED: u16 = 48_000;
/// Networks that can be denied without BPF.
const DENIED_MAX: u16 = 256;
const FROM_ITS_MAC: u16 = 49_000;
const REST: u16 = 49_001;
/// The parent of ingress filters.
const INGRESS: u32 = 0xffff_0000;

/// Makes a tap with so many queues in the place of a link; its number, and its queues.
pub(crate) async fn connect(
    handle: &Handle,
    link: u32,
    interface: &Interface,
    queues: u16,
    egress: &[Rules],
) -> Result<(u32, Vec<OwnedFd>)> {
    let (name, taps) = tap::make(queues)?;
    let what = |attempt: &str| format!("{attempt} the tap {name} for the link {}", interface.name);
    // The namespace has nothing to say to the guest.
    let quiet = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    if let Err(e) = fs::write(&quiet, "1")
        && e.kind() != std::io::ErrorKind::NotFound
    {
        return Err(Error::system(what("keep IPv6 off"))(e));
    }
    let tap = index(handle, &name).await?;
    let up = LinkUnspec::new_with_index(tap)
        .mtu(interface.mtu)
        .up()
        .build();
    let set = handle.link().set(up).execute().await;
    set.map_err(Error::netlink(what("bring up")))?;
    let lists: Vec<_> = egress.iter().filter(|list| !list.is_open()).collect();
    // First the way out, for what comes in is answered.
    ingress(handle, tap, &name).await?;
    let networks = lists.iter().map(|list| list.denied());
    match networks.collect::<Option<Vec<_>>>() {
        Some(denied) if denied.iter().map(Vec::len).sum::<usize>() <= usize::from(DENIED_MAX) => {
            way_out(handle, (tap, &name), (link, interface.mac), denied.concat()).await?;
            ingress(handle, link, &interface.name).await?;
            let all = filter(vec![TcU32Key::default()], tap);
            add(handle, link, (REST, every()), all, &interface.name).await?;
        }
        _ => {
            let load = || {
                let flows = Flows::new()?;
                let out = flows.way_out(interface.mac, link, &lists)?;
                Ok((out, flows.way_in(tap)?))
            };
            let what = what(
                "apply the rules for what may be sent, which takes BPF (CAP_BPF; without it, rules can be \"deny NETWORK\" and \"allow all\" alone), to",
            );
            let (out, into) = load().map_err(Error::system(what))?;
            add_program(handle, tap, FROM_ITS_MAC, &out, &name).await?;
            ingress(handle, link, &interface.name).await?;
            add_program(handle, link, REST, &into, &interface.name).await?;
        }
    }
    Ok((tap, taps))
}

/// Gives a tap its link's new MTU.
pub(crate) async fn set_mtu(handle: &Handle, tap: u32, mtu: u32) -> Result<()> {
    let change = LinkUnspec::new_with_index(tap).mtu(mtu).build();
    let set = handle.link().set(change).execute().await;
    set.map_err(Error::netlink(format!("set the MTU of a tap to {mtu}")))
}

/// Sends what comes from a tap out of its link, if it is the link's and not for a network
/// that is denied. Not every kernel has an action that drops; the guest may have it back.
async fn way_out(
    handle: &Handle,
    (tap, name): (u32, &str),
    (link, mac): (u32, Mac),
    denied: Vec<IpNet>,
) -> Result<()> {
    for (n, network) in (0..DENIED_MAX).zip(denied) {
        let (keys, protocol) = to(network);
        let back = filter(keys, tap);
        add(handle, tap, (DENIED + n, protocol), back, name).await?;
    }
    let own = filter(from(mac), link);
    add(handle, tap, (FROM_ITS_MAC, every()), own, name).await?;
    let back = filter(vec![TcU32Key::default()], tap);
    add(handle, tap, (REST, every()), back, name).await
}

/// Has a program decide what becomes of what arrives on a link.
async fn add_program(
    handle: &Handle,
    link: u32,
    priority: u16,
    program: &OwnedFd,
    name: &str,
) -> Result<()> {
    let mut message = TcMessage::with_index(signed(link));
    message.header.parent = INGRESS.into();
    message.header.info = (u32::from(priority) << 16) | u32::from(every());
    let options = [
        TcFilterBpfOption::ProgFd(bpf::number(program)),
        TcFilterBpfOption::ProgName("walnut".to_owned()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    message.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(options.map(TcOption::Bpf).into()),
    ];
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let asked = ask(handle, request).await;
    asked.map_err(Error::netlink(format!("filter what arrives on {name}")))
}

/// A request that is answered with success or an error.
async fn ask(
    handle: &Handle,
    request: NetlinkMessage<RouteNetlinkMessage>,
) -> Result<(), rtnetlink::Error> {
    let mut answer = handle.clone().request(request)?;
    while let Some(message) = answer.next().await {
        if let NetlinkPayload::Error(e) = message.payload
            && e.code.is_some()
        {
            return Err(rtnetlink::Error::NetlinkError(e));
        }
    }
    Ok(())
}

/// Takes back what [`connect`] did to a link. Its tap goes with its descriptors.
pub(crate) async fn disconnect(handle: &Handle, link: u32, name: &str) {
    let mut message = TcMessage::with_index(signed(link));
    message.header.parent = INGRESS.into();
    message.header.info = (u32::from(REST) << 16) | u32::from(every());
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    match ask(handle, request).await {
        // It was not there yet, or the link is no more.
        Err(e)
            if matches!(
                error::code(&e),
                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
            ) => {}
        Err(e) => warn!("take the redirection from the link {name}: {e}"),
        Ok(()) => {}
    }
}

/// Every protocol, as filters have it.
fn every() -> u16 {
    protocol(libc::ETH_P_ALL)
}

fn protocol(number: libc::c_int) -> u16 {
    u16::try_from(number).unwrap_or(0).to_be()
}

fn signed(index: u32) -> i32 {
    index.cast_signed()
}

async fn index(handle: &Handle, name: &str) -> Result<u32> {
    let get = handle.link().get().match_name(name).execute();
    let found: Vec<_> = get
        .try_collect()
        .await
        .map_err(Error::netlink(format!("look for the tap {name}")))?;
    let found = found.first().map(|link| link.header.index);
    found.ok_or_else(|| {
        Error::system(format!("look for the tap {name}"))(std::io::ErrorKind::NotFound.into())
    })
}

/// Gives a link an ingress qdisc, without filters of ours.
async fn ingress(handle: &Handle, link: u32, name: &str) -> Result<()> {
    let add = handle.qdisc().add(signed(link)).ingress().execute().await;
    match add {
        Ok(()) => Ok(()),
        Err(e) if error::code(&e) == Some(libc::EEXIST) => {
            // Perhaps a machine was connected before, that is no more.
            disconnect(handle, link, name).await;
            Ok(())
        }
        Err(e) => Err(Error::netlink(format!(
            "give the link {name} an ingress qdisc"
        ))(e)),
    }
}

async fn add(
    handle: &Handle,
    link: u32,
    (priority, protocol): (u16, u16),
    filter: Vec<TcFilterU32Option>,
    name: &str,
) -> Result<()> {
    let what = || format!("redirect what arrives on the link {name}");
    let mut filters = handle.traffic_filter(signed(link));
    // The priority is set first: setting it spoils the protocol.
    let request = filters.add().parent(INGRESS).priority(priority);
    let request = request.protocol(protocol).u32(&filter);
    let request = request.map_err(Error::netlink(what()))?;
    request.execute().await.map_err(Error::netlink(what()))
}

/// Sends frames that fit all keys out of the link `to`.
fn filter(keys: Vec<TcU32Key>, to: u32) -> Vec<TcFilterU32Option> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = u8::try_from(keys.len()).unwrap_or(u8::MAX);
    selector.keys = keys;
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.tab = 1;
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    vec![
        TcFilterU32Option::Selector(selector),
        TcFilterU32Option::Action(vec![action]),
    ]
}

/// Packets to this network, and the protocol that they are of. Offsets are from the network
/// header on.
fn to(network: IpNet) -> (Vec<TcU32Key>, u16) {
    let (address, mask, at, kind) = match network {
        IpNet::V4(net) => (
            net.network().octets().to_vec(),
            net.netmask().octets().to_vec(),
            16,
            libc::ETH_P_IP,
        ),
        IpNet::V6(net) => (
            net.network().octets().to_vec(),
            net.netmask().octets().to_vec(),
            24,
            libc::ETH_P_IPV6,
        ),
    };
    let word = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).map_or(0, u32::from_be_bytes);
    let words = address.chunks(4).map(word).zip(mask.chunks(4).map(word));
    let keys = words.zip((at..).step_by(4));
    let keys = keys.map(|((value, mask), off)| key(mask, value, off));
    (keys.collect(), protocol(kind))
}

fn key(mask: u32, value: u32, off: i32) -> TcU32Key {
    let mut key = TcU32Key::default();
    (key.mask, key.val, key.off) = (mask, value, off);
    key
}

/// Frames from this address. The kernel counts from the network header on: the source
/// address is 8 bytes before it, and a type of 2 bytes after that.
fn from(mac: Mac) -> Vec<TcU32Key> {
    let [a, b, c, d, e, f] = mac;
    vec![
        key(u32::MAX, u32::from_be_bytes([a, b, c, d]), -8),
        key(0xffff_0000, u32::from_be_bytes([e, f, 0, 0]), -4),
    ]
}
