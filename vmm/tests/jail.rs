//! The jail, seen from outside: the real `kata-rs-vmm` process is started as the sandbox starts it, and its
//! state is read from /proc. Needs root; skipped, with the reason printed, without it or without /dev/kvm.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use protocol::channel::{self, Received};
use protocol::vmm::{
    CONTROL_FD, CONTROL_VERSION, Event, ExitCause, FailureKind, FdIndex, FromVmm, Reply, Request,
    RequestBody, VmConfig,
};
use vmm::timeline::monotonic_ns;

/// One process, and its end of the control channel.
struct Process {
    pid: i32,
    channel: OwnedFd,
    next_id: u64,
}

impl Process {
    fn start(flags: i32) -> Self {
        let (ours, theirs) = channel::pair().unwrap();
        let program = std::ffi::CString::new(env!("CARGO_BIN_EXE_kata-rs-vmm")).unwrap();
        let arguments = [program.as_ptr(), std::ptr::null()];
        let environment = [c"SECRET=of-the-host".as_ptr(), std::ptr::null()];
        // SAFETY: plain integers.
        let mut clone: libc::clone_args = unsafe { std::mem::zeroed() };
        clone.flags = flags as u64;
        clone.exit_signal = libc::SIGCHLD as u64;
        // SAFETY: a fork; the child makes only async-signal-safe calls on memory prepared before it.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const clone, size_of::<libc::clone_args>()) };
        if pid == 0 {
            // SAFETY: as above. The descriptor is moved out of the way first, should it be the target itself.
            unsafe {
                let moved = libc::fcntl(theirs.as_raw_fd(), libc::F_DUPFD, 100);
                libc::dup2(moved, CONTROL_FD);
                libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
                libc::_exit(127);
            }
        }
        assert!(pid > 0, "{}", std::io::Error::last_os_error());
        Self {
            pid: pid as i32,
            channel: ours,
            next_id: 1,
        }
    }

    fn request(&mut self, body: RequestBody, fds: &[&File]) -> Result<Reply, protocol::vmm::Failure> {
        let id = self.next_id;
        self.next_id += 1;
        let message = serde_json::to_vec(&Request { id, body }).unwrap();
        let fds: Vec<_> = fds.iter().map(|file| file.as_fd()).collect();
        channel::send(&self.channel, &message, &fds).unwrap();
        match self.receive() {
            FromVmm::Response(response) => response.result,
            FromVmm::Event(event) => panic!("{event:?}"),
        }
    }

    fn receive(&self) -> FromVmm {
        let Received::Message(bytes, _) = channel::receive(&self.channel).unwrap() else {
            panic!("closed")
        };
        serde_json::from_slice(&bytes).unwrap()
    }

    fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.pid))
    }

    fn status(&self, key: &str) -> String {
        let text = fs::read_to_string(self.proc("status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap().trim_start_matches(':').trim().to_owned()
    }

    fn wait(&self) -> i32 {
        let mut status = 0;
        // SAFETY: waits for a child of this process, once.
        assert_eq!(unsafe { libc::waitpid(self.pid, &raw mut status, 0) }, self.pid);
        libc::WEXITSTATUS(status)
    }
}

fn config(fs: bool) -> RequestBody {
    let config = VmConfig {
        id: "jail".to_owned(),
        vcpus: 1,
        max_vcpus: 1,
        memory_mib: 64,
        pluggable_memory_mib: 0,
        kvm: FdIndex(0),
        kernel: FdIndex(1),
        initrd: None,
        cmdline: String::new(),
        vsock: None,
        nets: Vec::new(),
        blocks: Vec::new(),
        fs_tag: fs.then(|| "kata-rs".to_owned()),
        balloon: false,
        verbose_console: false,
        console_log: None,
        started_ns: monotonic_ns(),
        jail: true,
    };
    RequestBody::Configure {
        version: CONTROL_VERSION,
        config: Box::new(config),
    }
}

/// A kernel that spins: `jmp $` at 1 MiB, with its PVH note.
fn kernel() -> File {
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0x10_0000_u64, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    for (kind, offset, address, len) in [(1_u32, 196_u64, 0x10_0000_u64, 2_u64), (4, 176, 0, 20)] {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for word in [offset, address, address, len, len, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    for word in [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0xeb, 0xfe]);
    let path = tempfile::NamedTempFile::new().unwrap();
    fs::write(path.path(), file).unwrap();
    File::open(path.path()).unwrap()
}

fn kvm() -> Option<File> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return None;
    }
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(file),
        Err(error) => {
            println!("skipped: /dev/kvm cannot be opened: {error}");
            None
        }
    }
}

