//! What a kata-rs guest image holds: the agent as `/init`, the directories it mounts on as the first process, files
//! added on request, and the manifest. Nothing here depends on the time, the user or the machine.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::elf::{self, ElfError};
use crate::manifest::{MANIFEST_PATH, Manifest};
use crate::tree::{self, INIT_PATH, PathError, Tree};

/// Why the content of an image could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// An input file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An input is a directory, a device or the like.
    #[error("{} is not a regular file: images take single files", .0.display())]
    NotAFile(PathBuf),
    /// The agent cannot run as the first process.
    #[error("{} cannot be the guest's first process: {source}", path.display())]
    Agent {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ElfError,
    },
    /// A file cannot be put where it was asked for.
    #[error(transparent)]
    Path(#[from] PathError),
}

/// Mount points of the first process. With a read-only root it cannot make them itself.
const DIRECTORIES: [(&str, u16); 9] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];

/// One `--add HOSTPATH:GUESTPATH[:MODE]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addition {
    host_path: PathBuf,
    guest_path: String,
    mode: Option<u16>,
}

/// An `--add` that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AdditionError {
    /// Not two or three parts.
    #[error("expected HOSTPATH:GUESTPATH[:MODE]")]
    Shape,
    /// Not permission bits.
    #[error("{0:?} is not a mode: give octal permission bits such as 0644")]
    Mode(String),
    /// A guest path that names nothing.
    #[error(transparent)]
    Path(#[from] PathError),
}

impl FromStr for Addition {
    type Err = AdditionError;

    fn from_str(text: &str) -> Result<Self, AdditionError> {
        let parts: Vec<&str> = text.split(':').collect();
        let (host, guest, mode) = match parts[..] {
            [host, guest] => (host, guest, None),
            [host, guest, mode] => (host, guest, Some(parse_mode(mode)?)),
            _ => return Err(AdditionError::Shape),
        };
        if host.is_empty() {
            return Err(AdditionError::Shape);
        }
        Ok(Self {
            host_path: host.into(),
            guest_path: tree::from_absolute(guest)?.to_owned(),
            mode,
        })
    }
}

fn parse_mode(text: &str) -> Result<u16, AdditionError> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    match u16::from_str_radix(text, 8) {
        Ok(mode) if digits && mode <= 0o7777 => Ok(mode),
        _ => Err(AdditionError::Mode(text.to_owned())),
    }
}

/// Puts the tree of an image together.
///
/// # Errors
/// Unreadable inputs, an agent that is no static program, guest paths that clash.
pub fn assemble(agent: &Path, additions: &[Addition]) -> Result<Tree, BuildError> {
    let (program, _) = read_file(agent)?;
    elf::check_static_program(&program).map_err(|source| BuildError::Agent {
        path: agent.to_owned(),
        source,
    })?;
    let mut tree = Tree::new();
    for (path, mode) in DIRECTORIES {
        tree.add_directory(path, mode)?;
    }
    tree.add_file(INIT_PATH, 0o755, program)?;
    for addition in additions {
        if addition.guest_path == MANIFEST_PATH {
            return Err(PathError::Taken(tree::absolute(MANIFEST_PATH)).into());
        }
        let (bytes, executable) = read_file(&addition.host_path)?;
        // Not the file's own mode: it depends on the umask of whoever made it.
        let mode = addition.mode.unwrap_or(if executable { 0o755 } else { 0o644 });
        tree.add_file(&addition.guest_path, mode, bytes)?;
    }
    let manifest = Manifest::of(&tree).to_bytes();
    tree.add_file(MANIFEST_PATH, 0o444, manifest)?;
    Ok(tree)
}

