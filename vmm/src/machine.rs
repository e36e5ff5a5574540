//! One machine: built from its description, started, paused, resumed, ended.
//!
//! KVM makes the VM on a thread of its own while this one jails the process, maps memory and loads the
//! kernel. Nothing of the guest runs before [`Machine::boot`].

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use protocol::vmm::{FailureKind, FdIndex, VmConfig};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::{cpuid, layout, registers};
use crate::boot::{self, Boot, cmdline, mptable};
use crate::bus::{Bus, Overlap};
use crate::devices::{self, Devices, Handles, Named};
use crate::exit::ExitSlot;
use crate::irq::{Ioapic, KvmRouter, MAX_PINS};
use crate::jail;
use crate::kvm;
use crate::memory::{self, GuestMemory};
use crate::pluggable::{self, Pluggable};
use crate::ports::Ports;
use crate::timeline::{Recorder, Stage};
use crate::vcpu::{Handle, State, Surroundings, Vcpu};
use crate::virtio::Interrupt;
use crate::virtio::block::{BackingError, SlotError};
use crate::virtio::fs::ShareError;
use crate::virtio::mmio::{self, Mmio};
use crate::virtio::net::{self, TapError};
use crate::virtio::rate_limiter::LimitError;
use crate::virtio::registers::Bank;

/// Why a request to the machine failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The description contradicts itself.
    #[error("{0}")]
    Invalid(String),
    /// The request does not fit the machine's state.
    #[error("{0}")]
    State(&'static str),
    /// KVM did not make the VM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Another KVM ioctl failed.
    #[error("KVM cannot {what}")]
    Ioctl {
        /// What was tried.
        what: &'static str,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The boot vCPU could not be prepared.
    #[error(transparent)]
    Registers(#[from] registers::Error),
    /// Guest memory could not be had.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The guest cannot be booted.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The process could not be jailed.
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// Two devices got the same address.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// A descriptor cannot back a block device.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// A block slot cannot be filled or emptied.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A descriptor cannot back a network device.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A network slot cannot be filled or emptied.
    #[error(transparent)]
    NetSlot(#[from] net::SlotError),
    /// A limit cannot be kept.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A share cannot come or go.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The host refused a descriptor or a thread.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The kind of failure that the sandbox is told.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Invalid(_)
            | Self::Limit(_)
            | Self::Memory(memory::Error::Size(_) | memory::Error::Pluggable(_)) => FailureKind::Invalid,
            Self::State(_) => FailureKind::State,
            Self::Kvm(kvm::Error::TooManyVcpus { .. }) => FailureKind::Invalid,
            Self::Kvm(_) | Self::Ioctl { .. } | Self::Registers(_) => FailureKind::Kvm,
            Self::Memory(_) => FailureKind::Resources,
            Self::Boot(boot::Error::CommandLine(_)) => FailureKind::Invalid,
            Self::Boot(error) if error.is_image() => FailureKind::Image,
            Self::Boot(_) | Self::Jail(_) | Self::Overlap(_) => FailureKind::Io,
            Self::Backing(BackingError::Host(_)) => FailureKind::Io,
            Self::Backing(_) => FailureKind::Invalid,
            Self::Slot(SlotError::Host(_)) => FailureKind::Resources,
            Self::Slot(_) => FailureKind::State,
            Self::Tap(error) | Self::NetSlot(net::SlotError::Tap(error)) => match error {
                TapError::Host(_) | TapError::Gone => FailureKind::Io,
                _ => FailureKind::Invalid,
            },
            Self::NetSlot(net::SlotError::Host(_)) => FailureKind::Resources,
            Self::NetSlot(_) => FailureKind::State,
            Self::Share(ShareError::Exists { .. }) => FailureKind::State,
            Self::Share(ShareError::TooMany) => FailureKind::Resources,
            Self::Share(ShareError::Host(_)) => FailureKind::Io,
            Self::Share(_) => FailureKind::Invalid,
            Self::Host { source, .. } => match source.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN | libc::ENOSPC) => {
                    FailureKind::Resources
                }
                _ => FailureKind::Io,
            },
        }
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Ioctl { what, source }
}

/// The descriptors that came with a request; each is taken once.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// All that came.
    #[must_use]
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Takes the descriptor for `field`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it did not come or is named twice.
    pub fn take(&mut self, index: FdIndex, field: &str) -> Result<OwnedFd, Error> {
        match self.0.get_mut(index.0 as usize) {
            None => Err(Error::Invalid(format!(
                "`{field}` names descriptor {}, only {} came",
                index.0,
                self.0.len()
            ))),
            Some(slot) => slot.take().ok_or_else(|| {
                Error::Invalid(format!("`{field}` names descriptor {}, which is taken", index.0))
            }),
        }
    }
}

