//! The device allow list of the OCI specification as a BPF program on the cgroup (cgroup v2, "Device controller").
//!
//! The program gets what is accessed and how (struct bpf_cgroup_dev_ctx), and returns 1 to allow it. As with the lists
//! of cgroup v1, the last rule that matches counts, and what no rule names is refused.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::super::mount::last_errno;
use super::super::spec::{DeviceRule, SpecError};
use super::CgroupError;

/// What every container may use, whatever its list says: null, full, zero, random, urandom, tty, terminals and their
/// multiplexer; and it may make nodes of any device (config-linux.md, "Default Devices").
const ALWAYS: [(Kind, Option<u32>, Option<u32>, u32); 10] = [
    (Kind::Character, None, None, MKNOD),
    (Kind::Block, None, None, MKNOD),
    (Kind::Character, Some(1), Some(3), ALL),
    (Kind::Character, Some(1), Some(5), ALL),
    (Kind::Character, Some(1), Some(7), ALL),
    (Kind::Character, Some(1), Some(8), ALL),
    (Kind::Character, Some(1), Some(9), ALL),
    (Kind::Character, Some(5), Some(0), ALL),
    (Kind::Character, Some(5), Some(2), ALL),
    (Kind::Character, Some(136), None, ALL),
];

/// BPF_DEVCG_ACC_*.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Any,
    /// BPF_DEVCG_DEV_BLOCK.
    Block,
    /// BPF_DEVCG_DEV_CHAR.
    Character,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Kind,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// struct bpf_insn.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbc;
const MOVE: u8 = 0xb4;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_NOT_EQUAL: u8 = 0x56;
const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5e;
const EXIT: u8 = 0x95;

/// Registers: 0 result, 1 context; these hold what is asked for.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// Compiles a list; None when it allows everything.
///
/// # Errors
/// [`SpecError::Invalid`] with the member.
pub fn compile(list: &[DeviceRule]) -> Result<Option<Vec<Instruction>>, SpecError> {
    let mut rules = list
        .iter()
        .enumerate()
        .map(|(index, rule)| parse(index, rule))
        .collect::<Result<Vec<_>, _>>()?;
    // Nothing before a rule for everything counts.
    if let Some(index) = rules.iter().rposition(is_total) {
        if rules[index].allow && rules[index..].iter().all(|rule| rule.allow) {
            return Ok(None);
        }
        // A refusal of everything is the end of every program anyway.
        let refuses = !rules[index].allow;
        rules.drain(..index + usize::from(refuses));
    }
    // First what counts last.
    let always = ALWAYS.iter().map(|(kind, major, minor, access)| Rule {
        allow: true,
        kind: *kind,
        major: *major,
        minor: *minor,
        access: *access,
    });
    let rules: Vec<Rule> = always.chain(rules.into_iter().rev()).collect();
    Ok(Some(program(&rules)))
}

fn parse(index: usize, rule: &DeviceRule) -> Result<Rule, SpecError> {
    let member = |name: &str| format!("linux.resources.devices[{index}].{name}");
    let kind = match rule.kind.as_str() {
        "" | "a" => Kind::Any,
        "c" | "u" => Kind::Character,
        "b" => Kind::Block,
        other => {
            return Err(SpecError::invalid(
                member("type"),
                format!("{other:?} is not one of a, b, c"),
            ));
        }
    };
    let number = |name: &str, number: Option<i64>| match number {
        // -1 is how cgroup v1 tools write "any".
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number)
            .map(Some)
            .map_err(|_| SpecError::invalid(member(name), format!("{number} is no device number"))),
    };
    let access = if rule.access.is_empty() {
        "rwm"
    } else {
        &rule.access
    };
    let access = access.chars().try_fold(0, |bits, letter| match letter {
        'r' => Ok(bits | READ),
        'w' => Ok(bits | WRITE),
        'm' => Ok(bits | MKNOD),
        other => Err(SpecError::invalid(
            member("access"),
            format!("{other:?} is not one of r, w, m"),
        )),
    })?;
    Ok(Rule {
        allow: rule.allow,
        kind,
        major: number("major", rule.major)?,
        minor: number("minor", rule.minor)?,
        access,
    })
}

