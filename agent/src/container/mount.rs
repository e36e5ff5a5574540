//! Mount option words, and the steps of the mount API (fsopen(2), fsmount(2), open_tree(2), mount_setattr(2),
//! move_mount(2)) that both the agent and a container's child use.
//!
//! Everything below [`parse`] allocates nothing: it also runs between clone3 and execve.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// MOUNT_ATTR_* of mount_setattr(2).
mod attribute {
    pub const RDONLY: u64 = 0x01;
    pub const NOSUID: u64 = 0x02;
    pub const NODEV: u64 = 0x04;
    pub const NOEXEC: u64 = 0x08;
    pub const ATIME_MASK: u64 = 0x70;
    pub const NOATIME: u64 = 0x10;
    pub const STRICTATIME: u64 = 0x20;
    pub const NODIRATIME: u64 = 0x80;
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// Mount attributes to set and to clear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    set: u64,
    clear: u64,
}

impl Attributes {
    /// A read-only mount.
    pub const READ_ONLY: Self = Self {
        set: attribute::RDONLY,
        clear: 0,
    };

    fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Adds another word's attributes; the later word wins.
    fn add(&mut self, (set, clear): (u64, u64)) {
        self.set = self.set & !clear | set;
        self.clear = self.clear & !set | clear;
    }
}

/// How mount events travel (mount_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Propagation {
    /// MS_PRIVATE, MS_SLAVE, MS_SHARED or MS_UNBINDABLE.
    pub kind: u64,
    /// For the whole tree below too.
    pub recursive: bool,
}

/// Option words, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Of the mount.
    pub attributes: Attributes,
    /// Of the mount and all mounts below it (`rro`, ...).
    pub recursive: Attributes,
    /// In order.
    pub propagation: Vec<Propagation>,
    /// Of the file system: a flag, or a key and its value.
    pub parameters: Vec<(CString, Option<CString>)>,
    /// `rbind`.
    pub recursive_bind: bool,
}

/// A mount as its source is.
pub static NO_OPTIONS: Options = Options {
    attributes: Attributes { set: 0, clear: 0 },
    recursive: Attributes { set: 0, clear: 0 },
    propagation: Vec::new(),
    parameters: Vec::new(),
    recursive_bind: false,
};

/// A mount and all below it, read-only.
pub static READ_ONLY_TREE: Options = Options {
    attributes: Attributes { set: 0, clear: 0 },
    recursive: Attributes::READ_ONLY,
    propagation: Vec::new(),
    parameters: Vec::new(),
    recursive_bind: true,
};

/// An option word that cannot be honoured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Known, but not done here.
    #[error("mount option {0:?} is not supported in the guest: remove it")]
    Unsupported(String),
    /// A zero byte.
    #[error("mount option {0:?} contains a zero byte")]
    ZeroByte(String),
    /// A file system option for a bind mount.
    #[error("mount option {0:?} is for a file system of its own, not for a bind mount: remove it")]
    NotForBind(String),
}

/// Words that set and clear attributes; each also exists with `r` in front, for the whole tree.
const ATTRIBUTE_WORDS: [(&str, u64, u64); 17] = [
    ("ro", attribute::RDONLY, 0),
    ("rw", 0, attribute::RDONLY),
    ("nosuid", attribute::NOSUID, 0),
    ("suid", 0, attribute::NOSUID),
    ("nodev", attribute::NODEV, 0),
    ("dev", 0, attribute::NODEV),
    ("noexec", attribute::NOEXEC, 0),
    ("exec", 0, attribute::NOEXEC),
    ("relatime", 0, attribute::ATIME_MASK),
    ("atime", 0, attribute::ATIME_MASK),
    ("noatime", attribute::NOATIME, attribute::ATIME_MASK),
    ("strictatime", attribute::STRICTATIME, attribute::ATIME_MASK),
    ("nostrictatime", 0, attribute::ATIME_MASK),
    ("nodiratime", attribute::NODIRATIME, 0),
    ("diratime", 0, attribute::NODIRATIME),
    ("nosymfollow", attribute::NOSYMFOLLOW, 0),
    ("symfollow", 0, attribute::NOSYMFOLLOW),
];

