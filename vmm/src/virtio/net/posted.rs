//! Buffers that the driver has posted for frames to come, ready for readv(2).
//!
//! How long the next frame is shows only when it has been read, so there must be room for the longest before. Chains
//! are taken and checked once and wait here until frames fill them, however many reads that takes.

use std::collections::VecDeque;

use vm_memory::{Bytes, GuestAddress};

use super::header::{self, MAX_FRAME};
use super::tap::{Obstacle, Tap};
use crate::virtio::queue::{Chain, DeviceQueue, Iovecs, MAX_SEGMENTS};

/// What is wrong with a buffer for frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BufferError {
    /// The device is to write into it, not to read.
    #[error("a buffer for frames has {0} bytes that the device must not write")]
    Readable(usize),
    /// Not even the header fits.
    #[error("a buffer for frames has {0} bytes, the header alone has {length}", length = header::LENGTH)]
    Short(usize),
    /// More pieces than can be read into at once.
    #[error("a buffer for frames has {0} pieces")]
    Pieces(usize),
}

/// The most pieces of all posted buffers: one more is for finding out what did not fit.
const MAX_PIECES: usize = MAX_SEGMENTS - 1;

/// The buffers.
pub struct Posted {
    /// Whether a frame may fill more than one chain.
    mergeable: bool,
    buffers: VecDeque<Buffer>,
    /// Of all buffers, in their order.
    pieces: Iovecs,
    /// Bytes of all buffers.
    length: usize,
    /// Whether the next chain has more pieces than there is room for.
    full: bool,
    /// Takes the first byte that does not fit.
    excess: Box<[u8; 1]>,
}

struct Buffer {
    head: u16,
    pieces: usize,
    length: usize,
    /// Where the two bytes of `num_buffers` go, if a frame begins here.
    num_buffers: [GuestAddress; 2],
}

impl Posted {
    /// None yet. A frame may fill several chains when they are `mergeable`.
    #[must_use]
    pub fn new(mergeable: bool) -> Self {
        Self {
            mergeable,
            buffers: VecDeque::new(),
            pieces: Iovecs::default(),
            length: 0,
            full: false,
            excess: Box::default(),
        }
    }

    /// Takes chains from the driver until the longest frame fits or there are no more, at most a queue's worth.
    pub fn fill(&mut self, queue: &mut DeviceQueue, chain: &mut Chain) {
        for _ in 0..queue.size() {
            if self.has_enough() || !queue.pop(chain) {
                break;
            }
            if let Err(error) = self.add(queue, chain) {
                queue.violation(&error);
                queue.push(chain.head(), 0);
            }
        }
    }

    /// Whether the longest frame fits.
    #[must_use]
    pub fn has_enough(&self) -> bool {
        self.full || self.length >= MAX_FRAME || !self.mergeable && !self.buffers.is_empty()
    }

    fn add(&mut self, queue: &mut DeviceQueue, chain: &Chain) -> Result<(), BufferError> {
        let (length, pieces) = (chain.writable_length(), chain.writable().len());
        if chain.readable_length() > 0 {
            return Err(BufferError::Readable(chain.readable_length()));
        }
        if pieces > MAX_PIECES {
            return Err(BufferError::Pieces(pieces));
        }
        let address = |byte| chain.writable_address(header::NUM_BUFFERS + byte);
        let (Some(low), Some(high)) = (address(0), address(1)) else {
            return Err(BufferError::Short(length));
        };
        if self.pieces.as_slice().len() + pieces > MAX_PIECES {
            queue.unpop();
            self.full = true;
            return Ok(());
        }
        chain
            .writable_iovecs(queue.memory(), 0, length, &mut self.pieces)
            .map_err(|_| BufferError::Short(length))?;
        self.length += length;
        self.buffers.push_back(Buffer {
            head: chain.head(),
            pieces,
            length,
            num_buffers: [low, high],
        });
        Ok(())
    }

    /// Whether no frame fits at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// Reads one frame into the buffers: its length with the header, or `None` when it did not fit and is lost.
    ///
    /// # Errors
    /// [`Obstacle`].
    pub fn read(&mut self, tap: &Tap) -> Result<Option<usize>, Obstacle> {
        self.pieces.push_own(&mut *self.excess);
        let outcome = tap.read(&self.pieces);
        self.pieces.pop();
        let length = outcome?;
        if length < header::LENGTH {
            return Err(Obstacle::Refused);
        }
        Ok((length <= self.length).then_some(length))
    }

