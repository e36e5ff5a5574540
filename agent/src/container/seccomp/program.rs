//! Classic BPF programs (linux/filter.h) from [`Rules`].
//!
//! The architecture is tested first, then the number by binary search over ranges of numbers with the same verdict,
//! then the arguments, each as two 32-bit halves. Every piece of code ends in returns only, so pieces can be put
//! after each other and reached by forward jumps.

use std::collections::BTreeMap;

use super::rules::{Architecture, Call, Comparison, Conditional, Rules, Verdict};

/// struct sock_filter.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

/// BPF_LD | BPF_W | BPF_ABS.
pub const LOAD: u16 = 0x20;
/// BPF_ALU | BPF_AND | BPF_K.
pub const AND: u16 = 0x54;
/// BPF_JMP | BPF_JA.
pub const JUMP: u16 = 0x05;
/// BPF_JMP | BPF_JEQ | BPF_K.
pub const JUMP_EQUAL: u16 = 0x15;
/// BPF_JMP | BPF_JGT | BPF_K.
pub const JUMP_GREATER: u16 = 0x25;
/// BPF_JMP | BPF_JGE | BPF_K.
pub const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
/// BPF_RET | BPF_K.
pub const RETURN: u16 = 0x06;

/// struct seccomp_data.
pub const NUMBER: u32 = 0;
pub const ARCHITECTURE: u32 = 4;
pub const ARGUMENTS: u32 = 16;

/// AUDIT_ARCH_X86_64 and AUDIT_ARCH_I386 (linux/audit.h).
pub const AUDIT_X86_64: u32 = 0xc000_003e;
pub const AUDIT_I386: u32 = 0x4000_0003;
/// Set in the numbers of x32 (__X32_SYSCALL_BIT).
pub const X32_BIT: u32 = 0x4000_0000;
/// A call of an architecture that was not asked for ends its thread, as with libseccomp.
const FOREIGN: Verdict = 0;

type Code = Vec<Instruction>;

