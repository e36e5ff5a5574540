//! What goes wrong is named, and leaves nothing behind (the harness looks).

use protocol::agent::failure::Reason;
use protocol::agent::mount::Source;
use protocol::agent::{BlockSource, CreateContainerRequest};
use serde_json::json;
use ttrpc::Code;

use super::host::{edit, share};
use super::{container, exec, guest_tests};

fn program(name: &str) -> CreateContainerRequest {
    let mut request = container("c", "");
    edit(&mut request.spec, |spec| spec["process"]["args"] = json!([name]));
    request
}

guest_tests! {
    async fn a_missing_executable_is_found_at_creation(host) {
        let refusal = host.create(&program("no-such-program")).await.unwrap_err();
        assert_eq!(refusal.code, Code::NOT_FOUND);
        assert_eq!(refusal.failure.reason.unwrap(), Reason::EXECUTABLE_NOT_FOUND);
        assert_eq!(refusal.message, "exec: \"no-such-program\": executable file not found in $PATH");
        let refusal = host.create(&program("/bin/none")).await.unwrap_err();
        assert_eq!(refusal.failure.reason.unwrap(), Reason::EXECUTABLE_NOT_FOUND);
        assert!(refusal.message.contains("no such file or directory"), "{}", refusal.message);
        host.start_sleeper("c").await;
        let mut missing = exec("c", "e", "");
        edit(&mut missing.process, |process| process["args"] = json!(["nope"]));
        let refusal = host.create_exec(&missing).await.unwrap_err();
        assert_eq!(refusal.failure.reason.unwrap(), Reason::EXECUTABLE_NOT_FOUND);
        // The exec id is free again.
        assert_eq!(host.run_exec(exec("c", "e", "exit 2")).await.status, 2);
        host.delete("c").await.unwrap();
    }

    async fn what_cannot_be_executed_is_refused(host) {
        for name in ["/etc/text", "/etc"] {
            let refusal = host.create(&program(name)).await.unwrap_err();
            assert_eq!(refusal.code, Code::PERMISSION_DENIED, "{}", refusal.message);
            assert_eq!(refusal.failure.reason.unwrap(), Reason::EXECUTABLE_NOT_PERMITTED);
        }
    }

    async fn an_execution_that_fails_at_the_start_is_no_exit(host) {
        host.create(&program("/bin/orphan-script")).await.unwrap();
        let refusal = host.start_process("c", "").await.unwrap_err();
        assert_eq!(refusal.code, Code::NOT_FOUND);
        assert_eq!(refusal.failure.reason.unwrap(), Reason::EXECUTABLE_NOT_FOUND);
        assert_eq!(refusal.message, "exec /bin/orphan-script: no such file or directory");
        host.delete("c").await.unwrap();
        assert!(host.exits().is_empty());
        host.start_sleeper("d").await;
        let mut broken = exec("d", "e", "");
        edit(&mut broken.process, |process| process["args"] = json!(["orphan-script"]));
        host.create_exec(&broken).await.unwrap();
        host.start_process("d", "e").await.unwrap_err();
        host.delete_exec("d", "e").await.unwrap();
        assert!(host.exits().is_empty());
        host.delete("d").await.unwrap();
    }

    async fn specifications_are_refused_by_member(host) {
        let spec = async |member: &str, change: &dyn Fn(&mut serde_json::Value)| {
            let mut request = container("c", "");
            edit(&mut request.spec, |spec| change(spec));
            let refusal = host.create(&request).await.unwrap_err();
            assert!(refusal.failure.subject.starts_with(member), "{}: {}", refusal.failure.subject, refusal.message);
            (refusal.code, refusal.failure.reason.unwrap())
        };
        let unsupported = (Code::UNIMPLEMENTED, Reason::SPEC_UNSUPPORTED);
        let invalid = (Code::INVALID_ARGUMENT, Reason::SPEC_INVALID);
        assert_eq!(spec("linux.uidMappings", &|spec| spec["linux"]["uidMappings"] = json!([{}])).await, unsupported);
        assert_eq!(
            spec("linux.namespaces[0]", &|spec| spec["linux"]["namespaces"] = json!([{"type": "user"}])).await,
            unsupported
        );
        assert_eq!(spec("process.cwd", &|spec| spec["process"]["cwd"] = json!("x")).await, invalid);
        assert_eq!(
            spec("process.capabilities", &|spec| spec["process"]["capabilities"]["bounding"] = json!(["CAP_X"])).await,
            invalid
        );
        assert_eq!(
            spec("linux.seccomp.defaultAction", &|spec| spec["linux"]["seccomp"] = json!({"defaultAction": "no"})).await,
            invalid
        );
        let mut request = container("c", "");
        request.spec = b"{".to_vec();
        assert_eq!(host.create(&request).await.unwrap_err().code, Code::INVALID_ARGUMENT);
        for id in ["", "..", "a/b"] {
            assert_eq!(host.create(&container(id, "")).await.unwrap_err().code, Code::INVALID_ARGUMENT);
        }
    }

    async fn steps_that_fail_in_the_child_are_named(host) {
        let message = async |change: &dyn Fn(&mut serde_json::Value)| {
            let mut request = container("c", "");
            edit(&mut request.spec, |spec| change(spec));
            host.create(&request).await.unwrap_err().message
        };
        let text = message(&|spec| spec["linux"]["sysctl"] = json!({"kernel.no_such": "1"})).await;
        assert!(text.contains("linux.sysctl[\"kernel.no_such\"]") && text.contains("No such file"), "{text}");
        let text = message(&|spec| spec["process"]["cwd"] = json!("/etc/passwd/x")).await;
        assert!(text.contains("process.cwd") && text.contains("Not a directory"), "{text}");
        let text = message(&|spec| spec["process"]["oomScoreAdj"] = json!(5000)).await;
        assert!(text.contains("process.oomScoreAdj"), "{text}");
    }

    async fn storage_that_is_not_there_is_named(host) {
        let mut request = container("c", "");
        request.mounts.push(share("no/such/path", "/mnt", &["rbind"]));
        let refusal = host.create(&request).await.unwrap_err();
        assert_eq!((refusal.code, refusal.failure.reason.unwrap()), (Code::NOT_FOUND, Reason::STORAGE_MISSING));
        assert!(refusal.message.contains("no/such/path"), "{}", refusal.message);
        let mut request = container("c", "");
        request.rootfs[0].source = Some(Source::Block(BlockSource {
            serial: "a-serial-that-is-too-long-to-be".into(),
            file_system: "ext4".into(),
            ..Default::default()
        }));
        request.rootfs[0].options.clear();
        let refusal = host.create(&request).await.unwrap_err();
        assert_eq!(refusal.failure.reason.unwrap(), Reason::STORAGE_MISSING);
        let mut request = container("c", "");
        request.mounts.push(share("etc", "/etc/passwd", &["rbind"]));
        let refusal = host.create(&request).await.unwrap_err();
        assert_eq!(refusal.failure.reason.unwrap(), Reason::MOUNT_FAILED, "{}", refusal.message);
        let mut request = container("c", "");
        request.mounts.push(share("etc", "/mnt", &["bind", "idmap"]));
        let refusal = host.create(&request).await.unwrap_err();
        assert_eq!((refusal.code, refusal.failure.reason.unwrap()), (Code::UNIMPLEMENTED, Reason::SPEC_UNSUPPORTED));
        let mut request = container("c", "");
        request.mounts[1].options.push("no_such_option=1".into());
        let refusal = host.create(&request).await.unwrap_err();
        assert_eq!(refusal.failure.reason.unwrap(), Reason::MOUNT_FAILED);
        // The kernel's own words.
        assert!(refusal.message.contains("no_such_option"), "{}", refusal.message);
    }
}
