//! The guest's network: makes it what the host says it is, and takes away what the host does not say any more. What
//! containers make for themselves (bridges, routes of their own) is left alone.

mod messages;
mod parking;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use netlink::route::{
    IFF_LOWER_UP, IFLA_ADDRESS, IFLA_IFNAME, IFLA_PERM_ADDRESS, LinkHeader, RTM_DELADDR, RTM_DELNEIGH,
    RTM_DELROUTE, RTM_DELRULE, RTM_GETLINK, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH, RTM_NEWROUTE,
    RTM_NEWRULE, RTMGRP_LINK,
};
use netlink::{Family, Message, Reply, Socket};
use protocol::agent::Network;
use protocol::agent::network::Interface;
use rustix::io::Errno;
use tokio::io::Interest;

use self::messages::Change;
use self::parking::Parked;

/// How long a link may take to come up after the host has connected it. A link that is down all the same is no
/// failure: so is a cable that nobody has plugged in.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(2);

/// What could not be done.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused something.
    #[error("cannot {what}: {source}")]
    Kernel { what: String, source: netlink::Error },
    /// The host named a device that this guest does not have.
    #[error("the network device with the address {0} for {1} is not there")]
    NoDevice(String, String),
    /// The host's description contradicts itself.
    #[error("the description of the network is not valid: {0}")]
    Invalid(String),
}

fn refused(what: impl Into<String>) -> impl FnOnce(netlink::Error) -> NetworkError {
    move |source| NetworkError::Kernel {
        what: what.into(),
        source,
    }
}

/// What the network was last made to be.
#[derive(Debug, Default)]
pub struct State(Mutex<Current>);

#[derive(Debug, Default)]
struct Current {
    network: Network,
    parked: Parked,
}

/// A device of this guest.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    index: u32,
    name: String,
    /// The address that the host gave it; it may use another one by now.
    mac: Vec<u8>,
    connected: bool,
}

impl State {
    /// That of a guest which has just been booted.
    #[must_use]
    pub fn of_guest() -> Self {
        Self(Mutex::new(Current {
            network: Network::default(),
            parked: Parked::of_guest(),
        }))
    }

    /// Makes the network what `wanted` says. When it returns, the links that the host has connected are up.
    ///
    /// # Errors
    /// [`NetworkError`]; what was done until then stays, and the next call takes it back.
    pub async fn apply(&self, wanted: Network) -> Result<(), NetworkError> {
        let indices = {
            let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let before = std::mem::replace(&mut current.network, wanted.clone());
            change(&before, &wanted, &mut current.parked)?
        };
        wait_for_carrier(&indices).await
    }
}

/// Goes from one network to the next; gives the indices of its devices.
fn change(before: &Network, wanted: &Network, parked: &mut Parked) -> Result<Vec<u32>, NetworkError> {
    let mut socket = Socket::open(Family::Route).map_err(refused("speak to the kernel about networks"))?;
    let mut devices = devices(&mut socket)?;
    if wanted
        .interfaces
        .iter()
        .any(|interface| find(&devices, interface).is_err())
        && parked.fetch()
    {
        devices = self::devices(&mut socket)?;
    }
    take_away(&mut socket, &devices, before, wanted)?;
    let indices = wanted
        .interfaces
        .iter()
        .map(|interface| Ok((interface.name.clone(), find(&devices, interface)?.index)))
        .collect::<Result<HashMap<String, u32>, NetworkError>>()?;
    free_names(&mut socket, &devices, &indices)?;
    for interface in &wanted.interfaces {
        let index = indices[&interface.name];
        set_up(&mut socket, index, interface)?;
        for address in &interface.addresses {
            let message = messages::address(RTM_NEWADDR, index, address)?;
            add(&mut socket, &message, || {
                format!("add {} to {}", messages::ip(&address.ip), interface.name)
            })?;
        }
    }
    // A gateway must be reachable when a route names it.
    let mut routes: Vec<_> = wanted.routes.iter().collect();
    routes.sort_by_key(|route| !route.gateway.is_empty());
    for route in routes {
        let message = messages::route(RTM_NEWROUTE, route, &indices)?;
        add(&mut socket, &message, || {
            format!("add the route {}", messages::describe(route))
        })?;
    }
    for neighbour in &wanted.neighbours {
        let message = messages::neighbour(RTM_NEWNEIGH, neighbour, &indices)?;
        add(&mut socket, &message, || {
            format!(
                "add the neighbour {} of {}",
                messages::ip(&neighbour.ip),
                neighbour.interface
            )
        })?;
    }
    for rule in &wanted.rules {
        let message = messages::rule(RTM_NEWRULE, rule)?;
        add(&mut socket, &message, || {
            format!("add the rule with priority {}", rule.priority)
        })?;
    }
    for device in &devices {
        if !indices.values().any(|index| *index == device.index) {
            parked.park(&device.name);
        }
    }
    Ok(indices.into_values().collect())
}

