//! The Task service, which containerd calls under the name `containerd.task.v3.Task` and, before 2.0 and in CRI-O,
//! `containerd.task.v2.Task`; the messages are the same.
//!
//! Each call is translated into one on the sandbox, which runs to its end whatever happens to the caller: ttrpc drops
//! a handler when its connection closes or its time is up, and half a creation is worse than one nobody waits for.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::well_known_types::any::Any;
use protobuf::{EnumOrUnknown, MessageField};
use sandbox::{ContainerRequest, ExecRequest, ProcessEntry, ProcessId, Sandbox, Stdio};
use tracing::{info, warn};
use ttrpc::Code;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::convert::{self, encoding, failure, status, to_the_end};
use crate::metrics;
use crate::options::RuntimeOptions;
use crate::pod::Pod;
use crate::pod_config;

const NAME_V3: &str = "containerd.task.v3.Task";
const NAME_V2: &str = "containerd.task.v2.Task";

/// The service's state.
#[derive(Clone)]
pub struct TaskService {
    pod: Arc<Pod>,
    socket: PathBuf,
}

impl TaskService {
    /// The service of one pod; `socket` is where it is served.
    pub fn new(pod: Arc<Pod>, socket: PathBuf) -> Self {
        Self { pod, socket }
    }

    /// Both names, for the ttrpc server.
    pub fn services(self) -> HashMap<String, Service> {
        let service: Arc<dyn Task + Send + Sync> = Arc::new(self);
        let renamed = create_task(Arc::clone(&service))
            .into_iter()
            .map(|(name, methods)| (name.replace(NAME_V3, NAME_V2), methods));
        let mut services: HashMap<_, _> = renamed.collect();
        services.extend(create_task(service));
        services
    }

    /// The sandbox that holds `container`, as far as that can be said without asking it.
    fn sandbox(&self, container: &str) -> ttrpc::Result<Sandbox> {
        self.pod.sandbox().ok_or_else(|| {
            status(
                Code::NOT_FOUND,
                format!("container {container} does not exist in this shim"),
            )
        })
    }

    /// Makes one call on the sandbox that holds `container`, and makes it to its end.
    async fn on_sandbox<T, F>(&self, container: &str, call: impl FnOnce(Sandbox) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, sandbox::Error>> + Send + 'static,
    {
        let call = call(self.sandbox(container)?);
        to_the_end(async move { call.await.map_err(|error| failure(&error)) }).await
    }

    async fn make(&self, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let _creating = self.pod.creating();
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            return Err(status(
                Code::UNIMPLEMENTED,
                "restoring a container from a checkpoint is not supported",
            ));
        }
        let options = read_options(request.options.as_ref())?;
        let bundle = PathBuf::from(&request.bundle);
        let spec_json = std::fs::read(bundle.join("config.json")).map_err(|error| {
            let message = format!(
                "cannot read config.json in the bundle {}: {error}",
                bundle.display()
            );
            status(Code::INVALID_ARGUMENT, message)
        })?;
        let spec_json = match self.pod.sandbox_bundle() {
            Some(bundle) => pod_config::complete(spec_json, bundle),
            None => spec_json,
        };
        let sandbox = self
            .pod
            .sandbox_for(&spec_json, options)
            .map_err(|error| status(Code::INVALID_ARGUMENT, error.to_string()))?;
        let pid = sandbox
            .create_container(ContainerRequest {
                id: request.id,
                spec_json,
                bundle: bundle.clone(),
                rootfs: request.rootfs.into_iter().map(convert::rootfs_mount).collect(),
                stdio: Stdio {
                    stdin: convert::stdio_target(request.stdin),
                    stdout: convert::stdio_target(request.stdout),
                    stderr: convert::stdio_target(request.stderr),
                    terminal: request.terminal,
                },
            })
            .await
            .map_err(|error| failure(&error))?;
        let record = self.pod.record(&self.socket, Some(pid));
        if let Err(error) = record.write(&bundle) {
            // Only needed should this process be killed.
            warn!(%error, bundle = %bundle.display(), "cannot write the record of the container's processes");
        }
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }
}

fn read_options(any: Option<&Any>) -> ttrpc::Result<Option<RuntimeOptions>> {
    let Some(any) = any else {
        return Ok(None);
    };
    let options =
        RuntimeOptions::from_any(any).map_err(|error| status(Code::INVALID_ARGUMENT, error.to_string()))?;
    if options.is_none() && !any.type_url.is_empty() {
        info!(type_url = any.type_url, "ignoring options of another runtime");
    }
    Ok(options)
}

/// The JSON in an `Any` that typeurl made from a Go type without a protobuf message.
fn json_of(any: MessageField<Any>, what: &str) -> ttrpc::Result<Vec<u8>> {
    let value = any.into_option().map(|any| any.value).unwrap_or_default();
    if value.is_empty() {
        return Err(status(
            Code::INVALID_ARGUMENT,
            format!("the request has no {what}"),
        ));
    }
    Ok(value)
}

