//! Block devices that the containers of a pod have in common: one disk for all that name the same device, so that the
//! guest has one cache of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::OnceCell;

use crate::pod::lock;
use crate::storage::Disk;
use crate::vm::{AttachedBlock, Vm, VmError};

/// A device's number on the host, and whether it is read only: who may write has a disk of its own.
type Key = ((u32, u32), bool);

/// The disks that are in common.
#[derive(Debug, Default)]
pub(crate) struct Disks(Mutex<HashMap<Key, Entry>>);

#[derive(Debug, Default)]
struct Entry {
    users: usize,
    /// Filled once the VM has it.
    attached: Arc<OnceCell<AttachedBlock>>,
}

/// A disk that a container uses.
#[derive(Debug)]
pub(crate) struct UsedDisk {
    pub block: AttachedBlock,
    /// Its key in the pool, if it is there.
    pooled: Option<Key>,
}

impl Disks {
    /// Attaches a disk, unless it is a device that another container has already brought.
    pub async fn attach(&self, vm: &Vm, disk: &Disk) -> Result<UsedDisk, VmError> {
        let Some(number) = disk.device else {
            let block = vm.attach_disk(disk).await?;
            return Ok(UsedDisk { block, pooled: None });
        };
        let key = (number, disk.parts.iter().all(|part| part.read_only));
        let attached = self.enter(key);
        match attached.get_or_try_init(|| vm.attach_disk(disk)).await {
            Ok(block) => Ok(UsedDisk {
                block: block.clone(),
                pooled: Some(key),
            }),
            Err(error) => {
                self.leave(key);
                Err(error)
            }
        }
    }

    /// Detaches a disk with its last user.
    pub async fn detach(&self, vm: &Vm, disk: &UsedDisk) -> Result<(), VmError> {
        match disk.pooled {
            Some(key) if !self.leave(key) => Ok(()),
            _ => vm.detach_block(&disk.block).await,
        }
    }

    fn enter(&self, key: Key) -> Arc<OnceCell<AttachedBlock>> {
        let mut pool = lock(&self.0);
        let entry = pool.entry(key).or_default();
        entry.users += 1;
        Arc::clone(&entry.attached)
    }

    /// Whether that was the last user.
    fn leave(&self, key: Key) -> bool {
        let mut pool = lock(&self.0);
        match pool.get_mut(&key) {
            Some(entry) if entry.users > 1 => {
                entry.users -= 1;
                false
            }
            _ => pool.remove(&key).is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_stays_until_its_last_user_leaves() {
        let disks = Disks::default();
        let cell = disks.enter(((8, 1), false));
        assert!(Arc::ptr_eq(&cell, &disks.enter(((8, 1), false))));
        assert!(!Arc::ptr_eq(&cell, &disks.enter(((8, 1), true))));
        assert!(!disks.leave(((8, 1), false)));
        assert!(disks.leave(((8, 1), false)));
        assert!(!Arc::ptr_eq(&cell, &disks.enter(((8, 1), false))));
    }
}