/// What is there already is as good.
fn add(socket: &mut Socket, message: &Message, what: impl FnOnce() -> String) -> Result<(), NetworkError> {
    match socket.request(message) {
        Err(error) if error.errno == Errno::EXIST => Ok(()),
        Err(error) => Err(refused(what())(error)),
        Ok(()) => Ok(()),
    }
}

/// What is gone already is as good.
fn remove(socket: &mut Socket, message: &Message) -> Result<(), NetworkError> {
    match socket.request(message) {
        Err(error)
            if matches!(
                error.errno,
                Errno::NOENT | Errno::SRCH | Errno::NODEV | Errno::ADDRNOTAVAIL | Errno::NETDOWN
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(refused("take away what the network was before")(error)),
        Ok(()) => Ok(()),
    }
}

fn take_away(
    socket: &mut Socket,
    devices: &[Device],
    before: &Network,
    wanted: &Network,
) -> Result<(), NetworkError> {
    // What has no device any more went with it.
    let indices: HashMap<String, u32> = before
        .interfaces
        .iter()
        .filter_map(|interface| Some((interface.name.clone(), find(devices, interface).ok()?.index)))
        .collect();
    let mut messages = Vec::new();
    for rule in before.rules.iter().filter(|rule| !wanted.rules.contains(rule)) {
        messages.extend(messages::rule(RTM_DELRULE, rule));
    }
    for route in before
        .routes
        .iter()
        .filter(|route| !wanted.routes.contains(route))
    {
        messages.extend(messages::route(RTM_DELROUTE, route, &indices));
    }
    for neighbour in &before.neighbours {
        if !wanted.neighbours.contains(neighbour) {
            messages.extend(messages::neighbour(RTM_DELNEIGH, neighbour, &indices));
        }
    }
    for interface in &before.interfaces {
        let Some(index) = indices.get(&interface.name) else {
            continue;
        };
        let same = |other: &&Interface| other.device_mac == interface.device_mac;
        let now = wanted.interfaces.iter().find(same);
        let kept = now.map(|now| now.addresses.as_slice()).unwrap_or_default();
        for address in &interface.addresses {
            if !kept.contains(address) {
                messages.extend(messages::address(RTM_DELADDR, *index, address));
            }
        }
        if now.is_none() {
            messages.push(messages::flags(*index, Change::Down));
        }
    }
    messages.iter().try_for_each(|message| remove(socket, message))
}

fn find<'a>(devices: &'a [Device], interface: &Interface) -> Result<&'a Device, NetworkError> {
    devices
        .iter()
        .find(|device| device.mac == interface.device_mac)
        .ok_or_else(|| NetworkError::NoDevice(messages::mac(&interface.device_mac), interface.name.clone()))
}

fn devices(socket: &mut Socket) -> Result<Vec<Device>, NetworkError> {
    let request = Message::new(RTM_GETLINK, 0, &LinkHeader::default().encode());
    let replies = socket
        .dump(&request)
        .map_err(refused("list the network devices"))?;
    Ok(replies.iter().filter_map(device).collect())
}

