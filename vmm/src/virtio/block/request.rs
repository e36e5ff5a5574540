//! What a driver asks of a block device, read once from its chain and checked (specification section 5.2.6).

use vm_memory::Bytes;

use super::QUEUE_SIZE;
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, TooShort};

/// The unit of all sector numbers (section 5.2.6), whatever the block size.
pub const SECTOR: u64 = 512;
/// The most ranges that one request may discard or zero.
pub const MAX_RANGES: u32 = 32;
/// The most sectors per range: 2 GiB, so that one range does not take forever.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// The most data buffers of one request: what an unchained request can have, besides header and status.
pub const MAX_DATA_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Length of the answer to `VIRTIO_BLK_T_GET_ID`.
pub const ID_SIZE: usize = 20;

/// `struct virtio_blk_req` up to the data.
const HEADER: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`.
const RANGE: usize = 16;
/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const FLAG_UNMAP: u32 = 1;

/// What the driver is told about a request, in its last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`.
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`.
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported = 2,
}

/// A part of the device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// Whether the space may be given back.
    pub unmap: bool,
}

/// What is to be done. Data lies in the chain: behind the header, or from the first writable byte on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read `length` bytes into the chain.
    Read {
        /// Where.
        offset: u64,
        /// How much.
        length: usize,
    },
    /// Write `length` bytes from the chain.
    Write {
        /// Where.
        offset: u64,
        /// How much.
        length: usize,
    },
    /// Bring everything that was written to the disk.
    Flush,
    /// The ranges are not needed any more.
    Discard(Vec<Range>),
    /// The ranges shall read as zeroes.
    WriteZeroes(Vec<Range>),
    /// Say the serial number.
    Identify,
}

/// Where the data of a request begins in its readable buffers.
pub const DATA_OFFSET: usize = HEADER;

/// Reads the request in `chain` for a device of `capacity` bytes.
///
/// # Errors
/// [`TooShort`] when there is not even a place for the status: the request cannot be answered.
/// The inner error is what the driver is to be told.
pub fn parse(memory: &GuestMemory, chain: &Chain, capacity: u64) -> Result<Result<Action, Status>, TooShort> {
    let room = chain.writable_length().checked_sub(1);
    let Some(room) = room else {
        return Err(TooShort {
            offset: 0,
            wanted: 1,
            length: 0,
        });
    };
    let mut header = [0; HEADER];
    chain.read(memory, 0, &mut header)?;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut sector = [0; 8];
    sector.copy_from_slice(&header[8..16]);
    let sector = u64::from_le_bytes(sector);
    let data = chain.readable_length() - HEADER;
    Ok(match kind {
        0 => part(sector, room as u64, capacity).map(|offset| Action::Read { offset, length: room }),
        1 => part(sector, data as u64, capacity).map(|offset| Action::Write { offset, length: data }),
        4 => Ok(Action::Flush),
        8 => Ok(Action::Identify),
        11 => ranges(memory, chain, data, capacity, 0).map(Action::Discard),
        13 => ranges(memory, chain, data, capacity, FLAG_UNMAP).map(Action::WriteZeroes),
        _ => Err(Status::Unsupported),
    })
}

/// How many bytes of data a chain holds besides header and status, whatever it asks for.
#[must_use]
pub fn data_length(chain: &Chain) -> usize {
    (chain.readable_length() + chain.writable_length()).saturating_sub(HEADER + 1)
}

/// Checks a part of the device: its offset in bytes.
fn part(sector: u64, length: u64, capacity: u64) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let end = offset.checked_add(length).ok_or(Status::IoError)?;
    if end > capacity || !length.is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    Ok(offset)
}

fn ranges(
    memory: &GuestMemory,
    chain: &Chain,
    data: usize,
    capacity: u64,
    allowed: u32,
) -> Result<Vec<Range>, Status> {
    let count = data / RANGE;
    if count == 0 || count > MAX_RANGES as usize || !data.is_multiple_of(RANGE) {
        return Err(Status::IoError);
    }
    let mut bytes = vec![0; data];
    chain
        .read(memory, HEADER, &mut bytes)
        .map_err(|_| Status::IoError)?;
    let range = |bytes: &[u8]| {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let sector = u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32;
        let (sectors, flags) = (u32_at(8), u32_at(12));
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        let length = u64::from(sectors) * SECTOR;
        let offset = part(sector, length, capacity)?;
        Ok(Range {
            offset,
            length,
            unmap: flags & FLAG_UNMAP != 0,
        })
    };
    bytes.chunks_exact(RANGE).map(range).collect()
}

/// Puts the status into the chain's last byte.
pub fn put_status(memory: &GuestMemory, chain: &Chain, status: Status) {
    if let Some(last) = chain.writable().last() {
        let address = vm_memory::GuestAddress(last.address.0 + u64::from(last.length) - 1);
        // The range was checked when the chain was taken, and is held until it is given back.
        let _ = memory.write_obj(status as u8, address);
    }
}

/// The first status that is not good, or the last.
#[must_use]
pub fn first_failure(mut statuses: impl Iterator<Item = Status>) -> Status {
    statuses
        .find(|status| *status != Status::Ok)
        .unwrap_or(Status::Ok)
}
