//! Taking powers away from the process, so that a guest that breaks out of its VM finds nothing.
//!
//! [`prelude`] is what can be done before anything is known; [`enter`] follows when the machine's description
//! has arrived. Everything the VM uses is an open descriptor by then. Threads inherit the jail from the thread
//! that makes them, so device and vCPU threads are made after it.
//!
//! One filter of system calls per kind of thread belongs here too, in a room of its own (`seccomp`).

use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};

/// A step that the host's kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process shares its pid namespace with others.
    #[error("the VMM must be started in a pid namespace of its own (clone3 with CLONE_NEWPID)")]
    PidNamespace,
    /// Anything else.
    #[error("cannot jail the VMM: {step} failed; it must be started as root with all capabilities")]
    Step {
        /// What was being done.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
}

fn step(step: &'static str) -> impl FnOnce(Errno) -> Error {
    move |source| Error::Step { step, source }
}

/// What virtio-fs needs to act on files for any user of the guest. Not `DAC_READ_SEARCH`: with it any file of
/// a shared file system could be opened by handle, inside the share or not.
const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Descriptors that a file server may hold: one per file or directory that the guest has in its cache.
const FILE_SERVER_NOFILE: u64 = 1 << 20;
/// Most memory that may be locked: old kernels count io_uring's rings.
const MEMLOCK: u64 = 8 << 20;

/// What the process sheds first of all: descriptors, environment, core dumps, and its life beyond that of the
/// thread that started it.
///
/// # Errors
/// [`Error::Step`].
pub fn prelude(first_unwanted_fd: u32) -> Result<(), Error> {
    // SAFETY: nothing in the process has opened a descriptor beyond the standard ones and the control channel.
    let closed = unsafe { libc::close_range(first_unwanted_fd, u32::MAX, 0) };
    if closed != 0 {
        return Err(step("closing inherited descriptors")(last_errno()));
    }
    // SAFETY: the process has a single thread.
    unsafe { libc::clearenv() };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(step("setting the parent death signal"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(step("forbidding core dumps"))?;
    limit(Resource::Core, 0)
}

/// Locks the calling thread, and all that it will make, into namespaces of their own with an empty root.
///
/// With `file_server` the process keeps what virtio-fs needs: the capabilities to act for any user, and a
/// /proc of its own pid namespace.
///
/// # Errors
/// [`Error`] naming the step that was refused.
pub fn enter(file_server: bool) -> Result<(), Error> {
    if rustix::process::getpid().as_raw_nonzero().get() != 1 {
        return Err(Error::PidNamespace);
    }
    if file_server {
        limit(Resource::Nofile, FILE_SERVER_NOFILE)?;
    }
    limit(Resource::Memlock, MEMLOCK)?;
    let namespaces = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET;
    // SAFETY: no descriptor table is unshared; the only other thread talks to KVM through descriptors.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }.map_err(step("making namespaces"))?;
    change_root(file_server)?;
    // SAFETY: an empty list of groups needs no pointer. The raw system call changes this thread only.
    if unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) } != 0 {
        return Err(step("dropping supplementary groups")(last_errno()));
    }
    if file_server {
        // Its threads change their user for each request and must keep these capabilities over it.
        rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)
            .map_err(step("keeping capabilities over changes of user"))?;
    }
    drop_capabilities(if file_server {
        FILE_SERVER
    } else {
        CapabilitySet::empty()
    })
}

/// Makes a tmpfs without content, or with /proc only, the root, and detaches all else.
fn change_root(with_proc: bool) -> Result<(), Error> {
    let isolated = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", isolated).map_err(step("separating mounts"))?;
    let plain = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;

    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("making a root file system"))?;
    for (key, value) in [("size", "4k"), ("nr_inodes", "4"), ("mode", "0555")] {
        fsconfig_set_string(context.as_fd(), key, value).map_err(step("describing the root file system"))?;
    }
    fsconfig_create(context.as_fd()).map_err(step("making a root file system"))?;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, plain)
        .map_err(step("making a root mount"))?;
    attach(root.as_fd(), "/")?;
    rustix::process::fchdir(&root).map_err(step("entering the new root"))?;
    if with_proc {
        rustix::fs::mkdirat(&root, "proc", Mode::from_raw_mode(0o555)).map_err(step("making /proc"))?;
        let context =
            fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("making a proc file system"))?;
        fsconfig_create(context.as_fd()).map_err(step("making a proc file system"))?;
        let proc = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, plain)
            .map_err(step("making a proc mount"))?;
        attach(proc.as_fd(), "proc")?;
    }
    // With both arguments the same the old root comes to lie on the new one, from where it is taken off
    // (pivot_root(2), notes).
    rustix::process::pivot_root(".", ".").map_err(step("changing the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("detaching the old root"))?;
    rustix::process::chdir("/").map_err(step("entering the new root"))?;
    read_only()
}

fn attach(mount: std::os::fd::BorrowedFd<'_>, target: &str) -> Result<(), Error> {
    move_mount(
        mount,
        "",
        rustix::fs::CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(step("attaching a mount"))
}

/// Makes the root read-only, without /proc: its `fd` directory is opened through, for writing too.
fn read_only() -> Result<(), Error> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(step("opening the root"))?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is a C string, and the structure is of the size that is passed with it.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            std::os::fd::AsRawFd::as_raw_fd(&root),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if outcome == 0 {
        Ok(())
    } else {
        Err(step("making the root read-only")(last_errno()))
    }
}

fn drop_capabilities(keep: CapabilitySet) -> Result<(), Error> {
    rustix::thread::clear_ambient_capability_set().map_err(step("clearing ambient capabilities"))?;
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if keep.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first number that this kernel does not know.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(step("dropping capabilities from the bounding set")(errno)),
        }
    }
    let sets = CapabilitySets {
        effective: keep,
        permitted: keep,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(step("dropping capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("forbidding new privileges"))
}

/// Sets soft and hard limit, or as much as the hard limit allows.
fn limit(resource: Resource, wanted: u64) -> Result<(), Error> {
    let both = |value| Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    match setrlimit(resource, both(wanted)) {
        Err(Errno::PERM) => {
            let most = getrlimit(resource)
                .maximum
                .map_or(wanted, |hard| hard.min(wanted));
            setrlimit(resource, both(most)).map_err(step("setting resource limits"))
        }
        other => other.map_err(step("setting resource limits")),
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
