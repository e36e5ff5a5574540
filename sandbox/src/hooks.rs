//! Hooks of the OCI runtime specification (config.md, "POSIX-platform Hooks"): programs that the caller wants to be
//! run on the host at certain points of a container's life.
//!
//! `createContainer` hooks run in the pod's network namespace on the host, which is as near to the container's
//! namespaces as the host comes. `startContainer` hooks would have to run in the guest and are refused.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::{Hook, Spec};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal};
use serde::Serialize;
use tokio::process::Command;

use crate::error::{ErrorKind, kind_of_io};

/// How much of a failed hook's output an error quotes: the end of it.
const QUOTED_BYTES: u64 = 1024;

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `prestart`, the deprecated form of `createRuntime`.
    Prestart,
    /// `createRuntime`: the container's namespaces exist, nothing of it runs.
    CreateRuntime,
    /// `createContainer`.
    CreateContainer,
    /// `startContainer`.
    StartContainer,
    /// `poststart`: its process was started.
    Poststart,
    /// `poststop`: it was deleted.
    Poststop,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        })
    }
}

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// A hook that would run in the guest.
    #[error(
        "the startContainer hook {0} is not supported: it would run inside the virtual machine: use createRuntime"
    )]
    InGuest(PathBuf),
    /// A hook that is malformed.
    #[error("the {stage} hook {path:?} is not valid: {reason}")]
    Invalid {
        /// When it would run.
        stage: Stage,
        /// Its program.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// A hook that could not be run.
    #[error("the {stage} hook {path} cannot be run: {cause}")]
    Run {
        /// When.
        stage: Stage,
        /// Its program.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// A hook that failed.
    #[error("the {stage} hook {path} failed: {status}{}", quoted(.output))]
    Failed {
        /// When.
        stage: Stage,
        /// Its program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote.
        output: String,
    },
    /// A hook that took longer than it may.
    #[error("the {stage} hook {path} was killed: it took longer than its timeout of {seconds} s{}", quoted(.output))]
    Timeout {
        /// When.
        stage: Stage,
        /// Its program.
        path: PathBuf,
        /// Its timeout.
        seconds: u64,
        /// The end of what it wrote.
        output: String,
    },
}

fn quoted(output: &str) -> String {
    if output.is_empty() {
        String::new()
    } else {
        format!(": {output}")
    }
}

impl HookError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InGuest(_) => ErrorKind::Unimplemented,
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::Run { cause, .. } => kind_of_io(cause),
            Self::Failed { .. } | Self::Timeout { .. } => ErrorKind::FailedPrecondition,
        }
    }
}

impl From<HookError> for crate::Error {
    fn from(error: HookError) -> Self {
        Self::Other {
            kind: error.kind(),
            message: crate::error::chain(&error),
        }
    }
}

/// A container's state as hooks read it from standard input (runtime.md, "State").
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    /// `creating`, `running` or `stopped`.
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    bundle: &'a Path,
    annotations: &'a HashMap<String, String>,
}

/// A container's hooks, and what they are told of it. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Hooks(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    hooks: Vec<(Stage, Hook)>,
    oci_version: String,
    id: String,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
}

impl Hooks {
    /// Reads and checks the hooks in the specification of the container `id`.
    ///
    /// # Errors
    /// [`HookError::InGuest`] and [`HookError::Invalid`].
    pub fn of(spec: &Spec, id: &str, bundle: &Path) -> Result<Self, HookError> {
        let Some(hooks) = spec.hooks() else {
            return Ok(Self::default());
        };
        #[allow(deprecated, reason = "Docker and nerdctl still use it")]
        let prestart = hooks.prestart();
        let lists = [
            (Stage::Prestart, prestart),
            (Stage::CreateRuntime, hooks.create_runtime()),
            (Stage::CreateContainer, hooks.create_container()),
            (Stage::StartContainer, hooks.start_container()),
            (Stage::Poststart, hooks.poststart()),
            (Stage::Poststop, hooks.poststop()),
        ];
        let mut all = Vec::new();
        for (stage, list) in lists {
            for hook in list.iter().flatten() {
                check(stage, hook)?;
                all.push((stage, hook.clone()));
            }
        }
        if all.is_empty() {
            return Ok(Self::default());
        }
        Ok(Self(Some(Arc::new(Inner {
            hooks: all,
            oci_version: spec.version().clone(),
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            annotations: spec.annotations().clone().unwrap_or_default(),
        }))))
    }

