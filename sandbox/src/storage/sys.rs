//! Detached mounts: what the mount API of Linux 5.2 to 5.14 does with descriptors, where rustix has no call or leaves
//! a choice.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::mount::{MountPropagationFlags, OpenTreeFlags};
use rustix::thread::UnshareFlags;

/// Attributes of a mount, mount_setattr(2).
pub(super) mod attr {
    /// Read-only.
    pub const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    /// What every share is: nothing on it is a device, gains privileges or is followed as a symbolic link by the VMM.
    /// The guest decides about all three for itself, in its own mounts.
    pub const SHARE: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSYMFOLLOW;
}

/// `struct mount_attr` (linux/mount.h).
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets attributes of the mount whose root is `fd`, of all mounts below it too when `recursive`.
pub(super) fn set_attributes(
    fd: impl AsFd,
    recursive: bool,
    set: u64,
    propagation: Option<libc::c_ulong>,
) -> io::Result<()> {
    let attr = MountAttr {
        set,
        clear: 0,
        propagation: propagation.unwrap_or(0),
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, and the structure has the size that is passed; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Clones the mount that `fd` lies in, from that place on, into a tree of mounts that nobody else sees. It is
/// unmounted when the last descriptor of it closes.
pub(super) fn clone_tree(fd: impl AsFd, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    Ok(rustix::mount::open_tree(fd, c"", flags)?)
}

/// Runs `work` on a thread with a mount namespace of its own: a private copy of this process's, which ends with
/// the thread. Nothing mounted there is seen elsewhere.
pub(super) fn in_private_namespace<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let enter_and_work = || {
        // SAFETY: only UnshareFlags::FILES is dangerous, and it is not given. The thread ends with its new
        // namespace and working directory.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS)? };
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change(root(), private)?;
        work()
    };
    on_own_thread(enter_and_work)
}

/// Runs `work` on a thread that nothing else ever runs on, and waits for it.
pub(super) fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("kata-rs-mounts".into())
            .spawn_scoped(scope, work)?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn root() -> &'static CStr {
    c"/"
}
