//! A descriptor chain, checked once and kept as a copy: what a device reads from it and writes into it.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use crate::memory::GuestMemory;
use crate::pluggable::{Hold, Pluggable};

/// The most buffers in one chain: what one readv(2) takes (`IOV_MAX`).
pub const MAX_SEGMENTS: usize = 1024;

/// One buffer of a chain; it lies within guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub address: GuestAddress,
    /// Length in bytes, at least 1.
    pub length: u32,
}

/// Why descriptors are no chain.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A descriptor lies outside its table, the chain loops, or an indirect table is malformed.
    #[error("chain {head} does not end: bad index, loop, or bad indirect table")]
    Unterminated {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// The chain has more buffers than [`MAX_SEGMENTS`].
    #[error("chain {head} has more than {MAX_SEGMENTS} buffers")]
    TooManySegments {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A buffer lies outside guest memory, or in memory that is not plugged.
    #[error("chain {head} has a buffer of {length} bytes at {address:#x}, outside of memory")]
    OutOfMemory {
        /// Index of the chain's first descriptor.
        head: u16,
        /// Guest-physical address of the buffer.
        address: u64,
        /// Length of the buffer.
        length: u32,
    },
    /// A buffer for the device to read follows one for it to write (specification section 2.7.4.2).
    #[error("chain {head} has a readable buffer after a writable one")]
    Order {
        /// Index of the chain's first descriptor.
        head: u16,
    },
}

/// A request does not fit into its chain.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the chain is too short: {wanted} bytes at {offset} of {length}")]
pub struct TooShort {
    /// Where in the chain's bytes.
    pub offset: usize,
    /// How many were wanted.
    pub wanted: usize,
    /// How many the chain has.
    pub length: usize,
}

/// Where buffers of a chain lie in this process, for readv(2) and its kin. Reused from request to request.
///
/// The addresses are good as long as guest memory is mapped. The guest may change the bytes at any time.
#[derive(Default)]
pub struct Iovecs(Vec<libc::iovec>);

// SAFETY: an iovec is a plain address and length, tied to no thread; whoever dereferences it answers for that.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// The list.
    #[must_use]
    pub fn as_slice(&self) -> &[libc::iovec] {
        &self.0
    }

    /// Forgets all addresses.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Forgets the first `count` addresses.
    pub fn discard(&mut self, count: usize) {
        self.0.drain(..count.min(self.0.len()));
    }

    /// Appends bytes of this process. They must stay where they are as long as the list is used.
    pub fn push_own(&mut self, bytes: &mut [u8]) {
        self.0.push(libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        });
    }

    /// Forgets the last address.
    pub fn pop(&mut self) {
        self.0.pop();
    }
}

/// A checked descriptor chain. Reused from request to request so that the hot path does not allocate.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_length: usize,
    writable_length: usize,
}

impl Chain {
    /// Index of the first descriptor: names the chain when it is given back.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers that the driver has filled for the device.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// Buffers that the device fills for the driver.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes in the readable buffers.
    #[must_use]
    pub fn readable_length(&self) -> usize {
        self.readable_length
    }

    /// Bytes in the writable buffers.
    #[must_use]
    pub fn writable_length(&self) -> usize {
        self.writable_length
    }

    /// Guest-physical address of a byte of the writable buffers, if they have so many.
    #[must_use]
    pub fn writable_address(&self, offset: usize) -> Option<GuestAddress> {
        let mut found = None;
        each(&self.writable, self.writable_length, offset, 1, |address, _| {
            found = Some(address);
        })
        .ok()?;
        found
    }

    /// Copies bytes from the readable buffers.
    ///
    /// # Errors
    /// [`TooShort`] when they have fewer than `offset + bytes.len()`.
    pub fn read(&self, memory: &GuestMemory, offset: usize, bytes: &mut [u8]) -> Result<(), TooShort> {
        let mut done = 0;
        each(
            &self.readable,
            self.readable_length,
            offset,
            bytes.len(),
            |address, length| {
                if memory
                    .read_slice(&mut bytes[done..done + length], address)
                    .is_err()
                {
                    bytes[done..done + length].fill(0);
                }
                done += length;
            },
        )
    }

