//! Holds a container: owns its sandbox, answers `exec` and `kill`, and cleans up at the end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;
use std::sync::Arc;

use sandbox::{
    Config, ContainerRequest, ExecRequest, ProcessId, RootfsMount, Sandbox, SandboxSpec, Stdio, StdioTarget,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::LocalSet;

use crate::arguments::TimelineFormat;
use crate::control::{Connection, Listener, Reply, Request};
use crate::error::Error;
use crate::image::ImageConfig;
use crate::run::{Plan, Prepared, prepare};
use crate::spec::{self, ProcessOptions};
use crate::store::{Home, Store};
use crate::{block_on, passwd, relay, signals, timeline};

/// What is left to say of a container that has exited.
pub struct Finished {
    pub status: u8,
    /// The timeline as it was asked for.
    pub timeline: Option<String>,
}

/// `supervise`: reads a [`Plan`] from standard input, prints the container's name when it runs, and stays.
pub fn detached(store: &Store) -> Result<u8, Error> {
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .map_err(Error::host("cannot read the container's description"))?;
    let plan: Plan = serde_json::from_str(&text)
        .map_err(|error| Error::host("cannot read the container's description")(error.into()))?;
    // A session of its own: signals of the caller's terminal are not for this process.
    rustix::process::setsid().map_err(|errno| Error::host("cannot make a session")(errno.into()))?;
    let prepared = prepare(store, &plan)?;
    let log = || -> io::Result<(OwnedFd, OwnedFd)> {
        let file = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(prepared.home.log())?;
        Ok((file.try_clone()?.into(), file.into()))
    };
    let (stdout, stderr) = match log() {
        Ok(pair) => pair,
        Err(error) => {
            prepared.home.remove();
            return Err(Error::host("cannot make the container's log")(error));
        }
    };
    let stdio = Stdio {
        stdin: StdioTarget::Null,
        stdout: StdioTarget::Fd(stdout),
        stderr: StdioTarget::Fd(stderr),
        terminal: false,
    };
    let finished = block_on(hold(&plan, prepared, stdio, |name| {
        println!("{name}");
        // The caller goes on now; nothing of it is kept open.
        let _ = io::stdout().flush();
        if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdin(&null);
            let _ = rustix::stdio::dup2_stdout(&null);
            let _ = rustix::stdio::dup2_stderr(&null);
        }
    }))?;
    Ok(finished.status)
}

/// Runs a prepared container to its end. `running` is called with its name once it executes.
///
/// # Errors
/// When it cannot be made or started; then nothing of it is left.
pub async fn hold(
    plan: &Plan,
    prepared: Prepared,
    stdio: Stdio,
    running: impl FnOnce(&str),
) -> Result<Finished, Error> {
    let Prepared {
        mut home,
        lower,
        image,
        spec,
    } = prepared;
    let started = start(plan, &home, &lower, &spec, stdio).await;
    let (sandbox, process) = match started {
        Ok(started) => started,
        Err(error) => {
            home.remove();
            return Err(error);
        }
    };
    let result = LocalSet::new()
        .run_until(serve(
            plan,
            &mut home,
            Held {
                sandbox,
                process,
                lower,
                image,
            },
            running,
        ))
        .await;
    match &result {
        Ok(finished) if !plan.remove => {
            home.record.status = Some(finished.status);
            home.save()?;
        }
        _ => home.remove(),
    }
    result
}

async fn start(
    plan: &Plan,
    home: &Home,
    lower: &std::path::Path,
    spec: &serde_json::Value,
    stdio: Stdio,
) -> Result<(Sandbox, ProcessId), Error> {
    let config = Arc::new(Config::load(plan.config.as_deref())?);
    let name = home.record.name.as_str();
    let typed = serde_json::from_value(spec.clone())
        .map_err(|error| Error::host("the specification is not understood")(error.into()))?;
    let (sandbox, mut events) = Sandbox::start(SandboxSpec::from_oci(name, &typed, &config)?, config);
    // Nobody here acts on lifecycle events, but they must not pile up.
    tokio::spawn(async move { while events.next().await.is_some() {} });
    let process = ProcessId::init(name);
    let request = ContainerRequest {
        id: name.to_owned(),
        spec_json: spec.to_string().into_bytes(),
        bundle: home.path().to_owned(),
        rootfs: vec![RootfsMount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec![
                format!("lowerdir={}", lower.display()),
                format!("upperdir={}", home.upper().display()),
                format!("workdir={}", home.work().display()),
            ],
        }],
        stdio,
    };
    let made = async {
        sandbox.create_container(request).await?;
        if let (true, Some((rows, columns))) = (plan.terminal, relay::window_size()) {
            sandbox.resize(&process, rows, columns).await?;
        }
        sandbox.start_process(&process).await
    };
    match made.await {
        Ok(_) => Ok((sandbox, process)),
        Err(error) => {
            sandbox.shutdown().await;
            Err(error.into())
        }
    }
}

/// A running container and what is needed to add processes to it.
struct Held {
    sandbox: Sandbox,
    process: ProcessId,
    lower: std::path::PathBuf,
    image: ImageConfig,
}

