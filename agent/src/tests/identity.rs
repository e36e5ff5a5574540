//! Who a process is: namespaces, user, capabilities, limits, filters.

use serde_json::json;

use super::host::edit;
use super::{container, exec, guest_tests};

fn own_namespace(kind: &str) -> String {
    std::fs::read_link(format!("/proc/self/ns/{kind}"))
        .unwrap()
        .to_string_lossy()
        .into_owned()
}

guest_tests! {
    async fn namespaces_are_new_and_shared_by_further_processes(host) {
        const KINDS: [&str; 6] = ["pid", "mnt", "ipc", "uts", "cgroup", "net"];
        let script = format!("for n in {}; do readlink /proc/self/ns/$n; done; hostname; echo $$", KINDS.join(" "));
        host.start_sleeper("c").await;
        let exec_said = host.run_exec(exec("c", "e", &script)).await.stdout;
        let lines: Vec<&str> = exec_said.lines().collect();
        for (kind, found) in KINDS.iter().zip(&lines) {
            // The network is the guest's.
            assert_eq!(*kind == "net", own_namespace(kind) == *found, "{kind} {found}");
        }
        assert_eq!(lines[6], "inside");
        let pid = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let init = pid.filter(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with("sleep"))).max().unwrap();
        for (kind, found) in KINDS.iter().zip(&lines) {
            let of_init = std::fs::read_link(format!("/proc/{init}/ns/{kind}")).unwrap();
            assert_eq!(of_init.to_string_lossy(), *found);
        }
        host.delete("c").await.unwrap();
        let alone = host.run(container("d", "echo $$; hostname; wc -l < /proc/net/dev; cat /proc/self/cgroup")).await.stdout;
        assert!(alone.starts_with("1\ninside\n") && alone.contains("0::/\n"), "{alone}");
    }

    async fn without_namespaces_of_its_own_it_has_the_pods(host) {
        let mut request = container("c", "hostname; readlink /proc/self/ns/uts; readlink /proc/self/ns/ipc");
        edit(&mut request.spec, |spec| {
            spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}, {"type": "uts", "path": "/proc/9/ns/uts"}]);
        });
        let expected = format!("pod\n{}\n{}\n", own_namespace("uts"), own_namespace("ipc"));
        assert_eq!(host.run(request).await.stdout, expected);
    }

    async fn no_signal_is_ignored_or_blocked(host) {
        // SAFETY: no handler is installed, and nothing else in this process wants the signals.
        unsafe {
            for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP, libc::SIGRTMIN()] {
                libc::signal(signal, libc::SIG_IGN);
            }
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGUSR1);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        }
        // Not by a shell, which ignores some itself.
        let args = json!(["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]);
        let nothing = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n";
        let mut request = container("a", "");
        edit(&mut request.spec, |spec| spec["process"]["args"] = args.clone());
        assert_eq!(host.run(request).await.stdout, nothing);
        host.start_sleeper("c").await;
        let mut request = exec("c", "e", "");
        edit(&mut request.process, |process| process["args"] = args);
        assert_eq!(host.run_exec(request).await.stdout, nothing);
        host.delete("c").await.unwrap();
    }

    async fn user_groups_and_mask_are_as_asked(host) {
        let mut request = container("c", "id -u; id -g; id -G; umask; pwd; echo $HOME; touch /tmp/made; stat -c '%a %u' /tmp/made");
        std::fs::set_permissions(host.directory.join("shares/image/tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
        edit(&mut request.spec, |spec| {
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o77});
            spec["process"]["cwd"] = json!("/work/made/for/it");
        });
        assert_eq!(
            host.run(request).await.stdout,
            "1000\n1001\n1001 5 7\n0077\n/work/made/for/it\n/home/user\n600 1000\n"
        );
    }

    async fn capabilities_are_exactly_those(host) {
        let script = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status";
        let lines = |text: String| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        // CAP_CHOWN, CAP_KILL, CAP_SYS_CHROOT.
        let three = "0000000000040021";
        let none = "0000000000000000";
        let found = lines(host.run(container("c", script)).await.stdout);
        assert_eq!(
            found,
            ["CapInh:", none, "CapPrm:", three, "CapEff:", three, "CapBnd:", three, "CapAmb:", none, "NoNewPrivs:", "1", "Seccomp:", "0"]
        );
        let mut request = container("c", script);
        edit(&mut request.spec, |spec| {
            let sets = &mut spec["process"]["capabilities"];
            sets["ambient"] = json!(["CAP_KILL"]);
            sets["inheritable"] = json!(["CAP_KILL"]);
            spec["process"]["user"]["uid"] = json!(1000);
            spec["process"]["noNewPrivileges"] = json!(false);
        });
        let found = lines(host.run(request).await.stdout);
        let kill = "0000000000000020";
        assert_eq!(found[..12], ["CapInh:", kill, "CapPrm:", kill, "CapEff:", kill, "CapBnd:", three, "CapAmb:", kill, "NoNewPrivs:", "0"]);
        // A further process without a word about them has the container's.
        host.start_sleeper("d").await;
        let found = lines(host.run_exec(exec("d", "e", script)).await.stdout);
        assert_eq!(found[3], three);
        host.delete("d").await.unwrap();
    }

    async fn limits_and_scores_are_set(host) {
        let mut request = container("c", "ulimit -n; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj; cat /proc/sys/kernel/shmmni");
        edit(&mut request.spec, |spec| {
            spec["process"]["rlimits"] = json!([
                {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": u64::MAX}
            ]);
            spec["process"]["oomScoreAdj"] = json!(321);
            spec["linux"]["sysctl"] = json!({"kernel.shmmni": "1234"});
        });
        assert_eq!(host.run(request).await.stdout, "100\n200\n0\n321\n1234\n");
    }

    async fn the_agents_own_score_is_not_inherited(host) {
        std::fs::write("/proc/self/oom_score_adj", "700").unwrap();
        let output = host.run(container("c", "cat /proc/self/oom_score_adj")).await;
        assert_eq!(output.stdout, "0\n");
        let mut request = container("d", "sleep 1000");
        edit(&mut request.spec, |spec| spec["process"]["oomScoreAdj"] = json!(55));
        host.create(&request).await.unwrap();
        host.start_process("d", "").await.unwrap();
        assert_eq!(host.run_exec(exec("d", "e", "cat /proc/self/oom_score_adj")).await.stdout, "55\n");
        host.delete("d").await.unwrap();
    }

    async fn a_filter_holds_with_and_without_new_privileges(host) {
        for no_new_privileges in [true, false] {
            let mut request = container("c", "mkdir /tmp/d; echo $?; touch /tmp/f; echo $?; grep Seccomp: /proc/self/status");
            edit(&mut request.spec, |spec| {
                spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
                spec["linux"]["seccomp"] = json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30}],
                });
            });
            let output = host.run(request.clone()).await;
            assert_eq!(output.stdout, "1\n0\nSeccomp:\t2\n");
            assert!(output.stderr.contains("Read-only file system"), "{}", output.stderr);
            // It holds for further processes too.
            edit(&mut request.spec, |spec| spec["process"]["args"] = json!(["sleep", "1000"]));
            host.create(&request).await.unwrap();
            host.start_process("c", "").await.unwrap();
            assert_eq!(host.run_exec(exec("c", "e", "mkdir /tmp/d")).await.status, 1);
            host.delete("c").await.unwrap();
        }
    }

    async fn signals_are_at_their_defaults(host) {
        let output = host.run(container("c", "grep -E '^Sig(Blk|Ign)' /proc/self/status")).await.stdout;
        let sets: Vec<_> = output.split_whitespace().filter_map(|word| u64::from_str_radix(word, 16).ok()).collect();
        assert_eq!(sets[0], 0);
        // The agent ignores SIGPIPE; what else is ignored comes from whoever runs the tests.
        assert_eq!(sets[1] & 1 << (libc::SIGPIPE - 1), 0);
    }
}