fn names(path: PathBuf) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn a_running_vm_has_no_way_back_to_the_host() {
    let Some(kvm) = kvm() else { return };
    let mut process = Process::start(libc::CLONE_NEWPID);
    assert_eq!(
        process.request(config(false), &[&kvm, &kernel()]),
        Ok(Reply::Done)
    );
    assert_eq!(process.request(RequestBody::Boot, &[]), Ok(Reply::Done));

    for thread in names(process.proc("task")) {
        let status = fs::read_to_string(process.proc(&format!("task/{thread}/status"))).unwrap();
        for line in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(status.contains(&format!("{line}:\t0000000000000000")), "{status}");
        }
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        for namespace in ["mnt", "ipc", "uts", "net", "pid"] {
            let inside = fs::read_link(process.proc(&format!("task/{thread}/ns/{namespace}"))).unwrap();
            let outside = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
            assert_ne!(inside, outside, "{namespace}");
        }
        assert_eq!(
            names(process.proc(&format!("task/{thread}/root"))),
            Vec::<String>::new()
        );
    }
    assert_eq!(
        fs::read_to_string(process.proc("mounts"))
            .unwrap()
            .lines()
            .count(),
        1
    );
    assert!(
        fs::write(process.proc("root/file"), "").is_err(),
        "the root is read-only"
    );
    assert_eq!(process.status("Groups"), "");
    let limits = fs::read_to_string(process.proc("limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"));
    // What is open: standard streams, the channel, and nothing with a path but KVM's own.
    for fd in names(process.proc("fd")) {
        let target = fs::read_link(process.proc(&format!("fd/{fd}")))
            .unwrap()
            .into_os_string()
            .into_string()
            .unwrap();
        let standard = fd.parse::<i32>().unwrap() < CONTROL_FD;
        assert!(
            standard || !target.starts_with('/') || target == "/dev/kvm",
            "{fd} -> {target}"
        );
    }

    assert_eq!(process.request(RequestBody::Shutdown, &[]), Ok(Reply::Done));
    assert!(matches!(
        process.receive(),
        FromVmm::Event(Event::Exited {
            cause: ExitCause::Requested,
            ..
        })
    ));
    assert_eq!(process.wait(), 0);
}

#[test]
fn a_file_server_keeps_what_it_needs_and_sees_itself_only() {
    let Some(kvm) = kvm() else { return };
    let mut process = Process::start(libc::CLONE_NEWPID);
    assert_eq!(process.request(config(true), &[&kvm, &kernel()]), Ok(Reply::Done));
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
    let kept = [0, 1, 3, 4, 6, 7, 27, 31]
        .iter()
        .fold(0_u64, |set, bit| set | 1 << bit);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(process.status(set), format!("{kept:016x}"));
    }
    assert_eq!(names(process.proc("root")), ["proc"]);
    let processes: Vec<_> = names(process.proc("root/proc"))
        .into_iter()
        .filter(|name| name.parse::<u32>().is_ok())
        .collect();
    assert_eq!(processes, ["1"]);
    let pid = process.pid;
    drop(process.channel);
    let mut status = 0;
    // SAFETY: waits for a child of this process, once.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(libc::WEXITSTATUS(status), 0, "the VM ends with its sandbox");
}

#[test]
fn a_process_in_the_hosts_pid_namespace_is_refused() {
    let Some(kvm) = kvm() else { return };
    let mut process = Process::start(0);
    let failure = process.request(config(false), &[&kvm, &kernel()]).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Io);
    assert!(failure.message.contains("CLONE_NEWPID"), "{}", failure.message);
    drop(process.channel);
    // SAFETY: waits for a child of this process, once.
    unsafe { libc::waitpid(process.pid, std::ptr::null_mut(), 0) };
}

#[test]
fn started_by_hand_it_says_what_it_is() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_kata-rs-vmm"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("kata-rs run"), "{text}");
}
