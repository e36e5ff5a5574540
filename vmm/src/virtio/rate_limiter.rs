//! How much a device may do in a time: token buckets for bytes and for operations.
//!
//! A bucket is asked before a request whether there is anything left in it, and charged afterwards with all that the
//! request took. So one request may be larger than the bucket; what it took too much is paid back before the next.
//! Arithmetic is exact: nothing is lost to rounding however often a bucket is asked, and nothing overflows.

use std::io;
use std::time::Duration;

use protocol::vmm::{MAX_REFILL_MS, RateLimit, TokenBucket};

use super::worker::{Poller, Timer};
use crate::timeline::monotonic_ns;

const NS_PER_MS: u64 = 1_000_000;
/// A device that has used up its tokens rests until there are as many as come in this time, so that it does not wake up
/// for each of them.
const REST_NS: u64 = NS_PER_MS;

/// Why a limit cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Nothing would ever be allowed.
    #[error("a limit has a bucket of capacity 0: give it at least 1, or leave the limit out")]
    Capacity,
    /// The time to refill is none, or longer than anybody waits.
    #[error("a limit refills its bucket in {0} ms: give it 1 to {MAX_REFILL_MS}")]
    Refill(u64),
}

/// A limit that can be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    bytes: Option<Rate>,
    operations: Option<Rate>,
}

/// A bucket's size, and the time in which it is refilled, neither of them zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rate {
    capacity: u64,
    refill_ns: u64,
}

impl TryFrom<RateLimit> for Limit {
    type Error = LimitError;

    fn try_from(limit: RateLimit) -> Result<Self, LimitError> {
        Ok(Self {
            bytes: limit.bytes.map(Rate::try_from).transpose()?,
            operations: limit.operations.map(Rate::try_from).transpose()?,
        })
    }
}

impl TryFrom<TokenBucket> for Rate {
    type Error = LimitError;

    fn try_from(bucket: TokenBucket) -> Result<Self, LimitError> {
        if bucket.capacity == 0 {
            return Err(LimitError::Capacity);
        }
        if !(1..=MAX_REFILL_MS).contains(&bucket.refill_ms) {
            return Err(LimitError::Refill(bucket.refill_ms));
        }
        Ok(Self {
            capacity: bucket.capacity,
            refill_ns: bucket.refill_ms * NS_PER_MS,
        })
    }
}

/// A token bucket at work. Times are nanoseconds of one clock that does not go back.
#[derive(Clone, Debug)]
struct Bucket {
    rate: Rate,
    /// Tokens in it; fewer than none when a request took more than there were.
    balance: i128,
    /// What has flowed in since without making a whole token, in tokens / `refill_ns`; less than one token.
    fraction: u64,
    /// When it was last refilled.
    refilled: u64,
}

impl Bucket {
    fn full(rate: Rate, now: u64) -> Self {
        Self {
            rate,
            balance: i128::from(rate.capacity),
            fraction: 0,
            refilled: now,
        }
    }

    fn refill(&mut self, now: u64) {
        let Rate { capacity, refill_ns } = self.rate;
        let elapsed = now.saturating_sub(self.refilled);
        self.refilled += elapsed;
        // The product of two 64-bit numbers leaves room for one more. The quotient has less than 109 bits: a
        // bucket takes at least a millisecond to fill.
        let inflow = u128::from(elapsed) * u128::from(capacity) + u128::from(self.fraction);
        self.balance += (inflow / u128::from(refill_ns)) as i128;
        self.fraction = (inflow % u128::from(refill_ns)) as u64;
        if self.balance >= i128::from(capacity) {
            self.balance = i128::from(capacity);
            self.fraction = 0;
        }
    }

    /// How long until the device may go on, in nanoseconds; zero when it need not wait.
    fn wait(&mut self, now: u64) -> u64 {
        self.refill(now);
        if self.balance > 0 {
            return 0;
        }
        let Rate { capacity, refill_ns } = self.rate;
        let rest = u128::from(capacity) * u128::from(REST_NS) / u128::from(refill_ns);
        let target = rest.clamp(1, u128::from(capacity)) as i128;
        // At most one request's 64 bits below zero, and 47 bits of nanoseconds.
        let missing = (target - self.balance) as u128 * u128::from(refill_ns) - u128::from(self.fraction);
        u64::try_from(missing.div_ceil(u128::from(capacity))).unwrap_or(u64::MAX)
    }

    fn charge(&mut self, tokens: u64) {
        self.balance -= i128::from(tokens);
    }
}

/// Keeps a device within its limit.
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    timer: Timer,
    /// Whether the timer is set.
    resting: bool,
}

