//! x86-64: where things lie in guest memory, and how a vCPU looks before its first instruction.

pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod registers;