/// The bytes of a regular file, and whether anybody may execute it.
fn read_file(path: &Path) -> Result<(Vec<u8>, bool), BuildError> {
    let error = |source| BuildError::Read {
        path: path.to_owned(),
        source,
    };
    // Asked before opening: opening a pipe would wait for a writer.
    let metadata = fs::metadata(path).map_err(error)?;
    if !metadata.is_file() {
        return Err(BuildError::NotAFile(path.to_owned()));
    }
    Ok((
        fs::read(path).map_err(error)?,
        metadata.permissions().mode() & 0o111 != 0,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::samples;
    use crate::image::{self, Format};

    fn write(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn addition(host: &Path, rest: &str) -> Addition {
        format!("{}:{rest}", host.display()).parse().unwrap()
    }

    #[test]
    fn images_are_reproducible_and_verify_in_both_formats() {
        let [one, two] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for format in [Format::Initramfs, Format::Erofs] {
            let images = [&one, &two].map(|directory| {
                let agent = write(directory.path(), "agent", &samples::agent());
                let motd = write(directory.path(), "motd", b"hello");
                // The order of the requests and the modes of the inputs must not show.
                let mut additions = vec![addition(&motd, "/etc/motd"), addition(&motd, "/opt/x/y:0600")];
                if directory.path() == two.path() {
                    additions.reverse();
                    fs::set_permissions(&motd, fs::Permissions::from_mode(0o640)).unwrap();
                }
                image::encode(&assemble(&agent, &additions).unwrap(), format).unwrap()
            });
            assert_eq!(images[0], images[1]);
            let (found, tree, manifest) = image::decode(&images[0]).unwrap();
            assert_eq!(found, format);
            assert_eq!(tree.file("init"), Some(&samples::agent()[..]));
            assert_eq!(tree.file("opt/x/y"), Some(&b"hello"[..]));
            assert!(
                manifest
                    .files
                    .iter()
                    .any(|file| file.path == "/opt/x/y" && file.mode == "0600")
            );
        }
    }

    #[test]
    fn unusable_agents_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let script = write(directory.path(), "script", b"#!/bin/sh\n");
        assert!(matches!(
            assemble(&script, &[]),
            Err(BuildError::Agent {
                source: ElfError::NotElf,
                ..
            })
        ));
        let dynamic = write(directory.path(), "dynamic", &samples::program(62, 3, &[3, 1]));
        let error = assemble(&dynamic, &[]).unwrap_err().to_string();
        assert!(
            error.contains("dynamically linked") && error.contains("crt-static"),
            "{error}"
        );
        assert!(matches!(
            assemble(&directory.path().join("none"), &[]),
            Err(BuildError::Read { .. })
        ));
        assert!(matches!(
            assemble(directory.path(), &[]),
            Err(BuildError::NotAFile(_))
        ));
    }

    #[test]
    fn additions_cannot_replace_what_makes_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let agent = write(directory.path(), "agent", &samples::agent());
        for taken in ["/init", "/etc/kata-rs-image.json", "/proc", "/init/x"] {
            let result = assemble(&agent, &[addition(&agent, taken)]);
            assert!(
                matches!(result, Err(BuildError::Path(PathError::Taken(_)))),
                "{taken}: {result:?}"
            );
        }
    }

    #[test]
    fn additions_are_parsed_strictly() {
        let parsed: Addition = "a:/b:4755".parse().unwrap();
        assert_eq!(
            parsed,
            Addition {
                host_path: "a".into(),
                guest_path: "b".into(),
                mode: Some(0o4755)
            }
        );
        assert_eq!("a".parse::<Addition>(), Err(AdditionError::Shape));
        assert_eq!(":/b".parse::<Addition>(), Err(AdditionError::Shape));
        assert_eq!("a:/b:1:2".parse::<Addition>(), Err(AdditionError::Shape));
        for mode in ["", "8", "+1", "17777", "rwx"] {
            assert_eq!(
                format!("a:/b:{mode}").parse::<Addition>(),
                Err(AdditionError::Mode(mode.into()))
            );
        }
        assert!(matches!(
            "a:b".parse::<Addition>(),
            Err(AdditionError::Path(PathError::NotAbsolute(_)))
        ));
    }
}
