//! The OCI hooks of a container's life.

use std::time::Duration;

use sandbox::{ContainerRequest, ProcessId};

use super::place::{Place, in_vm, story};

fn with_hooks(place: &Place, id: &str, create_runtime: &str) -> ContainerRequest {
    let log = place.path("log");
    let hook = |name: &str| {
        let write = format!(
            "echo {name} $(grep -o '\"status\":\"[a-z]*' | cut -d'\"' -f4) >> {}",
            log.display()
        );
        let script = match name {
            "createRuntime" => format!("{create_runtime}; {write}"),
            _ => write,
        };
        serde_json::json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }])
    };
    let mut request = place.container(id, "runs");
    let mut spec: serde_json::Value = serde_json::from_slice(&request.spec_json).unwrap();
    spec["hooks"] = serde_json::json!({
        "createRuntime": hook("createRuntime"),
        "poststart": hook("poststart"),
        "poststop": hook("poststop"),
    });
    request.spec_json = serde_json::to_vec(&spec).unwrap();
    request
}

pub async fn hooks_run_around_the_container(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    sandbox
        .create_container(with_hooks(place, "c", "true"))
        .await
        .unwrap();
    let log = || std::fs::read_to_string(place.path("log")).unwrap_or_default();
    assert_eq!(log(), "createRuntime creating\n");
    let init = ProcessId::init("c");
    sandbox.start_process(&init).await.unwrap();
    while log().lines().count() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    sandbox.signal(&init, 9, false).await.unwrap();
    sandbox.wait(&init).await.unwrap();
    sandbox.delete(&init).await.unwrap();
    assert_eq!(
        log(),
        "createRuntime creating\npoststart running\npoststop stopped\n"
    );
}

pub async fn a_failed_hook_undoes_the_container(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let error = sandbox
        .create_container(with_hooks(
            place,
            "c",
            "echo the network is out of order >&2; exit 3",
        ))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("the network is out of order"),
        "{error}"
    );
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    assert!(sandbox.containers().is_empty());
    let log = std::fs::read_to_string(place.path("log")).unwrap();
    assert_eq!(log, "poststop stopped\n");
    sandbox.shutdown().await;
    assert_eq!(story(events).await, ["end"]);
}
