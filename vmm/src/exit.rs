//! Why the VM ends: written once by whichever thread sees it first, read by the control loop.

use std::io;
use std::sync::{Mutex, PoisonError};

use protocol::vmm::ExitCause;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The place where the first cause is kept.
#[derive(Debug)]
pub struct ExitSlot {
    cause: Mutex<Option<ExitCause>>,
    event: EventFd,
}

impl ExitSlot {
    /// An empty slot.
    ///
    /// # Errors
    /// What eventfd(2) reports.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            cause: Mutex::new(None),
            event: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Ends the VM for this cause, unless it is ending already.
    pub fn end(&self, cause: ExitCause) {
        let mut slot = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(cause);
            // Fails only when the counter is full; the event is readable then anyway.
            let _ = self.event.write(1);
        }
    }

    /// The cause, when the VM is ending.
    #[must_use]
    pub fn cause(&self) -> Option<ExitCause> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Readable once there is a cause.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// An error with all its causes, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // `#[error(transparent)]` and messages that embed their source would otherwise repeat it.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_wins() {
        let slot = ExitSlot::new().unwrap();
        assert!(slot.event().read().is_err());
        slot.end(ExitCause::GuestPanic);
        slot.end(ExitCause::TripleFault);
        assert_eq!(slot.cause(), Some(ExitCause::GuestPanic));
        assert_eq!(slot.event().read().unwrap(), 1);
    }
}
