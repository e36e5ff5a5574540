//! Two lists of cases that run on a file system: pjdfstest (POSIX, a program of the crates registry) and
//! `fs/semantics.py` (what Linux has besides). What fails here and not with runc is a fault, unless it is explained.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use crate::{DEBIAN, RUNTIME, sh, sh_with_input, unique};

/// The release of pjdfstest.
const PJDFSTEST: &str = "0.2.2";
const PJDFSTEST_CONFIG: &[u8] =
    b"[features]\nposix_fallocate = {}\n[settings]\nnaptime = 0.05\nallow_remount = false\n\
      [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]\n";
/// Into how many runs `semantics.py` is divided: each is over in time on the slowest machine.
const PARTS: usize = 2;
/// How many cases the lists have at least; pjdfstest leaves out what a file system does not have.
const LEAST: [usize; 2] = [92, 300];

/// Where the lists lie, and the small file system for cases of space.
const LISTS: &str = "/run/kata-rs-test-lists";
const SMALL: &str = "/run/kata-rs-test-small";
const RUNC: &str = "io.containerd.runc.v2";

/// A case that runc passes and a file system of ours does not, or that cannot be run on it, with the reason.
pub type Explained = (&'static str, &'static str);

/// The cases of a run by name: whether each passed.
type Results = BTreeMap<String, Result<(), String>>;

/// Options of `ctr run`, made before each.
pub type Options = Box<dyn Fn() -> String>;

/// A file system in a container.
pub struct Place {
    /// What it is, for messages.
    pub name: &'static str,
    /// How a container gets it. What one has written is not there for the next.
    pub options: Options,
    /// A directory on it.
    pub directory: &'static str,
    /// What runc passes here and we do not.
    pub explained: &'static [Explained],
}

impl Place {
    /// The root file system of a snapshotter.
    #[must_use]
    pub fn root(name: &'static str, snapshotter: &'static str, explained: &'static [Explained]) -> Self {
        Self {
            name,
            options: Box::new(move || format!("--snapshotter {snapshotter}")),
            directory: "/root",
            explained,
        }
    }

    /// Asserts that all of `semantics.py` that passes with runc passes with us.
    #[track_caller]
    pub fn semantics_are_runcs(&self) {
        let run = |runtime| {
            let part = |part| self.semantics(runtime, part);
            results(&(1..=PARTS).map(part).collect::<String>())
        };
        install("semantics.py", include_bytes!("../fs/semantics.py"));
        let _ = sh(&format!(
            "mkdir -p {SMALL}; mountpoint -q {SMALL} || mount -t tmpfs -o size=4m tmpfs {SMALL}"
        ))
        .ok();
        self.compare("semantics.py", &run(RUNTIME), &run(RUNC), LEAST[0]);
    }

    /// Asserts that all of pjdfstest that passes with runc passes with us. Where it cannot be built, says so.
    #[track_caller]
    pub fn posix_is_runcs(&self) {
        let Some(program) = pjdfstest() else { return };
        install(
            "pjdfstest",
            &std::fs::read(program).expect("the program was built"),
        );
        install("pjdfstest.toml", PJDFSTEST_CONFIG);
        let run = |runtime| results(&self.posix(runtime));
        self.compare("pjdfstest", &run(RUNTIME), &run(RUNC), LEAST[1]);
    }

    /// What a script prints in a fresh container with the lists at /lists.
    #[track_caller]
    fn run(&self, runtime: &str, options: &str, script: &str) -> String {
        let own = (self.options)();
        let outcome = sh(&format!(
            "ctr run --rm --runtime {runtime} --privileged --mount type=bind,src={LISTS},dst=/lists,options=rbind:ro \
             {options} {own} {DEBIAN} {} sh -c '{script}'",
            unique("fs")
        ));
        outcome.ok().to_owned() + "\n"
    }

    #[track_caller]
    fn semantics(&self, runtime: &str, part: usize) -> String {
        let directory = format!("{}/{part}", self.directory);
        self.run(
            runtime,
            &format!(
                "--mount type=bind,src={SMALL},dst=/small,options=rbind:rw \
                 --mount type=bind,src={SMALL},dst=/readonly,options=rbind:ro"
            ),
            &format!(
                "mkdir -p {directory}; python3 /lists/semantics.py {part}/{PARTS} {directory} /small /readonly"
            ),
        )
    }

    /// Runs pjdfstest and brings its report into the form of the other list.
    #[track_caller]
    fn posix(&self, runtime: &str) -> String {
        let directory = self.directory;
        let script = format!(
            "mkdir -p {directory}/p; chmod 777 {directory} {directory}/p; cd /; \
             /lists/pjdfstest -c /lists/pjdfstest.toml -p {directory}/p 2>&1 || true"
        );
        let report = self.run(runtime, "", &script);
        let mut lines = report.lines().peekable();
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

    #[track_caller]
    fn compare(&self, list: &str, ours: &Results, theirs: &Results, least: usize) {
        let what = format!("{list}, {}", self.name);
        let passed = |results: &Results| results.values().filter(|result| result.is_ok()).count();
        println!(
            "{what}: {} cases, {} passed here, {} passed with runc",
            ours.len(),
            passed(ours),
            passed(theirs)
        );
        assert!(ours.len() >= least, "only {} cases ran: {ours:?}", ours.len());
        let is_explained = |name: &str| self.explained.iter().any(|(explained, _)| *explained == name);
        let to_compare = |results: &Results| {
            let names = results.keys().filter(|name| !is_explained(name));
            names.cloned().collect::<Vec<_>>()
        };
        assert_eq!(to_compare(ours), to_compare(theirs), "{what}");
        let faults: Vec<_> = ours
            .iter()
            .filter(|(name, result)| result.is_err() && !is_explained(name) && theirs[*name].is_ok())
            .collect();
        assert!(faults.is_empty(), "{what}: {faults:#?}");
    }
}

#[track_caller]
fn install(name: &str, content: &[u8]) {
    let path = format!("{LISTS}/{name}");
    let script = format!("mkdir -p {LISTS}; cat > {path}; chmod 755 {path}");
    let _ = sh_with_input(&script, content).ok();
}

fn results(text: &str) -> Results {
    let mut results = Results::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("ok ") {
            results.insert(name.to_owned(), Ok(()));
        } else if let Some((name, why)) = line.strip_prefix("FAIL ").and_then(|rest| rest.split_once(": ")) {
            results.insert(name.to_owned(), Err(why.to_owned()));
        }
    }
    results
}

/// The program, built for the occasion. `None` says why not.
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