/// A machine.
pub struct Machine {
    // The vCPUs come first: they must have stopped before what they run on is dropped.
    vcpus: Vcpus,
    late: Late,
    devices: Vec<Arc<Mmio>>,
    handles: Handles,
    ram: GuestMemory,
    vm: Arc<VmFd>,
}

/// What more vCPUs are made of.
struct Late {
    template: cpuid::Template,
    surroundings: Arc<Surroundings>,
    /// How many there can be in all.
    most: u8,
}

enum Vcpus {
    Built(Vec<Vcpu>),
    Started { handles: Vec<Handle>, paused: bool },
}

/// A device with its place in the machine.
struct Placed {
    transport: Arc<Mmio>,
    line: EventFd,
    slot: cmdline::MmioSlot,
}

impl Machine {
    /// Builds the machine that `config` describes, and jails the process unless told otherwise.
    ///
    /// # Errors
    /// [`Error`]; the process is of no further use then.
    pub fn build(
        config: &VmConfig,
        mut descriptors: Descriptors,
        exit: &Arc<ExitSlot>,
        timeline: &Arc<Recorder>,
    ) -> Result<Self, Error> {
        if config.vcpus == 0 || config.vcpus > config.max_vcpus || config.max_vcpus == u8::MAX {
            return Err(Error::Invalid(format!(
                "{} vCPUs of at most {}: there must be 1 to 254, and not more than that",
                config.vcpus, config.max_vcpus
            )));
        }
        let kvm = descriptors.take(config.kvm, "kvm")?;
        let kernel = File::from(descriptors.take(config.kernel, "kernel")?);
        let initrd = match config.initrd {
            Some(index) => Some(File::from(descriptors.take(index, "initrd")?)),
            None => None,
        };
        let ram = memory::allocate(config.memory_mib)?;
        let (memory, pluggable) = match config.pluggable_memory_mib {
            0 => (ram.clone(), None),
            mib => {
                let (memory, pluggable) = pluggable::reserve(&ram, mib)?;
                (memory, Some(pluggable))
            }
        };
        let Devices {
            named,
            handles,
            early_console,
        } = devices::create(config, pluggable.as_ref(), &mut descriptors, timeline)?;
        let registers = Bank::new(named.len()).map_err(host("cannot map the devices' registers"))?;
        let placed = place(named, &registers, &memory, pluggable.as_ref())?;
        let slots: Vec<_> = placed.iter().map(|placed| placed.slot).collect();
        let shape = cmdline::Shape {
            verbose: config.verbose_console,
            start_vcpus: (config.vcpus < config.max_vcpus).then_some(config.vcpus),
            pluggable: pluggable.is_some(),
            devices: &slots,
        };
        let command_line =
            cmdline::compose(shape, &config.cmdline).map_err(|error| Error::Boot(error.into()))?;
        let boot = Boot {
            kernel,
            initrd,
            command_line: &command_line,
            max_vcpus: config.max_vcpus,
            pins: pins(&placed),
        };

        let make_vm = || {
            let created = kvm::create(kvm, config.vcpus, config.max_vcpus)?;
            let ranges = memory::ranges(&ram);
            kvm::set_memory(&created.vm, &ranges)?;
            let next_slot = ranges.len() as u32;
            kvm::show_registers(&created.vm, next_slot, &registers.range(layout::VIRTIO_MMIO_BASE))?;
            if let Some(pluggable) = &pluggable {
                pluggable.connect(created.vm.clone(), next_slot + 1);
            }
            connect(&created.vm, &placed)?;
            timeline.record(Stage::VmCreated);
            Ok::<_, Error>(created)
        };
        let (entry, created) = std::thread::scope(|scope| {
            let vm = std::thread::Builder::new()
                .name("kvm".to_owned())
                .spawn_scoped(scope, make_vm)
                .map_err(host("cannot start a thread"))?;
            if config.jail {
                jail::enter(config.fs_tag.is_some())?;
            }
            let entry = boot.load(&ram)?;
            timeline.record(Stage::KernelLoaded);
            let panicked = |_| io::Error::other("its thread has panicked");
            let created = vm
                .join()
                .map_err(panicked)
                .map_err(host("cannot make the VM"))??;
            Ok::<_, Error>((entry, created))
        })?;
        if let Some(boot_vcpu) = created.vcpus.first() {
            registers::set_up_pvh(boot_vcpu, &ram, entry, layout::START_INFO)?;
        }
        let ports = Ports::new(ram.clone(), exit.clone(), early_console);
        let surroundings = surroundings(&created.vm, &placed, ports, exit, timeline)?;
        let vcpus = created.vcpus.into_iter().enumerate();
        let vcpus = vcpus
            .map(|(index, fd)| Vcpu::new(index as u8, fd, surroundings.clone()))
            .collect();
        Ok(Self {
            vcpus: Vcpus::Built(vcpus),
            late: Late {
                template: created.template,
                surroundings,
                most: config.max_vcpus,
            },
            devices: placed.into_iter().map(|placed| placed.transport).collect(),
            handles,
            ram,
            vm: created.vm,
        })
    }

