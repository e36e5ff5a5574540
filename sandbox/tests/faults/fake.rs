//! A VMM without a VM and an agent without a guest, speaking the real protocols, in a process of their own.
//!
//! The sandbox's id chooses how the boot goes wrong, the first argument of a process what it does. Containers,
//! shares and block devices that exist show in the guest's list of controllers.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use protocol::agent::create_container_request::Pid_namespace;
use protocol::agent::failure::Reason;
use protocol::agent::service::{Agent, create_agent};
use protocol::agent::{
    ConfigureSandboxRequest, ContainerRef, ContainerStatsResponse, CreateContainerRequest, CreateExecRequest,
    CreateProcessResponse, Event, Failure, GuestInfoResponse, Hello, OutOfMemory, ProcessExited, ProcessRef,
    SetOnlineCpusRequest, SetOnlineCpusResponse, SignalProcessRequest, UpdateContainerRequest,
};
use protocol::channel::{self, Received};
use protocol::hello;
use protocol::stream::{PORT_AGENT, PORT_STDIO, StreamHeader, VsockOpen};
use protocol::vmm::{
    self, CONTROL_FD, ExitCause, FailureKind, FromVmm, Reply, Request, RequestBody, Response,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, ServerStreamSender, TtrpcContext};
use ttrpc::{Code, get_status};

/// What exists in the VM.
#[derive(Default)]
struct Machine {
    attached: BTreeSet<String>,
    processes: BTreeMap<(String, String), String>,
    /// What was done about the VM's size, in order; shown after all else.
    sizes: Vec<String>,
}

impl Machine {
    fn size(machine: &Mutex<Self>, what: String) {
        machine.lock().unwrap().sizes.push(what);
    }
}

