//! The life of a task through a real containerd: `ctr run`, exec, kill, pause, ps, metrics, delete.

use kata_rs_tests::{BUSYBOX, Container, LeakCheck, ctr_run, sh, unique};

#[test]
fn both_streams_and_the_exit_status_come_through() {
    let outcome = ctr_run(
        "--rm",
        BUSYBOX,
        &unique("t"),
        "sh -c 'echo out; echo err >&2; exit 7'",
    );
    assert_eq!(
        (outcome.status, outcome.stdout.as_str(), outcome.stderr.as_str()),
        (7, "out\n", "err\n")
    );
}

#[test]
fn a_terminal_is_one_and_merges_the_streams() {
    // script(1) gives ctr the terminal it insists on.
    let id = unique("t");
    let outcome = sh(&format!(
        "script -qec \"ctr run --rm -t --runtime io.containerd.kata-rs.v2 {BUSYBOX} {id} sh -c 'tty; stty size; echo err >&2; exit 3'\" /dev/null </dev/null; echo status=$?"
    ));
    assert!(outcome.stdout.contains("/dev/pts/"), "{outcome:#?}");
    assert!(outcome.stdout.contains("err"), "{outcome:#?}");
    assert!(outcome.stdout.contains("status=3"), "{outcome:#?}");
}

#[test]
fn a_hundred_megabytes_of_input_arrive_unchanged() {
    let id = unique("t");
    let outcome = sh(&format!(
        "set -e; head -c 104857600 /dev/urandom > /tmp/{id}; sha256sum < /tmp/{id}; \
         ctr run --rm --runtime io.containerd.kata-rs.v2 {BUSYBOX} {id} sha256sum < /tmp/{id}; rm /tmp/{id}"
    ));
    let sums: Vec<&str> = outcome.ok().lines().collect();
    assert_eq!(sums.len(), 2, "{outcome:#?}");
    assert_eq!(sums[0], sums[1]);
}

#[test]
fn fifty_megabytes_of_output_arrive_unchanged_and_whole() {
    let id = unique("t");
    let outcome = sh(&format!(
        "ctr run --rm --runtime io.containerd.kata-rs.v2 {BUSYBOX} {id} \
         sh -c 'yes 0123456789abcde | head -c 52428800' | sha256sum; \
         yes 0123456789abcde | head -c 52428800 | sha256sum"
    ));
    let sums: Vec<&str> = outcome.ok().lines().collect();
    assert_eq!(sums.len(), 2, "{outcome:#?}");
    assert_eq!(sums[0], sums[1]);
}

#[test]
fn a_task_lives_through_exec_pause_resume_signals_and_delete() {
    let leaks = LeakCheck::begin();
    let container = Container::start(
        "",
        BUSYBOX,
        "sh -c 'trap \"exit 5\" TERM; while :; do sleep 0.1; done'",
    );
    let id = container.id();

    let exec = container.exec("echo hello; echo oops >&2; exit 4");
    assert_eq!(
        (exec.status, exec.stdout.as_str(), exec.stderr.as_str()),
        (4, "hello\n", "oops\n")
    );

    let pids = sh(&format!("ctr task ps {id}"));
    let pid: u32 = pids
        .ok()
        .lines()
        .nth(1)
        .and_then(|line| line.split_whitespace().next())
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        sh(&format!("test -d /proc/{pid}")).status == 0,
        "the task's pid {pid} is a live host process"
    );

    let metrics = sh(&format!("ctr task metrics {id}"));
    assert!(
        metrics.ok().contains("memory.usage_in_bytes") || metrics.ok().contains("pids.current"),
        "{metrics:#?}"
    );

    sh(&format!("ctr task pause {id}")).ok();
    assert!(
        sh("ctr task ls")
            .ok()
            .lines()
            .any(|line| line.starts_with(id) && line.contains("PAUSED"))
    );
    sh(&format!("ctr task resume {id}")).ok();
    assert!(
        sh("ctr task ls")
            .ok()
            .lines()
            .any(|line| line.starts_with(id) && line.contains("RUNNING"))
    );

    sh(&format!("ctr task kill -s TERM {id}")).ok();
    let deleted = sh(&format!(
        "for i in $(seq 100); do ctr task ls | grep -q '{id}.*STOPPED' && break; sleep 0.1; done; ctr task delete {id}"
    ));
    assert!(deleted.stderr.contains("exit code 5"), "{deleted:#?}");
    sh(&format!("ctr c rm {id}")).ok();
    leaks.nothing_left();
}

#[test]
fn sigkill_is_reported_as_137() {
    let container = Container::start("", BUSYBOX, "sleep 1000");
    let id = container.id();
    let outcome = sh(&format!(
        "ctr task kill -s KILL {id}; for i in $(seq 100); do ctr task ls | grep -q '{id}.*STOPPED' && break; sleep 0.1; done; ctr task delete {id}"
    ));
    assert!(outcome.stderr.contains("exit code 137"), "{outcome:#?}");
}

