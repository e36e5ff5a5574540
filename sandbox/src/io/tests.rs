//! Real fifos, files, programs and sockets; the guest's agent is the other end of a socket pair.

mod logger;

use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::api::StdioTarget;

struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn fifo(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        rustix::fs::mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        path
    }

    /// The address of a log program: the shell, with a script and arguments as its own.
    fn logger(&self, scheme: &str, script: &str, args: &str) -> StdioTarget {
        let path = self.path("logger");
        std::fs::write(&path, script).unwrap();
        StdioTarget::Uri(format!("{scheme}:///bin/sh?{}{args}", path.display()))
    }
}

fn uri(path: &Path) -> StdioTarget {
    StdioTarget::Uri(path.to_str().unwrap().to_owned())
}

fn address(scheme: &str, path: &Path) -> StdioTarget {
    StdioTarget::Uri(format!("{scheme}://{}", path.display()))
}

/// Opens the ends, as for a process that starts.
async fn open(stdio: Stdio) -> Io {
    let io = Io::open(stdio, "c1", "ns1").await.unwrap();
    io.begin_input().unwrap();
    io
}

/// The guest's end of a stream.
fn stream(io: &Io, token: u64) -> UnixStream {
    assert_ne!(token, 0);
    let (host, guest) = UnixStream::pair().unwrap();
    io.attach(token, host);
    guest
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future)
        .await
        .expect("it takes too long")
}

