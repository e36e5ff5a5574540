//! Users and groups of a container, read from its own /etc/passwd and /etc/group.
//!
//! The files are the image's and so untrusted: they are opened below the root file system without leaving it.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::error::Error;

/// The largest file that is read.
const MAX: u64 = 4 << 20;

/// Who a process is.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: Option<String>,
}

/// Resolves `USER[:GROUP]` in the root file system at `rootfs`; empty means root.
///
/// # Errors
/// [`Error::NoUser`] when a name is not there.
pub fn resolve(rootfs: &Path, text: &str) -> Result<User, Error> {
    resolve_in(
        &read_below(rootfs, "etc/passwd"),
        &read_below(rootfs, "etc/group"),
        text,
    )
}

fn resolve_in(passwd: &str, group: &str, text: &str) -> Result<User, Error> {
    let (user, group_name) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let line = lines(passwd).find(|fields| fields.first() == Some(&user) || fields.get(2) == Some(&user));
    let number = |field: Option<&&str>| field.and_then(|text| text.parse().ok());
    let mut found = match (&line, user.parse()) {
        (Some(fields), _) => User {
            uid: number(fields.get(2)).unwrap_or_default(),
            gid: number(fields.get(3)).unwrap_or_default(),
            groups: Vec::new(),
            home: fields
                .get(5)
                .filter(|home| !home.is_empty())
                .map(|home| (*home).to_owned()),
        },
        (None, Ok(uid)) => User {
            uid,
            ..User::default()
        },
        (None, Err(_)) => {
            return Err(Error::NoUser {
                kind: "user",
                name: user.to_owned(),
                file: "/etc/passwd",
            });
        }
    };
    if let Some(name) = group_name {
        let fields = lines(group).find(|fields| fields.first() == Some(&name));
        found.gid = match (
            number(fields.as_ref().and_then(|fields| fields.get(2))),
            name.parse(),
        ) {
            (Some(gid), _) | (None, Ok(gid)) => gid,
            (None, Err(_)) => {
                return Err(Error::NoUser {
                    kind: "group",
                    name: name.to_owned(),
                    file: "/etc/group",
                });
            }
        };
    } else if let Some(login) = line.as_ref().and_then(|fields| fields.first()) {
        found.groups = lines(group)
            .filter(|fields| {
                fields
                    .get(3)
                    .is_some_and(|members| members.split(',').any(|member| member == *login))
            })
            .filter_map(|fields| number(fields.get(2)))
            .collect();
    }
    Ok(found)
}

fn lines(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.split(':').collect())
}

/// The file's text, or nothing when it is not there, not readable or not a file of sensible size.
fn read_below(rootfs: &Path, path: &str) -> String {
    let open = || -> Option<String> {
        let root = File::open(rootfs).ok()?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let file = File::from(rustix::fs::openat2(root.as_fd(), path, flags, Mode::empty(), resolve).ok()?);
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut text = String::new();
        file.take(MAX).read_to_string(&mut text).ok()?;
        Some(text)
    };
    open().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/false\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nmedia:x:40:web,root\n";

    #[test]
    fn names_and_numbers_find_the_same_user() {
        let expected = User {
            uid: 33,
            gid: 34,
            groups: vec![40],
            home: Some("/srv".into()),
        };
        assert_eq!(resolve_in(PASSWD, GROUP, "web").unwrap(), expected);
        assert_eq!(resolve_in(PASSWD, GROUP, "33").unwrap(), expected);
    }

    #[test]
    fn an_explicit_group_replaces_all_others() {
        let user = resolve_in(PASSWD, GROUP, "web:media").unwrap();
        assert_eq!((user.uid, user.gid, user.groups.len()), (33, 40, 0));
        assert_eq!(resolve_in(PASSWD, GROUP, "12:34").unwrap().gid, 34);
    }

    #[test]
    fn numbers_need_no_entry_but_names_do() {
        assert_eq!(resolve_in("", "", "1000").unwrap().uid, 1000);
        assert_eq!(
            resolve_in(PASSWD, GROUP, "").unwrap().home.as_deref(),
            Some("/root")
        );
        assert!(matches!(
            resolve_in(PASSWD, GROUP, "nobody"),
            Err(Error::NoUser { kind: "user", .. })
        ));
        assert!(matches!(
            resolve_in(PASSWD, GROUP, "web:nogroup"),
            Err(Error::NoUser { kind: "group", .. })
        ));
    }

    #[test]
    fn a_passwd_that_links_out_of_the_image_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.path().join("etc/passwd")).unwrap();
        assert_eq!(read_below(root.path(), "etc/passwd"), "");
    }
}
