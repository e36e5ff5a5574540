//! A pod's network on the host: reading what its network namespace holds, wiring each interface to a device of the VM
//! (a tap, and packets redirected both ways), and taking the wires away at the end. What the guest makes of it is the
//! agent's; what containerd or Docker put into the namespace is only read.

mod error;
mod leftovers;
mod namespace;
mod nft;
mod relay;
mod scan;
mod tap;
mod tc;
mod watch;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use netlink::route::{IFF_ALLMULTI, LinkHeader, RTM_NEWLINK};
use netlink::{Family, Message, Socket};
use protocol::agent::Network;
use protocol::vmm::NetSlot;
use tokio::sync::OnceCell;

pub use error::NetworkError;
pub use leftovers::clean_up;
use namespace::{Namespace, join};
use relay::Listeners;
use scan::{Link, Topology};
use watch::Listener;

use crate::error::Error;
use crate::pod::{Pod, lock};
use crate::spec::Netns;
use crate::vm::Vm;

/// All devices of a VM together (`protocol::vmm::VmConfig`).
const MOST_DEVICES: usize = 23;
/// Those that are neither network nor block devices: vsock, console, entropy, balloon, memory, file system.
const OTHER_DEVICES: usize = 6;
/// Devices of a VM whose interfaces are not there yet.
const SPARE_DEVICES: usize = 1;

/// The address by which the agent finds the VM's n-th network device: locally administered, never on any wire.
fn device_mac(slot: usize) -> [u8; 6] {
    [0x02, 0x6b, 0x72, 0, 0, u8::try_from(slot).unwrap_or(u8::MAX)]
}

/// The network of a pod.
#[derive(Debug, Default)]
pub(crate) struct PodNetwork {
    /// `None` when the containers have only their own loopback interface, or while it is not made yet.
    namespace: Mutex<Option<Namespace>>,
    /// What was found at the start and is not wired yet.
    found: Mutex<Option<Topology>>,
    /// Whether the namespace comes with the first container's host process.
    comes_later: bool,
    devices: usize,
    wired: OnceCell<()>,
}

/// The namespace is being read.
#[derive(Debug)]
pub(crate) struct Scanning {
    namespace: Option<Namespace>,
    comes_later: bool,
    thread: Option<JoinHandle<Result<Result<Topology, NetworkError>, NetworkError>>>,
}

impl Scanning {
    /// Begins to read a pod's network namespace.
    pub fn begin(netns: &Netns) -> Result<Self, NetworkError> {
        let namespace = match netns {
            Netns::Path(path) => Namespace::open(path)?,
            Netns::Host | Netns::New => None,
        };
        let thread = namespace
            .as_ref()
            .map(|namespace| namespace.spawn(scan_here))
            .transpose()?;
        Ok(Self {
            namespace,
            comes_later: *netns == Netns::New,
            thread,
        })
    }

    /// Waits for what was found. `blocks` is how many block devices the VM has.
    pub fn finish(self, blocks: usize) -> Result<(PodNetwork, Vec<NetSlot>), NetworkError> {
        let found = self.thread.map(|thread| join(thread)?).transpose()?;
        let interfaces = found.as_ref().map_or(0, |found| found.links.len());
        let most = MOST_DEVICES.saturating_sub(OTHER_DEVICES + blocks);
        if interfaces > most {
            return Err(NetworkError::TooMany {
                found: interfaces,
                most,
                cure: "have fewer, or lower `block_slots` in the configuration",
            });
        }
        let devices = match (interfaces, &self.namespace) {
            (0, None) if !self.comes_later => 0,
            (0, _) => SPARE_DEVICES.min(most),
            (count, _) => count,
        };
        let network = PodNetwork {
            namespace: Mutex::new(self.namespace),
            found: Mutex::new(found.filter(|found| !found.links.is_empty())),
            comes_later: self.comes_later,
            devices,
            wired: OnceCell::new(),
        };
        let slots = (0..devices)
            .map(|slot| NetSlot {
                mac: device_mac(slot),
                backing: None,
            })
            .collect();
        Ok((network, slots))
    }
}

/// A namespace whose interfaces are wired to taps.
#[derive(Debug)]
struct Wires {
    /// One for each interface.
    taps: Vec<OwnedFd>,
    links: Vec<Wire>,
    network: Network,
    /// Where connections to be forwarded arrive.
    listeners: Option<Listeners>,
}

/// What is to be undone on an interface.
#[derive(Clone, Copy, Debug)]
struct Wire {
    index: u32,
    made_qdisc: bool,
}

