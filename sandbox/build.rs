//! `kata-rs-task` begins at its own entry point: the C library's start-up code is left out of it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bin=kata-rs-task=-nostartfiles");
}
