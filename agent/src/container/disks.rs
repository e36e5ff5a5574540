//! Numbers of block devices: the specification has the host's, and here each disk has one of its own.

use protocol::agent::DeviceDisk;

use super::spec::{DeviceRule, Linux, Resources};
use crate::storage::{StorageError, device_number};

/// A device's major and minor number.
type Number = (u32, u32);

/// What stands for what.
#[derive(Clone, Debug, Default)]
pub struct Numbers(Vec<(Number, Number)>);

impl Numbers {
    /// Finds the disks; waits for those that are yet to come.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn find(disks: &[DeviceDisk]) -> Result<Self, StorageError> {
        let find = |disk: &DeviceDisk| Ok(((disk.major, disk.minor), device_number(&disk.serial)?));
        Ok(Self(disks.iter().map(find).collect::<Result<_, _>>()?))
    }

    fn of(&self, major: i64, minor: i64) -> Option<Number> {
        let number = (u32::try_from(major).ok()?, u32::try_from(minor).ok()?);
        self.0
            .iter()
            .find(|(spec, _)| *spec == number)
            .map(|(_, own)| *own)
    }

    /// Puts the disks' numbers into a specification.
    pub fn apply(&self, linux: &mut Linux) {
        linux.devices.retain_mut(|device| {
            if device.kind != "b" {
                return true;
            }
            let own = self.of(device.major, device.minor);
            if let Some((major, minor)) = own {
                (device.major, device.minor) = (major.into(), minor.into());
            }
            own.is_some()
        });
        if let Some(resources) = &mut linux.resources {
            self.apply_to_rules(resources);
        }
    }

    /// Puts the disks' numbers into a device list.
    pub fn apply_to_rules(&self, resources: &mut Resources) {
        resources.devices.retain_mut(|rule: &mut DeviceRule| {
            let ("b", Some(major @ 0..), Some(minor @ 0..)) = (rule.kind.as_str(), rule.major, rule.minor)
            else {
                return true;
            };
            let own = self.of(major, minor);
            if let Some((major, minor)) = own {
                (rule.major, rule.minor) = (Some(major.into()), Some(minor.into()));
            }
            own.is_some()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_devices_get_their_own_numbers_and_others_are_left_out() {
        let mut linux: Linux = serde_json::from_str(
            r#"{"devices":[{"type":"b","path":"/dev/xvda","major":8,"minor":1,"fileMode":432,"uid":7},
                           {"type":"b","path":"/dev/sdb","major":254,"minor":16},
                           {"type":"c","path":"/dev/fuse","major":10,"minor":229}],
                "resources":{"devices":[{"allow":false,"access":"rwm"},
                                        {"allow":true,"type":"b","major":8,"minor":1,"access":"r"},
                                        {"allow":true,"type":"b","major":254,"minor":16,"access":"rw"},
                                        {"allow":true,"type":"b","major":8,"minor":-1,"access":"m"},
                                        {"allow":true,"type":"c","major":8,"minor":1,"access":"rw"}]}}"#,
        )
        .unwrap();
        Numbers(vec![((8, 1), (254, 32))]).apply(&mut linux);
        let devices: Vec<_> = linux
            .devices
            .iter()
            .map(|d| (d.path.as_str(), d.major, d.minor))
            .collect();
        assert_eq!(devices, [("/dev/xvda", 254, 32), ("/dev/fuse", 10, 229)]);
        assert_eq!(linux.devices[0].uid, Some(7));
        let rules = linux.resources.unwrap().devices;
        let numbers: Vec<_> = rules
            .iter()
            .map(|rule| (rule.kind.as_str(), rule.major, rule.minor))
            .collect();
        assert_eq!(
            numbers,
            [
                ("", None, None),
                ("b", Some(254), Some(32)),
                ("b", Some(8), Some(-1)),
                ("c", Some(8), Some(1)),
            ]
        );
    }
}
