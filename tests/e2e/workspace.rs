//! Properties of the source tree that no single crate can check.

use std::collections::BTreeMap;

/// Crates of the rust-vmm project and those that share its types: two versions of one would not fit together.
const ONE_VERSION: &[&str] = &[
    "fuse-backend-rs",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "seccompiler",
    "vhost",
    "virtio-bindings",
    "virtio-queue",
    "virtio-vsock",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

fn versions(lock: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = "";
    for line in lock.lines() {
        if let Some(rest) = line.strip_prefix("name = ") {
            name = rest.trim_matches('"');
        } else if let Some(rest) = line.strip_prefix("version = ") {
            versions.entry(name).or_default().push(rest.trim_matches('"'));
        }
    }
    versions
}

#[test]
fn the_lock_file_holds_one_version_of_each_rust_vmm_crate() {
    let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.lock")).unwrap();
    let versions = versions(&lock);
    assert!(
        versions.contains_key("vm-memory"),
        "the lock file was not understood"
    );
    for name in ONE_VERSION {
        let found = versions.get(name).map_or(&[][..], Vec::as_slice);
        assert!(
            found.len() <= 1,
            "{name} is locked in {} versions: {found:?}",
            found.len()
        );
    }
}

#[test]
fn two_versions_of_a_crate_are_noticed() {
    let lock = "[[package]]\nname = \"vm-memory\"\nversion = \"0.17.1\"\n\n[[package]]\nname = \"vm-memory\"\nversion = \"0.18.0\"\n";
    assert_eq!(versions(lock)["vm-memory"], ["0.17.1", "0.18.0"]);
}
