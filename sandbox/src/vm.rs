//! The VMM process of a sandbox: spawning it with everything it needs as open descriptors, its requests and
//! answers, and its end. What travels inside the VM (agent, standard I/O) is not known here.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::channel::Received;
use protocol::vmm::{
    BlockBacking, BlockSlot, CONTROL_FD, CONTROL_VERSION, CachePolicy, Event, ExitCause, Failure,
    FailureKind, FdIndex, FromVmm, Metrics, Reply, Request, RequestBody, Share, Timeline, VmConfig,
};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};

use crate::boot_files::{self, BootFileError, ImageKind};
use crate::config::Config;
use crate::error::{ErrorKind, kind_of_io};
use crate::seqpacket::Seqpacket;
use crate::spawn::{Child, Command, Ended, SpawnError};
use crate::spec::SandboxSpec;

/// The tag under which the agent mounts the virtio-fs root.
const FS_TAG: &str = "kata-rs";
/// How long the VMM may take to answer. Everything it does is a matter of milliseconds; attaching waits for
/// requests in flight on slow storage.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How much of what the VMM says on its standard error is kept for messages.
const STDERR_KEPT: usize = 4096;
/// The serial of the guest image, when it is a block device.
const IMAGE_SERIAL: &str = "kata-rs-image";

/// What went wrong with a VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Something that the VM boots from is missing.
    #[error(transparent)]
    BootFile(#[from] BootFileError),
    /// The VMM's program is missing.
    #[error(
        "the VMM {0} does not exist: `make install` puts it there, and the key `vmm` of the configuration names it"
    )]
    NoVmm(PathBuf),
    /// The VMM could not be spawned.
    #[error("the VMM {path} cannot be started: {stage}")]
    Spawn {
        /// Its program.
        path: PathBuf,
        /// What failed: a part of spawning, and the kernel's error.
        stage: String,
        /// The kernel's error.
        cause: io::Error,
    },
    /// A socket or pipe for the VMM could not be made.
    #[error("a channel to the VMM cannot be made")]
    Channel(#[source] io::Error),
    /// A request could not be sent.
    #[error("the VMM cannot be asked to {what}")]
    Send {
        /// The request.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The VMM refused a request.
    #[error("the VMM could not {what}")]
    Refused {
        /// The request.
        what: &'static str,
        /// Its answer.
        #[source]
        cause: Failure,
    },
    /// The VMM did not answer.
    #[error("the VMM did not answer the request to {what} for {} s", ANSWER_TIMEOUT.as_secs())]
    Silent {
        /// The request.
        what: &'static str,
    },
    /// The VMM's answer is not the one that belongs to the request.
    #[error("the VMM gave the wrong answer to the request to {what}: use runtime and VMM of one release")]
    WrongAnswer {
        /// The request.
        what: &'static str,
    },
    /// The VMM is gone.
    #[error("{0}")]
    Gone(Arc<VmExit>),
    /// All block slots are occupied.
    #[error(
        "this VM has only {0} slots for block devices and all are in use: raise `block_slots` in the configuration"
    )]
    NoSlot(usize),
}

impl VmError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::BootFile(error) => error.kind(),
            Self::NoVmm(_) => ErrorKind::FailedPrecondition,
            Self::Spawn { cause, .. } | Self::Channel(cause) | Self::Send { cause, .. } => kind_of_io(cause),
            Self::Refused { cause, .. } => match cause.kind {
                FailureKind::Resources => ErrorKind::ResourceExhausted,
                FailureKind::Invalid => ErrorKind::InvalidArgument,
                FailureKind::State | FailureKind::Version | FailureKind::Image => {
                    ErrorKind::FailedPrecondition
                }
                FailureKind::Kvm => ErrorKind::Unavailable,
                FailureKind::Io => ErrorKind::Internal,
            },
            Self::Silent { .. } | Self::Gone(_) => ErrorKind::Unavailable,
            Self::WrongAnswer { .. } => ErrorKind::Internal,
            Self::NoSlot(_) => ErrorKind::ResourceExhausted,
        }
    }
}

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// What it said itself, when it could.
    pub(crate) cause: Option<ExitCause>,
    /// The guest console's last lines.
    pub(crate) console: String,
    /// How its process ended.
    pub(crate) ended: Ended,
    /// What it said last on its standard error.
    pub(crate) stderr: String,
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.cause {
            Some(ExitCause::GuestShutdown) => f.write_str("the guest shut itself down")?,
            Some(ExitCause::GuestPanic) => f.write_str("the guest kernel panicked")?,
            Some(ExitCause::TripleFault) => {
                f.write_str("a virtual CPU of the guest crashed (triple fault)")?;
            }
            Some(ExitCause::Requested) => f.write_str("the VM was ended on request")?,
            Some(ExitCause::VmmError { message }) => write!(f, "the VMM gave up: {message}")?,
            None => write!(f, "the VMM died: {}", self.ended)?,
        }
        let stderr = self.stderr.trim();
        if !stderr.is_empty() {
            write!(f, "; it said: {}", one_line(stderr))?;
        }
        if !self.console.trim().is_empty() && self.cause != Some(ExitCause::Requested) {
            write!(f, "; {}", console_words(&self.console))?;
        }
        Ok(())
    }
}

