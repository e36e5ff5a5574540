//! Making a container, and taking it away. What each step attaches is noted as it happens, so that a failure, or
//! a deletion, undoes exactly that.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use oci_spec::runtime::Spec;
use protocol::agent::CreateContainerRequest;

use crate::annotations::Role;
use crate::api::{ContainerRequest, Deleted, Exit, ProcessId, RootfsMount, Stdio};
use crate::container::{Attached, Container, Freezer, KILLED, Phase, Stage};
use crate::demand::Limits;
use crate::error::{Error, ErrorKind};
use crate::events::Event;
use crate::hooks::Hooks;
use crate::io::Io;
use crate::namespaces;
use crate::pause;
use crate::pod::Pod;
use crate::process::watch_task;
use crate::proxy::{self, Task, TaskSignals};
use crate::resize;
use crate::spec::Netns;
use crate::storage::{self, Attachments, Context, DiskName, FilesVolume, Plan, StorageError};
use crate::timeline::ContainerTimeline;

/// Where the guest has the /dev/shm that the pod's containers share.
const POD_SHM: &str = "/dev/shm";
/// How long a deletion waits for output that a slow reader has not taken yet.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// What a container has been given so far.
#[derive(Debug, Default)]
struct Made {
    attached: Attached,
    tokens: Vec<u64>,
    io: Option<Arc<Io>>,
    /// The hooks, once the first was run.
    hooks: Hooks,
    /// Whether the guest may know it.
    in_guest: bool,
}

/// Makes a container up to the point where its init would execute. Returns its host pid.
pub(crate) async fn create(pod: Arc<Pod>, request: ContainerRequest) -> Result<u32, Error> {
    let ContainerRequest {
        id,
        spec_json,
        bundle,
        rootfs,
        stdio,
    } = request;
    if id.is_empty() || id.contains('/') || id.contains('\0') {
        return Err(Error::Invalid(format!(
            "the container id {id:?} cannot be used: it must not be empty and not contain a slash or a null byte"
        )));
    }
    let spec: Spec = serde_json::from_slice(&spec_json).map_err(|error| Error::Spec {
        what: format!("container {id}"),
        message: error.to_string(),
    })?;
    let timeline = ContainerTimeline {
        id: id.clone(),
        requested: pod.elapsed(),
        ..Default::default()
    };
    namespaces::check(&spec, &pod.config)?;
    // Those of the pod are in its configuration already; the others must be none.
    pod.config.enable_annotations().read(&spec)?;
    let hooks = Hooks::of(&spec, &id, &bundle)?;
    let limits = resize::limits(&pod, &spec)?;
    let mut container = Container::making(bundle.clone(), rootfs.clone(), stdio.uris(), timeline);
    container.hooks = hooks.clone();
    container.in_guest = Role::of(&spec) != Role::Sandbox;
    container.host_pids = namespaces::wants_host_pids(&spec);
    let in_guest = container.in_guest;
    pod.containers().reserve(&id, container)?;
    let mut made = Made::default();
    let request = Request {
        id: &id,
        spec: &spec,
        spec_json,
        bundle: &bundle,
        rootfs,
        stdio,
        hooks,
        limits,
    };
    if Role::of(&spec) == Role::Member {
        let score = spec
            .process()
            .as_ref()
            .and_then(|process| process.oom_score_adj());
        pod.spare_as(score.unwrap_or(0));
    }
    let result = if in_guest {
        make(&pod, request, &mut made).await
    } else {
        let netns = Netns::from_oci(request.spec);
        let kept = (&mut made.io, &mut made.hooks);
        pause::make(&pod, &id, &netns, request.stdio, request.hooks, kept).await
    };
    let result = result.and_then(|(task, signals)| {
        pod.network.adopt(task.pid())?;
        Ok((task, signals))
    });
    match result {
        Ok((task, signals)) => Ok(publish(&pod, &id, task, signals, made)),
        Err(error) => {
            undo(&pod, &id, made).await;
            resize::leave(&pod, &id);
            pod.containers().remove(&id);
            Err(pod.explain(error).await)
        }
    }
}

/// A [`ContainerRequest`] that was read.
struct Request<'a> {
    id: &'a str,
    spec: &'a Spec,
    spec_json: Vec<u8>,
    bundle: &'a Path,
    rootfs: Vec<RootfsMount>,
    stdio: Stdio,
    hooks: Hooks,
    limits: Limits,
}

