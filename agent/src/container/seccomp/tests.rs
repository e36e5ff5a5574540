//! Filters are run by a small interpreter of classic BPF, and one is really installed.

use super::program::{
    AND, ARCHITECTURE, ARGUMENTS, AUDIT_I386, AUDIT_X86_64, Instruction, JUMP, JUMP_EQUAL, JUMP_GREATER,
    JUMP_GREATER_OR_EQUAL, LOAD, NUMBER, RETURN, X32_BIT,
};
use super::*;

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

fn compile(json: &str) -> Filter {
    Filter::compile(&serde_json::from_str(json).unwrap()).unwrap()
}

fn run(program: &[Instruction], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut accumulator = 0;
    let mut at = 0;
    loop {
        let Instruction { code, jt, jf, k } = program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { jt } else { jf });
        match code {
            LOAD => {
                accumulator = match k {
                    NUMBER => number,
                    ARCHITECTURE => architecture,
                    k => {
                        let argument = arguments[((k - ARGUMENTS) / 8) as usize];
                        if k % 8 == 0 {
                            argument as u32
                        } else {
                            (argument >> 32) as u32
                        }
                    }
                }
            }
            AND => accumulator &= k,
            JUMP => at += k as usize,
            JUMP_EQUAL => at += jump(accumulator == k),
            JUMP_GREATER => at += jump(accumulator > k),
            JUMP_GREATER_OR_EQUAL => at += jump(accumulator >= k),
            RETURN => return k,
            other => panic!("code {other:#x} at {at}"),
        }
    }
}

#[test]
fn numbers_are_told_apart_on_every_architecture() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":13,
            "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32","SCMP_ARCH_AARCH64"],
            "syscalls":[{"names":["read","write","mseal","no_such_call"],"action":"SCMP_ACT_ALLOW"},
                        {"names":["ptrace"],"action":"SCMP_ACT_ERRNO","errnoRet":1},
                        {"names":["close"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#,
    );
    let verdict = |architecture, number| run(&filter.program, architecture, number, [0; 6]);
    for number in 0..462 {
        let expected = match number {
            0 | 1 => ALLOW,
            101 => ERRNO | 1,
            _ => ERRNO | 13,
        };
        assert_eq!(verdict(AUDIT_X86_64, number), expected, "x86_64 {number}");
        let expected = match number {
            3 | 4 => ALLOW,
            26 => ERRNO | 1,
            _ => ERRNO | 13,
        };
        assert_eq!(verdict(AUDIT_I386, number), expected, "x86 {number}");
    }
    assert_eq!(verdict(AUDIT_X86_64, 462), ALLOW);
    assert_eq!(verdict(AUDIT_X86_64, X32_BIT | 1), ALLOW);
    // ptrace has a number of its own there.
    assert_eq!(verdict(AUDIT_X86_64, X32_BIT | 521), ERRNO | 1);
    assert_eq!(verdict(AUDIT_X86_64, X32_BIT | 101), ERRNO | 13);
    assert_eq!(verdict(AUDIT_X86_64, u32::MAX), ERRNO | 13);
    // Newer than the newest named call: "does not exist" instead of "refused".
    assert_eq!(verdict(AUDIT_X86_64, 463), ERRNO | 38);
    assert_eq!(verdict(AUDIT_I386, 9999), ERRNO | 38);
    // An architecture nobody asked for.
    assert_eq!(verdict(0xc000_00b7, 0), 0);
}

#[test]
fn without_x86_and_x32_their_calls_end_the_thread() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_TRAP"}]}"#,
    );
    assert_eq!(run(&filter.program, AUDIT_X86_64, 0, [0; 6]), 0x0003_0000);
    assert_eq!(run(&filter.program, AUDIT_X86_64, 5000, [0; 6]), ALLOW);
    assert_eq!(run(&filter.program, AUDIT_X86_64, X32_BIT, [0; 6]), 0);
    assert_eq!(run(&filter.program, AUDIT_I386, 3, [0; 6]), 0);
}