async fn write_to(fifo: &Path, text: &'static str) {
    let fifo = fifo.to_owned();
    let write = move || {
        let mut fifo = OpenOptions::new().write(true).open(fifo).unwrap();
        fifo.write_all(text.as_bytes()).unwrap();
    };
    blocking(write).await;
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// `length` bytes that do not repeat soon, in chunks, and their hash.
fn generate(length: usize, mut take: impl FnMut(&[u8])) -> u64 {
    let mut hasher = DefaultHasher::new();
    let (mut state, mut left, mut chunk) = (1u64, length, vec![0; 100_000]);
    while left > 0 {
        for word in chunk.chunks_exact_mut(8) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
        let part = &chunk[..chunk.len().min(left)];
        hasher.write(part);
        take(part);
        left -= part.len();
    }
    hasher.finish()
}

#[tokio::test]
async fn a_hundred_megabytes_pass_through_fifos_both_ways_unchanged() {
    const LENGTH: usize = 100_000_000;
    let dir = Directory::new();
    let (stdin, stdout) = (dir.fifo("in"), dir.fifo("out"));
    let io = open(Stdio {
        stdin: uri(&stdin),
        stdout: address("fifo", &stdout),
        ..Stdio::null()
    })
    .await;
    assert_eq!(io.token_list().len(), 2);
    assert_eq!(io.tokens().stderr_token, 0);

    let writer = std::thread::spawn(move || {
        let mut fifo = OpenOptions::new().write(true).open(stdin).unwrap();
        generate(LENGTH, |part| fifo.write_all(part).unwrap())
    });
    let reader = std::thread::spawn(move || {
        let mut fifo = File::open(stdout).unwrap();
        let (mut hasher, mut total, mut buffer) = (DefaultHasher::new(), 0, vec![0; 100_000]);
        while total < LENGTH {
            // The hash depends on how the bytes are cut: by 100,000, as they were written.
            let part = &mut buffer[..100_000.min(LENGTH - total)];
            fifo.read_exact(part).unwrap();
            hasher.write(part);
            total += part.len();
        }
        assert_eq!(fifo.read(&mut buffer).unwrap(), 0, "more than was written");
        hasher.finish()
    });
    let mut guest_in = stream(&io, io.tokens().stdin_token);
    let mut guest_out = stream(&io, io.tokens().stdout_token);
    let echo = async {
        tokio::io::copy(&mut guest_in, &mut guest_out).await.unwrap();
        drop(guest_out);
    };
    let close = async {
        let written = blocking(move || writer.join().unwrap()).await;
        io.close_stdin();
        written
    };
    let ((), written) = in_time(async { tokio::join!(echo, close) }).await;
    in_time(io.drained()).await;
    assert_eq!(blocking(move || reader.join().unwrap()).await, written);
}

#[tokio::test]
async fn input_outlives_its_writers_and_ends_when_it_is_closed() {
    let dir = Directory::new();
    let stdin = dir.fifo("in");
    let io = open(Stdio {
        stdin: uri(&stdin),
        ..Stdio::null()
    })
    .await;
    let mut guest = stream(&io, io.tokens().stdin_token);
    let write = |text| write_to(&stdin, text);
    let mut buffer = [0; 3];
    write("one").await;
    in_time(guest.read_exact(&mut buffer)).await.unwrap();
    write("two").await;
    in_time(guest.read_exact(&mut buffer)).await.unwrap();
    assert_eq!(&buffer, b"two");
    write("end").await;
    io.close_stdin();
    io.close_stdin();
    let mut rest = String::new();
    in_time(guest.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "end");
}

#[tokio::test]
async fn a_fifo_for_input_is_opened_when_the_process_starts() {
    let dir = Directory::new();
    let stdin = dir.fifo("in");
    let io = Io::open(
        Stdio {
            stdin: uri(&stdin),
            ..Stdio::null()
        },
        "c1",
        "ns1",
    )
    .await
    .unwrap();
    let mut guest = stream(&io, io.tokens().stdin_token);
    let writer = || {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK;
        rustix::fs::openat(CWD, &stdin, flags, Mode::empty())
    };
    assert_eq!(
        writer().unwrap_err(),
        rustix::io::Errno::NXIO,
        "somebody reads already"
    );
    io.begin_input().unwrap();
    io.begin_input().unwrap();
    rustix::io::write(writer().unwrap(), b"sent").unwrap();
    io.close_stdin();
    let mut text = String::new();
    in_time(guest.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "sent");
}

#[tokio::test]
async fn input_closed_before_the_start_ends_with_what_others_write() {
    let dir = Directory::new();
    let stdin = dir.fifo("in");
    let stdio = Stdio {
        stdin: uri(&stdin),
        ..Stdio::null()
    };
    let io = Io::open(stdio, "c1", "ns1").await.unwrap();
    let mut guest = stream(&io, io.tokens().stdin_token);
    io.close_stdin();
    io.begin_input().unwrap();
    let mut text = String::new();
    in_time(guest.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "");
}

#[tokio::test]
async fn input_closed_before_the_guest_asks_for_it_is_not_lost() {
    let dir = Directory::new();
    let stdin = dir.fifo("in");
    let io = open(Stdio {
        stdin: uri(&stdin),
        ..Stdio::null()
    })
    .await;
    write_to(&stdin, "early").await;
    io.close_stdin();
    let mut guest = stream(&io, io.tokens().stdin_token);
    let mut text = String::new();
    in_time(guest.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "early");
}

#[tokio::test]
async fn a_reader_may_go_away_and_another_go_on() {
    let dir = Directory::new();
    let stdout = dir.fifo("out");
    // Nobody reads yet: opening must not wait.
    let io = in_time(open(Stdio {
        stdout: uri(&stdout),
        ..Stdio::null()
    }))
    .await;
    let mut guest = stream(&io, io.tokens().stdout_token);
    let read = || {
        let stdout = stdout.clone();
        blocking(move || {
            let mut buffer = [0; 3];
            File::open(stdout).unwrap().read_exact(&mut buffer).unwrap();
            buffer
        })
    };
    guest.write_all(b"one").await.unwrap();
    assert_eq!(&in_time(read()).await, b"one");
    guest.write_all(b"two").await.unwrap();
    assert_eq!(&in_time(read()).await, b"two");
}

#[tokio::test]
async fn a_slow_reader_makes_the_guest_wait() {
    let dir = Directory::new();
    let stdout = dir.fifo("out");
    let io = open(Stdio {
        stdout: uri(&stdout),
        ..Stdio::null()
    })
    .await;
    let guest = stream(&io, io.tokens().stdout_token);
    let mut taken = 0;
    // It ends with the timeout: when nothing more is taken for a while.
    while let Ok(ready) = tokio::time::timeout(Duration::from_millis(300), guest.writable()).await {
        ready.unwrap();
        taken += guest.try_write(&[b'x'; 65536]).unwrap_or(0);
        assert!(taken < 2 << 20, "memory grows");
    }
    drop(guest);
    let read = blocking(move || {
        let mut file = File::open(stdout).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    assert_eq!(in_time(read).await, taken, "bytes are lost");
    in_time(io.drained()).await;
}

#[tokio::test]
async fn both_outputs_are_appended_to_one_file() {
    let dir = Directory::new();
    let file = dir.path("logs/of/c1.log");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "before\n").unwrap();
    let io = open(Stdio {
        stdout: address("file", &file),
        stderr: address("file", &file),
        ..Stdio::null()
    })
    .await;
    let mut out = stream(&io, io.tokens().stdout_token);
    let mut err = stream(&io, io.tokens().stderr_token);
    out.write_all(b"from stdout\n").await.unwrap();
    drop(out);
    err.write_all(b"from stderr\n").await.unwrap();
    drop(err);
    in_time(io.drained()).await;
    let text = std::fs::read_to_string(&file).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    lines[1..].sort_unstable();
    assert_eq!(lines, ["before", "from stderr", "from stdout"]);
    let made = dir.path("new/file.log");
    open(Stdio {
        stdout: address("file", &made),
        ..Stdio::null()
    })
    .await;
    assert_eq!(
        std::fs::metadata(made).unwrap().permissions().mode() & 0o777,
        0o644
    );
}

#[tokio::test]
async fn a_terminal_is_one_stream_both_ways() {
    let dir = Directory::new();
    let (stdin, stdout) = (dir.fifo("in"), dir.fifo("out"));
    let io = open(Stdio {
        stdin: uri(&stdin),
        stdout: uri(&stdout),
        stderr: uri(&dir.path("must not be looked at")),
        terminal: true,
    })
    .await;
    let tokens = io.tokens();
    assert!(tokens.terminal);
    assert_eq!(io.token_list(), [tokens.terminal_token]);
    let mut guest = stream(&io, tokens.terminal_token);
    write_to(&stdin, "typed").await;
    let mut buffer = [0; 5];
    in_time(guest.read_exact(&mut buffer)).await.unwrap();
    assert_eq!(&buffer, b"typed");
    // The end of input must not end the other direction.
    io.close_stdin();
    guest.write_all(b"shown").await.unwrap();
    let shown = blocking(move || {
        let mut file = File::open(stdout).unwrap();
        let mut buffer = [0; 5];
        file.read_exact(&mut buffer).unwrap();
        buffer
    });
    assert_eq!(&in_time(shown).await, b"shown");
    drop(guest);
    in_time(io.drained()).await;
}

#[tokio::test]
async fn descriptors_are_used_without_changing_them_for_others() {
    let (stdin, mut typist) = std::io::pipe().unwrap();
    let (watcher, stdout) = std::io::pipe().unwrap();
    let shared = stdout.try_clone().unwrap();
    let (socket, peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let shared_socket = socket.try_clone().unwrap();
    let io = open(Stdio {
        stdin: StdioTarget::Fd(stdin.into()),
        stdout: StdioTarget::Fd(stdout.into()),
        stderr: StdioTarget::Fd(socket.into()),
        terminal: false,
    })
    .await;
    for fd in [shared.as_fd(), shared_socket.as_fd()] {
        assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
    }
    drop((shared, shared_socket));
    let tokens = io.tokens();
    let mut guest_in = stream(&io, tokens.stdin_token);
    let mut guest_out = stream(&io, tokens.stdout_token);
    let mut guest_err = stream(&io, tokens.stderr_token);
    typist.write_all(b"in").unwrap();
    drop(typist);
    let mut text = String::new();
    in_time(guest_in.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "in");
    guest_out.write_all(b"out").await.unwrap();
    guest_err.write_all(b"err").await.unwrap();
    drop((guest_out, guest_err));
    in_time(io.drained()).await;
    let read = move |mut from: Box<dyn Read + Send>| {
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        text
    };
    drop(io);
    assert_eq!(in_time(blocking(move || read(Box::new(watcher)))).await, "out");
    assert_eq!(in_time(blocking(move || read(Box::new(peer)))).await, "err");
}

#[tokio::test]
async fn a_file_can_be_the_input_and_closing_it_ends_it() {
    let dir = Directory::new();
    let path = dir.path("input");
    std::fs::write(&path, vec![b'x'; 200_000]).unwrap();
    let stdio = |fd: OwnedFd| Stdio {
        stdin: StdioTarget::Fd(fd),
        ..Stdio::null()
    };
    let io = open(stdio(File::open(&path).unwrap().into())).await;
    let mut guest = stream(&io, io.tokens().stdin_token);
    let mut bytes = Vec::new();
    in_time(guest.read_to_end(&mut bytes)).await.unwrap();
    assert_eq!(bytes.len(), 200_000);

    let (stdin, _typist) = std::io::pipe().unwrap();
    let io = open(stdio(stdin.into())).await;
    let mut guest = stream(&io, io.tokens().stdin_token);
    io.close_stdin();
    assert_eq!(in_time(guest.read(&mut [0; 1])).await.unwrap(), 0);
}

#[tokio::test]
async fn output_that_nobody_can_ever_read_hangs_up_on_the_guest() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let io = open(Stdio {
        stdout: StdioTarget::Fd(writer.into()),
        ..Stdio::null()
    })
    .await;
    let mut guest = stream(&io, io.tokens().stdout_token);
    guest.write_all(b"x").await.unwrap();
    in_time(io.drained()).await;
    assert_eq!(
        guest.write_all(b"y").await.unwrap_err().kind(),
        std::io::ErrorKind::BrokenPipe
    );
}

#[tokio::test]
async fn a_full_disk_costs_output_and_not_the_process() {
    let io = open(Stdio {
        stdout: uri(Path::new("/dev/full")),
        ..Stdio::null()
    })
    .await;
    let mut guest = stream(&io, io.tokens().stdout_token);
    for _ in 0..100 {
        in_time(guest.write_all(&[b'x'; 65536])).await.unwrap();
    }
    drop(guest);
    in_time(io.drained()).await;
}

#[tokio::test]
async fn a_guest_that_closes_its_input_ends_the_copy() {
    let dir = Directory::new();
    let stdin = dir.fifo("in");
    let io = open(Stdio {
        stdin: uri(&stdin),
        ..Stdio::null()
    })
    .await;
    drop(stream(&io, io.tokens().stdin_token));
    io.close_stdin();
    // Nobody holds the reading end any more.
    let refused = async {
        loop {
            let flags = OFlags::WRONLY | OFlags::NONBLOCK;
            match rustix::fs::openat(CWD, &stdin, flags, Mode::empty()) {
                Err(errno) => return errno,
                Ok(_) => tokio::task::yield_now().await,
            }
        }
    };
    assert_eq!(in_time(refused).await, rustix::io::Errno::NXIO);
}

#[tokio::test]
async fn a_token_opens_one_stream_once() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let io = open(Stdio {
        stdout: StdioTarget::Fd(writer.into()),
        ..Stdio::null()
    })
    .await;
    let token = io.tokens().stdout_token;
    let mut wrong = stream(&io, token ^ 1);
    assert_eq!(
        in_time(wrong.read(&mut [0; 1])).await.unwrap(),
        0,
        "a wrong token opens a stream"
    );
    let mut right = stream(&io, token);
    let mut again = stream(&io, token);
    assert_eq!(
        in_time(again.read(&mut [0; 1])).await.unwrap(),
        0,
        "a token opens a second stream"
    );
    right.write_all(b"once").await.unwrap();
    drop(right);
    in_time(io.drained()).await;
    drop(io);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "once");
}