async fn make(pod: &Arc<Pod>, request: Request<'_>, made: &mut Made) -> Result<(Task, TaskSignals), Error> {
    let Request {
        id,
        spec,
        spec_json,
        bundle,
        rootfs,
        stdio,
        hooks,
        limits,
    } = request;
    let netns = Netns::from_oci(spec);
    let pid_namespace = namespaces::resolve(spec, |pid| pod.containers().owner_of(pid))?;
    let Made {
        attached,
        tokens,
        io: made_io,
        hooks: made_hooks,
        in_guest,
    } = made;
    let storage = async {
        let (mut plan, mut attachments) = open_storage(pod, id, spec, bundle, rootfs).await?;
        mark(pod, id, |timeline, now| timeline.storage_opened = Some(now));
        let disks = attach(pod, &mut plan, &mut attachments, attached).await?;
        Ok::<_, Error>((plan, disks, attachments.volumes))
    };
    let io = async {
        let io = Io::open(stdio, id, &pod.spec.namespace).await?;
        Ok::<_, Error>(Arc::new(io))
    };
    let task = async {
        let (task, signals) = proxy::spawn(pod.config.task(), id, &netns).await?;
        made_hooks.clone_from(&hooks);
        hooks.before_start(task.pid()).await?;
        Ok::<_, Error>((task, signals))
    };
    let (task, storage, io, grown) = tokio::join!(task, storage, io, resize::arrive(pod, id, limits));
    // Kept before anything is returned, so that the failure of one undoes the others.
    let io = io.map(|io| Arc::clone(made_io.insert(io)));
    grown?;
    let (task, io) = (task?, io?);
    let (plan, disks, files_volumes) = storage?;
    *tokens = io.token_list();
    pod.router.expect(tokens, &io);

    let agent = pod.agent().await?;
    mark(pod, id, |timeline, now| timeline.attached = Some(now));
    let (rows, columns) = spec
        .process()
        .as_ref()
        .and_then(|process| process.console_size())
        .map_or((0, 0), |size| (size.height(), size.width()));
    let mut volumes = plan.agent_volumes();
    volumes.extend(files_volumes.iter().map(FilesVolume::to_agent));
    let request = CreateContainerRequest {
        container_id: id.to_owned(),
        spec: spec_json,
        rootfs: plan.agent_rootfs(&disks),
        mounts: plan.agent_mounts(&disks),
        disks: plan.agent_disks(&disks),
        read_only_rootfs: plan.read_only_rootfs,
        stdio: Some(io.tokens()).into(),
        terminal_rows: u32::try_from(rows).unwrap_or(0),
        terminal_columns: u32::try_from(columns).unwrap_or(0),
        pid_namespace: Some(pid_namespace),
        volumes,
        ..Default::default()
    };
    *in_guest = true;
    if let Err(error) = agent.create_container(&request).await {
        // The agent undoes what it refuses; a call that was not answered leaves it open.
        *in_guest = !matches!(error, Error::Guest(_));
        return Err(error);
    }
    pod.volumes.told(&files_volumes);
    Ok(task)
}

/// Decides what the container sees and opens the host's part of it. Looking at paths and mounting wait for disks:
/// not for the runtime's thread.
async fn open_storage(
    pod: &Arc<Pod>,
    id: &str,
    spec: &Spec,
    bundle: &Path,
    rootfs: Vec<RootfsMount>,
) -> Result<(Plan, Attachments), Error> {
    let (container_id, spec, bundle) = (id.to_owned(), spec.clone(), bundle.to_owned());
    let pod_shm = (pod.spec.shm_bytes > 0).then_some(POD_SHM);
    let watcher = Arc::clone(pod);
    let opened = tokio::task::spawn_blocking(move || {
        let context = Context {
            container_id: &container_id,
            bundle: &bundle,
            pod_shm,
        };
        let host = storage::Host::default();
        let mut plan = Plan::new(context, &spec, &rootfs, &|path| host.probe(path))?;
        let watch = |name: &str, directory: &Arc<OwnedFd>| watcher.volumes.watch(&watcher, name, directory);
        let attachments = storage::realize(&mut plan, &watch, &watcher.mounts)?;
        Ok((plan, attachments))
    });
    match opened.await {
        Ok(result) => result.map_err(|error: StorageError| Error::from(error)),
        Err(error) => Err(Error::Other {
            kind: ErrorKind::Internal,
            message: format!("opening the storage of container {id} failed: {error}"),
        }),
    }
}

/// Gives shares and disks to the VM; notes each. Returns the disks' names in order.
async fn attach(
    pod: &Pod,
    plan: &mut Plan,
    attachments: &mut Attachments,
    attached: &mut Attached,
) -> Result<Vec<DiskName>, Error> {
    let vm = pod.vm()?;
    for share in std::mem::take(&mut attachments.shares) {
        let planned = share.name.clone();
        let shown = pod.shares.show(vm, share).await?;
        plan.rename_share(&planned, &shown.name);
        attached.shares.push(shown);
    }
    let mut names = Vec::with_capacity(attachments.disks.len());
    for disk in &attachments.disks {
        let used = pod.disks.attach(vm, disk).await?;
        names.push(disk.named(&used.block.serial));
        attached.disks.push(used);
    }
    Ok(names)
}

/// Makes a container that is complete known.
fn publish(pod: &Arc<Pod>, id: &str, task: Task, signals: TaskSignals, made: Made) -> u32 {
    let pid = task.pid();
    watch_task(pod, ProcessId::init(id), signals);
    let now = pod.elapsed();
    let mut containers = pod.containers();
    if let Ok(container) = containers.get_mut(id) {
        container.init.pid = pid;
        container.init.task = Some(task);
        container.init.io = made.io;
        container.init.tokens = made.tokens;
        container.attached = made.attached;
        container.timeline.created = Some(now);
    }
    containers.created(id);
    pid
}

