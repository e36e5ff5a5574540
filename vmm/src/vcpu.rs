//! A virtual processor: its thread, its states, and what becomes of each exit to user space.
//!
//! ```text
//! Created ──start──► Running ◄──resume──┐
//!                       │ pause         │
//!                       ├────────────► Paused
//!                       │ stop, end of VM, error (also from Paused)
//!                       └────────────► Exited
//! ```
//!
//! The control thread says what it wants and kicks the vCPU out of the guest with a signal whose handler sets
//! `immediate_exit`, so that a kick between two looks at the wish is not lost (KVM API, `KVM_RUN`).

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use protocol::vmm::ExitCause;

use crate::bus::Bus;
use crate::exit::ExitSlot;
use crate::irq::Ioapic;
use crate::ports::Ports;
use crate::timeline::{Recorder, Stage};

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It exists and has no thread yet.
    Created,
    /// Its thread runs the guest.
    Running,
    /// Its thread waits between two instructions.
    Paused,
    /// Its thread has ended or is about to.
    Exited,
}

/// What the control thread wants of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Wish {
    Run,
    Pause,
    Exit,
}

/// Everything a vCPU thread reaches outside its vCPU.
pub struct Surroundings {
    /// Devices by address.
    pub bus: Bus,
    /// Devices by port.
    pub ports: Ports,
    /// For end-of-interrupt exits.
    pub ioapic: Arc<Ioapic>,
    /// Where a terminal exit is reported.
    pub exit: Arc<ExitSlot>,
    /// For the first instruction.
    pub timeline: Arc<Recorder>,
}

/// A vCPU without a thread.
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
    surroundings: Arc<Surroundings>,
}

/// The control thread's end of a running vCPU.
pub struct Handle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Changed under the lock, so that waiting for it works; read without it after each exit.
    wish: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
    exits: AtomicU64,
}

impl Vcpu {
    /// A vCPU that has been set up and never run.
    #[must_use]
    pub fn new(index: u8, fd: VcpuFd, surroundings: Arc<Surroundings>) -> Self {
        Self {
            index,
            fd,
            surroundings,
        }
    }

    /// Starts its thread and runs the guest.
    ///
    /// # Errors
    /// What creating a thread reports.
    pub fn start(self) -> io::Result<Handle> {
        install_kick_handler()?;
        let shared = Arc::new(Shared {
            wish: AtomicU8::new(Wish::Run as u8),
            state: Mutex::new(State::Created),
            changed: Condvar::new(),
            exits: AtomicU64::new(0),
        });
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", self.index))
            .spawn({
                let shared = shared.clone();
                move || {
                    let runner = Runner {
                        vcpu: self,
                        shared: &shared,
                    };
                    runner.run();
                }
            })?;
        Ok(Handle {
            shared,
            thread: Some(thread),
        })
    }
}

impl Handle {
    /// Asks the vCPU to pause; [`Handle::wait`] tells when it has. For several vCPUs ask all first.
    pub fn pause(&self) {
        self.wish(Wish::Pause);
    }

    /// Lets a paused vCPU go on.
    pub fn resume(&self) {
        self.wish(Wish::Run);
    }

