//! virtio-fs (specification section 5.11): host directories, by descriptor, in one tree that the guest mounts.
//!
//! This file is the device, its threads, and the handle by which shares come and go. [`tree`] is the file system
//! that the guest sees, [`table`] which shares it is made of, [`share`] one of them, [`request`] the way of a request
//! between queue and tree, [`thread`] what the threads are, [`xattr`] the names of attributes.

mod request;
mod share;
mod table;
#[cfg(test)]
mod tests;
mod thread;
mod tree;
mod xattr;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::api::filesystem::FileSystem as _;
use fuse_backend_rs::api::server::Server;
use protocol::vmm::CachePolicy;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::counter;
use super::queue::{Chain, DeviceQueue, Violations};
use super::worker::{Events, Poller, STOP, Workers};
use super::{ActivateError, Activation, Device, DeviceType, Interrupt};
use request::Carrier;
use share::Share;
use table::{MAX_SHARES, Tree};

/// High priority (forgetting, interrupting) and requests. A request of 1 MiB takes up to 260 descriptors.
const QUEUE_SIZES: &[u16] = &[128, 512];
/// How many requests are worked on at a time: one that waits for the host's disk must not hold all others up.
const THREADS: usize = 2;
/// How many requests a thread answers before it looks up.
const TURN: usize = 64;
/// Length of the tag in the configuration space.
const TAG: usize = 36;

/// Why a share cannot be added or removed.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The name is empty, too long, or more than one path component.
    #[error("{name:?} cannot name a share: it must be one path component of 1 to 255 bytes")]
    Name {
        /// What was given.
        name: String,
    },
    /// There is a share of that name.
    #[error("there is a share named {name:?} already: remove it first")]
    Exists {
        /// The name.
        name: String,
    },
    /// There is no share of that name.
    #[error("there is no share named {name:?}")]
    Absent {
        /// The name.
        name: String,
    },
    /// Only directories can be shared.
    #[error("share {name:?} is not a directory: put a file into a directory of its own and share that")]
    NotADirectory {
        /// The name.
        name: String,
    },
    /// All places in the tree are taken.
    #[error("there are {MAX_SHARES} shares already, which is the most: remove one first")]
    TooMany,
    /// The host refused.
    #[error("the host cannot share the directory: {0}")]
    Host(#[from] io::Error),
}

/// What a snapshot must hold of the device. What the guest has mounted does not survive one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// The name under which the guest mounts the tree.
    pub tag: String,
}

/// The device.
pub struct Fs {
    state: FsState,
    tree: Arc<Tree>,
    counters: Arc<Counters>,
    violations: Arc<Violations>,
    workers: Workers,
}

/// Adds and removes shares, at any time, also while the guest has the tree mounted.
#[derive(Clone)]
pub struct FsHandle(Arc<Tree>);

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    bytes_from_guest: AtomicU64,
    bytes_to_guest: AtomicU64,
}

impl Fs {
    /// A device that the guest mounts by `tag`, of which the first 36 bytes count. There is no share yet.
    #[must_use]
    pub fn new(tag: &str) -> (Self, FsHandle) {
        let tree = Arc::<Tree>::default();
        let handle = FsHandle(tree.clone());
        let state = FsState { tag: tag.to_owned() };
        let device = Self {
            state,
            tree,
            counters: Arc::default(),
            violations: Arc::default(),
            workers: Workers::default(),
        };
        (device, handle)
    }

    /// What a snapshot must hold.
    #[must_use]
    pub fn state(&self) -> FsState {
        self.state.clone()
    }
}

impl FsHandle {
    /// Shows the directory `root` under `name`. Links in it are followed by the guest, within the guest.
    ///
    /// The process must have its own /proc mounted: that is how a directory known by descriptor is opened anew.
    /// The calling thread's umask is cleared.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn add_share(&self, name: &str, root: OwnedFd, cache: CachePolicy) -> Result<(), ShareError> {
        if name.is_empty() || name.len() > 255 || name == "." || name == ".." || name.contains(['/', '\0']) {
            return Err(ShareError::Name {
                name: name.to_owned(),
            });
        }
        self.0
            .add(name, |generation| Share::new(name, root, cache, generation))
    }

    /// Takes a share away. Files that the guest has open stay readable until it closes them; with the last one
    /// the directory is let go.
    ///
    /// # Errors
    /// [`ShareError::Absent`].
    pub fn remove_share(&self, name: &str) -> Result<(), ShareError> {
        self.0.remove(name)
    }
}