    /// Runs the `prestart`, `createRuntime` and `createContainer` hooks, in this order, the last in the network
    /// namespace of `pid`, the host process that stands for the container.
    ///
    /// # Errors
    /// [`HookError`] of the first that fails; the rest does not run, and the container must not be made.
    pub async fn before_start(&self, pid: u32) -> Result<(), HookError> {
        for stage in [Stage::Prestart, Stage::CreateRuntime, Stage::CreateContainer] {
            for (hook, inner) in self.of_stage(stage) {
                inner.run(stage, hook, Some(pid)).await?;
            }
        }
        Ok(())
    }

    /// Runs the `poststart` hooks. What fails is logged.
    pub async fn poststart(&self, pid: u32) {
        self.run_all(Stage::Poststart, Some(pid)).await;
    }

    /// Runs the `poststop` hooks. What fails is logged.
    pub async fn poststop(&self) {
        self.run_all(Stage::Poststop, None).await;
    }

    async fn run_all(&self, stage: Stage, pid: Option<u32>) {
        for (hook, inner) in self.of_stage(stage) {
            if let Err(error) = inner.run(stage, hook, pid).await {
                tracing::warn!(container = inner.id, error = %crate::error::chain(&error), "a hook failed");
            }
        }
    }

    fn of_stage(&self, stage: Stage) -> impl Iterator<Item = (&Hook, &Inner)> {
        let inner = self.0.as_deref();
        let all = inner
            .into_iter()
            .flat_map(|inner| inner.hooks.iter().map(move |(of, hook)| (*of, hook, inner)));
        all.filter(move |(of, ..)| *of == stage)
            .map(|(_, hook, inner)| (hook, inner))
    }
}

fn check(stage: Stage, hook: &Hook) -> Result<(), HookError> {
    let path = hook.path();
    if stage == Stage::StartContainer {
        return Err(HookError::InGuest(path.clone()));
    }
    let reason = if !path.is_absolute() {
        "its path must be absolute"
    } else if hook.timeout().is_some_and(|seconds| seconds <= 0) {
        "its timeout must be greater than 0"
    } else if hook
        .env()
        .iter()
        .flatten()
        .any(|variable| !variable.contains('='))
    {
        "its environment must hold entries of the form NAME=value"
    } else {
        return Ok(());
    };
    Err(HookError::Invalid {
        stage,
        path: path.clone(),
        reason,
    })
}

impl Inner {
    async fn run(&self, stage: Stage, hook: &Hook, pid: Option<u32>) -> Result<(), HookError> {
        let path = hook.path();
        let failed = |cause| HookError::Run {
            stage,
            path: path.clone(),
            cause,
        };
        let (mut command, output) = self.prepare(stage, hook, pid).map_err(failed)?;
        let mut child = command.spawn().map_err(failed)?;
        let seconds = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
        let ended = match seconds {
            Some(seconds) => tokio::time::timeout(Duration::from_secs(seconds), child.wait()).await,
            None => Ok(child.wait().await),
        };
        match ended {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(HookError::Failed {
                stage,
                path: path.clone(),
                status,
                output: end_of(output),
            }),
            Ok(Err(cause)) => Err(failed(cause)),
            Err(_elapsed) => {
                // With all it has started: it leads a process group. It is not reaped yet, so the number is its own.
                let group = child
                    .id()
                    .and_then(|pid| i32::try_from(pid).ok())
                    .and_then(Pid::from_raw);
                if let Some(group) = group {
                    let _ = rustix::process::kill_process_group(group, Signal::KILL);
                }
                let _ = child.wait().await;
                Err(HookError::Timeout {
                    stage,
                    path: path.clone(),
                    seconds: seconds.unwrap_or_default(),
                    output: end_of(output),
                })
            }
        }
    }