#[test]
fn an_executable_that_is_missing_or_not_executable_is_named() {
    let leaks = LeakCheck::begin();
    let missing = ctr_run("--rm", BUSYBOX, &unique("t"), "no-such-program");
    assert_ne!(missing.status, 0);
    assert!(
        missing.stderr.contains("no-such-program") && missing.stderr.contains("executable file not found"),
        "{missing:#?}"
    );
    let refused = ctr_run("--rm", BUSYBOX, &unique("t"), "/etc/passwd");
    assert_ne!(refused.status, 0);
    assert!(
        refused.stderr.contains("/etc/passwd") && refused.stderr.contains("permission denied"),
        "{refused:#?}"
    );

    let container = Container::start("", BUSYBOX, "sleep 1000");
    let exec = sh(&format!(
        "ctr task exec --exec-id x1 {} no-such-program",
        container.id()
    ));
    assert_ne!(exec.status, 0);
    assert!(exec.stderr.contains("executable file not found"), "{exec:#?}");
    assert_eq!(container.exec("echo still here").ok(), "still here");
    drop(container);
    leaks.nothing_left();
}

#[test]
fn user_environment_and_working_directory_are_the_specs() {
    let outcome = ctr_run(
        "--rm --user 12:34 --env COLOUR=green --cwd /tmp",
        BUSYBOX,
        &unique("t"),
        "sh -c 'id -u; id -g; echo $COLOUR; pwd'",
    );
    assert_eq!(
        outcome.ok().lines().collect::<Vec<_>>(),
        ["12", "34", "green", "/tmp"]
    );
}

#[test]
fn host_directories_and_files_can_be_mounted() {
    let id = unique("t");
    let outcome = sh(&format!(
        "mkdir -p /tmp/{id}/dir && echo from-host > /tmp/{id}/dir/file && echo single > /tmp/{id}/one; \
         ctr run --rm --runtime io.containerd.kata-rs.v2 \
           --mount type=bind,src=/tmp/{id}/dir,dst=/data,options=rbind:rw \
           --mount type=bind,src=/tmp/{id}/dir,dst=/readonly,options=rbind:ro \
           --mount type=bind,src=/tmp/{id}/one,dst=/etc/one,options=bind:ro \
           {BUSYBOX} {id} sh -c 'cat /data/file /etc/one; echo from-guest > /data/new; touch /readonly/x 2>/dev/null || echo refused'; \
         cat /tmp/{id}/dir/new; rm -r /tmp/{id}"
    ));
    assert_eq!(
        outcome.ok().lines().collect::<Vec<_>>(),
        ["from-host", "single", "refused", "from-guest"]
    );
}

#[test]
fn capabilities_devices_and_masked_paths_are_like_runcs() {
    let script = "sh -c 'grep -E \"^(Cap|NoNewPrivs|Seccomp:)\" /proc/self/status; ls /dev | grep -vx core; \
                  for m in / /proc /sys /dev /dev/pts /dev/shm /dev/mqueue; do grep -q \" $m \" /proc/mounts && echo mounted $m; done; \
                  touch /sys/x 2>&1; ulimit -n; umask'";
    // /dev/core links to /proc/kcore, which the guest kernel does not have.
    let ours = ctr_run("--rm", BUSYBOX, &unique("t"), script);
    let theirs = sh(&format!("ctr run --rm {BUSYBOX} {} {script}", unique("r")));
    assert_eq!(ours.ok(), theirs.ok());
}

#[test]
fn a_hundred_execs_leave_nothing_in_the_guest() {
    let container = Container::start("", BUSYBOX, "sleep 1000");
    let id = container.id();
    // The shell itself counts: the processes of a pipeline come and go.
    let count = "set -- /proc/[0-9]*; echo $#";
    let before = container.exec(count).ok().to_string();
    sh(&format!(
        "for i in $(seq 100); do ctr task exec --exec-id n$i {id} true || exit 1; done"
    ))
    .ok();
    assert_eq!(container.exec(count).ok(), before);
}

#[test]
fn containers_of_one_group_share_a_vm_that_outlives_the_first() {
    let leaks = LeakCheck::begin();
    let group = format!("--annotation io.containerd.runc.v2.group={}", unique("group"));
    let first = Container::start(&group, BUSYBOX, "sleep 1000");
    let second = Container::start(&group, BUSYBOX, "sleep 1000");
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    assert_eq!(first.exec(boot_id).ok(), second.exec(boot_id).ok());
    assert_eq!(
        second.exec("set -- /proc/[0-9]*; echo $#").ok(),
        "2",
        "pids are each container's own"
    );
    drop(first);
    assert_eq!(second.exec("echo alive").ok(), "alive");
    drop(second);
    leaks.nothing_left();
}

#[test]
fn metrics_have_runcs_names_and_limits() {
    let metrics = |runtime: &str| {
        let id = unique("m");
        let outcome = sh(&format!(
            "ctr run -d --runtime {runtime} {BUSYBOX} {id} sleep 1000 && \
             ctr task metrics {id} | awk '/^METRIC/{{on=1}} on{{print $1, ($1 ~ /limit|throttled/) ? $2 : \"\"}}'; \
             ctr task kill -s KILL {id}; for _ in $(seq 100); do ctr task rm {id} >/dev/null 2>&1 && break; sleep 0.1; done; ctr c rm {id}"
        ));
        outcome.ok().to_string()
    };
    let runc = metrics("io.containerd.runc.v2");
    assert!(runc.contains("memory.usage"), "{runc}");
    assert_eq!(metrics(kata_rs_tests::RUNTIME), runc);
}