async fn serve(
    plan: &Plan,
    home: &mut Home,
    held: Held,
    running: impl FnOnce(&str),
) -> Result<Finished, Error> {
    let listener = home.prepare_socket().and_then(|path| Listener::bind(&path));
    let listening = async {
        let listener = listener?;
        home.record.pid = Some(held.sandbox.state(&held.process).await?.pid);
        home.save()?;
        Ok::<_, Error>(listener)
    };
    let listener = match listening.await {
        Ok(listener) => listener,
        Err(error) => {
            held.sandbox.shutdown().await;
            return Err(error);
        }
    };
    running(&home.record.name);
    let stages = match plan.timeline {
        Some(format) => Some(timeline::render(&held.sandbox.timeline().await?, format)),
        None => None,
    };
    let held = Rc::new(held);
    tokio::task::spawn_local(forward_signals(Rc::clone(&held), plan.terminal));
    let accepting = Rc::clone(&held);
    tokio::task::spawn_local(async move {
        let mut number = 0_u64;
        while let Ok(connection) = listener.accept().await {
            number += 1;
            let held = Rc::clone(&accepting);
            tokio::task::spawn_local(async move { answer(&held, connection, number).await });
        }
    });
    let exit = held.sandbox.wait(&held.process).await;
    // Waits until all output has been written.
    let _ = held.sandbox.delete(&held.process).await;
    held.sandbox.shutdown().await;
    let status = u8::try_from(exit?.status).unwrap_or(u8::MAX);
    Ok(Finished {
        status,
        timeline: stages,
    })
}

async fn forward_signals(held: Rc<Held>, terminal: bool) {
    let forward = async |number: i32| {
        let Ok(mut signals) = signal(SignalKind::from_raw(number)) else {
            return;
        };
        while signals.recv().await.is_some() {
            // A process that has just exited needs no signal.
            let _ = held
                .sandbox
                .signal(&held.process, number.unsigned_abs(), false)
                .await;
        }
    };
    let resize = async {
        let Ok(mut signals): io::Result<Signal> = signal(SignalKind::window_change()) else {
            return;
        };
        while terminal && signals.recv().await.is_some() {
            if let Some((rows, columns)) = relay::window_size() {
                let _ = held.sandbox.resize(&held.process, rows, columns).await;
            }
        }
    };
    let all = signals::FORWARDED.map(forward);
    futures::future::join(futures::future::join_all(all), resize).await;
}

async fn answer(held: &Held, connection: Connection, number: u64) {
    let Ok(Some((request, fds))) = connection.receive::<Request>().await else {
        return;
    };
    let result = match request {
        Request::Signal(signal) => held
            .sandbox
            .signal(&held.process, signal, false)
            .await
            .map(|()| Reply::Done)
            .map_err(Error::from),
        Request::Update(resources) => held
            .sandbox
            .update(&held.process.container_id, resources.to_string().as_bytes())
            .await
            .map(|()| Reply::Done)
            .map_err(Error::from),
        Request::Exec { .. } => exec(held, &connection, request, fds, number).await,
        Request::Resize(..) => return,
    };
    let reply = result.unwrap_or_else(|error| Reply::Failed {
        message: error.chain(),
        status: error.exit_status(),
    });
    // A caller that is gone does not hear it.
    let _ = connection.send(&reply, &[]).await;
}

async fn exec(
    held: &Held,
    connection: &Connection,
    request: Request,
    fds: Vec<OwnedFd>,
    number: u64,
) -> Result<Reply, Error> {
    let Request::Exec {
        command,
        environment,
        user,
        workdir,
        interactive,
        terminal,
    } = request
    else {
        return Ok(Reply::Done);
    };
    let user = passwd::resolve(&held.lower, user.as_deref().unwrap_or(&held.image.user))?;
    let options = ProcessOptions {
        command: &command,
        environment: &environment,
        workdir: workdir.as_deref(),
        terminal,
    };
    // The image's entry point is for the container's first process only.
    let image = ImageConfig {
        entrypoint: Vec::new(),
        ..held.image.clone()
    };
    let process_json = spec::process(&image, &options, &user)?;
    let mut fds = fds.into_iter().map(StdioTarget::Fd);
    let mut next = |wanted: bool| {
        if wanted {
            fds.next().unwrap_or(StdioTarget::Null)
        } else {
            StdioTarget::Null
        }
    };
    let stdio = Stdio {
        stdin: next(interactive),
        stdout: next(true),
        stderr: next(!terminal),
        terminal,
    };
    let process = ProcessId::exec(&held.process.container_id, &format!("exec-{number}"));
    let sandbox = &held.sandbox;
    sandbox
        .create_exec(ExecRequest {
            process: process.clone(),
            process_json: process_json.to_string().into_bytes(),
            stdio,
        })
        .await?;
    let run = async {
        sandbox.start_process(&process).await?;
        // A caller that is gone is noticed below.
        let _ = connection.send(&Reply::Started, &[]).await;
        let mut listening = true;
        let exit = loop {
            tokio::select! {
                exit = sandbox.wait(&process) => break exit?,
                message = connection.receive::<Request>(), if listening => match message {
                    Ok(Some((Request::Signal(signal), _))) => {
                        let _ = sandbox.signal(&process, signal, false).await;
                    }
                    Ok(Some((Request::Resize(rows, columns), _))) => {
                        let _ = sandbox.resize(&process, rows, columns).await;
                    }
                    Ok(Some(_)) => {}
                    // Nobody is left to hear from the process.
                    Ok(None) | Err(_) => {
                        listening = false;
                        let _ = sandbox.signal(&process, libc::SIGKILL.unsigned_abs(), false).await;
                    }
                },
            }
        };
        Ok(Reply::Exited(u8::try_from(exit.status).unwrap_or(u8::MAX)))
    };
    let result = run.await;
    // Waits for the output; a start that failed is removed as well.
    let _ = sandbox.delete(&process).await;
    result
}

impl TimelineFormat {
    /// Whether programs read it.
    pub fn is_json(self) -> bool {
        self == Self::Json
    }
}