    /// Starts the vCPUs.
    ///
    /// # Errors
    /// [`Error::State`] when they were started already, [`Error::Host`] when there is no thread to be had.
    pub fn boot(&mut self) -> Result<(), Error> {
        let Vcpus::Built(vcpus) = &mut self.vcpus else {
            return Err(Error::State("the VM has been booted already"));
        };
        let handles = std::mem::take(vcpus)
            .into_iter()
            .map(Vcpu::start)
            .collect::<io::Result<Vec<_>>>()
            .map_err(host("cannot start a vCPU thread"))?;
        self.vcpus = Vcpus::Started {
            handles,
            paused: false,
        };
        Ok(())
    }

    /// Stops all vCPUs between two instructions and returns when they stand still.
    ///
    /// # Errors
    /// [`Error::State`] when they do not run, or ended meanwhile.
    pub fn pause(&mut self) -> Result<(), Error> {
        match &mut self.vcpus {
            Vcpus::Started {
                handles,
                paused: paused @ false,
            } => {
                handles.iter().for_each(Handle::pause);
                *paused = true;
                wait_all(handles, State::Paused)
            }
            Vcpus::Started { .. } => Err(Error::State("the VM is paused already")),
            Vcpus::Built(_) => Err(NOT_BOOTED),
        }
    }

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    /// [`Error::State`] when they were not paused, or ended meanwhile.
    pub fn resume(&mut self) -> Result<(), Error> {
        match &mut self.vcpus {
            Vcpus::Started {
                handles,
                paused: paused @ true,
            } => {
                handles.iter().for_each(Handle::resume);
                *paused = false;
                wait_all(handles, State::Running)
            }
            Vcpus::Started { .. } => Err(Error::State("the VM is not paused")),
            Vcpus::Built(_) => Err(NOT_BOOTED),
        }
    }

    /// Makes vCPUs until there are `count`. They wait until the guest starts them; in a paused VM they are paused.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there are more already or cannot be as many, [`Error::Kvm`] or [`Error::Host`] when
    /// there are none to be had; those made until then stay.
    pub fn set_vcpus(&mut self, count: u8) -> Result<(), Error> {
        let present = match &self.vcpus {
            Vcpus::Built(vcpus) => vcpus.len(),
            Vcpus::Started { handles, .. } => handles.len(),
        } as u8;
        if count < present || count > self.late.most {
            return Err(Error::Invalid(format!(
                "{count} vCPUs: this VM has {present} and can have {}; a vCPU that was made stays",
                self.late.most
            )));
        }
        for index in present..count {
            let fd = kvm::create_late_vcpu(&self.vm, &self.late.template, index)?;
            let vcpu = Vcpu::new(index, fd, self.late.surroundings.clone());
            match &mut self.vcpus {
                Vcpus::Built(vcpus) => vcpus.push(vcpu),
                Vcpus::Started { handles, paused } => {
                    let handle = vcpu.start().map_err(host("cannot start a vCPU thread"))?;
                    // It executes nothing before one that is paused too has started it.
                    if *paused {
                        handle.pause();
                    }
                    handles.push(handle);
                }
            }
        }
        match &self.vcpus {
            Vcpus::Started {
                handles,
                paused: true,
            } => wait_all(handles, State::Paused),
            _ => Ok(()),
        }
    }

    /// What the devices are driven by.
    #[must_use]
    pub fn handles(&self) -> &Handles {
        &self.handles
    }

    /// The devices, in order of their addresses.
    #[must_use]
    pub fn devices(&self) -> &[Arc<Mmio>] {
        &self.devices
    }

    /// The guest's memory, apart from what can be plugged.
    #[must_use]
    pub fn ram(&self) -> &GuestMemory {
        &self.ram
    }

