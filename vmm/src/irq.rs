//! The IOAPIC, in user space beside KVM's local APICs ("split irqchip").
//!
//! Devices signal an irqfd, KVM turns it into the message that the pin's redirection entry describes, and this
//! module keeps KVM's routing table equal to the entries. No interrupt passes through user space.
//! Register names and layout: Intel 82093AA data sheet; `EOIR` and version 0x20: ICH I/O APIC.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use protocol::vmm::ExitCause;
use serde::{Deserialize, Serialize};

use crate::bus::MmioDevice;
use crate::exit::ExitSlot;
use crate::virtio::Interrupt;

/// The most pins an IOAPIC has, and so the most interrupts there are.
pub const MAX_PINS: u8 = 24;

/// Window registers.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOIR: u64 = 0x40;

/// Indexed registers.
const IOAPICID: u8 = 0x00;
const IOAPICVER: u8 = 0x01;
const IOAPICARB: u8 = 0x02;
const IOREDTBL: u8 = 0x10;

/// An I/O APIC with an EOI register.
const VERSION: u32 = 0x20;

/// Redirection table entry.
mod entry {
    pub const VECTOR: u64 = 0xff;
    pub const DELIVERY_MODE_SHIFT: u32 = 8;
    pub const DELIVERY_MODE: u64 = 7 << DELIVERY_MODE_SHIFT;
    pub const DESTINATION_LOGICAL: u64 = 1 << 11;
    pub const DELIVERY_STATUS: u64 = 1 << 12;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const DESTINATION_SHIFT: u32 = 56;
    pub const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
}

/// The registers, as they would be saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// `IOAPICID`, bits 27:24.
    pub id: u32,
    /// `IOREGSEL`.
    pub selected: u8,
    /// `IOREDTBL`, one entry per pin.
    pub redirection: Vec<u64>,
}

/// The message an interrupt pin sends when it is signalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The pin, which is also the global system interrupt.
    pub gsi: u32,
    /// Low half of the message address (Intel SDM volume 3, 11.11.1).
    pub address: u32,
    /// Message data (11.11.2).
    pub data: u32,
}

/// Takes the routes of all unmasked pins and makes them effective.
pub trait Router: Send {
    /// Replaces all routes.
    ///
    /// # Errors
    /// The ioctl's error.
    fn set(&mut self, routes: &[Route]) -> Result<(), kvm_ioctls::Error>;
}

/// Routes by `KVM_SET_GSI_ROUTING`.
pub struct KvmRouter(pub Arc<VmFd>);

impl Router for KvmRouter {
    fn set(&mut self, routes: &[Route]) -> Result<(), kvm_ioctls::Error> {
        let entries: Vec<_> = routes
            .iter()
            .map(|route| kvm_irq_routing_entry {
                gsi: route.gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: route.address,
                        address_hi: 0,
                        data: route.data,
                        ..Default::default()
                    },
                },
                ..Default::default()
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        self.0.set_gsi_routing(&table)
    }
}

/// The interrupt controller that devices are wired to.
pub struct Ioapic {
    inner: Mutex<Inner>,
    exit: Arc<ExitSlot>,
}

struct Inner {
    state: IoapicState,
    /// What is effective in KVM.
    routes: Vec<Route>,
    router: Box<dyn Router>,
    /// The device behind each pin.
    lines: Vec<Option<Interrupt>>,
}

impl Ioapic {
    /// An IOAPIC with `pins` masked pins and the APIC id `id`.
    #[must_use]
    pub fn new(id: u8, pins: u8, router: Box<dyn Router>, exit: Arc<ExitSlot>) -> Self {
        let pins = usize::from(pins.clamp(1, MAX_PINS));
        let state = IoapicState {
            id: u32::from(id & 0xf) << 24,
            selected: 0,
            redirection: vec![entry::MASKED; pins],
        };
        let inner = Inner {
            state,
            routes: Vec::new(),
            router,
            lines: vec![None; pins],
        };
        Self {
            inner: Mutex::new(inner),
            exit,
        }
    }

    /// Wires a device to `pin`. Its irqfd must be registered under the same number.
    pub fn wire(&self, pin: u8, interrupt: Interrupt) {
        if let Some(line) = self.lock().lines.get_mut(usize::from(pin)) {
            *line = Some(interrupt);
        }
    }

