//! Which devices a machine has, in which order the guest meets them, and the handles by which they are driven
//! after that.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use protocol::stream::{GUEST_CID, PORT_AGENT};
use protocol::vmm::{BlockBacking, NetBacking, NetSlot, RateLimit, Share, VmConfig};

use crate::machine::{Descriptors, Error};
use crate::pluggable::Pluggable;
use crate::ports::EarlyConsole;
use crate::timeline::{Recorder, Stage};
use crate::virtio::Device;
use crate::virtio::balloon::{Balloon, BalloonHandle};
use crate::virtio::block::{Backing, Block, BlockHandle};
use crate::virtio::console::{Console, ConsoleHandle};
use crate::virtio::fs::{Fs, FsHandle};
use crate::virtio::memory::{Memory, MemoryHandle};
use crate::virtio::net::{self, Net, NetHandle, Tap};
use crate::virtio::rate_limiter::Limit;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

/// How much of the guest's early messages is logged: it must not fill the host's disk.
const MAX_EARLY_LOG: usize = 1 << 20;

/// A device with the name it has in reports.
pub struct Named {
    /// `vsock`, `block0`, …
    pub name: String,
    /// The device.
    pub device: Box<dyn Device>,
}

/// What the control loop drives devices by.
pub struct Handles {
    console: ConsoleHandle,
    balloon: Option<BalloonHandle>,
    memory: Option<MemoryHandle>,
    fs: Option<FsHandle>,
    nets: Vec<NetHandle>,
    blocks: Vec<BlockHandle>,
}

/// The devices of a machine, before they have their places in it.
pub struct Devices {
    /// In the order in which the guest shall meet them.
    pub named: Vec<Named>,
    /// To drive them by.
    pub handles: Handles,
    /// Where the guest's messages go before it drives its console.
    pub early_console: Option<EarlyConsole>,
}

impl Handles {
    /// The guest console's last lines.
    #[must_use]
    pub fn console_text(&self) -> String {
        self.console.lines()
    }

    /// Fills a block slot.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such slot, [`Error::Backing`] when the descriptor cannot be one,
    /// [`Error::Slot`] when the slot is occupied.
    pub fn attach_block(
        &self,
        slot: u32,
        backing: &BlockBacking,
        descriptors: &mut Descriptors,
    ) -> Result<(), Error> {
        let handle = self.block(slot)?;
        Ok(handle.attach(open_backing(backing, descriptors, "extents.fd")?)?)
    }

    /// Empties a block slot.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such slot, [`Error::Slot`] when it is empty.
    pub fn detach_block(&self, slot: u32) -> Result<(), Error> {
        Ok(self.block(slot)?.detach()?)
    }

    fn block(&self, slot: u32) -> Result<&BlockHandle, Error> {
        let absent = || {
            Error::Invalid(format!(
                "this VM has no block slot {slot}, it has {}",
                self.blocks.len()
            ))
        };
        self.blocks.get(slot as usize).ok_or_else(absent)
    }

    /// Fills a network slot.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such slot, [`Error::Tap`] when the descriptor cannot back one,
    /// [`Error::NetSlot`] when the slot is occupied or the tap does not fit it.
    pub fn attach_net(
        &self,
        slot: u32,
        backing: &NetBacking,
        descriptors: &mut Descriptors,
    ) -> Result<(), Error> {
        let handle = self.net(slot)?;
        Ok(handle.attach(open_tap(backing, descriptors, "tap")?)?)
    }

    /// Empties a network slot.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such slot, [`Error::NetSlot`] when it is empty.
    pub fn detach_net(&self, slot: u32) -> Result<(), Error> {
        Ok(self.net(slot)?.detach()?)
    }

    fn net(&self, slot: u32) -> Result<&NetHandle, Error> {
        let absent = || {
            Error::Invalid(format!(
                "this VM has no network slot {slot}, it has {}",
                self.nets.len()
            ))
        };
        self.nets.get(slot as usize).ok_or_else(absent)
    }