    /// vCPU exits to user space since boot.
    #[must_use]
    pub fn vcpu_exits(&self) -> u64 {
        match &self.vcpus {
            Vcpus::Built(_) => 0,
            Vcpus::Started { handles, .. } => handles.iter().map(Handle::exits).sum(),
        }
    }
}

const NOT_BOOTED: Error = Error::State("the VM has not been booted");

fn wait_all(handles: &[Handle], state: State) -> Result<(), Error> {
    let mut outcome = Ok(());
    for handle in handles {
        if handle.wait(state) != state {
            outcome = Err(Error::State("the VM has ended"));
        }
    }
    outcome
}

/// Gives each device registers, an address and an interrupt.
fn place(
    named: Vec<Named>,
    registers: &Bank,
    memory: &GuestMemory,
    pluggable: Option<&Arc<Pluggable>>,
) -> Result<Vec<Placed>, Error> {
    // Interrupt 0 is not one that Linux gives to a device.
    let most = usize::from(MAX_PINS - 1);
    if named.len() > most {
        return Err(Error::Invalid(format!(
            "{} devices asked for, there can be {most}",
            named.len()
        )));
    }
    let event = host("cannot make an event descriptor");
    named
        .into_iter()
        .zip(registers.pages())
        .enumerate()
        .map(|(index, (Named { name, device }, page))| {
            let line = EventFd::new(EFD_NONBLOCK)?;
            let interrupt = Interrupt::new(line.try_clone()?, page);
            let transport = Arc::new(Mmio::new(
                name,
                device,
                memory.clone(),
                pluggable.cloned(),
                interrupt,
            )?);
            let address = layout::VIRTIO_MMIO_BASE + index as u64 * layout::VIRTIO_MMIO_SIZE;
            Ok(Placed {
                transport,
                line,
                slot: cmdline::MmioSlot {
                    address,
                    gsi: index as u8 + 1,
                },
            })
        })
        .collect::<io::Result<Vec<_>>>()
        .map_err(event)
}

/// How many pins the IOAPIC needs: its number is read pin by pin at boot, so it has no more than are used.
fn pins(placed: &[Placed]) -> u8 {
    placed.len() as u8 + 1
}

/// Connects each device's interrupt and queues to KVM, so that neither passes through user space.
///
/// Also the acknowledgement of used buffers ends in KVM, where nobody reads it: a driver that finds this bit of
/// `InterruptStatus` set for good looks into its queues at an interrupt that was for the configuration alone, and
/// finds nothing. An interrupt's other cause, alone or together with this one, is acknowledged to the device.
fn connect(vm: &VmFd, placed: &[Placed]) -> Result<(), Error> {
    let acknowledged = EventFd::new(EFD_NONBLOCK).map_err(host("cannot make an event descriptor"))?;
    for Placed {
        transport,
        line,
        slot,
    } in placed
    {
        vm.register_irqfd(line, u32::from(slot.gsi))
            .map_err(ioctl("connect a device's interrupt"))?;
        let address = IoEventAddress::Mmio(slot.address + mmio::register::INTERRUPT_ACK);
        vm.register_ioevent(&acknowledged, &address, Interrupt::USED)
            .map_err(ioctl("connect a device's acknowledgement"))?;
        let address = IoEventAddress::Mmio(slot.address + mmio::register::QUEUE_NOTIFY);
        for (queue, event) in transport.notify_events().iter().enumerate() {
            vm.register_ioevent(event, &address, queue as u32)
                .map_err(ioctl("connect a device's queue"))?;
        }
    }
    Ok(())
}

/// What the vCPUs find around them.
fn surroundings(
    vm: &Arc<VmFd>,
    placed: &[Placed],
    ports: Ports,
    exit: &Arc<ExitSlot>,
    timeline: &Arc<Recorder>,
) -> Result<Arc<Surroundings>, Error> {
    let router = Box::new(KvmRouter(vm.clone()));
    let ioapic = Arc::new(Ioapic::new(
        mptable::IOAPIC_ID,
        pins(placed),
        router,
        exit.clone(),
    ));
    let mut bus = Bus::default();
    bus.claim(layout::IOAPIC_BASE, layout::IOAPIC_SIZE, ioapic.clone())?;
    for Placed { transport, slot, .. } in placed {
        bus.claim(slot.address, layout::VIRTIO_MMIO_SIZE, transport.clone())?;
        ioapic.wire(slot.gsi, transport.interrupt().clone());
    }
    Ok(Arc::new(Surroundings {
        bus,
        ports,
        ioapic,
        exit: exit.clone(),
        timeline: timeline.clone(),
    }))
}