    /// A vCPU has acknowledged the level-triggered interrupt `vector` (`KVM_EXIT_IOAPIC_EOI`, or `EOIR`).
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut inner = self.lock();
        for pin in 0..inner.state.redirection.len() {
            let entry = inner.state.redirection[pin];
            if entry & entry::LEVEL != 0 && entry & entry::VECTOR == u64::from(vector) {
                inner.state.redirection[pin] &= !entry::REMOTE_IRR;
                // That used buffers were acknowledged, the device does not see.
                inner.signal_if_asserted(pin, Interrupt::CONFIG);
            }
        }
    }

    /// The registers.
    #[must_use]
    pub fn state(&self) -> IoapicState {
        self.lock().state.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MmioDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        let value = match offset {
            IOREGSEL => u32::from(inner.state.selected),
            IOWIN => inner.state.read(),
            _ => return,
        };
        if let [a, b, c, d] = data {
            [*a, *b, *c, *d] = value.to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            IOREGSEL => self.lock().state.selected = value as u8,
            IOWIN => {
                if let Err(error) = self.lock().write_selected(value) {
                    let message = format!("KVM refused the interrupt routing table: {error}");
                    self.exit.end(ExitCause::VmmError { message });
                }
            }
            EOIR => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

impl IoapicState {
    fn read(&self) -> u32 {
        match self.selected {
            IOAPICID | IOAPICARB => self.id,
            IOAPICVER => VERSION | (self.redirection.len() as u32 - 1) << 16,
            IOREDTBL.. => {
                let index = self.selected - IOREDTBL;
                let entry = self.redirection.get(usize::from(index / 2)).copied();
                entry.map_or(u32::MAX, |entry| {
                    if index.is_multiple_of(2) {
                        entry as u32
                    } else {
                        (entry >> 32) as u32
                    }
                })
            }
            _ => u32::MAX,
        }
    }
}

impl Inner {
    fn write_selected(&mut self, value: u32) -> Result<(), kvm_ioctls::Error> {
        match self.state.selected {
            IOAPICID => self.state.id = value & 0x0f00_0000,
            IOREDTBL.. => {
                let index = self.state.selected - IOREDTBL;
                let pin = usize::from(index / 2);
                let Some(entry) = self.state.redirection.get_mut(pin) else {
                    return Ok(());
                };
                let before = *entry;
                *entry = if index.is_multiple_of(2) {
                    before & 0xffff_ffff_0000_0000
                        | before & entry::READ_ONLY
                        | u64::from(value) & !entry::READ_ONLY
                } else {
                    before & 0xffff_ffff | u64::from(value) << 32
                };
                let unmasked = before & entry::MASKED != 0 && *entry & entry::MASKED == 0;
                self.update_routes()?;
                if unmasked {
                    // What the device signalled while the pin had no route is lost; its line still stands.
                    self.signal_if_asserted(pin, u32::MAX);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Tells KVM, but only when an effective route has changed: each change waits for a grace period.
    fn update_routes(&mut self) -> Result<(), kvm_ioctls::Error> {
        let routes: Vec<_> = self
            .state
            .redirection
            .iter()
            .enumerate()
            .filter(|(_, entry)| *entry & entry::MASKED == 0)
            .map(|(pin, entry)| route(pin as u32, *entry))
            .collect();
        if routes != self.routes {
            self.router.set(&routes)?;
            self.routes = routes;
        }
        Ok(())
    }

    fn signal_if_asserted(&self, pin: usize, causes: u32) {
        if self.state.redirection[pin] & entry::MASKED == 0
            && let Some(Some(interrupt)) = self.lines.get(pin)
        {
            interrupt.signal_if_pending(causes);
        }
    }
}

/// The message that a redirection entry stands for.
fn route(gsi: u32, entry: u64) -> Route {
    const MSI_BASE: u32 = 0xfee0_0000;
    let destination = (entry >> entry::DESTINATION_SHIFT) as u32;
    let logical = u32::from(entry & entry::DESTINATION_LOGICAL != 0);
    let level = u32::from(entry & entry::LEVEL != 0);
    let delivery_mode = ((entry & entry::DELIVERY_MODE) >> entry::DELIVERY_MODE_SHIFT) as u32;
    Route {
        gsi,
        address: MSI_BASE | destination << 12 | logical << 2,
        // Bit 14 asserts, bit 15 says level-triggered.
        data: (entry & entry::VECTOR) as u32 | delivery_mode << 8 | level << 14 | level << 15,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::registers::Page;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[derive(Clone, Default)]
    struct Recording(Arc<Mutex<Vec<Vec<Route>>>>);

    impl Router for Recording {
        fn set(&mut self, routes: &[Route]) -> Result<(), kvm_ioctls::Error> {
            self.0.lock().unwrap().push(routes.to_vec());
            Ok(())
        }
    }

    fn ioapic(pins: u8) -> (Ioapic, Recording) {
        let recording = Recording::default();
        (
            Ioapic::new(
                2,
                pins,
                Box::new(recording.clone()),
                Arc::new(ExitSlot::new().unwrap()),
            ),
            recording,
        )
    }

    fn write(ioapic: &Ioapic, register: u8, value: u32) {
        ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes());
        ioapic.write(IOWIN, &value.to_le_bytes());
    }

    fn read(ioapic: &Ioapic, register: u8) -> u32 {
        ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes());
        let mut data = [0xff; 4];
        ioapic.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_says_how_many_pins_it_has() {
        let (ioapic, _) = ioapic(5);
        assert_eq!(read(&ioapic, IOAPICVER), 0x0004_0020);
        assert_eq!(read(&ioapic, IOAPICID), 2 << 24);
        assert_eq!(read(&ioapic, IOREDTBL), 1 << 16);
        assert_eq!(read(&ioapic, IOREDTBL + 10), u32::MAX, "there is no sixth pin");
    }

    #[test]
    fn routes_follow_unmasked_entries_and_change_only_when_they_do() {
        let (ioapic, recording) = ioapic(4);
        // Pin 3: destination 1, fixed, physical, edge, vector 0x31; first masked, as Linux does.
        write(&ioapic, IOREDTBL + 7, 1 << 24);
        write(&ioapic, IOREDTBL + 6, 0x1_0031);
        assert!(
            recording.0.lock().unwrap().is_empty(),
            "a masked pin has no route"
        );
        write(&ioapic, IOREDTBL + 6, 0x31);
        write(&ioapic, IOREDTBL + 6, 0x31);
        let unmasked = vec![Route {
            gsi: 3,
            address: 0xfee0_1000,
            data: 0x31,
        }];
        assert_eq!(recording.0.lock().unwrap().last(), Some(&unmasked));
        // Logical destination, lowest priority, level-triggered.
        write(&ioapic, IOREDTBL + 6, 0x8932);
        let level = vec![Route {
            gsi: 3,
            address: 0xfee0_1004,
            data: 0xc132,
        }];
        assert_eq!(*recording.0.lock().unwrap(), [unmasked, level]);
    }

    #[test]
    fn read_only_bits_and_absent_pins_ignore_writes() {
        let (ioapic, recording) = ioapic(1);
        write(&ioapic, IOREDTBL, 0xffff_ffff);
        assert_eq!(read(&ioapic, IOREDTBL) & entry::READ_ONLY as u32, 0);
        for register in [IOAPICVER, IOREDTBL + 2, 0xff] {
            write(&ioapic, register, 0);
        }
        ioapic.write(IOWIN, &[0]);
        ioapic.write(0x20, &[0; 4]);
        assert!(recording.0.lock().unwrap().is_empty());
    }

    #[test]
    fn an_interrupt_that_came_while_masked_is_signalled_on_unmasking() {
        let (ioapic, _) = ioapic(2);
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap(), Page::alone());
        ioapic.wire(1, interrupt.clone());
        write(&ioapic, IOREDTBL + 2, 0x31);
        assert!(line.read().is_err(), "nothing was pending");
        write(&ioapic, IOREDTBL + 2, 0x1_0031);
        interrupt.used();
        line.read().unwrap();
        write(&ioapic, IOREDTBL + 2, 0x31);
        assert_eq!(line.read().unwrap(), 1);
    }

    #[test]
    fn a_level_interrupt_that_still_stands_is_sent_again_after_its_eoi() {
        let (ioapic, _) = ioapic(2);
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap(), Page::alone());
        ioapic.wire(1, interrupt.clone());
        write(&ioapic, IOREDTBL + 2, 0x8031);
        interrupt.config_changed(|_| ());
        line.read().unwrap();
        ioapic.end_of_interrupt(0x32);
        assert!(line.read().is_err(), "another vector");
        ioapic.end_of_interrupt(0x31);
        assert_eq!(line.read().unwrap(), 1);
        interrupt.acknowledge(Interrupt::CONFIG);
        ioapic.write(EOIR, &0x31_u32.to_le_bytes());
        assert!(line.read().is_err(), "the device has been served");
    }
}
