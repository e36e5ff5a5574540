//! `run`: prepares a container from the command line, and holds it or starts a process that does.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio as ProcessStdio};

use serde::{Deserialize, Serialize};

use crate::arguments::{RunOptions, TimelineFormat, Volume};
use crate::block_on;
use crate::error::Error;
use crate::image::{self, ImageConfig};
use crate::passwd;
use crate::relay::Relay;
use crate::spec::{self, Limits, ProcessOptions};
use crate::store::{Home, Store};
use crate::supervise;

/// A container as it shall be, ready to be held.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    pub name: Option<String>,
    pub image: std::path::PathBuf,
    pub command: Vec<String>,
    pub environment: Vec<String>,
    pub user: Option<String>,
    pub workdir: Option<String>,
    pub cpus: Option<f64>,
    pub memory: Option<u64>,
    pub volumes: Vec<Volume>,
    pub terminal: bool,
    pub remove: bool,
    pub config: Option<std::path::PathBuf>,
    pub timeline: Option<TimelineFormat>,
}

/// A container whose image is unpacked and whose directory is made.
pub struct Prepared {
    pub home: Home,
    /// The image's root file system.
    pub lower: std::path::PathBuf,
    /// What the image says, for processes added later.
    pub image: ImageConfig,
    pub spec: serde_json::Value,
}

/// Runs a container and returns its exit status, or 0 once it runs detached.
pub fn run(store: &Store, options: RunOptions) -> Result<u8, Error> {
    let (interactive, detach) = (options.interactive, options.detach);
    let current = std::env::current_dir().map_err(Error::host("cannot find the current directory"))?;
    let plan = Plan {
        name: options.name,
        image: current.join(options.image),
        command: options.command,
        // Resolved here: a detached holder has another environment.
        environment: options.environment.into_iter().filter_map(with_value).collect(),
        user: options.user,
        workdir: options.workdir,
        cpus: options.cpus,
        memory: options.memory,
        volumes: options.volumes,
        terminal: options.tty,
        remove: options.rm,
        config: options.config.map(|path| current.join(path)),
        timeline: options.timeline,
    };
    if detach {
        return start_holder(store, &plan);
    }
    let prepared = prepare(store, &plan)?;
    let (relay, stdio) = match Relay::start(interactive, plan.terminal) {
        Ok(started) => started,
        Err(error) => {
            prepared.home.remove();
            return Err(error);
        }
    };
    let result = block_on(supervise::hold(&plan, prepared, stdio, |_| {}));
    relay.finish();
    let finished = result?;
    if let Some(timeline) = finished.timeline {
        eprint!("{timeline}");
    }
    Ok(finished.status)
}

fn with_value(setting: String) -> Option<String> {
    if setting.contains('=') {
        return Some(setting);
    }
    std::env::var(&setting)
        .ok()
        .map(|value| format!("{setting}={value}"))
}

/// Unpacks the image, takes the name and writes the specification.
pub fn prepare(store: &Store, plan: &Plan) -> Result<Prepared, Error> {
    let image = image::open(&plan.image, &store.images())?;
    let user = plan.user.as_deref().unwrap_or(&image.config.user);
    let user = passwd::resolve(&image.rootfs, user)?;
    let options = ProcessOptions {
        command: &plan.command,
        environment: &plan.environment,
        workdir: plan.workdir.as_deref(),
        terminal: plan.terminal,
    };
    let process = spec::process(&image.config, &options, &user)?;
    let command: Vec<String> = serde_json::from_value(process["args"].clone()).unwrap_or_default();
    let home = store.create(plan.name.clone(), &plan.image, &command)?;
    let limits = Limits {
        cpus: plan.cpus,
        memory: plan.memory,
        volumes: &plan.volumes,
    };
    let spec = spec::container(&home.record.name, &process, &limits);
    Ok(Prepared {
        home,
        lower: image.rootfs,
        image: image.config,
        spec,
    })
}

/// Starts `kata-rs supervise` and waits until the container runs or has failed.
fn start_holder(store: &Store, plan: &Plan) -> Result<u8, Error> {
    let program = std::env::current_exe().map_err(Error::host("cannot find this program"))?;
    let mut holder = Command::new(program)
        .arg("--root")
        .arg(store.root())
        .arg("supervise")
        .stdin(ProcessStdio::piped())
        .stdout(ProcessStdio::piped())
        .spawn()
        .map_err(Error::host("cannot start the process that holds the container"))?;
    let text = serde_json::to_vec(plan)
        .map_err(|error| Error::host("cannot describe the container")(error.into()))?;
    if let Some(mut stdin) = holder.stdin.take() {
        // A holder that died already has said why on standard error, or closes its output below.
        let _ = stdin.write_all(&text);
    }
    let mut name = String::new();
    if let Some(stdout) = holder.stdout.take() {
        BufReader::new(stdout)
            .read_line(&mut name)
            .map_err(Error::host("cannot hear from the container's holder"))?;
    }
    if name.is_empty() {
        // It has printed its error; its status is ours.
        let status = holder
            .wait()
            .map_err(Error::host("cannot wait for the container's holder"))?;
        return Ok(status.code().and_then(|code| code.try_into().ok()).unwrap_or(125));
    }
    print!("{name}");
    Ok(0)
}
