//! Faults before the guest has said hello.

use std::path::Path;

use sandbox::{ErrorKind, ProcessId, Sandbox, SandboxExitCause};

use super::place::{Place, exec, in_vm, is_alive, oci, spec, story};

pub async fn an_agent_of_another_version_is_refused(place: &Place) {
    let (sandbox, events) = place.start("another-version");
    let error = sandbox.ready().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
    assert!(error.to_string().contains("version 2"), "{error}");
    let again = sandbox
        .create_container(place.container("c", "runs"))
        .await
        .unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::StartFailed);
    assert!(sandbox.containers().is_empty());
    assert_eq!(story(events).await, ["end"]);
}

pub async fn a_guest_that_never_says_hello_is_given_up_with_its_console(place: &Place) {
    let (sandbox, _events) = place.start("says-nothing");
    let error = sandbox.ready().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let text = error.to_string();
    assert!(
        text.contains("within 1 s") && text.contains("booting | stuck in the fake guest"),
        "{text}"
    );
    let exit = sandbox.exited().await;
    assert_eq!(exit.cause, SandboxExitCause::StartFailed);
    assert!(!is_alive(sandbox.vmm_pid().unwrap()));
}

pub async fn a_guest_that_panics_in_boot_is_reported_with_its_console(place: &Place) {
    let (sandbox, _events) = place.start("panics-in-boot");
    let text = sandbox.ready().await.unwrap_err().to_string();
    assert!(
        text.contains("the guest kernel panicked") && text.contains("no init found"),
        "{text}"
    );
}

pub async fn a_guest_that_dies_in_the_handshake_is_not_waited_for(place: &Place) {
    let (sandbox, _events) = place.start("dies-after-hello");
    let text = sandbox.ready().await.unwrap_err().to_string();
    assert!(text.contains("triple fault"), "{text}");
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::StartFailed);
}

pub async fn a_vmm_that_dies_at_once_is_reported_with_its_words(place: &Place) {
    let (sandbox, _events) = place.start("dies-at-once");
    let error = sandbox.ready().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let text = error.to_string();
    assert!(
        text.contains("status 3") && text.contains("the fake VMM has had enough"),
        "{text}"
    );
}

pub async fn a_vmm_that_refuses_the_machine_is_quoted(place: &Place) {
    let (sandbox, _events) = place.start("refuses-the-machine");
    let text = sandbox.ready().await.unwrap_err().to_string();
    assert!(text.contains("KVM is out of sorts"), "{text}");
    sandbox.exited().await;
    assert!(!is_alive(sandbox.vmm_pid().unwrap()));
}

pub async fn a_missing_vmm_is_named(place: &Place) {
    let config = place.config(Path::new("/nonexistent/kata-rs-vmm"), "");
    let (sandbox, events) = Sandbox::start(spec("none"), config);
    let error = sandbox
        .create_container(place.container("c", "runs"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains("/nonexistent/kata-rs-vmm"), "{error}");
    assert_eq!(sandbox.vmm_pid(), None);
    assert_eq!(story(events).await, ["end"]);
    sandbox.shutdown().await;
}

pub async fn a_missing_netns_is_named_and_undone(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let mut request = place.container("c", "runs");
    request.spec_json = oci(
        "runs",
        &serde_json::json!([{ "type": "network", "path": "/run/netns/nonexistent" }]),
    );
    let error = sandbox.create_container(request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("/run/netns/nonexistent"), "{error}");
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    let mut request = place.container("c", "runs");
    request.spec_json = oci("runs", &serde_json::json!([{ "type": "network" }]));
    let pid = sandbox.create_container(request).await.unwrap();
    let netns = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(netns(&pid.to_string()), netns("self"));
    sandbox.start_process(&ProcessId::init("c")).await.unwrap();
    sandbox.create_exec(exec("c", "e", "runs")).await.unwrap();
    let exec = sandbox.start_process(&ProcessId::exec("c", "e")).await.unwrap();
    assert_eq!(netns(&pid.to_string()), netns(&exec.to_string()));
}
