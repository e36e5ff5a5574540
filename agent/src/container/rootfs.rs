//! The container's root file system as steps: devices, links, hidden and read-only paths. Pure.

use std::ffi::CString;

use rustix::fs::{FileType, makedev};

use super::child::{Device, Step};
use super::mount::{self, FileSystem};
use super::spec::{self, SpecError};

/// config-linux.md, "Default Devices": path below /dev, major, minor.
const DEFAULT_DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// The mode of a device that does not name one.
const DEVICE_MODE: u32 = 0o666;

/// Device nodes and links of /dev. With a /dev of somebody else's, nothing is put there.
///
/// # Errors
/// [`SpecError`] with the device.
pub fn devices(linux: &spec::Linux, foreign_dev: bool) -> Result<Vec<Step>, SpecError> {
    let mut steps = Vec::new();
    if foreign_dev {
        return Ok(steps);
    }
    for (name, major, minor) in DEFAULT_DEVICES {
        if !linux
            .devices
            .iter()
            .any(|device| device.path == format!("/dev/{name}"))
        {
            steps.push(Step::Device(Device {
                directory: c"/dev".into(),
                name: c_string("linux.devices", name)?,
                file_type: FileType::CharacterDevice,
                mode: DEVICE_MODE,
                number: makedev(major, minor),
                uid: 0,
                gid: 0,
            }));
        }
    }
    for (index, device) in linux.devices.iter().enumerate() {
        steps.push(Step::Device(parse_device(index, device)?));
    }
    for (content, path) in [
        (c"/proc/self/fd", c"/dev/fd"),
        (c"/proc/self/fd/0", c"/dev/stdin"),
        (c"/proc/self/fd/1", c"/dev/stdout"),
        (c"/proc/self/fd/2", c"/dev/stderr"),
        (c"pts/ptmx", c"/dev/ptmx"),
    ] {
        steps.push(Step::Link { content, path });
    }
    Ok(steps)
}

fn parse_device(index: usize, device: &spec::Device) -> Result<Device, SpecError> {
    let member = |name: &str| format!("linux.devices[{index}].{name}");
    let file_type = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        other => {
            return Err(SpecError::invalid(
                member("type"),
                format!("{other:?} is not one of c, b, u, p"),
            ));
        }
    };
    let (directory, name) = device
        .path
        .rsplit_once('/')
        .filter(|(directory, name)| {
            device.path.starts_with('/')
                && !matches!(*name, "" | "." | "..")
                && !directory.split('/').any(|part| part == "..")
        })
        .ok_or_else(|| {
            SpecError::invalid(
                member("path"),
                format!("{:?} is not an absolute path of a file", device.path),
            )
        })?;
    let number = |name: &str, number: i64| {
        u32::try_from(number)
            .map_err(|_| SpecError::invalid(member(name), format!("{number} is no device number")))
    };
    Ok(Device {
        directory: c_string(&member("path"), directory)?,
        name: c_string(&member("path"), name)?,
        file_type,
        mode: device.file_mode.map_or(DEVICE_MODE, |mode| mode & 0o777),
        number: if file_type == FileType::Fifo {
            0
        } else {
            makedev(number("major", device.major)?, number("minor", device.minor)?)
        },
        uid: device.uid.unwrap_or(0),
        gid: device.gid.unwrap_or(0),
    })
}

/// Read-only and hidden paths, and the root's own attributes.
///
/// # Errors
/// [`SpecError`] with the member.
pub fn protection(linux: &spec::Linux, read_only_root: bool) -> Result<Vec<Step>, SpecError> {
    let mut steps = Vec::new();
    for (index, path) in linux.readonly_paths.iter().enumerate() {
        steps.push(Step::ReadOnly(absolute(
            &format!("linux.readonlyPaths[{index}]"),
            path,
        )?));
    }
    for (index, path) in linux.masked_paths.iter().enumerate() {
        steps.push(Step::Mask {
            path: absolute(&format!("linux.maskedPaths[{index}]"), path)?,
            cover: FileSystem {
                kind: c"tmpfs".into(),
                source: c"tmpfs".into(),
                options: mount::Options {
                    attributes: mount::Attributes::READ_ONLY,
                    ..mount::Options::default()
                },
            },
        });
    }
    if read_only_root {
        steps.push(Step::ReadOnlyRoot);
    }
    if !linux.rootfs_propagation.is_empty() {
        let propagation = mount::propagation(&linux.rootfs_propagation).ok_or_else(|| {
            SpecError::invalid(
                "linux.rootfsPropagation",
                format!(
                    "{:?} is not one of private, slave, shared, unbindable",
                    linux.rootfs_propagation
                ),
            )
        })?;
        steps.push(Step::RootPropagation(propagation));
    }
    Ok(steps)
}