    /// Waits until the vCPU is in `state`, or has exited, and returns which.
    #[must_use]
    pub fn wait(&self, state: State) -> State {
        let mut current = self.shared.lock();
        while *current != state && *current != State::Exited {
            current = self
                .shared
                .changed
                .wait(current)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *current
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> State {
        *self.shared.lock()
    }

    /// Exits to user space since it was started.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    fn wish(&self, wish: Wish) {
        {
            let _state = self.shared.lock();
            if self.shared.wish.load(Ordering::SeqCst) == Wish::Exit as u8 {
                return;
            }
            self.shared.wish.store(wish as u8, Ordering::SeqCst);
            self.shared.changed.notify_all();
        }
        if let (Some(thread), Wish::Pause | Wish::Exit) = (&self.thread, wish) {
            // SAFETY: the thread has not been joined, so its id is valid; the signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }
}

impl Drop for Handle {
    /// Stops the vCPU and waits for its thread.
    fn drop(&mut self) {
        self.wish(Wish::Exit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wants_to_run(&self) -> bool {
        self.wish.load(Ordering::SeqCst) == Wish::Run as u8
    }

    fn enter(&self, state: State) {
        *self.lock() = state;
        self.changed.notify_all();
    }

    /// Waits as long as a pause is wanted; true when the guest shall run on.
    fn wait_for_permission(&self) -> bool {
        let mut state = self.lock();
        loop {
            let wish = self.wish.load(Ordering::SeqCst);
            if wish == Wish::Exit as u8 {
                return false;
            }
            let next = if wish == Wish::Run as u8 {
                State::Running
            } else {
                State::Paused
            };
            if *state != next {
                *state = next;
                self.changed.notify_all();
            }
            if next == State::Running {
                return true;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The thread's side.
struct Runner<'a> {
    vcpu: Vcpu,
    shared: &'a Shared,
}

/// What one entry into the guest came to.
enum Outcome {
    Continue,
    Kicked,
    End(ExitCause),
}

impl Runner<'_> {
    fn run(mut self) {
        let _kickable = Kickable::new(&mut self.vcpu.fd);
        if self.vcpu.index == 0 {
            self.vcpu.surroundings.timeline.record(Stage::FirstInstruction);
        }
        while self.shared.wait_for_permission() {
            if let Some(cause) = self.run_guest().or_else(|| self.settle()) {
                self.vcpu.surroundings.exit.end(cause);
                break;
            }
        }
        self.shared.enter(State::Exited);
    }

    /// Runs the guest until something else is wanted of the vCPU (`None`) or the VM ends.
    fn run_guest(&mut self) -> Option<ExitCause> {
        while self.shared.wants_to_run() {
            match self.enter_guest() {
                Outcome::Continue => {}
                Outcome::Kicked => self.vcpu.fd.set_kvm_immediate_exit(0),
                Outcome::End(cause) => return Some(cause),
            }
        }
        None
    }

    /// Lets KVM finish what it has handed out, so that registers are whole, and tells the guest's clock that
    /// time passes without it.
    fn settle(&mut self) -> Option<ExitCause> {
        loop {
            self.vcpu.fd.set_kvm_immediate_exit(1);
            match self.enter_guest() {
                // An access in several parts.
                Outcome::Continue => {}
                Outcome::Kicked => break,
                Outcome::End(cause) => return Some(cause),
            }
        }
        self.vcpu.fd.set_kvm_immediate_exit(0);
        // EINVAL means that the guest does not use kvmclock.
        let _ = self.vcpu.fd.kvmclock_ctrl();
        None
    }

    fn enter_guest(&mut self) -> Outcome {
        let outside = &*self.vcpu.surroundings;
        let result = self.vcpu.fd.run();
        self.shared.exits.fetch_add(1, Ordering::Relaxed);
        let index = self.vcpu.index;
        let failed = |what: String| {
            Outcome::End(ExitCause::VmmError {
                message: format!("vCPU {index}: {what}"),
            })
        };
        match result {
            Ok(VcpuExit::MmioRead(address, data)) => outside.bus.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => outside.bus.write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => outside.ports.read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => outside.ports.write(port, data),
            Ok(VcpuExit::IoapicEoi(vector)) => outside.ioapic.end_of_interrupt(vector),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {}
            Ok(VcpuExit::Shutdown) => return Outcome::End(outside.ports.triple_fault_cause()),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                return match kind {
                    KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET => {
                        Outcome::End(ExitCause::GuestShutdown)
                    }
                    KVM_SYSTEM_EVENT_CRASH => Outcome::End(ExitCause::GuestPanic),
                    other => failed(format!("KVM reported the unknown system event {other}")),
                };
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return failed(format!(
                    "the processor refused to enter the guest (reason {reason:#x})"
                ));
            }
            Ok(VcpuExit::InternalError) => return failed(self.internal_error()),
            Ok(other) => {
                let text = format!("unexpected exit from the guest: {other:?}");
                return failed(text);
            }
            Err(error) => {
                return match error.errno() {
                    libc::EINTR => Outcome::Kicked,
                    // A vCPU that waits to be started by another one may say so.
                    libc::EAGAIN => Outcome::Continue,
                    _ => failed(format!("KVM_RUN failed: {error}")),
                };
            }
        }
        Outcome::Continue
    }

    /// KVM gave up on the guest: say where and over what.
    fn internal_error(&mut self) -> String {
        let rip = self.vcpu.fd.get_regs().map_or(0, |regs| regs.rip);
        // SAFETY: after KVM_EXIT_INTERNAL_ERROR the kernel has filled this member of the union; all of its
        // bit patterns are valid.
        let detail = unsafe { self.vcpu.fd.get_kvm_run().__bindgen_anon_1.internal };
        let data = &detail.data[..(detail.ndata as usize).min(detail.data.len())];
        let reason = match detail.suberror {
            1 => "it cannot emulate an instruction of the guest".to_owned(),
            2 => "two exceptions came at once".to_owned(),
            3 => "delivery of an event failed".to_owned(),
            other => format!("suberror {other}"),
        };
        format!("KVM internal error at guest address {rip:#x}: {reason} (data {data:#x?})")
    }
}

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// While it lives, a kick of this thread makes the vCPU leave the guest.
struct Kickable;

impl Kickable {
    fn new(fd: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        Self
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}

/// The first real-time signal: no library of ours uses it.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_signal: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer goes into the kvm_run mapping of this thread's vCPU and is taken back (Kickable)
        // before that is unmapped. The kernel reads the byte concurrently by contract; hence volatile.
        unsafe { flag.write_volatile(1) };
    }
}

fn install_kick_handler() -> io::Result<()> {
    // SAFETY: a zeroed sigaction is a valid one, and the handler does nothing but a thread-local read and a store.
    let outcome = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // Interrupted system calls of device code go on; KVM_RUN returns EINTR regardless.
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
    };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