/// Why late interfaces were not wired.
enum Unwired {
    NoneThere,
    Failed(Error),
}

impl PodNetwork {
    /// The host process of the pod's first container is there, and with it the namespace that was to be made.
    pub fn adopt(&self, task: u32) -> Result<(), NetworkError> {
        let mut namespace = lock(&self.namespace);
        if self.comes_later && namespace.is_none() {
            *namespace = Namespace::open(Path::new(&format!("/proc/{task}/ns/net")))?;
        }
        Ok(())
    }

    /// Wires what was found at the start; for the guest to hear of. Nothing when nothing was found.
    pub async fn wire(&self, pod: &Pod, vm: &Arc<Vm>) -> Result<Option<Network>, Error> {
        let (namespace, found) = (lock(&self.namespace).clone(), lock(&self.found).take());
        let (Some(namespace), Some(found)) = (namespace, found) else {
            return Ok(None);
        };
        let network = connect(pod, vm, &namespace, move |socket| wire_here(socket, found)).await?;
        // Nobody else sets it: this comes before the first container.
        let _ = self.wired.set(());
        Ok(Some(network))
    }

    /// Wires interfaces that were put into the namespace after the start (Docker does that between Create and Start)
    /// and tells the guest. For a container's start; nothing when all is done or nothing is there.
    pub async fn wire_late(&self, pod: &Pod) -> Result<(), Error> {
        if self.devices == 0 {
            return Ok(());
        }
        let wired = self.wired.get_or_try_init(|| async {
            let namespace = lock(&self.namespace).clone();
            match namespace {
                Some(namespace) => self.try_wire(pod, &namespace).await,
                None => Err(Unwired::NoneThere),
            }
        });
        match wired.await {
            Ok(()) | Err(Unwired::NoneThere) => Ok(()),
            Err(Unwired::Failed(error)) => Err(error),
        }
    }

    async fn try_wire(&self, pod: &Pod, namespace: &Namespace) -> Result<(), Unwired> {
        let failed = |error: NetworkError| Unwired::Failed(error.into());
        let found = namespace.run(scan_here).await.map_err(failed)?.map_err(failed)?;
        match found.links.len() {
            0 => return Err(Unwired::NoneThere),
            count if count > self.devices => {
                return Err(failed(NetworkError::TooMany {
                    found: count,
                    most: self.devices,
                    cure: "have only as many before the container is created, or all of them",
                }));
            }
            _ => {}
        }
        let update = async {
            let (vm, agent) = (pod.vm()?, pod.agent().await?);
            let network = connect(pod, vm, namespace, move |socket| wire_here(socket, found)).await?;
            agent.update_network(&network).await
        };
        update.await.map_err(Unwired::Failed)
    }
}

/// Wires a namespace and gives the taps to the VM. When the VM ends, the wires go.
async fn connect(
    pod: &Pod,
    vm: &Arc<Vm>,
    namespace: &Namespace,
    wire: impl FnOnce(&mut Socket) -> Result<Wires, NetworkError> + Send + 'static,
) -> Result<Network, Error> {
    let wired = namespace.run(move || {
        let listener = Listener::open().map_err(|cause| NetworkError::Enter(cause.into()))?;
        Ok::<_, NetworkError>((listener, wire(&mut open_socket()?)?))
    });
    let (listener, wires) = wired.await??;
    let Wires {
        taps,
        links,
        network,
        listeners,
    } = wires;
    let forwarding = listeners.is_some();
    let names = network.interfaces.iter().map(|interface| interface.name.clone());
    let watched = links.iter().map(|wire| wire.index).zip(names).collect();
    let relay = listeners.map(|listeners| tokio::spawn(relay::serve(listeners, Arc::downgrade(vm))));
    pod.leftovers.send_modify(|count| *count += 1);
    tokio::spawn({
        let (vm, namespace, leftovers) = (Arc::clone(vm), namespace.clone(), pod.leftovers.clone());
        async move {
            vm.exited().await;
            if let Some(relay) = relay {
                relay.abort();
            }
            if let Err(error) = namespace.run(move || unwire_here(&links, forwarding)).await {
                tracing::warn!(error = %crate::error::chain(&error), "packets may still be redirected to a VM that is gone");
            }
            leftovers.send_modify(|count| *count -= 1);
        }
    });
    for (slot, tap) in taps.iter().enumerate() {
        vm.attach_net(slot, tap.as_fd()).await?;
    }
    tokio::spawn(disconnect_lost(Arc::clone(vm), listener, watched));
    Ok(network)
}

