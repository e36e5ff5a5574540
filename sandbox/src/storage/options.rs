//! Words of mount options: what they are, and what they say about the host's half of a mount.

use super::plan::ReadOnly;

/// Flags of a mount or file system, mount(8) "FILESYSTEM-INDEPENDENT MOUNT OPTIONS", and the recursive forms of the
/// OCI runtime specification (config.md, "Linux mount options").
const FLAGS: [&str; 44] = [
    "ro",
    "rw",
    "rro",
    "rrw",
    "nosuid",
    "suid",
    "rnosuid",
    "rsuid",
    "nodev",
    "dev",
    "rnodev",
    "rdev",
    "noexec",
    "exec",
    "rnoexec",
    "rexec",
    "atime",
    "noatime",
    "ratime",
    "rnoatime",
    "diratime",
    "nodiratime",
    "rdiratime",
    "rnodiratime",
    "relatime",
    "norelatime",
    "rrelatime",
    "rnorelatime",
    "strictatime",
    "nostrictatime",
    "rstrictatime",
    "rnostrictatime",
    "symfollow",
    "nosymfollow",
    "rsymfollow",
    "rnosymfollow",
    "sync",
    "async",
    "dirsync",
    "mand",
    "nomand",
    "lazytime",
    "nolazytime",
    "defaults",
];

const PROPAGATION: [&str; 8] = [
    "shared",
    "rshared",
    "slave",
    "rslave",
    "private",
    "rprivate",
    "unbindable",
    "runbindable",
];

pub(super) fn is_flag(word: &str) -> bool {
    FLAGS.contains(&word)
}

pub(super) fn is_bind(word: &str) -> bool {
    matches!(word, "bind" | "rbind")
}

pub(super) fn is_propagation(word: &str) -> bool {
    PROPAGATION.contains(&word)
}

/// Comments for user space, mount(8): `x-…` and `X-…`.
pub(super) fn is_comment(word: &str) -> bool {
    word.starts_with("x-") || word.starts_with("X-")
}

/// Whether, and how deep, the words make a mount read-only. The last word wins, as in mount(8).
pub(super) fn read_only(options: &[String]) -> ReadOnly {
    options
        .iter()
        .fold(ReadOnly::No, |before, word| match word.as_str() {
            "ro" if before != ReadOnly::Recursive => ReadOnly::Top,
            "rro" => ReadOnly::Recursive,
            "rw" | "rrw" => ReadOnly::No,
            _ => before,
        })
}

/// The last propagation word.
pub(super) fn propagation(options: &[String]) -> Option<&str> {
    options
        .iter()
        .map(String::as_str)
        .rfind(|word| is_propagation(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_decides_whether_a_mount_is_read_only() {
        let of = |words: &str| read_only(&words.split(',').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(of("rbind,nosuid"), ReadOnly::No);
        assert_eq!(of("rbind,ro"), ReadOnly::Top);
        assert_eq!(of("ro,rw"), ReadOnly::No);
        assert_eq!(of("ro,rro"), ReadOnly::Recursive);
        assert_eq!(of("rro,ro"), ReadOnly::Recursive);
    }
}