#[test]
fn every_comparison_has_64_bits() {
    let values = [
        0,
        1,
        0xffff_ffff,
        0x1_0000_0000,
        0x1_0000_0001,
        0x7_0000_0005,
        0x7_0000_0006,
        u64::MAX - 1,
        u64::MAX,
    ];
    type Holds = fn(u64, u64) -> bool;
    let operators: [(&str, Holds); 6] = [
        ("SCMP_CMP_EQ", |a, b| a == b),
        ("SCMP_CMP_NE", |a, b| a != b),
        ("SCMP_CMP_LT", |a, b| a < b),
        ("SCMP_CMP_LE", |a, b| a <= b),
        ("SCMP_CMP_GT", |a, b| a > b),
        ("SCMP_CMP_GE", |a, b| a >= b),
    ];
    for (operator, holds) in operators {
        for value in values {
            let filter = compile(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["read"],"action":"SCMP_ACT_ALLOW",
                     "args":[{{"index":2,"value":{value},"op":"{operator}"}}]}}]}}"#
            ));
            for argument in values {
                let found = run(&filter.program, AUDIT_X86_64, 0, [0, 0, argument, 0, 0, 0]) == ALLOW;
                assert_eq!(
                    found,
                    holds(argument, value),
                    "{argument:#x} {operator} {value:#x}"
                );
            }
        }
    }
    // clone without CLONE_NEW*, as default profiles have it.
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["clone"],"action":"SCMP_ACT_ALLOW",
            "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
    );
    let clone = |flags: u64| run(&filter.program, AUDIT_X86_64, 56, [flags, 0, 0, 0, 0, 0]);
    assert_eq!(clone(0x0100_0011), ALLOW);
    assert_eq!(clone(0x1000_0000), ERRNO | 1);
}

#[test]
fn rules_with_arguments_count_in_order_and_their_comparisons_together() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_KILL_PROCESS","syscalls":[
            {"names":["socket"],"action":"SCMP_ACT_ERRNO","errnoRet":97,
             "args":[{"index":0,"value":16,"op":"SCMP_CMP_EQ"},{"index":2,"value":9,"op":"SCMP_CMP_EQ"}]},
            {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":40,"op":"SCMP_CMP_NE"}]},
            {"names":["personality"],"action":"SCMP_ACT_ALLOW",
             "args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#,
    );
    let socket = |a, b| run(&filter.program, AUDIT_X86_64, 41, [a, 0, b, 0, 0, 0]);
    assert_eq!(socket(16, 9), ERRNO | 97);
    assert_eq!(socket(16, 0), ALLOW);
    assert_eq!(socket(40, 9), 0x8000_0000);
    // Two comparisons of one argument are alternatives.
    let personality = |a| run(&filter.program, AUDIT_X86_64, 135, [a, 0, 0, 0, 0, 0]);
    assert_eq!([personality(0), personality(8)], [ALLOW; 2]);
    assert_eq!(personality(4), 0x8000_0000);
}

#[test]
fn a_profile_of_hundreds_of_calls_fits() {
    // Every second number, so that no two neighbours share a range.
    let names: Vec<&str> = include_str!("syscalls.tbl")
        .lines()
        .skip(2)
        .step_by(2)
        .filter_map(|line| line.split(' ').next())
        .collect();
    let filter = compile(
        &serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
        })
        .to_string(),
    );
    assert!(filter.program.len() > 600 && filter.program.len() <= MAX_INSTRUCTIONS);
    for name in &names {
        let number = include_str!("syscalls.tbl").lines().find_map(|line| {
            line.strip_prefix(&format!("{name} "))?
                .split(' ')
                .next()?
                .parse()
                .ok()
        });
        if let Some(number) = number {
            assert_eq!(
                run(&filter.program, AUDIT_X86_64, number, [0; 6]),
                ALLOW,
                "{name}"
            );
        }
    }
}

#[test]
fn the_kernel_takes_and_obeys_a_filter() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],
            "syscalls":[{"names":["getppid"],"action":"SCMP_ACT_ERRNO","errnoRet":71},
                        {"names":["dup"],"action":"SCMP_ACT_ERRNO","errnoRet":72,
                         "args":[{"index":0,"value":4294967295,"op":"SCMP_CMP_GE"}]}]}"#,
    );
    // A filter is for the thread that installs it.
    let found = std::thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).unwrap();
        filter.install().unwrap();
        let call = |number, argument: i64| {
            // SAFETY: neither call touches memory.
            let result = unsafe { libc::syscall(number, argument) };
            if result == -1 {
                last_errno().raw_os_error()
            } else {
                0
            }
        };
        [
            call(libc::SYS_getppid, 0),
            call(libc::SYS_dup, 0xffff_ffff),
            call(libc::SYS_dup, 0x7fff_fffe),
        ]
    })
    .join()
    .unwrap();
    assert_eq!(found, [71, 72, libc::EBADF]);
}
