//! Containers as data: what each state lets happen.

use super::*;
use crate::api::SandboxExitCause;
use crate::events::Events;

fn containers() -> (Containers, Events) {
    let (sender, events) = EventSender::channel();
    let mut containers = Containers::new(sender);
    let mut container = Container::making(
        PathBuf::from("/bundle"),
        Vec::new(),
        StdioUris::default(),
        ContainerTimeline::default(),
    );
    container.init.pid = 100;
    containers.reserve("c", container).unwrap();
    containers.created("c");
    (containers, events)
}

fn start(containers: &mut Containers, id: &ProcessId) {
    containers.process_mut(id).unwrap().stage = Stage::Starting { exited: None };
}

fn add_exec(containers: &mut Containers, exec_id: &str, pid: u32) -> ProcessId {
    let mut exec = Process::new(Stage::Registered, StdioUris::default());
    exec.pid = pid;
    containers
        .get_mut("c")
        .unwrap()
        .execs
        .insert(exec_id.to_owned(), exec);
    ProcessId::exec("c", exec_id)
}

fn exit(status: u32) -> Exit {
    Exit {
        status,
        exited_at: SystemTime::UNIX_EPOCH,
    }
}

fn end() -> SandboxExit {
    SandboxExit {
        cause: SandboxExitCause::VmmDied,
        message: "killed".into(),
        exited_at: SystemTime::UNIX_EPOCH,
    }
}

/// The events so far, each as one word and its pid.
fn heard(events: &mut Events) -> Vec<(&'static str, u32)> {
    let mut list = Vec::new();
    while let Some(event) = events.try_next() {
        list.push(match event {
            Event::ContainerCreated { pid, .. } => ("created", pid),
            Event::ContainerStarted { pid, .. } => ("started", pid),
            Event::ExecStarted { pid, .. } => ("exec started", pid),
            Event::Exited { pid, exit, .. } if exit.status == KILLED => ("killed", pid),
            Event::Exited { pid, .. } => ("exited", pid),
            Event::SandboxExited { .. } => ("sandbox exited", 0),
            other => panic!("{other:?}"),
        });
    }
    list
}

#[test]
fn an_exit_that_is_faster_than_the_answer_to_the_start_comes_after_it() {
    let (mut containers, mut events) = containers();
    let init = ProcessId::init("c");
    start(&mut containers, &init);
    containers.exited(&init, exit(3));
    assert_eq!(heard(&mut events), [("created", 100)]);
    containers.started(&init);
    assert_eq!(heard(&mut events), [("started", 100), ("exited", 100)]);
    let (_, process) = containers.process(&init).unwrap();
    assert_eq!(*process.waiter().borrow(), Some(exit(3)));
}

#[test]
fn the_init_exits_last_even_when_an_exec_is_being_started() {
    let (mut containers, mut events) = containers();
    let init = ProcessId::init("c");
    start(&mut containers, &init);
    containers.started(&init);
    let quick = add_exec(&mut containers, "quick", 101);
    let slow = add_exec(&mut containers, "slow", 102);
    start(&mut containers, &quick);
    containers.started(&quick);
    start(&mut containers, &slow);
    containers.exited(&init, exit(0));
    assert!(!containers.get("c").unwrap().accepts_execs());
    containers.started(&slow);
    assert_eq!(
        heard(&mut events),
        [
            ("created", 100),
            ("started", 100),
            ("exec started", 101),
            ("exec started", 102),
            ("killed", 101),
            ("killed", 102),
            ("exited", 100),
        ]
    );
}

#[test]
fn a_dead_vm_ends_every_process_before_the_sandbox() {
    let (mut containers, mut events) = containers();
    let init = ProcessId::init("c");
    start(&mut containers, &init);
    containers.started(&init);
    let exec = add_exec(&mut containers, "e", 101);
    start(&mut containers, &exec);
    heard(&mut events);
    containers.all_exited(end());
    assert_eq!(heard(&mut events), [], "a start hangs in the air");
    containers.start_failed(&exec, exit(255));
    assert_eq!(heard(&mut events), [("killed", 100), ("sandbox exited", 0)]);
}

#[test]
fn a_container_that_was_made_while_its_vm_died_exits_at_once() {
    let (mut containers, mut events) = containers();
    heard(&mut events);
    let late = Container::making(
        PathBuf::new(),
        Vec::new(),
        StdioUris::default(),
        ContainerTimeline::default(),
    );
    containers.reserve("late", late).unwrap();
    containers.all_exited(end());
    assert_eq!(heard(&mut events), [("killed", 100), ("sandbox exited", 0)]);
    containers.created("late");
    assert_eq!(heard(&mut events), [("created", 0), ("killed", 0)]);
}

#[test]
fn a_taken_id_is_refused() {
    let (mut containers, _events) = containers();
    let again = Container::making(
        PathBuf::new(),
        Vec::new(),
        StdioUris::default(),
        ContainerTimeline::default(),
    );
    assert!(matches!(containers.reserve("c", again), Err(Error::Exists(_))));
}
