//! What a device counts.

use std::sync::atomic::{AtomicU64, Ordering};

use super::queue::Violations;

/// How often, and how many bytes. Counted by one thread, and read by any.
#[derive(Default)]
pub(crate) struct Counter {
    pub times: AtomicU64,
    pub bytes: AtomicU64,
}

impl Counter {
    pub fn add(&self, bytes: usize) {
        // Only the device's thread counts, so that a load and a store are enough.
        let bump =
            |counter: &AtomicU64, by| counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
        bump(&self.times, 1);
        bump(&self.bytes, bytes as u64);
    }
}

/// Counters with their names, for [`super::Device::counters`], and how often the driver has broken the rules.
pub(crate) fn report<const N: usize>(
    counters: [(&str, &AtomicU64); N],
    violations: &Violations,
) -> Vec<(String, u64)> {
    let counted = counters.map(|(name, counter)| (name, counter.load(Ordering::Relaxed)));
    let all = counted.into_iter().chain([("violations", violations.count())]);
    all.map(|(name, value)| (name.to_owned(), value)).collect()
}
