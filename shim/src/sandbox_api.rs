//! containerd's Sandbox service (`containerd.runtime.sandbox.v1.Sandbox`, containerd 2.3 and later with
//! `sandboxer = "shim"`), on the same socket and the same pod as the Task service.
//!
//! What it makes is the same as a sandbox container that comes through the Task service: a host process in the pod's
//! network namespace and the VM behind it. Only its events are nobody's: containerd asks by WaitSandbox.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox as SandboxRpc, create_sandbox};
use containerd_shim_protos::types::platform::Platform;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use sandbox::{ContainerRequest, ErrorKind, ProcessId, Sandbox, Status, Stdio};
use tracing::warn;
use ttrpc::Code;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::convert::{self, failure, status, to_the_end};
use crate::metrics;
use crate::pod::Pod;
use crate::pod_config::{self, PodConfigError};

/// The type containerd gives an OCI specification, in JSON.
const SPEC_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// States as CRI names them.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service's state.
#[derive(Clone)]
pub struct SandboxService {
    pod: Arc<Pod>,
    socket: PathBuf,
    made: Arc<OnceLock<Made>>,
}

/// A sandbox that was created.
struct Made {
    spec_json: Vec<u8>,
    created_at: SystemTime,
}

impl SandboxService {
    /// The service of one pod; `socket` is where it is served.
    pub fn new(pod: Arc<Pod>, socket: PathBuf) -> Self {
        Self {
            pod,
            socket,
            made: Arc::default(),
        }
    }

    /// For the ttrpc server.
    pub fn services(self) -> HashMap<String, Service> {
        create_sandbox(Arc::new(self))
    }

    /// The sandbox with this id.
    fn find(&self, id: &str) -> ttrpc::Result<(Sandbox, &Made)> {
        match (self.pod.sandbox(), self.made.get()) {
            (Some(sandbox), Some(made)) if id == self.pod.id() => Ok((sandbox, made)),
            _ => Err(status(
                Code::NOT_FOUND,
                format!("sandbox {id} does not exist in this shim"),
            )),
        }
    }

    async fn make(&self, request: CreateSandboxRequest) -> ttrpc::Result<()> {
        let invalid = |error: &dyn std::fmt::Display| status(Code::INVALID_ARGUMENT, error.to_string());
        let _creating = self.pod.creating();
        let id = request.sandbox_id.clone();
        if id != self.pod.id() {
            let message = format!(
                "this shim was started for sandbox {}, not for {id}",
                self.pod.id()
            );
            return Err(status(Code::INVALID_ARGUMENT, message));
        }
        if self.made.get().is_some() {
            return Err(status(
                Code::ALREADY_EXISTS,
                format!("sandbox {id} exists already"),
            ));
        }
        let config = pod_config::read(&request).map_err(|error| invalid(&error))?;
        let bundle = PathBuf::from(&request.bundle_path);
        pod_config::write_files(&bundle, &config).map_err(|error| match error {
            PodConfigError::File { .. } => status(Code::INTERNAL, error.to_string()),
            _ => invalid(&error),
        })?;
        let spec_json = pod_config::spec(&request, &config).to_string().into_bytes();
        // Before there is an event to be kept back.
        self.pod.keeps_sandbox(&bundle);
        let sandbox = self
            .pod
            .sandbox_for(&spec_json, None)
            .map_err(|error| invalid(&error))?;
        let pid = sandbox
            .create_container(ContainerRequest {
                id,
                spec_json: spec_json.clone(),
                bundle: bundle.clone(),
                rootfs: Vec::new(),
                stdio: Stdio::null(),
            })
            .await
            .map_err(|error| failure(&error))?;
        self.record(&bundle, pid);
        let created_at = SystemTime::now();
        let _ = self.made.set(Made {
            spec_json,
            created_at,
        });
        Ok(())
    }

    fn record(&self, bundle: &Path, pid: u32) {
        let record = self.pod.record(&self.socket, Some(pid));
        if let Err(error) = record.write(bundle) {
            // Only needed should this process be killed.
            warn!(%error, bundle = %bundle.display(), "cannot write the record of the sandbox's processes");
        }
    }
}