    /// The command, and the file that its output goes to. Files in memory instead of pipes: nobody has to read or
    /// write while it runs, and what it leaves running in the background keeps nobody waiting.
    fn prepare(&self, stage: Stage, hook: &Hook, pid: Option<u32>) -> io::Result<(Command, File)> {
        let state = State {
            oci_version: &self.oci_version,
            id: &self.id,
            status: match stage {
                Stage::Poststart => "running",
                Stage::Poststop => "stopped",
                _ => "creating",
            },
            pid,
            bundle: &self.bundle,
            annotations: &self.annotations,
        };
        let mut input = memory("state")?;
        input.write_all(&serde_json::to_vec(&state)?)?;
        input.seek(SeekFrom::Start(0))?;
        let output = memory("output")?;
        let mut command = Command::new(hook.path());
        let args = hook.args().as_deref().unwrap_or_default();
        if let Some((name, rest)) = args.split_first() {
            command.arg0(name).args(rest);
        }
        let variables = hook
            .env()
            .iter()
            .flatten()
            .filter_map(|variable| variable.split_once('='));
        command
            .env_clear()
            .envs(variables)
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output.try_clone()?))
            .stderr(Stdio::from(output.try_clone()?))
            .process_group(0)
            .kill_on_drop(true);
        if self.bundle.is_dir() {
            command.current_dir(&self.bundle);
        }
        if let (Stage::CreateContainer, Some(pid)) = (stage, pid) {
            let netns = File::open(format!("/proc/{pid}/ns/net"))?;
            let enter = move || {
                // SAFETY: setns(2) on a descriptor that the closure owns; it is async-signal-safe.
                match unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) } {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            };
            // SAFETY: the closure makes one system call; it neither allocates nor takes a lock.
            unsafe { command.pre_exec(enter) };
        }
        Ok((command, output))
    }
}

fn memory(name: &str) -> io::Result<File> {
    Ok(File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?))
}

