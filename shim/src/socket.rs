//! The shim's listening socket: its name, and taking it over from a shim that is gone.
//!
//! The name is containerd's convention: `<dir>/<sha256 of address/namespace/group>`, so that each `start` of one pod
//! finds the shim of that pod. A lock on the directory covers every look-then-act on a name in it, and the moment
//! between bind and listen.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use sha2::{Digest as _, Sha256};

/// Where sockets go unless containerd says otherwise.
pub const DEFAULT_DIR: &str = "/run/containerd/s";

/// What `sun_path` can hold without its final zero, less one as containerd counts.
const PATH_LIMIT: usize = 106;

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error(
        "the socket path {path} is {} bytes long, more than the {PATH_LIMIT} a Unix socket can have: give containerd a shorter socket_dir",
        path.as_os_str().len()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket has its name.
    #[error("{0} exists and is not a socket: remove it")]
    NotASocket(PathBuf),
    /// Something failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    let path = path.to_owned();
    move |source| SocketError::Io { what, path, source }
}

/// A socket of the given name.
#[derive(Debug)]
pub enum Bound {
    /// Ours, listening.
    New(UnixListener),
    /// A shim already answers there.
    Answering,
}

/// The socket's path for a group of containers (a pod, or one container alone).
pub fn path(dir: &Path, grpc_address: &str, namespace: &str, group: &str) -> Result<PathBuf, SocketError> {
    let digest = Sha256::digest(join(&[grpc_address, namespace, group]).as_bytes());
    let mut name = String::with_capacity(64);
    for byte in digest {
        use std::fmt::Write as _;
        let _ = write!(name, "{byte:02x}");
    }
    let path = dir.join(name);
    if path.as_os_str().len() > PATH_LIMIT {
        return Err(SocketError::TooLong { path });
    }
    Ok(path)
}

/// Joins and cleans as Go's `filepath.Join` does, which is what containerd computes the name with.
fn join(parts: &[&str]) -> String {
    let joined = parts
        .iter()
        .filter(|p| !p.is_empty())
        .copied()
        .collect::<Vec<_>>()
        .join("/");
    let rooted = joined.starts_with('/');
    let mut kept: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." if kept.last().is_some_and(|last| *last != "..") => {
                kept.pop();
            }
            ".." if rooted => {}
            part => kept.push(part),
        }
    }
    let clean = kept.join("/");
    if rooted { format!("/{clean}") } else { clean }
}

/// Listens at `path`, or finds that somebody does.
pub fn bind(path: &Path) -> Result<Bound, SocketError> {
    let _lock = lock_directory(path)?;
    loop {
        match UnixListener::bind(path) {
            Ok(listener) => {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
                    .map_err(failed("set the mode of", path))?;
                return Ok(Bound::New(listener));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if answers(path)? {
                    return Ok(Bound::Answering);
                }
                remove(path)?;
            }
            Err(error) => return Err(failed("listen on", path)(error)),
        }
    }
}

/// Removes a socket nobody answers on. One that is answered, or absent, is left as it is.
pub fn remove_stale(path: &Path) -> Result<(), SocketError> {
    if !path.exists() {
        return Ok(());
    }
    let _lock = lock_directory(path)?;
    if answers(path)? { Ok(()) } else { remove(path) }
}

/// Whether somebody accepts connections there.
pub fn answers(path: &Path) -> Result<bool, SocketError> {
    let connect = || {
        let address = SocketAddrUnix::new(path)?;
        // Without blocking: a shim that hangs has a full backlog, which is an answer of a kind.
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)
    };
    match connect() {
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(errno) => Err(failed("connect to", path)(errno.into())),
    }
}

fn remove(path: &Path) -> Result<(), SocketError> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => Err(SocketError::NotASocket(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("look at", path)(error)),
        Ok(_) => match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
            _ => Ok(()),
        },
    }
}

/// Makes the socket's directory when it is missing and locks it until the file is dropped.
fn lock_directory(path: &Path) -> Result<File, SocketError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let open = || File::open(dir);
    let file = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(failed("make the directory", dir))?;
            open()
        }
        other => other,
    }
    .map_err(failed("open the directory", dir))?;
    flock(&file, FlockOperation::LockExclusive).map_err(|errno| failed("lock", dir)(errno.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_containerds() {
        // printf %s /run/containerd/containerd.sock/k8s.io/pod1 | sha256sum
        let path = path(
            Path::new(DEFAULT_DIR),
            "/run/containerd/containerd.sock",
            "k8s.io",
            "pod1",
        )
        .unwrap();
        assert_eq!(
            path.to_str().unwrap(),
            "/run/containerd/s/8e264b1ad347c80aee5f3dea6e4bb53d72026989222058782273d5db043c7723"
        );
    }

    #[test]
    fn joining_cleans_as_go_does() {
        assert_eq!(join(&["", "default", "c1"]), "default/c1");
        assert_eq!(
            join(&["/run//containerd/./c.sock", "ns", "c1"]),
            "/run/containerd/c.sock/ns/c1"
        );
        assert_eq!(
            join(&["unix:///run/c.sock", "ns", "c1"]),
            "unix:/run/c.sock/ns/c1"
        );
        assert_eq!(join(&["/a/../../b", "ns", "c"]), "/b/ns/c");
    }

    #[test]
    fn a_long_directory_is_refused() {
        let dir = PathBuf::from(format!("/{}", "d".repeat(50)));
        assert!(matches!(
            path(&dir, "", "n", "g"),
            Err(SocketError::TooLong { .. })
        ));
    }

    #[test]
    fn a_listener_is_found_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s").join("x");
        let Bound::New(first) = bind(&path).unwrap() else {
            panic!("nobody can be there yet")
        };
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            std::fs::metadata(path.parent().unwrap())
                .unwrap()
                .permissions()
                .mode()
                & 0o777,
            0o700
        );
        assert!(matches!(bind(&path).unwrap(), Bound::Answering));
        remove_stale(&path).unwrap();
        assert!(path.exists(), "a live socket stays");
        drop(first);
        assert!(matches!(bind(&path).unwrap(), Bound::New(_)));
        remove_stale(&path).unwrap();
        assert!(!path.exists(), "a dead socket goes");
        remove_stale(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(SocketError::NotASocket(_))));
        assert!(path.exists());
    }
}
