//! Lists of cases on file systems over virtio-fs, and on runc's: what fails here and not there is a fault.
//! docs/filesystems.md has the results and the reasons. Those on block devices are in `filesystem_blocks`.

use kata_rs_tests::lists::{Explained, Place};
use kata_rs_tests::{sh, unique};

const EXPLAINED: [Explained; 2] = [
    (
        "o_tmpfile_and_link",
        "FUSE_TMPFILE is not served: the guest's kernel says EOPNOTSUPP, and programs fall back to a name",
    ),
    (
        "link::link_count_max",
        "the suite leaves it out where pathconf(3) does not know the file system's LINK_MAX, as with every FUSE",
    ),
];

/// A directory of the host, removed when nobody has it any more.
struct Directory(String);

impl Directory {
    /// Makes it empty; mounts it.
    fn options(&self) -> String {
        let path = &self.0;
        let _ = sh(&format!("rm -rf {path}; mkdir -p {path}")).ok();
        format!("--mount type=bind,src={path},dst=/data,options=rbind:rw")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = sh(&format!("rm -rf {}", self.0));
    }
}

fn root() -> Place {
    Place::root("overlayfs over virtio-fs", "overlayfs", &EXPLAINED)
}

fn volume() -> Place {
    let directory = Directory(format!("/var/lib/{}", unique("volume")));
    Place {
        name: "a volume over virtio-fs",
        options: Box::new(move || directory.options()),
        directory: "/data",
        explained: &EXPLAINED,
    }
}

#[test]
fn a_root_file_system_over_virtiofs_has_overlayfs_semantics() {
    root().semantics_are_runcs();
}

#[test]
fn a_volume_over_virtiofs_has_the_semantics_of_the_hosts_file_system() {
    volume().semantics_are_runcs();
}

#[test]
fn pjdfstest_passes_on_a_root_file_system_where_it_does_with_runc() {
    root().posix_is_runcs();
}

#[test]
fn pjdfstest_passes_on_a_volume_where_it_does_with_runc() {
    volume().posix_is_runcs();
}