fn statement(code: u16, k: u32) -> Instruction {
    Instruction {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Compiles rules.
pub fn compile(rules: &Rules) -> Code {
    let of = |wanted: Architecture| {
        rules
            .architectures
            .iter()
            .find(|(architecture, _)| *architecture == wanted)
            .map(|(_, calls)| {
                numbers(
                    rules,
                    calls,
                    if wanted == Architecture::X32 { X32_BIT } else { 0 },
                )
            })
    };
    let foreign = || vec![statement(RETURN, FOREIGN)];
    let x86_64 = choose(
        (JUMP_GREATER_OR_EQUAL, X32_BIT),
        of(Architecture::X32).unwrap_or_else(foreign),
        of(Architecture::X86_64).unwrap_or_else(foreign),
    );
    // A tracer that skips a call sets its number to -1; that is neither foreign nor x32.
    let x86_64 = choose(
        (JUMP_EQUAL, u32::MAX),
        vec![statement(RETURN, rules.default)],
        x86_64,
    );
    let x86 = of(Architecture::X86).unwrap_or_else(foreign);
    let others = choose((JUMP_EQUAL, AUDIT_I386), with_number(x86), foreign());
    let mut program = vec![statement(LOAD, ARCHITECTURE)];
    program.extend(choose((JUMP_EQUAL, AUDIT_X86_64), with_number(x86_64), others));
    program
}

/// Loads the number before `code`.
fn with_number(code: Code) -> Code {
    let mut loaded = vec![statement(LOAD, NUMBER)];
    loaded.extend(code);
    loaded
}

/// `yes` when the test of the accumulator holds, otherwise `no`.
fn choose((test, k): (u16, u32), yes: Code, no: Code) -> Code {
    let mut code = Vec::with_capacity(yes.len() + no.len() + 2);
    match u8::try_from(no.len()) {
        Ok(distance) => code.push(Instruction {
            code: test,
            jt: distance,
            jf: 0,
            k,
        }),
        // Conditional jumps reach 255 instructions; the unconditional one reaches all.
        Err(_) => code.extend([
            Instruction {
                code: test,
                jt: 0,
                jf: 1,
                k,
            },
            statement(JUMP, u32::try_from(no.len()).unwrap_or(u32::MAX)),
        ]),
    }
    code.extend(no);
    code.extend(yes);
    code
}

/// Decides by number; it is in the accumulator.
fn numbers(rules: &Rules, calls: &BTreeMap<u32, Call>, bit: u32) -> Code {
    let default = Call::Always(rules.default);
    let unknown = Call::Always(rules.unknown);
    // Where the verdict changes, and to what.
    let mut ranges: Vec<(u32, &Call)> = vec![(0, &default)];
    let mut push = |start: u32, call| {
        if ranges.last().is_some_and(|(last, _)| *last == start) {
            ranges.pop();
        }
        if ranges.last().is_none_or(|(_, last)| *last != call) {
            ranges.push((start, call));
        }
    };
    for (index, (number, call)) in calls.iter().enumerate() {
        push(number | bit, call);
        let last = index + 1 == calls.len();
        push((number | bit) + 1, if last { &unknown } else { &default });
    }
    search(&ranges, rules.default)
}

fn search(ranges: &[(u32, &Call)], default: Verdict) -> Code {
    match ranges {
        [] => vec![statement(RETURN, default)],
        [(_, Call::Always(verdict))] => vec![statement(RETURN, *verdict)],
        [(_, Call::When(conditionals))] => arguments(conditionals, default),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            choose(
                (JUMP_GREATER_OR_EQUAL, high[0].0),
                search(high, default),
                search(low, default),
            )
        }
    }
}

/// Decides by arguments.
fn arguments(conditionals: &[Conditional], default: Verdict) -> Code {
    let mut code = Vec::new();
    for conditional in conditionals {
        let pieces: Vec<_> = conditional
            .comparisons
            .iter()
            .map(|(index, comparison)| compare(*index, *comparison))
            .collect();
        let length = pieces.iter().map(Vec::len).sum::<usize>() + 1;
        let mut at = 0;
        for piece in pieces {
            let end = at + piece.len();
            for (code_, k, yes, no) in piece {
                let to = |target| match target {
                    Target::Next => 0,
                    Target::Holds => end - at - 1,
                    Target::Fails => length - at - 1,
                };
                // Six comparisons of six instructions at most, so every distance fits.
                let distance = |target| u8::try_from(to(target)).unwrap_or(u8::MAX);
                code.push(Instruction {
                    code: code_,
                    jt: distance(yes),
                    jf: distance(no),
                    k,
                });
                at += 1;
            }
        }
        code.push(statement(RETURN, conditional.verdict));
    }
    code.push(statement(RETURN, default));
    code
}

/// Where a jump of a comparison goes.
#[derive(Clone, Copy)]
enum Target {
    Next,
    /// Behind the comparison.
    Holds,
    /// To the next rule.
    Fails,
}

/// One comparison: (code, k, when true, when false).
fn compare(index: u32, comparison: Comparison) -> Vec<(u16, u32, Target, Target)> {
    use Target::{Fails, Holds, Next};
    let low = ARGUMENTS + 8 * index;
    let load = |offset| (LOAD, offset, Next, Next);
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    // Compares the high halves, and the low ones when those are equal.
    let ordered = |value: u64, test, greater: Target, smaller: Target, yes: Target, no: Target| {
        let (high_half, low_half) = halves(value);
        vec![
            load(low + 4),
            (JUMP_GREATER, high_half, greater, Next),
            (JUMP_EQUAL, high_half, Next, smaller),
            load(low),
            (test, low_half, yes, no),
        ]
    };
    match comparison {
        Comparison::Equal(value) => {
            let (high_half, low_half) = halves(value);
            vec![
                load(low + 4),
                (JUMP_EQUAL, high_half, Next, Fails),
                load(low),
                (JUMP_EQUAL, low_half, Holds, Fails),
            ]
        }
        Comparison::NotEqual(value) => {
            let (high_half, low_half) = halves(value);
            vec![
                load(low + 4),
                (JUMP_EQUAL, high_half, Next, Holds),
                load(low),
                (JUMP_EQUAL, low_half, Fails, Holds),
            ]
        }
        Comparison::Masked(mask, value) => {
            let (high_mask, low_mask) = halves(mask);
            let (high_half, low_half) = halves(value);
            vec![
                load(low + 4),
                (AND, high_mask, Next, Next),
                (JUMP_EQUAL, high_half, Next, Fails),
                load(low),
                (AND, low_mask, Next, Next),
                (JUMP_EQUAL, low_half, Holds, Fails),
            ]
        }
        Comparison::Greater(value) => ordered(value, JUMP_GREATER, Holds, Fails, Holds, Fails),
        Comparison::GreaterOrEqual(value) => {
            ordered(value, JUMP_GREATER_OR_EQUAL, Holds, Fails, Holds, Fails)
        }
        Comparison::LessOrEqual(value) => ordered(value, JUMP_GREATER, Fails, Holds, Fails, Holds),
        Comparison::Less(value) => ordered(value, JUMP_GREATER_OR_EQUAL, Fails, Holds, Fails, Holds),
    }
}
