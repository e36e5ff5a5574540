//! When the stages of a boot were reached. Always recorded: one clock reading per stage.

use std::sync::atomic::{AtomicU64, Ordering};

use protocol::vmm::Timeline;
use rustix::time::{ClockId, clock_gettime};

/// A stage of the boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `main` began.
    VmmMain,
    /// The machine's description had arrived.
    Configured,
    /// KVM had created VM, interrupt controller and vCPUs.
    VmCreated,
    /// Kernel and initramfs were in guest memory.
    KernelLoaded,
    /// The first vCPU was about to run.
    FirstInstruction,
    /// The agent connected.
    AgentConnected,
}

/// Collects the stages from whichever thread reaches them.
#[derive(Debug, Default)]
pub struct Recorder {
    /// `CLOCK_MONOTONIC` in nanoseconds by stage; 0 is "not yet".
    reached: [AtomicU64; 6],
}

impl Recorder {
    /// Notes that `stage` is reached now. Only the first time counts.
    pub fn record(&self, stage: Stage) {
        let _ = self.reached[stage as usize].compare_exchange(
            0,
            monotonic_ns(),
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
    }

    /// The stages so far, in µs since `started_ns`.
    #[must_use]
    pub fn report(&self, started_ns: u64) -> Timeline {
        let at = |stage: Stage| match self.reached[stage as usize].load(Ordering::Relaxed) {
            0 => None,
            reached => Some(reached.saturating_sub(started_ns) / 1000),
        };
        Timeline {
            vmm_main: at(Stage::VmmMain),
            configured: at(Stage::Configured),
            vm_created: at(Stage::VmCreated),
            kernel_loaded: at(Stage::KernelLoaded),
            first_instruction: at(Stage::FirstInstruction),
            agent_connected: at(Stage::AgentConnected),
        }
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_reported_from_the_sandboxs_zero_and_only_its_first_time_counts() {
        let recorder = Recorder::default();
        let started = monotonic_ns();
        assert_eq!(recorder.report(started), Timeline::default());
        recorder.record(Stage::VmCreated);
        let first = recorder.report(started);
        assert!(first.vm_created.is_some() && first.configured.is_none());
        while monotonic_ns() < started + 3_000_000 {}
        recorder.record(Stage::VmCreated);
        assert_eq!(recorder.report(started), first);
    }
}
