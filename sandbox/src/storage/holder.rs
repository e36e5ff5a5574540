//! A mount namespace without processes, for shares that receive what the host mounts below them later.
//!
//! The kernel tells detached mounts of unmounts only (fs/pnode.c, `propagate_one` passes over anonymous namespaces).
//! A share that is a slave of the host's mounts therefore needs a place in a namespace. This one holds nothing else, and
//! it ends with the descriptor of it.
//!
//! What the VMM has looked up in a mount keeps that mount in use, and a mount whose slave is in use cannot be unmounted
//! on the host (`propagate_mount_busy`). So each mount that arrives is covered with a clone of itself: files are
//! looked up in the clone, a clone that covers a mount completely does not count, and one whose mount has gone is taken
//! away. A thread does that whenever the kernel tells of a change of the namespace's mounts.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::mountinfo;
use super::sys::{attr, clone_tree, in_private_namespace, on_own_thread, set_attributes};

/// How often the table is read again after something was changed in it. Covering one mount may show others.
const ROUNDS: u32 = 16;

/// A pod's namespace, made when the first share needs it.
#[derive(Debug, Default)]
pub struct MountHolder {
    namespace: Mutex<Option<Arc<Namespace>>>,
}

#[derive(Debug)]
struct Namespace {
    fd: OwnedFd,
    count: AtomicU64,
    covers: Arc<Covers>,
    /// Closing it ends the thread that watches.
    _watched: OwnedFd,
}

/// The clones that cover mounts of the host's.
#[derive(Debug)]
struct Covers {
    /// The host's /proc.
    proc: OwnedFd,
    /// Numbers of the mounts.
    known: Mutex<BTreeSet<u64>>,
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
            namespace.covers.settle()?;
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
        let proc = rustix::fs::open(
            "/proc",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let covers = Arc::new(Covers {
            proc,
            known: Mutex::default(),
        });
        let fd = in_private_namespace(empty_this_namespace)?;
        let (end, watched) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (theirs, watching) = (fd.try_clone()?, Arc::clone(&covers));
        std::thread::Builder::new()
            .name("kata-rs-covers".into())
            .spawn(move || {
                if let Err(error) = enter(&theirs).and_then(|()| watching.watch(&end)) {
                    tracing::warn!(%error, "mounts that arrive from now on cannot be unmounted on the host while they are in use");
                }
            })?;
        let namespace = Arc::new(Namespace {
            fd,
            count: AtomicU64::new(0),
            covers,
            _watched: watched,
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

/// Enters a mount namespace with this thread, which then ends with it.
fn enter(namespace: &OwnedFd) -> io::Result<()> {
    // SAFETY: only UnshareFlags::FILES is dangerous, and it is not given. A mount namespace can be entered only by a
    // thread whose root and working directory are no other thread's.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS)? };
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
    Ok(())
}

impl Namespace {
    /// Runs `work` on a thread in this namespace, in its root directory.
    fn enter<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_own_thread(|| {
            enter(&self.fd)?;
            work()
        })
    }
}

impl Covers {
    fn table(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(
            &self.proc,
            "thread-self/mountinfo",
            flags,
            Mode::empty(),
        )?)
    }

    /// Settles after every change, until the other end of `end` is closed.
    fn watch(&self, end: &OwnedFd) -> io::Result<()> {
        let table = self.table()?;
        loop {
            self.settle()?;
            let mut fds = [
                // proc_pid_mounts(5): a change shows as an exceptional condition.
                PollFd::new(&table, PollFlags::PRI),
                PollFd::new(end, PollFlags::empty()),
            ];
            match poll(&mut fds, None) {
                Ok(_) if !fds[1].revents().is_empty() => return Ok(()),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Covers what is not covered, and takes away what covers nothing any more. In the namespace.
    fn settle(&self) -> io::Result<()> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..ROUNDS {
            let mut text = Vec::new();
            io::Read::read_to_end(&mut std::fs::File::from(self.table()?), &mut text)?;
            let mounts = mountinfo::tree(&text);
            let places: HashMap<u64, &Path> = mounts
                .iter()
                .map(|mount| (mount.id, mount.place.as_path()))
                .collect();
            let covered: BTreeSet<u64> = mounts
                .iter()
                .filter(|mount| places.get(&mount.parent) == Some(&mount.place.as_path()))
                .map(|mount| mount.parent)
                .collect();
            known.retain(|id| places.contains_key(id));
            let mut changed = false;
            for mount in &mounts {
                // The root, and the shares themselves, which nobody unmounts but their holder.
                if mount.place.components().count() <= 2 {
                    continue;
                }
                if places.get(&mount.parent) == Some(&mount.place.as_path()) {
                    known.insert(mount.id);
                } else if known.contains(&mount.id) {
                    changed |= uncover(&mount.place, mount.id);
                } else if !covered.contains(&mount.id)
                    && let Some(cover) = cover(&mount.place, mount.id)
                {
                    known.insert(cover);
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        Ok(())
    }
}

/// The place, if it is the root of this very mount and nothing covers it.
fn open_mount(place: &PathBuf, mount: u64) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(place, flags, Mode::empty()).ok()?;
    (number(&fd) == Some(mount)).then_some(fd)
}

fn number(fd: &OwnedFd) -> Option<u64> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    Some(stat.stx_mnt_id)
}

/// Covers a mount with a clone. `None` when it has gone, or cannot be cloned: then it is as it is.
fn cover(place: &PathBuf, mount: u64) -> Option<u64> {
    let below = open_mount(place, mount)?;
    let clone = clone_tree(&below, true).ok()?;
    set_attributes(&clone, true, attr::SHARE, None).ok()?;
    let from_fd = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&clone, c"", CWD, place.as_path(), from_fd).ok()?;
    number(&clone)
}

/// Takes a cover away whose mount has gone.
fn uncover(place: &PathBuf, mount: u64) -> bool {
    open_mount(place, mount).is_some()
        && rustix::mount::unmount(place.as_path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok()
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