/// Whether something is bind-mounted at /dev: then its content is nobody's business here.
#[must_use]
pub fn has_foreign_dev(mounts: &[protocol::agent::Mount]) -> bool {
    use protocol::agent::mount::Source;
    mounts.iter().any(|mount| {
        mount.target.trim_end_matches('/') == "/dev"
            && matches!(
                mount.source,
                Some(Source::Share(_) | Source::Guest(_) | Source::Volume(_))
            )
    })
}

fn absolute(member: &str, path: &str) -> Result<CString, SpecError> {
    if !path.starts_with('/') {
        return Err(SpecError::invalid(
            member,
            format!("{path:?} is not an absolute path"),
        ));
    }
    c_string(member, path)
}

/// A string for the kernel.
///
/// # Errors
/// [`SpecError::Invalid`] for a zero byte.
pub fn c_string(member: &str, text: &str) -> Result<CString, SpecError> {
    CString::new(text).map_err(|_| SpecError::invalid(member, "contains a zero byte"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(json: &str) -> spec::Linux {
        serde_json::from_str(json).unwrap()
    }

    fn numbers(steps: &[Step]) -> Vec<(String, u64)> {
        steps
            .iter()
            .filter_map(|step| match step {
                Step::Device(device) => Some((device.name.to_string_lossy().into_owned(), device.number)),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn default_devices_give_way_to_those_of_the_specification() {
        let steps = devices(
            &linux(
                r#"{"devices":[{"type":"c","path":"/dev/null","major":1,"minor":5,"fileMode":438},
                               {"type":"b","path":"/dev/data/disk","major":254,"minor":16,"fileMode":33200,"uid":7}]}"#,
            ),
            false,
        )
        .unwrap();
        let numbers = numbers(&steps);
        assert_eq!(numbers.len(), 7);
        assert_eq!(numbers.iter().filter(|(name, _)| name == "null").count(), 1);
        assert!(numbers.contains(&("null".into(), makedev(1, 5))));
        assert!(steps.iter().any(|step| matches!(step, Step::Device(device)
            if device.directory.as_c_str() == c"/dev/data" && device.mode == 0o660 && device.uid == 7)));
        assert!(devices(&linux("{}"), true).unwrap().is_empty());
    }

    #[test]
    fn malformed_devices_and_paths_are_refused_by_member() {
        for (json, member) in [
            (
                r#"{"devices":[{"type":"x","path":"/dev/a"}]}"#,
                "linux.devices[0].type",
            ),
            (
                r#"{"devices":[{"type":"c","path":"dev/a"}]}"#,
                "linux.devices[0].path",
            ),
            (
                r#"{"devices":[{"type":"c","path":"/dev/../a"}]}"#,
                "linux.devices[0].path",
            ),
            (
                r#"{"devices":[{"type":"c","path":"/dev/a","major":-1}]}"#,
                "linux.devices[0].major",
            ),
        ] {
            let error = devices(&linux(json), false).unwrap_err().to_string();
            assert!(error.starts_with(member), "{error}");
        }
        for (json, member) in [
            (r#"{"maskedPaths":["/a","b"]}"#, "linux.maskedPaths[1]"),
            (r#"{"readonlyPaths":["a"]}"#, "linux.readonlyPaths[0]"),
            (r#"{"rootfsPropagation":"open"}"#, "linux.rootfsPropagation"),
        ] {
            let error = protection(&linux(json), false).unwrap_err().to_string();
            assert!(error.starts_with(member), "{error}");
        }
    }
}
