//! What a VM boots from, opened on the host: `/dev/kvm`, the guest kernel and the guest image. A thing that is
//! missing or foreign is named here, with its cure, before a VMM is spawned.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{ErrorKind, kind_of_io};

/// Where KVM is.
const KVM: &str = "/dev/kvm";

/// Why a VM cannot boot.
#[derive(Debug, thiserror::Error)]
pub enum BootFileError {
    /// KVM is not there.
    #[error(
        "{KVM} does not exist: load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware \
         (in a VM: nested virtualisation in its host)"
    )]
    NoKvm,
    /// The module is there, the hardware does not answer.
    #[error(
        "{KVM} cannot be opened: no KVM module serves it: load kvm_intel or kvm_amd, and enable virtualisation in \
         the firmware"
    )]
    DeadKvm,
    /// This user may not use KVM.
    #[error(
        "{KVM} cannot be opened: permission denied: add the user to the group that owns it (usually kvm), or run \
         as root"
    )]
    KvmDenied,
    /// Another hypervisor holds the processor's virtualisation.
    #[error("{KVM} is busy: another hypervisor uses the processor's virtualisation: end it")]
    KvmBusy,
    /// KVM does not open for another reason.
    #[error("{KVM} cannot be opened")]
    Kvm(#[source] io::Error),
    /// A file is missing.
    #[error(
        "{what} {path} does not exist: `{make}` builds it, and the key `{key}` of the configuration names it"
    )]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// The command that makes it.
        make: &'static str,
        /// The configuration key.
        key: &'static str,
    },
    /// A file cannot be read.
    #[error("{what} {path} cannot be read")]
    Unreadable {
        /// What it is.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A file is something else.
    #[error("{what} {path} is not {expected}: `{make}` builds the right one")]
    Foreign {
        /// What it should be.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What it would have to be.
        expected: &'static str,
        /// The command that makes it.
        make: &'static str,
    },
}

impl BootFileError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::NoKvm | Self::DeadKvm | Self::KvmBusy => ErrorKind::Unavailable,
            Self::KvmDenied => ErrorKind::PermissionDenied,
            Self::Missing { .. } | Self::Foreign { .. } => ErrorKind::FailedPrecondition,
            Self::Kvm(cause) | Self::Unreadable { cause, .. } => kind_of_io(cause),
        }
    }
}

/// What kind of guest image a file is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ImageKind {
    /// A cpio archive, plain or compressed: the kernel unpacks it into memory.
    Initramfs,
    /// An EROFS file system: the guest's root as a block device.
    Erofs,
}

/// Opens KVM.
pub(crate) fn open_kvm() -> Result<File, BootFileError> {
    let error = match File::options().read(true).write(true).open(KVM) {
        Ok(kvm) => return Ok(kvm),
        Err(error) => error,
    };
    Err(match error.raw_os_error() {
        Some(libc::ENOENT) => BootFileError::NoKvm,
        Some(libc::ENXIO | libc::ENODEV) => BootFileError::DeadKvm,
        Some(libc::EACCES | libc::EPERM) => BootFileError::KvmDenied,
        Some(libc::EBUSY) => BootFileError::KvmBusy,
        _ => BootFileError::Kvm(error),
    })
}

/// Opens the guest kernel and sees that it is a 64-bit ELF file for x86; the VMM checks the rest.
pub(crate) fn open_kernel(path: &Path) -> Result<File, BootFileError> {
    let file = open("the guest kernel", path, "make kernel", "kernel")?;
    // e_ident: magic, ELFCLASS64, ELFDATA2LSB (System V ABI, ELF header); e_machine at 18 is EM_X86_64 (62).
    let mut head = [0; 20];
    let read = file
        .read_at(&mut head, 0)
        .map_err(|cause| BootFileError::Unreadable {
            what: "the guest kernel",
            path: path.to_owned(),
            cause,
        })?;
    if read < head.len() || !head.starts_with(b"\x7fELF\x02\x01") || head[18..20] != [62, 0] {
        return Err(BootFileError::Foreign {
            what: "the guest kernel",
            path: path.to_owned(),
            expected: "a vmlinux (64-bit ELF for x86-64)",
            make: "make kernel",
        });
    }
    Ok(file)
}

