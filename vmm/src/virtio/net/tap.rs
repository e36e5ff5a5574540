//! What lies behind a network device: one queue of a tap interface of the host, by descriptor
//! (Documentation/networking/tuntap.rst).
//!
//! The interface and its name belong to whoever made it. It may vanish at any time, with its network namespace for
//! instance; the descriptor then stays open and every call on it fails with `EBADFD`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::fs::OFlags;

use super::header;
use crate::virtio::queue::Iovecs;

/// Why a descriptor cannot back a network device.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a tap at all, or one that was opened but not attached to an interface.
    #[error(
        "the backing is not the queue of a tap interface: open /dev/net/tun and attach it with TUNSETIFF"
    )]
    Kind,
    /// The interface carries something else than Ethernet frames with a virtio header.
    #[error("the tap is attached with flags {found:#06x}: it needs IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags {
        /// Its flags.
        found: u16,
    },
    /// The descriptor is not open in both directions.
    #[error("the tap is not open for reading and writing")]
    Mode,
    /// The interface has been deleted.
    #[error("the tap interface is gone: make it again")]
    Gone,
    /// The driver accepted offloads that this tap does not have.
    #[error(
        "the tap does not take the offloads {offloads:#x} that the guest was promised: its kernel is too old"
    )]
    Offloads {
        /// `TUN_F_*`.
        offloads: u32,
    },
    /// The host refused.
    #[error("the tap cannot be set up: {0}")]
    Host(#[source] io::Error),
}

/// What stops a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Nothing to read, or no room to write: the poller tells when that changes.
    NotNow,
    /// The interface does not exist any more.
    Gone,
    /// The interface is down.
    Down,
    /// This frame cannot pass; the next one may.
    Refused,
}

/// A tap interface's queue.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// Whether it can cut UDP into segments (Linux 6.2).
    has_uso: bool,
}

/// `struct ifreq` (netdevice(7)) as `TUNGETIFF` fills it.
#[repr(C)]
struct Interface {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    padding: [u8; 22],
}

impl Tap {
    /// Takes a tap that is attached to its interface. It is made non-blocking, its header gets the length that
    /// virtio wants, and all offloads are off.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let found = flags(&fd).map_err(|error| match error.raw_os_error() {
            // Not attached, or not a tun device (whatever its driver makes of an unknown request).
            Some(libc::EBADFD | libc::ENOTTY | libc::EINVAL | libc::EBADF) => TapError::Kind,
            _ => TapError::Host(error),
        })?;
        let wanted = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
        // IFF_TAP and IFF_TUN are one field of two bits.
        if found & (wanted | libc::IFF_TUN as u16) != wanted {
            return Err(TapError::Flags { found });
        }
        let mode = rustix::fs::fcntl_getfl(&fd).map_err(host)?;
        if mode & OFlags::RWMODE != OFlags::RDWR {
            return Err(TapError::Mode);
        }
        rustix::fs::fcntl_setfl(&fd, mode | OFlags::NONBLOCK).map_err(host)?;
        let length = header::LENGTH as libc::c_int;
        // SAFETY: the kernel reads one int, which is there.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const length) } != 0 {
            return Err(last_error());
        }
        let uso = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        let has_uso = set_offloads(&fd, uso).is_ok();
        let tap = Self { fd, has_uso };
        tap.set_offloads(0)?;
        Ok(tap)
    }

    /// Whether the tap takes and gives UDP in pieces to be cut later.
    #[must_use]
    pub fn has_uso(&self) -> bool {
        self.has_uso
    }

    /// Says what the reader of the tap's frames can do: finish checksums, take frames of many segments (`TUN_F_*`).
    ///
    /// # Errors
    /// [`TapError::Offloads`], [`TapError::Gone`].
    pub fn set_offloads(&self, offloads: u32) -> Result<(), TapError> {
        set_offloads(&self.fd, offloads).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => TapError::Offloads { offloads },
            _ => of_kernel(error),
        })
    }

    /// Whether the interface has been deleted.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(flags(&self.fd), Err(error) if error.raw_os_error() == Some(libc::EBADFD))
    }

    /// For the poller.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Reads one frame with its header. How many bytes it has; what did not fit is lost.
    ///
    /// # Errors
    /// [`Obstacle`].
    pub fn read(&self, into: &Iovecs) -> Result<usize, Obstacle> {
        let list = into.as_slice();
        // SAFETY: the iovecs lie in guest memory, which stays mapped while the device runs, or in this process, where
        // their owner keeps them; nothing relies on their contents.
        self.transfer(|fd| unsafe { libc::readv(fd, list.as_ptr(), list.len() as libc::c_int) })
    }

    /// Writes one frame with its header.
    ///
    /// # Errors
    /// [`Obstacle`].
    pub fn write(&self, from: &Iovecs) -> Result<usize, Obstacle> {
        let list = from.as_slice();
        // SAFETY: as above; the kernel only reads.
        self.transfer(|fd| unsafe { libc::writev(fd, list.as_ptr(), list.len() as libc::c_int) })
    }

    fn transfer(&self, call: impl Fn(RawFd) -> libc::ssize_t) -> Result<usize, Obstacle> {
        loop {
            if let Ok(count) = usize::try_from(call(self.fd.as_raw_fd())) {
                return Ok(count);
            }
            return Err(match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EAGAIN) => Obstacle::NotNow,
                Some(libc::EBADFD | libc::EBADF) => Obstacle::Gone,
                Some(libc::EIO) => Obstacle::Down,
                _ => Obstacle::Refused,
            });
        }
    }
}

/// `IFF_*` of the interface that a descriptor is attached to.
fn flags(fd: &OwnedFd) -> io::Result<u16> {
    let mut interface = Interface {
        name: [0; libc::IFNAMSIZ],
        flags: 0,
        padding: [0; 22],
    };
    // SAFETY: the kernel writes one `struct ifreq`, which is there.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &raw mut interface) } {
        0 => Ok(interface.flags),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_offloads(fd: &impl AsFd, offloads: u32) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the argument is a number.
    match unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD as _, libc::c_ulong::from(offloads)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn host(errno: rustix::io::Errno) -> TapError {
    TapError::Host(errno.into())
}

fn of_kernel(error: io::Error) -> TapError {
    match error.raw_os_error() {
        Some(libc::EBADFD) => TapError::Gone,
        _ => TapError::Host(error),
    }
}

fn last_error() -> TapError {
    of_kernel(io::Error::last_os_error())
}
