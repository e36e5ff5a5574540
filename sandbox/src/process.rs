//! What calls do with one process: registering and starting execs, starting inits, signals, deletion of execs.

use std::sync::Arc;
use std::time::SystemTime;

use protocol::agent::CreateExecRequest;

use crate::agent::Agent;
use crate::api::{Deleted, ExecRequest, Exit, ProcessId, Status, Stdio};
use crate::container::{KILLED, Phase, Process, Stage};
use crate::create::{drain, wait_deleted};
use crate::error::{Error, ErrorKind};
use crate::events::Event;
use crate::io::Io;
use crate::pause;
use crate::pod::Pod;
use crate::proxy::{self, TaskSignals};
use crate::spec::Netns;

/// Registers an exec; the guest hears of it when it is started.
pub(crate) fn register(pod: &Pod, request: ExecRequest) -> Result<(), Error> {
    let ExecRequest {
        process,
        process_json,
        stdio,
    } = request;
    if process.is_init() {
        return Err(Error::Invalid("an exec needs an id that is not empty".to_owned()));
    }
    serde_json::from_slice::<oci_spec::runtime::Process>(&process_json).map_err(|error| Error::Spec {
        what: process.to_string(),
        message: error.to_string(),
    })?;
    let mut containers = pod.containers();
    let container = containers.in_guest("add a process to", &process.container_id)?;
    if container.execs.contains_key(&process.exec_id) {
        return Err(Error::Exists(process));
    }
    let status = container.status(&container.init);
    if status == Status::Stopped {
        return Err(Error::State {
            operation: "add a process to",
            process: ProcessId::init(&process.container_id),
            status,
        });
    }
    let mut exec = Process::new(Stage::Registered, stdio.uris());
    exec.recipe = Some((process_json, stdio));
    container.execs.insert(process.exec_id.clone(), exec);
    containers.send(Event::ExecAdded { process });
    Ok(())
}

/// Starts a process: a container's init that was created, or an exec that was registered.
pub(crate) async fn start(pod: Arc<Pod>, process: ProcessId) -> Result<u32, Error> {
    let recipe = {
        let now = pod.elapsed();
        let mut containers = pod.containers();
        let container = containers.made("start a process of", &process.container_id)?;
        if !process.is_init() && container.process(&process.exec_id).is_some() && !container.accepts_execs() {
            return Err(Error::State {
                operation: "start a process in",
                process: ProcessId::init(&process.container_id),
                status: container.status(&container.init),
            });
        }
        if process.is_init() {
            container.timeline.start_requested = Some(now);
        }
        let Some(starting) = container.process_mut(&process.exec_id) else {
            return Err(Error::NoProcess(process));
        };
        if starting.deleting || !matches!(starting.stage, Stage::Created | Stage::Registered) {
            let status = match starting.stage {
                Stage::Stopped(_) => Status::Stopped,
                _ => Status::Running,
            };
            return Err(Error::State {
                operation: "start",
                process,
                status,
            });
        }
        starting.stage = Stage::Starting { exited: None };
        starting.recipe.take()
    };
    let result = match recipe {
        None => start_in_guest(&pod, &process).await,
        Some((json, stdio)) => start_exec(&pod, &process, json, stdio).await,
    };
    match result {
        Ok(()) => {
            let now = pod.elapsed();
            let mut containers = pod.containers();
            containers.started(&process);
            let container = containers.get_mut(&process.container_id)?;
            let pid = container
                .process(&process.exec_id)
                .map_or(0, |process| process.pid);
            if process.is_init() {
                container.timeline.started = Some(now);
                // Nobody waits for these.
                let hooks = container.hooks.clone();
                tokio::spawn(async move { hooks.poststart(pid).await });
            }
            Ok(pid)
        }
        Err(error) => {
            let exit = Exit {
                status: failed_status(&error),
                exited_at: SystemTime::now(),
            };
            let io = {
                let mut containers = pod.containers();
                containers.start_failed(&process, exit);
                containers
                    .process(&process)
                    .ok()
                    .and_then(|(_, process)| process.io.clone())
            };
            if let Some(io) = io {
                io.close();
            }
            Err(pod.explain(error).await)
        }
    }
}

async fn start_in_guest(pod: &Pod, process: &ProcessId) -> Result<(), Error> {
    let agent = pod.agent().await?;
    let (in_guest, io) = {
        let containers = pod.containers();
        let (container, init) = containers.process(process)?;
        (container.in_guest, init.io.clone())
    };
    if let Some(io) = io {
        io.begin_input()?;
    }
    pod.network.wire_late(pod).await?;
    if in_guest {
        agent.start(process).await
    } else {
        Ok(())
    }
}

/// Exit status of a process that could not be started, as a shell has it.
fn failed_status(error: &Error) -> u32 {
    match error.kind() {
        ErrorKind::ExecutableNotFound => 127,
        ErrorKind::ExecutableNotPermitted => 126,
        ErrorKind::Unavailable => KILLED,
        _ => 255,
    }
}

