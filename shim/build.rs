//! Generates the messages of `proto/cri.proto`, without protoc.

fn main() {
    println!("cargo::rerun-if-changed=proto/cri.proto");
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(["proto/cri.proto"])
        .include("proto")
        .rust_protobuf()
        .run()
        .expect("proto/cri.proto compiles");
    // The generated module opens with inner attributes, which include! does not accept.
    let path = out.join("cri.rs");
    let text = std::fs::read_to_string(&path).expect("the generator wrote the file");
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .map(|line| format!("{line}\n"))
        .collect();
    std::fs::write(&path, text).expect("OUT_DIR is writable");
}
