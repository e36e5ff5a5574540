//! A mount namespace without processes, for shares that receive what the host mounts below them later.
//!
//! The kernel tells detached mounts of unmounts only (fs/pnode.c, `propagate_one` passes over anonymous namespaces).
//! A share that is a slave of the host's mounts therefore needs a place in a namespace. This one holds nothing else,
//! nobody enters it for longer than a mount takes, and it ends with the descriptor of it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::sys::{attr, in_private_namespace, set_attributes};

/// A pod's namespace, made when the first share needs it.
#[derive(Debug, Default)]
pub struct MountHolder {
    namespace: Mutex<Option<Arc<Namespace>>>,
}

#[derive(Debug)]
struct Namespace {
    fd: OwnedFd,
    count: AtomicU64,
}

/// A mount in the namespace. Dropping it takes it away.
#[derive(Debug)]
pub struct HeldMount {
    namespace: Arc<Namespace>,
    name: String,
}

impl MountHolder {
    /// Gives a detached mount a place, and opens it there.
    ///
    /// # Errors
    /// What the kernel reports.
    pub(super) fn hold(&self, tree: &OwnedFd) -> io::Result<(OwnedFd, HeldMount)> {
        let namespace = self.namespace()?;
        let name = namespace.count.fetch_add(1, Ordering::Relaxed).to_string();
        let root = namespace.enter(|| {
            rustix::fs::mkdirat(CWD, name.as_str(), Mode::RWXU)?;
            let from_fd = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(tree, c"", CWD, name.as_str(), from_fd)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            Ok(rustix::fs::openat(CWD, name.as_str(), flags, Mode::empty())?)
        })?;
        Ok((root, HeldMount { namespace, name }))
    }

    fn namespace(&self) -> io::Result<Arc<Namespace>> {
        let mut held = self.namespace.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(namespace) = &*held {
            return Ok(Arc::clone(namespace));
        }
        let fd = in_private_namespace(empty_this_namespace)?;
        let namespace = Arc::new(Namespace {
            fd,
            count: AtomicU64::new(0),
        });
        *held = Some(Arc::clone(&namespace));
        Ok(namespace)
    }
}

/// Leaves nothing of the host's in this thread's own mount namespace: a copy of a mount would keep the host from
/// taking its file systems out of use. Gives the namespace.
fn empty_this_namespace() -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = rustix::fs::open("/proc/thread-self/ns/mnt", flags, Mode::empty())?;
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0700")?;
    rustix::mount::fsconfig_create(&context)?;
    let root = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let from_fd = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&root, c"", CWD, c"/", from_fd)?;
    rustix::process::fchdir(&root)?;
    // Both at one place: the old root is then mounted over the new one, and is the one that goes (pivot_root(2)).
    rustix::process::pivot_root(c".", c".")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
    set_attributes(&root, false, attr::SHARE, Some(libc::MS_PRIVATE))?;
    Ok(namespace)
}

impl Namespace {
    /// Runs `work` on a thread in this namespace, in its root directory.
    fn enter<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let enter_and_work = || {
            // SAFETY: only UnshareFlags::FILES is dangerous, and it is not given. The thread ends with its working
            // directory, which a mount namespace can be entered with only when no other thread has it too.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS)? };
            rustix::thread::move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Mount))?;
            work()
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("kata-rs-mounts".into())
                .spawn_scoped(scope, enter_and_work)?;
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for HeldMount {
    fn drop(&mut self) {
        // Short, and what cannot be taken away goes with the namespace.
        let _ = self.namespace.enter(|| {
            rustix::mount::unmount(self.name.as_str(), UnmountFlags::DETACH)?;
            Ok(rustix::fs::unlinkat(
                CWD,
                self.name.as_str(),
                rustix::fs::AtFlags::REMOVEDIR,
            )?)
        });
    }
}
