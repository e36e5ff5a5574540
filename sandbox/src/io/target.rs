//! Opening the host's ends of standard I/O, whatever their callers named.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::end::{Sink, Source};
use super::error::IoError;
use super::fifo;
use super::logger::Logger;
use super::uri::Address;
use crate::api::{Stdio, StdioTarget};

/// The opened ends. Absent ones are /dev/null for the process.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub stdin: Option<Input>,
    pub stdout: Option<Sink>,
    pub stderr: Option<Sink>,
    pub logger: Option<Logger>,
}

/// Where input comes from.
#[derive(Debug)]
pub(super) enum Input {
    Open(Source),
    /// A fifo, to be opened when the process starts.
    Fifo(PathBuf),
}

/// A target, its address read.
enum Target {
    Null,
    Fd(OwnedFd),
    Address(Address),
}

impl Target {
    fn read(target: StdioTarget) -> Result<Self, IoError> {
        Ok(match target {
            StdioTarget::Null => Self::Null,
            StdioTarget::Uri(uri) if uri.is_empty() => Self::Null,
            StdioTarget::Uri(uri) => Self::Address(Address::parse(&uri)?),
            StdioTarget::Fd(fd) => Self::Fd(fd),
        })
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Self::Address(Address::File(path)) => Some(path),
            _ => None,
        }
    }
}

/// Opens everything. `container` and `namespace` are told to a log program.
pub(super) async fn open(stdio: Stdio, container: &str, namespace: &str) -> Result<Ends, IoError> {
    let mut ends = Ends {
        stdin: open_input(stdio.stdin)?,
        ..Ends::default()
    };
    let stdout = Target::read(stdio.stdout)?;
    let stderr = if stdio.terminal {
        Target::Null
    } else {
        Target::read(stdio.stderr)?
    };
    let program = [&stdout, &stderr].into_iter().find_map(|target| match target {
        Target::Address(Address::Program {
            path,
            args,
            ready_byte,
        }) => Some((path.clone(), args, *ready_byte)),
        _ => None,
    });
    if let Some((path, args, ready_byte)) = program {
        // One program takes both outputs.
        let (logger, out, err) = Logger::start(path, args, ready_byte, container, namespace).await?;
        ends.logger = Some(logger);
        ends.stdout = (!matches!(stdout, Target::Null)).then_some(out);
        ends.stderr = (!matches!(stderr, Target::Null)).then_some(err);
        return Ok(ends);
    }
    let same_file = stdout.path().is_some() && stdout.path() == stderr.path();
    ends.stdout = open_output(stdout).await?;
    ends.stderr = match &ends.stdout {
        Some(Sink::File(file)) if same_file => Some(Sink::File(Arc::clone(file))),
        _ => open_output(stderr).await?,
    };
    Ok(ends)
}

fn open_input(target: StdioTarget) -> Result<Option<Input>, IoError> {
    let text = match &target {
        StdioTarget::Uri(uri) => uri.clone(),
        StdioTarget::Null | StdioTarget::Fd(_) => String::new(),
    };
    match Target::read(target)? {
        Target::Null => Ok(None),
        Target::Fd(fd) => {
            let source = Source::of_descriptor(fd).map_err(IoError::system("reading standard input"))?;
            Ok(Some(Input::Open(source)))
        }
        Target::Address(Address::Path(path)) if is_fifo(&path)? => Ok(Some(Input::Fifo(path))),
        Target::Address(Address::Path(path)) => File::open(&path)
            .and_then(|file| Source::of_descriptor(file.into()))
            .map(|source| Some(Input::Open(source)))
            .map_err(|cause| opening("standard input", path, cause)),
        Target::Address(Address::File(_) | Address::Program { .. }) => Err(IoError::NotInput(text)),
    }
}

async fn open_output(target: Target) -> Result<Option<Sink>, IoError> {
    match target {
        Target::Null => Ok(None),
        Target::Fd(fd) => Sink::of_descriptor(fd)
            .map(Some)
            .map_err(IoError::system("writing standard output")),
        Target::Address(Address::Path(path)) if is_fifo(&path)? => fifo::sink(&path)
            .map(Some)
            .map_err(|cause| opening("the fifo", path, cause)),
        // A terminal or /dev/null that a caller named by its path, or a file.
        Target::Address(Address::Path(path)) => {
            let file = append(&path, false).await;
            let sink = file.and_then(|file| Sink::of_descriptor(file.into()));
            sink.map(Some).map_err(|cause| opening("the output", path, cause))
        }
        Target::Address(Address::File(path)) => match append(&path, true).await {
            Ok(file) => Ok(Some(Sink::File(Arc::new(file)))),
            Err(cause) => Err(opening("the log file", path, cause)),
        },
        Target::Address(Address::Program { path, .. }) => {
            unreachable!("{} takes both outputs and has been started", path.display())
        }
    }
}

/// Opens a file to append to; makes it and the directories above it when asked to. File systems wait for disks.
async fn append(path: &Path, create: bool) -> io::Result<File> {
    let path = path.to_owned();
    let open = move || {
        if create && let Some(directory) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        }
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        File::options()
            .append(true)
            .create(create)
            .mode(0o644)
            .custom_flags(flags)
            .open(path)
    };
    tokio::task::spawn_blocking(open)
        .await
        .map_err(io::Error::other)?
}

fn is_fifo(path: &Path) -> Result<bool, IoError> {
    let metadata = std::fs::metadata(path)
        .map_err(|cause| opening("the standard I/O target", path.to_owned(), cause))?;
    Ok(metadata.file_type().is_fifo())
}

pub(super) fn opening(what: &'static str, path: PathBuf, cause: io::Error) -> IoError {
    IoError::Open { what, path, cause }
}