fn device(reply: &Reply) -> Option<Device> {
    let header = LinkHeader::decode(reply.header()?);
    let attributes = reply.attributes(LinkHeader::SIZE);
    let mac = attributes
        .get(IFLA_PERM_ADDRESS)
        .or_else(|| attributes.get(IFLA_ADDRESS))?;
    Some(Device {
        index: header.index,
        name: attributes.get(IFLA_IFNAME)?.text(),
        mac: mac.value.to_vec(),
        connected: header.flags & IFF_LOWER_UP != 0,
    })
}

/// Renames devices that have the name which another one shall get.
fn free_names(
    socket: &mut Socket,
    devices: &[Device],
    indices: &HashMap<String, u32>,
) -> Result<(), NetworkError> {
    for device in devices {
        if indices
            .get(&device.name)
            .is_some_and(|index| *index != device.index)
        {
            let what = format!("rename {}", device.name);
            socket
                .request(&messages::flags(device.index, Change::Down))
                .and_then(|()| {
                    socket.request(&messages::rename(device.index, &format!("kr{}", device.index)))
                })
                .map_err(refused(what))?;
        }
    }
    Ok(())
}

/// Name, address, MTU; then up.
fn set_up(socket: &mut Socket, index: u32, interface: &Interface) -> Result<(), NetworkError> {
    let name = &interface.name;
    socket
        .request(&messages::link(index, interface)?)
        .map_err(refused(format!(
            "make {name} with the address {} and an MTU of {}",
            messages::mac(&interface.mac),
            interface.mtu
        )))?;
    match socket.request(&messages::quiet(index)) {
        // A kernel without IPv6, or an MTU that is too small for it.
        Err(error) if matches!(error.errno, Errno::AFNOSUPPORT | Errno::INVAL) => {}
        result => result.map_err(refused(format!("keep {name} from giving itself an address")))?,
    }
    for setting in ["accept_ra", "autoconf"] {
        // The host's addresses and routes are the pod's. Nothing to switch off where there is no IPv6.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), "0");
    }
    // An address that is taken away does not take others of its network, and their routes, with it.
    let _ = std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/promote_secondaries"), "1");
    let change = Change::Up {
        no_arp: interface.no_arp,
    };
    socket
        .request(&messages::flags(index, change))
        .map_err(refused(format!("bring up {name}")))
}

/// Waits until the links are connected: the host's word that they are may come a moment later than its call.
async fn wait_for_carrier(indices: &[u32]) -> Result<(), NetworkError> {
    if indices.is_empty() {
        return Ok(());
    }
    let failed = |error: Errno| refused("listen to the network devices")(error.into());
    let mut listener =
        Socket::listen(Family::Route, RTMGRP_LINK).map_err(refused("listen to the network devices"))?;
    let mut waiting: Vec<u32> =
        devices(&mut Socket::open(Family::Route).map_err(refused("speak to the kernel"))?)?
            .into_iter()
            .filter(|device| !device.connected && indices.contains(&device.index))
            .map(|device| device.index)
            .collect();
    let copy = rustix::io::dup(listener.as_fd()).map_err(failed)?;
    let ready = crate::stream::watch_fd(copy, Interest::READABLE)
        .map_err(|error| failed(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    let connected = async {
        while !waiting.is_empty() {
            let Ok(mut guard) = ready.readable().await else {
                return;
            };
            guard.clear_ready();
            // Lost messages: the rest of the time is waited for nothing, at worst.
            for event in listener.events().unwrap_or_default() {
                if event.kind == RTM_NEWLINK
                    && let Some(device) = device(&event)
                    && device.connected
                {
                    waiting.retain(|index| *index != device.index);
                }
            }
        }
    };
    // A link that stays down is said so by the guest's own tools.
    let _ = tokio::time::timeout(CARRIER_TIMEOUT, connected).await;
    Ok(())
}
