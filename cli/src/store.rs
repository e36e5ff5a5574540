//! Where containers are remembered: one directory each under `<root>/containers`, one socket each under
//! `/run/kata-rs/cli`.
//!
//! A record says who holds the container. When that process is gone without having said how the container ended
//! (power cut, kill -9), the container counts as lost, and `rm` removes what it left.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Where the holders of running containers listen.
const SOCKETS: &str = "/run/kata-rs/cli";

/// The directory tree below `--root`.
pub struct Store {
    root: PathBuf,
}

/// What is remembered of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    /// The image as it was named.
    pub image: String,
    pub command: Vec<String>,
    /// Seconds since the epoch.
    pub created: u64,
    /// The process that holds the container.
    pub holder: Holder,
    /// The host process that stands for it; absent while it is being made.
    pub pid: Option<u32>,
    /// Exit status, when it has exited.
    pub status: Option<u8>,
}

/// A process, told from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    /// proc_pid_stat(5), field 22: clock ticks since boot.
    pub started: u64,
}

/// What a container is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Creating,
    Running,
    Exited,
    /// Its holder died.
    Lost,
}

impl Holder {
    /// This process.
    pub fn current() -> Self {
        let pid = std::process::id();
        Self {
            pid,
            started: start_time(pid).unwrap_or_default(),
        }
    }

    /// Whether it still lives.
    pub fn alive(self) -> bool {
        start_time(self.pid) == Some(self.started)
    }
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold anything; fields are counted after it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if state == "Z" {
        None
    } else {
        fields.nth(18)?.parse().ok()
    }
}

impl Record {
    pub fn state(&self) -> State {
        match (self.status, self.holder.alive(), self.pid) {
            (Some(_), _, _) => State::Exited,
            (None, false, _) => State::Lost,
            (None, true, None) => State::Creating,
            (None, true, Some(_)) => State::Running,
        }
    }
}

impl Store {
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Where images are unpacked.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The root as it was given.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes a name, or makes one up, and makes the container's directory.
    ///
    /// # Errors
    /// [`Error::BadName`], [`Error::NameTaken`], or the directory cannot be made.
    pub fn create(&self, name: Option<String>, image: &Path, command: &[String]) -> Result<Home, Error> {
        let name = match name {
            Some(name) if valid(&name) => name,
            Some(name) => return Err(Error::BadName(name)),
            None => made_up(),
        };
        let path = self.containers().join(&name);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(self.containers())
            .map_err(Error::file("cannot make", self.containers()))?;
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(Error::NameTaken(name)),
            Err(error) => return Err(Error::file("cannot make", path)(error)),
        }
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let home = Home {
            path,
            record: Record {
                name,
                image: image.display().to_string(),
                command: command.to_vec(),
                created,
                holder: Holder::current(),
                pid: None,
                status: None,
            },
        };
        let prepared = ["upper", "work"]
            .iter()
            .try_for_each(|part| fs::create_dir(home.path.join(part)))
            .map_err(Error::file("cannot make directories in", &home.path))
            .and_then(|()| home.save());
        match prepared {
            Ok(()) => Ok(home),
            Err(error) => {
                home.remove();
                Err(error)
            }
        }
    }

    /// Finds a container.
    ///
    /// # Errors
    /// [`Error::NoContainer`].
    pub fn find(&self, name: &str) -> Result<Home, Error> {
        if !valid(name) {
            return Err(Error::BadName(name.to_owned()));
        }
        let path = self.containers().join(name);
        let text = fs::read(path.join("state.json")).map_err(|_| Error::NoContainer(name.to_owned()))?;
        let record = serde_json::from_slice(&text)
            .map_err(|error| Error::file("cannot read the record in", &path)(io::Error::other(error)))?;
        Ok(Home { path, record })
    }

    /// All containers by name. Directories without a record are those of containers just being made.
    pub fn all(&self) -> Vec<Home> {
        let Ok(entries) = fs::read_dir(self.containers()) else {
            return Vec::new();
        };
        let mut homes: Vec<Home> = entries
            .flatten()
            .filter_map(|entry| self.find(entry.file_name().to_str()?).ok())
            .collect();
        homes.sort_by(|a, b| a.record.name.cmp(&b.record.name));
        homes
    }

    fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }
}

