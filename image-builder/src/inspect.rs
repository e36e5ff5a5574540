//! Describes an image for a person or a program: format, digest, entries, and whether it is what was built.

use std::fmt::Write;

use serde::Serialize;

use crate::image::{self, ImageError};
use crate::manifest::{Manifest, sha256_hex};
use crate::tree::{Content, absolute};

/// What `inspect` reports. The JSON form has the fields in this order.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// `initramfs` or `erofs`.
    pub format: String,
    /// Size of the image in bytes.
    pub size: usize,
    /// SHA-256 of the image, lower-case hex.
    pub sha256: String,
    /// Files and directories, sorted by path.
    pub entries: Vec<Entry>,
    /// The manifest, already checked against the entries.
    pub manifest: Manifest,
}

/// One line of the listing.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Absolute guest path.
    pub path: String,
    /// `file` or `directory`.
    pub kind: &'static str,
    /// Permission bits in octal.
    pub mode: String,
    /// Bytes of a file, 0 for a directory.
    pub size: usize,
}

impl Report {
    /// Reads and checks an image.
    ///
    /// # Errors
    /// Anything that is not a whole image of this project.
    pub fn of(bytes: &[u8]) -> Result<Self, ImageError> {
        let (format, tree, manifest) = image::decode(bytes)?;
        let entries = tree
            .iter()
            .map(|(path, node)| {
                let (kind, size) = match &node.content {
                    Content::Directory => ("directory", 0),
                    Content::File(bytes) => ("file", bytes.len()),
                };
                Entry {
                    path: absolute(path),
                    kind,
                    mode: format!("{:04o}", node.mode),
                    size,
                }
            })
            .collect();
        Ok(Self {
            format: format.to_string(),
            size: bytes.len(),
            sha256: sha256_hex(bytes),
            entries,
            manifest,
        })
    }

    /// The report as text, one entry per line.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "format  {} (version {})\nsize    {}\nsha256  {}\nagent   {}\n\n",
            self.format, self.manifest.format_version, self.size, self.sha256, self.manifest.agent_sha256
        );
        for entry in &self.entries {
            let slash = if entry.kind == "directory" { "/" } else { "" };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{} {:>10} {}{slash}", entry.mode, entry.size, entry.path);
        }
        text.push_str("\nevery file matches the manifest\n");
        text
    }
}
