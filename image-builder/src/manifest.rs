//! The manifest inside every guest image: what it was made from and what it holds. It makes an image recognisable and
//! its content checkable; it is not a signature.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::tree::{Content, INIT_PATH, Tree, absolute};

/// Where the manifest lies in the image.
pub const MANIFEST_PATH: &str = "etc/kata-rs-image.json";
/// The version of the manifest and of the image's layout that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// A manifest that is missing, foreign or contradicted by the image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ManifestError {
    /// Some other initramfs or filesystem.
    #[error("it holds no /{MANIFEST_PATH}: it is not a kata-rs guest image")]
    Missing,
    /// Not the JSON this program writes.
    #[error("its /{MANIFEST_PATH} cannot be read: {0}")]
    Unreadable(String),
    /// Made by another release.
    #[error(
        "it has image format {0}, this program knows {FORMAT_VERSION}: build the image with this release"
    )]
    Version(u32),
    /// The listed file is absent.
    #[error("{0} is in the manifest but not in the image: build the image again")]
    FileMissing(String),
    /// The file exists, but not in the manifest.
    #[error("{0} is in the image but not in the manifest: build the image again")]
    FileUnknown(String),
    /// The bytes or the mode are not what was recorded.
    #[error("{0} differs from the manifest: the image is damaged, build it again")]
    FileDiffers(String),
}

/// What the image was made from and holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the builder.
    pub format_version: u32,
    /// SHA-256 of the agent binary, lower-case hex.
    pub agent_sha256: String,
    /// Every regular file but the manifest, sorted by path.
    pub files: Vec<FileRecord>,
}

/// One regular file of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Absolute guest path.
    pub path: String,
    /// Permission bits in octal, as `ls` users write them: `0755`.
    pub mode: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 of the bytes, lower-case hex.
    pub sha256: String,
}

#[derive(Deserialize)]
struct VersionOnly {
    format_version: u32,
}

impl Manifest {
    /// Describes `tree` (a manifest in it is left out).
    pub fn of(tree: &Tree) -> Self {
        let files: Vec<FileRecord> = tree
            .iter()
            .filter(|(path, _)| *path != MANIFEST_PATH)
            .filter_map(|(path, node)| match &node.content {
                Content::Directory => None,
                Content::File(bytes) => Some(FileRecord {
                    path: absolute(path),
                    mode: format!("{:04o}", node.mode),
                    size: bytes.len() as u64,
                    sha256: sha256_hex(bytes),
                }),
            })
            .collect();
        let agent_sha256 = tree.file(INIT_PATH).map(sha256_hex).unwrap_or_default();
        Self {
            format_version: FORMAT_VERSION,
            agent_sha256,
            files,
        }
    }

    /// The bytes that go into the image.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Plain structs of strings and numbers always have a JSON form.
        let mut json = serde_json::to_vec_pretty(self).expect("a manifest is plain data");
        json.push(b'\n');
        json
    }

    /// Finds the manifest of an image and holds the image against it.
    ///
    /// # Errors
    /// A missing, unreadable or foreign manifest, and the first file that contradicts it.
    pub fn verify(tree: &Tree) -> Result<Self, ManifestError> {
        let bytes = tree.file(MANIFEST_PATH).ok_or(ManifestError::Missing)?;
        let unreadable = |error: serde_json::Error| ManifestError::Unreadable(error.to_string());
        // The version is read first: a later format may have other fields.
        let VersionOnly { format_version } = serde_json::from_slice(bytes).map_err(unreadable)?;
        if format_version != FORMAT_VERSION {
            return Err(ManifestError::Version(format_version));
        }
        let recorded: Self = serde_json::from_slice(bytes).map_err(unreadable)?;
        let found = Self::of(tree);
        for file in &recorded.files {
            match found.files.iter().find(|other| other.path == file.path) {
                None => return Err(ManifestError::FileMissing(file.path.clone())),
                Some(other) if other != file => return Err(ManifestError::FileDiffers(file.path.clone())),
                Some(_) => {}
            }
        }
        if let Some(file) = found
            .files
            .iter()
            .find(|file| !recorded.files.iter().any(|other| other.path == file.path))
        {
            return Err(ManifestError::FileUnknown(file.path.clone()));
        }
        if recorded.agent_sha256 != found.agent_sha256 {
            return Err(ManifestError::FileDiffers(absolute(INIT_PATH)));
        }
        Ok(recorded)
    }
}

/// SHA-256 in lower-case hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(bytes)
        .iter()
        .fold(String::with_capacity(64), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::new();
        tree.add_file(INIT_PATH, 0o755, b"agent".to_vec()).unwrap();
        tree.add_file("etc/motd", 0o644, b"hello".to_vec()).unwrap();
        tree
    }

    fn with_manifest_of(other: &Tree, mut tree: Tree) -> Tree {
        tree.add_file(MANIFEST_PATH, 0o644, Manifest::of(other).to_bytes())
            .unwrap();
        tree
    }

    #[test]
    fn digest_is_the_standard_one() {
        assert_eq!(
            sha256_hex(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn a_true_manifest_verifies() {
        let tree = with_manifest_of(&sample(), sample());
        assert_eq!(Manifest::verify(&tree).unwrap(), Manifest::of(&sample()));
    }

    #[test]
    fn every_lie_is_found() {
        assert_eq!(Manifest::verify(&sample()), Err(ManifestError::Missing));

        let mut changed = Tree::new();
        changed.add_file(INIT_PATH, 0o755, b"agent".to_vec()).unwrap();
        changed.add_file("etc/motd", 0o644, b"hellO".to_vec()).unwrap();
        let tree = with_manifest_of(&sample(), changed);
        assert_eq!(
            Manifest::verify(&tree),
            Err(ManifestError::FileDiffers("/etc/motd".into()))
        );

        let mut less = Tree::new();
        less.add_file(INIT_PATH, 0o755, b"agent".to_vec()).unwrap();
        assert_eq!(
            Manifest::verify(&with_manifest_of(&sample(), less.clone())),
            Err(ManifestError::FileMissing("/etc/motd".into()))
        );
        assert_eq!(
            Manifest::verify(&with_manifest_of(&less, sample())),
            Err(ManifestError::FileUnknown("/etc/motd".into()))
        );
    }

    #[test]
    fn other_versions_are_named() {
        let mut tree = sample();
        tree.add_file(MANIFEST_PATH, 0o644, br#"{"format_version":9,"new":[]}"#.to_vec())
            .unwrap();
        assert_eq!(Manifest::verify(&tree), Err(ManifestError::Version(9)));
    }
}