/// The end of a file as one line.
fn end_of(mut file: File) -> String {
    let mut bytes = Vec::new();
    let read = file
        .metadata()
        .and_then(|metadata| file.seek(SeekFrom::Start(metadata.len().saturating_sub(QUOTED_BYTES))))
        .and_then(|_| file.take(QUOTED_BYTES).read_to_end(&mut bytes));
    if read.is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Directory(tempfile::TempDir);

    impl Directory {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        /// A hook that runs this script.
        fn hook(&self, name: &str, script: &str) -> String {
            self.hook_with(name, script, "", "")
        }

        fn hook_with(&self, name: &str, script: &str, args: &str, members: &str) -> String {
            let path = self.0.path().join(name);
            std::fs::write(&path, script).unwrap();
            format!(
                r#"{{"path":"/bin/sh","args":["sh","{}"{args}]{members}}}"#,
                path.display()
            )
        }

        fn text(&self, name: &str) -> String {
            std::fs::read_to_string(self.0.path().join(name)).unwrap_or_default()
        }

        fn hooks(&self, json: &str) -> Result<Hooks, HookError> {
            let spec =
                format!(r#"{{"ociVersion":"1.2.0","annotations":{{"key":"value"}},"hooks":{{{json}}}}}"#);
            Hooks::of(&serde_json::from_str(&spec).unwrap(), "c1", self.0.path())
        }
    }

    #[tokio::test]
    async fn a_hook_gets_the_state_its_arguments_and_only_its_environment() {
        let dir = Directory::new();
        let hook = dir.hook_with(
            "hook",
            "cat > state; echo \"$@\" > args; tr '\\0' '\\n' < /proc/$$/environ > env; pwd > cwd",
            r#","one","two words""#,
            r#","env":["A=1","B=x=y"]"#,
        );
        let hooks = dir.hooks(&format!(r#""createRuntime":[{hook}]"#)).unwrap();
        hooks.before_start(7).await.unwrap();
        let state: serde_json::Value = serde_json::from_str(&dir.text("state")).unwrap();
        let expected = serde_json::json!({
            "ociVersion": "1.2.0", "id": "c1", "status": "creating", "pid": 7,
            "bundle": dir.0.path(), "annotations": {"key": "value"},
        });
        assert_eq!(state, expected);
        assert_eq!(dir.text("args"), "one two words\n");
        assert_eq!(dir.text("env"), "A=1\nB=x=y\n");
        assert_eq!(dir.text("cwd").trim(), dir.0.path().to_str().unwrap());
    }

    #[tokio::test]
    async fn hooks_run_in_order_and_a_failure_ends_them() {
        let dir = Directory::new();
        let log = |name: &str, more: &str| dir.hook(name, &format!("echo {name} >> log; {more}"));
        let hooks = dir
            .hooks(&format!(
                r#""createContainer":[{}],"createRuntime":[{},{}],"prestart":[{}],"poststart":[{}]"#,
                log("never", ""),
                log("first", ""),
                log("fails", "echo to stdout; echo to stderr >&2; exit 3"),
                log("prestart", ""),
                log("poststart", ""),
            ))
            .unwrap();
        let error = hooks.before_start(7).await.unwrap_err().to_string();
        assert_eq!(dir.text("log"), "prestart\nfirst\nfails\n");
        assert!(
            error.contains("createRuntime hook") && error.contains("exit status: 3"),
            "{error}"
        );
        assert!(error.ends_with("to stdout; to stderr"), "{error}");
    }

    #[tokio::test]
    async fn what_fails_afterwards_does_not_stop_the_others() {
        let dir = Directory::new();
        let fails = dir.hook("fails", "exit 1");
        let runs = dir.hook("runs", "cat >> log; echo >> log");
        let hooks = dir
            .hooks(&format!(
                r#""poststart":[{fails},{runs}],"poststop":[{fails},{runs}]"#
            ))
            .unwrap();
        hooks.poststart(7).await;
        assert!(dir.text("log").contains(r#""status":"running","pid":7"#));
        hooks.poststop().await;
        assert!(dir.text("log").contains(r#""status":"stopped","bundle""#));
    }

    #[tokio::test]
    async fn a_hook_that_takes_too_long_is_killed_with_its_children() {
        let dir = Directory::new();
        let script = "echo started; sleep 1000 & echo $! > child; wait";
        let hook = dir.hook_with("hook", script, "", r#","timeout":1"#);
        let hooks = dir.hooks(&format!(r#""createRuntime":[{hook}]"#)).unwrap();
        let error = hooks.before_start(7).await.unwrap_err().to_string();
        assert!(
            error.contains("longer than its timeout of 1 s: started"),
            "{error}"
        );
        let child = dir.text("child");
        // Whoever adopts it may take a while to reap it.
        while let Ok(stat) = std::fs::read_to_string(format!("/proc/{}/stat", child.trim())) {
            let state = stat.rsplit(") ").next().and_then(|fields| fields.chars().next());
            if matches!(state, Some('Z' | 'X')) {
                break;
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_a_hook_leaves_running_keeps_nobody_waiting() {
        let dir = Directory::new();
        let hook = dir.hook("hook", "sleep 1000 & echo $! > child");
        let hooks = dir.hooks(&format!(r#""createRuntime":[{hook}]"#)).unwrap();
        tokio::time::timeout(Duration::from_secs(60), hooks.before_start(7))
            .await
            .unwrap()
            .unwrap();
        let child = dir
            .text("child")
            .trim()
            .parse()
            .ok()
            .and_then(Pid::from_raw)
            .unwrap();
        rustix::process::kill_process(child, Signal::KILL).unwrap();
    }

    #[tokio::test]
    async fn create_container_hooks_run_in_the_network_namespace() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root may make a network namespace");
            return;
        }
        let dir = Directory::new();
        let mut other = std::process::Command::new("unshare")
            .args(["-n", "sleep", "1000"])
            .spawn()
            .unwrap();
        let here = std::fs::read_link("/proc/self/ns/net").unwrap();
        let there = loop {
            let there = std::fs::read_link(format!("/proc/{}/ns/net", other.id())).unwrap();
            if there != here {
                break there;
            }
            tokio::task::yield_now().await;
        };
        let hook = |name: &str| dir.hook(name, &format!("readlink /proc/self/ns/net > {name}.ns"));
        let hooks = dir
            .hooks(&format!(
                r#""createRuntime":[{}],"createContainer":[{}]"#,
                hook("runtime"),
                hook("container")
            ))
            .unwrap();
        hooks.before_start(other.id()).await.unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(dir.text("runtime.ns").trim(), here.to_str().unwrap());
        assert_eq!(dir.text("container.ns").trim(), there.to_str().unwrap());
    }

    #[tokio::test]
    async fn what_cannot_be_run_is_named() {
        let dir = Directory::new();
        let of = |json: &str| dir.hooks(json).unwrap_err().to_string();
        assert!(
            of(r#""startContainer":[{"path":"/sbin/ldconfig"}]"#).contains("/sbin/ldconfig is not supported")
        );
        assert!(
            of(r#""prestart":[{"path":"relative"}]"#).contains("prestart hook \"relative\" is not valid")
        );
        assert!(of(r#""poststop":[{"path":"/x","timeout":0}]"#).contains("greater than 0"));
        assert!(of(r#""poststop":[{"path":"/x","env":["A"]}]"#).contains("NAME=value"));
        let missing = dir
            .hooks(r#""createRuntime":[{"path":"/nonexistent/hook"}]"#)
            .unwrap();
        let error = missing.before_start(7).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/hook cannot be run"), "{error}");
    }
}
