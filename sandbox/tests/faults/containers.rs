//! What a container and its execs go through, and what is refused on the way.

use sandbox::{ErrorKind, ProcessId, Status, StdioTarget};

use super::place::{Place, exec, in_vm, is_alive, story};

pub async fn a_container_runs_and_leaves_nothing(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let (mut output, writer) = std::io::pipe().unwrap();
    let mut request = place.container("c", "runs");
    request.stdio.stdout = StdioTarget::Fd(writer.into());
    let pid = sandbox.create_container(request).await.unwrap();
    assert!(is_alive(pid));
    assert!(
        in_vm(&sandbox).await.len() >= 2,
        "a process and its root file system"
    );
    let init = ProcessId::init("c");
    assert_eq!(sandbox.state(&init).await.unwrap().status, Status::Created);
    sandbox.start_process(&init).await.unwrap();
    assert_eq!(sandbox.state(&init).await.unwrap().status, Status::Running);
    assert_eq!(
        sandbox.start_process(&init).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    assert_eq!(
        sandbox.delete(&init).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    assert_eq!(sandbox.stats("c").await.unwrap().pids.current, 42);
    sandbox.signal(&init, 15, false).await.unwrap();
    assert_eq!(sandbox.wait(&init).await.unwrap().status, 143);
    assert_eq!(sandbox.state(&init).await.unwrap().status, Status::Stopped);
    assert_eq!(
        sandbox.signal(&init, 9, false).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    // A fake's output stream ends when the fake closes it, which is at once.
    let deleted = sandbox.delete(&init).await.unwrap();
    assert_eq!((deleted.pid, deleted.exit.status), (pid, 143));
    assert_eq!(
        sandbox.delete(&init).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    let mut text = String::new();
    std::io::Read::read_to_string(&mut output, &mut text).unwrap();
    assert_eq!(text, "written by the fake\n");
    sandbox.shutdown().await;
    assert!(!is_alive(pid));
    assert_eq!(
        story(events).await,
        ["c created", "c started", "c exited 143", "c deleted", "end"]
    );
}

pub async fn a_refused_container_leaves_nothing_attached(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    sandbox.ready().await.unwrap();
    let error = sandbox
        .create_container(place.container("c", "refused"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("the fake agent refuses it"), "{error}");
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    assert!(sandbox.containers().is_empty());
    let mut broken = place.container("c", "runs");
    broken.spec_json.truncate(20);
    assert_eq!(
        sandbox.create_container(broken).await.unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    place.running(&sandbox, "c", "runs").await;
    let twice = sandbox
        .create_container(place.container("c", "runs"))
        .await
        .unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::AlreadyExists);
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        ["c created", "c started", "c exited 137", "end"]
    );
}

pub async fn an_exit_before_the_answer_comes_after_the_start(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    place.running(&sandbox, "c", "exits-before-the-answer").await;
    assert_eq!(sandbox.wait(&ProcessId::init("c")).await.unwrap().status, 5);
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        ["c created", "c started", "c exited 5", "end"]
    );
}

pub async fn a_missing_executable_can_only_be_deleted(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    place.running(&sandbox, "c", "runs").await;
    sandbox.create_exec(exec("c", "e", "missing")).await.unwrap();
    let process = ProcessId::exec("c", "e");
    let waiter = tokio::spawn({
        let (sandbox, process) = (sandbox.clone(), process.clone());
        async move { sandbox.wait(&process).await }
    });
    let error = sandbox.start_process(&process).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ExecutableNotFound);
    assert!(error.to_string().contains("no such file or directory"), "{error}");
    assert_eq!(waiter.await.unwrap().unwrap().status, 127);
    assert_eq!(sandbox.state(&process).await.unwrap().status, Status::Stopped);
    assert_eq!(
        sandbox.start_process(&process).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    sandbox.delete(&process).await.unwrap();
    assert_eq!(
        sandbox.state(&process).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert!(!in_vm(&sandbox).await.contains(&"process c/e".to_owned()));
    assert_eq!(sandbox.processes("c").await.unwrap().len(), 1);
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        [
            "c created",
            "c started",
            "e added",
            "e deleted",
            "c exited 137",
            "end"
        ]
    );
}

pub async fn an_out_of_memory_comes_before_its_exit(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    place.running(&sandbox, "c", "is-out-of-memory").await;
    assert_eq!(sandbox.wait(&ProcessId::init("c")).await.unwrap().status, 137);
    sandbox.shutdown().await;
    let story = story(events).await;
    let at = |word: &str| story.iter().position(|event| event == word).unwrap();
    assert!(at("c out of memory") < at("c exited 137"), "{story:?}");
}

pub async fn a_paused_container_takes_no_exec(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    place.running(&sandbox, "c", "runs").await;
    assert_eq!(
        sandbox.resume("c").await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    sandbox.create_exec(exec("c", "e", "runs")).await.unwrap();
    sandbox.pause("c").await.unwrap();
    assert_eq!(
        sandbox.state(&ProcessId::init("c")).await.unwrap().status,
        Status::Paused
    );
    assert_eq!(
        sandbox.pause("c").await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    let process = ProcessId::exec("c", "e");
    assert_eq!(
        sandbox.start_process(&process).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    sandbox.resume("c").await.unwrap();
    sandbox.start_process(&process).await.unwrap();
    assert_eq!(
        sandbox.update("c", b"{\"pids\": 3}").await.unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    sandbox.update("c", b"{\"pids\": {\"limit\": 3}}").await.unwrap();
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        [
            "c created",
            "c started",
            "e added",
            "c paused",
            "c resumed",
            "e started",
            "e exited 137",
            "c exited 137",
            "end"
        ]
    );
}

pub async fn execs_are_told_apart(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let init = place.running(&sandbox, "c", "runs").await;
    sandbox.create_exec(exec("c", "e", "runs")).await.unwrap();
    let process = ProcessId::exec("c", "e");
    assert_eq!(sandbox.state(&process).await.unwrap().pid, 0);
    assert_eq!(
        sandbox
            .create_exec(exec("c", "e", "runs"))
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::AlreadyExists
    );
    assert_eq!(
        sandbox.signal(&process, 9, false).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    let nobody = sandbox
        .create_exec(exec("nobody", "e", "runs"))
        .await
        .unwrap_err();
    assert_eq!(nobody.kind(), ErrorKind::NotFound);
    let pid = sandbox.start_process(&process).await.unwrap();
    let pids: Vec<u32> = sandbox
        .processes("c")
        .await
        .unwrap()
        .iter()
        .map(|entry| entry.pid)
        .collect();
    assert_eq!(pids, [init, pid]);
    assert_eq!(
        sandbox.delete(&process).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    sandbox.signal(&process, 9, false).await.unwrap();
    assert_eq!(sandbox.wait(&process).await.unwrap().status, 137);
    assert_eq!(sandbox.delete(&process).await.unwrap().pid, pid);
    assert_eq!(
        sandbox.wait(&process).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(
        sandbox.state(&ProcessId::init("c")).await.unwrap().status,
        Status::Running
    );
    sandbox.signal(&ProcessId::init("c"), 9, true).await.unwrap();
    sandbox.wait(&ProcessId::init("c")).await.unwrap();
    let stopped = sandbox.create_exec(exec("c", "e", "runs")).await.unwrap_err();
    assert_eq!(stopped.kind(), ErrorKind::FailedPrecondition);
}

pub async fn a_container_in_the_making_is_not_known_yet(place: &Place) {
    let (sandbox, _events) = place.start("says-nothing");
    let making = tokio::spawn({
        let (sandbox, request) = (sandbox.clone(), place.container("c", "runs"));
        async move { sandbox.create_container(request).await }
    });
    while sandbox.containers().is_empty() {
        tokio::task::yield_now().await;
    }
    let state = sandbox.state(&ProcessId::init("c")).await;
    assert_eq!(state.unwrap_err().kind(), ErrorKind::NotFound);
    sandbox.shutdown().await;
    assert!(making.await.unwrap().is_err());
}

pub async fn a_container_that_is_being_deleted_has_ended_for_who_signals_it(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let init = ProcessId::init("c");
    place.running(&sandbox, "c", "runs").await;
    sandbox.signal(&init, 15, false).await.unwrap();
    sandbox.wait(&init).await.unwrap();
    let deleting = tokio::spawn({
        let (sandbox, init) = (sandbox.clone(), init.clone());
        async move { sandbox.delete(&init).await }
    });
    // Before, meanwhile and afterwards.
    while !deleting.is_finished() {
        let late = sandbox.signal(&init, 9, true).await.unwrap_err();
        assert_eq!(late.kind(), ErrorKind::NotFound, "{late}");
        tokio::task::yield_now().await;
    }
    deleting.await.unwrap().unwrap();
}

pub async fn who_deletes_a_container_second_waits_for_the_first(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let (init, other) = (ProcessId::init("c"), ProcessId::exec("c", "e"));
    place.running(&sandbox, "c", "runs").await;
    sandbox.create_exec(exec("c", "e", "runs")).await.unwrap();
    sandbox.signal(&init, 15, false).await.unwrap();
    sandbox.wait(&init).await.unwrap();
    let delete = async |process: &ProcessId| match sandbox.delete(process).await {
        Ok(_) => true,
        Err(late) => {
            assert_eq!(late.kind(), ErrorKind::NotFound, "{late}");
            assert!(
                sandbox.state(&init).await.is_err(),
                "{late}, while it is still there"
            );
            false
        }
    };
    let (one, another, _) = tokio::join!(delete(&init), delete(&init), delete(&other));
    assert!(one != another, "one of them deleted it");
}
