//! The ttrpc service: carries calls to the pod and its containers, and decides nothing.
//!
//! A call that changes something runs to its end even when the caller has gone: half a container helps nobody.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use protobuf::well_known_types::empty::Empty;
use protocol::agent::service::{Agent, create_agent};
use protocol::agent::{
    ConfigureSandboxRequest, ContainerRef, ContainerStatsResponse, CreateContainerRequest, CreateExecRequest,
    CreateProcessResponse, Event, GuestInfoResponse, ListProcessesResponse, Network, ProcessRef,
    ResizeTerminalRequest, SetClockRequest, SetOnlineCpusRequest, SetOnlineCpusResponse,
    SignalProcessRequest, UpdateContainerRequest, Volume,
};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, ServerStreamSender, TtrpcContext};

use crate::clock;
use crate::cpus;
use crate::error::Error;
use crate::sandbox::Sandbox;
use crate::stream::Stream;

type Reply<T> = ttrpc::Result<T>;

/// Serves one connection until the host closes it or asks for the end.
///
/// # Errors
/// When the server cannot start.
pub async fn serve(mut stream: Stream, sandbox: Arc<Sandbox>) -> ttrpc::Result<()> {
    let mut closed = stream.watch_closed();
    let connections = futures::stream::once(std::future::ready(Ok(stream)));
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(create_agent(Arc::new(Service(Arc::clone(&sandbox)))));
    server.start().await?;
    tokio::select! {
        // The sender goes with the connection.
        _ = closed.wait_for(|closed| *closed) => {}
        () = sandbox.ending.notified() => {}
    }
    Ok(())
}

struct Service(Arc<Sandbox>);

/// Runs to the end, whatever becomes of the caller.
async fn complete<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Reply<T> {
    let result = tokio::spawn(work).await;
    Ok(result.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))?)
}

fn done(result: Result<(), Error>) -> Reply<Empty> {
    Ok(result.map(|()| Empty::new())?)
}

#[async_trait]
impl Agent for Service {
    async fn configure_sandbox(&self, _: &TtrpcContext, request: ConfigureSandboxRequest) -> Reply<Empty> {
        let sandbox = Arc::clone(&self.0);
        complete(async move { sandbox.configure(request).await.map(|()| Empty::new()) }).await
    }

    async fn update_network(&self, _: &TtrpcContext, request: Network) -> Reply<Empty> {
        let sandbox = Arc::clone(&self.0);
        complete(async move { sandbox.update_network(request).await.map(|()| Empty::new()) }).await
    }

    async fn set_online_cpus(
        &self,
        _: &TtrpcContext,
        request: SetOnlineCpusRequest,
    ) -> Reply<SetOnlineCpusResponse> {
        // The kernel waits for a CPU to come; containers are served meanwhile.
        let work =
            tokio::task::spawn_blocking(move || cpus::set_online(Path::new(cpus::DIRECTORY), request.count));
        let online =
            complete(async { work.await.map_err(|error| Error::Internal(error.to_string()))? }).await?;
        Ok(SetOnlineCpusResponse {
            online,
            ..Default::default()
        })
    }

    async fn set_clock(&self, _: &TtrpcContext, request: SetClockRequest) -> Reply<Empty> {
        done(clock::set(request.realtime_ns).map_err(|source| Error::Kernel {
            what: "set the clock".into(),
            source,
        }))
    }

    async fn guest_info(&self, _: &TtrpcContext, _: Empty) -> Reply<GuestInfoResponse> {
        Ok(self.0.guest_info())
    }

    async fn events(&self, _: &TtrpcContext, _: Empty, stream: ServerStreamSender<Event>) -> Reply<()> {
        let mut listening = self
            .0
            .events
            .listen()
            .ok_or_else(|| Error::State("events already have a listener".into()))?;
        while let Some(event) = listening.next().await {
            stream.send(&event).await?;
        }
        Ok(())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Reply<Empty> {
        self.0.ending.notify_one();
        // The answer is the end of the connection.
        std::future::pending().await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Reply<CreateProcessResponse> {
        let sandbox = Arc::clone(&self.0);
        let guest_pid = complete(async move { sandbox.create(request).await }).await?;
        Ok(CreateProcessResponse {
            guest_pid,
            ..Default::default()
        })
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: CreateExecRequest,
    ) -> Reply<CreateProcessResponse> {
        if request.exec_id.is_empty() {
            return Err(Error::Invalid("exec_id is empty, which names the container's init".into()).into());
        }
        let container = self.0.container(&request.container_id)?;
        let guest_pid = complete(async move { container.create_exec(request).await }).await?;
        Ok(CreateProcessResponse {
            guest_pid,
            ..Default::default()
        })
    }

    async fn start_process(&self, _: &TtrpcContext, request: ProcessRef) -> Reply<Empty> {
        let process = self
            .0
            .container(&request.container_id)?
            .process(&request.exec_id)?;
        complete(async move { process.start().await.map(|()| Empty::new()) }).await
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> Reply<Empty> {
        let container = self.0.container(&request.container_id)?;
        if !request.all {
            let signal = async move { container.signal(&request.exec_id, request.signal).await };
            return complete(async move { signal.await.map(|()| Empty::new()) }).await;
        }
        if !request.exec_id.is_empty() {
            return Err(Error::Invalid("a signal to all processes names none".into()).into());
        }
        complete(async move { container.signal_all(request.signal).await.map(|()| Empty::new()) }).await
    }

    async fn resize_terminal(&self, _: &TtrpcContext, request: ResizeTerminalRequest) -> Reply<Empty> {
        let process = self
            .0
            .container(&request.container_id)?
            .process(&request.exec_id)?;
        done(process.resize(request.rows, request.columns))
    }

    async fn delete_exec(&self, _: &TtrpcContext, request: ProcessRef) -> Reply<Empty> {
        if request.exec_id.is_empty() {
            return Err(Error::Invalid("the container's init goes with its container".into()).into());
        }
        let container = self.0.container(&request.container_id)?;
        complete(async move {
            container
                .delete_exec(&request.exec_id)
                .await
                .map(|()| Empty::new())
        })
        .await
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ContainerRef) -> Reply<Empty> {
        let sandbox = Arc::clone(&self.0);
        complete(async move { sandbox.delete(&request.container_id).await.map(|()| Empty::new()) }).await
    }

    async fn list_processes(&self, _: &TtrpcContext, request: ContainerRef) -> Reply<ListProcessesResponse> {
        Ok(ListProcessesResponse {
            processes: self.0.container(&request.container_id)?.processes()?,
            ..Default::default()
        })
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRef) -> Reply<Empty> {
        let container = self.0.container(&request.container_id)?;
        complete(async move { container.set_paused(true).await.map(|()| Empty::new()) }).await
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRef) -> Reply<Empty> {
        let container = self.0.container(&request.container_id)?;
        complete(async move { container.set_paused(false).await.map(|()| Empty::new()) }).await
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateContainerRequest) -> Reply<Empty> {
        let container = self.0.container(&request.container_id)?;
        complete(async move { container.update(&request.resources).await.map(|()| Empty::new()) }).await
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRef,
    ) -> Reply<ContainerStatsResponse> {
        Ok(self.0.container(&request.container_id)?.stats().await?)
    }

    async fn update_volume(&self, _: &TtrpcContext, request: Volume) -> Reply<Empty> {
        let sandbox = Arc::clone(&self.0);
        complete(async move { sandbox.update_volume(request).await.map(|()| Empty::new()) }).await
    }
}
