//! The kernel command line: what this machine needs, its devices, then the caller's words.

use std::fmt::Write as _;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::arch::x86_64::layout;
use crate::memory::GuestMemory;

/// Why the command line cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel would cut it off.
    #[error("the kernel command line has {0} bytes, the kernel reads at most {most}", most = layout::COMMAND_LINE_SIZE - 1)]
    TooLong(usize),
    /// It contains a character that ends or splits it.
    #[error("the kernel command line may only have printable ASCII characters, not {0:?}")]
    Character(char),
    /// Guest memory does not take it.
    #[error("cannot write the command line to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// The words that suit this machine; those that the guest kernel's configuration says already are left out.
///
/// * `reboot=k,panic_warm`: reset through the keyboard controller's port, and after a panic leave the mark by
///   which [`ports`](crate::ports) tells it from a shutdown. `panic=-1`: at once.
/// * `console=hvc0`: the virtio console. `8250.nr_uarts=0`, `pci=off`: look for no hardware that is not there.
/// * `swiotlb=noforce`: virtio-mmio devices reach all memory, bounce buffers are never needed.
/// * `rcupdate.rcu_expedited=1`: namespaces, mounts and cgroups come and go without waiting for ticks.
/// * `dummy.numdummies=0 ifb.numifbs=0`: no network interfaces that nobody asked for.
const MACHINE: &str = "reboot=k,panic_warm panic=-1 console=hvc0 8250.nr_uarts=0 pci=off swiotlb=noforce \
                       rcupdate.rcu_expedited=1 dummy.numdummies=0 ifb.numifbs=0";
/// Of the kernel's messages only emergencies, that is panics: each byte costs an exit.
const QUIET: &str = "quiet loglevel=1";
/// `earlyprintk` writes to the transmit-only port of [`ports`](crate::ports) until the virtio console is up.
const VERBOSE: &str = "earlyprintk=serial,0x3f8 loglevel=8 ignore_loglevel";

/// With pluggable memory: nothing in the guest would put it to use otherwise. While there is not more than three times
/// as much of it as boot memory it is kept free of what cannot be moved, so that it can be unplugged again; beyond
/// that the kernel could run out of room for itself (Documentation/admin-guide/mm/memory-hotplug.rst).
const PLUGGABLE: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// What differs from machine to machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape<'a> {
    /// Show the whole boot.
    pub verbose: bool,
    /// How many of the processors of the MP table are started at boot, when not all are.
    pub start_vcpus: Option<u8>,
    /// Whether memory can be plugged.
    pub pluggable: bool,
    /// The virtio-mmio devices.
    pub devices: &'a [MmioSlot],
}

/// A virtio-mmio device to announce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Its interrupt.
    pub gsi: u8,
}

/// Puts the command line together.
///
/// # Errors
/// [`Error`] when it is too long or `extra` has control characters.
pub fn compose(shape: Shape<'_>, extra: &str) -> Result<String, Error> {
    if let Some(bad) = extra.chars().find(|c| !(' '..='~').contains(c)) {
        return Err(Error::Character(bad));
    }
    let mut line = format!("{MACHINE} {}", if shape.verbose { VERBOSE } else { QUIET });
    // Writing to a String cannot fail.
    if let Some(count) = shape.start_vcpus {
        let _ = write!(line, " maxcpus={count}");
    }
    if shape.pluggable {
        let _ = write!(line, " {PLUGGABLE}");
    }
    for device in shape.devices {
        let _ = write!(
            line,
            " virtio_mmio.device={:#x}@{:#x}:{}",
            layout::VIRTIO_MMIO_SIZE,
            device.address,
            device.gsi
        );
    }
    let extra = extra.trim();
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    if line.len() >= layout::COMMAND_LINE_SIZE {
        return Err(Error::TooLong(line.len()));
    }
    Ok(line)
}

/// Writes the command line where the start info says it is.
///
/// # Errors
/// [`Error::Write`].
pub fn write(memory: &GuestMemory, line: &str) -> Result<(), Error> {
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
        .map_err(Error::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_the_callers_words_follow_the_machines_own() {
        let devices = [
            MmioSlot {
                address: 0xd000_0000,
                gsi: 1,
            },
            MmioSlot {
                address: 0xd000_1000,
                gsi: 2,
            },
        ];
        let shape = Shape {
            devices: &devices,
            ..Shape::default()
        };
        let line = compose(shape, " root=/dev/vda ro ").unwrap();
        assert!(line.starts_with("reboot=k,panic_warm panic=-1 "), "{line}");
        assert!(
            line.ends_with(
                " virtio_mmio.device=0x1000@0xd0000000:1 virtio_mmio.device=0x1000@0xd0001000:2 root=/dev/vda ro"
            ),
            "{line}"
        );
    }

    #[test]
    fn a_machine_that_can_grow_says_so() {
        assert!(!compose(Shape::default(), "").unwrap().contains("maxcpus"));
        let shape = Shape {
            start_vcpus: Some(2),
            pluggable: true,
            ..Shape::default()
        };
        let line = compose(shape, "").unwrap();
        assert!(line.contains(" maxcpus=2 memhp_default_state=online "), "{line}");
    }

    #[test]
    fn lines_that_the_kernel_would_misread_are_refused() {
        assert!(matches!(
            compose(Shape::default(), &"x".repeat(3000)),
            Err(Error::TooLong(_))
        ));
        assert!(matches!(
            compose(Shape::default(), "a\nb"),
            Err(Error::Character('\n'))
        ));
        assert!(matches!(
            compose(Shape::default(), "a\0b"),
            Err(Error::Character('\0'))
        ));
    }
}