/// The guest console's last lines as part of a message; of a kernel panic the lines that lead to it, without the
/// addresses that follow. The guest chose the bytes: control characters are not passed on.
pub(crate) fn console_words(console: &str) -> String {
    const LINES: usize = 12;
    let mut lines: Vec<&str> = console
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    if let Some(panic) = lines.iter().position(|line| line.contains("Kernel panic")) {
        lines.truncate(panic + 1);
    }
    if lines.is_empty() {
        return "the guest's console is empty".to_owned();
    }
    let last = &lines[lines.len().saturating_sub(LINES)..];
    format!("the guest's console ends with: {}", one_line(&last.join("\n")))
}

fn one_line(text: &str) -> String {
    text.replace('\n', " | ")
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

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
    pending: Arc<Mutex<Pending>>,
    slots: Mutex<Slots>,
    exit: watch::Receiver<Option<Arc<VmExit>>>,
}

/// What a VMM was launched with and still has to answer.
#[derive(Debug)]
pub(crate) struct Launched {
    pub vm: Vm,
    /// Connections between guest and host.
    pub vsock: Seqpacket,
    configured: oneshot::Receiver<Answer>,
    booted: oneshot::Receiver<Answer>,
}

/// A filled block slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AttachedBlock {
    pub slot: u32,
    /// What the guest reads as the device's serial.
    pub serial: String,
}

/// Spawns the VMM and sends it the machine's description and the order to boot; does not wait for answers.
///
/// `started_ns` is `CLOCK_MONOTONIC` when the sandbox began. Must be called inside a tokio runtime, on a thread
/// that lives as long as the VM.
pub(crate) fn launch(spec: &SandboxSpec, config: &Config, started_ns: u64) -> Result<Launched, VmError> {
    let kvm = boot_files::open_kvm()?;
    let kernel = boot_files::open_kernel(config.kernel())?;
    let (image, image_kind) = boot_files::open_image(config.guest_image())?;
    let (vm, vsock, vsock_theirs) = spawn(config.vmm(), &spec.id)?;
    set_oom_score(vm.pid(), spec.oom_score_adj);

    let mut fds = FdList::default();
    let mut blocks = Vec::new();
    let kvm = fds.add(kvm.as_fd());
    let kernel = fds.add(kernel.as_fd());
    let image_fd = fds.add(image.as_fd());
    let vsock_fd = fds.add(vsock_theirs.as_fd());
    let mut cmdline = config.kernel_params().to_owned();
    let initrd = match image_kind {
        ImageKind::Initramfs => Some(image_fd),
        ImageKind::Erofs => {
            blocks.push(BlockSlot {
                serial: IMAGE_SERIAL.to_owned(),
                backing: Some(BlockBacking {
                    fd: image_fd,
                    read_only: true,
                }),
            });
            cmdline = format!("root=/dev/vda rootfstype=erofs ro init=/init {cmdline}")
                .trim_end()
                .to_owned();
            None
        }
    };
    let first = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
    let count = config.block_slots();
    blocks.extend((0..u32::from(count)).map(|index| BlockSlot {
        serial: slot_serial(index),
        backing: None,
    }));
    let machine = VmConfig {
        id: spec.id.clone(),
        vcpus: spec.sizing.vcpus,
        memory_mib: spec.sizing.memory_mib,
        kvm,
        kernel,
        initrd,
        cmdline,
        vsock: Some(vsock_fd),
        blocks,
        fs_tag: Some(FS_TAG.to_owned()),
        balloon: true,
        verbose_console: config.debug_console(),
        console_log: None,
        started_ns,
        jail: true,
    };
    let configure = RequestBody::Configure {
        version: CONTROL_VERSION,
        config: Box::new(machine),
    };
    let configured = vm.send_now("build the machine", configure, &fds.0)?;
    let booted = vm.send_now("boot", RequestBody::Boot, &[])?;
    *lock(&vm.slots) = Slots {
        free: (0..u32::from(count)).collect(),
        all: usize::from(count),
        first,
    };
    Ok(Launched {
        vm,
        vsock,
        configured,
        booted,
    })
}

