//! Created, running, exited, deleted: the order of things and of their news.

use protocol::agent::UpdateContainerRequest;
use serde_json::json;
use ttrpc::Code;
use ttrpc::context::Context;

use tokio::io::AsyncReadExt as _;

use super::host::{edit, eventually, reference};
use super::{container, exec, guest_tests};

fn state_of(pid: i32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("State:\t"));
    line.unwrap_or("gone").chars().take(1).collect()
}

guest_tests! {
    async fn a_process_that_is_created_can_be_killed_before_it_starts(host) {
        host.create(&container("c", "exit 3")).await.unwrap();
        host.signal("c", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(host.exit("c", "").await, 137);
        assert_eq!(host.start_process("c", "").await.unwrap_err().code, Code::FAILED_PRECONDITION);
        host.delete("c").await.unwrap();
    }

    async fn a_container_that_never_starts_can_be_deleted(host) {
        host.create(&container("c", "exit 3")).await.unwrap();
        host.delete("c").await.unwrap();
        assert_eq!(host.exits(), [""]);
        assert_eq!(host.exit("c", "").await, 137);
        assert_eq!(host.delete("c").await.unwrap_err().code, Code::NOT_FOUND);
        // The name is free again.
        assert_eq!(host.run(container("c", "exit 4")).await.status, 4);
    }

    async fn processes_and_ids_are_told_apart(host) {
        let pid = host.start_sleeper("c").await;
        assert_eq!(host.create(&container("c", "")).await.unwrap_err().code, Code::ALREADY_EXISTS);
        assert_eq!(host.create_exec(&exec("no", "e", "")).await.unwrap_err().code, Code::NOT_FOUND);
        assert_eq!(host.start_process("c", "no").await.unwrap_err().code, Code::NOT_FOUND);
        assert_eq!(host.start_process("c", "").await.unwrap_err().code, Code::FAILED_PRECONDITION);
        let exec_pid = host.create_exec(&exec("c", "e", "sleep 1000")).await.unwrap();
        assert_eq!(host.create_exec(&exec("c", "e", "")).await.unwrap_err().code, Code::ALREADY_EXISTS);
        host.start_process("c", "e").await.unwrap();
        assert_eq!(host.delete_exec("c", "e").await.unwrap_err().code, Code::FAILED_PRECONDITION);
        let listed = host.agent.list_processes(Context::default(), &reference("c")).await.unwrap().processes;
        let find = |pid: i32| listed.iter().find(|process| process.guest_pid == pid).unwrap();
        assert!(find(pid).known && find(pid).exec_id.is_empty());
        assert_eq!(find(exec_pid).exec_id, "e");
        assert!(listed.iter().all(|process| process.command.contains("sleep")), "{listed:?}");
        host.delete("c").await.unwrap();
        assert_eq!(host.exits(), ["e", ""]);
    }

    async fn the_inits_exit_ends_everything_and_is_told_last(host) {
        // In the agent's own pid namespace nothing but the cgroup ends the others.
        let mut request = container("c", "sleep 1000 & read line");
        edit(&mut request.spec, |spec| spec["linux"]["namespaces"] = json!([{"type": "mount"}]));
        let stdio = host.pipes();
        request.stdio = Some(stdio.clone()).into();
        host.create(&request).await.unwrap();
        host.start_process("c", "").await.unwrap();
        for id in ["a", "b"] {
            host.create_exec(&exec("c", id, "trap '' TERM; sleep 1000")).await.unwrap();
        }
        host.start_process("c", "a").await.unwrap();
        drop(host.stream(stdio.stdin_token));
        assert_eq!(host.exit("c", "").await, 1);
        let mut others = host.exits();
        assert_eq!(others.pop().as_deref(), Some(""));
        others.sort();
        assert_eq!(others, ["a", "b"]);
        assert_eq!(host.exit("c", "a").await, 137);
        assert_eq!(host.create_exec(&exec("c", "d", "")).await.unwrap_err().code, Code::FAILED_PRECONDITION);
        assert_eq!(host.signal("c", "", libc::SIGTERM, false).await.unwrap_err().code, Code::NOT_FOUND);
        assert_eq!(host.signal("c", "", libc::SIGTERM, true).await.unwrap_err().code, Code::NOT_FOUND);
        host.delete_exec("c", "a").await.unwrap();
        host.delete("c").await.unwrap();
    }

    async fn signals_reach_one_or_all(host) {
        let script = "trap 'exit 5' TERM; echo ready; while true; do sleep 0.05; done";
        let mut request = container("c", script);
        let stdio = host.pipes();
        request.stdio = Some(stdio.clone()).into();
        host.create(&request).await.unwrap();
        let mut said = host.stream(stdio.stdout_token);
        host.start_process("c", "").await.unwrap();
        tokio::io::AsyncReadExt::read_exact(&mut said, &mut [0; 6]).await.unwrap();
        host.create_exec(&exec("c", "one", "sleep 1000")).await.unwrap();
        host.create_exec(&exec("c", "two", "sleep 1000")).await.unwrap();
        host.start_process("c", "one").await.unwrap();
        host.start_process("c", "two").await.unwrap();
        assert_eq!(host.signal("c", "one", 99, false).await.unwrap_err().code, Code::INVALID_ARGUMENT);
        assert_eq!(host.signal("c", "one", libc::SIGTERM, true).await.unwrap_err().code, Code::INVALID_ARGUMENT);
        host.signal("c", "one", libc::SIGUSR1, false).await.unwrap();
        assert_eq!(host.exit("c", "one").await, 128 + 10);
        host.signal("c", "", libc::SIGTERM, true).await.unwrap();
        assert_eq!(host.exit("c", "two").await, 143);
        assert_eq!(host.exit("c", "").await, 5);
        host.delete("c").await.unwrap();
    }

    async fn a_paused_container_stands_still_and_can_be_killed(host) {
        let pid = host.start_sleeper("c").await;
        let pause = async || host.agent.pause_container(Context::default(), &reference("c")).await;
        let resume = async || host.agent.resume_container(Context::default(), &reference("c")).await;
        assert!(resume().await.is_err());
        pause().await.unwrap();
        assert!(pause().await.is_err());
        let wchan = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        assert!(wchan.contains("freez") || wchan == "0" || wchan.contains("signal"), "{wchan}");
        resume().await.unwrap();
        pause().await.unwrap();
        host.signal("c", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(host.exit("c", "").await, 137);
        host.delete("c").await.unwrap();
    }

    async fn orphans_are_reaped(host) {
        let mut request = container("c", "(sleep 0.05; exit 1) & sleep 1000");
        edit(&mut request.spec, |spec| spec["linux"]["namespaces"] = json!([{"type": "mount"}]));
        host.create(&request).await.unwrap();
        host.start_process("c", "").await.unwrap();
        host.create_exec(&exec("c", "e", "(sleep 0.1; exit 9) & exit 0")).await.unwrap();
        host.start_process("c", "e").await.unwrap();
        assert_eq!(host.exit("c", "e").await, 0);
        let zombies = || {
            std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
                let pid = entry.file_name().to_string_lossy().parse::<i32>();
                pid.is_ok_and(|pid| {
                    let parent = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                    state_of(pid) == "Z" && parent.contains("PPid:\t1\n")
                })
            })
        };
        eventually("no zombie of ours", || !zombies()).await;
        host.delete("c").await.unwrap();
    }

    async fn containers_can_share_a_pid_namespace(host) {
        let shared = |id: &str, script: &str| {
            let mut request = container(id, script);
            edit(&mut request.spec, |spec| {
                spec["linux"]["namespaces"] = json!([{"type": "pid", "path": "/proc/77/ns/pid"}, {"type": "mount"}]);
            });
            request
        };
        host.create(&shared("a", "sleep 777")).await.unwrap();
        host.start_process("a", "").await.unwrap();
        let output = host.run(shared("b", "echo $$; ps -o args | grep -c '[s]leep 777'")).await;
        let (pid, count) = output.stdout.split_once('\n').unwrap();
        assert!(pid.parse::<u32>().unwrap() > 1);
        assert_eq!(count, "1\n");
        let first = host.run_exec(exec("a", "first", "cat /proc/1/comm")).await.stdout;
        assert_eq!(first, "pause\n");
        // The end of one leaves the other alone.
        let output = host.run_exec(exec("a", "e", "ps -o args | grep -c '[s]leep 777'")).await;
        assert_eq!(output.stdout, "1\n");
        host.delete("a").await.unwrap();
    }

    async fn a_killed_exec_takes_its_session_along_and_nothing_else(host) {
        host.start_sleeper("c").await;
        let script = "sleep 771 & (sleep 772 & wait) & setsid sh -c 'echo started; exec sleep 773' & sleep 774; true";
        let mut request = exec("c", "probe", script);
        let stdio = host.pipes();
        request.stdio = Some(stdio.clone()).into();
        host.create_exec(&request).await.unwrap();
        let mut stdout = host.stream(stdio.stdout_token);
        host.start_process("c", "probe").await.unwrap();
        let mut text = [0; 8];
        stdout.read_exact(&mut text).await.unwrap();
        host.signal("c", "probe", libc::SIGKILL, false).await.unwrap();
        assert_eq!(host.exit("c", "probe").await, 137);
        let left = host.run_exec(exec("c", "look", "ps -o args | grep '^sleep [0-9]'")).await.stdout;
        assert_eq!(left, "sleep 1000\nsleep 773\n");
        host.delete("c").await.unwrap();
    }

    async fn a_container_can_join_anothers_pid_namespace(host) {
        let joining = |id: &str, of: &str, script: &str| {
            let mut request = container(id, script);
            request.set_pid_namespace_of(of.into());
            request
        };
        let early = host.create(&joining("b", "a", "true")).await.unwrap_err();
        assert_eq!(early.code, ttrpc::Code::FAILED_PRECONDITION, "{early:?}");
        host.create(&container("a", "sleep 777")).await.unwrap();
        host.start_process("a", "").await.unwrap();
        let output = host.run(joining("b", "a", "readlink /proc/self/ns/pid; ps -o pid,args | grep '[s]leep 777'")).await;
        let (namespace, process) = output.stdout.split_once('\n').unwrap();
        assert_ne!(namespace, std::fs::read_link("/proc/self/ns/pid").unwrap().to_str().unwrap());
        assert_eq!(process.split_whitespace().next(), Some("1"), "{process}");
        // Who joined goes down with the namespace, and its exit is told as any.
        host.create(&joining("c", "a", "sleep 778")).await.unwrap();
        host.start_process("c", "").await.unwrap();
        host.signal("a", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(host.exit("c", "").await, 137);
        assert_eq!(host.exit("a", "").await, 137);
        let late = host.create(&joining("d", "a", "true")).await.unwrap_err();
        assert_eq!(late.code, ttrpc::Code::FAILED_PRECONDITION, "{late:?}");
        for id in ["a", "c"] {
            host.delete(id).await.unwrap();
        }
    }

    async fn the_hosts_word_on_the_pid_namespace_goes_before_the_specs(host) {
        let mut request = container("c", "readlink /proc/self/ns/pid");
        request.set_guest_pid_namespace(Default::default());
        let expected = std::fs::read_link("/proc/self/ns/pid").unwrap();
        assert_eq!(host.run(request).await.stdout.trim(), expected.to_str().unwrap());
    }

    async fn an_update_that_the_kernel_refuses_is_named(host) {
        host.start_sleeper("c").await;
        let update = async |resources: &str| {
            let request = UpdateContainerRequest {
                container_id: "c".into(),
                resources: resources.as_bytes().to_vec(),
                ..Default::default()
            };
            host.agent.update_container(Context::default(), &request).await
        };
        // There are no controllers here, but cgroup.max.depth is a file of every cgroup; it is none of resources.
        let error = update(r#"{"unified":{"memory.max":"1"}}"#).await.unwrap_err().to_string();
        assert!(error.contains("memory.max"), "{error}");
        let error = update(r#"{"unified":{"cgroup.freeze":"1"}}"#).await.unwrap_err().to_string();
        assert!(error.contains("linux.resources.unified"), "{error}");
        update("{}").await.unwrap();
        let stats = host.agent.container_stats(Context::default(), &reference("c")).await.unwrap();
        assert!(stats.cpu.usage_usec > 0);
        host.delete("c").await.unwrap();
    }
}
