//! How the VM's size follows its containers', and the cgroup it is counted in.

use std::path::{Path, PathBuf};

use sandbox::{ErrorKind, ProcessId, Sandbox};

use super::place::{Place, in_vm, spec};

fn limits(cpus: u32, mib: u64) -> Vec<u8> {
    serde_json::to_vec(&serde_json::json!({
        "cpu": { "quota": cpus * 100_000, "period": 100_000 },
        "memory": { "limit": mib << 20 },
    }))
    .unwrap()
}

/// What was done about the VM's size.
async fn sizes(sandbox: &Sandbox) -> Vec<String> {
    let all = in_vm(sandbox).await;
    let words = ["vcpus", "online", "plugged", "update"];
    let is_size = |line: &String| words.iter().any(|word| line.starts_with(word));
    all.into_iter().filter(is_size).collect()
}

pub async fn a_vm_grows_before_its_container_and_shrinks_after_it(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    place.running(&sandbox, "c", "runs").await;
    sandbox.update("c", &limits(2, 640)).await.unwrap();
    // 640 + 10 + 64, of which 512 are there.
    let grown = ["vcpus 2", "online 2", "plugged 202", "update c"];
    assert_eq!(sizes(&sandbox).await, grown);
    sandbox.update("c", br#"{"pids":{"limit":5}}"#).await.unwrap();
    assert_eq!(sizes(&sandbox).await[4..], ["update c"]);
    sandbox.update("c", &limits(1, 256)).await.unwrap();
    assert_eq!(sizes(&sandbox).await[5..], ["update c", "online 1", "plugged 0"]);
    // The vCPU that was made is still there, and what cannot be is said by its key.
    let error = sandbox.update("c", &limits(5, 256)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert!(error.to_string().contains("5 vCPUs"), "{error}");
    assert!(error.to_string().contains("`max_vcpus`"), "{error}");
    let error = sandbox.update("c", &limits(1, 1000)).await.unwrap_err();
    assert!(error.to_string().contains("1024 MiB at most"), "{error}");
    assert!(error.to_string().contains("`max_memory_mib`"), "{error}");
    assert_eq!(sizes(&sandbox).await.len(), 8, "a refused update changes nothing");
    sandbox.shutdown().await;
}

pub async fn a_vm_that_cannot_grow_leaves_its_container_as_it_is(place: &Place) {
    let (sandbox, _events) = place.start("plugs-nothing");
    place.running(&sandbox, "c", "runs").await;
    let error = sandbox.update("c", &limits(2, 640)).await.unwrap_err();
    assert!(error.to_string().contains("no memory today"), "{error}");
    assert_eq!(
        sizes(&sandbox).await,
        ["vcpus 2", "online 2", "online 1"],
        "what had grown shrinks again"
    );
    sandbox.shutdown().await;
}

pub async fn a_container_that_comes_later_makes_the_vm_grow(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let limited = |id: &str| {
        let mut request = place.container(id, "runs");
        let mut spec: serde_json::Value = serde_json::from_slice(&request.spec_json).unwrap();
        spec["linux"]["resources"] = serde_json::from_slice(&limits(1, 400)).unwrap();
        request.spec_json = serde_json::to_vec(&spec).unwrap();
        request
    };
    sandbox.create_container(limited("a")).await.unwrap();
    assert_eq!(sizes(&sandbox).await, Vec::<String>::new());
    sandbox.create_container(limited("b")).await.unwrap();
    // 800 + 12 + 64 - 512.
    assert_eq!(sizes(&sandbox).await, ["vcpus 2", "online 2", "plugged 364"]);
    // More than there can be is no limit for a container that comes.
    sandbox.create_container(limited("c")).await.unwrap();
    assert_eq!(sizes(&sandbox).await[3..], ["vcpus 3", "online 3", "plugged 512"]);
    for id in ["c", "b"] {
        sandbox.delete(&ProcessId::init(id)).await.unwrap();
    }
    // Nobody waits for it to shrink.
    while sizes(&sandbox)
        .await
        .last()
        .is_none_or(|last| last != "plugged 0")
    {
        tokio::task::yield_now().await;
    }
    sandbox.shutdown().await;
}

pub async fn the_vm_is_counted_in_its_cgroup_which_goes_with_it(place: &Place) {
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        println!("skipped: this host has no cgroup v2");
        return;
    }
    let name = format!("kata-rs-test-{}", std::process::id());
    let mut spec = spec("ordinary");
    spec.cgroups_path = Some(PathBuf::from(format!("/{name}/vm")));
    let vmm = std::env::current_exe().unwrap();
    let (sandbox, _events) = Sandbox::start(spec, place.config(&vmm, ""));
    sandbox.ready().await.unwrap();
    let cgroup = Path::new("/sys/fs/cgroup").join(name);
    let procs = std::fs::read_to_string(cgroup.join("vm/cgroup.procs")).unwrap();
    assert_eq!(procs.trim(), sandbox.vmm_pid().unwrap().to_string());
    sandbox.shutdown().await;
    assert!(!cgroup.exists());
}