const PROPAGATION_WORDS: [(&str, u64); 4] = [
    ("private", libc::MS_PRIVATE),
    ("slave", libc::MS_SLAVE),
    ("shared", libc::MS_SHARED),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// Words that ask for nothing a new mount does not have anyway, or that are notes for other programs.
const NEUTRAL_WORDS: [&str; 12] = [
    "",
    "defaults",
    "bind",
    "norelatime",
    "silent",
    "loud",
    "iversion",
    "noiversion",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
];

const UNSUPPORTED_WORDS: [&str; 5] = ["remount", "loop", "idmap", "ridmap", "tmpcopyup"];

/// Looks up `private`, `rslave` and the like.
#[must_use]
pub fn propagation(word: &str) -> Option<Propagation> {
    let find = |word: &str| {
        PROPAGATION_WORDS
            .iter()
            .find(|(name, _)| *name == word)
            .map(|(_, kind)| *kind)
    };
    match (find(word), word.strip_prefix('r').and_then(find)) {
        (Some(kind), _) => Some(Propagation {
            kind,
            recursive: false,
        }),
        (None, Some(kind)) => Some(Propagation {
            kind,
            recursive: true,
        }),
        (None, None) => None,
    }
}

/// Understands option words of mount(8) and of the OCI runtime specification (config.md, "Linux mount options").
/// What is no mount option is the file system's.
///
/// # Errors
/// [`OptionError`] with the word.
pub fn parse(words: &[String], bind: bool) -> Result<Options, OptionError> {
    let attribute = |word: &str| {
        ATTRIBUTE_WORDS
            .iter()
            .find(|(name, ..)| *name == word)
            .map(|(_, set, clear)| (*set, *clear))
    };
    let mut options = Options::default();
    for word in words {
        if let Some(change) = attribute(word) {
            options.attributes.add(change);
        } else if let Some(propagation) = propagation(word) {
            options.propagation.push(propagation);
        } else if let Some(change) = word.strip_prefix('r').and_then(attribute) {
            options.recursive.add(change);
        } else if word == "rbind" {
            options.recursive_bind = true;
        } else if UNSUPPORTED_WORDS.contains(&word.as_str()) {
            return Err(OptionError::Unsupported(word.clone()));
        } else if !NEUTRAL_WORDS.contains(&word.as_str())
            && !word.starts_with("x-")
            && !word.starts_with("X-")
        {
            if bind {
                return Err(OptionError::NotForBind(word.clone()));
            }
            let (key, value) = match word.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (word.as_str(), None),
            };
            let text = |text: &str| CString::new(text).map_err(|_| OptionError::ZeroByte(word.clone()));
            options
                .parameters
                .push((text(key)?, value.map(text).transpose()?));
        }
    }
    Ok(options)
}

/// A file system instance to be made.
#[derive(Clone, Debug)]
pub struct FileSystem {
    /// The type's name.
    pub kind: CString,
    /// What /proc/mounts shows as its source; a device for those that need one.
    pub source: CString,
    /// What goes to the file system and to the mount.
    pub options: Options,
}

/// A step of making a file system that failed.
#[derive(Debug)]
pub struct MakeError {
    /// The step.
    pub what: &'static str,
    /// Why.
    pub errno: Errno,
    /// The file system context, whose messages say more.
    pub context: Option<OwnedFd>,
}

impl FileSystem {
    /// Makes an instance that is not mounted anywhere yet.
    ///
    /// # Errors
    /// [`MakeError`].
    pub fn make(&self) -> Result<OwnedFd, MakeError> {
        let context =
            fsopen(self.kind.as_c_str(), FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| MakeError {
                what: "fsopen",
                errno,
                context: None,
            })?;
        match self.configure(context.as_fd()) {
            Ok(mount) => Ok(mount),
            Err((what, errno)) => Err(MakeError {
                what,
                errno,
                context: Some(context),
            }),
        }
    }

    fn configure(&self, context: BorrowedFd<'_>) -> Result<OwnedFd, (&'static str, Errno)> {
        let step = |what| move |errno| (what, errno);
        fsconfig_set_string(context, c"source", self.source.as_c_str()).map_err(step("set its source"))?;
        for (key, value) in &self.options.parameters {
            match value {
                Some(value) => fsconfig_set_string(context, key.as_c_str(), value.as_c_str()),
                None => fsconfig_set_flag(context, key.as_c_str()),
            }
            .map_err(step("set an option"))?;
        }
        fsconfig_create(context).map_err(step("create it"))?;
        let attributes = u32::try_from(self.options.attributes.set).unwrap_or_default();
        fsmount(
            context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::from_bits_retain(attributes),
        )
        .map_err(step("mount it"))
    }
}

