//! Links of the calling thread's namespace, over netlink.

use std::net::IpAddr;

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    Handle, LinkBridge, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        address::AddressHeaderFlags,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};

use crate::{Error, Mac, Result, error};

/// A handle whose connection the current runtime serves.
pub(crate) fn open() -> Result<Handle> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(Error::system("open a netlink socket"))?;
    tokio::spawn(connection);
    Ok(handle)
}

/// What `work` leads to on a thread of its own, which may change its namespaces.
pub(crate) fn on_a_thread<T, W, F>(work: W) -> Result<T>
where
    T: Send + 'static,
    W: FnOnce() -> F + Send + 'static,
    F: Future<Output = Result<T>>,
{
    let thread = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(Error::system("start a runtime"))?;
        runtime.block_on(work())
    };
    let thread = std::thread::Builder::new()
        .name("network".into())
        .spawn(thread)
        .map_err(Error::system("start a thread"))?;
    thread.join().unwrap_or_else(|_| {
        Err(Error::system("work on the network")(std::io::Error::other(
            "its thread died",
        )))
    })
}

/// The number of a link.
pub(crate) async fn index(handle: &Handle, name: &str) -> Result<u32> {
    let what = || format!("look for the link {name}");
    let get = handle.link().get().match_name(name.to_owned()).execute();
    let found: Vec<_> = get.try_collect().await.map_err(Error::netlink(what()))?;
    let found = found.first().map(|link| link.header.index);
    found.ok_or_else(|| Error::system(what())(std::io::ErrorKind::NotFound.into()))
}

/// Makes a bridge with this address; false if there is a link of its name.
pub(crate) async fn make_bridge(handle: &Handle, name: &str, mac: Mac) -> Result<bool> {
    let what = || format!("make the bridge {name}");
    let bridge = LinkBridge::new(name).address(mac.to_vec()).build();
    match handle.link().add(bridge).execute().await {
        Ok(()) => {}
        Err(e) if error::code(&e) == Some(libc::EEXIST) => return Ok(false),
        Err(e) => return Err(Error::netlink(what())(e)),
    }
    Ok(true)
}

/// Gives a link addresses and brings it up.
pub(crate) async fn furnish(handle: &Handle, name: &str, addresses: &[(IpAddr, u8)]) -> Result<()> {
    let what = || format!("set up the bridge {name}");
    let link = index(handle, name).await?;
    for &(ip, prefix) in addresses {
        let mut add = handle.address().add(link, ip, prefix);
        if ip.is_ipv6() {
            // A bridge without a port would look for duplicates for ever, and nobody could
            // listen there meanwhile.
            add.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        add.execute().await.map_err(Error::netlink(what()))?;
    }
    let up = LinkUnspec::new_with_index(link).up().build();
    let set = handle.link().set(up).execute().await;
    set.map_err(Error::netlink(what()))
}

/// Removes a link, if it is there.
pub(crate) async fn remove(handle: &Handle, name: &str) -> Result<()> {
    let what = || format!("remove the link {name}");
    let get = handle.link().get().match_name(name.to_owned()).execute();
    let found: Result<Vec<_>, _> = get.try_collect().await;
    let index = match found {
        Ok(found) => found.first().map(|link| link.header.index),
        Err(e) if error::code(&e) == Some(libc::ENODEV) => None,
        Err(e) => return Err(Error::netlink(what())(e)),
    };
    let Some(index) = index else { return Ok(()) };
    match handle.link().del(index).execute().await {
        Err(e) if error::code(&e) != Some(libc::ENODEV) => Err(Error::netlink(what())(e)),
        _ => Ok(()),
    }
}

/// Networks that there are routes to, but for those to everything.
pub(crate) async fn routes(handle: &Handle) -> Result<Vec<IpNet>> {
    let mut all = Vec::new();
    for query in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let found: Result<Vec<_>, _> = handle.route().get(query).execute().try_collect().await;
        match found {
            Ok(found) => all.extend(found.iter().filter_map(destination)),
            Err(e) if error::code(&e) == Some(libc::EAFNOSUPPORT) => {}
            Err(e) => return Err(Error::netlink("list routes")(e)),
        }
    }
    Ok(all)
}

fn destination(route: &RouteMessage) -> Option<IpNet> {
    let header = &route.header;
    let prefix = header.destination_prefix_length;
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || prefix == 0
    {
        return None;
    }
    route.attributes.iter().find_map(|attribute| {
        let ip: IpAddr = match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => (*ip).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => (*ip).into(),
            _ => return None,
        };
        // Every link has the network of link-local addresses.
        let local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        IpNet::new(ip, prefix).ok().filter(|_| !local)
    })
}