#[tokio::test]
async fn drained_waits_for_streams_that_may_still_come() {
    let io = open(Stdio {
        stdout: uri(Path::new("/dev/null")),
        ..Stdio::null()
    })
    .await;
    assert!(
        tokio::time::timeout(Duration::from_millis(50), io.drained())
            .await
            .is_err()
    );
    io.abandon();
    in_time(io.drained()).await;

    let open_ended = open(Stdio {
        stdout: uri(Path::new("/dev/null")),
        ..Stdio::null()
    })
    .await;
    let _held = stream(&open_ended, open_ended.tokens().stdout_token);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), open_ended.drained())
            .await
            .is_err()
    );
    open_ended.close();
    in_time(open_ended.drained()).await;
}

#[tokio::test]
async fn targets_that_cannot_be_opened_are_named() {
    let dir = Directory::new();
    let missing = dir.path("missing");
    let cases = [
        (uri(&missing), StdioTarget::Null),
        (StdioTarget::Null, uri(&missing)),
        (
            StdioTarget::Null,
            address("file", Path::new("/proc/nope/missing")),
        ),
        (address("file", &missing), StdioTarget::Null),
        (StdioTarget::Null, StdioTarget::Uri("tcp://missing".into())),
    ];
    for (stdin, stdout) in cases {
        let stdio = Stdio {
            stdin,
            stdout,
            ..Stdio::null()
        };
        let error = Io::open(stdio, "c1", "ns1").await.unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }
}