    /// Copies bytes into the writable buffers.
    ///
    /// # Errors
    /// [`TooShort`] when they have fewer than `offset + bytes.len()`; nothing is written then.
    pub fn write(&self, memory: &GuestMemory, offset: usize, bytes: &[u8]) -> Result<(), TooShort> {
        let mut done = 0;
        each(
            &self.writable,
            self.writable_length,
            offset,
            bytes.len(),
            |address, length| {
                // The range was checked when the chain was taken, and is held until it is given back.
                let _ = memory.write_slice(&bytes[done..done + length], address);
                done += length;
            },
        )
    }

    /// Where a part of the readable buffers lies, appended to `into`.
    ///
    /// # Errors
    /// [`TooShort`] when they have fewer than `offset + length` bytes.
    pub fn readable_iovecs(
        &self,
        memory: &GuestMemory,
        offset: usize,
        length: usize,
        into: &mut Iovecs,
    ) -> Result<(), TooShort> {
        iovecs(memory, &self.readable, self.readable_length, offset, length, into)
    }

    /// Where a part of the writable buffers lies, appended to `into`.
    ///
    /// # Errors
    /// [`TooShort`] when they have fewer than `offset + length` bytes.
    pub fn writable_iovecs(
        &self,
        memory: &GuestMemory,
        offset: usize,
        length: usize,
        into: &mut Iovecs,
    ) -> Result<(), TooShort> {
        iovecs(memory, &self.writable, self.writable_length, offset, length, into)
    }

    /// Takes a copy of the chain that begins at `descriptors`' head, and checks it. What it returns keeps the buffers
    /// where they are.
    pub(super) fn fill(
        &mut self,
        memory: &GuestMemory,
        pluggable: Option<&Arc<Pluggable>>,
        mut descriptors: virtio_queue::DescriptorChain<&GuestMemory>,
    ) -> Result<Vec<Hold>, ChainError> {
        let mut holds = Vec::new();
        let head = descriptors.head_index();
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.readable_length = 0;
        self.writable_length = 0;
        // The iterator ends silently on a bad index, a loop or a bad indirect table; the last descriptor then
        // still announces a successor.
        let mut unterminated = true;
        let mut descriptors_seen = 0;
        for descriptor in descriptors.by_ref() {
            unterminated = descriptor.has_next();
            descriptors_seen += 1;
            if descriptors_seen > MAX_SEGMENTS {
                return Err(ChainError::TooManySegments { head });
            }
            let segment = Segment {
                address: descriptor.addr(),
                length: descriptor.len(),
            };
            if segment.length == 0 {
                continue;
            }
            let (address, length) = (segment.address.0, segment.length);
            let outside = ChainError::OutOfMemory {
                head,
                address,
                length,
            };
            if memory.get_slice(segment.address, length as usize).is_err() {
                return Err(outside);
            }
            if let Some(pluggable) = pluggable {
                holds.extend(pluggable.hold(address, length.into()).map_err(|_| outside)?);
            }
            if descriptor.is_write_only() {
                self.writable.push(segment);
                self.writable_length += segment.length as usize;
            } else if self.writable.is_empty() {
                self.readable.push(segment);
                self.readable_length += segment.length as usize;
            } else {
                return Err(ChainError::Order { head });
            }
        }
        if unterminated {
            Err(ChainError::Unterminated { head })
        } else {
            Ok(holds)
        }
    }
}

/// Calls `visit` with each contiguous piece of `length` bytes from `offset`.
fn each(
    segments: &[Segment],
    total: usize,
    offset: usize,
    length: usize,
    mut visit: impl FnMut(GuestAddress, usize),
) -> Result<(), TooShort> {
    if offset.checked_add(length).is_none_or(|end| end > total) {
        return Err(TooShort {
            offset,
            wanted: length,
            length: total,
        });
    }
    let (mut skip, mut left) = (offset, length);
    for segment in segments {
        if left == 0 {
            break;
        }
        let size = segment.length as usize;
        if skip >= size {
            skip -= size;
            continue;
        }
        let piece = left.min(size - skip);
        visit(GuestAddress(segment.address.0 + skip as u64), piece);
        left -= piece;
        skip = 0;
    }
    Ok(())
}

fn iovecs(
    memory: &GuestMemory,
    segments: &[Segment],
    total: usize,
    offset: usize,
    length: usize,
    into: &mut Iovecs,
) -> Result<(), TooShort> {
    each(segments, total, offset, length, |address, length| {
        if let Ok(slice) = memory.get_slice(address, length) {
            into.0.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
    })
}
