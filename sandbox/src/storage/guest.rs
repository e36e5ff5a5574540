//! The guest's half of a plan in the agent's words (agent.proto).

use protocol::agent;

use super::devices::DeviceDisk;
use super::disk::DiskName;
use super::plan::{Directory, GuestMount, MemoryVolume, MountSource, Plan};
use super::probe::Owner;

impl Plan {
    /// The root file system's mounts in the agent's words. `disks[n]` is the n-th disk.
    #[must_use]
    pub fn agent_rootfs(&self, disks: &[DiskName]) -> Vec<agent::Mount> {
        self.rootfs.iter().map(|mount| mount.to_agent(disks)).collect()
    }

    /// The container's mounts in the agent's words. `disks[n]` is the n-th disk.
    #[must_use]
    pub fn agent_mounts(&self, disks: &[DiskName]) -> Vec<agent::Mount> {
        self.mounts.iter().map(|mount| mount.to_agent(disks)).collect()
    }

    /// The pod's volumes in memory in the agent's words.
    #[must_use]
    pub fn agent_volumes(&self) -> Vec<agent::Volume> {
        let to_agent = |volume: &MemoryVolume| {
            let mut empty = agent::EmptyVolume::new();
            empty.size_bytes = volume.bytes;
            empty.huge_page_bytes = volume.huge_page_bytes;
            empty.root = Some(volume.root.to_agent()).into();
            let mut wanted = agent::Volume::new();
            wanted.name.clone_from(&volume.name);
            wanted.content = Some(agent::volume::Content::Empty(empty));
            wanted
        };
        self.volumes.iter().map(to_agent).collect()
    }

    /// The block devices that the specification names by number. `disks[n]` is the n-th disk.
    #[must_use]
    pub fn agent_disks(&self, disks: &[DiskName]) -> Vec<agent::DeviceDisk> {
        let to_agent = |device: &DeviceDisk| agent::DeviceDisk {
            serial: disks
                .get(device.disk)
                .map(|disk| disk.serial.clone())
                .unwrap_or_default(),
            major: device.number.0,
            minor: device.number.1,
            ..Default::default()
        };
        self.devices.iter().map(to_agent).collect()
    }
}

impl GuestMount {
    fn to_agent(&self, disks: &[DiskName]) -> agent::Mount {
        use agent::mount::Source;
        let mut mount = agent::Mount::new();
        mount.source = Some(match &self.source {
            MountSource::Share { name, path } => Source::Share(agent::ShareSource {
                name: name.clone(),
                path: path.clone(),
                ..Default::default()
            }),
            MountSource::Block {
                disk,
                part,
                file_system,
                devices,
            } => Source::Block(block_source(disks.get(*disk), *part, file_system, devices)),
            MountSource::Kernel { file_system } => Source::Kernel(agent::KernelSource {
                file_system: file_system.clone(),
                ..Default::default()
            }),
            MountSource::Volume {
                name,
                path,
                directory,
            } => Source::Volume(agent::VolumeSource {
                name: name.clone(),
                path: path.clone(),
                directory: directory.map(Owner::to_agent).into(),
                ..Default::default()
            }),
            MountSource::Guest { path } => Source::Guest(agent::GuestSource {
                path: path.clone(),
                ..Default::default()
            }),
        });
        mount.target.clone_from(&self.target);
        mount.options.clone_from(&self.options);
        mount.directories = self.directories.iter().map(Directory::to_agent).collect();
        mount
    }
}

impl Owner {
    pub(super) fn to_agent(self) -> agent::Owner {
        agent::Owner {
            uid: self.uid,
            gid: self.gid,
            mode: self.mode,
            ..Default::default()
        }
    }
}

impl Directory {
    fn to_agent(&self) -> agent::Directory {
        agent::Directory {
            path: self.path.clone(),
            owner: Some(self.owner.to_agent()).into(),
            ..Default::default()
        }
    }
}

/// A disk of one part has no partition.
fn block_source(
    disk: Option<&DiskName>,
    part: usize,
    file_system: &str,
    devices: &[usize],
) -> agent::BlockSource {
    let mut source = agent::BlockSource {
        file_system: file_system.to_owned(),
        ..Default::default()
    };
    let Some(disk) = disk else { return source };
    source.serial.clone_from(&disk.serial);
    if disk.parts.len() > 1 {
        let place = |index: usize| {
            let (offset, length) = disk.parts.get(index).copied().unwrap_or_default();
            agent::DiskPart {
                offset,
                length,
                ..Default::default()
            }
        };
        source.part = Some(place(part)).into();
        source.devices = devices.iter().copied().map(place).collect();
    }
    source
}
