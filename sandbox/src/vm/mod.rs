//! The VMM process of a sandbox: spawning it with everything it needs as open descriptors, its requests and
//! answers, and its end. What travels inside the VM (agent, standard I/O) is not known here.

mod end;
mod error;
mod launch;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::stream::VsockOpen;
use protocol::vmm::{
    BlockBacking, BlockExtent, CachePolicy, Failure, FdIndex, Metrics, NetBacking, Reply, Request,
    RequestBody, Share, Timeline,
};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};

use crate::limits::DeviceLimits;
use crate::seqpacket::Seqpacket;
use crate::spawn::{Child, Ended};
use crate::storage::Disk;

pub use end::VmExit;
pub(crate) use end::console_words;
pub use error::VmError;
pub(crate) use launch::{launch, set_oom_score};

/// How long the VMM may take to answer. Everything it does is a matter of milliseconds; attaching waits for
/// requests in flight on slow storage.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

type Answer = Result<Reply, Failure>;

/// Requests that wait for their answers.
#[derive(Debug, Default)]
struct Pending {
    next: u64,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    closed: bool,
}

/// Block slots: which are free.
#[derive(Debug)]
struct Slots {
    free: VecDeque<u32>,
    all: usize,
    /// How many slots precede the first that can be filled.
    first: u32,
}

/// A running VMM.
#[derive(Debug)]
pub(crate) struct Vm {
    child: Arc<Child>,
    control: Arc<Seqpacket>,
    vsock: Arc<Seqpacket>,
    pending: Arc<Mutex<Pending>>,
    slots: Mutex<Slots>,
    limits: DeviceLimits,
    /// Bytes that the guest had plugged when it last had as much as it was asked to have.
    plugged: watch::Sender<u64>,
    exit: watch::Receiver<Option<Arc<VmExit>>>,
}

/// A filled block slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AttachedBlock {
    pub slot: u32,
    /// What the guest reads as the device's serial.
    pub serial: String,
}

/// Serial of the n-th slot that can be filled.
fn slot_serial(index: u32) -> String {
    format!("kata-rs-{index}")
}

impl Vm {
    /// Pid of the VMM.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Kills the VMM.
    pub fn kill(&self) {
        self.child.kill();
    }

    /// Waits until the VMM has ended and was reaped.
    pub async fn exited(&self) -> Arc<VmExit> {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.map(|exit| exit.clone()) {
            Ok(Some(exit)) => exit,
            // The task that watches the process went down with the runtime.
            _ => Arc::new(VmExit {
                cause: None,
                console: String::new(),
                ended: Ended::Unknown,
                stderr: String::new(),
            }),
        }
    }

    /// Shows a directory to the guest.
    pub async fn add_share(
        &self,
        name: &str,
        directory: BorrowedFd<'_>,
        cache: CachePolicy,
    ) -> Result<(), VmError> {
        let body = RequestBody::AddShare(Share {
            name: name.to_owned(),
            fd: FdIndex(0),
            cache,
        });
        self.request("share a directory", body, &[directory])
            .await
            .map(drop)
    }

    /// Takes a directory away from the guest.
    pub async fn remove_share(&self, name: &str) -> Result<(), VmError> {
        let body = RequestBody::RemoveShare {
            name: name.to_owned(),
        };
        self.request("stop sharing a directory", body, &[])
            .await
            .map(drop)
    }

    /// Puts a disk into a free block slot.
    pub async fn attach_disk(&self, disk: &Disk) -> Result<AttachedBlock, VmError> {
        let (index, first) = {
            let mut slots = lock(&self.slots);
            let all = slots.all;
            (slots.free.pop_front().ok_or(VmError::NoSlot(all))?, slots.first)
        };
        let body = RequestBody::AttachBlock {
            slot: first + index,
            backing: BlockBacking {
                extents: (0..)
                    .zip(&disk.parts)
                    .map(|(index, part)| BlockExtent {
                        fd: FdIndex(index),
                        length: Some(part.length),
                        read_only: part.read_only,
                    })
                    .collect(),
                limit: self.limits.block.rate_limit(),
            },
        };
        let fds: Vec<_> = disk.parts.iter().map(|part| part.fd.as_fd()).collect();
        match self.request("attach a block device", body, &fds).await {
            Ok(_) => Ok(AttachedBlock {
                slot: index,
                serial: slot_serial(index),
            }),
            Err(error) => {
                // A slot whose state is not known is not used again.
                if matches!(error, VmError::Refused { .. }) {
                    lock(&self.slots).free.push_front(index);
                }
                Err(error)
            }
        }
    }

    /// Empties a block slot.
    pub async fn detach_block(&self, block: &AttachedBlock) -> Result<(), VmError> {
        let slot = lock(&self.slots).first + block.slot;
        let body = RequestBody::DetachBlock { slot };
        self.request("detach a block device", body, &[]).await?;
        lock(&self.slots).free.push_back(block.slot);
        Ok(())
    }

    /// Gives the n-th network device its tap.
    pub async fn attach_net(&self, slot: usize, tap: BorrowedFd<'_>) -> Result<(), VmError> {
        let body = RequestBody::AttachNet {
            slot: u32::try_from(slot).unwrap_or(u32::MAX),
            backing: NetBacking {
                tap: FdIndex(0),
                receive_limit: self.limits.net_rx.rate_limit(),
                transmit_limit: self.limits.net_tx.rate_limit(),
            },
        };
        self.request("connect a network device", body, &[tap])
            .await
            .map(drop)
    }

