//! Where an image's blobs come from: an OCI layout directory, or a tar archive in OCI or docker form.
//!
//! An archive is indexed once and then read at offsets; nothing is extracted to disk here.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{ImageError, read_bounded};

/// The most bytes a manifest, index or configuration may have.
const MAX_JSON: u64 = 8 << 20;

/// Names a blob (OCI image specification, descriptor).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Where a docker archive keeps it.
    #[serde(skip)]
    pub member: Option<String>,
}

impl Descriptor {
    /// The digest's hexadecimal digits.
    pub fn hex(&self) -> Result<&str, ImageError> {
        match self.digest.strip_prefix("sha256:") {
            Some(hex) if hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => Ok(hex),
            _ => Err(ImageError::BadDigest(self.digest.clone())),
        }
    }

    fn path(&self) -> Result<String, ImageError> {
        match &self.member {
            Some(member) => Ok(member.clone()),
            None => Ok(format!("blobs/sha256/{}", self.hex()?)),
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
pub struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

/// An image manifest, in whatever form it came.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// One entry of a docker archive's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    layers: Vec<String>,
}

/// Holds an image's blobs.
pub enum Source {
    /// An OCI image layout.
    Layout(PathBuf),
    /// A tar archive with the members' positions and sizes in bytes.
    Archive {
        file: File,
        members: HashMap<String, (u64, u64)>,
    },
}

impl Source {
    /// Opens a layout directory or an archive.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        if path.is_dir() {
            return Ok(Self::Layout(path.to_owned()));
        }
        let open = |source| ImageError::Open {
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(open)?;
        let mut magic = [0; 4];
        let read = file.read(&mut magic).map_err(open)?;
        if magic[..read].starts_with(&[0x1f, 0x8b]) || magic[..read] == [0x28, 0xb5, 0x2f, 0xfd] {
            return Err(ImageError::Compressed(path.to_owned()));
        }
        file.rewind().map_err(open)?;
        let mut members = HashMap::new();
        let mut links = Vec::new();
        let mut archive = tar::Archive::new(file);
        let unknown = |_| ImageError::Unknown(path.to_owned());
        for entry in archive.entries_with_seek().map_err(unknown)? {
            let entry = entry.map_err(unknown)?;
            let name = entry.path().map_err(unknown)?;
            let name = name.to_string_lossy().trim_start_matches("./").to_owned();
            match entry.link_name() {
                // Old docker archives link a layer that occurs twice.
                Ok(Some(target)) => {
                    let parent = Path::new(&name).parent().unwrap_or(Path::new(""));
                    links.push((name.clone(), normalise(&parent.join(target))));
                }
                _ => {
                    members.insert(name, (entry.raw_file_position(), entry.size()));
                }
            }
        }
        for (name, target) in links {
            if let Some(&position) = members.get(&target) {
                members.insert(name, position);
            }
        }
        if !members.contains_key("index.json") && !members.contains_key("manifest.json") {
            return Err(ImageError::Unknown(path.to_owned()));
        }
        Ok(Self::Archive {
            file: archive.into_inner(),
            members,
        })
    }

    /// The manifest of the one image for this machine.
    pub fn manifest(&mut self) -> Result<Manifest, ImageError> {
        if self.has("index.json") {
            return self.oci_manifest();
        }
        let text = self.read("manifest.json")?;
        let mut manifests: Vec<DockerManifest> = parse("manifest.json", &text)?;
        let (Some(manifest), true) = (manifests.pop(), manifests.is_empty()) else {
            return Err(ImageError::NotOne {
                found: manifests.len() + 1,
            });
        };
        let config = self.read(&manifest.config)?;
        let media_type = "application/vnd.docker.image.rootfs.diff.tar".to_owned();
        Ok(Manifest {
            config: Descriptor {
                digest: digest(&config),
                member: Some(manifest.config),
                ..Descriptor::default()
            },
            layers: diff_ids(&config)?
                .into_iter()
                .zip(manifest.layers)
                .map(|(digest, member)| Descriptor {
                    media_type: media_type.clone(),
                    digest,
                    member: Some(member),
                    platform: None,
                })
                .collect(),
        })
    }

    fn oci_manifest(&mut self) -> Result<Manifest, ImageError> {
        let text = self.read("index.json")?;
        let mut index: Index = parse("index.json", &text)?;
        // An index may list indexes; deeper than this nobody nests them.
        for _ in 0..4 {
            let here: Vec<Descriptor> = index
                .manifests
                .into_iter()
                .filter(|descriptor| {
                    descriptor
                        .platform
                        .as_ref()
                        .is_none_or(|platform| platform.os == "linux" && platform.architecture == "amd64")
                })
                .collect();
            let [descriptor] = here.as_slice() else {
                return Err(ImageError::NotOne { found: here.len() });
            };
            let text = self.read_verified(descriptor)?;
            if !descriptor.media_type.ends_with("index.v1+json")
                && !descriptor.media_type.ends_with("list.v2+json")
            {
                return parse("manifest", &text);
            }
            index = parse("index", &text)?;
        }
        Err(ImageError::Missing("a manifest below its indexes".into()))
    }

    /// A small blob, checked against its digest.
    pub fn read_verified(&mut self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let bytes = self.read(&descriptor.path()?)?;
        let actual = digest(&bytes);
        if actual == descriptor.digest {
            Ok(bytes)
        } else {
            Err(ImageError::Digest {
                blob: descriptor.digest.clone(),
                actual,
            })
        }
    }

    /// A blob's size in bytes.
    pub fn size(&self, descriptor: &Descriptor) -> Result<u64, ImageError> {
        let path = descriptor.path()?;
        match self {
            Self::Layout(root) => root
                .join(&path)
                .metadata()
                .map(|metadata| metadata.len())
                .map_err(|_| ImageError::Missing(path)),
            Self::Archive { members, .. } => members
                .get(&path)
                .map(|&(_, size)| size)
                .ok_or(ImageError::Missing(path)),
        }
    }

    /// A blob as a stream.
    pub fn open_blob(&mut self, descriptor: &Descriptor) -> Result<Box<dyn Read>, ImageError> {
        self.open_member(&descriptor.path()?)
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Layout(root) => root.join(name).exists(),
            Self::Archive { members, .. } => members.contains_key(name),
        }
    }