/// Opens the guest image and tells its kind.
pub(crate) fn open_image(path: &Path) -> Result<(File, ImageKind), BootFileError> {
    let file = open("the guest image", path, "make image", "guest_image")?;
    let unreadable = |cause| BootFileError::Unreadable {
        what: "the guest image",
        path: path.to_owned(),
        cause,
    };
    let mut head = [0; 1028];
    let read = file.read_at(&mut head, 0).map_err(unreadable)?;
    let head = &head[..read];
    // The magic numbers of cpio newc, gzip, xz, zstd and lz4 (legacy), as the kernel's initramfs code knows them.
    let archives: [&[u8]; 5] = [
        b"070701",
        b"\x1f\x8b",
        b"\xfd7zXZ",
        b"\x28\xb5\x2f\xfd",
        b"\x02\x21\x4c\x18",
    ];
    if archives.iter().any(|magic| head.starts_with(magic)) {
        return Ok((file, ImageKind::Initramfs));
    }
    // struct erofs_super_block begins at 1024 with 0xE0F5E1E2, little-endian.
    if head.get(1024..1028) == Some(&[0xe2, 0xe1, 0xf5, 0xe0]) {
        return Ok((file, ImageKind::Erofs));
    }
    Err(BootFileError::Foreign {
        what: "the guest image",
        path: path.to_owned(),
        expected: "a cpio archive or an EROFS file system",
        make: "make image",
    })
}

fn open(
    what: &'static str,
    path: &Path,
    make: &'static str,
    key: &'static str,
) -> Result<File, BootFileError> {
    File::open(path).map_err(|cause| match cause.kind() {
        io::ErrorKind::NotFound => BootFileError::Missing {
            what,
            path: path.to_owned(),
            make,
            key,
        },
        _ => BootFileError::Unreadable {
            what,
            path: path.to_owned(),
            cause,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn a_missing_kernel_says_how_to_get_one() {
        let error = open_kernel(Path::new("/nonexistent/vmlinux"))
            .unwrap_err()
            .to_string();
        for word in ["/nonexistent/vmlinux", "make kernel", "`kernel`"] {
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_kernel_must_be_an_elf_file_of_this_architecture() {
        let mut elf = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0";
        open_kernel(file(&elf).path()).unwrap();
        elf[18] = 183;
        assert!(matches!(
            open_kernel(file(&elf).path()),
            Err(BootFileError::Foreign { .. })
        ));
        assert!(matches!(
            open_kernel(file(b"\x7fELF").path()),
            Err(BootFileError::Foreign { .. })
        ));
        assert!(matches!(
            open_kernel(file(b"MZ a bzImage, not a vmlinux").path()),
            Err(BootFileError::Foreign { .. })
        ));
    }

    #[test]
    fn an_image_is_known_by_its_content() {
        assert_eq!(
            open_image(file(b"070701000").path()).unwrap().1,
            ImageKind::Initramfs
        );
        let mut erofs = vec![0; 4096];
        erofs[1024..1028].copy_from_slice(&0xE0F5_E1E2u32.to_le_bytes());
        assert_eq!(open_image(file(&erofs).path()).unwrap().1, ImageKind::Erofs);
        let error = open_image(file(b"").path()).unwrap_err();
        assert!(error.to_string().contains("make image"), "{error}");
    }

    #[test]
    fn a_directory_is_not_a_kernel() {
        let error = open_kernel(Path::new("/tmp")).unwrap_err();
        assert!(matches!(error, BootFileError::Unreadable { .. }), "{error:?}");
    }
}
