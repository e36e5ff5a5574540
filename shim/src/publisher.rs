//! Sends a sandbox's events to containerd, in order, by `containerd.services.events.ttrpc.v1.Events/Forward`.
//!
//! One task owns the connection and the queue: whoever publishes never waits. CRI-O takes no events and gives no
//! address: then this does nothing.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task as events;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use sandbox::{Event, StdioUris};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{debug, warn};
use ttrpc::r#async::transport::Socket;
use ttrpc::context;

use crate::convert;

/// How many events wait while containerd is away; an event is a few hundred bytes.
const QUEUE_LIMIT: usize = 4096;

/// How long containerd may take for one event.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

/// The waits between tries of one event: together longer than containerd takes to restart.
const RETRY_AFTER: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(5),
];

/// The sending end.
#[derive(Debug)]
pub struct Publisher {
    namespace: String,
    queue: Mutex<Option<mpsc::Sender<Envelope>>>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl Publisher {
    /// Starts the task. `address` is a path, with or without `unix://`; empty: events go nowhere.
    ///
    /// Must be called inside a tokio runtime.
    pub fn start(address: &str, namespace: &str) -> Self {
        let address = address.strip_prefix("unix://").unwrap_or(address).to_owned();
        let (queue, worker) = if address.is_empty() {
            (None, None)
        } else {
            let (sender, receiver) = mpsc::channel(QUEUE_LIMIT);
            (Some(sender), Some(tokio::spawn(deliver(address, receiver))))
        };
        Self {
            namespace: namespace.to_owned(),
            queue: Mutex::new(queue),
            worker: Mutex::new(worker),
        }
    }

    /// Queues an event. Returns at once, whatever containerd does.
    pub fn publish(&self, event: Event) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = queue.as_ref() else {
            return;
        };
        let (topic, event) = match encode(event) {
            Ok(Some(encoded)) => encoded,
            Ok(None) => return,
            Err(error) => {
                warn!(%error, "cannot encode an event");
                return;
            }
        };
        let envelope = Envelope {
            timestamp: convert::timestamp(SystemTime::now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Envelope::default()
        };
        if queue.try_send(envelope).is_err() {
            warn!(
                topic,
                "containerd has not taken {QUEUE_LIMIT} events: one is lost"
            );
        }
    }

    /// Waits until everything queued was delivered or given up, at most for `limit`. Nothing can be published after.
    pub async fn finish(&self, limit: Duration) {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker
            && tokio::time::timeout(limit, worker).await.is_err()
        {
            warn!("containerd did not take the last events in time");
        }
    }
}

async fn deliver(address: String, mut queue: mpsc::Receiver<Envelope>) {
    let mut connection = None;
    while let Some(envelope) = queue.recv().await {
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        let mut waits = RETRY_AFTER.iter();
        while let Err(error) = forward(&mut connection, &address, &request).await {
            connection = None;
            let Some(wait) = waits.next() else {
                warn!(topic, %error, "containerd does not take events: one is lost");
                break;
            };
            debug!(topic, %error, "forwarding an event failed");
            tokio::time::sleep(*wait).await;
        }
    }
}

async fn forward(
    connection: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> Result<(), ttrpc::Error> {
    let client = match connection {
        Some(client) => client,
        None => {
            let stream = UnixStream::connect(address)
                .await
                .map_err(|error| ttrpc::Error::Socket(format!("connecting to {address}: {error}")))?;
            connection.insert(EventsClient::new(Client::new(Socket::new(stream))))
        }
    };
    client
        .forward(context::with_duration(FORWARD_TIMEOUT), request)
        .await
        .map(drop)
}

/// An event as containerd knows it; `None` for those it does not.
fn encode(event: Event) -> protobuf::Result<Option<(&'static str, Any)>> {
    let (topic, event) = match event {
        Event::ContainerCreated {
            container_id,
            pid,
            bundle,
            rootfs,
            stdio,
        } => (
            topics::TASK_CREATE_EVENT_TOPIC,
            event_any(&events::TaskCreate {
                container_id,
                bundle: bundle.to_string_lossy().into_owned(),
                rootfs: rootfs.into_iter().map(convert::mount).collect(),
                io: MessageField::some(task_io(stdio)),
                pid,
                ..events::TaskCreate::default()
            })?,
        ),
        Event::ContainerStarted { container_id, pid } => (
            topics::TASK_START_EVENT_TOPIC,
            event_any(&events::TaskStart {
                container_id,
                pid,
                ..events::TaskStart::default()
            })?,
        ),
        Event::ExecAdded { process } => (
            topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            event_any(&events::TaskExecAdded {
                container_id: process.container_id,
                exec_id: process.exec_id,
                ..events::TaskExecAdded::default()
            })?,
        ),
        Event::ExecStarted { process, pid } => (
            topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            event_any(&events::TaskExecStarted {
                container_id: process.container_id,
                exec_id: process.exec_id,
                pid,
                ..events::TaskExecStarted::default()
            })?,
        ),
        Event::Exited { process, pid, exit } => (
            topics::TASK_EXIT_EVENT_TOPIC,
            event_any(&events::TaskExit {
                // The init goes by its container's id.
                id: if process.is_init() {
                    process.container_id.clone()
                } else {
                    process.exec_id
                },
                container_id: process.container_id,
                pid,
                exit_status: exit.status,
                exited_at: convert::timestamp(exit.exited_at),
                ..events::TaskExit::default()
            })?,
        ),
        Event::Deleted { process, pid, exit } => (
            topics::TASK_DELETE_EVENT_TOPIC,
            event_any(&events::TaskDelete {
                container_id: process.container_id,
                // Here the init has no id.
                id: process.exec_id,
                pid,
                exit_status: exit.status,
                exited_at: convert::timestamp(exit.exited_at),
                ..events::TaskDelete::default()
            })?,
        ),
        Event::Paused { container_id } => (
            topics::TASK_PAUSED_EVENT_TOPIC,
            event_any(&events::TaskPaused {
                container_id,
                ..events::TaskPaused::default()
            })?,
        ),
        Event::Resumed { container_id } => (
            topics::TASK_RESUMED_EVENT_TOPIC,
            event_any(&events::TaskResumed {
                container_id,
                ..events::TaskResumed::default()
            })?,
        ),
        Event::OutOfMemory { container_id } => (
            topics::TASK_OOM_EVENT_TOPIC,
            event_any(&events::TaskOOM {
                container_id,
                ..events::TaskOOM::default()
            })?,
        ),
        Event::SandboxExited { .. } => return Ok(None),
    };
    Ok(Some((topic, event)))
}

fn event_any<M: Message>(event: &M) -> protobuf::Result<Any> {
    convert::any("containerd.events", event)
}

fn task_io(stdio: StdioUris) -> events::TaskIO {
    events::TaskIO {
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        terminal: stdio.terminal,
        ..events::TaskIO::default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::SystemTime;

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use sandbox::{Exit, ProcessId, RootfsMount};
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    /// containerd's end.
    struct Receiver(mpsc::UnboundedSender<Envelope>);

    #[async_trait]
    impl Events for Receiver {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let _ = self.0.send(request.envelope.unwrap_or_default());
            Ok(Empty::new())
        }
    }

    async fn serve(path: &Path, sender: mpsc::UnboundedSender<Envelope>) -> Server {
        let _ = std::fs::remove_file(path);
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Receiver(sender))));
        server.start().await.unwrap();
        server
    }

    fn paused(id: &str) -> Event {
        Event::Paused {
            container_id: id.to_owned(),
        }
    }

    #[tokio::test]
    async fn events_arrive_in_order_also_after_containerd_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let (sender, mut received) = mpsc::unbounded_channel();
        let mut server = serve(&path, sender.clone()).await;
        let publisher = Publisher::start(path.to_str().unwrap(), "ns");
        publisher.publish(paused("1"));
        assert_eq!(received.recv().await.unwrap().event.value, b"\x0a\x011");
        server.shutdown().await.unwrap();
        drop(server);
        publisher.publish(paused("2"));
        publisher.publish(paused("3"));
        let _server = serve(&path, sender).await;
        for expected in [b"\x0a\x012", b"\x0a\x013"] {
            let envelope = received.recv().await.unwrap();
            assert_eq!(envelope.namespace, "ns");
            assert_eq!(envelope.topic, "/tasks/paused");
            assert_eq!(envelope.event.type_url, "containerd.events.TaskPaused");
            assert_eq!(envelope.event.value, expected);
            assert!(envelope.timestamp.seconds > 0);
        }
        publisher.finish(Duration::from_secs(10)).await;
    }

    #[tokio::test]
    async fn nobody_to_tell_is_no_error_and_holds_nothing_up() {
        let publisher = Publisher::start("", "ns");
        publisher.publish(paused("1"));
        publisher.finish(Duration::from_secs(10)).await;
        let absent = Publisher::start("/nonexistent/events", "ns");
        for _ in 0..QUEUE_LIMIT + 10 {
            absent.publish(paused("1"));
        }
        absent.finish(Duration::from_millis(1)).await;
    }

    #[test]
    fn exits_and_deletions_name_init_and_exec_as_runc_does() {
        let exit = Exit {
            status: 7,
            exited_at: SystemTime::now(),
        };
        let exited = |process| {
            let (topic, any) = encode(Event::Exited {
                process,
                pid: 9,
                exit,
            })
            .unwrap()
            .unwrap();
            assert_eq!(topic, "/tasks/exit");
            events::TaskExit::parse_from_bytes(&any.value).unwrap()
        };
        let init = exited(ProcessId::init("c"));
        assert_eq!((init.container_id.as_str(), init.id.as_str()), ("c", "c"));
        assert_eq!((init.pid, init.exit_status), (9, 7));
        let exec = exited(ProcessId::exec("c", "e"));
        assert_eq!((exec.container_id.as_str(), exec.id.as_str()), ("c", "e"));
        let process = ProcessId::init("c");
        let (topic, any) = encode(Event::Deleted {
            process,
            pid: 9,
            exit,
        })
        .unwrap()
        .unwrap();
        assert_eq!(topic, "/tasks/delete");
        let deleted = events::TaskDelete::parse_from_bytes(&any.value).unwrap();
        assert_eq!((deleted.container_id.as_str(), deleted.id.as_str()), ("c", ""));
    }

    #[test]
    fn a_creation_says_all_that_was_requested() {
        let created = Event::ContainerCreated {
            container_id: "c".into(),
            pid: 9,
            bundle: PathBuf::from("/b"),
            rootfs: vec![RootfsMount {
                kind: "bind".into(),
                source: "/src".into(),
                target: String::new(),
                options: vec!["rbind".into()],
            }],
            stdio: StdioUris {
                stdin: "/i".into(),
                stdout: "/o".into(),
                stderr: "/e".into(),
                terminal: true,
            },
        };
        let (topic, any) = encode(created).unwrap().unwrap();
        assert_eq!(topic, "/tasks/create");
        let event = events::TaskCreate::parse_from_bytes(&any.value).unwrap();
        assert_eq!((event.bundle.as_str(), event.pid), ("/b", 9));
        assert_eq!(
            (event.rootfs[0].type_.as_str(), event.rootfs[0].options.len()),
            ("bind", 1)
        );
        assert_eq!((event.io.stdin.as_str(), event.io.terminal), ("/i", true));
    }
}