impl RateLimiter {
    /// A limiter without limit. When the device has to rest, the poller reports `token` as soon as it may go on.
    ///
    /// # Errors
    /// When the host refuses a timer.
    pub fn new(poller: &Poller, token: u64) -> io::Result<Self> {
        Ok(Self {
            bytes: None,
            operations: None,
            timer: Timer::new(poller, token)?,
            resting: false,
        })
    }

    /// Sets another limit, with full buckets.
    pub fn set(&mut self, limit: Limit) {
        let now = monotonic_ns();
        self.bytes = limit.bytes.map(|rate| Bucket::full(rate, now));
        self.operations = limit.operations.map(|rate| Bucket::full(rate, now));
        self.resting = false;
    }

    /// Whether the device may begin another operation now. If not, the timer is set.
    pub fn allows(&mut self) -> bool {
        if self.resting {
            return false;
        }
        if self.bytes.is_none() && self.operations.is_none() {
            return true;
        }
        let now = monotonic_ns();
        let buckets = [&mut self.bytes, &mut self.operations];
        let wait = buckets.into_iter().flatten().map(|bucket| bucket.wait(now)).max();
        match wait {
            None | Some(0) => true,
            Some(wait) => {
                self.timer.set(Duration::from_nanos(wait));
                self.resting = true;
                false
            }
        }
    }

    /// Charges the limiter with one operation that took so many bytes.
    pub fn charge(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.bytes {
            bucket.charge(bytes as u64);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.charge(1);
        }
    }

    /// The timer has been reported: the device has rested.
    pub fn rested(&mut self) {
        self.resting = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(capacity: u64, refill_ms: u64) -> Rate {
        Rate::try_from(TokenBucket { capacity, refill_ms }).unwrap()
    }

    /// Numbers that look random and are the same in every run (xorshift64).
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        /// Of any magnitude, small ones as often as large ones.
        fn any(&mut self) -> u64 {
            let bits = self.next() % 65;
            self.next().checked_shr((64 - bits) as u32).unwrap_or(0)
        }
    }

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_bucket_begins_full_and_never_holds_more() {
        let mut bucket = Bucket::full(rate(100, 1000), 5);
        for now in [5, 6, SECOND, 1000 * SECOND, u64::MAX] {
            assert_eq!(bucket.wait(now), 0);
            assert_eq!((bucket.balance, bucket.fraction), (100, 0));
        }
    }

    #[test]
    fn a_request_may_be_larger_than_the_bucket_and_is_paid_back() {
        let mut bucket = Bucket::full(rate(100, 1000), 0);
        assert_eq!(bucket.wait(0), 0);
        bucket.charge(1000);
        assert_eq!(bucket.balance, -900);
        // To have one again: 901 tokens at 100 per second.
        assert_eq!(bucket.wait(0), 9_010_000_000);
        assert_eq!(bucket.wait(9 * SECOND), 10_000_000);
        assert_eq!(bucket.wait(9_009_999_999), 1);
        assert_eq!(bucket.wait(9_010_000_000), 0);
        assert_eq!(bucket.balance, 1);
    }

    #[test]
    fn time_that_stands_still_or_goes_back_brings_nothing() {
        let mut bucket = Bucket::full(rate(10, 1), 1000);
        bucket.charge(10);
        for now in [1000, 1000, 999, 0] {
            assert!(bucket.wait(now) > 0);
            assert_eq!((bucket.balance, bucket.refilled), (0, 1000));
        }
    }

    #[test]
    fn a_device_that_is_out_of_tokens_rests_for_a_millisecond_of_them() {
        let mut bucket = Bucket::full(rate(1_000_000, 1000), 0);
        bucket.charge(1_000_000);
        assert_eq!(bucket.wait(0), REST_NS);
        // But not for more than the bucket holds, nor for less than one.
        let mut small = Bucket::full(rate(5, 1), 0);
        small.charge(5);
        assert_eq!(small.wait(0), NS_PER_MS);
        let mut slow = Bucket::full(rate(1, 10_000), 0);
        slow.charge(1);
        assert_eq!(slow.wait(0), 10 * SECOND);
    }

    #[test]
    fn nothing_is_lost_to_rounding() {
        // A third of a token per nanosecond and less, asked at every one of them.
        for (capacity, refill_ms) in [(1_000_000, 3), (7, 1), (333_333, 1), (999_999, 1)] {
            let mut bucket = Bucket::full(rate(capacity, refill_ms), 0);
            bucket.charge(2 * capacity);
            let end = refill_ms * NS_PER_MS;
            for now in (0..=end).step_by(7).chain([end]) {
                bucket.wait(now);
            }
            assert_eq!(
                (bucket.balance, bucket.fraction),
                (0, 0),
                "{capacity} in {refill_ms} ms"
            );
        }
    }

