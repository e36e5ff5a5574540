//! Names of extended attributes (xattr(7)): what the guest calls them, and what they are called on the host.
//!
//! `trusted.` attributes steer the host's own file systems (overlayfs keeps its layers' secrets there), and setting
//! them takes a capability that the file server does not have. The guest's are kept under a name of our own among the
//! user attributes. The others are the same on both sides.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::io;

use super::share::errno;

const TRUSTED: &[u8] = b"trusted.";
/// What stands before the guest's name of such an attribute. The guest cannot name what begins with it.
const PREFIX: &[u8] = b"user.kata-rs.";
/// `XATTR_NAME_MAX` (linux/limits.h).
const MAX_NAME: usize = 255;

/// What an attribute of the guest's is called on the host.
///
/// # Errors
/// `EPERM` for a name that the guest cannot have, `ERANGE` for one that is too long.
pub fn on_host(name: &CStr) -> io::Result<Cow<'_, CStr>> {
    let bytes = name.to_bytes();
    if bytes.starts_with(PREFIX) {
        return Err(errno(libc::EPERM));
    }
    if !bytes.starts_with(TRUSTED) {
        return Ok(Cow::Borrowed(name));
    }
    let mapped = [PREFIX, bytes].concat();
    if mapped.len() > MAX_NAME {
        return Err(errno(libc::ERANGE));
    }
    CString::new(mapped)
        .map(Cow::Owned)
        .map_err(|_| errno(libc::EINVAL))
}

/// A list of names as the guest knows them. Each ends in a zero byte.
pub fn in_guest(list: &[u8]) -> Vec<u8> {
    let mut names = Vec::with_capacity(list.len());
    for name in list.split_inclusive(|byte| *byte == 0) {
        match name.strip_prefix(PREFIX) {
            Some(own) if own.starts_with(TRUSTED) => names.extend_from_slice(own),
            Some(_) => {}
            // The host's own are none of the guest's business.
            None if name.starts_with(TRUSTED) => {}
            None => names.extend_from_slice(name),
        }
    }
    names
}

/// Whether it is an access control list. Where the host's file system has none, the guest must hear that the file has
/// none: it takes any other answer for a refusal of access.
pub fn is_acl(name: &CStr) -> bool {
    matches!(
        name.to_bytes(),
        b"system.posix_acl_access" | b"system.posix_acl_default"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trusted_attributes_have_another_name_on_the_host() {
        assert_eq!(on_host(c"user.x").unwrap().as_ref(), c"user.x");
        assert_eq!(
            on_host(c"trusted.overlay.opaque").unwrap().as_ref(),
            c"user.kata-rs.trusted.overlay.opaque"
        );
        assert!(on_host(c"user.kata-rs.trusted.overlay.opaque").is_err());
        let long = CString::new([b"trusted.".as_slice(), &[b'x'; 240]].concat()).unwrap();
        assert_eq!(on_host(&long).unwrap_err().raw_os_error(), Some(libc::ERANGE));
        assert_eq!(
            in_guest(b"user.x\0user.kata-rs.trusted.y\0user.kata-rs.z\0trusted.host\0security.w\0"),
            b"user.x\0trusted.y\0security.w\0"
        );
        assert_eq!(in_guest(b""), b"");
    }
}