    /// Takes the n-th network device's tap away: its cable is out.
    pub async fn detach_net(&self, slot: usize) -> Result<(), VmError> {
        let body = RequestBody::DetachNet {
            slot: u32::try_from(slot).unwrap_or(u32::MAX),
        };
        self.request("disconnect a network device", body, &[])
            .await
            .map(drop)
    }

    /// Makes vCPUs until there are `count`.
    pub async fn set_vcpus(&self, count: u8) -> Result<(), VmError> {
        self.request("make vCPUs", RequestBody::SetVcpus { count }, &[])
            .await
            .map(drop)
    }

    /// Connects to a vsock port of the guest. A guest that refuses, or has none, shows as an end of what is read.
    pub async fn connect_guest(&self, port: u32) -> Result<UnixStream, VmError> {
        let what = "connect to the guest";
        let (ours, theirs) = UnixStream::pair().map_err(VmError::Channel)?;
        let theirs = theirs.into_std().map_err(VmError::Channel)?;
        let message = serde_json::to_vec(&VsockOpen { port }).expect("a message has string keys only");
        match self.vsock.send(&message, &[theirs.as_fd()]).await {
            Ok(()) => Ok(ours),
            Err(cause) => Err(self.send_error(what, cause).await),
        }
    }

    /// Asks the guest to have this much memory plugged, and waits until it has, `limit` long at most: false when it
    /// has not followed by then. It goes on trying.
    pub async fn set_plugged_memory(&self, mib: u32, limit: Duration) -> Result<bool, VmError> {
        let wanted = u64::from(mib) << 20;
        let mut plugged = self.plugged.subscribe();
        plugged.mark_unchanged();
        self.request("plug memory", RequestBody::SetPluggedMemory { mib }, &[])
            .await?;
        let reached = async {
            // A word of an earlier request may still be on its way.
            while plugged.changed().await.is_ok() {
                if *plugged.borrow_and_update() == wanted {
                    break;
                }
            }
        };
        tokio::select! {
            reached = tokio::time::timeout(limit, reached) => Ok(reached.is_ok()),
            exit = self.exited() => Err(VmError::Gone(exit)),
        }
    }

    /// Counters of the VM.
    pub async fn metrics(&self) -> Result<Metrics, VmError> {
        let what = "report its counters";
        match self.request(what, RequestBody::Metrics, &[]).await? {
            Reply::Metrics(metrics) => Ok(metrics),
            _ => Err(VmError::WrongAnswer { what }),
        }
    }

    /// The boot timeline.
    pub async fn timeline(&self) -> Result<Timeline, VmError> {
        let what = "report its boot timeline";
        match self.request(what, RequestBody::Timeline, &[]).await? {
            Reply::Timeline(timeline) => Ok(timeline),
            _ => Err(VmError::WrongAnswer { what }),
        }
    }

    async fn request(
        &self,
        what: &'static str,
        body: RequestBody,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, VmError> {
        let (id, answer) = self.register().await?;
        let message = encode(id, body);
        if let Err(cause) = self.control.send(&message, fds).await {
            lock(&self.pending).waiting.remove(&id);
            return Err(self.send_error(what, cause).await);
        }
        self.answer(what, answer).await
    }

    /// Sends without waiting: for the first requests on a fresh channel, which has room for them.
    fn send_now(
        &self,
        what: &'static str,
        body: RequestBody,
        fds: &[BorrowedFd<'_>],
    ) -> Result<oneshot::Receiver<Answer>, VmError> {
        let (id, answer) = {
            let mut pending = lock(&self.pending);
            pending.register()
        };
        match self.control.try_send(&encode(id, body), fds) {
            Ok(()) => Ok(answer),
            // A VMM that died at once has closed its end; why shows when its answer is waited for.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => Ok(answer),
            Err(cause) => Err(VmError::Send { what, cause }),
        }
    }

    async fn register(&self) -> Result<(u64, oneshot::Receiver<Answer>), VmError> {
        let registered = {
            let mut pending = lock(&self.pending);
            (!pending.closed).then(|| pending.register())
        };
        match registered {
            Some(registered) => Ok(registered),
            None => Err(VmError::Gone(self.exited().await)),
        }
    }

    async fn send_error(&self, what: &'static str, cause: io::Error) -> VmError {
        if cause.raw_os_error() == Some(libc::EPIPE) {
            VmError::Gone(self.exited().await)
        } else {
            VmError::Send { what, cause }
        }
    }

    async fn answer(&self, what: &'static str, answer: oneshot::Receiver<Answer>) -> Result<Reply, VmError> {
        match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(Ok(reply))) => Ok(reply),
            Ok(Ok(Err(cause))) => Err(VmError::Refused { what, cause }),
            Ok(Err(_dropped)) => Err(VmError::Gone(self.exited().await)),
            Err(_elapsed) => Err(VmError::Silent { what }),
        }
    }
}

impl Pending {
    fn register(&mut self) -> (u64, oneshot::Receiver<Answer>) {
        self.next += 1;
        let (sender, receiver) = oneshot::channel();
        self.waiting.insert(self.next, sender);
        (self.next, receiver)
    }
}

fn encode(id: u64, body: RequestBody) -> Vec<u8> {
    serde_json::to_vec(&Request { id, body }).expect("requests have string keys only")
}

/// No holder of these locks can panic half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
