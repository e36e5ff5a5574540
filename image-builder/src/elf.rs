//! Checks that a program can be the first process of a guest: an x86_64 ELF program without a dynamic loader.
//! Nothing else is judged; the kernel reads the rest. Source: System V ABI, "Object Files".

/// Why a file cannot be the guest's first process. Each message names the cure.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ElfError {
    /// No ELF magic.
    #[error("it is not an ELF program: name the built agent binary, not a script or an archive")]
    NotElf,
    /// Another word size, byte order or machine.
    #[error("it is not built for x86_64: build the agent for x86_64-unknown-linux-gnu")]
    WrongMachine,
    /// A relocatable object, a core dump.
    #[error("it is not a program (ELF type {0}): name the linked binary")]
    NotAProgram(u16),
    /// The file ends before its headers do, or has nothing to load.
    #[error("its ELF headers are damaged: build it again")]
    Damaged,
    /// A program that needs a loader, which no guest image holds.
    #[error("it is dynamically linked (needs {0}): link it statically with -C target-feature=+crt-static")]
    Dynamic(String),
}

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PROGRAM_HEADER_SIZE: usize = 56;

/// Accepts a statically linked x86_64 program (position independent or not).
///
/// # Errors
/// Everything else, see [`ElfError`].
pub fn check_static_program(bytes: &[u8]) -> Result<(), ElfError> {
    if bytes.get(..4) != Some(b"\x7fELF") {
        return Err(ElfError::NotElf);
    }
    // 64-bit, little-endian.
    if bytes.get(4..6).ok_or(ElfError::Damaged)? != [2, 1] || u16_at(bytes, 18)? != EM_X86_64 {
        return Err(ElfError::WrongMachine);
    }
    let kind = u16_at(bytes, 16)?;
    if kind != ET_EXEC && kind != ET_DYN {
        return Err(ElfError::NotAProgram(kind));
    }
    let table = usize_at(bytes, 32)?;
    let entry_size = usize::from(u16_at(bytes, 54)?);
    let count = usize::from(u16_at(bytes, 56)?);
    if entry_size < PROGRAM_HEADER_SIZE {
        return Err(ElfError::Damaged);
    }
    let mut loads = false;
    for index in 0..count {
        let start = index
            .checked_mul(entry_size)
            .and_then(|offset| table.checked_add(offset))
            .ok_or(ElfError::Damaged)?;
        let header = slice(bytes, start, PROGRAM_HEADER_SIZE)?;
        match u32::from_le_bytes(header[..4].try_into().map_err(|_| ElfError::Damaged)?) {
            PT_LOAD => {
                slice(bytes, usize_at(header, 8)?, usize_at(header, 32)?)?;
                loads = true;
            }
            PT_INTERP => {
                let name = slice(bytes, usize_at(header, 8)?, usize_at(header, 32)?)?;
                let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
                return Err(ElfError::Dynamic(name));
            }
            _ => {}
        }
    }
    if loads { Ok(()) } else { Err(ElfError::Damaged) }
}

fn slice(bytes: &[u8], start: usize, length: usize) -> Result<&[u8], ElfError> {
    start
        .checked_add(length)
        .and_then(|end| bytes.get(start..end))
        .ok_or(ElfError::Damaged)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, ElfError> {
    let raw = slice(bytes, at, 2)?;
    Ok(u16::from_le_bytes([raw[0], raw[1]]))
}

fn usize_at(bytes: &[u8], at: usize) -> Result<usize, ElfError> {
    let raw: [u8; 8] = slice(bytes, at, 8)?.try_into().map_err(|_| ElfError::Damaged)?;
    usize::try_from(u64::from_le_bytes(raw)).map_err(|_| ElfError::Damaged)
}

/// Small valid and invalid programs for the tests of this crate.
#[cfg(test)]
pub mod samples {
    /// An ELF file with one program header per given type, each covering the last bytes of the file.
    pub fn program(machine: u16, kind: u16, headers: &[u32]) -> Vec<u8> {
        let interpreter = b"/lib64/ld-linux-x86-64.so.2\0";
        let data_at = 64 + 56 * headers.len();
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(64, 0);
        file[16..18].copy_from_slice(&kind.to_le_bytes());
        file[18..20].copy_from_slice(&machine.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&u16::try_from(headers.len()).unwrap().to_le_bytes());
        for kind in headers {
            let mut header = [0u8; 56];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&(data_at as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(interpreter.len() as u64).to_le_bytes());
            file.extend(header);
        }
        file.extend(interpreter);
        file
    }

    /// A program the builder accepts.
    pub fn agent() -> Vec<u8> {
        program(62, 2, &[1])
    }
}

#[cfg(test)]
mod tests {
    use super::samples::{agent, program};
    use super::*;

    #[test]
    fn static_programs_pass() {
        assert_eq!(check_static_program(&agent()), Ok(()));
        assert_eq!(check_static_program(&program(62, 3, &[1, 2])), Ok(()));
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(
            check_static_program(&own).is_ok(),
            cfg!(target_feature = "crt-static")
        );
    }

    #[test]
    fn others_are_refused_with_their_reason() {
        assert_eq!(check_static_program(b"#!/bin/sh\n"), Err(ElfError::NotElf));
        assert_eq!(check_static_program(b""), Err(ElfError::NotElf));
        assert_eq!(
            check_static_program(&program(183, 2, &[1])),
            Err(ElfError::WrongMachine)
        );
        assert_eq!(
            check_static_program(&program(62, 1, &[1])),
            Err(ElfError::NotAProgram(1))
        );
        assert_eq!(check_static_program(&program(62, 3, &[])), Err(ElfError::Damaged));
        let dynamic = check_static_program(&program(62, 3, &[3, 1])).unwrap_err();
        assert_eq!(dynamic, ElfError::Dynamic("/lib64/ld-linux-x86-64.so.2".into()));
        assert!(dynamic.to_string().contains("crt-static"));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = agent();
        for length in 0..whole.len() {
            assert!(check_static_program(&whole[..length]).is_err(), "{length} bytes");
        }
    }
}