    /// Takes away the buffers that a frame of `length` bytes has filled, and says in its header how many they are.
    /// `used` gets each one's head and how much of it is filled.
    pub fn take(&mut self, queue: &DeviceQueue, length: usize, used: &mut Vec<(u16, usize)>) {
        used.clear();
        let header = self.buffers.front().map(|first| first.num_buffers);
        let (mut left, mut pieces) = (length, 0);
        while left > 0
            && let Some(buffer) = self.buffers.pop_front()
        {
            let filled = left.min(buffer.length);
            used.push((buffer.head, filled));
            left -= filled;
            pieces += buffer.pieces;
            self.length -= buffer.length;
        }
        self.pieces.discard(pieces);
        self.full = false;
        if let Some(addresses) = header {
            let count = (used.len() as u16).to_le_bytes();
            for (byte, address) in count.iter().zip(addresses) {
                // The address was checked when the chain was taken, and is held until it is given back.
                let _ = queue.memory().write_obj(*byte, address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_driver::{Descriptor, Driver, INDIRECT, NEXT, WRITE};

    fn queue(driver: &mut Driver) -> DeviceQueue {
        let [queue] = DeviceQueue::take(driver.activation(0), "net", &std::sync::Arc::default()).unwrap();
        queue
    }

    #[test]
    fn memory_under_a_posted_buffer_stays_until_a_frame_has_filled_it() {
        let mut driver = Driver::new(&[16]);
        let (memory, pluggable) = crate::pluggable::reserve(&driver.memory, 128).unwrap();
        pluggable.open(0).unwrap();
        driver.memory = memory;
        driver.pluggable = Some(pluggable.clone());
        let piece = |address, length, next| Descriptor {
            address,
            length,
            flags: if next == 0 { WRITE } else { WRITE | NEXT },
            next,
        };
        let chain = [
            piece(Driver::DATA, 10, 1),
            piece(pluggable.range().guest, 2, 2),
            piece(Driver::DATA + 16, 1500, 0),
        ];
        driver.write_descriptors(0, &chain);
        driver.offer(0, 0);
        let mut queue = queue(&mut driver);
        let mut posted = Posted::new(true);
        posted.fill(&mut queue, &mut Chain::default());
        assert!(!posted.is_empty());
        assert!(!pluggable.close(0).unwrap());
        let mut used = Vec::new();
        posted.take(&queue, 100, &mut used);
        assert_eq!(used, [(0, 100)]);
        assert!(posted.is_empty() && posted.pieces.as_slice().is_empty());
        let header = GuestAddress(pluggable.range().guest);
        assert_eq!(driver.memory.read_obj::<u16>(header).unwrap(), 1);
        queue.push_all(&used);
        assert!(pluggable.close(0).unwrap());
    }

    #[test]
    fn never_more_pieces_are_posted_than_can_be_read_into() {
        let mut driver = Driver::new(&[16]);
        let table = Driver::DATA;
        let pieces: Vec<_> = (0..MAX_SEGMENTS as u16)
            .map(|index| Descriptor {
                address: Driver::DATA + 0x10_0000,
                length: 1,
                flags: if usize::from(index) == MAX_SEGMENTS - 1 {
                    WRITE
                } else {
                    WRITE | NEXT
                },
                next: index + 1,
            })
            .collect();
        driver.write_table(table, &pieces);
        let chain_of = |count: usize| Descriptor {
            address: table,
            length: count as u32 * 16,
            flags: INDIRECT,
            next: 0,
        };
        driver.write_descriptors(0, &[chain_of(MAX_SEGMENTS)]);
        driver.offer(0, 0);
        let mut queue = queue(&mut driver);
        let mut posted = Posted::new(true);
        posted.fill(&mut queue, &mut Chain::default());
        assert!(
            posted.is_empty() && !queue.is_stopped(),
            "given back, and counted"
        );

        // One of 600 pieces fits, a second one has to wait.
        let end = Descriptor {
            flags: WRITE,
            ..pieces[599]
        };
        driver.write_table(table + 599 * 16, &[end]);
        driver.write_descriptors(0, &[chain_of(600); 2]);
        driver.offer(0, 0);
        driver.offer(0, 1);
        posted.fill(&mut queue, &mut Chain::default());
        assert!(posted.full && posted.has_enough());
        assert_eq!((posted.buffers.len(), posted.length), (1, 600));
        let mut used = Vec::new();
        posted.take(&queue, 600, &mut used);
        posted.fill(&mut queue, &mut Chain::default());
        assert_eq!(
            (posted.buffers.len(), posted.length),
            (1, 600),
            "the one that waited"
        );
    }
}
