//! What the end-to-end suites share: running commands where the containers run, and naming things uniquely.
//!
//! `KATA_RS_TARGET=direct` runs them on this machine; otherwise they run in the test host (`tests/host/run`).
//! Behaviour is proved in `e2e/`; nothing here knows about a particular suite. `lists` is what file systems are tried with.

pub mod lists;

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// The small test image: busybox.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// The large test image: Debian with procps, python3 and nginx.
pub const DEBIAN: &str = "localhost/debian:13";
/// Where the test images lie as files.
pub const IMAGES: &str = "/var/lib/kata-rs-test/images";
/// containerd's name of our runtime.
pub const RUNTIME: &str = "io.containerd.kata-rs.v2";

/// After this long a script is taken to hang: it is ended, so that the tests after it run.
const HANG_SECONDS: u32 = 300;
/// timeout(1)'s exit status when it ended the command.
const TIMED_OUT: i32 = 124;

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Exit status, 128 + signal when killed.
    pub status: i32,
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
}

impl Outcome {
    /// Standard output without surrounding white space, when the command succeeded.
    ///
    /// # Panics
    /// With the whole outcome when it did not.
    #[track_caller]
    #[allow(clippy::must_use_candidate, reason = "often only the success matters")]
    pub fn ok(&self) -> &str {
        assert_eq!(self.status, 0, "the command failed: {self:#?}");
        self.stdout.trim()
    }
}

/// Runs a shell script (`sh -c`) where the containers run.
#[must_use]
#[track_caller]
pub fn sh(script: &str) -> Outcome {
    sh_with_input(script, b"")
}

/// Runs a shell script with these bytes on its standard input.
///
/// # Panics
/// When the command cannot be started, or hangs: no script here takes [`HANG_SECONDS`] on the slowest machine.
#[must_use]
#[track_caller]
pub fn sh_with_input(script: &str, input: &[u8]) -> Outcome {
    let mut command = if std::env::var("KATA_RS_TARGET").as_deref() == Ok("direct") {
        Command::new("timeout")
    } else {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/host/run"));
        command.args(["--", "timeout"]);
        command
    };
    let limit = HANG_SECONDS.to_string();
    let mut child = command
        .args([&limit, "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // A command that does not read its input closes the pipe: not an error of the test.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("the command ends");
    writer.join().expect("the writer does not panic");
    let outcome = Outcome {
        status: output.status.code().unwrap_or_else(|| {
            128 + std::os::unix::process::ExitStatusExt::signal(&output.status).unwrap_or_default()
        }),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    };
    assert!(
        outcome.status != TIMED_OUT,
        "a script did not come to its end within {HANG_SECONDS} s:\n{script}\n{outcome:#?}"
    );
    outcome
}

/// A container id that no other test uses.
#[must_use]
pub fn unique(prefix: &str) -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    format!(
        "{prefix}-{}-{}",
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed)
    )
}

/// `ctr run` with our runtime: `options` stand before the image.
#[must_use]
pub fn ctr_run(options: &str, image: &str, id: &str, command: &str) -> Outcome {
    sh(&format!(
        "ctr run --runtime {RUNTIME} {options} {image} {id} {command}"
    ))
}

/// A file or directory that a test must not find, and must not take away: it is back when this is dropped.
pub struct Aside(&'static str);

impl Aside {
    /// Moves it out of the way, if it is there.
    #[must_use]
    #[track_caller]
    pub fn new(path: &'static str) -> Self {
        let _ = sh(&format!("[ ! -e {path} ] || mv -T {path} {path}.aside")).ok();
        Self(path)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let _ = sh(&format!(
            "rm -rf --one-file-system {0}; [ ! -e {0}.aside ] || mv -T {0}.aside {0}",
            self.0
        ));
    }
}

/// A container that is removed, whatever state it is in, when the test ends.
pub struct Container(String);

impl Container {
    /// Starts a detached container with our runtime.
    #[track_caller]
    #[must_use]
    pub fn start(options: &str, image: &str, command: &str) -> Self {
        let container = Self(unique("c"));
        let _ = ctr_run(&format!("--detach {options}"), image, &container.0, command).ok();
        container
    }

    /// Takes over a container that was started otherwise.
    #[must_use]
    pub fn named(id: String) -> Self {
        Self(id)
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0
    }

    /// Runs a shell script inside it.
    #[must_use]
    pub fn exec(&self, script: &str) -> Outcome {
        let quoted = script.replace('\'', r"'\''");
        sh(&format!(
            "ctr task exec --exec-id {} {} sh -c '{quoted}'",
            unique("e"),
            self.0
        ))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let id = &self.0;
        let _ = sh(&format!(
            "ctr task kill -s 9 {id} 2>/dev/null; ctr task rm -f {id} >/dev/null 2>&1; ctr c rm {id} >/dev/null 2>&1"
        ));
    }
}

/// Takes the leak checker's snapshot; [`LeakCheck::nothing_left`] compares with it.
pub struct LeakCheck(String);

impl LeakCheck {
    /// Remembers what is there now. What the first container on a host makes and later ones use (unpacked images,
    /// parent cgroups, the mount that named network namespaces lie in) is made before.
    #[track_caller]
    #[must_use]
    pub fn begin() -> Self {
        let _ = sh(&format!(
            "set -e; warm=/run/kata-rs-test-warm; [ ! -e $warm ] || exit 0; \
             ctr run --rm --runtime {RUNTIME} {BUSYBOX} {} true; kata-rs run --rm {IMAGES}/busybox.oci.tar true; \
             ip netns add {0}; ip netns del {0}; touch $warm",
            unique("warm")
        ))
        .ok();
        let file = format!("/run/kata-rs-leaks-{}", unique("s"));
        let _ = sh(&format!("kata-rs-test-leaks snapshot {file}")).ok();
        Self(file)
    }

    /// Asserts that nothing has been added since.
    #[track_caller]
    pub fn nothing_left(self) {
        let outcome = sh(&format!(
            "kata-rs-test-leaks compare --wait 15 {}; s=$?; rm -f {0}; exit $s",
            self.0
        ));
        assert_eq!(outcome.status, 0, "left behind: {outcome:#?}");
    }
}
