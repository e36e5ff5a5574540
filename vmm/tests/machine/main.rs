//! The control protocol against a real machine: tiny hand-written kernels run in KVM and end in every way a
//! guest can end. Skipped, with the reason printed, where there is no usable /dev/kvm.

mod devices;

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use protocol::channel::{self, Received};
use protocol::vmm::{
    BlockBacking, BlockSlot, CONTROL_VERSION, CachePolicy, Event, ExitCause, FailureKind, FdIndex, FromVmm,
    NetBacking, NetSlot, Reply, Request, RequestBody, Response, Share, VmConfig,
};
use vmm::control;
use vmm::timeline::{Recorder, monotonic_ns};

/// Where the kernels below are linked to run.
const LOAD_ADDRESS: u32 = 0x10_0000;
/// A word of their memory that they may count in.
const COUNTER: [u8; 4] = [0x00, 0x02, 0x10, 0x00];

/// `mov al, 0xfe; out 0x64, al; hlt; jmp -3`
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// `mov word [0x472], imm16`
const SET_WARM_BOOT_FLAG: &[u8] = &[0x66, 0xc7, 0x05, 0x72, 0x04, 0x00, 0x00, 0x34, 0x12];
/// `lidt [0x100300]` (zeroes: a table without entries); `mov eax, 0x30; mov ds, ax` (no such descriptor)
const TRIPLE_FAULT: &[u8] = &[
    0x0f, 0x01, 0x1d, 0x00, 0x03, 0x10, 0x00, 0xb8, 0x30, 0x00, 0x00, 0x00, 0x8e, 0xd8,
];
/// `jmp $`
const SPIN: &[u8] = &[0xeb, 0xfe];

/// A vmlinux as small as can be: one segment with `code`, and the note that says where PVH enters.
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(LOAD_ADDRESS.to_le_bytes());
    elf(code, &note)
}

