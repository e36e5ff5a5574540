//! One FUSE request: from a checked chain to the file system and back.
//!
//! The FUSE library takes a descriptor chain and walks it itself. It must not walk the driver's own table, which
//! the guest can change at any time; so it walks a copy of what was checked, in a table of ours that lies beside
//! guest memory and that no vCPU can reach.

use std::sync::Arc;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestRegionMmap};

use super::table::Tree;
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, MAX_SEGMENTS};

/// The most bytes of a request, or of its answer: 1 MiB of data, its headers, and names.
const MAX_MESSAGE: usize = (1 << 20) + (64 << 10);
/// `struct fuse_in_header`.
const IN_HEADER: usize = 40;
/// `struct fuse_out_header`: length, error, and the request's id.
const OUT_HEADER: usize = 16;

const DESCRIPTOR: usize = 16;
const AVAILABLE: u64 = (MAX_SEGMENTS * DESCRIPTOR) as u64;
/// Flags, index, ring, event; what comes next must be aligned to 4.
const USED: u64 = (AVAILABLE + 6 + 2 * MAX_SEGMENTS as u64).next_multiple_of(4);
const SIZE: usize = (USED as usize + 6 + 8 * MAX_SEGMENTS).next_multiple_of(4096);

/// Why a request was not even given to the file system.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// More than any request or answer can need.
    #[error("a request of {readable} bytes with room for {writable} is larger than {MAX_MESSAGE}")]
    TooLarge {
        /// Bytes from the driver.
        readable: usize,
        /// Bytes for the driver.
        writable: usize,
    },
    /// Less than a header, or no room for an answer's.
    #[error("a request of {readable} bytes with room for {writable} holds no FUSE header")]
    TooShort {
        /// Bytes from the driver.
        readable: usize,
        /// Bytes for the driver.
        writable: usize,
    },
    /// The table beside guest memory is out of order.
    #[error("a request cannot be copied: {0}")]
    Copy(String),
}

/// Carries requests of one thread.
pub struct Carrier {
    server: Arc<Server<Arc<Tree>>>,
    /// Guest memory, and behind it the table.
    memory: GuestMemory,
    queue: Queue,
    base: GuestAddress,
    taken: u16,
}

impl Carrier {
    /// A carrier for requests in `memory`.
    ///
    /// # Errors
    /// When the host has no memory for the table.
    pub fn new(server: Arc<Server<Arc<Tree>>>, memory: &GuestMemory) -> std::io::Result<Self> {
        let failed =
            |error: String| std::io::Error::other(format!("no room for a descriptor table: {error}"));
        let base = GuestAddress((memory.last_addr().0 + 1).next_multiple_of(1 << 30));
        let region = GuestRegionMmap::from_range(base, SIZE, None).map_err(|e| failed(e.to_string()))?;
        let memory = memory
            .insert_region(Arc::new(region))
            .map_err(|e| failed(e.to_string()))?;
        let mut queue = Queue::new(MAX_SEGMENTS as u16).map_err(|e| failed(e.to_string()))?;
        queue
            .try_set_desc_table_address(base)
            .map_err(|e| failed(e.to_string()))?;
        queue
            .try_set_avail_ring_address(GuestAddress(base.0 + AVAILABLE))
            .map_err(|e| failed(e.to_string()))?;
        queue
            .try_set_used_ring_address(GuestAddress(base.0 + USED))
            .map_err(|e| failed(e.to_string()))?;
        queue.set_ready(true);
        Ok(Self {
            server,
            memory,
            queue,
            base,
            taken: 0,
        })
    }

    /// Answers a request: how many bytes were written into the chain.
    ///
    /// # Errors
    /// [`RequestError`] when the file system has not seen it; nothing was written then.
    pub fn carry(&mut self, chain: &Chain) -> Result<usize, RequestError> {
        let (readable, writable) = (chain.readable_length(), chain.writable_length());
        if readable > MAX_MESSAGE || writable > MAX_MESSAGE {
            return Err(RequestError::TooLarge { readable, writable });
        }
        if readable < IN_HEADER || writable > 0 && writable < OUT_HEADER {
            return Err(RequestError::TooShort { readable, writable });
        }
        let answered = writable > 0;
        if answered {
            // So that it shows afterwards whether there was an answer: the library reports errors either way.
            let _ = chain.write(&self.memory, 0, &[0; OUT_HEADER]);
        }
        let copy = copy_chain(&mut self.queue, &self.memory, self.base, &mut self.taken, chain)?;
        let reader = Reader::from_descriptor_chain(&self.memory, copy.clone());
        let writer = VirtioFsWriter::new(&self.memory, copy);
        let (Ok(reader), Ok(writer)) = (reader, writer) else {
            return Err(RequestError::Copy("the chain is not what was written".to_owned()));
        };
        let result = self
            .server
            .handle_message(reader, Writer::VirtioFs(writer), None, None);
        if !answered {
            return Ok(0);
        }
        match result {
            Ok(written) if written >= OUT_HEADER => Ok(written.min(writable)),
            _ => Ok(self.close_answer(chain, writable)),
        }
    }

    /// Length of the answer that is in the chain; an error is put there if there is none.
    fn close_answer(&self, chain: &Chain, writable: usize) -> usize {
        let mut length = [0; 4];
        if let Some(first) = chain.writable().first() {
            let part = length.len().min(first.length as usize);
            let _ = self.memory.read_slice(&mut length[..part], first.address);
        }
        let length = u32::from_le_bytes(length) as usize;
        if length >= OUT_HEADER {
            return length.min(writable);
        }
        let mut header = [0; IN_HEADER];
        let _ = chain.read(&self.memory, 0, &mut header);
        let mut answer = [0; OUT_HEADER];
        answer[0..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
        answer[4..8].copy_from_slice(&(-libc::EIO).to_le_bytes());
        answer[8..16].copy_from_slice(&header[8..16]);
        let _ = chain.write(&self.memory, 0, &answer);
        OUT_HEADER
    }
}

/// Copies a chain into the table at `base`, from where it is taken like any other.
fn copy_chain<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    base: GuestAddress,
    taken: &mut u16,
    chain: &Chain,
) -> Result<DescriptorChain<&'m GuestMemory>, RequestError> {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let failed = |error: vm_memory::GuestMemoryError| RequestError::Copy(error.to_string());
    let segments = chain.readable().iter().map(|segment| (segment, 0));
    let segments = segments.chain(chain.writable().iter().map(|segment| (segment, WRITE)));
    let count = chain.readable().len() + chain.writable().len();
    let mut table = Vec::with_capacity(count * DESCRIPTOR);
    for (index, (segment, direction)) in segments.enumerate() {
        let last = index + 1 == count;
        let next = if last { 0 } else { index as u16 + 1 };
        table.extend_from_slice(&segment.address.0.to_le_bytes());
        table.extend_from_slice(&segment.length.to_le_bytes());
        table.extend_from_slice(&(direction | if last { 0 } else { NEXT }).to_le_bytes());
        table.extend_from_slice(&next.to_le_bytes());
    }
    memory.write_slice(&table, base).map_err(failed)?;
    // Every entry of the ring is zero for good: the head is always the first descriptor.
    *taken = taken.wrapping_add(1);
    memory
        .write_obj(taken.to_le(), GuestAddress(base.0 + AVAILABLE + 2))
        .map_err(failed)?;
    queue
        .pop_descriptor_chain(memory)
        .ok_or_else(|| RequestError::Copy("the ring is empty".to_owned()))
}
