//! Generates the agent's messages and ttrpc service from `proto/agent.proto`, without protoc.

fn main() {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    if std::env::var_os("CARGO_FEATURE_AGENT").is_none() {
        return;
    }
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("proto/agent.proto compiles");
    // The generated modules open with inner attributes, which include! does not accept.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = out.join(name);
        let text = std::fs::read_to_string(&path).expect("the generator wrote the file");
        let text: String = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .map(|line| format!("{line}\n"))
            .collect();
        std::fs::write(&path, text).expect("OUT_DIR is writable");
    }
}
