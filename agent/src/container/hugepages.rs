//! Huge pages: the kernel sets them aside when a container comes that may use them, and gives them back when it goes
//! (Documentation/admin-guide/mm/hugetlbpage.rst). As many as its limits say: Kubernetes has limits that are requests.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::spec::HugepageLimit;

/// Where the kernel has a directory for each size.
const SIZES: &str = "/sys/kernel/mm/hugepages";
/// How many pages there shall be, of all containers.
const COUNT: &str = "nr_hugepages";

/// Why there are no huge pages.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    /// Words that are no size.
    #[error("linux.resources.hugepageLimits: {0:?} is no page size: write it as 2MB or 1GB")]
    Size(String),
    /// A size that the guest's CPU does not have.
    #[error("the guest has no pages of {0}: use another size (it has {1})")]
    Unknown(String, String),
    /// Not enough memory in large enough pieces.
    #[error(
        "the guest has memory for {got} of {wanted} pages of {size}: give the VM more memory (the container's limit, or \
         default_memory_mib)"
    )]
    Short {
        /// The pages' size.
        size: String,
        /// How many are wanted.
        wanted: u64,
        /// How many there could be.
        got: u64,
    },
    /// The kernel refuses.
    #[error("{path}: {source}")]
    Kernel {
        /// What was read or written.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Counts are read, changed and written by one container at a time.
static COUNTS: Mutex<()> = Mutex::new(());

/// Pages that are set aside as long as this lives.
#[derive(Debug, Default)]
pub struct Reserved(Vec<(PathBuf, u64)>);

impl Reserved {
    /// Has pages set aside for these limits.
    ///
    /// # Errors
    /// [`HugePagesError`]; nothing is set aside then.
    pub fn new(limits: &[HugepageLimit]) -> Result<Self, HugePagesError> {
        Self::below(Path::new(SIZES), limits)
    }

    fn below(sizes: &Path, limits: &[HugepageLimit]) -> Result<Self, HugePagesError> {
        let mut reserved = Self::default();
        for limit in limits {
            // Somebody's way of saying that there is none.
            if limit.limit == 0 || limit.limit >= 1 << 62 {
                continue;
            }
            let size =
                bytes(&limit.page_size).ok_or_else(|| HugePagesError::Size(limit.page_size.clone()))?;
            let directory = sizes.join(format!("hugepages-{}kB", size >> 10));
            if !directory.is_dir() {
                return Err(HugePagesError::Unknown(limit.page_size.clone(), known(sizes)));
            }
            let wanted = limit.limit.div_ceil(size);
            let path = directory.join(COUNT);
            let _one_at_a_time = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
            let before = read(&path)?;
            write(&path, before.saturating_add(wanted))?;
            let got = read(&path)?.saturating_sub(before);
            if got < wanted {
                write(&path, before)?;
                return Err(HugePagesError::Short {
                    size: limit.page_size.clone(),
                    wanted,
                    got,
                });
            }
            reserved.0.push((path, wanted));
        }
        Ok(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _one_at_a_time = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
        for (path, count) in &self.0 {
            // Pages that a volume of the pod still holds go when it lets go of them. What the kernel does not take back
            // is lost to the guest only.
            let _ = read(path).and_then(|now| write(path, now.saturating_sub(*count)));
        }
    }
}

/// `2MB`, as the cgroup's files are called (mm/hugetlb_cgroup.c).
fn bytes(text: &str) -> Option<u64> {
    let digits = text.len()
        - text
            .trim_start_matches(|character: char| character.is_ascii_digit())
            .len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "KB" => 10,
        "MB" => 20,
        "GB" => 30,
        _ => return None,
    };
    number
        .parse::<u64>()
        .ok()?
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes != 0)
}

/// The sizes there are, for messages.
fn known(sizes: &Path) -> String {
    let mut names: Vec<String> = std::fs::read_dir(sizes)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("hugepages-")?.to_owned()))
        .collect();
    names.sort();
    if names.is_empty() {
        "none".into()
    } else {
        names.join(", ")
    }
}

fn read(path: &Path) -> Result<u64, HugePagesError> {
    let failed = |source| HugePagesError::Kernel {
        path: path.to_owned(),
        source,
    };
    let text = std::fs::read_to_string(path).map_err(failed)?;
    text.trim()
        .parse()
        .map_err(|_| failed(io::ErrorKind::InvalidData.into()))
}

fn write(path: &Path, count: u64) -> Result<(), HugePagesError> {
    std::fs::write(path, count.to_string()).map_err(|source| HugePagesError::Kernel {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(page_size: &str, limit: u64) -> HugepageLimit {
        HugepageLimit {
            page_size: page_size.into(),
            limit,
        }
    }

    #[test]
    fn pages_are_set_aside_and_given_back() {
        let sizes = tempfile::tempdir().unwrap();
        let count = sizes.path().join("hugepages-2048kB").join(COUNT);
        std::fs::create_dir(count.parent().unwrap()).unwrap();
        std::fs::write(&count, "1\n").unwrap();
        let now = || read(&count).unwrap();
        let below = |limits: &[HugepageLimit]| Reserved::below(sizes.path(), limits);
        let first = below(&[limit("2MB", 4 << 20), limit("1GB", 0)]).unwrap();
        let second = below(&[limit("2MB", 1)]).unwrap();
        assert_eq!(now(), 4);
        drop(first);
        assert_eq!(now(), 2);
        drop(second);
        assert_eq!(now(), 1);
        assert_eq!(below(&[limit("2MB", u64::MAX / 2)]).unwrap().0.len(), 0);
        let error = below(&[limit("2MB", 2 << 20), limit("1GB", 1 << 30)]).unwrap_err();
        assert!(
            error.to_string().contains("no pages of 1GB") && error.to_string().contains("2048kB"),
            "{error}"
        );
        assert_eq!(now(), 1, "nothing is kept after a failure");
        for bad in ["2M", "MB", "0MB", "99999999999999GB", ""] {
            assert!(
                matches!(below(&[limit(bad, 1)]), Err(HugePagesError::Size(_))),
                "{bad}"
            );
        }
    }
}