fn program(rules: &[Rule]) -> Vec<Instruction> {
    let op = |code, destination: u8, source: u8, offset, immediate| Instruction {
        code,
        registers: destination | source << 4,
        offset,
        immediate,
    };
    let mut code = vec![
        // access_type: the access above, the kind in the low 16 bits.
        op(LOAD_WORD, KIND, CONTEXT, 0, 0),
        op(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        op(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        op(AND, KIND, 0, 0, 0xffff),
        op(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        op(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules {
        let mut block = Vec::new();
        match rule.kind {
            Kind::Any => {}
            Kind::Block => block.push((JUMP_NOT_EQUAL, KIND, 1)),
            Kind::Character => block.push((JUMP_NOT_EQUAL, KIND, 2)),
        }
        for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
            if let Some(number) = number {
                block.push((JUMP_NOT_EQUAL, register, number as i32));
            }
        }
        // Every access that is asked for must be among the rule's: (asked & rule) == asked.
        let access = if rule.access == ALL { 0 } else { 3 };
        let length = block.len() + access + 2;
        for (index, (jump, register, value)) in block.into_iter().enumerate() {
            code.push(op(jump, register, 0, (length - index - 1) as i16, value));
        }
        if access != 0 {
            code.push(op(MOVE_REGISTER, CONTEXT, ACCESS, 0, 0));
            code.push(op(AND, CONTEXT, 0, 0, rule.access as i32));
            code.push(op(JUMP_NOT_EQUAL_REGISTER, CONTEXT, ACCESS, 2, 0));
        }
        code.push(op(MOVE, RESULT, 0, 0, i32::from(rule.allow)));
        code.push(op(EXIT, 0, 0, 0, 0));
    }
    // The kernel refuses instructions that cannot be reached.
    if !rules.last().is_some_and(is_total) {
        code.push(op(MOVE, RESULT, 0, 0, 0));
        code.push(op(EXIT, 0, 0, 0, 0));
    }
    code
}

/// Whether a rule matches every access.
fn is_total(rule: &Rule) -> bool {
    rule.kind == Kind::Any && rule.access == ALL && (rule.major, rule.minor) == (None, None)
}

/// bpf(2): commands, types and flags of linux/bpf.h.
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const F_ALLOW_MULTI: u32 = 2;
const F_REPLACE: u32 = 4;

/// The beginning of union bpf_attr for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    length: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The beginning of union bpf_attr for BPF_PROG_ATTACH.
#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replace: u32,
}

/// Puts a program on a cgroup in place of the one that is there; None takes it away.
///
/// # Errors
/// [`CgroupError::Devices`].
pub fn replace(
    cgroup: BorrowedFd<'_>,
    old: Option<OwnedFd>,
    program: Option<&[Instruction]>,
) -> Result<Option<OwnedFd>, CgroupError> {
    let fail = |what| move |source| CgroupError::Devices { what, source };
    let mut attributes = AttachAttributes {
        target: cgroup.as_raw_fd() as u32,
        attach_type: ATTACH_CGROUP_DEVICE,
        flags: F_ALLOW_MULTI,
        ..Default::default()
    };
    let Some(program) = program else {
        if let Some(old) = old {
            attributes.program = old.as_raw_fd() as u32;
            attributes.flags = 0;
            bpf(PROG_DETACH, &attributes).map_err(fail("detach"))?;
        }
        return Ok(None);
    };
    let load = LoadAttributes {
        program_type: PROG_TYPE_CGROUP_DEVICE,
        length: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Default::default()
    };
    let fd = bpf(PROG_LOAD, &load).map_err(fail("load"))?;
    // SAFETY: BPF_PROG_LOAD has just made this descriptor for us.
    let new = unsafe { OwnedFd::from_raw_fd(fd) };
    attributes.program = new.as_raw_fd() as u32;
    if let Some(old) = &old {
        attributes.flags |= F_REPLACE;
        attributes.replace = old.as_raw_fd() as u32;
    }
    bpf(PROG_ATTACH, &attributes).map_err(fail("attach"))?;
    Ok(Some(new))
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> Result<i32, Errno> {
    // SAFETY: the kernel reads as many bytes as told, and the buffers they name; it writes nothing back for the
    // commands used here, as no log buffer is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result == -1 {
        Err(last_errno())
    } else {
        Ok(result as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(json: &str) -> Vec<DeviceRule> {
        serde_json::from_str(json).unwrap()
    }

    /// Interprets what `program` emits.
    fn allowed(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let mut registers = [0u32; 8];
        let mut at = 0;
        loop {
            let instruction = program[at];
            at += 1;
            let destination = usize::from(instruction.registers & 15);
            let source = registers[usize::from(instruction.registers >> 4)];
            let immediate = instruction.immediate as u32;
            match instruction.code {
                LOAD_WORD => {
                    registers[destination] = match instruction.offset {
                        0 => access << 16 | kind,
                        4 => major,
                        _ => minor,
                    }
                }
                MOVE_REGISTER => registers[destination] = source,
                MOVE => registers[destination] = immediate,
                AND => registers[destination] &= immediate,
                SHIFT_RIGHT => registers[destination] >>= immediate,
                JUMP_NOT_EQUAL if registers[destination] != immediate => at += instruction.offset as usize,
                JUMP_NOT_EQUAL_REGISTER if registers[destination] != source => {
                    at += instruction.offset as usize;
                }
                JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_REGISTER => {}
                EXIT => return registers[0] == 1,
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn the_last_matching_rule_counts_and_the_rest_is_refused() {
        let program = compile(&rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"c","major":10,"minor":229,"access":"rw"},
                {"allow":true,"type":"b","major":8,"access":"r"},
                {"allow":false,"type":"b","major":8,"minor":1,"access":"rwm"}]"#,
        ))
        .unwrap()
        .unwrap();
        let check = |kind, access, major, minor| allowed(&program, kind, access, major, minor);
        assert!(check(2, READ | WRITE, 10, 229));
        assert!(!check(2, READ, 10, 228));
        assert!(check(1, READ, 8, 0));
        assert!(!check(1, READ | WRITE, 8, 0));
        assert!(!check(1, READ, 8, 1));
        // Standard devices, terminals, and making nodes.
        assert!(check(2, READ | WRITE, 1, 3) && check(2, WRITE, 136, 7) && check(1, MKNOD, 8, 1));
        assert!(!check(1, MKNOD | READ, 8, 1));
    }

    #[test]
    fn a_list_that_allows_everything_needs_no_program() {
        assert_eq!(
            compile(&rules(r#"[{"allow":false},{"allow":true,"access":"rwm"}]"#)).unwrap(),
            None
        );
        assert!(
            compile(&rules(
                r#"[{"allow":true,"type":"a"},{"allow":false,"type":"c","major":1}]"#
            ))
            .unwrap()
            .is_some()
        );
    }

    #[test]
    fn malformed_rules_are_refused_by_member() {
        for (json, member) in [
            (r#"[{"type":"x"}]"#, "devices[0].type"),
            (r#"[{},{"access":"q"}]"#, "devices[1].access"),
            (r#"[{"major":-5}]"#, "devices[0].major"),
        ] {
            let error = compile(&rules(json)).unwrap_err().to_string();
            assert!(error.contains(member), "{error}");
        }
    }

    #[test]
    fn the_kernel_takes_the_program() {
        let program = compile(&rules(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]"#,
        ))
        .unwrap()
        .unwrap();
        let load = LoadAttributes {
            program_type: PROG_TYPE_CGROUP_DEVICE,
            length: program.len() as u32,
            instructions: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            ..Default::default()
        };
        match bpf(PROG_LOAD, &load) {
            // SAFETY: a descriptor that was just made.
            Ok(fd) => drop(unsafe { OwnedFd::from_raw_fd(fd) }),
            Err(errno @ (Errno::PERM | Errno::NOSYS)) => {
                println!("skipped: bpf(2) is not allowed here: {errno}");
            }
            Err(errno) => panic!("the verifier refuses: {errno}"),
        }
    }
}