    #[test]
    fn the_wait_is_exactly_long_enough() {
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        for _ in 0..20_000 {
            let capacity = numbers.any().max(1);
            let rate = rate(capacity, numbers.any() % MAX_REFILL_MS + 1);
            let start = numbers.any() >> 1;
            let mut bucket = Bucket::full(rate, start);
            bucket.charge(numbers.any());
            bucket.charge(numbers.any() % 1000);
            let wait = bucket.wait(start);
            // A wait of centuries is cut off at the end of the clock.
            if wait == 0 || start.checked_add(wait).is_none_or(|end| end == u64::MAX) {
                continue;
            }
            let resting = (u128::from(capacity) * u128::from(REST_NS) / u128::from(rate.refill_ns))
                .clamp(1, u128::from(capacity)) as i128;
            let mut early = bucket.clone();
            early.refill(start + wait - 1);
            assert!(early.balance < resting, "{bucket:?} waits {wait} ns, too long");
            bucket.refill(start + wait);
            assert!(bucket.balance >= resting, "{bucket:?} waits {wait} ns, too short");
        }
    }

    #[test]
    fn over_any_time_no_more_passes_than_the_bucket_and_its_inflow() {
        let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
        for _ in 0..500 {
            let rate = rate(numbers.any().max(1), numbers.any() % 100_000 + 1);
            let mut bucket = Bucket::full(rate, 0);
            let (mut now, mut passed, mut largest) = (0_u64, 0_u128, 0_u128);
            for _ in 0..200 {
                now = now.saturating_add(numbers.any() % (10 * SECOND));
                if bucket.wait(now) == 0 {
                    let request = numbers.any();
                    bucket.charge(request);
                    passed += u128::from(request);
                    largest = largest.max(u128::from(request));
                }
                let inflow = u128::from(now) * u128::from(rate.capacity) / u128::from(rate.refill_ns);
                // The last request may be owed.
                assert!(
                    passed <= u128::from(rate.capacity) + inflow + largest,
                    "{bucket:?}"
                );
                assert!(bucket.balance <= i128::from(rate.capacity), "{bucket:?}");
                assert!(
                    u128::from(bucket.fraction) < u128::from(rate.refill_ns),
                    "{bucket:?}"
                );
            }
        }
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        for refill_ms in [1, MAX_REFILL_MS] {
            let mut bucket = Bucket::full(rate(u64::MAX, refill_ms), 0);
            bucket.charge(u64::MAX);
            bucket.charge(u64::MAX - 1);
            assert!(bucket.wait(0) > 0);
            bucket.fraction = bucket.rate.refill_ns - 1;
            assert_eq!(bucket.wait(u64::MAX), 0);
            assert_eq!(bucket.balance, i128::from(u64::MAX));
        }
        let mut slow = Bucket::full(rate(1, MAX_REFILL_MS), 0);
        slow.charge(u64::MAX);
        assert_eq!(slow.wait(0), u64::MAX, "as long as can be said");
    }

    #[test]
    fn limits_that_allow_nothing_are_refused() {
        let limit = |capacity, refill_ms| {
            let bucket = Some(TokenBucket { capacity, refill_ms });
            Limit::try_from(RateLimit {
                bytes: None,
                operations: bucket,
            })
        };
        assert_eq!(limit(0, 1000), Err(LimitError::Capacity));
        for refill_ms in [0, MAX_REFILL_MS + 1, u64::MAX] {
            assert_eq!(limit(1, refill_ms), Err(LimitError::Refill(refill_ms)));
        }
        assert!(limit(1, MAX_REFILL_MS).is_ok());
    }

    #[test]
    fn whichever_bucket_is_empty_holds_the_device_back_until_the_timer() {
        use crate::virtio::worker::{Events, Workers};
        let workers = Workers::new().unwrap();
        let poller = workers.poller().unwrap();
        let bucket = |capacity| {
            Some(TokenBucket {
                capacity,
                refill_ms: 20,
            })
        };
        for (bytes, operations, sizes) in [
            (bucket(100), None, vec![60, 60]),
            (None, bucket(2), vec![1 << 30, 0]),
            (bucket(1 << 40), bucket(1), vec![5]),
        ] {
            let limit = Limit::try_from(RateLimit { bytes, operations }).unwrap();
            let mut limiter = RateLimiter::new(&poller, 7).unwrap();
            limiter.set(limit);
            for size in sizes {
                assert!(limiter.allows());
                limiter.charge(size);
            }
            assert!(!limiter.allows());
            let mut events = Events::default();
            assert_eq!(poller.wait(&mut events, true).unwrap()[0].data(), 7);
            assert!(!limiter.allows(), "not before it has rested");
            limiter.rested();
            assert!(limiter.allows());
        }
        let mut free = RateLimiter::new(&poller, 8).unwrap();
        for _ in 0..1000 {
            assert!(free.allows());
            free.charge(usize::MAX);
        }
    }
}