/// Takes the cable out of devices whose interfaces, by index and name in the order of the devices, go before the VM
/// does: what the guest sends would go nowhere, and what is sent to it come from nowhere.
async fn disconnect_lost(vm: Arc<Vm>, listener: Listener, interfaces: Vec<(u32, String)>) {
    let mut watch = match listener.watch() {
        Ok(watch) => watch,
        Err(error) => {
            tracing::warn!(%error, "interfaces of the pod that vanish will not be noticed");
            return;
        }
    };
    let mut left: Vec<u32> = interfaces.iter().map(|(index, _)| *index).collect();
    while !left.is_empty() {
        let lost = tokio::select! {
            _exit = vm.exited() => return,
            lost = watch.lost(&left) => lost,
        };
        let lost = match lost {
            Ok(lost) => lost,
            Err(error) => {
                tracing::warn!(%error, "interfaces of the pod that vanish are not noticed any more");
                return;
            }
        };
        left.retain(|index| !lost.contains(index));
        for (slot, (index, name)) in interfaces.iter().enumerate() {
            if lost.contains(index) {
                tracing::warn!(
                    interface = name,
                    "an interface of the pod is gone, its link in the VM goes down"
                );
                if let Err(error) = vm.detach_net(slot).await {
                    tracing::warn!(interface = name, error = %crate::error::chain(&error), "its link cannot be taken down");
                }
            }
        }
    }
}

fn open_socket() -> Result<Socket, NetworkError> {
    Socket::open(Family::Route).map_err(|cause| NetworkError::Enter(cause.into()))
}

/// Reads the namespace that the calling thread is in.
fn scan_here() -> Result<Topology, NetworkError> {
    scan::scan(&mut open_socket()?, device_mac)
}

/// Wires everything that was found, or nothing.
fn wire_here(socket: &mut Socket, found: Topology) -> Result<Wires, NetworkError> {
    let mut wires = Wires {
        taps: Vec::new(),
        links: Vec::new(),
        network: found.network,
        listeners: None,
    };
    for (slot, link) in found.links.iter().enumerate() {
        match wire_one(socket, slot, link) {
            Ok((tap, wire)) => {
                wires.taps.push(tap);
                wires.links.push(wire);
            }
            Err(error) => {
                // The taps go with their descriptors.
                unwire(socket, &wires.links);
                return Err(error);
            }
        }
    }
    wires.listeners = match relay::listen_here(socket) {
        Ok(listeners) => Some(listeners),
        Err(error) => {
            tracing::warn!(error = %crate::error::chain(&error), "ports of the pod cannot be forwarded (`kubectl port-forward`)");
            None
        }
    };
    Ok(wires)
}

fn wire_one(socket: &mut Socket, slot: usize, link: &Link) -> Result<(OwnedFd, Wire), NetworkError> {
    let tap = tap::make(socket, slot, link)?;
    let failed = |cause: netlink::Error| NetworkError::Redirect {
        name: link.name.clone(),
        cause,
    };
    if link.filters {
        // The guest may join multicast groups that the host knows nothing of.
        let header = LinkHeader {
            index: link.index,
            flags: IFF_ALLMULTI,
            change: IFF_ALLMULTI,
            ..LinkHeader::default()
        };
        socket
            .request(&Message::new(RTM_NEWLINK, 0, &header.encode()))
            .map_err(failed)?;
    }
    tc::redirect(socket, tap.index, link.index).map_err(failed)?;
    let made_qdisc = tc::redirect(socket, link.index, tap.index).map_err(failed)?;
    let wire = Wire {
        index: link.index,
        made_qdisc,
    };
    Ok((tap.fd, wire))
}

fn unwire_here(links: &[Wire], forwarding: bool) {
    if forwarding && let Err(error) = relay::restore_here() {
        tracing::warn!(%error, "connections to the pod's localhost are still redirected");
    }
    match open_socket() {
        Ok(mut socket) => unwire(&mut socket, links),
        Err(error) => {
            tracing::warn!(error = %crate::error::chain(&error), "the pod's interfaces stay redirected");
        }
    }
}

fn unwire(socket: &mut Socket, links: &[Wire]) {
    for link in links {
        if let Err(error) = tc::restore(socket, link.index, link.made_qdisc) {
            tracing::warn!(interface = link.index, %error, "packets may still be redirected to a VM that is gone");
        }
    }
}

#[cfg(test)]
mod tests;
