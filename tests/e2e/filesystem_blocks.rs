//! Lists of cases on root file systems that are block devices of the guest, and on runc's with the same snapshotter;
//! and what the guest's mount table says that they are. docs/filesystems.md has the results and the reasons.

use kata_rs_tests::lists::{Explained, Place};
use kata_rs_tests::{DEBIAN, IMAGES, RUNTIME, sh, unique};

const ON_TMPFS: [Explained; 1] = [(
    "fallocate_zeroes",
    "a tmpfs has no FALLOC_FL_ZERO_RANGE; programs write zeros instead",
)];

/// The version of containerd with the erofs snapshotter that leaves mounting to the runtime, until the test ends.
struct Containerd;

impl Containerd {
    /// `rwlayer`: the snapshotter gives containers a block image to write to.
    #[track_caller]
    fn start(rwlayer: &str) -> Self {
        let this = Self;
        let _ = sh(&format!("use-containerd 2.3 {rwlayer}")).ok();
        unpack("erofs");
        this
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = sh("use-containerd 2.1");
    }
}

/// Unpacks the image for a snapshotter, once.
#[track_caller]
fn unpack(snapshotter: &str) {
    let _ = sh(&format!(
        "done=/run/kata-rs-test-debian-{snapshotter}; [ -e $done ] || \
         {{ ctr images import --local --snapshotter {snapshotter} {IMAGES}/debian.oci.tar >/dev/null && touch $done; }}"
    ))
    .ok();
}

/// What the agent has mounted: type and source of all that is on a disk or shared by the host.
#[track_caller]
fn guest_mounts(snapshotter: &str) -> Vec<String> {
    let outcome = sh(&format!(
        "ctr run --rm --runtime {RUNTIME} --snapshotter {snapshotter} --with-ns pid:/proc/1/ns/pid {DEBIAN} {} \
         findmnt --task 1 --list --nofsroot --noheadings --output FSTYPE,SOURCE --types erofs,ext4,virtiofs",
        unique("t")
    ));
    let lines = outcome.ok().lines();
    lines
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn a_thin_device_has_the_semantics_of_its_file_system() {
    unpack("devmapper");
    Place::root("ext4 on virtio-blk", "devmapper", &[]).semantics_are_runcs();
}

#[test]
fn erofs_with_a_block_image_has_the_semantics_that_it_has_with_runc() {
    let _containerd = Containerd::start("rwlayer");
    let place = Place::root("overlayfs of erofs and ext4 on virtio-blk", "erofs", &[]);
    place.semantics_are_runcs();
    place.posix_is_runcs();
}

#[test]
fn erofs_with_the_guests_memory_has_the_semantics_that_it_has_with_runc() {
    let _containerd = Containerd::start("");
    Place::root("overlayfs of erofs on virtio-blk and tmpfs", "erofs", &ON_TMPFS).semantics_are_runcs();
}

#[test]
fn findmnt_in_the_guest_shows_what_a_root_file_system_is_made_of() {
    // All shares, and the one that is the root file system.
    assert_eq!(
        guest_mounts("overlayfs"),
        ["virtiofs kata-rs", "virtiofs kata-rs"]
    );
    {
        let _containerd = Containerd::start("rwlayer");
        assert_eq!(guest_mounts("erofs"), ["ext4 /dev/vda1", "erofs /dev/vda2"]);
    }
    let _containerd = Containerd::start("");
    assert_eq!(guest_mounts("erofs"), ["erofs /dev/vda"]);
}
