//! Network devices that no interface has been put on yet. The host gives a VM one to spare for an interface that comes
//! late; containers shall not see it before. A device without its driver is not seen (sysfs, `drivers/*/unbind`).

use std::path::Path;

/// Where virtio's network driver lets go of devices and takes them.
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";

/// The devices that have no driver for now.
#[derive(Debug, Default)]
pub struct Parked {
    /// Off where the devices are not the guest's: in tests, which run on somebody's machine.
    on: bool,
    /// As the bus names them.
    devices: Vec<String>,
}

impl Parked {
    /// None yet, of a guest.
    pub fn of_guest() -> Self {
        Self {
            on: true,
            devices: Vec::new(),
        }
    }

    /// Takes the interface away if it is one of virtio's. One that cannot be taken stays, and is down.
    pub fn park(&mut self, interface: &str) {
        if !self.on {
            return;
        }
        let device = Path::new("/sys/class/net").join(interface).join("device");
        // Bridges, tunnels and the like have no device.
        let Some(device) = std::fs::canonicalize(device).ok() else {
            return;
        };
        let Some(name) = device.file_name().and_then(|name| name.to_str()) else {
            return;
        };
        if std::fs::write(format!("{DRIVER}/unbind"), name).is_ok() {
            self.devices.push(name.to_owned());
        }
    }

    /// Brings all of them back; whether there were any.
    pub fn fetch(&mut self) -> bool {
        let parked = std::mem::take(&mut self.devices);
        for name in &parked {
            // The device's interface is missing then, which the caller finds out.
            let _ = std::fs::write(format!("{DRIVER}/bind"), name);
        }
        !parked.is_empty()
    }
}
