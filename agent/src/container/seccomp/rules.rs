//! What a specification says about each system call of each architecture.
//!
//! The rules are those of libseccomp as OCI runtimes use it: rules that repeat the default action are dropped, names
//! that an architecture does not have are passed over, a rule without arguments beats those with arguments, and of
//! the others the first that matches counts.

use std::collections::BTreeMap;

use super::super::spec::{self, SpecError};

/// SECCOMP_RET_* of linux/seccomp.h, with their data.
const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0x0000_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
const ACTION: u32 = 0xffff_0000;

const TABLE: &str = include_str!("syscalls.tbl");

/// What the filter returns for a system call (seccomp(2)).
pub type Verdict = u32;

/// An architecture of the machine (seccomp_data.arch, and for x32 bit 30 of the number).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    X86_64,
    X86,
    X32,
}

/// A comparison of a 64-bit argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    Equal(u64),
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Greater(u64),
    GreaterOrEqual(u64),
    /// The argument's bits under the first number are the second.
    Masked(u64, u64),
}

/// A verdict for calls whose arguments satisfy every comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conditional {
    pub comparisons: Vec<(u32, Comparison)>,
    pub verdict: Verdict,
}

/// All that is said about one system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Always(Verdict),
    /// In order; otherwise the default.
    When(Vec<Conditional>),
}

/// A whole specification, by architecture and number.
#[derive(Debug)]
pub struct Rules {
    pub default: Verdict,
    pub architectures: Vec<(Architecture, BTreeMap<u32, Call>)>,
    /// For system calls newer than any that the specification names.
    pub unknown: Verdict,
}

impl Rules {
    pub fn new(seccomp: &spec::Seccomp) -> Result<Self, SpecError> {
        let default = verdict(
            "linux.seccomp.defaultAction",
            &seccomp.default_action,
            seccomp.default_errno_ret,
        )?;
        let mut architectures: Vec<_> = architectures(&seccomp.architectures)?
            .into_iter()
            .map(|architecture| (architecture, BTreeMap::new()))
            .collect();
        for (index, rule) in seccomp.syscalls.iter().enumerate() {
            let member = format!("linux.seccomp.syscalls[{index}]");
            let verdict = verdict(&format!("{member}.action"), &rule.action, rule.errno_ret)?;
            let arguments = rule
                .args
                .iter()
                .map(|argument| Ok((argument.index, comparison(&member, argument)?)))
                .collect::<Result<Vec<_>, SpecError>>()?;
            if verdict == default {
                continue;
            }
            for name in &rule.names {
                let Some(numbers) = numbers(name) else { continue };
                for (architecture, calls) in &mut architectures {
                    if let Some(number) = numbers[*architecture as usize] {
                        add(calls, number, verdict, &arguments, *architecture);
                    }
                }
            }
        }
        Ok(Self {
            default,
            architectures,
            // A program that meets a filter older than itself must learn that a system call does not exist, so that
            // it takes another way; a refusal would be final. An allow list only: otherwise new calls are allowed.
            unknown: match default & ACTION {
                ALLOW | LOG | TRACE => default,
                _ => ERRNO | libc::ENOSYS as u32,
            },
        })
    }
}

fn add(
    calls: &mut BTreeMap<u32, Call>,
    number: u32,
    verdict: Verdict,
    arguments: &[(u32, Comparison)],
    architecture: Architecture,
) {
    let call = calls.entry(number).or_insert_with(|| Call::When(Vec::new()));
    let Call::When(conditionals) = call else { return };
    if arguments.is_empty() {
        *call = Call::Always(verdict);
        return;
    }
    let arguments: Vec<_> = arguments
        .iter()
        .map(|(index, comparison)| (*index, comparison.of(architecture)))
        .collect();
    // Two comparisons of one argument are alternatives: libseccomp takes an argument once per rule, and runc makes
    // one rule of each comparison then.
    let repeated = arguments
        .iter()
        .enumerate()
        .any(|(at, (index, _))| arguments[..at].iter().any(|(other, _)| other == index));
    if repeated {
        conditionals.extend(arguments.iter().map(|argument| Conditional {
            comparisons: vec![*argument],
            verdict,
        }));
    } else {
        conditionals.push(Conditional {
            comparisons: arguments,
            verdict,
        });
    }
}

impl Comparison {
    /// On x86 an argument has 32 bits.
    fn of(self, architecture: Architecture) -> Self {
        if architecture != Architecture::X86 {
            return self;
        }
        let low = |value: u64| value & u64::from(u32::MAX);
        match self {
            Self::Equal(value) => Self::Equal(low(value)),
            Self::NotEqual(value) => Self::NotEqual(low(value)),
            Self::Less(value) => Self::Less(low(value)),
            Self::LessOrEqual(value) => Self::LessOrEqual(low(value)),
            Self::Greater(value) => Self::Greater(low(value)),
            Self::GreaterOrEqual(value) => Self::GreaterOrEqual(low(value)),
            Self::Masked(mask, value) => Self::Masked(low(mask), low(value)),
        }
    }
}

fn verdict(member: &str, action: &str, errno: Option<u32>) -> Result<Verdict, SpecError> {
    let data = |otherwise: i32| errno.unwrap_or(otherwise as u32) & 0xffff;
    let verdict = match action {
        "SCMP_ACT_ALLOW" => ALLOW,
        "SCMP_ACT_LOG" => LOG,
        "SCMP_ACT_TRAP" => TRAP,
        "SCMP_ACT_ERRNO" => ERRNO | data(libc::EPERM),
        "SCMP_ACT_TRACE" => TRACE | data(libc::EPERM),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_NOTIFY" => {
            return Err(SpecError::unsupported(
                member,
                "SCMP_ACT_NOTIFY needs a listener on the host and is not supported in the guest: use another action",
            ));
        }
        other => {
            return Err(SpecError::invalid(
                member,
                format!("{other:?} is no seccomp action"),
            ));
        }
    };
    Ok(verdict)
}

