//! What is special about a thread of the file server: its capabilities, and its umask.

use std::io;

use rustix::fs::Mode;
use rustix::thread::UnshareFlags;

/// Prepares the calling thread for requests.
///
/// # Errors
/// When the host has no memory for an umask of the thread's own.
pub fn prepare() -> io::Result<()> {
    keep_capabilities();
    // SAFETY: only UnshareFlags::FILES is dangerous, and it is not given: root, working directory and umask become
    // this thread's own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS)? };
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// Lets this thread keep its capabilities when it acts as another user.
///
/// Files are made as the guest's user so that they belong to it. Whether that user may make them is the guest
/// kernel's decision (`default_permissions`): it knows groups and capabilities that are not in the request. The
/// host, asked a second time without these, would refuse what the guest has allowed.
fn keep_capabilities() {
    const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: prctl(2) with these operations reads and changes only this thread's credentials.
    unsafe {
        let bits = libc::prctl(libc::PR_GET_SECUREBITS);
        if bits >= 0 {
            // Not permitted without CAP_SETPCAP. The jail then has set it before it dropped that; without it,
            // files in directories that are open to a supplementary group only cannot be made.
            libc::prctl(
                libc::PR_SET_SECUREBITS,
                bits as libc::c_ulong | SECBIT_NO_SETUID_FIXUP,
            );
        }
    }
}

/// The guest's umask, while a file is made for it: whether it counts is for the host's kernel to say, which knows the
/// directory's default ACL (acl(5), "Object creation and default ACLs").
pub struct Umask(());

impl Umask {
    /// Until it is dropped.
    pub fn of_guest(mask: u32) -> Self {
        rustix::process::umask(Mode::from_raw_mode(mask & 0o777));
        Self(())
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        rustix::process::umask(Mode::empty());
    }
}
