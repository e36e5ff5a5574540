//! Log programs: a `binary:` URI.

use super::*;

#[tokio::test]
async fn a_log_program_gets_both_outputs_its_arguments_and_two_variables() {
    let dir = Directory::new();
    let (out, err, facts) = (dir.path("out"), dir.path("err"), dir.path("facts"));
    let script = format!(
        "echo \"$@\" $CONTAINER_ID $CONTAINER_NAMESPACE $HOME > {facts}\nls /proc/self/fd | tr '\\n' ' ' >> {facts}\n\
         exec 5>&-\ncat <&3 > {out}\ncat <&4 > {err}\n",
        facts = facts.display(),
        out = out.display(),
        err = err.display()
    );
    let target = || dir.logger("binary", &script, "&key=value&flag");
    let io = in_time(open(Stdio {
        stdout: target(),
        stderr: target(),
        ..Stdio::null()
    }))
    .await;
    let mut guest_out = stream(&io, io.tokens().stdout_token);
    let mut guest_err = stream(&io, io.tokens().stderr_token);
    guest_out.write_all(b"to stdout").await.unwrap();
    guest_err.write_all(b"to stderr").await.unwrap();
    drop((guest_out, guest_err));
    in_time(io.drained()).await;
    assert_eq!(std::fs::read_to_string(out).unwrap(), "to stdout");
    assert_eq!(std::fs::read_to_string(err).unwrap(), "to stderr");
    // The last descriptor is the directory that ls reads.
    assert_eq!(
        std::fs::read_to_string(facts).unwrap(),
        "key value flag c1 ns1\n0 1 2 3 4 5 6 "
    );
}

#[tokio::test]
async fn a_log_program_that_does_not_end_with_its_input_is_told_to() {
    let dir = Directory::new();
    let told = dir.path("told");
    let script = format!(
        "trap 'echo told > {}; exit 0' TERM\nexec 5>&-\nwhile :; do sleep 0.05; done\n",
        told.display()
    );
    let io = in_time(open(Stdio {
        stdout: dir.logger("binary", &script, ""),
        ..Stdio::null()
    }))
    .await;
    io.close();
    in_time(io.drained()).await;
    assert_eq!(std::fs::read_to_string(told).unwrap(), "told\n");
}

#[tokio::test]
async fn a_log_program_that_is_missing_or_never_ready_is_an_error_that_names_it() {
    let dir = Directory::new();
    let start = async |stdout| {
        let stdio = Stdio {
            stdout,
            ..Stdio::null()
        };
        in_time(Io::open(stdio, "c1", "ns1")).await.map(drop)
    };
    let missing = dir.path("missing");
    let error = start(address("binary", &missing)).await.unwrap_err();
    assert_eq!(error.kind(), crate::ErrorKind::NotFound);
    assert!(error.to_string().contains(missing.to_str().unwrap()), "{error}");
    start(dir.logger("binary", "exit 0", "")).await.unwrap();
    let error = start(dir.logger("binary-v2", "exit 0", "")).await.unwrap_err();
    assert!(
        error.to_string().contains("closed descriptor 5 without a byte"),
        "{error}"
    );
    start(dir.logger("binary-v2", "printf x >&5; cat <&3 >/dev/null", ""))
        .await
        .unwrap();
}
