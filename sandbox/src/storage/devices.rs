//! The specification's devices: which block devices of the host a container gets as disks of the guest, and which
//! character devices a guest has of its own (config-linux.md, "Devices" and "Allowed Device list").
//!
//! A device is the container's when a rule allows exactly it: that is how `volumeDevices`, device plugins and
//! `--device` come. A privileged container that is given all devices of the host has no such rules; it gets all of the
//! guest's instead, and none of the host's.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use super::error::StorageError;
use super::plan::{HostStep, MountSource, Plan};

/// Major and minor number of a device.
pub type Number = (u32, u32);

/// Character devices that every Linux has under the same numbers, and the guest's kernel has (admin-guide/devices.txt):
/// null, zero, full, random, urandom, kmsg; terminals; tun, fuse, loop-control.
const GUEST_CHARACTERS: [Number; 12] = [
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (1, 11),
    (5, 0),
    (5, 1),
    (5, 2),
    (10, 200),
    (10, 229),
    (10, 237),
];

/// A block device of the host that the container knows by its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceDisk {
    /// Its number in the specification.
    pub number: Number,
    /// Which of the plan's disks it is.
    pub disk: usize,
}

impl Plan {
    /// Plans what the specification lists as devices.
    pub(super) fn add_devices(&mut self, spec: &Spec) -> Result<(), StorageError> {
        let Some(linux) = spec.linux() else {
            return Ok(());
        };
        let rules = rules(spec);
        for device in linux.devices().iter().flatten() {
            let (Ok(major), Ok(minor)) = (u32::try_from(device.major()), u32::try_from(device.minor()))
            else {
                // The agent says what is wrong with it.
                continue;
            };
            let number = (major, minor);
            match device.typ() {
                LinuxDeviceType::B if is_named(rules, LinuxDeviceType::B, number) => {
                    self.device(number, rules);
                }
                LinuxDeviceType::C | LinuxDeviceType::U
                    if is_named(rules, LinuxDeviceType::C, number) && !GUEST_CHARACTERS.contains(&number) =>
                {
                    return Err(refused(device, number));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A block device of the host at the container's path: its node, bind-mounted.
    pub(super) fn device_node(&mut self, number: Number, spec: &Spec) -> MountSource {
        MountSource::Block {
            disk: self.device(number, rules(spec)),
            part: 0,
            file_system: String::new(),
            devices: Vec::new(),
        }
    }

    /// Which of the plan's disks a device is: one, however often it is named.
    fn device(&mut self, number: Number, rules: &[LinuxDeviceCgroup]) -> usize {
        if let Some(known) = self.devices.iter().find(|known| known.number == number) {
            return known.disk;
        }
        let disk = self.disks();
        self.devices.push(DeviceDisk { number, disk });
        self.host.push(HostStep::Device {
            number,
            read_only: !may_write(rules, number),
        });
        disk
    }
}

fn rules(spec: &Spec) -> &[LinuxDeviceCgroup] {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default()
}

fn is_kind(rule: &LinuxDeviceCgroup, kind: LinuxDeviceType) -> bool {
    match rule.typ() {
        None | Some(LinuxDeviceType::A) => true,
        // `u` is a character device without a buffer.
        Some(LinuxDeviceType::U) => kind == LinuxDeviceType::C,
        Some(found) => found == kind,
    }
}

/// Whether a rule allows exactly this device.
fn is_named(rules: &[LinuxDeviceCgroup], kind: LinuxDeviceType, (major, minor): Number) -> bool {
    rules.iter().any(|rule| {
        rule.allow()
            && is_kind(rule, kind)
            && (rule.major(), rule.minor()) == (Some(i64::from(major)), Some(i64::from(minor)))
    })
}

/// Whether the rules allow writing to a block device. The last that says something about it counts.
fn may_write(rules: &[LinuxDeviceCgroup], (major, minor): Number) -> bool {
    let is =
        |wanted: Option<i64>, number: u32| matches!(wanted, None | Some(-1)) || wanted == Some(number.into());
    let about = |rule: &&LinuxDeviceCgroup| {
        is_kind(rule, LinuxDeviceType::B)
            && is(rule.major(), major)
            && is(rule.minor(), minor)
            && rule
                .access()
                .as_deref()
                .is_none_or(|access| access.is_empty() || access.contains('w'))
    };
    rules.iter().rfind(about).is_some_and(LinuxDeviceCgroup::allow)
}

fn refused(device: &LinuxDevice, (major, minor): Number) -> StorageError {
    StorageError::Device {
        path: device.path().clone(),
        number: format!("{major}:{minor}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Context, SourceInfo};

    fn planned(devices: &str, rules: &str) -> Result<Plan, StorageError> {
        let spec: Spec = serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.2.0","linux":{{"devices":[{devices}],"resources":{{"devices":[{rules}]}}}}}}"#
        ))
        .unwrap();
        let context = Context {
            container_id: "c1",
            bundle: std::path::Path::new("/b"),
            pod_shm: None,
        };
        let rootfs = crate::api::RootfsMount {
            kind: "ext4".into(),
            source: "/image".into(),
            target: String::new(),
            options: Vec::new(),
        };
        let nothing =
            |_: &std::path::Path| -> std::io::Result<SourceInfo> { unreachable!("no path is looked at") };
        Plan::new(context, &spec, &[rootfs], &nothing)
    }

    fn device(kind: &str, path: &str, (major, minor): Number) -> String {
        format!(r#"{{"type":"{kind}","path":"{path}","major":{major},"minor":{minor}}}"#)
    }

    fn allow(kind: &str, (major, minor): Number, access: &str) -> String {
        format!(r#"{{"allow":true,"type":"{kind}","major":{major},"minor":{minor},"access":"{access}"}}"#)
    }

    const NONE: &str = r#"{"allow":false,"access":"rwm"}"#;
    const ALL: &str = r#"{"allow":true,"access":"rwm"}"#;

    #[test]
    fn block_devices_that_a_rule_names_become_disks_one_for_each_number() {
        let devices = [
            device("b", "/dev/xvda", (8, 1)),
            device("b", "/dev/again", (8, 1)),
            device("b", "/dev/data", (253, 7)),
            device("c", "/dev/fuse", (10, 229)),
        ];
        let rules = [
            NONE.to_owned(),
            allow("b", (8, 1), "rwm"),
            allow("b", (253, 7), "r"),
            allow("c", (10, 229), "rwm"),
        ];
        let plan = planned(&devices.join(","), &rules.join(",")).unwrap();
        let step = |number, read_only| HostStep::Device { number, read_only };
        assert_eq!(plan.host[1..], [step((8, 1), false), step((253, 7), true)]);
        let disk = |number, disk| DeviceDisk { number, disk };
        // The root file system is the first disk.
        assert_eq!(plan.devices, [disk((8, 1), 1), disk((253, 7), 2)]);
    }

    #[test]
    fn all_devices_of_the_host_are_not_the_containers() {
        let devices = [device("b", "/dev/sda", (8, 0)), device("c", "/dev/snd", (116, 1))];
        let plan = planned(&devices.join(","), &[NONE, ALL].join(",")).unwrap();
        assert!(plan.devices.is_empty());
        assert_eq!(plan.host.len(), 1);
        // A rule that refuses it names it too.
        let refusal = r#"{"allow":false,"type":"b","major":8,"minor":0,"access":"rwm"}"#;
        assert!(planned(&devices[0], refusal).unwrap().devices.is_empty());
    }

    #[test]
    fn a_character_device_that_no_guest_has_is_refused_by_name() {
        let error = planned(&device("c", "/dev/kvm", (10, 232)), &allow("c", (10, 232), "rw")).unwrap_err();
        assert!(matches!(&error, StorageError::Device { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("/dev/kvm") && text.contains("10:232"), "{text}");
    }

    #[test]
    fn the_last_rule_about_writing_counts() {
        for (rules, expected) in [
            (vec![NONE.to_owned(), allow("b", (8, 1), "rw")], true),
            (vec![allow("b", (8, 1), "rw"), NONE.to_owned()], false),
            (vec![ALL.to_owned(), allow("b", (8, 1), "r")], true),
            (vec![allow("b", (8, 2), "rw")], false),
            (
                vec![r#"{"allow":true,"type":"b","major":8,"minor":-1}"#.to_owned()],
                true,
            ),
            (
                vec![r#"{"allow":true,"type":"c","access":"rwm"}"#.to_owned()],
                false,
            ),
        ] {
            let rules: Vec<LinuxDeviceCgroup> =
                serde_json::from_str(&format!("[{}]", rules.join(","))).unwrap();
            assert_eq!(may_write(&rules, (8, 1)), expected, "{rules:?}");
        }
    }
}
