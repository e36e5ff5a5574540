//! The whole agent, from the host's calls to the programs in containers, without a VM.
//!
//! Each test runs in a process of its own that is PID 1 of new pid, mount, network, IPC and UTS namespaces, as the agent
//! is in a guest. The host's side is a ttrpc client over a socket pair. What needs cgroup controllers, block devices,
//! vsock or the right to set clocks is tested in a VM.

mod errors;
mod files;
mod host;
mod identity;
mod lifecycle;
mod stdio;

use std::process::Command;

pub use host::{Host, container, exec};

/// Names the test to run to the process that runs it.
const INSIDE: &str = "KATA_RS_TEST_GUEST";
/// The programs of the containers.
const BUSYBOX: &str = "/bin/busybox";

/// Defines tests that run in a guest-like process: `async fn name(host) { ... }`.
macro_rules! guest_tests {
    ($($(#[$attribute:meta])* async fn $name:ident($host:ident) $body:block)*) => {
        $(
            #[test]
            $(#[$attribute])*
            fn $name() {
                crate::tests::in_guest(concat!(module_path!(), "::", stringify!($name)), async |$host: crate::tests::Host| $body);
            }
        )*
    };
}
pub(crate) use guest_tests;

/// Runs a test in a process of its own, or, in that process, runs it.
fn in_guest(path: &str, test: impl AsyncFnOnce(Host)) {
    let name = path.split_once("::").map_or(path, |(_, name)| name);
    if std::env::var_os(INSIDE).is_some_and(|inside| inside == name) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (host, leftovers) = Host::start().await;
            let limit = std::time::Duration::from_secs(60);
            assert!(
                tokio::time::timeout(limit, test(host)).await.is_ok(),
                "the test hangs: it has run for {} s",
                limit.as_secs()
            );
            leftovers.check();
        });
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can make namespaces and mounts");
        return;
    }
    if !std::path::Path::new(BUSYBOX).exists() {
        println!("skipped: {BUSYBOX} is missing (package busybox-static)");
        return;
    }
    let output = Command::new("unshare")
        .args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--net",
            "--ipc",
            "--uts",
            "--mount-proc",
        ])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
