//! Counters of one VM, gathered when asked for. Nothing is sampled in between.

use protocol::vmm::Metrics;

use crate::machine::{Error, Machine};
use crate::memory;

/// Gathers the counters.
///
/// # Errors
/// [`Error::Memory`] when the host does not tell which pages are resident.
pub fn gather(machine: &Machine) -> Result<Metrics, Error> {
    Ok(Metrics {
        vcpu_exits: machine.vcpu_exits(),
        guest_resident_bytes: memory::resident_bytes(machine.memory())?,
        guest_memory_bytes: memory::size(machine.memory()),
        plugged_memory_bytes: 0,
        devices: machine
            .devices()
            .iter()
            .map(|device| (device.name().to_owned(), device.counters()))
            .collect(),
        console: machine.handles().console_text(),
    })
}