async fn start_exec(pod: &Arc<Pod>, process: &ProcessId, json: Vec<u8>, stdio: Stdio) -> Result<(), Error> {
    let agent = pod.agent().await?;
    let open = async {
        let io = Io::open(stdio, &process.container_id, &pod.spec.namespace).await?;
        Ok::<_, Error>(Arc::new(io))
    };
    let netns = exec_netns(pod, &process.container_id)?;
    let (task, io) = tokio::join!(proxy::spawn(pod.config.task(), &process.exec_id, &netns), open);
    let io = io?;
    let (task, signals) = task?;
    let tokens = io.token_list();
    let size = {
        let mut containers = pod.containers();
        let exec = containers.process_mut(process)?;
        exec.pid = task.pid();
        exec.task = Some(task);
        exec.io = Some(Arc::clone(&io));
        exec.tokens.clone_from(&tokens);
        if exec.stdin_closed {
            io.close_stdin();
        }
        io.begin_input()?;
        exec.size
    };
    watch_task(pod, process.clone(), signals);
    pod.router.expect(&tokens, &io);
    let request = CreateExecRequest {
        container_id: process.container_id.clone(),
        exec_id: process.exec_id.clone(),
        process: json,
        stdio: Some(io.tokens()).into(),
        terminal_rows: size.0.into(),
        terminal_columns: size.1.into(),
        ..Default::default()
    };
    // Its streams may arrive after the answer: they are expected until it is deleted.
    create_and_start(&agent, process, &request).await
}

/// Where an exec's host process belongs: to the container's, which may be the only one in its namespace.
fn exec_netns(pod: &Pod, container: &str) -> Result<Netns, Error> {
    Ok(match pod.containers().get(container)?.init.pid {
        0 => Netns::Host,
        pid => Netns::Path(format!("/proc/{pid}/ns/net").into()),
    })
}

async fn create_and_start(
    agent: &Agent,
    process: &ProcessId,
    request: &CreateExecRequest,
) -> Result<(), Error> {
    let created = agent.create_exec(request).await;
    let result = match created {
        Ok(()) => agent.start(process).await,
        Err(error) => Err(error),
    };
    if result.is_err() {
        // Frees the exec in the guest if it is known there; the host's record stays until its deletion.
        if let Err(error) = agent.delete_exec(process).await {
            tracing::debug!(%process, %error, "nothing to free in the guest");
        }
    }
    result
}

/// Deletes an exec that has exited or was never started.
pub(crate) async fn delete_exec(pod: Arc<Pod>, process: ProcessId) -> Result<Deleted, Error> {
    wait_deleted(&pod, &process.container_id).await?;
    let io = {
        let mut containers = pod.containers();
        let container = containers.made("delete a process of", &process.container_id)?;
        let Some(exec) = container.execs.get_mut(&process.exec_id) else {
            return Err(Error::NoProcess(process));
        };
        if exec.deleting {
            return Err(Error::NoProcess(process));
        }
        match exec.stage {
            Stage::Registered => {
                let exit = Exit {
                    status: 0,
                    exited_at: SystemTime::now(),
                };
                exec.stop(exit);
                None
            }
            Stage::Stopped(_) => exec.io.clone(),
            Stage::Created | Stage::Starting { .. } | Stage::Running => {
                return Err(Error::State {
                    operation: "delete",
                    status: Status::Running,
                    process,
                });
            }
        }
        .inspect(|_| exec.deleting = true)
    };
    if let Some(io) = io {
        drain(std::slice::from_ref(&io)).await;
        if let Ok(agent) = pod.agent().await
            && let Err(error) = agent.delete_exec(&process).await
            && error.kind() != ErrorKind::NotFound
        {
            tracing::debug!(%process, %error, "the guest could not free the exec");
        }
        io.close();
    }
    let mut containers = pod.containers();
    let container = containers.get_mut(&process.container_id)?;
    let Some(exec) = container.execs.remove(&process.exec_id) else {
        return Err(Error::NoProcess(process));
    };
    pod.router.forget(&exec.tokens);
    let exit = match exec.stage {
        Stage::Stopped(exit) => exit,
        _ => Exit {
            status: KILLED,
            exited_at: SystemTime::now(),
        },
    };
    let pid = exec.pid;
    containers.send(Event::Deleted { process, pid, exit });
    Ok(Deleted { pid, exit })
}

/// Sends a signal to a process, or to all of a container.
pub(crate) async fn signal(pod: &Pod, process: &ProcessId, signal: u32, all: bool) -> Result<(), Error> {
    let in_guest = {
        let mut containers = pod.containers();
        if containers.get(&process.container_id)?.phase == Phase::Deleting {
            // What is deleted has ended, or does so by that: to who meant to end it that is as good.
            return Err(Error::Finished(process.clone()));
        }
        containers.made("signal", &process.container_id)?;
        let (container, target) = containers.process(process)?;
        match target.stage {
            Stage::Stopped(_) => return Err(Error::Finished(process.clone())),
            Stage::Registered => {
                return Err(Error::State {
                    operation: "signal",
                    process: process.clone(),
                    status: container.status(target),
                });
            }
            Stage::Created | Stage::Starting { .. } | Stage::Running => container.in_guest,
        }
    };
    if !in_guest {
        pause::signal(pod, process, signal);
        return Ok(());
    }
    let agent = pod.agent().await?;
    match agent.signal(process, signal, all && process.is_init()).await {
        Err(error) if error.kind() == ErrorKind::NotFound => Err(Error::Finished(process.clone())),
        Err(error) => Err(pod.explain(error).await),
        Ok(()) => Ok(()),
    }
}

/// Passes on to the process what its host process is sent, until that has ended and was reaped.
pub(crate) fn watch_task(pod: &Arc<Pod>, process: ProcessId, mut signals: TaskSignals) {
    pod.leftovers.send_modify(|count| *count += 1);
    let pod = Arc::clone(pod);
    tokio::spawn(async move {
        while let Some(number) = signals.next().await {
            tracing::debug!(%process, number, "its host process got a signal");
            if let Err(error) = signal(&pod, &process, number, false).await {
                tracing::debug!(%process, number, %error, "the signal was not passed on");
            }
        }
        pod.leftovers.send_modify(|count| *count -= 1);
    });
}
