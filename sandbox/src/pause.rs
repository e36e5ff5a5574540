//! The container that CRI calls a pod's sandbox, and in which `pause` runs elsewhere.
//!
//! Here the VM holds the pod together. So nothing of this container is in the guest: no process, no root file
//! system. On the host it is a process in the pod's network namespace, with the states, the signals and the exit
//! that its caller expects of `pause`.

use std::sync::Arc;
use std::time::SystemTime;

use crate::api::{Exit, ProcessId, Stdio};
use crate::error::Error;
use crate::hooks::Hooks;
use crate::io::Io;
use crate::pod::Pod;
use crate::proxy::{self, Task, TaskSignals};
use crate::spec::Netns;

/// Makes the host process and opens the standard I/O, which nobody will use: a caller may wait for that.
pub(crate) async fn make(
    pod: &Pod,
    id: &str,
    netns: &Netns,
    stdio: Stdio,
    hooks: Hooks,
    (made_io, made_hooks): (&mut Option<Arc<Io>>, &mut Hooks),
) -> Result<(Task, TaskSignals), Error> {
    let io = Io::open(stdio, id, &pod.spec.namespace).await?;
    made_io.replace(Arc::new(io));
    let (task, signals) = proxy::spawn(pod.config.task(), id, netns).await?;
    made_hooks.clone_from(&hooks);
    hooks.before_start(task.pid()).await?;
    Ok((task, signals))
}

/// Does what a signal does to a process that handles none. The rest of the pod is not concerned: its containers are
/// ended by its caller, and the VM with the sandbox.
pub(crate) fn signal(pod: &Pod, process: &ProcessId, signal: u32) {
    if !is_fatal(signal) {
        return;
    }
    let exit = Exit {
        status: 128 + signal,
        exited_at: SystemTime::now(),
    };
    let mut containers = pod.containers();
    containers.exited(process, exit);
    if let Ok((_, init)) = containers.process(process)
        && let Some(io) = &init.io
    {
        io.abandon();
    }
}

/// Whether a signal ends a process that does not handle it (signal(7), "Standard signals"). 0 only asks whether the
/// process is there; what stops or continues a process does nothing where none runs.
fn is_fatal(signal: u32) -> bool {
    const HARMLESS: [i32; 9] = [
        0,
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGURG,
        libc::SIGWINCH,
    ];
    // The kernel's _NSIG.
    signal <= 64 && !HARMLESS.iter().any(|harmless| harmless.cast_unsigned() == signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_ends_by_what_would_end_a_process() {
        for signal in [libc::SIGTERM, libc::SIGKILL, libc::SIGINT, libc::SIGHUP, 64] {
            assert!(is_fatal(signal.cast_unsigned()), "{signal}");
        }
        for signal in [0, libc::SIGCHLD, libc::SIGWINCH, libc::SIGSTOP, 65] {
            assert!(!is_fatal(signal.cast_unsigned()), "{signal}");
        }
    }
}
