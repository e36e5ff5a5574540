//! The guest's wall clock and entropy pool, both set by the host.

use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

const NANOSECONDS: i64 = 1_000_000_000;

/// Most bytes of entropy that are taken at once.
const MAX_ENTROPY: usize = 512;
/// _IOW('R', 0x03, int[2]) and _IO('R', 0x07) of linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// The wall clock, nanoseconds since the epoch.
#[must_use]
pub fn realtime_ns() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec * NANOSECONDS + now.tv_nsec
}

/// Time since the kernel's start, in microseconds.
#[must_use]
pub fn boottime_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec * 1_000_000 + now.tv_nsec / 1_000).unwrap_or(0)
}

/// Sets the wall clock.
///
/// # Errors
/// EINVAL for a time before the epoch, and those of clock_settime(2).
pub fn set(realtime_ns: i64) -> Result<(), Errno> {
    if realtime_ns < 0 {
        return Err(Errno::INVAL);
    }
    clock_settime(
        ClockId::Realtime,
        Timespec {
            tv_sec: realtime_ns / NANOSECONDS,
            tv_nsec: realtime_ns % NANOSECONDS,
        },
    )
}

/// Mixes random bytes of the host into the entropy pool (random(4)), and makes the generator use them at once: a
/// restored VM would otherwise go on with another one's numbers.
///
/// # Errors
/// EINVAL for too many bytes, and those of the ioctls.
pub fn add_entropy(bytes: &[u8]) -> Result<(), Errno> {
    /// struct rand_pool_info.
    #[repr(C)]
    struct Pool {
        entropy_bits: libc::c_int,
        length: libc::c_int,
        bytes: [u8; MAX_ENTROPY],
    }
    let mut pool = Pool {
        entropy_bits: 0,
        length: 0,
        bytes: [0; MAX_ENTROPY],
    };
    pool.bytes
        .get_mut(..bytes.len())
        .ok_or(Errno::INVAL)?
        .copy_from_slice(bytes);
    pool.length = bytes.len() as libc::c_int;
    pool.entropy_bits = pool.length * 8;
    let device = rustix::fs::open(
        c"/dev/urandom",
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let device = std::os::fd::AsRawFd::as_raw_fd(&device);
    // SAFETY: the kernel reads the head and as many bytes as it says, which are inside the struct; the second request
    // takes no argument.
    let failed = unsafe {
        libc::ioctl(device, RNDADDENTROPY, &raw const pool) == -1 || libc::ioctl(device, RNDRESEEDCRNG) == -1
    };
    if failed {
        Err(crate::container::last_errno())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(set(-1), Err(Errno::INVAL));
        assert_eq!(add_entropy(&[0; MAX_ENTROPY + 1]), Err(Errno::INVAL));
        assert!(realtime_ns() > 1_700_000_000 * NANOSECONDS);
        assert!(boottime_us() > 0);
    }
}
