//! The table that tells the kernel of its processors and its IOAPIC (MultiProcessor Specification 1.4).
//!
//! It stands in for ACPI: the kernel needs it to use local APICs with an IOAPIC at all.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::arch::x86_64::layout;
use crate::memory::GuestMemory;

/// Why the table could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too many processors.
    #[error("the processor table of {0} bytes does not fit its {room} bytes of guest memory", room = layout::MP_TABLE_SIZE)]
    TooLong(usize),
    /// Guest memory does not take it.
    #[error("cannot write the processor table to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// APIC id of the IOAPIC: ids have a space of their own on machines newer than the serial APIC bus.
pub const IOAPIC_ID: u8 = 0;

/// Entry types (specification table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const SPECIFICATION_1_4: u8 = 4;
/// Integrated local APIC; version 0x14 makes Linux treat the machine as an xAPIC one.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x20;
/// Processor flags: usable, and the one that boots.
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// Interrupt types and flags (tables 4-10 and 4-11).
const VECTORED: u8 = 0;
const NON_MASKABLE: u8 = 1;
const EXTERNAL: u8 = 3;
const ACTIVE_HIGH_EDGE: u16 = 1 | 1 << 2;
const CONFORMS: u16 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

/// Writes the table for `vcpus` processors, and one edge-triggered interrupt for each of the IOAPIC's `pins`.
///
/// # Errors
/// [`Error`] when it does not fit.
pub fn write(memory: &GuestMemory, vcpus: u8, pins: u8) -> Result<(), Error> {
    let bytes = table(vcpus, pins);
    if bytes.len() > layout::MP_TABLE_SIZE {
        return Err(Error::TooLong(bytes.len()));
    }
    memory
        .write_slice(&bytes, GuestAddress(layout::MP_TABLE))
        .map_err(Error::Write)
}

/// The floating pointer structure, followed by the configuration table.
fn table(vcpus: u8, pins: u8) -> Vec<u8> {
    const ISA: u8 = 0;
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        // Signature and feature flags: Linux takes them from CPUID.
        let mut bytes = [0; 20];
        bytes[..4].copy_from_slice(&[PROCESSOR, id, LAPIC_VERSION, flags]);
        entry(&bytes);
    }
    entry(&[BUS, ISA, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = (layout::IOAPIC_BASE as u32).to_le_bytes();
    entry(&[IOAPIC, IOAPIC_ID, IOAPIC_VERSION, ENABLED, a, b, c, d]);
    let [edge_low, edge_high] = ACTIVE_HIGH_EDGE.to_le_bytes();
    for pin in 0..pins {
        entry(&[
            IO_INTERRUPT,
            VECTORED,
            edge_low,
            edge_high,
            ISA,
            pin,
            IOAPIC_ID,
            pin,
        ]);
    }
    let [conforms_low, conforms_high] = CONFORMS.to_le_bytes();
    entry(&[
        LOCAL_INTERRUPT,
        EXTERNAL,
        conforms_low,
        conforms_high,
        ISA,
        0,
        0,
        0,
    ]);
    entry(&[
        LOCAL_INTERRUPT,
        NON_MASKABLE,
        conforms_low,
        conforms_high,
        ISA,
        0,
        ALL_LOCAL_APICS,
        1,
    ]);

    let mut header = Vec::with_capacity(HEADER_SIZE);
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&((HEADER_SIZE + entries.len()) as u16).to_le_bytes());
    header.extend_from_slice(&[SPECIFICATION_1_4, 0]);
    header.extend_from_slice(b"KATA-RS ");
    header.extend_from_slice(b"MICROVM     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&(layout::LAPIC_BASE as u32).to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header[7] = complement([&header[..], &entries[..]].concat().as_slice());

    let mut pointer = [0; POINTER_SIZE];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(layout::MP_TABLE as u32 + POINTER_SIZE as u32).to_le_bytes());
    pointer[8] = (POINTER_SIZE / 16) as u8;
    pointer[9] = SPECIFICATION_1_4;
    pointer[10] = complement(&pointer);

    [&pointer[..], &header[..], &entries[..]].concat()
}

/// The byte that makes the sum of all zero.
fn complement(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_one_that_a_kernel_accepts() {
        let bytes = table(3, 7);
        let (pointer, table) = bytes.split_at(POINTER_SIZE);
        assert_eq!(complement(pointer), 0);
        assert_eq!(complement(table), 0);
        assert_eq!(u16::from_le_bytes([table[4], table[5]]) as usize, table.len());
        // 3 processors, 1 bus, 1 IOAPIC, 7 pins, 2 local interrupts.
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), 14);
        assert_eq!(table.len(), HEADER_SIZE + 3 * 20 + 11 * 8);
        let flags: Vec<_> = table[HEADER_SIZE..]
            .chunks(20)
            .take(3)
            .map(|entry| (entry[1], entry[3]))
            .collect();
        assert_eq!(flags, [(0, 3), (1, 1), (2, 1)]);
    }

    #[test]
    fn the_most_processors_fit() {
        assert!(table(255, 24).len() <= layout::MP_TABLE_SIZE);
    }
}
