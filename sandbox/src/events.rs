//! What happens to a sandbox's containers, in order, for one listener.
//!
//! The queue has no bound: a slow listener must not hold up a container. It grows by a few hundred bytes per
//! process that starts or ends.

use std::path::PathBuf;

use tokio::sync::mpsc;

use crate::api::{Exit, ProcessId, RootfsMount, SandboxExit, StdioUris};

/// Something happened.
///
/// For one process the order is created (or added), started, exited, deleted; execs exit before their
/// container's init.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A container was made.
    ContainerCreated {
        /// The container.
        container_id: String,
        /// The host process that stands for its init.
        pid: u32,
        /// Its bundle.
        bundle: PathBuf,
        /// Its root file system, as requested.
        rootfs: Vec<RootfsMount>,
        /// Standard I/O of its init.
        stdio: StdioUris,
    },
    /// A container's init executes.
    ContainerStarted {
        /// The container.
        container_id: String,
        /// The host process that stands for its init.
        pid: u32,
    },
    /// An exec was registered.
    ExecAdded {
        /// The exec.
        process: ProcessId,
    },
    /// An exec executes.
    ExecStarted {
        /// The exec.
        process: ProcessId,
        /// The host process that stands for it.
        pid: u32,
    },
    /// A process that had been started has exited.
    Exited {
        /// The process.
        process: ProcessId,
        /// The host process that stood for it.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// A process was deleted.
    Deleted {
        /// The process.
        process: ProcessId,
        /// The host process that stood for it.
        pid: u32,
        /// How it had ended.
        exit: Exit,
    },
    /// A container was frozen.
    Paused {
        /// The container.
        container_id: String,
    },
    /// A container was thawed.
    Resumed {
        /// The container.
        container_id: String,
    },
    /// The guest's kernel killed a process of the container because its memory limit was reached.
    OutOfMemory {
        /// The container.
        container_id: String,
    },
    /// The VM is gone. Nothing but `Deleted` follows.
    SandboxExited {
        /// How it ended.
        exit: SandboxExit,
    },
}

/// Receives a sandbox's events.
#[derive(Debug)]
pub struct Events(mpsc::UnboundedReceiver<Event>);

impl Events {
    /// The next event; `None` once the sandbox has ended and every handle to it is gone.
    pub async fn next(&mut self) -> Option<Event> {
        self.0.recv().await
    }

    #[cfg(test)]
    pub(crate) fn try_next(&mut self) -> Option<Event> {
        self.0.try_recv().ok()
    }
}

/// The sandbox's end of the queue.
#[derive(Clone, Debug)]
pub(crate) struct EventSender(mpsc::UnboundedSender<Event>);

impl EventSender {
    pub(crate) fn channel() -> (Self, Events) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), Events(receiver))
    }

    /// Queues an event. A listener that is gone does not want it.
    pub(crate) fn send(&self, event: Event) {
        tracing::debug!(?event, "event");
        let _ = self.0.send(event);
    }
}
