//! How a VMM ended, in words: what it said itself, and the guest console's last lines.

use protocol::vmm::ExitCause;

use crate::spawn::Ended;

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// What it said itself, when it could.
    pub(crate) cause: Option<ExitCause>,
    /// The guest console's last lines.
    pub(crate) console: String,
    /// How its process ended.
    pub(crate) ended: Ended,
    /// What it said last on its standard error.
    pub(crate) stderr: String,
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.cause {
            Some(ExitCause::GuestShutdown) => f.write_str("the guest shut itself down")?,
            Some(ExitCause::GuestPanic) => f.write_str("the guest kernel panicked")?,
            Some(ExitCause::TripleFault) => {
                f.write_str("a virtual CPU of the guest crashed (triple fault)")?;
            }
            Some(ExitCause::Requested) => f.write_str("the VM was ended on request")?,
            Some(ExitCause::VmmError { message }) => write!(f, "the VMM gave up: {message}")?,
            None => write!(f, "the VMM died: {}", self.ended)?,
        }
        let stderr = self.stderr.trim();
        if !stderr.is_empty() {
            write!(f, "; it said: {}", one_line(stderr))?;
        }
        if !self.console.trim().is_empty() && self.cause != Some(ExitCause::Requested) {
            write!(f, "; {}", console_words(&self.console))?;
        }
        Ok(())
    }
}

/// The guest console's last lines as part of a message; of a kernel panic the lines that lead to it, without the
/// addresses that follow. The guest chose the bytes: control characters are not passed on.
pub(crate) fn console_words(console: &str) -> String {
    const LINES: usize = 12;
    let mut lines: Vec<&str> = console
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    if let Some(panic) = lines.iter().position(|line| line.contains("Kernel panic")) {
        lines.truncate(panic + 1);
    }
    if lines.is_empty() {
        return "the guest's console is empty".to_owned();
    }
    let last = &lines[lines.len().saturating_sub(LINES)..];
    format!("the guest's console ends with: {}", one_line(&last.join("\n")))
}

fn one_line(text: &str) -> String {
    text.replace('\n', " | ")
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_quoted_with_what_led_to_it_and_without_its_trace() {
        let console = "mounting\n[1.0] Kernel panic - not syncing: no init\n[1.1] Call Trace:\n[1.1]  ? 0xffffffff8105980c\n";
        assert_eq!(
            console_words(console),
            "the guest's console ends with: mounting | [1.0] Kernel panic - not syncing: no init"
        );
        let many: String = (0..50).map(|n| format!("line {n}\n\n")).collect();
        assert!(console_words(&many).ends_with("line 48 | line 49"));
        assert!(!console_words(&many).contains("line 30"));
        assert_eq!(
            console_words("\x1b[31mred\n"),
            "the guest's console ends with:  [31mred"
        );
    }
}