/// Takes back what a container that failed had been given.
async fn undo(pod: &Pod, id: &str, made: Made) {
    if made.in_guest
        && let Ok(agent) = pod.agent().await
        && let Err(error) = agent.delete_container(id).await
        && error.kind() != ErrorKind::NotFound
    {
        tracing::warn!(container = id, %error, "a container that failed could not be removed from the guest");
    }
    pod.router.forget(&made.tokens);
    if let Some(io) = &made.io {
        io.close();
    }
    detach(pod, id, &made.attached).await;
    made.hooks.poststop().await;
}

/// Takes shares and block devices from the VM. A VM that is gone has let go of them.
async fn detach(pod: &Pod, id: &str, attached: &Attached) {
    let Ok(vm) = pod.vm() else {
        return;
    };
    if pod.is_gone() {
        return;
    }
    for share in &attached.shares {
        if let Err(error) = pod.shares.hide(vm, share).await {
            tracing::warn!(container = id, share = share.name, error = %crate::error::chain(&error), "not removed");
        }
    }
    for disk in &attached.disks {
        if let Err(error) = pod.disks.detach(vm, disk).await {
            tracing::warn!(container = id, serial = disk.block.serial, error = %crate::error::chain(&error), "not detached");
        }
    }
}

/// Deletes a container that is not running, with all its execs.
pub(crate) async fn delete(pod: Arc<Pod>, id: String) -> Result<Deleted, Error> {
    wait_deleted(&pod, &id).await?;
    let process = ProcessId::init(&id);
    let (in_guest, ios, tokens) = {
        let mut containers = pod.containers();
        let container = containers.made("delete", &id)?;
        if !matches!(container.init.stage, Stage::Created | Stage::Stopped(_)) {
            return Err(Error::State {
                operation: "delete",
                status: container.status(&container.init),
                process,
            });
        }
        container.phase = Phase::Deleting;
        container.freezer = Freezer::Thawed;
        let all = || std::iter::once(&container.init).chain(container.execs.values());
        (
            container.in_guest,
            all().filter_map(|process| process.io.clone()).collect::<Vec<_>>(),
            all()
                .flat_map(|process| process.tokens.clone())
                .collect::<Vec<_>>(),
        )
    };
    let started = !matches!(pod.containers().get(&id)?.init.stage, Stage::Created);
    if started {
        drain(&ios).await;
    }
    if in_guest
        && let Ok(agent) = pod.agent().await
        && let Err(error) = agent.delete_container(&id).await
        && error.kind() != ErrorKind::NotFound
        && !pod.is_gone()
    {
        tracing::warn!(container = id, %error, "the guest could not remove the container");
    }
    pod.router.forget(&tokens);
    for io in &ios {
        io.close();
    }
    let (attached, exit, hooks) = {
        let mut containers = pod.containers();
        // A container that never ran was killed by its deletion; the guest's word of it may come too late.
        let killed = Exit {
            status: KILLED,
            exited_at: SystemTime::now(),
        };
        containers.exited(&process, killed);
        let container = containers.get_mut(&id)?;
        let exit = match container.init.stage {
            Stage::Stopped(exit) => exit,
            _ => killed,
        };
        (
            std::mem::take(&mut container.attached),
            exit,
            container.hooks.clone(),
        )
    };
    detach(&pod, &id, &attached).await;
    hooks.poststop().await;
    resize::leave(&pod, &id);
    let mut containers = pod.containers();
    let pid = containers.remove(&id).map_or(0, |container| container.init.pid);
    containers.send(Event::Deleted { process, pid, exit });
    Ok(Deleted { pid, exit })
}

/// Waits for the end of a deletion that is under way, after which there is no such container.
pub(crate) async fn wait_deleted(pod: &Pod, id: &str) -> Result<(), Error> {
    let mut init = {
        let containers = pod.containers();
        let container = containers.get(id)?;
        if container.phase != Phase::Deleting {
            return Ok(());
        }
        container.init.waiter()
    };
    // What tells of its init's exit goes with the container.
    while init.changed().await.is_ok() {}
    Err(Error::NoContainer(id.to_owned()))
}

/// Waits until what the processes wrote has reached its readers, up to a limit.
pub(crate) async fn drain(ios: &[Arc<Io>]) {
    let all = async {
        for io in ios {
            io.drained().await;
        }
    };
    if tokio::time::timeout(DRAIN_TIMEOUT, all).await.is_err() {
        tracing::warn!(
            "nobody took all of a process's output within {} s: dropped",
            DRAIN_TIMEOUT.as_secs()
        );
    }
}

fn mark(pod: &Pod, id: &str, set: impl FnOnce(&mut ContainerTimeline, u64)) {
    let now = pod.elapsed();
    if let Ok(container) = pod.containers().get_mut(id) {
        set(&mut container.timeline, now);
    }
}