fn process_info(entry: ProcessEntry) -> ttrpc::Result<ProcessInfo> {
    let mut info = ProcessInfo {
        pid: entry.pid,
        ..ProcessInfo::default()
    };
    if !entry.exec_id.is_empty() {
        let details = ProcessDetails {
            exec_id: entry.exec_id,
            ..ProcessDetails::default()
        };
        info.info = MessageField::some(
            convert::any("containerd.runc.v1", &details).map_err(|error| encoding(&error))?,
        );
    }
    Ok(info)
}

/// Rows and columns of a terminal; what does not fit its 16 bits is as large as can be.
fn window(size: u32) -> u16 {
    u16::try_from(size).unwrap_or(u16::MAX)
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let this = self.clone();
        to_the_end(async move { this.make(request).await }).await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let process = ProcessId::exec(&request.id, &request.exec_id);
        let pid = self
            .on_sandbox(&request.id, |sandbox| async move {
                sandbox.start_process(&process).await
            })
            .await?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let process = ProcessId::exec(&request.id, &request.exec_id);
        let state = self
            .sandbox(&request.id)?
            .state(&process)
            .await
            .map_err(|error| failure(&error))?;
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: state.bundle.to_string_lossy().into_owned(),
            pid: state.pid,
            status: EnumOrUnknown::new(convert::task_status(state.status)),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.status),
            exited_at: state
                .exit
                .map_or_else(MessageField::none, |exit| convert::timestamp(exit.exited_at)),
            ..StateResponse::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        if request.exec_id.is_empty() {
            return Err(status(Code::INVALID_ARGUMENT, "the exec_id must not be empty"));
        }
        let process_json = json_of(request.spec, "process specification")?;
        let exec = ExecRequest {
            process: ProcessId::exec(&request.id, &request.exec_id),
            process_json,
            stdio: Stdio {
                stdin: convert::stdio_target(request.stdin),
                stdout: convert::stdio_target(request.stdout),
                stderr: convert::stdio_target(request.stderr),
                terminal: request.terminal,
            },
        };
        self.on_sandbox(
            &request.id,
            |sandbox| async move { sandbox.create_exec(exec).await },
        )
        .await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let process = ProcessId::exec(&request.id, &request.exec_id);
        let (signal, all) = (request.signal, request.all);
        self.on_sandbox(&request.id, |sandbox| async move {
            sandbox.signal(&process, signal, all).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let process = ProcessId::exec(&request.id, &request.exec_id);
        let deleted = self
            .on_sandbox(
                &request.id,
                |sandbox| async move { sandbox.delete(&process).await },
            )
            .await?;
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: convert::timestamp(deleted.exit.exited_at),
            ..DeleteResponse::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = ProcessId::exec(&request.id, &request.exec_id);
        let exit = self
            .sandbox(&request.id)?
            .wait(&process)
            .await
            .map_err(|error| failure(&error))?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: convert::timestamp(exit.exited_at),
            ..WaitResponse::default()
        })
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            let process = ProcessId::exec(&request.id, &request.exec_id);
            self.on_sandbox(&request.id, |sandbox| async move {
                sandbox.close_stdin(&process).await
            })
            .await?;
        }
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let process = ProcessId::exec(&request.id, &request.exec_id);
        let (rows, columns) = (window(request.height), window(request.width));
        self.on_sandbox(&request.id, |sandbox| async move {
            sandbox.resize(&process, rows, columns).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let id = request.id.clone();
        let entries = self
            .on_sandbox(&request.id, |sandbox| async move { sandbox.processes(&id).await })
            .await?;
        Ok(PidsResponse {
            processes: entries
                .into_iter()
                .map(process_info)
                .collect::<ttrpc::Result<_>>()?,
            ..PidsResponse::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.on_sandbox(&request.id, |sandbox| async move { sandbox.pause(&id).await })
            .await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.on_sandbox(&request.id, |sandbox| async move { sandbox.resume(&id).await })
            .await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = json_of(request.resources, "resources")?;
        let id = request.id.clone();
        self.on_sandbox(&request.id, |sandbox| async move {
            sandbox.update(&id, &resources).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let id = request.id.clone();
        let stats = self
            .on_sandbox(&request.id, |sandbox| async move { sandbox.stats(&id).await })
            .await?;
        Ok(StatsResponse {
            stats: MessageField::some(metrics::any(&stats)?),
            ..StatsResponse::default()
        })
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(status(Code::UNIMPLEMENTED, "checkpoints are not supported"))
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = match self.pod.sandbox() {
            // An unknown container is no error here: containerd asks before it knows.
            Some(sandbox) => sandbox
                .state(&ProcessId::init(&request.id))
                .await
                .map_or(0, |state| state.pid),
            None => 0,
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // Sent after every Delete; only the last one counts. `now` has no meaning beyond that, as with runc's shim.
        self.pod.may_leave();
        Ok(Empty::new())
    }
}
