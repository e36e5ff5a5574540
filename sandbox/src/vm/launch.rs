//! Starting a VMM: its process, the machine's description, and the tasks that listen to it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use protocol::channel::Received;
use protocol::vmm::{
    BlockBacking, BlockSlot, CONTROL_FD, CONTROL_VERSION, Event, ExitCause, FdIndex, FromVmm, NetSlot,
    RequestBody, VmConfig,
};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};

use super::{Answer, Pending, Slots, Vm, VmError, VmExit, lock, slot_serial};
use crate::boot_files::{self, ImageKind};
use crate::config::Config;
use crate::error::Error;
use crate::limits::DeviceLimits;
use crate::seqpacket::Seqpacket;
use crate::spawn::{Command, SpawnError};
use crate::spec::SandboxSpec;

/// The tag under which the agent mounts the virtio-fs root.
const FS_TAG: &str = "kata-rs";
/// How much of what the VMM says on its standard error is kept for messages.
const STDERR_KEPT: usize = 4096;
/// The serial of the guest image, when it is a block device.
const IMAGE_SERIAL: &str = "kata-rs-image";

/// What a VMM was launched with and still has to answer.
#[derive(Debug)]
pub(crate) struct Launched {
    pub vm: Vm,
    /// Connections between guest and host.
    pub vsock: Arc<Seqpacket>,
    configured: oneshot::Receiver<Answer>,
    booted: oneshot::Receiver<Answer>,
}

/// Spawns the VMM and sends it the machine's description and the order to boot; does not wait for answers.
///
/// `started_ns` is `CLOCK_MONOTONIC` when the sandbox began. `nets` is asked for the network devices while the VMM
/// starts; it is told how many block devices there are. Must be called inside a tokio runtime, on a thread
/// that lives as long as the VM.
pub(crate) fn launch(
    spec: &SandboxSpec,
    config: &Config,
    started_ns: u64,
    nets: impl FnOnce(usize) -> Result<Vec<NetSlot>, Error>,
) -> Result<Launched, Error> {
    let kvm = boot_files::open_kvm().map_err(VmError::from)?;
    let kernel = boot_files::open_kernel(config.kernel()).map_err(VmError::from)?;
    let (image, image_kind) = boot_files::open_image(config.guest_image()).map_err(VmError::from)?;
    let (vm, vsock_theirs) = spawn(config.vmm(), &spec.id, config.device_limits())?;
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
                backing: Some(BlockBacking::whole(image_fd, true)),
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
        vcpus: spec.sizing.boot.vcpus,
        max_vcpus: spec.sizing.most.vcpus,
        memory_mib: spec.sizing.boot.memory_mib,
        pluggable_memory_mib: spec.sizing.pluggable_mib(),
        kvm,
        kernel,
        initrd,
        cmdline,
        vsock: Some(vsock_fd),
        nets: nets(blocks.len())?,
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
        vsock: Arc::clone(&vm.vsock),
        vm,
        configured,
        booted,
    })
}

/// Gives the VMM its share of the host's out-of-memory killer's attention. What this process has of it (containerd
/// protects its shims) is not for the memory of a guest: it would make the kernel kill others first.
pub(crate) fn set_oom_score(vmm: u32, score: i32) {
    if let Err(error) = std::fs::write(format!("/proc/{vmm}/oom_score_adj"), score.to_string()) {
        tracing::warn!(vmm, score, %error, "the VMM's oom_score_adj was not set");
    }
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

/// Spawns the VMM's process and the tasks that listen to it. Returns the VMM's end of the vsock channel too.
fn spawn(program: &Path, id: &str, limits: DeviceLimits) -> Result<(Vm, OwnedFd), VmError> {
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
    let plugged = watch::Sender::new(0);
    tokio::spawn({
        let (child, control, pending) = (Arc::clone(&child), Arc::clone(&control), Arc::clone(&pending));
        let plugged = plugged.clone();
        async move {
            let said = tokio::spawn(keep_tail(stderr));
            let (event, ended) = tokio::join!(listen(&control, &pending, &plugged), child.wait());
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
        vsock: Arc::new(vsock),
        pending,
        slots: Mutex::new(Slots {
            free: VecDeque::new(),
            all: 0,
            first: 0,
        }),
        limits,
        plugged,
        exit,
    };
    Ok((vm, vsock_theirs))
}

/// Hands answers to those who wait for them until the VMM closes its end; returns what it said of its own end.
async fn listen(
    control: &Seqpacket,
    pending: &Mutex<Pending>,
    plugged: &watch::Sender<u64>,
) -> Option<(ExitCause, String)> {
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
            Ok(FromVmm::Event(Event::PluggedMemory { bytes })) => {
                plugged.send_replace(bytes);
            }
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
        Arc<Seqpacket>,
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
