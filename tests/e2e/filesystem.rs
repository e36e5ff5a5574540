//! One list of cases on each file system that a container can have, and on runc's: what fails here and not there is a
//! fault. docs/filesystems.md has the results and the reasons.
//!
//! Two lists: pjdfstest (POSIX, a program of the crates registry) and `fs/semantics.py` (what Linux has besides).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use kata_rs_tests::{DEBIAN, RUNTIME, sh, sh_with_input, unique};

/// The release of the suite, and how its registry is asked for it.
const PJDFSTEST: &str = "0.2.2";
/// Cases that runc passes and no virtio-fs of this release does, or that cannot be run on one, with the reason.
const EXPLAINED: [(&str, &str); 2] = [
    (
        "o_tmpfile_and_link",
        "FUSE_TMPFILE is not served: the guest's kernel says EOPNOTSUPP, and programs fall back to a name",
    ),
    (
        "link::link_count_max",
        "the suite leaves it out where pathconf(3) does not know the file system's LINK_MAX, as with every FUSE",
    ),
];

/// Into how many runs a list is divided: each is over in time on the slowest machine.
const PARTS: usize = 4;
const RUNC: &str = "io.containerd.runc.v2";

/// Runs a script in a fresh container, with the case lists at /lists, and says what it printed.
fn in_container(runtime: &str, options: &str, script: &str) -> String {
    let id = unique("fs");
    let quoted = script.replace('\'', r"'\''");
    let outcome = sh(&format!(
        "ctr run --rm --runtime {runtime} --privileged \
         --mount type=bind,src=/run/kata-rs-test-lists,dst=/lists,options=rbind:ro {options} {DEBIAN} {id} sh -c '{quoted}'"
    ));
    outcome.ok().to_owned()
}

fn install_lists() {
    let _ = sh("mkdir -p /run/kata-rs-test-lists").ok();
    let _ = sh_with_input(
        "cat > /run/kata-rs-test-lists/semantics.py",
        include_bytes!("../fs/semantics.py"),
    )
    .ok();
}

/// The cases by name: whether each passed.
fn results(text: &str) -> BTreeMap<String, Result<(), String>> {
    let mut results = BTreeMap::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("ok ") {
            results.insert(name.to_owned(), Ok(()));
        } else if let Some((name, why)) = line.strip_prefix("FAIL ").and_then(|rest| rest.split_once(": ")) {
            results.insert(name.to_owned(), Err(why.to_owned()));
        }
    }
    results
}

/// Asserts that every case of the one list that runc passes is passed by us, or explained.
fn compare(what: &str, ours: &str, theirs: &str, least: usize) {
    let (ours, theirs) = (results(ours), results(theirs));
    let passed =
        |results: &BTreeMap<String, Result<(), String>>| results.values().filter(|r| r.is_ok()).count();
    println!(
        "{what}: {} cases, {} passed here, {} passed with runc",
        ours.len(),
        passed(&ours),
        passed(&theirs)
    );
    assert!(ours.len() >= least, "only {} cases ran: {ours:?}", ours.len());
    let is_explained = |name: &str| EXPLAINED.iter().any(|(explained, _)| *explained == name);
    let to_compare = |results: &BTreeMap<String, Result<(), String>>| {
        let names = results.keys().filter(|name| !is_explained(name));
        names.cloned().collect::<Vec<_>>()
    };
    assert_eq!(to_compare(&ours), to_compare(&theirs));
    let faults: Vec<_> = ours
        .iter()
        .filter(|(name, result)| result.is_err() && !is_explained(name) && theirs[*name].is_ok())
        .collect();
    assert!(faults.is_empty(), "{what}: {faults:#?}");
}

/// The list of `fs/semantics.py`: on the root file system of a snapshotter, or on what `options` mount at /data.
fn semantics(runtime: &str, options: &str, directory: &str) -> String {
    let run = |part: usize| {
        in_container(
            runtime,
            &format!(
                "{options} --mount type=bind,src=/run/kata-rs-test-small,dst=/small,options=rbind:rw \
                 --mount type=bind,src=/run/kata-rs-test-small,dst=/readonly,options=rbind:ro"
            ),
            &format!(
                "mkdir -p {directory}/{part}; python3 /lists/semantics.py {part}/{PARTS} {directory}/{part} /small /readonly"
            ),
        )
    };
    (1..=PARTS).map(run).collect::<Vec<_>>().join("\n")
}

/// A file system of 4 MiB for the cases of space.
fn make_small() {
    let _ = sh(
        "mkdir -p /run/kata-rs-test-small; mountpoint -q /run/kata-rs-test-small || \
                mount -t tmpfs -o size=4m tmpfs /run/kata-rs-test-small",
    )
    .ok();
}