/// Gives the VMM its share of the host's out-of-memory killer's attention. What this process has of it (containerd
/// protects its shims) is not for the memory of a guest: it would make the kernel kill others first.
fn set_oom_score(vmm: u32, score: i32) {
    if let Err(error) = std::fs::write(format!("/proc/{vmm}/oom_score_adj"), score.to_string()) {
        tracing::warn!(vmm, score, %error, "the VMM's oom_score_adj was not set");
    }
}

/// Serial of the n-th slot that can be filled.
fn slot_serial(index: u32) -> String {
    format!("kata-rs-{index}")
}

/// The descriptors of one message.
#[derive(Default)]
struct FdList<'a>(Vec<BorrowedFd<'a>>);

impl<'a> FdList<'a> {
    fn add(&mut self, fd: BorrowedFd<'a>) -> FdIndex {
        self.0.push(fd);
        FdIndex(u32::try_from(self.0.len() - 1).expect("a message has few descriptors"))
    }
}

/// Spawns the VMM's process and the tasks that listen to it. Returns the vsock channel's two ends too.
fn spawn(program: &Path, id: &str) -> Result<(Vm, Seqpacket, OwnedFd), VmError> {
    let null = std::fs::File::open("/dev/null").map_err(VmError::Channel)?;
    let (control, control_theirs) = Seqpacket::pair().map_err(VmError::Channel)?;
    let (vsock, vsock_theirs) = Seqpacket::pair().map_err(VmError::Channel)?;
    let (stderr, stderr_theirs) = io::pipe().map_err(VmError::Channel)?;
    let fds = [
        null.as_fd(),
        null.as_fd(),
        stderr_theirs.as_fd(),
        control_theirs.as_fd(),
    ];
    debug_assert_eq!(fds.len(), usize::try_from(CONTROL_FD).unwrap_or(0) + 1);
    let child = Command {
        program,
        args: &["kata-rs-vmm", id],
        env: &[],
        fds: &fds,
        pid_namespace: true,
        netns: None,
        block_signals: false,
    }
    .spawn()
    .map_err(|error: SpawnError| match error.cause.kind() {
        io::ErrorKind::NotFound => VmError::NoVmm(program.to_owned()),
        _ => VmError::Spawn {
            path: program.to_owned(),
            stage: error.to_string(),
            cause: error.cause,
        },
    })?;
    let stderr = OwnedFd::from(stderr);
    rustix::io::ioctl_fionbio(&stderr, true).map_err(|error| VmError::Channel(error.into()))?;
    let stderr = pipe::Receiver::from_owned_fd(stderr).map_err(VmError::Channel)?;

    let child = Arc::new(child);
    let control = Arc::new(control);
    let pending = Arc::new(Mutex::new(Pending::default()));
    let (exit_sender, exit) = watch::channel(None);
    tokio::spawn({
        let (child, control, pending) = (Arc::clone(&child), Arc::clone(&control), Arc::clone(&pending));
        async move {
            let said = tokio::spawn(keep_tail(stderr));
            let (event, ended) = tokio::join!(listen(&control, &pending), child.wait());
            // The pipe closes with the process; what it said is complete then.
            let stderr = said.await.unwrap_or_default();
            let (cause, console) =
                event.map_or((None, String::new()), |(cause, console)| (Some(cause), console));
            let exit = VmExit {
                cause,
                console,
                ended,
                stderr,
            };
            tracing::debug!(%exit, "the VMM has ended");
            exit_sender.send_replace(Some(Arc::new(exit)));
            let waiting = {
                let mut pending = lock(&pending);
                pending.closed = true;
                std::mem::take(&mut pending.waiting)
            };
            drop(waiting);
        }
    });
    let vm = Vm {
        child,
        control,
        pending,
        slots: Mutex::new(Slots {
            free: VecDeque::new(),
            all: 0,
            first: 0,
        }),
        exit,
    };
    Ok((vm, vsock, vsock_theirs))
}