/// Ends a sandbox's process and its VM. Nothing happens the second time.
async fn stop(sandbox: Sandbox, id: String) -> ttrpc::Result<()> {
    let process = ProcessId::init(&id);
    match sandbox
        .signal(&process, libc::SIGKILL.cast_unsigned(), false)
        .await
    {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failure(&error)),
    }
    sandbox.shutdown().await;
    Ok(())
}

#[async_trait]
impl SandboxRpc for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let this = self.clone();
        to_the_end(async move { this.make(request).await }).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let (sandbox, made) = self.find(&request.sandbox_id)?;
        let process = ProcessId::init(&request.sandbox_id);
        // Waits for the guest: what keeps it from starting is told here.
        let pid = to_the_end(async move {
            let started = sandbox.start_process(&process).await;
            started.map_err(|error| failure(&error))
        })
        .await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: convert::timestamp(made.created_at),
            spec: MessageField::some(Any {
                type_url: SPEC_TYPE_URL.to_owned(),
                value: made.spec_json.clone(),
                ..Any::default()
            }),
            ..StartSandboxResponse::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        Ok(PlatformResponse {
            platform: MessageField::some(Platform {
                os: "linux".to_owned(),
                architecture: "amd64".to_owned(),
                ..Platform::default()
            }),
            ..PlatformResponse::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        // There is nothing that could use the time limit: containers are stopped by their own calls.
        let (sandbox, _) = self.find(&request.sandbox_id)?;
        to_the_end(stop(sandbox, request.sandbox_id)).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let (sandbox, _) = self.find(&request.sandbox_id)?;
        let exit = sandbox
            .wait(&ProcessId::init(&request.sandbox_id))
            .await
            .map_err(|error| failure(&error))?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: convert::timestamp(exit.exited_at),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let (sandbox, made) = self.find(&request.sandbox_id)?;
        let state = sandbox
            .state(&ProcessId::init(&request.sandbox_id))
            .await
            .map_err(|error| failure(&error))?;
        let ready = state.status == Status::Running;
        let mut response = SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: state.pid,
            state: if ready { READY } else { NOT_READY }.to_owned(),
            created_at: convert::timestamp(made.created_at),
            exited_at: state
                .exit
                .map_or_else(MessageField::none, |exit| convert::timestamp(exit.exited_at)),
            ..SandboxStatusResponse::default()
        };
        if request.verbose {
            // The members that crictl and the suites read of containerd's own sandboxes.
            let info = serde_json::json!({
                "pid": state.pid,
                "processStatus": state.status.to_string(),
                "runtimeType": crate::RUNTIME_NAME,
                "vmmPid": sandbox.vmm_pid(),
                "runtimeSpec": serde_json::from_slice::<serde_json::Value>(&made.spec_json).ok(),
            });
            response.info.insert("info".to_owned(), info.to_string());
        }
        Ok(response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        let (sandbox, _) = self.find(&request.sandbox_id)?;
        let state = sandbox
            .state(&ProcessId::init(&request.sandbox_id))
            .await
            .map_err(|error| failure(&error))?;
        match state.status {
            Status::Stopped => Err(status(
                Code::UNAVAILABLE,
                format!("sandbox {} has ended", request.sandbox_id),
            )),
            _ => Ok(PingResponse::new()),
        }
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        // Also of a sandbox whose making failed: the shim goes in any case. The VM goes with it.
        if let Ok((sandbox, _)) = self.find(&request.sandbox_id) {
            to_the_end(stop(sandbox, request.sandbox_id)).await?;
        }
        self.pod.leave();
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let (sandbox, _) = self.find(&request.sandbox_id)?;
        let id = request.sandbox_id.clone();
        let stats =
            to_the_end(async move { sandbox.stats(&id).await.map_err(|error| failure(&error)) }).await?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = convert::timestamp(SystemTime::now());
        metrics.id = request.sandbox_id;
        metrics.data = MessageField::some(metrics::any(&stats)?);
        Ok(response)
    }
}
