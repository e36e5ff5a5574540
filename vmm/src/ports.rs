//! The few I/O ports that mean something: the keyboard controller's reset line, and in debugging a serial
//! port that only transmits. All others read as ones and swallow what is written, as on a bare bus.

use std::sync::Arc;

use protocol::vmm::ExitCause;
use vm_memory::{Bytes, GuestAddress};

use crate::arch::x86_64::layout;
use crate::exit::ExitSlot;
use crate::memory::GuestMemory;

/// Command and status register of the 8042 keyboard controller.
const I8042_COMMAND: u16 = 0x64;
/// "Pulse output line 0": the line that resets the processor.
const I8042_RESET: u8 = 0xfe;
/// First serial port (16550): transmitter, and line status.
const COM1_DATA: u16 = 0x3f8;
const COM1_LINE_STATUS: u16 = 0x3fd;
/// Line status: transmitter and its holding register are empty.
const TRANSMITTER_IDLE: u8 = 0x60;

/// Where early boot messages go, byte by byte.
pub type EarlyConsole = Box<dyn Fn(&[u8]) + Send + Sync>;

/// The I/O ports of one VM.
pub struct Ports {
    memory: GuestMemory,
    exit: Arc<ExitSlot>,
    early_console: Option<EarlyConsole>,
}

impl Ports {
    /// Ports of the VM with this memory. `early_console` gets what the guest writes to the first serial port.
    #[must_use]
    pub fn new(memory: GuestMemory, exit: Arc<ExitSlot>, early_console: Option<EarlyConsole>) -> Self {
        Self {
            memory,
            exit,
            early_console,
        }
    }

    /// A guest's `in`.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            // Input buffer empty: the next command may be written.
            (I8042_COMMAND, [status]) => *status = 0,
            (COM1_LINE_STATUS, [status]) if self.early_console.is_some() => *status = TRANSMITTER_IDLE,
            _ => {}
        }
    }

    /// A guest's `out`.
    pub fn write(&self, port: u16, data: &[u8]) {
        match (port, data) {
            (I8042_COMMAND, [I8042_RESET]) => self.exit.end(self.reset_cause()),
            (COM1_DATA, bytes) => {
                if let Some(console) = &self.early_console {
                    console(bytes);
                }
            }
            _ => {}
        }
    }

    fn reset_cause(&self) -> ExitCause {
        match self.warm_boot_flag() {
            layout::WARM_BOOT => ExitCause::GuestPanic,
            _ => ExitCause::GuestShutdown,
        }
    }

    /// Why the guest triple-faulted: also one of Linux's ways to reset a machine (`reboot=t`).
    #[must_use]
    pub fn triple_fault_cause(&self) -> ExitCause {
        match self.warm_boot_flag() {
            layout::WARM_BOOT => ExitCause::GuestPanic,
            layout::COLD_BOOT => ExitCause::GuestShutdown,
            _ => ExitCause::TripleFault,
        }
    }

    /// A guest that writes it at will only misreports its own end.
    fn warm_boot_flag(&self) -> u16 {
        self.memory
            .read_obj(GuestAddress(layout::WARM_BOOT_FLAG))
            .unwrap_or(layout::NO_BOOT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn ports(early_console: Option<EarlyConsole>) -> (Ports, Arc<ExitSlot>, GuestMemory) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        memory
            .write_obj(layout::NO_BOOT, GuestAddress(layout::WARM_BOOT_FLAG))
            .unwrap();
        let exit = Arc::new(ExitSlot::new().unwrap());
        (
            Ports::new(memory.clone(), exit.clone(), early_console),
            exit,
            memory,
        )
    }

    #[test]
    fn a_reset_is_a_shutdown_unless_the_kernel_left_the_warm_boot_flag() {
        let (ports, exit, _) = ports(None);
        ports.write(I8042_COMMAND, &[0xd1]);
        ports.write(I8042_COMMAND, &[I8042_RESET, 0]);
        assert_eq!(exit.cause(), None, "only the reset pulse counts");
        ports.write(I8042_COMMAND, &[I8042_RESET]);
        assert_eq!(exit.cause(), Some(ExitCause::GuestShutdown));
    }

    #[test]
    fn a_warm_reset_is_a_panic() {
        let (ports, exit, memory) = ports(None);
        memory
            .write_obj(layout::WARM_BOOT, GuestAddress(layout::WARM_BOOT_FLAG))
            .unwrap();
        ports.write(I8042_COMMAND, &[I8042_RESET]);
        assert_eq!(exit.cause(), Some(ExitCause::GuestPanic));
    }

    #[test]
    fn a_triple_fault_is_a_reset_only_when_the_kernel_announced_it() {
        let (ports, _, memory) = ports(None);
        assert_eq!(ports.triple_fault_cause(), ExitCause::TripleFault);
        for (flag, cause) in [
            (layout::WARM_BOOT, ExitCause::GuestPanic),
            (layout::COLD_BOOT, ExitCause::GuestShutdown),
            (0xffff, ExitCause::TripleFault),
        ] {
            memory
                .write_obj(flag, GuestAddress(layout::WARM_BOOT_FLAG))
                .unwrap();
            assert_eq!(ports.triple_fault_cause(), cause);
        }
    }

    #[test]
    fn other_ports_read_as_ones() {
        let (ports, _, _) = ports(None);
        let mut data = [0; 4];
        for port in [0, 0x71, COM1_LINE_STATUS, 0xcf8, u16::MAX] {
            ports.read(port, &mut data);
            assert_eq!(data, [0xff; 4]);
            ports.write(port, &data);
        }
        let mut status = [0xff];
        ports.read(I8042_COMMAND, &mut status);
        assert_eq!(
            status,
            [0],
            "the kernel waits for an empty input buffer before it resets"
        );
    }

    #[test]
    fn early_messages_reach_the_console() {
        let text = Arc::new(Mutex::new(Vec::new()));
        let sink = text.clone();
        let (ports, _, _) = ports(Some(Box::new(move |bytes| {
            sink.lock().unwrap().extend_from_slice(bytes);
        })));
        let mut status = [0];
        ports.read(COM1_LINE_STATUS, &mut status);
        assert_eq!(status, [TRANSMITTER_IDLE]);
        ports.write(COM1_DATA, b"k");
        assert_eq!(*text.lock().unwrap(), b"k");
    }
}
