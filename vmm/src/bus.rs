//! Who answers which guest-physical address. I/O ports are in [`ports`](crate::ports).
//!
//! The map is fixed when the machine is built, so vCPUs look it up without a lock.

use std::sync::Arc;

/// Registers in guest-physical address space. Called by vCPU threads, hence `&self`.
pub trait MmioDevice: Send + Sync {
    /// Reads at `offset` from the device's base. `data` comes filled with ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes at `offset` from the device's base.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices claim the same address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("two devices claim the guest-physical address {0:#x}")]
pub struct Overlap(pub u64);

/// The address map.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `base`, without overlap.
    claims: Vec<Claim>,
}

struct Claim {
    base: u64,
    len: u64,
    device: Arc<dyn MmioDevice>,
}

impl Bus {
    /// Gives `len` bytes from `base` to `device`.
    ///
    /// # Errors
    /// [`Overlap`] when some of it is taken.
    pub fn claim(&mut self, base: u64, len: u64, device: Arc<dyn MmioDevice>) -> Result<(), Overlap> {
        let position = self.claims.partition_point(|claim| claim.base < base);
        let overlaps_previous = position
            .checked_sub(1)
            .is_some_and(|previous| base - self.claims[previous].base < self.claims[previous].len);
        if overlaps_previous {
            return Err(Overlap(base));
        }
        if let Some(next) = self.claims.get(position)
            && next.base - base < len
        {
            return Err(Overlap(next.base));
        }
        self.claims.insert(position, Claim { base, len, device });
        Ok(())
    }

    /// A guest's read. Addresses that nobody claims read as ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// A guest's write. Lost where nobody claims the address.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn MmioDevice, u64)> {
        let after = self.claims.partition_point(|claim| claim.base <= address);
        let claim = self.claims.get(after.checked_sub(1)?)?;
        let offset = address - claim.base;
        (offset < claim.len).then(|| (&*claim.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Echo(u8, Mutex<Vec<u64>>);

    impl Echo {
        fn new(value: u8) -> Arc<Self> {
            Arc::new(Self(value, Mutex::default()))
        }
    }

    impl MmioDevice for Echo {
        fn read(&self, _offset: u64, data: &mut [u8]) {
            data[0] = self.0;
        }
        fn write(&self, offset: u64, _data: &[u8]) {
            self.1.lock().unwrap().push(offset);
        }
    }

    #[test]
    fn each_address_reaches_its_device_and_no_other() {
        let mut bus = Bus::default();
        let (low, high) = (Echo::new(1), Echo::new(2));
        bus.claim(0x2000, 0x1000, high.clone()).unwrap();
        bus.claim(0x1000, 0x1000, low.clone()).unwrap();
        for (address, expected) in [
            (0xfff, 0xff),
            (0x1000, 1),
            (0x1fff, 1),
            (0x2000, 2),
            (0x2fff, 2),
            (0x3000, 0xff),
            (u64::MAX, 0xff),
        ] {
            let mut byte = [0];
            bus.read(address, &mut byte);
            assert_eq!(byte[0], expected, "{address:#x}");
            bus.write(address, &byte);
        }
        assert_eq!(*low.1.lock().unwrap(), [0, 0xfff]);
        assert_eq!(*high.1.lock().unwrap(), [0, 0xfff]);
    }

    #[test]
    fn overlapping_claims_are_refused() {
        let mut bus = Bus::default();
        bus.claim(0x1000, 0x1000, Echo::new(1)).unwrap();
        assert_eq!(bus.claim(0x1fff, 1, Echo::new(2)), Err(Overlap(0x1fff)));
        assert_eq!(bus.claim(0xfff, 2, Echo::new(2)), Err(Overlap(0x1000)));
        assert_eq!(bus.claim(0x1000, 1, Echo::new(2)), Err(Overlap(0x1000)));
        bus.claim(0x2000, 1, Echo::new(2)).unwrap();
    }
}
