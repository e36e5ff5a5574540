//! System call filters from the OCI specification (config-linux.md, "Seccomp"), without libseccomp.
//!
//! Here: the specification's words, and installing a filter. `rules` decides what happens to which system call,
//! `program` turns that into a classic BPF program.

mod program;
mod rules;

use rustix::io::Errno;

use self::program::Instruction;
use super::mount::last_errno;
use super::spec::{self, SpecError};

/// Longest program that the kernel takes (linux/bpf_common.h, BPF_MAXINSNS).
const MAX_INSTRUCTIONS: usize = 4096;

/// A filter, ready to be installed.
#[derive(Clone, Debug)]
pub struct Filter {
    program: Vec<Instruction>,
    /// SECCOMP_FILTER_FLAG_*.
    flags: libc::c_ulong,
}

impl Filter {
    /// Compiles a specification.
    ///
    /// # Errors
    /// [`SpecError`] with the member: unknown actions, operators, architectures and flags; `SCMP_ACT_NOTIFY`,
    /// which needs a listener on the host.
    pub fn compile(seccomp: &spec::Seccomp) -> Result<Self, SpecError> {
        let rules = rules::Rules::new(seccomp)?;
        let program = program::compile(&rules);
        if program.len() > MAX_INSTRUCTIONS {
            return Err(SpecError::unsupported(
                "linux.seccomp",
                format!(
                    "needs {} instructions, the kernel takes {MAX_INSTRUCTIONS}: use fewer rules",
                    program.len()
                ),
            ));
        }
        Ok(Self {
            program,
            flags: flags(&seccomp.flags)?,
        })
    }

    /// Installs the filter on the calling thread for good. Needs CAP_SYS_ADMIN or no_new_privs. Allocates nothing.
    ///
    /// # Errors
    /// Those of seccomp(2).
    pub fn install(&self) -> Result<(), Errno> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.program.len()).map_err(|_| Errno::TOOBIG)?,
            filter: self.program.as_ptr().cast_mut().cast(),
        };
        // SAFETY: Instruction has the layout of struct sock_filter, the kernel reads as many as told and copies them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        if result == 0 { Ok(()) } else { Err(last_errno()) }
    }
}

fn flags(words: &[String]) -> Result<libc::c_ulong, SpecError> {
    if words.is_empty() {
        // As runc does: a filter does not turn mitigations on for programs that did not ask (seccomp(2)).
        return Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    }
    words.iter().try_fold(0, |flags, word| {
        Ok(flags
            | match word.as_str() {
                // One thread only: nothing to synchronise.
                "SECCOMP_FILTER_FLAG_TSYNC" => 0,
                "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                // Only means something to filters with a listener.
                "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => 0,
                other => {
                    return Err(SpecError::invalid(
                        "linux.seccomp.flags",
                        format!("{other:?} is no flag of seccomp(2)"),
                    ));
                }
            })
    })
}

#[cfg(test)]
mod tests;
