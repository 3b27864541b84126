//! Frames from a link to a tap and back, by the kernel.

use std::{fs, os::fd::OwnedFd};

use futures::{StreamExt, TryStreamExt};
use rtnetlink::{
    Handle, LinkUnspec,
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        tc::{
            TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption,
            TcActionOption, TcActionType, TcFilterU32Option, TcMessage, TcMirror,
            TcMirrorActionType, TcU32Key, TcU32Selector, TcU32SelectorFlags,
        },
    },
};
use tracing::warn;

use crate::{Error, Interface, Mac, Result, error, tap};

/// Our filters' places in the order of an ingress qdisc's. Others may have some before.
const FROM_ITS_MAC: u16 = 49_000;
const REST: u16 = 49_001;
/// The parent of ingress filters.
const INGRESS: u32 = 0xffff_0000;

/// Makes a tap with so many queues in the place of a link.
pub(crate) async fn connect(
    handle: &Handle,
    link: u32,
    interface: &Interface,
    queues: u16,
) -> Result<Vec<OwnedFd>> {
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
    // First the way out, for what comes in is answered.
    ingress(handle, tap, &name).await?;
    let own = filter(from(interface.mac), link);
    add(handle, tap, FROM_ITS_MAC, own, &name).await?;
    // Not every kernel has an action that drops; the guest may have it back.
    add(
        handle,
        tap,
        REST,
        filter(vec![TcU32Key::default()], tap),
        &name,
    )
    .await?;
    ingress(handle, link, &interface.name).await?;
    let all = filter(vec![TcU32Key::default()], tap);
    add(handle, link, REST, all, &interface.name).await?;
    Ok(taps)
}

/// Takes back what [`connect`] did to a link. Its tap goes with its descriptors.
pub(crate) async fn disconnect(handle: &Handle, link: u32, name: &str) {
    let mut message = TcMessage::with_index(signed(link));
    message.header.parent = INGRESS.into();
    message.header.info = (u32::from(REST) << 16) | u32::from(every());
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut handle = handle.clone();
    let removed = async {
        let mut answer = handle.request(request)?;
        while let Some(message) = answer.next().await {
            if let NetlinkPayload::Error(e) = message.payload
                && e.code.is_some()
            {
                return Err(rtnetlink::Error::NetlinkError(e));
            }
        }
        Ok(())
    };
    match removed.await {
        // It was not there yet.
        Err(e) if matches!(error::code(&e), Some(libc::ENOENT | libc::EINVAL)) => {}
        Err(e) => warn!("take the redirection from the link {name}: {e}"),
        Ok(()) => {}
    }
}

/// Every protocol, as filters have it.
fn every() -> u16 {
    u16::try_from(libc::ETH_P_ALL).unwrap_or(3).to_be()
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
    priority: u16,
    filter: Vec<TcFilterU32Option>,
    name: &str,
) -> Result<()> {
    let what = || format!("redirect what arrives on the link {name}");
    let mut filters = handle.traffic_filter(signed(link));
    // The priority is set first: setting it spoils the protocol.
    let request = filters.add().parent(INGRESS).priority(priority);
    let request = request.protocol(every()).u32(&filter);
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

/// Frames from this address. The kernel counts from the network header on: the source
/// address is 8 bytes before it, and a type of 2 bytes after that.
fn from(mac: Mac) -> Vec<TcU32Key> {
    let [a, b, c, d, e, f] = mac;
    let key = |mask, val, off| {
        let mut key = TcU32Key::default();
        (key.mask, key.val, key.off) = (mask, val, off);
        key
    };
    vec![
        key(u32::MAX, u32::from_be_bytes([a, b, c, d]), -8),
        key(0xffff_0000, u32::from_be_bytes([e, f, 0, 0]), -4),
    ]
}
