//! Reaps children: PID 1 gets every process whose parent has died, besides those the agent made.
//!
//! One task waits for SIGCHLD and takes the dead one by one. A status goes to whoever made the process; orphans are
//! just let go. Nothing is locked while a process is made: a maker counts itself as busy first, and while somebody
//! is busy a dead process that nobody knows is left alone, since it may be about to become known.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::process::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, oneshot};

/// Exit status as a shell shows it: 0-255, or 128 + the signal's number.
pub type Status = u32;

/// The registry of children that somebody waits for.
#[derive(Clone, Debug, Default)]
pub struct Reaper(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<HashMap<i32, oneshot::Sender<Status>>>,
    makers: AtomicUsize,
    made: Notify,
}

/// A process being made. Until it is dropped, unknown dead processes are left alone.
#[derive(Debug)]
pub struct Maker<'a>(&'a Shared);

impl Reaper {
    /// To be called before a child is made.
    #[must_use]
    pub fn maker(&self) -> Maker<'_> {
        self.0.makers.fetch_add(1, Ordering::SeqCst);
        Maker(&self.0)
    }

    /// Reaps until the runtime ends.
    ///
    /// # Errors
    /// When SIGCHLD cannot be waited for.
    pub async fn run(self) -> std::io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            while self.reap_one() {}
            tokio::select! {
                _ = children.recv() => {}
                () = self.0.made.notified() => {}
            }
        }
    }

    /// False when there is nothing to reap for now.
    fn reap_one(&self) -> bool {
        let Ok(Some(pid)) = dead_child(libc::P_ALL, 0, libc::WNOWAIT).map(|dead| dead.map(|dead| dead.0))
        else {
            return false;
        };
        let mut waiting = self.0.waiting().remove(&pid);
        if waiting.is_none() {
            if self.0.makers.load(Ordering::SeqCst) != 0 {
                return false;
            }
            // Its maker may have finished between the two looks.
            waiting = self.0.waiting().remove(&pid);
        }
        match (dead_child(libc::P_PID, pid, 0), waiting) {
            (Ok(Some((_, status))), Some(waiting)) => drop(waiting.send(status)),
            (Ok(Some(_)), None) => {}
            _ => return false,
        }
        true
    }
}

impl Maker<'_> {
    /// The child that was made; gives its status when it has ended.
    #[must_use]
    pub fn made(&self, pid: Pid) -> oneshot::Receiver<Status> {
        let (sender, receiver) = oneshot::channel();
        self.0.waiting().insert(pid.as_raw_nonzero().get(), sender);
        receiver
    }
}

impl Drop for Maker<'_> {
    fn drop(&mut self) {
        self.0.makers.fetch_sub(1, Ordering::SeqCst);
        self.0.made.notify_one();
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<Status>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// waitid(2) for a dead child, without waiting: its pid and status.
fn dead_child(kind: libc::idtype_t, pid: i32, flags: libc::c_int) -> Result<Option<(i32, Status)>, Errno> {
    // SAFETY: siginfo_t holds numbers and pointers; all zero is valid, and means "none" to waitid(2).
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: info is valid for the kernel to fill.
    let result = unsafe {
        libc::waitid(
            kind,
            pid as libc::id_t,
            &raw mut info,
            libc::WEXITED | libc::WNOHANG | flags,
        )
    };
    if result == -1 {
        return Err(crate::container::last_errno());
    }
    // SAFETY: waitid(2) fills both members, or leaves them zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    let status = match info.si_code {
        libc::CLD_EXITED => status as u32 & 0xff,
        _ => 128 + status as u32,
    };
    Ok((pid != 0).then_some((pid, status)))
}
