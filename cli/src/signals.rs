//! Signals by name, and those that are passed on to a container.

use crate::error::Error;

/// Names of signal(7) on x86-64 by number; the list starts at 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// Those that a person or a supervisor sends to a foreground command.
pub const FORWARDED: [i32; 6] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// Reads `TERM`, `SIGTERM`, `sigterm` or `15`.
///
/// # Errors
/// [`Error::BadSignal`].
pub fn parse(text: &str) -> Result<u32, Error> {
    if let Ok(number @ 1..=64) = text.parse() {
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let position = NAMES.iter().position(|known| *known == name);
    match position.and_then(|index| u32::try_from(index + 1).ok()) {
        Some(number) => Ok(number),
        None => Err(Error::BadSignal(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["15", "TERM", "SIGTERM", "sigterm"] {
            assert_eq!(parse(text).unwrap(), 15, "{text}");
        }
        assert_eq!(parse("SYS").unwrap(), libc::SIGSYS as u32);
        assert_eq!(parse("KILL").unwrap(), libc::SIGKILL as u32);
    }

    #[test]
    fn what_is_no_signal_is_refused_by_name() {
        for text in ["0", "65", "FOO", "", "-9"] {
            assert!(
                matches!(parse(text), Err(Error::BadSignal(named)) if named == text),
                "{text}"
            );
        }
    }
}
