//! Capabilities: the names of the OCI specification, and what a process is left with (capabilities(7)).

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
};

use protocol::capabilities::NAMES;

use super::spec::{self, SpecError};

/// The five sets of a process, one bit per capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

impl Sets {
    /// Reads the sets by name.
    ///
    /// # Errors
    /// [`SpecError::Invalid`] with an unknown name.
    pub fn parse(capabilities: &spec::Capabilities) -> Result<Self, SpecError> {
        let set = |member: &str, names: &[String]| -> Result<u64, SpecError> {
            names.iter().try_fold(0, |bits, name| {
                let number = NAMES.iter().position(|known| known == name).ok_or_else(|| {
                    SpecError::invalid(
                        format!("process.capabilities.{member}"),
                        format!("{name:?} is no capability of Linux"),
                    )
                })?;
                Ok(bits | 1 << number)
            })
        };
        Ok(Self {
            bounding: set("bounding", &capabilities.bounding)?,
            effective: set("effective", &capabilities.effective)?,
            inheritable: set("inheritable", &capabilities.inheritable)?,
            permitted: set("permitted", &capabilities.permitted)?,
            ambient: set("ambient", &capabilities.ambient)?,
        })
    }

    /// Takes everything out of the bounding set that is not in these sets. Needs CAP_SETPCAP, so it comes before
    /// the change of user.
    ///
    /// # Errors
    /// Those of prctl(2), PR_CAPBSET_DROP.
    pub fn apply_bounding(&self) -> Result<(), Errno> {
        for number in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            match capability_is_in_bounding_set(capability) {
                // The first number that the kernel does not know.
                Err(Errno::INVAL) => break,
                Err(errno) => return Err(errno),
                Ok(true) if self.bounding & 1 << number == 0 => {
                    remove_capability_from_bounding_set(capability)?;
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Sets the other four sets. A capability that the kernel or the VM does not have is left out, as it cannot
    /// be given.
    ///
    /// # Errors
    /// Those of capset(2).
    pub fn apply(&self) -> Result<(), Errno> {
        let held = rustix::thread::capabilities(None)?.permitted;
        let keep = |bits: u64| CapabilitySet::from_bits_retain(bits) & held;
        set_capabilities(
            None,
            CapabilitySets {
                effective: keep(self.effective),
                permitted: keep(self.permitted),
                inheritable: keep(self.inheritable),
            },
        )?;
        clear_ambient_capability_set()?;
        for number in 0..u64::BITS {
            // Only what is both permitted and inheritable can be ambient; the rest is ignored as other runtimes do.
            if self.ambient & self.permitted & self.inheritable & held.bits() & 1 << number != 0 {
                configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(1 << number), true)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbers_of_the_kernel_header() {
        let sets = Sets::parse(&spec::Capabilities {
            bounding: vec!["CAP_CHOWN".into(), "CAP_SYS_ADMIN".into()],
            effective: vec!["CAP_CHECKPOINT_RESTORE".into()],
            ..Default::default()
        })
        .unwrap();
        assert_eq!(sets.bounding, 1 | 1 << 21);
        assert_eq!(sets.effective, 1 << 40);
        assert_eq!(sets.permitted, 0);
    }

    #[test]
    fn an_unknown_name_is_refused_with_its_set() {
        let error = Sets::parse(&spec::Capabilities {
            ambient: vec!["NET_RAW".into()],
            ..Default::default()
        })
        .unwrap_err()
        .to_string();
        assert_eq!(
            error,
            "process.capabilities.ambient: \"NET_RAW\" is no capability of Linux"
        );
    }
}