impl Device for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::FileSystem
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; TAG + 4];
        let length = self.state.tag.len().min(TAG);
        space[..length].copy_from_slice(&self.state.tag.as_bytes()[..length]);
        // One request queue.
        space[TAG] = 1;
        super::copy_config(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt.clone();
        let queues: [DeviceQueue; 2] = DeviceQueue::take(activation, "fs", &self.violations)?;
        self.workers = Workers::new()?;
        let poller = self.workers.poller()?;
        for (index, queue) in queues.iter().enumerate() {
            poller.add_event(queue.notify(), index as u64)?;
        }
        let memory = queues[0].memory().clone();
        let server = Arc::new(Server::new(self.tree.clone()));
        let shared = Arc::new(Shared {
            queues: queues.map(Mutex::new),
            interrupt,
            poller,
            idle: AtomicUsize::new(0),
            counters: self.counters.clone(),
        });
        for number in 0..THREADS {
            let shared = shared.clone();
            let carrier = Carrier::new(server.clone(), &memory)?;
            self.workers.spawn(&format!("fs{number}"), move || {
                // Without an umask of its own a thread would make files with that of another's request.
                if thread::prepare().is_ok() {
                    shared.run(carrier);
                }
            })?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.stop();
        // The driver is gone, and with it everything that it had looked up and opened.
        self.tree.destroy();
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let counted = [
            ("requests", &self.counters.requests),
            ("bytes_from_guest", &self.counters.bytes_from_guest),
            ("bytes_to_guest", &self.counters.bytes_to_guest),
        ];
        counter::report(counted, &self.violations)
    }
}

/// What the threads share.
struct Shared {
    queues: [Mutex<DeviceQueue>; 2],
    interrupt: Interrupt,
    poller: Poller,
    /// How many threads wait.
    idle: AtomicUsize,
    counters: Arc<Counters>,
}

impl Shared {
    fn run(&self, mut carrier: Carrier) {
        let mut events = Events::default();
        let mut chain = Chain::default();
        loop {
            for index in 0..self.queues.len() {
                // Bounded, so that a busy queue delays neither the other one nor the order to stop for long.
                for _ in 0..TURN {
                    if !self.take(index, &mut chain) {
                        break;
                    }
                    self.answer(index, &mut carrier, &chain);
                }
            }
            // First idle, then looking: a thread that takes a request and leaves another sees this one idle, or
            // this one sees the other request.
            self.idle.fetch_add(1, Ordering::SeqCst);
            let more = (0..self.queues.len()).any(|index| self.lock(index).rearm());
            let result = self.poller.wait(&mut events, !more);
            self.idle.fetch_sub(1, Ordering::SeqCst);
            match result {
                Ok(events) if events.iter().all(|event| event.data() != STOP) => {}
                _ => return,
            }
        }
    }

    fn answer(&self, index: usize, carrier: &mut Carrier, chain: &Chain) {
        let result = carrier.carry(chain);
        let mut queue = self.lock(index);
        let written = result.unwrap_or_else(|error| {
            queue.violation(&error);
            0
        });
        queue.push(chain.head(), written);
        let wanted = queue.wants_interrupt();
        drop(queue);
        if wanted {
            self.interrupt.used();
        }
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        self.counters
            .bytes_from_guest
            .fetch_add(chain.readable_length() as u64, Ordering::Relaxed);
        self.counters
            .bytes_to_guest
            .fetch_add(written as u64, Ordering::Relaxed);
    }

    /// Takes the next request of a queue, and sees to it that another thread takes what follows.
    fn take(&self, index: usize, chain: &mut Chain) -> bool {
        let mut queue = self.lock(index);
        loop {
            let taken = queue.pop(chain);
            let more = queue.rearm();
            if taken {
                if more && self.idle.load(Ordering::SeqCst) > 0 {
                    // The driver has notified once for all of them. A failure means that it is signalled already.
                    let _ = queue.notify().write(1);
                }
                return true;
            }
            if !more {
                return false;
            }
        }
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, DeviceQueue> {
        self.queues[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
