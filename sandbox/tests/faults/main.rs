//! What happens when things go wrong in ways a real VM cannot be made to, and in which order.
//!
//! This program is its own VMM: the sandbox spawns it again under the VMM's name (`fake`). It needs /dev/kvm to
//! be openable, and root for the namespaces, as every sandbox does.

mod containers;
mod ends;
mod fake;
mod hooks;
mod place;
mod pods;
mod sizes;
mod start;

use std::time::Duration;

use place::Place;

type Test = (
    &'static str,
    fn(&Place) -> std::pin::Pin<Box<dyn Future<Output = ()> + '_>>,
);

macro_rules! tests {
    ($($file:ident: [$($name:ident),* $(,)?]),* $(,)?) => {
        const TESTS: &[Test] = &[$($((stringify!($name), |place| Box::pin($file::$name(place)))),*),*];
    };
}

tests! {
    start: [
        an_agent_of_another_version_is_refused,
        a_guest_that_never_says_hello_is_given_up_with_its_console,
        a_guest_that_panics_in_boot_is_reported_with_its_console,
        a_guest_that_dies_in_the_handshake_is_not_waited_for,
        a_vmm_that_dies_at_once_is_reported_with_its_words,
        a_vmm_that_refuses_the_machine_is_quoted,
        a_missing_vmm_is_named,
        a_missing_netns_is_named_and_undone,
    ],
    containers: [
        a_container_runs_and_leaves_nothing,
        a_refused_container_leaves_nothing_attached,
        an_exit_before_the_answer_comes_after_the_start,
        a_missing_executable_can_only_be_deleted,
        an_out_of_memory_comes_before_its_exit,
        a_paused_container_takes_no_exec,
        execs_are_told_apart,
        a_container_in_the_making_is_not_known_yet,
        a_container_that_is_being_deleted_has_ended_for_who_signals_it,
        who_deletes_a_container_second_waits_for_the_first,
    ],
    sizes: [
        a_vm_grows_before_its_container_and_shrinks_after_it,
        a_vm_that_cannot_grow_leaves_its_container_as_it_is,
        a_container_that_comes_later_makes_the_vm_grow,
        the_vm_is_counted_in_its_cgroup_which_goes_with_it,
    ],
    pods: [
        a_pods_sandbox_is_nothing_in_the_guest_and_outlives_its_containers,
        namespaces_are_told_by_the_pids_of_the_pods_own_processes,
        a_pod_in_a_namespace_of_the_host_is_refused,
    ],
    hooks: [
        hooks_run_around_the_container,
        a_failed_hook_undoes_the_container,
    ],
    ends: [
        a_killed_vmm_ends_every_process_in_order,
        a_guest_that_panics_is_told_from_a_killed_vmm,
        an_agent_that_hangs_up_ends_the_vm,
        a_killed_host_process_kills_its_container,
        a_shutdown_ends_everything_and_may_be_repeated,
        a_dropped_sandbox_leaves_no_process,
        a_dead_owner_leaves_no_process,
    ],
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.first().map(String::as_str) {
        Some("kata-rs-vmm") => return fake::run(&args[1]),
        Some("owner") => return ends::own(&args[1]),
        _ => {}
    }
    let filter = args.iter().skip(1).find(|arg| !arg.starts_with('-')).cloned();
    let filter = filter.unwrap_or_default();
    if args.iter().any(|arg| arg == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in TESTS.iter().filter(|(name, _)| name.contains(&filter)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let place = Place::new();
        let run = std::panic::AssertUnwindSafe(|| {
            runtime.block_on(async {
                let limit = Duration::from_secs(30);
                tokio::time::timeout(limit, test(&place))
                    .await
                    .expect("the test hangs");
            });
        });
        let result = std::panic::catch_unwind(run);
        drop(runtime);
        *(if result.is_ok() { &mut passed } else { &mut failed }) += 1;
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored");
    if failed > 0 {
        std::process::exit(1);
    }
}
