//! The guest's own tree, in the order in which it is needed: what Hello needs, then what containers need.
//!
//! Nothing here may be missing in a guest of ours, so every failure ends the agent with one line on the console.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, fstatfs, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree};

use crate::container::last_errno;

/// Magic numbers of statfs(2): the file systems an initramfs is unpacked into.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Where cgroup v2 is mounted, and the cgroup that holds all containers.
pub const CGROUPS: &str = "/sys/fs/cgroup";
pub const CONTAINER_CGROUPS: &str = "/sys/fs/cgroup/kata-rs";
const AGENT_CGROUP: &str = "/sys/fs/cgroup/agent";
/// The agent's own state.
pub const STATE: &str = "/run/kata-rs";

/// What could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A mount of the guest's own tree.
    #[error(
        "cannot mount {kind} at {target}: {source}: is it in the guest kernel's configuration, and the directory in the guest image?"
    )]
    Mount {
        kind: &'static str,
        target: &'static str,
        source: Errno,
    },
    /// Anything else.
    #[error("cannot {what}: {source}")]
    Other { what: String, source: std::io::Error },
}

fn other(what: impl Into<String>) -> impl FnOnce(Errno) -> BootError {
    move |source| BootError::Other {
        what: what.into(),
        source: source.into(),
    }
}

/// Puts devices in place and makes sure that descriptors 0 to 2 are open: a kernel without a console starts its first
/// process without them, and a socket that took their place would be written to by mistake.
///
/// # Errors
/// [`BootError`].
pub fn prepare_devices() -> Result<(), BootError> {
    leave_initramfs()?;
    let mounted = mount_at("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755");
    // A root on a block device has it mounted by the kernel (CONFIG_DEVTMPFS_MOUNT).
    if !Path::new("/dev/null").exists() {
        mounted?;
    }
    loop {
        let null = open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(other("open /dev/null"))?;
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        // Kept open for good, and for programs too.
        std::mem::forget(null);
    }
}

/// pivot_root(2) does not work where the root is the initramfs itself, and containers need it: a bind mount of the
/// root on top of itself becomes the root.
fn leave_initramfs() -> Result<(), BootError> {
    let root = open(
        c"/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(other("open the root"))?;
    let kind = fstatfs(&root).map_err(other("examine the root"))?.f_type;
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Ok(());
    }
    let over_root = || {
        let tree = open_tree(
            CWD,
            c"/",
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )?;
        move_mount(&tree, c"", CWD, c"/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        rustix::process::fchdir(&tree)?;
        rustix::process::chroot(c".")
    };
    over_root().map_err(other("move the root off the initramfs"))
}

/// Everything else that containers need.
///
/// # Errors
/// [`BootError`].
pub fn prepare_guest() -> Result<(), BootError> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at("proc", "/proc", safe, c"")?;
    mount_at("sysfs", "/sys", safe, c"")?;
    mount_at(
        "tmpfs",
        "/run",
        MountFlags::NOSUID | MountFlags::NODEV,
        c"mode=0755",
    )?;
    mount_at(
        "tmpfs",
        "/tmp",
        MountFlags::NOSUID | MountFlags::NODEV,
        c"mode=1777",
    )?;
    mount_at("cgroup2", CGROUPS, safe, c"")?;
    for (directory, kind, flags, data) in [
        (
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            c"mode=0620,ptmxmode=0666",
        ),
        ("/dev/shm", "tmpfs", safe, c"mode=1777"),
        ("/dev/mqueue", "mqueue", safe, c""),
    ] {
        make_directory(directory)?;
        mount_at(kind, directory, flags, data)?;
    }
    make_directory(STATE)?;
    prepare_cgroups()?;
    bring_up_loopback()?;
    overcommit_memory()?;
    protect_agent()
}

fn mount_at(
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &CStr,
) -> Result<(), BootError> {
    mount(kind, target, kind, flags, Some(data)).map_err(|source| BootError::Mount { kind, target, source })
}

fn make_directory(path: &str) -> Result<(), BootError> {
    std::fs::create_dir_all(path).map_err(|source| BootError::Other {
        what: format!("make {path}"),
        source,
    })
}

fn write(path: impl AsRef<Path>, value: &str) -> Result<(), BootError> {
    let path = path.as_ref();
    std::fs::write(path, value).map_err(|source| BootError::Other {
        what: format!("write {value:?} to {}", path.display()),
        source,
    })
}

/// Containers get every controller; the agent has a cgroup of its own beside theirs.
fn prepare_cgroups() -> Result<(), BootError> {
    make_directory(AGENT_CGROUP)?;
    write(PathBuf::from(AGENT_CGROUP).join("cgroup.procs"), "0")?;
    make_directory(CONTAINER_CGROUPS)?;
    let controllers =
        std::fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers")).map_err(|source| {
            BootError::Other {
                what: "read the cgroup controllers".into(),
                source,
            }
        })?;
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    for directory in [CGROUPS, CONTAINER_CGROUPS] {
        write(
            Path::new(directory).join("cgroup.subtree_control"),
            &all.join(" "),
        )?;
    }
    Ok(())
}

/// Programs reserve more than they use. On a host the kernel's heuristic lets them, since it measures by all of the
/// host's memory; a guest has little, and containers have limits of their own (proc_sys_vm(5)).
fn overcommit_memory() -> Result<(), BootError> {
    write("/proc/sys/vm/overcommit_memory", "1")
}

/// The guest's last process to be killed for want of memory; containers have their own score.
fn protect_agent() -> Result<(), BootError> {
    write("/proc/self/oom_score_adj", "-1000")
}

/// netdevice(7): lo needs no address, only to be up.
fn bring_up_loopback() -> Result<(), BootError> {
    // SAFETY: socket(2) takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd == -1 {
        return Err(other("make a network socket")(last_errno()));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: ifreq holds numbers and a name; all zero is its neutral value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request is an ifreq for the duration of the call.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) };
    if result == -1 {
        Err(other("bring up the loopback interface")(last_errno()))
    } else {
        Ok(())
    }
}

/// Writes one line where a person may see it: the console, or else standard error.
pub fn console_line(line: &str) {
    let line = format!("kata-rs-agent: {line}\n");
    let console = open(
        c"/dev/console",
        OFlags::WRONLY | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    );
    let written = match &console {
        Ok(console) => rustix::io::write(console, line.as_bytes()),
        Err(_) => rustix::io::write(rustix::stdio::stderr(), line.as_bytes()),
    };
    // There is nobody left to tell.
    let _ = written;
}

/// Ends the guest in order: file systems are written back, then the machine is reset, which ends the VM.
pub fn power_off() -> ! {
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    // Only without the right to; then the end of PID 1 ends the guest.
    std::process::exit(1)
}
