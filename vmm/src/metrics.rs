//! Counters of one VM, gathered when asked for. Nothing is sampled in between.

use protocol::vmm::Metrics;

use crate::machine::{Error, Machine};
use crate::memory;
use crate::virtio::memory::MemoryHandle;

/// Gathers the counters.
///
/// # Errors
/// [`Error::Memory`] when the host does not tell which pages are resident.
pub fn gather(machine: &Machine) -> Result<Metrics, Error> {
    let plugged = machine.handles().memory();
    let mut ranges = memory::ranges(machine.ram());
    ranges.extend(plugged.map(|memory| memory.region().opened()).unwrap_or_default());
    Ok(Metrics {
        vcpu_exits: machine.vcpu_exits(),
        guest_resident_bytes: memory::resident_bytes(&ranges)?,
        guest_memory_bytes: memory::size(machine.ram()),
        plugged_memory_bytes: plugged.map_or(0, MemoryHandle::plugged),
        devices: machine
            .devices()
            .iter()
            .map(|device| (device.name().to_owned(), device.counters()))
            .collect(),
        console: machine.handles().console_text(),
    })
}