/// Clones the mount at `path` (below `at`) without attaching it, with the attributes that `options` ask for.
///
/// # Errors
/// Those of open_tree(2) and mount_setattr(2).
pub fn clone_tree(at: BorrowedFd<'_>, path: &CStr, options: &Options) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if path.is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    if options.recursive_bind {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(at, path, flags)?;
    set_attributes(tree.as_fd(), options.attributes, false)?;
    set_attributes(tree.as_fd(), options.recursive, true)?;
    Ok(tree)
}

/// Puts a detached mount on what `target` refers to, then makes mount events travel as asked.
///
/// # Errors
/// Those of move_mount(2) and mount_setattr(2).
pub fn attach(
    tree: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    propagation: &[Propagation],
) -> Result<(), Errno> {
    move_mount(
        tree,
        c"",
        target,
        c"",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )?;
    propagation
        .iter()
        .try_for_each(|word| set_propagation(tree, *word))
}

/// Sets and clears attributes of the mount that `mount` is the root of.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: Attributes, recursive: bool) -> Result<(), Errno> {
    if attributes.is_empty() {
        return Ok(());
    }
    mount_setattr(
        mount,
        recursive,
        &MountAttr {
            attr_set: attributes.set,
            attr_clr: attributes.clear,
            ..MountAttr::default()
        },
    )
}

/// Makes mount events travel as asked.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn set_propagation(mount: BorrowedFd<'_>, propagation: Propagation) -> Result<(), Errno> {
    mount_setattr(
        mount,
        propagation.recursive,
        &MountAttr {
            propagation: propagation.kind,
            ..MountAttr::default()
        },
    )
}

/// struct mount_attr of mount_setattr(2).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a string that ends in zero, attr is a struct mount_attr and its size is told; the kernel
    // only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

/// The calling thread's errno, for system calls that go through libc.
#[must_use]
pub fn last_errno() -> Errno {
    // SAFETY: the pointer is to the thread's own errno, always valid.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_default_mounts_of_oci_specs_are_understood() {
        let options = parse(
            &words(&["nosuid", "strictatime", "mode=755", "size=65536k"]),
            false,
        )
        .unwrap();
        assert_eq!(options.attributes.set, attribute::NOSUID | attribute::STRICTATIME);
        assert_eq!(options.attributes.clear, attribute::ATIME_MASK);
        assert_eq!(
            options.parameters,
            [
                (c"mode".to_owned(), Some(c"755".to_owned())),
                (c"size".to_owned(), Some(c"65536k".to_owned()))
            ]
        );
        let options = parse(&words(&["rbind", "rprivate", "ro"]), true).unwrap();
        assert!(options.recursive_bind && options.parameters.is_empty());
        assert_eq!(options.attributes, Attributes::READ_ONLY);
        assert_eq!(
            options.propagation,
            [Propagation {
                kind: libc::MS_PRIVATE,
                recursive: true
            }]
        );
    }

    #[test]
    fn the_later_word_wins() {
        let options = parse(&words(&["ro", "noatime", "rw", "relatime"]), true).unwrap();
        assert_eq!(options.attributes.set, 0);
        assert_eq!(
            options.attributes.clear,
            attribute::RDONLY | attribute::ATIME_MASK
        );
        let options = parse(&words(&["rw", "ro"]), true).unwrap();
        assert_eq!(options.attributes, Attributes::READ_ONLY);
    }

    #[test]
    fn recursive_attributes_are_kept_apart() {
        let options = parse(&words(&["rbind", "rro", "nodev"]), true).unwrap();
        assert_eq!(options.recursive, Attributes::READ_ONLY);
        assert_eq!(options.attributes.set, attribute::NODEV);
    }

    #[test]
    fn words_that_cannot_be_honoured_are_named() {
        assert_eq!(
            parse(&words(&["ro", "idmap"]), true),
            Err(OptionError::Unsupported("idmap".into()))
        );
        assert_eq!(
            parse(&words(&["size=1"]), true),
            Err(OptionError::NotForBind("size=1".into()))
        );
        assert!(parse(&words(&["x-gvfs-hide", "defaults"]), true).is_ok());
    }
}