    /// Shows a directory to the guest.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the VM has no virtio-fs, [`Error::Share`] when the share cannot be.
    pub fn add_share(&self, share: &Share, descriptors: &mut Descriptors) -> Result<(), Error> {
        let root = descriptors.take(share.fd, "fd")?;
        Ok(self.fs()?.add_share(&share.name, root, share.cache)?)
    }

    /// Takes a directory away.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the VM has no virtio-fs, [`Error::Share`] when there is no such share.
    pub fn remove_share(&self, name: &str) -> Result<(), Error> {
        Ok(self.fs()?.remove_share(name)?)
    }

    fn fs(&self) -> Result<&FsHandle, Error> {
        self.fs
            .as_ref()
            .ok_or_else(|| Error::Invalid("this VM has no virtio-fs (`fs_tag`)".to_owned()))
    }

    /// Sets the balloon's target.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the VM has no balloon.
    pub fn set_balloon(&self, target_mib: u32) -> Result<(), Error> {
        let balloon = self
            .balloon
            .as_ref()
            .ok_or_else(|| Error::Invalid("this VM has no balloon".to_owned()))?;
        balloon.set_target_mib(target_mib);
        Ok(())
    }

    /// The device that plugs memory, when the VM has one.
    #[must_use]
    pub fn memory(&self) -> Option<&MemoryHandle> {
        self.memory.as_ref()
    }

    /// Sets how much memory the guest shall have plugged.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the VM has no such device, or it is not so large.
    pub fn set_plugged_memory(&self, mib: u32) -> Result<(), Error> {
        let memory = self
            .memory
            .as_ref()
            .ok_or_else(|| Error::Invalid("this VM has no pluggable memory".to_owned()))?;
        if memory.request(u64::from(mib) << 20) {
            return Ok(());
        }
        let most = memory.region().range().len >> 20;
        Err(Error::Invalid(format!(
            "{mib} MiB of plugged memory: it must be a multiple of 2 MiB and at most {most} MiB"
        )))
    }
}

fn open_backing(
    backing: &BlockBacking,
    descriptors: &mut Descriptors,
    field: &str,
) -> Result<Backing, Error> {
    let extents = backing
        .extents
        .iter()
        .map(|extent| {
            Ok((
                descriptors.take(extent.fd, field)?,
                extent.length,
                extent.read_only,
            ))
        })
        .collect::<Result<_, Error>>()?;
    Ok(Backing::concatenated(extents)?.limited(limit(backing.limit)?))
}

fn open_tap(backing: &NetBacking, descriptors: &mut Descriptors, field: &str) -> Result<net::Backing, Error> {
    let tap = Tap::new(descriptors.take(backing.tap, field)?)?;
    Ok(net::Backing::new(
        tap,
        limit(backing.receive_limit)?,
        limit(backing.transmit_limit)?,
    ))
}

fn limit(limit: Option<RateLimit>) -> Result<Limit, Error> {
    Ok(limit.map(Limit::try_from).transpose()?.unwrap_or_default())
}

/// The guest recognises its network devices by their addresses.
fn check_addresses(nets: &[NetSlot]) -> Result<(), Error> {
    for (index, NetSlot { mac, .. }) in nets.iter().enumerate() {
        let [a, b, c, d, e, f] = mac;
        let invalid = |why: &str| {
            Err(Error::Invalid(format!(
                "network slot {index} has the address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}, {why}"
            )))
        };
        if mac[0] & 1 != 0 {
            return invalid("which is one of a group: the first byte must be even");
        }
        if *mac == [0; 6] {
            return invalid("which is none");
        }
        if nets[..index].iter().any(|other| other.mac == *mac) {
            return invalid("which another one has already");
        }
    }
    Ok(())
}