    fn read(&mut self, name: &str) -> Result<Vec<u8>, ImageError> {
        read_bounded(self.open_member(name)?, MAX_JSON, name)
    }

    fn open_member(&mut self, name: &str) -> Result<Box<dyn Read>, ImageError> {
        let missing = || ImageError::Missing(name.to_owned());
        match self {
            Self::Layout(root) => {
                let file = File::open(root.join(name)).map_err(|_| missing())?;
                Ok(Box::new(file))
            }
            Self::Archive { file, members } => {
                let &(position, size) = members.get(name).ok_or_else(missing)?;
                let open = |source| ImageError::Open {
                    path: name.into(),
                    source,
                };
                let mut file = file.try_clone().map_err(open)?;
                file.seek(SeekFrom::Start(position)).map_err(open)?;
                Ok(Box::new(file.take(size)))
            }
        }
    }
}

fn diff_ids(config: &[u8]) -> Result<Vec<String>, ImageError> {
    let file: super::ConfigFile = parse("configuration", config)?;
    Ok(file.rootfs.diff_ids)
}

fn parse<'a, T: Deserialize<'a>>(what: &str, text: &'a [u8]) -> Result<T, ImageError> {
    serde_json::from_slice(text).map_err(|source| ImageError::Malformed {
        what: what.to_owned(),
        source,
    })
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// Hexadecimal digits of a hash.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Resolves `.` and `..` of a path inside an archive by name alone.
fn normalise(path: &Path) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.components() {
        match part {
            std::path::Component::Normal(part) => parts.extend(part.to_str()),
            std::path::Component::ParentDir => {
                parts.pop();
            }
            _ => {}
        }
    }
    parts.join("/")
}

/// Passes bytes through and hashes them.
pub struct HashingReader<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> HashingReader<R> {
    /// Starts with nothing hashed.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
        }
    }

    /// Reads to the end and returns the digest of everything.
    pub fn finish(mut self) -> io::Result<String> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(format!("sha256:{}", hex(&self.hash.finalize())))
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(members: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut builder = tar::Builder::new(file.reopen().unwrap());
        for (name, bytes) in members {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *bytes).unwrap();
        }
        builder.finish().unwrap();
        file
    }

    #[test]
    fn a_docker_archive_names_its_layers_by_diff_id() {
        let config = br#"{"rootfs":{"type":"layers","diff_ids":["sha256:aa"]}}"#;
        let manifest = br#"[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l/layer.tar"]}]"#;
        let file = archive(&[
            ("manifest.json", manifest),
            ("c.json", config),
            ("l/layer.tar", b"data"),
        ]);
        let mut source = Source::open(file.path()).unwrap();
        let manifest = source.manifest().unwrap();
        assert_eq!(manifest.layers[0].digest, "sha256:aa");
        assert_eq!(source.size(&manifest.layers[0]).unwrap(), 4);
        assert_eq!(source.read_verified(&manifest.config).unwrap(), config);
    }

    #[test]
    fn a_damaged_blob_and_a_missing_one_are_told_apart() {
        let wrong = "00".repeat(32);
        let index = format!(
            r#"{{"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{wrong}"}}]}}"#
        );
        let blob = format!("blobs/sha256/{wrong}");
        let file = archive(&[("index.json", index.as_bytes()), (&blob, b"{}")]);
        assert!(matches!(
            Source::open(file.path()).unwrap().manifest(),
            Err(ImageError::Digest { .. })
        ));
        let file = archive(&[("index.json", index.as_bytes())]);
        assert!(
            matches!(Source::open(file.path()).unwrap().manifest(), Err(ImageError::Missing(name)) if name == blob)
        );
    }

    #[test]
    fn an_image_for_another_machine_is_not_taken() {
        let index = br#"{"manifests":[{"mediaType":"m","digest":"sha256:00","platform":{"os":"linux","architecture":"arm64"}}]}"#;
        let file = archive(&[("index.json", index)]);
        assert!(matches!(
            Source::open(file.path()).unwrap().manifest(),
            Err(ImageError::NotOne { found: 0 })
        ));
    }

    #[test]
    fn a_digest_that_is_a_path_is_refused() {
        let descriptor = Descriptor {
            digest: "sha256:../../etc/passwd".into(),
            ..Descriptor::default()
        };
        assert!(matches!(descriptor.hex(), Err(ImageError::BadDigest(_))));
    }
}
