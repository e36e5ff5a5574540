//! A pod: its sandbox, and whose namespaces its containers name.

use sandbox::{ContainerRequest, ErrorKind, ProcessId, Status};

use super::place::{Place, exec, in_vm, oci, pause, story};

pub async fn a_pods_sandbox_is_nothing_in_the_guest_and_outlives_its_containers(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let (pod, init) = (ProcessId::init("pod"), ProcessId::init("c"));
    let pid = sandbox.create_container(pause(place, "pod")).await.unwrap();
    assert_eq!(sandbox.state(&pod).await.unwrap().status, Status::Created);
    assert_eq!(sandbox.start_process(&pod).await.unwrap(), pid);
    assert_eq!(sandbox.state(&pod).await.unwrap().status, Status::Running);
    let netns = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(netns(&pid.to_string()), netns("self"));
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    for refused in [
        sandbox.create_exec(exec("pod", "e", "runs")).await,
        sandbox.update("pod", b"{}").await,
        sandbox.pause("pod").await,
    ] {
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented, "{error}");
        assert!(error.to_string().contains("the sandbox of a pod"), "{error}");
    }
    sandbox.stats("pod").await.unwrap();
    // A container can be made anew in the same VM, as often as wanted.
    for _ in 0..2 {
        place.running(&sandbox, "c", "runs").await;
        sandbox.signal(&init, 9, false).await.unwrap();
        sandbox.wait(&init).await.unwrap();
        sandbox.delete(&init).await.unwrap();
    }
    assert_eq!(sandbox.containers(), ["pod"]);
    for harmless in [0, 28] {
        sandbox.signal(&pod, harmless, false).await.unwrap();
        assert_eq!(sandbox.state(&pod).await.unwrap().status, Status::Running);
    }
    sandbox.signal(&pod, 9, true).await.unwrap();
    assert_eq!(sandbox.wait(&pod).await.unwrap().status, 137);
    assert_eq!(
        sandbox.signal(&pod, 9, false).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    let deleted = sandbox.delete(&pod).await.unwrap();
    assert_eq!((deleted.pid, deleted.exit.status), (pid, 137));
    sandbox.ready().await.unwrap();

    // Its host process is the pod's as well: who kills it ends the pod's sandbox.
    let pid = sandbox.create_container(pause(place, "again")).await.unwrap();
    sandbox.start_process(&ProcessId::init("again")).await.unwrap();
    // SAFETY: the process is one that this test was given.
    unsafe { libc::kill(pid.cast_signed(), libc::SIGTERM) };
    assert_eq!(sandbox.wait(&ProcessId::init("again")).await.unwrap().status, 143);
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        [
            "pod created",
            "pod started",
            "c created",
            "c started",
            "c exited 137",
            "c deleted",
            "c created",
            "c started",
            "c exited 137",
            "c deleted",
            "pod exited 137",
            "pod deleted",
            "again created",
            "again started",
            "again exited 143",
            "end",
        ]
    );
}

/// A container of a pod with the pod's namespaces but for one.
fn member(place: &Place, id: &str, word: &str, pod: u32, pid: &serde_json::Value) -> ContainerRequest {
    let at = |kind: &str| serde_json::json!({ "type": kind, "path": format!("/proc/{pod}/ns/{kind}") });
    let mut namespaces = vec![
        serde_json::json!({ "type": "network", "path": format!("/proc/{pod}/ns/net") }),
        at("ipc"),
        at("uts"),
    ];
    if !pid.is_null() {
        namespaces.push(pid.clone());
    }
    let mut spec: serde_json::Value =
        serde_json::from_slice(&oci(word, &serde_json::json!(namespaces))).unwrap();
    spec["annotations"] = serde_json::json!({ "io.kubernetes.cri.container-type": "container" });
    spec["process"]["oomScoreAdj"] = 300.into();
    ContainerRequest {
        spec_json: serde_json::to_vec(&spec).unwrap(),
        ..place.container(id, word)
    }
}

pub async fn namespaces_are_told_by_the_pids_of_the_pods_own_processes(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let pod = sandbox.create_container(pause(place, "pod")).await.unwrap();
    sandbox.start_process(&ProcessId::init("pod")).await.unwrap();
    let own = serde_json::json!({ "type": "pid" });
    let other = sandbox
        .create_container(member(place, "c", "runs", pod, &own))
        .await
        .unwrap();
    let at = |pid: u32| serde_json::json!({ "type": "pid", "path": format!("/proc/{pid}/ns/pid") });
    let told = async |pid: serde_json::Value| {
        let request = member(place, "t", "tells-its-pid-namespace", pod, &pid);
        sandbox.create_container(request).await.unwrap_err().to_string()
    };
    // The VM is spared by the host's out-of-memory killer as its containers are, not as `pause`.
    let score = || {
        let vmm = sandbox.vmm_pid().unwrap();
        std::fs::read_to_string(format!("/proc/{vmm}/oom_score_adj")).unwrap()
    };
    assert_eq!(score().trim(), "300");
    assert!(told(own.clone()).await.ends_with("pids of its own"));
    assert!(told(at(pod)).await.ends_with("pids of the pod"));
    assert!(told(at(other)).await.ends_with("pids of c"));
    assert!(told(serde_json::Value::Null).await.ends_with("pids of the guest"));
    assert!(told(at(1)).await.ends_with("pids of the guest"));
    let stranger = std::process::id();
    let foreign = told(at(stranger)).await;
    assert!(
        foreign.contains(&format!("/proc/{stranger}/ns/pid cannot be joined")),
        "{foreign}"
    );
    // A pid that was one of the pod's is nobody's once its process has ended.
    sandbox.signal(&ProcessId::init("c"), 9, false).await.unwrap();
    sandbox.wait(&ProcessId::init("c")).await.unwrap();
    let gone = told(at(other)).await;
    assert!(gone.contains("cannot be joined"), "{gone}");
}

pub async fn a_pod_in_a_namespace_of_the_host_is_refused(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let mut request = pause(place, "pod");
    let mut spec: serde_json::Value = serde_json::from_slice(&request.spec_json).unwrap();
    spec["linux"]["namespaces"] = serde_json::json!([{ "type": "ipc" }]);
    request.spec_json = serde_json::to_vec(&spec).unwrap();
    let error = sandbox.create_container(request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("hostNetwork: true"), "{error}");
    assert!(sandbox.containers().is_empty());
}