/// Makes the devices that `config` asks for. A console is always there: without one the first process of the
/// guest starts without standard streams, and a panic has no last words.
///
/// # Errors
/// [`Error`] naming what a device cannot be made of.
pub fn create(
    config: &VmConfig,
    pluggable: Option<&Arc<Pluggable>>,
    descriptors: &mut Descriptors,
    timeline: &Arc<Recorder>,
) -> Result<Devices, Error> {
    let mut named = Vec::new();
    let mut add = |name: String, device: Box<dyn Device>| named.push(Named { name, device });

    if let Some(index) = config.vsock {
        let channel = descriptors.take(index, "vsock")?;
        let timeline = timeline.clone();
        let on_connect = move |port| {
            if port == PORT_AGENT {
                timeline.record(Stage::AgentConnected);
            }
        };
        add(
            "vsock".to_owned(),
            Box::new(Vsock::new(GUEST_CID, channel, Box::new(on_connect))),
        );
    }
    let log = match config.console_log {
        Some(index) => Some(File::from(descriptors.take(index, "console_log")?)),
        None => None,
    };
    let early_log = match &log {
        Some(log) if config.verbose_console => Some(log.try_clone().map_err(|source| Error::Host {
            what: "cannot share the console log",
            source,
        })?),
        _ => None,
    };
    let (console, console_handle) = Console::new(log);
    add("console".to_owned(), Box::new(console));
    let early_console = config
        .verbose_console
        .then(|| early_console(console_handle.clone(), early_log));
    add("rng".to_owned(), Box::new(Rng::new()));
    let mut balloon_handle = None;
    if config.balloon {
        let (balloon, handle) = Balloon::new();
        add("balloon".to_owned(), Box::new(balloon));
        balloon_handle = Some(handle);
    }
    let mut memory_handle = None;
    if let Some(region) = pluggable {
        let (memory, handle) = Memory::new(region.clone()).map_err(|source| Error::Host {
            what: "cannot make an event descriptor",
            source,
        })?;
        add("memory".to_owned(), Box::new(memory));
        memory_handle = Some(handle);
    }
    let mut fs_handle = None;
    if let Some(tag) = &config.fs_tag {
        let (fs, handle) = Fs::new(tag);
        add("fs".to_owned(), Box::new(fs));
        fs_handle = Some(handle);
    }
    check_addresses(&config.nets)?;
    let mut nets = Vec::new();
    for (index, slot) in config.nets.iter().enumerate() {
        let backing = match &slot.backing {
            Some(backing) => Some(open_tap(backing, descriptors, "nets.backing.tap")?),
            None => None,
        };
        let (net, handle) = Net::new(slot.mac, backing);
        add(format!("net{index}"), Box::new(net));
        nets.push(handle);
    }
    let mut blocks = Vec::new();
    for (index, slot) in config.blocks.iter().enumerate() {
        let backing = match &slot.backing {
            Some(backing) => Some(open_backing(backing, descriptors, "blocks.backing.extents.fd")?),
            None => None,
        };
        let (block, handle) = Block::new(&slot.serial, backing);
        add(format!("block{index}"), Box::new(block));
        blocks.push(handle);
    }
    let handles = Handles {
        console: console_handle,
        balloon: balloon_handle,
        memory: memory_handle,
        fs: fs_handle,
        nets,
        blocks,
    };
    Ok(Devices {
        named,
        handles,
        early_console,
    })
}

fn early_console(ring: ConsoleHandle, log: Option<File>) -> EarlyConsole {
    let room = AtomicUsize::new(MAX_EARLY_LOG);
    Box::new(move |bytes| {
        ring.append(bytes);
        let fits = |room: usize| room.checked_sub(bytes.len());
        if let Some(mut log) = log.as_ref()
            && room
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
                .is_ok()
        {
            // The log is for diagnosis: a full disk must not harm the guest.
            let _ = log.write_all(bytes);
        }
    })
}
