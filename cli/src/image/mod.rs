//! Images: from a file or directory that a person names to a root file system and the command to run in it.
//!
//! What holds the blobs is [`source`]; what unpacks a layer is [`layer`]. Nothing is fetched from anywhere.

mod layer;
mod source;

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::FlockOperation;
use serde::Deserialize;

use source::{Descriptor, Source};

/// An image that is ready to be run.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its root file system, never to be written to.
    pub rootfs: PathBuf,
    /// What it says about running it.
    pub config: ImageConfig,
}

/// What an image says about running it (OCI image specification, `config`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    #[serde(deserialize_with = "null_as_default")]
    pub entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub cmd: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub env: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub user: String,
    #[serde(deserialize_with = "null_as_default")]
    pub working_dir: String,
}

fn null_as_default<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default, deserialize_with = "null_as_default")]
    config: ImageConfig,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("cannot open the image {path}: give an OCI layout, an OCI or docker archive, or a directory")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It is none of the known forms.
    #[error(
        "{0} is not an image: it is neither a directory nor a tar archive with index.json or manifest.json"
    )]
    Unknown(PathBuf),
    /// The archive itself is compressed.
    #[error("{0} is a compressed archive: decompress it first (gunzip, unzstd)")]
    Compressed(PathBuf),
    /// A member is missing.
    #[error("the image is incomplete: it lacks {0}")]
    Missing(String),
    /// A member cannot be understood.
    #[error("the image's {what} is not understood")]
    Malformed {
        what: String,
        #[source]
        source: serde_json::Error,
    },
    /// A member is larger than sensible.
    #[error("the image's {0} is too large to be what it claims to be")]
    TooLarge(String),
    /// There is no image for this machine in it, or more than one.
    #[error(
        "the image holds {found} images for linux/amd64, not one: extract one, for instance with `skopeo copy`"
    )]
    NotOne { found: usize },
    /// A blob's content is not what its digest says.
    #[error("{blob} is damaged: its content has the digest {actual}")]
    Digest { blob: String, actual: String },
    /// A digest in an algorithm we do not know, or not a digest.
    #[error("\"{0}\" is not a sha256 digest")]
    BadDigest(String),
    /// A layer in a format we do not know.
    #[error(
        "layers of type {0} are not supported: use tar or tar+gzip, for instance with `skopeo copy --dest-compress-format gzip`"
    )]
    LayerType(String),
    /// A layer tries to write outside the root file system, or is damaged.
    #[error("layer {digest} cannot be unpacked at \"{entry}\"")]
    Layer {
        digest: String,
        entry: String,
        #[source]
        source: io::Error,
    },
    /// The disk is full, or the store is not writable.
    #[error("cannot store the image in {path}")]
    Store {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Opens an image; unpacks it below `store` unless that has been done before.
///
/// # Errors
/// [`ImageError`]; nothing half-unpacked is left behind.
pub fn open(path: &Path, store: &Path) -> Result<Image, ImageError> {
    let metadata = fs::metadata(path).map_err(|source| ImageError::Open {
        path: path.to_owned(),
        source,
    })?;
    if metadata.is_dir() && !path.join("oci-layout").exists() {
        let rootfs = path.canonicalize().map_err(|source| ImageError::Open {
            path: path.to_owned(),
            source,
        })?;
        return Ok(Image {
            rootfs,
            config: ImageConfig::default(),
        });
    }
    let mut source = Source::open(path)?;
    let manifest = source.manifest()?;
    let text = source.read_verified(&manifest.config)?;
    let config: ConfigFile = serde_json::from_slice(&text).map_err(|source| ImageError::Malformed {
        what: "configuration".into(),
        source,
    })?;
    if config.rootfs.diff_ids.len() != manifest.layers.len() {
        return Err(ImageError::Missing("a layer for each diff_id".into()));
    }
    let directory = store.join(manifest.config.hex()?);
    let stored = |source| ImageError::Store {
        path: directory.clone(),
        source,
    };
    if !directory.exists() {
        fs::create_dir_all(store).map_err(stored)?;
        // One process unpacks, others wait for it.
        let lock = fs::File::create(store.join("lock")).map_err(stored)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(|errno| stored(errno.into()))?;
        if !directory.exists() {
            let partial = tempfile::Builder::new()
                .prefix("unpacking-")
                .tempdir_in(store)
                .map_err(stored)?;
            unpack(&mut source, &manifest.layers, partial.path())?;
            fs::rename(partial.path(), &directory).map_err(stored)?;
            // The directory has its final name: nothing is left to be removed.
            let _ = partial.keep();
        }
    }
    Ok(Image {
        rootfs: directory.join("rootfs"),
        config: config.config,
    })
}

fn unpack(source: &mut Source, layers: &[Descriptor], directory: &Path) -> Result<(), ImageError> {
    let rootfs = directory.join("rootfs");
    fs::create_dir(&rootfs)
        .and_then(|()| fs::set_permissions(&rootfs, std::os::unix::fs::PermissionsExt::from_mode(0o755)))
        .map_err(|source| ImageError::Store {
            path: rootfs.clone(),
            source,
        })?;
    let mut total = 0;
    for layer in layers {
        total += source.size(layer)?;
    }
    // Drawn only on a terminal, and only when it takes a while.
    let progress = ProgressBar::new(total).with_style(
        ProgressStyle::with_template("unpacking image {bar:30} {bytes}/{total_bytes}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    progress.enable_steady_tick(Duration::from_secs(1));
    for descriptor in layers {
        let blob = progress.wrap_read(source.open_blob(descriptor)?);
        layer::apply(blob, descriptor, &rootfs)?;
    }
    progress.finish_and_clear();
    Ok(())
}

/// Reads at most `limit` bytes; more is an error.
fn read_bounded(reader: impl Read, limit: u64, what: &str) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    let open = |source| ImageError::Open {
        path: what.into(),
        source,
    };
    reader.take(limit + 1).read_to_end(&mut bytes).map_err(open)?;
    if bytes.len() as u64 > limit {
        Err(ImageError::TooLarge(what.to_owned()))
    } else {
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_a_root_file_system_without_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let image = open(directory.path(), Path::new("/nowhere")).unwrap();
        assert_eq!(image.rootfs, directory.path().canonicalize().unwrap());
        assert_eq!(image.config, ImageConfig::default());
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let store = tempfile::tempdir().unwrap();
        let error = open(Path::new("/etc/passwd"), store.path()).unwrap_err();
        assert!(matches!(error, ImageError::Unknown(_)), "{error}");
        assert!(error.to_string().contains("/etc/passwd"));
        assert!(matches!(
            open(Path::new("/no/such/image"), store.path()),
            Err(ImageError::Open { .. })
        ));
        let gzip = store.path().join("image.tar.gz");
        fs::write(&gzip, [0x1f, 0x8b, 8, 0, 0, 0, 0, 0]).unwrap();
        assert!(matches!(
            open(&gzip, store.path()),
            Err(ImageError::Compressed(_))
        ));
    }

    #[test]
    fn an_image_configuration_may_leave_everything_out_or_null() {
        let text = r#"{"config":{"Cmd":null,"Env":["A=b"],"Entrypoint":["/x"]},"rootfs":{"type":"layers","diff_ids":[]}}"#;
        let file: ConfigFile = serde_json::from_str(text).unwrap();
        assert_eq!(
            (file.config.entrypoint, file.config.cmd.len()),
            (vec!["/x".to_owned()], 0)
        );
        assert!(serde_json::from_str::<ConfigFile>(r#"{"config":null,"rootfs":{"diff_ids":[]}}"#).is_ok());
    }
}