fn comparison(member: &str, argument: &spec::SeccompArgument) -> Result<Comparison, SpecError> {
    if argument.index > 5 {
        return Err(SpecError::invalid(
            format!("{member}.args"),
            format!(
                "there is no argument {}: system calls have six, 0 to 5",
                argument.index
            ),
        ));
    }
    let value = argument.value;
    Ok(match argument.op.as_str() {
        "SCMP_CMP_EQ" => Comparison::Equal(value),
        "SCMP_CMP_NE" => Comparison::NotEqual(value),
        "SCMP_CMP_LT" => Comparison::Less(value),
        "SCMP_CMP_LE" => Comparison::LessOrEqual(value),
        "SCMP_CMP_GT" => Comparison::Greater(value),
        "SCMP_CMP_GE" => Comparison::GreaterOrEqual(value),
        "SCMP_CMP_MASKED_EQ" => Comparison::Masked(value, argument.value_two & value),
        other => {
            return Err(SpecError::invalid(
                format!("{member}.args"),
                format!("{other:?} is no comparison"),
            ));
        }
    })
}

/// The architectures to filter: the machine's own always, the others when asked for. Those of other machines cannot
/// occur.
fn architectures(words: &[String]) -> Result<Vec<Architecture>, SpecError> {
    const FOREIGN: [&str; 17] = [
        "ARM",
        "AARCH64",
        "MIPS",
        "MIPS64",
        "MIPS64N32",
        "MIPSEL",
        "MIPSEL64",
        "MIPSEL64N32",
        "PPC",
        "PPC64",
        "PPC64LE",
        "S390",
        "S390X",
        "PARISC",
        "PARISC64",
        "RISCV64",
        "LOONGARCH64",
    ];
    let mut found = vec![Architecture::X86_64];
    for word in words {
        match word.strip_prefix("SCMP_ARCH_") {
            Some("X86_64" | "NATIVE") => {}
            Some("X86") if !found.contains(&Architecture::X86) => found.push(Architecture::X86),
            Some("X32") if !found.contains(&Architecture::X32) => found.push(Architecture::X32),
            Some("X86" | "X32") => {}
            Some(foreign) if FOREIGN.contains(&foreign) => {}
            _ => {
                return Err(SpecError::invalid(
                    "linux.seccomp.architectures",
                    format!("{word:?} is no architecture"),
                ));
            }
        }
    }
    Ok(found)
}

/// A system call's numbers, in the order of [`Architecture`]. None for a name that is not known.
fn numbers(name: &str) -> Option<[Option<u32>; 3]> {
    let line = TABLE
        .lines()
        .filter(|line| !line.starts_with('#'))
        .find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')))?;
    let mut fields = line.split(' ').skip(1).map(|field| field.parse().ok());
    Some([fields.next()?, fields.next()?, fields.next()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(numbers("read"), Some([Some(0), Some(3), Some(0)]));
        assert_eq!(numbers("openat2"), Some([Some(437), Some(437), Some(437)]));
        assert_eq!(numbers("socketcall"), Some([None, Some(102), None]));
        assert_eq!(numbers("readv"), Some([Some(19), Some(145), Some(515)]));
        assert_eq!(numbers("no_such_call"), None);
        assert_eq!(numbers("#"), None);
        for (name, number) in [("clone3", libc::SYS_clone3), ("seccomp", libc::SYS_seccomp)] {
            assert_eq!(numbers(name).unwrap()[0], Some(number as u32));
        }
    }

    #[test]
    fn a_rule_without_arguments_beats_those_with() {
        let rule = |action: &str, value: Option<u64>| spec::SeccompRule {
            names: vec!["read".into()],
            action: action.into(),
            args: value
                .map(|value| spec::SeccompArgument {
                    index: 0,
                    value,
                    value_two: 0,
                    op: "SCMP_CMP_EQ".into(),
                })
                .into_iter()
                .collect(),
            ..Default::default()
        };
        let rules = Rules::new(&spec::Seccomp {
            default_action: "SCMP_ACT_ERRNO".into(),
            syscalls: vec![
                rule("SCMP_ACT_TRAP", Some(1)),
                rule("SCMP_ACT_ALLOW", None),
                rule("SCMP_ACT_LOG", Some(2)),
            ],
            ..Default::default()
        })
        .unwrap();
        assert_eq!(rules.architectures[0].1[&0], Call::Always(ALLOW));
    }

    #[test]
    fn unknown_words_are_refused_by_member() {
        let refuse = |seccomp: spec::Seccomp| Rules::new(&seccomp).unwrap_err().to_string();
        let error = refuse(spec::Seccomp {
            default_action: "ALLOW".into(),
            ..Default::default()
        });
        assert!(error.starts_with("linux.seccomp.defaultAction: "), "{error}");
        let error = refuse(spec::Seccomp {
            default_action: "SCMP_ACT_ALLOW".into(),
            syscalls: vec![spec::SeccompRule {
                action: "SCMP_ACT_NOTIFY".into(),
                ..Default::default()
            }],
            ..Default::default()
        });
        assert!(
            error.contains("syscalls[0].action") && error.contains("listener"),
            "{error}"
        );
        let error = refuse(spec::Seccomp {
            default_action: "SCMP_ACT_ALLOW".into(),
            architectures: vec!["SCMP_ARCH_Z80".into()],
            ..Default::default()
        });
        assert!(error.contains("Z80"), "{error}");
    }
}