/// Hands answers to those who wait for them until the VMM closes its end; returns what it said of its own end.
async fn listen(control: &Seqpacket, pending: &Mutex<Pending>) -> Option<(ExitCause, String)> {
    let mut exited = None;
    loop {
        let bytes = match control.receive().await {
            Ok(Received::Message(bytes, _)) => bytes,
            Ok(Received::Closed) => return exited,
            Err(error) => {
                tracing::debug!(%error, "the VMM's control channel broke");
                return exited;
            }
        };
        match serde_json::from_slice(&bytes) {
            Ok(FromVmm::Response(response)) => {
                if let Some(waiting) = lock(pending).waiting.remove(&response.id) {
                    // Who no longer waits does not need the answer.
                    let _ = waiting.send(response.result);
                }
            }
            Ok(FromVmm::Event(Event::Exited { cause, console })) => exited = Some((cause, console)),
            Err(error) => tracing::warn!(%error, "the VMM sent a message that is not understood"),
        }
    }
}

/// Reads to the end and keeps the last part.
async fn keep_tail(mut pipe: pipe::Receiver) -> String {
    let mut tail = VecDeque::new();
    let mut chunk = [0; 1024];
    while let Ok(read @ 1..) = pipe.read(&mut chunk).await {
        tail.extend(&chunk[..read]);
        let excess = tail.len().saturating_sub(STDERR_KEPT);
        tail.drain(..excess);
    }
    String::from_utf8_lossy(tail.make_contiguous()).into_owned()
}

impl Launched {
    /// Waits until the machine was built and its vCPUs run.
    pub async fn booted(
        vm: &Vm,
        configured: oneshot::Receiver<Answer>,
        booted: oneshot::Receiver<Answer>,
    ) -> Result<(), VmError> {
        vm.answer("build the machine", configured).await?;
        vm.answer("boot", booted).await?;
        Ok(())
    }

    /// Takes it apart: the VM, its vsock channel, and what becomes of its boot.
    pub fn split(
        self,
    ) -> (
        Arc<Vm>,
        Seqpacket,
        impl Future<Output = Result<(), VmError>> + Send + use<>,
    ) {
        let vm = Arc::new(self.vm);
        let boot = {
            let vm = Arc::clone(&vm);
            async move { Self::booted(&vm, self.configured, self.booted).await }
        };
        (vm, self.vsock, boot)
    }
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

    /// Puts a file or device into a free block slot.
    pub async fn attach_block(
        &self,
        backing: BorrowedFd<'_>,
        read_only: bool,
    ) -> Result<AttachedBlock, VmError> {
        let (index, first) = {
            let mut slots = lock(&self.slots);
            let all = slots.all;
            (slots.free.pop_front().ok_or(VmError::NoSlot(all))?, slots.first)
        };
        let body = RequestBody::AttachBlock {
            slot: first + index,
            backing: BlockBacking {
                fd: FdIndex(0),
                read_only,
            },
        };
        match self.request("attach a block device", body, &[backing]).await {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_quoted_with_what_led_to_it_and_without_its_trace() {
        let console = "mounting\n[1.0] Kernel panic - not syncing: no init\n[1.1] Call Trace:\n[1.1]  ? 0xffffffff8105980c\n";
        assert_eq!(
            console_words(console),
            "the guest's console ends with: mounting | [1.0] Kernel panic - not syncing: no init"
        );
        let many: String = (0..50).map(|n| format!("line {n}\n\n")).collect();
        assert!(console_words(&many).ends_with("line 48 | line 49"));
        assert!(!console_words(&many).contains("line 30"));
        assert_eq!(
            console_words("\x1b[31mred\n"),
            "the guest's console ends with:  [31mred"
        );
    }
}
