//! Standard I/O: pipes, terminals, their ends and their pace.

use std::time::{Duration, Instant};

use protocol::agent::ResizeTerminalRequest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::context::Context;

use super::host::{Output, edit};
use super::{container, exec, guest_tests};

guest_tests! {
    async fn both_streams_and_the_status_arrive(host) {
        let output = host.run(container("c", "echo out; echo err >&2; exit 7")).await;
        assert_eq!(
            output,
            Output {
                stdout: "out\n".into(),
                stderr: "err\n".into(),
                status: 7,
            }
        );
    }

    async fn input_passes_through_unchanged_and_its_end_is_seen(host) {
        const BLOCKS: usize = 400;
        let mut request = container("c", "cat");
        let stdio = host.pipes();
        request.stdio = Some(stdio.clone()).into();
        host.create(&request).await.unwrap();
        let (mut stdin, mut stdout) = (host.stream(stdio.stdin_token), host.stream(stdio.stdout_token));
        host.start_process("c", "").await.unwrap();
        let block: Vec<u8> = (0..1 << 16).map(|index: u32| (index * 31 % 251) as u8).collect();
        let write = async {
            for _ in 0..BLOCKS {
                stdin.write_all(&block).await.unwrap();
            }
            stdin.shutdown().await.unwrap();
        };
        let read = async {
            let mut found = vec![0; block.len()];
            for _ in 0..BLOCKS {
                stdout.read_exact(&mut found).await.unwrap();
                assert!(found == block);
            }
            assert_eq!(stdout.read(&mut found).await.unwrap(), 0);
        };
        tokio::join!(write, read);
        assert_eq!(host.exit("c", "").await, 0);
        host.delete("c").await.unwrap();
    }

    async fn standard_streams_can_be_opened_anew_also_by_a_user(host) {
        let mut request = container("c", "echo out > /dev/stdout; echo err > /dev/stderr; cat < /dev/stdin");
        edit(&mut request.spec, |spec| spec["process"]["user"] = serde_json::json!({"uid": 1000, "gid": 1000}));
        let output = host.run(request).await;
        assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.status), ("out\n", "err\n", 0));
    }

    async fn without_streams_there_is_the_null_device(host) {
        host.create(&container("c", "readlink /proc/self/fd/1 > /tmp/seen; cat; exit 3")).await.unwrap();
        host.start_process("c", "").await.unwrap();
        assert_eq!(host.exit("c", "").await, 3);
        host.delete("c").await.unwrap();
        let seen = std::fs::read_to_string(host.directory.join("shares/image/tmp/seen")).unwrap();
        assert_eq!(seen, "/tmp/seen\n");
    }

    async fn nothing_else_is_open_in_a_process(host) {
        let script = "for fd in /proc/self/fd/*; do echo ${fd##*/}; done";
        // The shell has the directory open while it looks.
        assert_eq!(host.run(container("a", script)).await.stdout, "0\n1\n2\n3\n");
        host.start_sleeper("c").await;
        assert_eq!(host.run_exec(exec("c", "e", script)).await.stdout, "0\n1\n2\n3\n");
        host.delete("c").await.unwrap();
    }

    async fn descendants_with_the_output_do_not_hold_the_exit_back(host) {
        host.start_sleeper("c").await;
        let mut request = exec("c", "e", "echo first; (sleep 0.3; echo later) & exit 6");
        let stdio = host.pipes();
        request.stdio = Some(stdio.clone()).into();
        host.create_exec(&request).await.unwrap();
        let mut stdout = host.stream(stdio.stdout_token);
        host.start_process("c", "e").await.unwrap();
        assert_eq!(host.exit("c", "e").await, 6);
        // What was written before the exit is there, what comes later still comes.
        let mut text = String::new();
        stdout.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "first\nlater\n");
        host.delete("c").await.unwrap();
    }

    async fn a_host_that_does_not_read_does_not_hold_the_exit_back_for_ever(host) {
        let mut request = container("c", "yes");
        let stdio = host.pipes();
        request.stdio = Some(stdio.clone()).into();
        host.create(&request).await.unwrap();
        let _unread = host.stream(stdio.stdout_token);
        host.start_process("c", "").await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        host.signal("c", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(host.exit("c", "").await, 137);
        host.delete("c").await.unwrap();
    }

    async fn a_host_that_closes_its_end_is_a_broken_pipe(host) {
        // A namespace's first process does not die of signals that it does not handle.
        let mut request = container("c", "yes; exit $?");
        let stdio = host.pipes();
        request.stdio = Some(stdio.clone()).into();
        host.create(&request).await.unwrap();
        drop(host.stream(stdio.stdout_token));
        host.start_process("c", "").await.unwrap();
        assert_eq!(host.exit("c", "").await, 128 + 13);
        host.delete("c").await.unwrap();
    }

    async fn idle_streams_cost_nothing(host) {
        let mut request = container("c", "sleep 1000");
        let stdio = host.pipes();
        request.stdio = Some(stdio.clone()).into();
        host.create(&request).await.unwrap();
        let _streams = [stdio.stdin_token, stdio.stdout_token, stdio.stderr_token].map(|token| host.stream(token));
        host.start_process("c", "").await.unwrap();
        let used = || {
            let usage = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
            Duration::new(usage.tv_sec as u64, usage.tv_nsec as u32)
        };
        let before = used();
        tokio::time::sleep(Duration::from_millis(500)).await;
        // A relay that spins would take all of it.
        assert!(used() - before < Duration::from_millis(250));
        host.delete("c").await.unwrap();
    }

    async fn a_terminal_is_one(host) {
        let script = "tty; test -c /dev/console && stty size; echo err >&2; read line; echo \"got $line\"; exit 4";
        let mut request = container("c", script);
        let stdio = host.terminal();
        request.stdio = Some(stdio.clone()).into();
        (request.terminal_rows, request.terminal_columns) = (40, 132);
        host.create(&request).await.unwrap();
        let mut terminal = host.stream(stdio.terminal_token);
        host.start_process("c", "").await.unwrap();
        terminal.write_all(b"hello\n").await.unwrap();
        let mut text = String::new();
        terminal.read_to_string(&mut text).await.unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| *line != "hello").collect();
        assert_eq!(lines, ["/dev/pts/0", "40 132", "err", "got hello"]);
        assert_eq!(host.exit("c", "").await, 4);
        host.delete("c").await.unwrap();
    }

    async fn a_terminal_resizes_and_interrupts(host) {
        host.start_sleeper("c").await;
        let script = "trap 'stty size' WINCH; echo ready; while true; do sleep 0.02; done";
        let mut request = exec("c", "e", script);
        let stdio = host.terminal();
        request.stdio = Some(stdio.clone()).into();
        host.create_exec(&request).await.unwrap();
        let mut terminal = host.stream(stdio.terminal_token);
        host.start_process("c", "e").await.unwrap();
        let mut text = String::new();
        let mut read_until = async |terminal: &mut tokio::net::UnixStream, wanted: &str| {
            let until = Instant::now() + Duration::from_secs(10);
            while !text.contains(wanted) {
                assert!(Instant::now() < until, "{text}");
                let mut buffer = [0; 256];
                let length = terminal.read(&mut buffer).await.unwrap();
                assert!(length > 0, "{text}");
                text.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
            }
        };
        read_until(&mut terminal, "ready").await;
        let resize = ResizeTerminalRequest {
            container_id: "c".into(),
            exec_id: "e".into(),
            rows: 7,
            columns: 99,
            ..Default::default()
        };
        host.agent.resize_terminal(Context::default(), &resize).await.unwrap();
        read_until(&mut terminal, "7 99").await;
        terminal.write_all(b"\x03").await.unwrap();
        assert_eq!(host.exit("c", "e").await, 130);
        assert!(host.agent.resize_terminal(Context::default(), &resize).await.is_err());
        host.delete("c").await.unwrap();
    }
}