#[test]
fn a_root_file_system_over_virtiofs_has_overlayfs_semantics() {
    install_lists();
    make_small();
    let ours = semantics(RUNTIME, "", "/root");
    let theirs = semantics(RUNC, "", "/root");
    compare("overlayfs over virtio-fs", &ours, &theirs, 85);
}

#[test]
fn a_root_file_system_on_a_block_device_has_its_semantics() {
    install_lists();
    make_small();
    let _ = sh(
        "ctr images import --local --snapshotter devmapper /var/lib/kata-rs-test/images/debian.oci.tar >/dev/null",
    )
    .ok();
    let ours = semantics(RUNTIME, "--snapshotter devmapper", "/root");
    let theirs = semantics(RUNC, "--snapshotter devmapper", "/root");
    compare("ext4 on virtio-blk", &ours, &theirs, 85);
}

#[test]
fn a_volume_over_virtiofs_has_the_semantics_of_the_hosts_file_system() {
    install_lists();
    make_small();
    let directory = format!("/var/lib/{}", unique("volume"));
    let run = |runtime: &str| {
        let _ = sh(&format!("rm -rf {directory}; mkdir -p {directory}")).ok();
        let options = format!("--mount type=bind,src={directory},dst=/data,options=rbind:rw");
        semantics(runtime, &options, "/data")
    };
    let (ours, theirs) = (run(RUNTIME), run(RUNC));
    let _ = sh(&format!("rm -rf {directory}")).ok();
    compare("a volume over virtio-fs", &ours, &theirs, 85);
}

/// The suite's program, built for the occasion. `None` says why not.
fn pjdfstest() -> Option<PathBuf> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/pjdfstest"));
    let program = root.join("bin/pjdfstest");
    if !program.exists() {
        let status = Command::new("cargo")
            .args(["install", "--quiet", "--locked", "--version", PJDFSTEST, "--root"])
            .arg(&root)
            .args(["--target", "x86_64-unknown-linux-gnu", "pjdfstest"])
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .status();
        if !status.is_ok_and(|status| status.success()) {
            println!("skipped: pjdfstest {PJDFSTEST} cannot be built from the crates registry here");
            return None;
        }
    }
    Some(program)
}

/// The suite's cases by words in their names, in runs that are over in time on the slowest machine.
const GROUPS: [&str; 2] = [
    "chmod chown mk open fallocate truncate",
    "link rename rmdir utimensat",
];

/// Runs pjdfstest and brings its report into the form of the other list.
fn posix(runtime: &str, options: &str, directory: &str) -> String {
    let run = |group| {
        let script = format!(
            "mkdir -p {directory}/p; chmod 777 {directory} {directory}/p; cd /; \
             /lists/pjdfstest -c /lists/pjdfstest.toml -p {directory}/p {group} 2>&1 || true"
        );
        in_container(runtime, options, &script)
    };
    let reports = GROUPS.map(run).join("\n");
    let mut lines = reports.lines().peekable();
    let mut cases = String::new();
    while let Some(line) = lines.next() {
        let Some((name, result)) = line.trim_end().rsplit_once(' ') else {
            continue;
        };
        match result {
            "ok" => cases += &format!("ok {}\n", name.trim()),
            "FAILED" => {
                let why = lines.peek().copied().unwrap_or_default().trim();
                cases += &format!("FAIL {}: {why}\n", name.trim());
            }
            _ => {}
        }
    }
    cases
}

#[test]
fn pjdfstest_passes_where_it_does_with_runc() {
    let Some(program) = pjdfstest() else { return };
    install_lists();
    let bytes = std::fs::read(program).expect("the program was built");
    let _ = sh_with_input(
        "cat > /run/kata-rs-test-lists/pjdfstest; chmod 755 /run/kata-rs-test-lists/pjdfstest",
        &bytes,
    )
    .ok();
    let _ = sh_with_input(
        "cat > /run/kata-rs-test-lists/pjdfstest.toml",
        b"[features]\nposix_fallocate = {}\n[settings]\nnaptime = 0.05\nallow_remount = false\n\
          [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]\n",
    )
    .ok();
    compare(
        "pjdfstest, overlayfs over virtio-fs",
        &posix(RUNTIME, "", "/root"),
        &posix(RUNC, "", "/root"),
        300,
    );
    let directory = format!("/var/lib/{}", unique("volume"));
    let volume = |runtime: &str| {
        let _ = sh(&format!("rm -rf {directory}; mkdir -p {directory}")).ok();
        let options = format!("--mount type=bind,src={directory},dst=/data,options=rbind:rw");
        posix(runtime, &options, "/data")
    };
    compare(
        "pjdfstest, a volume over virtio-fs",
        &volume(RUNTIME),
        &volume(RUNC),
        300,
    );
    let _ = sh(&format!("rm -rf {directory}")).ok();
}