/// A container's directory.
pub struct Home {
    path: PathBuf,
    pub record: Record,
}

impl Home {
    /// Where overlayfs(5) keeps what the container writes.
    pub fn upper(&self) -> PathBuf {
        self.path.join("upper")
    }

    /// overlayfs(5) work directory.
    pub fn work(&self) -> PathBuf {
        self.path.join("work")
    }

    /// The directory itself: the container's bundle.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a detached container's output goes.
    pub fn log(&self) -> PathBuf {
        self.path.join("output.log")
    }

    /// Where its holder listens.
    pub fn socket(&self) -> PathBuf {
        Path::new(SOCKETS).join(format!("{}.sock", self.record.name))
    }

    /// Makes the directory for the socket and removes one that a dead holder left.
    pub fn prepare_socket(&self) -> Result<PathBuf, Error> {
        let directory = Path::new(SOCKETS);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(Error::file("cannot make", directory))?;
        let path = self.socket();
        let _ = fs::remove_file(&path);
        Ok(path)
    }

    /// Writes the record, whole or not at all.
    pub fn save(&self) -> Result<(), Error> {
        let path = self.path.join("state.json");
        let partial = self.path.join("state.json.new");
        let failed = Error::file("cannot write", &path);
        let write = || -> io::Result<()> {
            let text = serde_json::to_vec(&self.record).map_err(io::Error::other)?;
            File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&partial)?
                .write_all(&text)?;
            fs::rename(&partial, &path)
        };
        write().map_err(failed)
    }

    /// Removes everything of the container.
    pub fn remove(&self) {
        let _ = fs::remove_file(self.socket());
        // Both are removed only when they are empty: others may use them.
        let _ = fs::remove_dir(SOCKETS);
        let _ = fs::remove_dir("/run/kata-rs");
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("kata-rs: cannot remove {}: {error}", self.path.display());
        }
    }
}

fn valid(name: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    (1..=64).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(rest)
}

/// Twelve random hexadecimal digits.
fn made_up() -> String {
    let mut bytes = [0; 6];
    // Without entropy the process number still tells containers apart.
    if rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).is_err() {
        bytes[..4].copy_from_slice(&std::process::id().to_le_bytes());
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_once_and_free_again_after_removal() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        let home = store.create(Some("one".into()), Path::new("image"), &[]).unwrap();
        assert!(matches!(
            store.create(Some("one".into()), Path::new("image"), &[]),
            Err(Error::NameTaken(_))
        ));
        assert_eq!(store.find("one").unwrap().record.state(), State::Creating);
        assert_eq!(store.all().len(), 1);
        home.remove();
        assert!(matches!(store.find("one"), Err(Error::NoContainer(_))));
        let other = store.create(None, Path::new("image"), &[]).unwrap();
        assert!(valid(&other.record.name));
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        for name in ["", "..", ".x", "a/b", "-x", &"x".repeat(65)] {
            assert!(
                matches!(
                    store.create(Some(name.to_owned()), Path::new("i"), &[]),
                    Err(Error::BadName(_))
                ),
                "{name}"
            );
            assert!(store.find(name).is_err());
        }
    }

    #[test]
    fn a_holder_that_died_loses_its_container() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let holder = Holder {
            pid: child.id(),
            started: start_time(child.id()).unwrap_or(1),
        };
        child.wait().unwrap();
        assert!(!holder.alive());
        assert!(Holder::current().alive());
        assert!(
            !Holder {
                started: 1,
                ..Holder::current()
            }
            .alive()
        );
    }
}
