//! Every way in which a sandbox ends.

use std::path::Path;
use std::time::Duration;

use sandbox::{ErrorKind, ProcessId, SandboxExitCause};

use super::place::{Place, exec, is_alive, story};

pub async fn a_killed_vmm_ends_every_process_in_order(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let pid = place.running(&sandbox, "c", "runs").await;
    sandbox
        .create_container(place.container("waiting", "runs"))
        .await
        .unwrap();
    sandbox.create_exec(exec("c", "e", "runs")).await.unwrap();
    sandbox.start_process(&ProcessId::exec("c", "e")).await.unwrap();
    sandbox.create_exec(exec("c", "never", "runs")).await.unwrap();
    sandbox.stats("c").await.unwrap();
    let vmm = rustix::process::Pid::from_raw(sandbox.vmm_pid().unwrap().cast_signed()).unwrap();
    rustix::process::kill_process(vmm, rustix::process::Signal::KILL).unwrap();
    let init = ProcessId::init("c");
    assert_eq!(sandbox.wait(&init).await.unwrap().status, 137);
    let exit = sandbox.exited().await;
    assert_eq!(exit.cause, SandboxExitCause::VmmDied);
    assert!(exit.message.contains("signal 9 killed it"), "{}", exit.message);
    // What can still be asked, and what not.
    assert_eq!(
        sandbox.stats("c").await.unwrap().pids.current,
        42,
        "the last reading"
    );
    assert_eq!(
        sandbox.signal(&init, 9, false).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(
        sandbox.guest_info().await.unwrap_err().kind(),
        ErrorKind::Unavailable
    );
    let late = sandbox
        .create_container(place.container("late", "runs"))
        .await
        .unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Unavailable, "{late}");
    sandbox.delete(&init).await.unwrap();
    sandbox.delete(&ProcessId::init("waiting")).await.unwrap();
    sandbox.shutdown().await;
    assert!(!is_alive(pid));
    assert_eq!(
        story(events).await,
        [
            "c created",
            "c started",
            "waiting created",
            "e added",
            "e started",
            "never added",
            "e exited 137",
            "c exited 137",
            "waiting exited 137",
            "end"
        ]
    );
}

pub async fn a_guest_that_panics_is_told_from_a_killed_vmm(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    sandbox
        .create_container(place.container("c", "panics-the-guest"))
        .await
        .unwrap();
    let error = sandbox.start_process(&ProcessId::init("c")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("Kernel panic: as told"), "{error}");
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::GuestCrashed);
    assert_eq!(sandbox.wait(&ProcessId::init("c")).await.unwrap().status, 137);
    assert_eq!(story(events).await, ["c created", "end"]);
}

pub async fn an_agent_that_hangs_up_ends_the_vm(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    place.running(&sandbox, "other", "runs").await;
    sandbox
        .create_container(place.container("c", "takes-the-agent-down"))
        .await
        .unwrap();
    let error = sandbox.start_process(&ProcessId::init("c")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_eq!(sandbox.wait(&ProcessId::init("other")).await.unwrap().status, 137);
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::AgentLost);
    assert!(!is_alive(sandbox.vmm_pid().unwrap()));
}

pub async fn a_killed_host_process_kills_its_container(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    for (id, signal) in [
        ("kill", rustix::process::Signal::KILL),
        ("term", rustix::process::Signal::TERM),
    ] {
        let pid = place.running(&sandbox, id, "runs").await;
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        let exit = sandbox.wait(&ProcessId::init(id)).await.unwrap();
        assert_eq!(exit.status, 128 + signal.as_raw().cast_unsigned());
    }
}

pub async fn a_shutdown_ends_everything_and_may_be_repeated(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let pid = place.running(&sandbox, "c", "runs").await;
    let vmm = sandbox.vmm_pid().unwrap();
    sandbox.shutdown().await;
    sandbox.shutdown().await;
    assert!(!is_alive(pid) && !is_alive(vmm));
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::Requested);
    assert_eq!(
        story(events).await,
        ["c created", "c started", "c exited 137", "end"]
    );
    // Also before the guest has come up.
    let (sandbox, _events) = place.start("says-nothing");
    sandbox.shutdown().await;
    assert_eq!(sandbox.ready().await.unwrap_err().kind(), ErrorKind::Unavailable);
}

pub async fn a_dropped_sandbox_leaves_no_process(place: &Place) {
    let (sandbox, mut events) = place.start("ordinary");
    let pid = place.running(&sandbox, "c", "runs").await;
    let vmm = sandbox.vmm_pid().unwrap();
    drop(sandbox);
    while events.next().await.is_some() {}
    assert!(!is_alive(pid) && !is_alive(vmm));
}

/// The sandbox's process is killed without a chance to clean up.
pub async fn a_dead_owner_leaves_no_process(place: &Place) {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::CommandExt;
    let mut owner = std::process::Command::new(std::env::current_exe().unwrap())
        .arg0("owner")
        .arg(place.dir.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(owner.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let pids: Vec<u32> = line.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 2, "{line:?}");
    assert!(pids.iter().all(|pid| is_alive(*pid)));
    owner.kill().unwrap();
    owner.wait().unwrap();
    // They are reaped by whoever adopts them: ended is what counts here.
    let ended = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty()
            || stat
                .rsplit(')')
                .next()
                .is_some_and(|rest| rest.trim_start().starts_with('Z'))
    };
    while !pids.iter().all(|pid| ended(*pid)) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The process that is killed: says which processes it has, then waits for its end.
pub fn own(dir: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    // The directory stays with the test that made it.
    let place = std::mem::ManuallyDrop::new(Place {
        dir: tempfile::Builder::new().prefix("owner").tempdir_in(dir).unwrap(),
    });
    for name in ["vmlinux", "guest.img"] {
        std::fs::copy(Path::new(dir).join(name), place.path(name)).unwrap();
    }
    std::fs::create_dir_all(place.path("bundle/rootfs")).unwrap();
    runtime.block_on(async {
        let (sandbox, _events) = place.start("ordinary");
        let pid = place.running(&sandbox, "c", "runs").await;
        println!("{} {pid}", sandbox.vmm_pid().unwrap());
        std::future::pending::<()>().await;
    });
}
