//! CPUs that come and go (Documentation/core-api/cpu_hotplug.rst).
//!
//! The kernel knows from boot which there can be, and starts those that it is told to. The first one always stays.

use std::io;
use std::path::Path;

use crate::error::Error;

/// Where the kernel has its CPUs.
pub const DIRECTORY: &str = "/sys/devices/system/cpu";

/// Puts CPUs online, the lowest numbers first, or offline, the highest first, until `count` are. Gives how many are.
///
/// # Errors
/// [`Error::Invalid`] when there cannot be so many, [`Error::Cpu`] when the kernel refuses one.
pub fn set_online(directory: &Path, count: u32) -> Result<u32, Error> {
    let online = numbers(&read(directory, "online")?);
    let present = numbers(&read(directory, "present")?);
    if count == 0 || count as usize > present.len() {
        return Err(Error::Invalid(format!(
            "{count} CPUs cannot be online: there are {}",
            present.len()
        )));
    }
    let missing = (count as usize).saturating_sub(online.len());
    let offline = present.iter().filter(|cpu| !online.contains(cpu));
    for cpu in offline.take(missing) {
        set(directory, *cpu, "1")?;
    }
    let surplus = online.len().saturating_sub(count as usize);
    for cpu in online.iter().rev().take(surplus) {
        set(directory, *cpu, "0")?;
    }
    Ok(count_of(&read(directory, "online")?))
}

/// How many CPUs are online.
#[must_use]
pub fn online() -> u32 {
    read(Path::new(DIRECTORY), "online").map_or(0, |list| count_of(&list))
}

fn count_of(list: &str) -> u32 {
    u32::try_from(numbers(list).len()).unwrap_or(u32::MAX)
}

fn read(directory: &Path, file: &str) -> Result<String, Error> {
    let path = directory.join(file);
    std::fs::read_to_string(&path).map_err(|source| Error::Cpu {
        what: format!("read {}", path.display()),
        source,
    })
}

fn set(directory: &Path, cpu: u32, value: &str) -> Result<(), Error> {
    std::fs::write(directory.join(format!("cpu{cpu}/online")), value).map_err(|source: io::Error| {
        Error::Cpu {
            what: format!(
                "put CPU {cpu} {}",
                if value == "1" { "online" } else { "offline" }
            ),
            source,
        }
    })
}

/// The numbers that a list like `0-3,5` names.
fn numbers(list: &str) -> Vec<u32> {
    list.trim()
        .split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?)
        })
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_counted() {
        assert_eq!(count_of("0\n"), 1);
        assert_eq!(count_of("0-3,5\n"), 5);
        assert_eq!(count_of(""), 0);
        assert_eq!(count_of("3-1"), 0);
    }

    #[test]
    fn the_lowest_go_online_first_and_the_highest_offline() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let file = |name: &str| std::fs::read_to_string(path.join(name)).unwrap_or_default();
        for cpu in 0..4 {
            std::fs::create_dir(path.join(format!("cpu{cpu}"))).unwrap();
        }
        std::fs::write(path.join("present"), "0-3\n").unwrap();
        std::fs::write(path.join("online"), "0\n").unwrap();
        set_online(path, 3).unwrap();
        assert_eq!(
            [0, 1, 2, 3].map(|cpu| file(&format!("cpu{cpu}/online"))),
            ["", "1", "1", ""]
        );
        std::fs::write(path.join("online"), "0-2\n").unwrap();
        assert_eq!(set_online(path, 3).unwrap(), 3);
        set_online(path, 1).unwrap();
        assert_eq!(
            [1, 2, 3].map(|cpu| file(&format!("cpu{cpu}/online"))),
            ["0", "0", ""]
        );
        for count in [0, 5] {
            assert!(matches!(set_online(path, count), Err(Error::Invalid(_))));
        }
    }

    #[test]
    fn a_cpu_that_does_not_come_is_named() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("present"), "0-1\n").unwrap();
        std::fs::write(directory.path().join("online"), "0\n").unwrap();
        let error = set_online(directory.path(), 2).unwrap_err();
        assert!(error.to_string().contains("CPU 1 online"), "{error}");
    }
}