fn elf(code: &[u8], note: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 64 + 2 * 56;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(u64::from(LOAD_ADDRESS).to_le_bytes());
    file.extend(64_u64.to_le_bytes());
    file.extend(0_u64.to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    file.extend([64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let mut segment = |kind: u32, offset: usize, address: u64, len: usize| {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for word in [offset as u64, address, address, len as u64, len as u64, 4] {
            file.extend(word.to_le_bytes());
        }
    };
    segment(1, HEADERS + note.len(), u64::from(LOAD_ADDRESS), code.len());
    segment(4, HEADERS, 0, note.len());
    file.extend(note);
    file.extend(code);
    file
}

/// A counting loop: `inc dword [counter]; jmp` back.
fn count_forever() -> Vec<u8> {
    [&[0xff, 0x05][..], &COUNTER, &[0xeb, 0xf8]].concat()
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// A VMM on a thread of this process, seen from the sandbox.
struct Vmm {
    channel: OwnedFd,
    thread: Option<JoinHandle<ExitCause>>,
    next_id: u64,
}

impl Vmm {
    fn start() -> Self {
        let (ours, theirs) = channel::pair().unwrap();
        let thread = std::thread::spawn(|| {
            control::serve(theirs, Arc::new(Recorder::default()))
                .unwrap()
                .cause
        });
        Self {
            channel: ours,
            thread: Some(thread),
            next_id: 1,
        }
    }

    fn request(&mut self, body: RequestBody, fds: &[BorrowedFd<'_>]) -> Response {
        let id = self.next_id;
        self.next_id += 1;
        let message = serde_json::to_vec(&Request { id, body }).unwrap();
        channel::send(&self.channel, &message, fds).unwrap();
        let FromVmm::Response(response) = self.receive() else {
            panic!("an event came instead of a response")
        };
        assert_eq!(response.id, id);
        response
    }

    fn raw(&mut self, message: &[u8]) -> Response {
        channel::send(&self.channel, message, &[]).unwrap();
        let FromVmm::Response(response) = self.receive() else {
            panic!("an event came instead of a response")
        };
        response
    }

    fn receive(&mut self) -> FromVmm {
        let Received::Message(bytes, _) = channel::receive(&self.channel).unwrap() else {
            panic!("closed")
        };
        serde_json::from_slice(&bytes).unwrap()
    }

    fn done(&mut self, body: RequestBody) {
        assert_eq!(self.request(body, &[]).result, Ok(Reply::Done));
    }

    fn refused(&mut self, body: RequestBody) -> (FailureKind, String) {
        let failure = self.request(body, &[]).result.unwrap_err();
        (failure.kind, failure.message)
    }

    /// The cause that is reported, which must also be the one that the process would exit with.
    fn end(mut self) -> ExitCause {
        let FromVmm::Event(Event::Exited { cause, .. }) = self.receive() else {
            panic!("no exit event")
        };
        assert_eq!(self.thread.take().unwrap().join().unwrap(), cause);
        cause
    }
}

fn config() -> VmConfig {
    VmConfig {
        id: "test".to_owned(),
        vcpus: 1,
        max_vcpus: 4,
        memory_mib: 64,
        pluggable_memory_mib: 0,
        kvm: FdIndex(0),
        kernel: FdIndex(1),
        initrd: None,
        cmdline: String::new(),
        vsock: None,
        nets: Vec::new(),
        blocks: Vec::new(),
        fs_tag: None,
        balloon: false,
        verbose_console: false,
        console_log: None,
        started_ns: monotonic_ns(),
        jail: false,
    }
}

fn configure(config: VmConfig) -> RequestBody {
    RequestBody::Configure {
        version: CONTROL_VERSION,
        config: Box::new(config),
    }
}

fn kvm() -> Option<File> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(file),
        Err(error) => {
            println!("skipped: /dev/kvm cannot be opened: {error}");
            None
        }
    }
}

/// A VMM with a machine that has this kernel.
fn configured(kernel: &[u8], config: VmConfig) -> Option<Vmm> {
    let kvm = kvm()?;
    let kernel = file_of(kernel);
    let mut vmm = Vmm::start();
    let response = vmm.request(configure(config), &[kvm.as_fd(), kernel.as_fd()]);
    assert_eq!(response.result, Ok(Reply::Done));
    Some(vmm)
}

fn ends_with(code: &[u8], expected: &ExitCause) {
    let Some(mut vmm) = configured(&kernel(code), config()) else {
        return;
    };
    vmm.done(RequestBody::Boot);
    assert_eq!(vmm.end(), *expected);
}

#[test]
fn a_guest_that_resets_the_machine_has_shut_down() {
    ends_with(RESET, &ExitCause::GuestShutdown);
}

#[test]
fn a_guest_that_resets_warmly_has_panicked() {
    ends_with(&[SET_WARM_BOOT_FLAG, RESET].concat(), &ExitCause::GuestPanic);
}

#[test]
fn a_guest_that_triple_faults_is_told_from_both() {
    ends_with(TRIPLE_FAULT, &ExitCause::TripleFault);
}

#[test]
fn a_spinning_guest_can_be_paused_resumed_and_shut_down() {
    let Some(mut vmm) = configured(&kernel(&count_forever()), config()) else {
        return;
    };
    assert_eq!(vmm.refused(RequestBody::Pause).0, FailureKind::State);
    vmm.done(RequestBody::Boot);
    assert_eq!(vmm.refused(RequestBody::Boot).0, FailureKind::State);
    assert_eq!(vmm.refused(RequestBody::Resume).0, FailureKind::State);
    for _ in 0..20 {
        vmm.done(RequestBody::Pause);
        vmm.done(RequestBody::Resume);
    }
    vmm.done(RequestBody::Pause);
    assert_eq!(vmm.refused(RequestBody::Pause).0, FailureKind::State);
    vmm.done(RequestBody::Shutdown);
    assert_eq!(vmm.end(), ExitCause::Requested);
}

#[test]
fn all_vcpus_pause_including_those_that_were_never_started() {
    let Some(mut vmm) = configured(&kernel(SPIN), VmConfig { vcpus: 4, ..config() }) else {
        return;
    };
    vmm.done(RequestBody::Boot);
    vmm.done(RequestBody::Pause);
    vmm.done(RequestBody::Resume);
    vmm.done(RequestBody::Shutdown);
    assert_eq!(vmm.end(), ExitCause::Requested);
}

#[test]
fn vcpus_come_late_and_pause_with_the_others() {
    let Some(mut vmm) = configured(&kernel(SPIN), VmConfig { vcpus: 2, ..config() }) else {
        return;
    };
    let set = |count| RequestBody::SetVcpus { count };
    vmm.done(set(3));
    vmm.done(RequestBody::Boot);
    vmm.done(set(3));
    let (kind, message) = vmm.refused(set(2));
    assert_eq!(kind, FailureKind::Invalid);
    assert!(message.contains("has 3 and can have 4"), "{message}");
    assert_eq!(vmm.refused(set(5)).0, FailureKind::Invalid);
    vmm.done(RequestBody::Pause);
    vmm.done(set(4));
    vmm.done(RequestBody::Resume);
    vmm.done(RequestBody::Pause);
    vmm.done(RequestBody::Resume);
    vmm.done(RequestBody::Shutdown);
    assert_eq!(vmm.end(), ExitCause::Requested);
}

#[test]
fn a_late_vcpu_starts_where_the_guest_says() {
    // 0x8000, real mode: `mov byte [0x9000], 1; hlt; jmp -3`; started by INIT and SIPI with vector 8 to APIC 1.
    const LATE: &[u8] = &[0xc6, 0x06, 0x00, 0x90, 0x01, 0xf4, 0xeb, 0xfd];
    let store = |address: u32, word: u32| {
        let mut code = vec![0xc7, 0x05];
        code.extend(address.to_le_bytes());
        code.extend(word.to_le_bytes());
        code
    };
    let (low, high) = LATE.split_at(4);
    let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    let mut code = [store(0x8000, word(low)), store(0x8004, word(high))].concat();
    // Enables its own local APIC (spurious vector register), then sends again and again until it is heard.
    code.extend(store(0xfee0_00f0, 0x1ff));
    let start = code.len();
    for command in [0x4500, 0x4608] {
        code.extend(store(0xfee0_0310, 1 << 24));
        code.extend(store(0xfee0_0300, command));
    }
    // `mov ecx, 0x10000; dec ecx; jnz -3; cmp byte [0x9000], 1; jne start`
    code.extend([0xb9, 0, 0, 1, 0, 0x49, 0x75, 0xfd]);
    code.extend([0x80, 0x3d, 0x00, 0x90, 0x00, 0x00, 0x01, 0x75]);
    code.push((start as i64 - code.len() as i64 - 1) as u8);
    code.extend(RESET);
    let Some(mut vmm) = configured(&kernel(&code), config()) else {
        return;
    };
    vmm.done(RequestBody::Boot);
    vmm.done(RequestBody::SetVcpus { count: 2 });
    assert_eq!(vmm.end(), ExitCause::GuestShutdown);
}

#[test]
fn memory_is_asked_for_within_its_region() {
    let description = VmConfig {
        pluggable_memory_mib: 256,
        ..config()
    };
    let Some(mut vmm) = configured(&kernel(SPIN), description) else {
        return;
    };
    let set = |mib| RequestBody::SetPluggedMemory { mib };
    vmm.done(RequestBody::Boot);
    vmm.done(set(128));
    let (kind, message) = vmm.refused(set(258));
    assert_eq!(kind, FailureKind::Invalid);
    assert!(message.contains("at most 256 MiB"), "{message}");
    assert_eq!(vmm.refused(set(3)).0, FailureKind::Invalid);
    vmm.done(set(0));
    // This guest plugs nothing: that is what it was asked for last.
    let FromVmm::Event(Event::PluggedMemory { bytes: 0 }) = vmm.receive() else {
        panic!("no event")
    };
    vmm.done(RequestBody::Shutdown);
    assert_eq!(vmm.end(), ExitCause::Requested);
}

#[test]
fn the_vm_ends_when_its_sandbox_does() {
    let Some(mut vmm) = configured(&kernel(SPIN), config()) else {
        return;
    };
    vmm.done(RequestBody::Boot);
    let thread = vmm.thread.take().unwrap();
    drop(vmm);
    assert_eq!(thread.join().unwrap(), ExitCause::Requested);
}

#[test]
fn timeline_and_metrics_are_there_for_the_asking() {
    let Some(mut vmm) = configured(&kernel(SPIN), config()) else {
        return;
    };
    vmm.done(RequestBody::Boot);
    vmm.done(RequestBody::Pause);
    let Ok(Reply::Timeline(timeline)) = vmm.request(RequestBody::Timeline, &[]).result else {
        panic!("no timeline")
    };
    assert!(
        timeline.configured.is_some() && timeline.configured <= timeline.kernel_loaded,
        "{timeline:?}"
    );
    assert!(
        timeline.vm_created.is_some() && timeline.vm_created <= timeline.first_instruction,
        "{timeline:?}"
    );
    assert_eq!(timeline.agent_connected, None);
    let Ok(Reply::Metrics(metrics)) = vmm.request(RequestBody::Metrics, &[]).result else {
        panic!("no metrics")
    };
    assert_eq!(metrics.guest_memory_bytes, 64 << 20);
    assert!(
        (4096..64 << 20).contains(&metrics.guest_resident_bytes),
        "{metrics:?}"
    );
}

#[test]
fn a_guest_that_talks_to_nothing_gets_ones_and_no_harm() {
    // mov eax, [0xd8000000]; inc eax; jnz spin; in al, 0x71; inc al; jnz spin; mov [0xd8000000], eax; reset
    let code = [
        &[0xa1, 0x00, 0x00, 0x00, 0xd8, 0x40, 0x75, 0x10][..],
        &[0xe4, 0x71, 0xfe, 0xc0, 0x75, 0x0a],
        &[0xa3, 0x00, 0x00, 0x00, 0xd8],
        RESET,
        SPIN,
    ]
    .concat();
    // jnz targets: both reach the SPIN at the end.
    let mut code = code;
    code[7] = (code.len() - 2 - 8) as u8;
    code[13] = (code.len() - 2 - 14) as u8;
    ends_with(&code, &ExitCause::GuestShutdown);
}

#[test]
fn a_driver_reads_registers_and_acknowledges_interrupts_without_the_vmm() {
    let code = [
        // cmp dword [0xd0000000], "virt"; jne reset; mov ecx, 1000
        &[
            0x81, 0x3d, 0x00, 0x00, 0x00, 0xd0, 0x76, 0x69, 0x72, 0x74, 0x75, 0x23,
        ][..],
        &[0xb9, 0xe8, 0x03, 0x00, 0x00],
        // again: mov eax, [0xd0000060] (InterruptStatus); mov dword [0xd0000064], 1 (InterruptACK); dec ecx; jnz again
        &[0xa1, 0x60, 0x00, 0x00, 0xd0],
        &[0xc7, 0x05, 0x64, 0x00, 0x00, 0xd0, 0x01, 0x00, 0x00, 0x00],
        &[0x49, 0x75, 0xee],
        // mov dword [0xd00000f8], 1: no register
        &[0xc7, 0x05, 0xf8, 0x00, 0x00, 0xd0, 0x01, 0x00, 0x00, 0x00],
        SPIN,
        RESET,
    ]
    .concat();
    let Some(mut vmm) = configured(&kernel(&code), config()) else {
        return;
    };
    vmm.done(RequestBody::Boot);
    loop {
        let Ok(Reply::Metrics(metrics)) = vmm.request(RequestBody::Metrics, &[]).result else {
            panic!("no metrics")
        };
        let (_, counters) = &metrics.devices[0];
        if counters.contains(&("refused_accesses".to_owned(), 1)) {
            assert!(metrics.vcpu_exits < 10, "{metrics:?}");
            return;
        }
    }
}

#[test]
fn a_sandbox_of_another_release_is_refused_whatever_else_it_says() {
    let mut vmm = Vmm::start();
    let response = vmm.raw(br#"{"id":9,"body":{"configure":{"version":99,"config":{"from":"the future"}}}}"#);
    let failure = response.result.unwrap_err();
    assert_eq!((response.id, failure.kind), (9, FailureKind::Version));
    assert!(failure.message.contains("version 99"), "{}", failure.message);
}

#[test]
fn requests_that_make_no_sense_are_refused_by_name() {
    let mut vmm = Vmm::start();
    assert_eq!(
        vmm.raw(b"not json").result.unwrap_err().kind,
        FailureKind::Invalid
    );
    let unknown = vmm.raw(br#"{"id":3,"body":{"explode":{}}}"#);
    assert_eq!(unknown.id, 3);
    assert!(unknown.result.unwrap_err().message.contains("explode"));
    assert_eq!(
        vmm.refused(RequestBody::Boot),
        (FailureKind::State, "the VM must be configured first".to_owned())
    );
    let (kind, message) = vmm.refused(configure(config()));
    assert_eq!(kind, FailureKind::Invalid);
    assert!(message.contains("`kvm`"), "{message}");
    assert_eq!(
        vmm.refused(configure(config())).0,
        FailureKind::State,
        "configured once, well or not"
    );
}

#[test]
fn descriptions_that_cannot_be_built_are_refused_with_their_kind() {
    let good = kernel(SPIN);
    let bad = |config: VmConfig, kernel: &[u8], expected: FailureKind, word: &str| {
        let Some(kvm) = kvm() else { return };
        let kernel = file_of(kernel);
        let failure = Vmm::start()
            .request(configure(config), &[kvm.as_fd(), kernel.as_fd()])
            .result
            .unwrap_err();
        assert_eq!(failure.kind, expected, "{}", failure.message);
        assert!(failure.message.contains(word), "{}", failure.message);
    };
    bad(
        VmConfig { vcpus: 0, ..config() },
        &good,
        FailureKind::Invalid,
        "vCPUs",
    );
    bad(
        VmConfig { vcpus: 5, ..config() },
        &good,
        FailureKind::Invalid,
        "5 vCPUs of at most 4",
    );
    bad(
        VmConfig {
            pluggable_memory_mib: 100,
            ..config()
        },
        &good,
        FailureKind::Invalid,
        "100 MiB",
    );
    bad(
        VmConfig {
            memory_mib: 63,
            ..config()
        },
        &good,
        FailureKind::Invalid,
        "63 MiB",
    );
    bad(
        VmConfig {
            kernel: FdIndex(0),
            ..config()
        },
        &good,
        FailureKind::Invalid,
        "taken",
    );
    bad(
        VmConfig {
            kvm: FdIndex(1),
            kernel: FdIndex(0),
            ..config()
        },
        &good,
        FailureKind::Image,
        "guest kernel",
    );
    bad(
        VmConfig {
            cmdline: "x".repeat(4096),
            ..config()
        },
        &good,
        FailureKind::Invalid,
        "command line",
    );
    bad(config(), b"#!/bin/sh\n", FailureKind::Image, "make kernel");
    bad(config(), &elf(SPIN, &[]), FailureKind::Image, "PVH");
    let mut bzimage = vec![0; 1024];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bad(config(), &bzimage, FailureKind::Image, "bzImage");
    bad(
        config(),
        &good[..good.len() - 1],
        FailureKind::Image,
        "does not load",
    );
    bad(config(), b"", FailureKind::Image, "not a vmlinux");
}

#[test]
fn an_initramfs_that_does_not_fit_is_refused() {
    let Some(kvm) = kvm() else { return };
    let kernel = file_of(&kernel(SPIN));
    for (len, word) in [(0, "empty"), (64 << 20, "64 MiB")] {
        let initrd = tempfile::tempfile().unwrap();
        initrd.set_len(len).unwrap();
        let description = VmConfig {
            initrd: Some(FdIndex(2)),
            ..config()
        };
        let fds = [kvm.as_fd(), kernel.as_fd(), initrd.as_fd()];
        let failure = Vmm::start()
            .request(configure(description), &fds)
            .result
            .unwrap_err();
        assert_eq!(failure.kind, FailureKind::Image);
        assert!(failure.message.contains(word), "{}", failure.message);
    }
}

#[test]
fn something_else_than_kvm_is_refused() {
    let null = File::open("/dev/null").unwrap();
    let kernel = file_of(&kernel(SPIN));
    let failure = Vmm::start()
        .request(configure(config()), &[null.as_fd(), kernel.as_fd()])
        .result
        .unwrap_err();
    assert_eq!(failure.kind, FailureKind::Kvm);
}
