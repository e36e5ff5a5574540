//! Finds block devices by serial, also those that are attached while one waits.
//!
//! An empty slot of the VMM is a device of capacity 0; attaching gives it a capacity. The kernel announces new
//! devices and resized ones by uevents, but a change from 0 only in its log (block/genhd.c,
//! set_capacity_and_notify: "we did not send a uevent for changes to/from an empty device"), so both are listened to.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, SeekFrom, open, seek};
use rustix::io::Errno;

use super::StorageError;

/// How long a device that was promised may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest serial of a virtio block device (virtio 1.3, 5.2.6: 20 bytes).
const MAX_SERIAL: usize = 20;

/// The device node of the disk with this serial.
///
/// # Errors
/// [`StorageError::BlockMissing`].
pub fn find(serial: &str) -> Result<PathBuf, StorageError> {
    let missing = |why: String| StorageError::BlockMissing {
        serial: serial.to_owned(),
        why,
    };
    if serial.is_empty() || serial.len() > MAX_SERIAL {
        return Err(missing(format!("a serial has 1 to {MAX_SERIAL} characters")));
    }
    if let Some(device) = scan(Path::new("/sys/block"), serial) {
        return Ok(device);
    }
    // Listen first and look again, so that nothing falls between.
    let news =
        News::listen().map_err(|errno| missing(format!("the kernel's news cannot be heard: {errno}")))?;
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(device) = scan(Path::new("/sys/block"), serial) {
            return Ok(device);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(missing(format!("waited {} s", PATIENCE.as_secs())));
        }
        news.wait(left).map_err(|errno| missing(errno.to_string()))?;
    }
}

fn scan(block: &Path, serial: &str) -> Option<PathBuf> {
    std::fs::read_dir(block).ok()?.flatten().find_map(|entry| {
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file));
        // The size is known to the kernel; the serial of a virtio device has to be asked for.
        let filled = read("size").is_ok_and(|size| size.trim() != "0");
        (filled && read("serial").is_ok_and(|found| found.trim_end_matches(['\n', '\0']) == serial))
            .then(|| node(&entry.file_name()))
    })
}

/// In sysfs a slash of the name is an exclamation mark.
fn node(name: &OsStr) -> PathBuf {
    Path::new("/dev").join(name.to_string_lossy().replace('!', "/"))
}

/// What tells that a device may have appeared.
struct News {
    uevents: OwnedFd,
    /// None where the log cannot be read.
    log: Option<OwnedFd>,
}

impl News {
    fn listen() -> Result<Self, Errno> {
        let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: socket(2) takes numbers only.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, flags, libc::NETLINK_KOBJECT_UEVENT) };
        if fd == -1 {
            return Err(crate::container::last_errno());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let uevents = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sockaddr_nl holds numbers only; all zero is its neutral value.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        // The kernel's own messages.
        address.nl_groups = 1;
        // SAFETY: the address is a sockaddr_nl and its length is told.
        let result = unsafe {
            libc::bind(
                uevents.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_nl>() as libc::socklen_t,
            )
        };
        if result == -1 {
            return Err(crate::container::last_errno());
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let log = open(c"/dev/kmsg", flags, Mode::empty()).and_then(|log| {
            seek(&log, SeekFrom::End(0))?;
            Ok(log)
        });
        Ok(Self {
            uevents,
            log: log.ok(),
        })
    }

    /// Waits for something new and forgets what it was: a scan follows.
    fn wait(&self, patience: Duration) -> Result<(), Errno> {
        let timeout = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        let mut fds: Vec<PollFd<'_>> = std::iter::once(&self.uevents)
            .chain(&self.log)
            .map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN))
            .collect();
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let mut buffer = [0; 8192];
        for fd in std::iter::once(&self.uevents).chain(&self.log) {
            // EPIPE and ENOBUFS say that something was missed: news all the same.
            while matches!(
                rustix::io::read(fd, &mut buffer),
                Ok(1..) | Err(Errno::PIPE | Errno::NOBUFS | Errno::INTR)
            ) {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_serial_once_it_has_a_size() {
        let directory = tempfile::tempdir().unwrap();
        let disk = |name: &str, size: &str, serial: Option<&str>| {
            let path = directory.path().join(name);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("size"), size).unwrap();
            if let Some(serial) = serial {
                std::fs::write(path.join("serial"), serial).unwrap();
            }
        };
        disk("vda", "0\n", Some("s1"));
        disk("vdb", "2048\n", Some("s2\n"));
        disk("loop0", "8\n", None);
        disk("cciss!c0d0", "8\n", Some("s3"));
        assert_eq!(scan(directory.path(), "s1"), None);
        assert_eq!(scan(directory.path(), "s2"), Some("/dev/vdb".into()));
        assert_eq!(scan(directory.path(), "s3"), Some("/dev/cciss/c0d0".into()));
        std::fs::write(directory.path().join("vda/size"), "16\n").unwrap();
        assert_eq!(scan(directory.path(), "s1"), Some("/dev/vda".into()));
    }

    #[test]
    fn impossible_serials_are_refused_at_once() {
        assert!(find("").is_err());
        assert!(find("this-serial-is-far-too-long").is_err());
    }
}
