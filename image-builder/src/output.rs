//! Writes the finished image: whole, under its own name, or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// An image that could not be written. Nothing is left behind in any case.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// No space, or over quota.
    #[error("cannot write {}: no space left; free {needed} bytes there or name another --output", path.display())]
    NoSpace {
        /// The file asked for.
        path: PathBuf,
        /// Size of the image in bytes.
        needed: usize,
    },
    /// Any other reason.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file asked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Writes `bytes` to `path`. A regular file is replaced in one step; a pipe or device is written to as it is.
///
/// # Errors
/// See [`OutputError`].
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), OutputError> {
    let result = match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() && !metadata.is_dir() => OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|mut file| file.write_all(bytes)),
        _ => replace(path, bytes),
    };
    result.map_err(|source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            OutputError::NoSpace {
                path: path.to_owned(),
                needed: bytes.len(),
            }
        }
        _ => OutputError::Write {
            path: path.to_owned(),
            source,
        },
    })
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::IsADirectory)?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.tmp", std::process::id()));
    let temporary = Temporary(path.with_file_name(hidden));
    let mut file = File::create(&temporary.0)?;
    file.write_all(bytes)?;
    // The name must never lead to an empty file, not even after a crash of the machine.
    file.sync_all()?;
    fs::rename(&temporary.0, path)
}

/// A file that is gone when this goes away; after the rename there is nothing left to remove.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn replaces_in_one_step_and_leaves_one_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("guest.img");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(directory.path()), ["guest.img"]);
    }

    #[test]
    fn a_full_disk_is_named() {
        let error = write(Path::new("/dev/full"), &[1; 4096]).unwrap_err();
        assert!(
            matches!(error, OutputError::NoSpace { needed: 4096, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("4096 bytes"));
    }

    #[test]
    fn a_failed_replacement_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        // A directory in the way makes the last step fail, after the data was written.
        let path = directory.path().join("taken");
        fs::create_dir(&path).unwrap();
        assert!(matches!(write(&path, b"image"), Err(OutputError::Write { .. })));
        assert_eq!(names(directory.path()), ["taken"]);
        assert!(matches!(
            write(&directory.path().join("no/such/place"), b""),
            Err(OutputError::Write { .. })
        ));
    }
}
