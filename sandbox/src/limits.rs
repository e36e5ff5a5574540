//! How much a VM's devices may do in a second, as the configuration says it. The VMM keeps the limits.

use protocol::vmm::{RateLimit, TokenBucket};
use serde::{Deserialize, Deserializer, de};

/// The most that a limit may be; nothing is faster.
const MOST_PER_SECOND: u64 = 1_000_000_000_000;
/// A device may save up what it does not use for so long.
const SAVED_MS: u64 = 1000;

/// A limit for each device of a kind. Without members it is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DeviceLimit {
    #[serde(deserialize_with = "per_second")]
    bytes_per_s: Option<u64>,
    #[serde(deserialize_with = "per_second")]
    operations_per_s: Option<u64>,
}

/// The limits of all kinds of devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceLimits {
    pub block: DeviceLimit,
    /// What the guest receives.
    pub net_rx: DeviceLimit,
    /// What it sends.
    pub net_tx: DeviceLimit,
}

impl DeviceLimit {
    /// As the VMM understands it; `None` is no limit.
    #[must_use]
    pub fn rate_limit(self) -> Option<RateLimit> {
        let bucket = |per_second: Option<u64>| {
            per_second.map(|capacity| TokenBucket {
                capacity,
                refill_ms: SAVED_MS,
            })
        };
        (self != Self::default()).then(|| RateLimit {
            bytes: bucket(self.bytes_per_s),
            operations: bucket(self.operations_per_s),
        })
    }
}

fn per_second<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let value = i64::deserialize(deserializer)?;
    match u64::try_from(value) {
        Ok(value @ 1..=MOST_PER_SECOND) => Ok(Some(value)),
        _ => Err(de::Error::custom(format_args!(
            "{value} is out of range: give a number from 1 to {MOST_PER_SECOND}, or leave the limit out"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DeviceLimit, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| error.message().to_owned())
    }

    #[test]
    fn a_limit_without_members_is_none() {
        assert_eq!(parse("").unwrap().rate_limit(), None);
    }

    #[test]
    fn each_member_is_a_bucket_that_a_second_fills() {
        let limit = parse("bytes_per_s = 12500000").unwrap().rate_limit().unwrap();
        let bucket = |capacity| {
            Some(TokenBucket {
                capacity,
                refill_ms: 1000,
            })
        };
        assert_eq!((limit.bytes, limit.operations), (bucket(12_500_000), None));
        let limit = parse("operations_per_s = 1\nbytes_per_s = 1000000000000").unwrap();
        let limit = limit.rate_limit().unwrap();
        assert_eq!(
            (limit.bytes, limit.operations),
            (bucket(MOST_PER_SECOND), bucket(1))
        );
    }

    #[test]
    fn what_is_no_limit_is_refused_by_name() {
        for value in ["0", "-1", "1000000000001"] {
            let error = parse(&format!("bytes_per_s = {value}")).unwrap_err();
            assert!(error.contains(&format!("{value} is out of range")), "{error}");
        }
        let error = parse("bytes_per_second = 1").unwrap_err();
        assert!(
            error.contains("bytes_per_second") && error.contains("`bytes_per_s`"),
            "{error}"
        );
    }
}