/// The VMM's control loop. Never returns before the sandbox hangs up.
pub fn run(scenario: &str) {
    // SAFETY: the sandbox passes its channel under this number, and nothing else here uses it.
    let control = Arc::new(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    let machine = Arc::new(Mutex::new(Machine::default()));
    let mut vsock = None;
    if scenario == "dies-at-once" {
        eprintln!("the fake VMM has had enough");
        std::process::exit(3);
    }
    while let Received::Message(bytes, mut fds) = channel::receive(&*control).unwrap() {
        let request: Request = serde_json::from_slice(&bytes).unwrap();
        let mut result = Ok(Reply::Done);
        let mut boot = false;
        let mut reached = None;
        match request.body {
            RequestBody::Configure { config, .. } => {
                let index = usize::try_from(config.vsock.unwrap().0).unwrap();
                vsock = Some(fds.swap_remove(index));
                if scenario == "refuses-the-machine" {
                    result = Err(vmm::Failure {
                        kind: FailureKind::Kvm,
                        message: "KVM is out of sorts".into(),
                    });
                }
            }
            RequestBody::Boot => boot = true,
            RequestBody::AddShare(share) => {
                machine
                    .lock()
                    .unwrap()
                    .attached
                    .insert(format!("share {}", share.name));
            }
            RequestBody::RemoveShare { name } => {
                assert!(machine.lock().unwrap().attached.remove(&format!("share {name}")));
            }
            RequestBody::AttachBlock { slot, .. } => {
                machine.lock().unwrap().attached.insert(format!("block {slot}"));
            }
            RequestBody::DetachBlock { slot } => {
                assert!(machine.lock().unwrap().attached.remove(&format!("block {slot}")));
            }
            RequestBody::Metrics => {
                result = Ok(Reply::Metrics(vmm::Metrics {
                    console: "booting\nstuck in the fake guest\n".into(),
                    ..Default::default()
                }));
            }
            RequestBody::SetVcpus { count } => Machine::size(&machine, format!("vcpus {count}")),
            RequestBody::SetPluggedMemory { .. } if scenario == "plugs-nothing" => {
                result = Err(vmm::Failure {
                    kind: FailureKind::Resources,
                    message: "no memory today".into(),
                });
            }
            RequestBody::SetPluggedMemory { mib } => {
                Machine::size(&machine, format!("plugged {mib}"));
                reached = Some(u64::from(mib) << 20);
            }
            RequestBody::Timeline => result = Ok(Reply::Timeline(vmm::Timeline::default())),
            other => panic!("{other:?}"),
        }
        let response = FromVmm::Response(Response {
            id: request.id,
            result,
        });
        channel::send(&*control, &serde_json::to_vec(&response).unwrap(), &[]).unwrap();
        if let Some(bytes) = reached {
            let event = FromVmm::Event(vmm::Event::PluggedMemory { bytes });
            channel::send(&*control, &serde_json::to_vec(&event).unwrap(), &[]).unwrap();
        }
        if boot {
            match scenario {
                "panics-in-boot" => end(&control, ExitCause::GuestPanic, "Kernel panic: no init found"),
                "says-nothing" | "refuses-the-machine" => {}
                _ => {
                    let guest = Guest {
                        scenario: scenario.to_owned(),
                        control: Arc::clone(&control),
                        vsock: Arc::new(vsock.take().unwrap()),
                        machine: Arc::clone(&machine),
                        events: Arc::default(),
                        line: None,
                    };
                    std::thread::spawn(|| guest.run());
                }
            }
        }
    }
}

fn end(control: &OwnedFd, cause: ExitCause, console: &str) -> ! {
    let code = cause.exit_code();
    let event = FromVmm::Event(vmm::Event::Exited {
        cause,
        console: console.into(),
    });
    channel::send(control, &serde_json::to_vec(&event).unwrap(), &[]).unwrap();
    std::process::exit(code.into());
}

#[derive(Clone)]
struct Guest {
    scenario: String,
    control: Arc<OwnedFd>,
    vsock: Arc<OwnedFd>,
    machine: Arc<Mutex<Machine>>,
    events: Arc<Mutex<Option<mpsc::UnboundedSender<Event>>>>,
    /// The agent's connection.
    line: Option<Arc<StdStream>>,
}

impl Guest {
    #[tokio::main(flavor = "current_thread")]
    async fn run(mut self) {
        let line = self.connect(PORT_AGENT);
        self.line = Some(Arc::new(line.try_clone().unwrap()));
        let mut stream = UnixStream::from_std(line).unwrap();
        let version = match self.scenario.as_str() {
            "another-version" => hello::AGENT_VERSION + 1,
            _ => hello::AGENT_VERSION,
        };
        let message = hello::encode(&Hello {
            version,
            agent_release: "fake".into(),
            ..Default::default()
        });
        stream.write_all(&message).await.unwrap();
        if self.scenario == "dies-after-hello" {
            end(&self.control, ExitCause::TripleFault, "");
        }
        let mut prefix = [0; 4];
        stream.read_exact(&mut prefix).await.unwrap();
        let mut body = vec![0; hello::body_length(prefix).unwrap()];
        stream.read_exact(&mut body).await.unwrap();
        if hello::check_reply(&body).is_err() {
            end(&self.control, ExitCause::GuestShutdown, "refused by the host");
        }
        let one = futures::stream::iter([Ok(stream)]);
        let listener = Listener::new(futures::StreamExt::chain(one, futures::stream::pending()));
        let mut server = Server::new()
            .register_service(create_agent(Arc::new(self.clone())))
            .add_listener(listener);
        server.start().await.unwrap();
        std::future::pending::<()>().await;
    }

    /// Connects to the host as a guest does through its vsock.
    fn connect(&self, port: u32) -> StdStream {
        let (ours, theirs) = StdStream::pair().unwrap();
        let open = serde_json::to_vec(&VsockOpen { port }).unwrap();
        channel::send(&*self.vsock, &open, &[theirs.as_fd()]).unwrap();
        ours.set_nonblocking(true).unwrap();
        ours
    }

    fn event(&self, event: Event) {
        let _ = self.events.lock().unwrap().as_ref().unwrap().send(event);
    }

    fn exit(&self, id: &(String, String), status: u32) {
        self.machine
            .lock()
            .unwrap()
            .processes
            .insert(id.clone(), "exited".into());
        let mut event = Event::new();
        event.set_exited(ProcessExited {
            container_id: id.0.clone(),
            exec_id: id.1.clone(),
            status,
            ..Default::default()
        });
        self.event(event);
    }

    fn add(
        &self,
        id: (String, String),
        process: &serde_json::Value,
        stdio: &protocol::agent::Stdio,
    ) -> ttrpc::Result<()> {
        let word = process["args"][0].as_str().unwrap().to_owned();
        if word == "refused" {
            return Err(failure(
                Code::INVALID_ARGUMENT,
                Reason::SPEC_UNSUPPORTED,
                "the fake agent refuses it",
            ));
        }
        if stdio.stdout_token != 0 {
            let header = StreamHeader {
                token: stdio.stdout_token,
            };
            let mut stdout = self.connect(PORT_STDIO);
            stdout.write_all(&header.encode()).unwrap();
            stdout.write_all(b"written by the fake\n").unwrap();
        }
        self.machine.lock().unwrap().processes.insert(id, word);
        Ok(())
    }
}

fn failure(code: Code, reason: Reason, message: &str) -> ttrpc::Error {
    let detail = Any::pack(&Failure {
        reason: reason.into(),
        subject: "fake".into(),
        ..Default::default()
    })
    .unwrap();
    let mut status = get_status(code, message);
    status.details.push(ttrpc::proto::Any {
        type_url: detail.type_url,
        value: detail.value,
        ..Default::default()
    });
    ttrpc::Error::RpcStatus(status)
}

fn key(process: &ProcessRef) -> (String, String) {
    (process.container_id.clone(), process.exec_id.clone())
}

#[async_trait::async_trait]
impl Agent for Guest {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: ConfigureSandboxRequest,
    ) -> ttrpc::Result<Empty> {
        assert!(request.entropy.len() >= 32 && request.realtime_ns > 0);
        Ok(Empty::new())
    }

    async fn guest_info(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<GuestInfoResponse> {
        let machine = self.machine.lock().unwrap();
        let processes = machine
            .processes
            .keys()
            .map(|(container, exec)| format!("process {container}/{exec}"));
        Ok(GuestInfoResponse {
            controllers: processes
                .chain(machine.attached.iter().cloned())
                .chain(machine.sizes.iter().cloned())
                .collect(),
            ..Default::default()
        })
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: Empty,
        stream: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        *self.events.lock().unwrap() = Some(sender);
        while let Some(event) = receiver.recv().await {
            stream.send(&event).await?;
        }
        Ok(())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateProcessResponse> {
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).unwrap();
        assert_eq!(request.rootfs.last().unwrap().target, "/rootfs");
        if spec["process"]["args"][0] == "tells-its-pid-namespace" {
            let told = match request.pid_namespace {
                Some(Pid_namespace::OwnPidNamespace(_)) => "pids of its own".to_owned(),
                Some(Pid_namespace::PodPidNamespace(_)) => "pids of the pod".to_owned(),
                Some(Pid_namespace::GuestPidNamespace(_)) => "pids of the guest".to_owned(),
                Some(Pid_namespace::PidNamespaceOf(other)) => format!("pids of {other}"),
                other => panic!("{other:?}"),
            };
            return Err(failure(Code::INVALID_ARGUMENT, Reason::SPEC_UNSUPPORTED, &told));
        }
        self.add(
            (request.container_id, String::new()),
            &spec["process"],
            &request.stdio,
        )?;
        Ok(CreateProcessResponse::default())
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: CreateExecRequest,
    ) -> ttrpc::Result<CreateProcessResponse> {
        let process: serde_json::Value = serde_json::from_slice(&request.process).unwrap();
        self.add((request.container_id, request.exec_id), &process, &request.stdio)?;
        Ok(CreateProcessResponse::default())
    }

    async fn start_process(&self, _: &TtrpcContext, process: ProcessRef) -> ttrpc::Result<Empty> {
        let id = key(&process);
        let word = self.machine.lock().unwrap().processes[&id].clone();
        match word.as_str() {
            "missing" => {
                return Err(failure(
                    Code::NOT_FOUND,
                    Reason::EXECUTABLE_NOT_FOUND,
                    "no such file or directory",
                ));
            }
            "exits-before-the-answer" => {
                self.exit(&id, 5);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            "is-out-of-memory" => {
                let mut event = Event::new();
                event.set_out_of_memory(OutOfMemory {
                    container_id: id.0.clone(),
                    ..Default::default()
                });
                self.event(event);
                self.exit(&id, 137);
            }
            "panics-the-guest" => end(&self.control, ExitCause::GuestPanic, "Kernel panic: as told"),
            "takes-the-agent-down" => {
                // The connection closes, the VMM stays.
                self.line
                    .as_ref()
                    .unwrap()
                    .shutdown(std::net::Shutdown::Both)
                    .unwrap();
            }
            _ => {}
        }
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        let id = (request.container_id, request.exec_id);
        match self
            .machine
            .lock()
            .unwrap()
            .processes
            .get(&id)
            .map(String::as_str)
        {
            None | Some("exited") => return Err(get_status_error(Code::NOT_FOUND, "no such process")),
            Some(_) => {}
        }
        if request.signal != 28 {
            self.exit(&id, 128 + request.signal);
        }
        Ok(Empty::new())
    }

    async fn delete_exec(&self, _: &TtrpcContext, process: ProcessRef) -> ttrpc::Result<Empty> {
        match self.machine.lock().unwrap().processes.remove(&key(&process)) {
            Some(_) => Ok(Empty::new()),
            None => Err(get_status_error(Code::NOT_FOUND, "no such exec")),
        }
    }

    async fn delete_container(&self, _: &TtrpcContext, container: ContainerRef) -> ttrpc::Result<Empty> {
        self.machine
            .lock()
            .unwrap()
            .processes
            .retain(|(id, _), _| *id != container.container_id);
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &TtrpcContext, _: ContainerRef) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, _: ContainerRef) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        Machine::size(&self.machine, format!("update {}", request.container_id));
        Ok(Empty::new())
    }

    async fn set_online_cpus(
        &self,
        _: &TtrpcContext,
        request: SetOnlineCpusRequest,
    ) -> ttrpc::Result<SetOnlineCpusResponse> {
        Machine::size(&self.machine, format!("online {}", request.count));
        Ok(SetOnlineCpusResponse {
            online: request.count,
            ..Default::default()
        })
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        _: ContainerRef,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        let mut stats = ContainerStatsResponse::new();
        stats.pids.mut_or_insert_default().current = 42;
        Ok(stats)
    }
}

fn get_status_error(code: Code, message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message))
}
