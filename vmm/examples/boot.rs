//! Boots a guest kernel with nothing around it: plays the sandbox to one `kata-rs-vmm` process, prints the
//! guest's console, the boot timeline and how the VM ended.
//!
//! ```text
//! boot [--vmm PATH] [--cpus N] [--max-cpus N] [--memory MIB] [--pluggable MIB] [--disk FILE]… [--slots N] [--share NAME=DIRECTORY]… [--balloon]
//!      [--exercise] [--no-jail] [--quiet] [--repeat N] KERNEL [INITRD] [-- KERNEL WORDS…]
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use protocol::channel::{self, Received};
use protocol::stream::{PORT_AGENT, VsockOpen};
use protocol::vmm::{
    BlockBacking, BlockSlot, CONTROL_FD, CONTROL_VERSION, CachePolicy, Event, FdIndex, FromVmm, Reply,
    Request, RequestBody, Share, VmConfig,
};
use rustix::event::{PollFd, PollFlags, poll};
use vmm::timeline::monotonic_ns;

type Failure = Box<dyn std::error::Error>;

#[derive(Clone)]
struct Options {
    vmm: PathBuf,
    cpus: u8,
    max_cpus: u8,
    memory: u32,
    pluggable: u32,
    shares: Vec<(String, PathBuf)>,
    slots: u32,
    balloon: bool,
    jail: bool,
    quiet: bool,
    exercise: bool,
    repeat: u32,
    disks: Vec<PathBuf>,
    files: Vec<PathBuf>,
    words: Vec<String>,
}

fn main() -> ExitCode {
    match options().and_then(|options| (0..options.repeat).try_for_each(|_| run(&options))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options, Failure> {
    let own = std::env::current_exe()?;
    let beside = |name: &str| {
        own.ancestors()
            .map(|dir| dir.join(name))
            .find(|path| path.is_file())
    };
    let mut options = Options {
        vmm: beside("kata-rs-vmm").unwrap_or_else(|| "kata-rs-vmm".into()),
        cpus: 1,
        max_cpus: 1,
        memory: 128,
        pluggable: 0,
        shares: Vec::new(),
        slots: 0,
        balloon: false,
        jail: true,
        quiet: false,
        exercise: false,
        repeat: 1,
        disks: Vec::new(),
        files: Vec::new(),
        words: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .ok_or_else(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--vmm" => options.vmm = value()?.into(),
            "--cpus" => options.cpus = value()?.parse()?,
            "--max-cpus" => options.max_cpus = value()?.parse()?,
            "--pluggable" => options.pluggable = value()?.parse()?,
            "--memory" => options.memory = value()?.parse()?,
            "--repeat" => options.repeat = value()?.parse()?,
            "--disk" => options.disks.push(value()?.into()),
            "--slots" => options.slots = value()?.parse()?,
            "--share" => {
                let value = value()?;
                let (name, directory) = value.split_once('=').ok_or("--share NAME=DIRECTORY")?;
                options.shares.push((name.to_owned(), directory.into()));
            }
            "--balloon" => options.balloon = true,
            "--no-jail" => options.jail = false,
            "--quiet" => options.quiet = true,
            "--exercise" => options.exercise = true,
            "--" => options.words.extend(arguments.by_ref()),
            other if other.starts_with('-') => return Err(format!("unknown option {other}").into()),
            file => options.files.push(file.into()),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), Failure> {
    let (ours, theirs) = channel::pair()?;
    let (vsock, vsock_theirs) = channel::pair()?;
    let (mut console, console_writer) = std::io::pipe()?;
    let mut fds: Vec<OwnedFd> = vec![File::options().read(true).write(true).open("/dev/kvm")?.into()];
    for path in &options.files {
        fds.push(
            File::open(path)
                .map_err(|error| format!("{}: {error}", path.display()))?
                .into(),
        );
    }
    if options.files.is_empty() || options.files.len() > 2 {
        return Err("name a kernel and perhaps an initramfs".into());
    }
    let mut add = |fd: OwnedFd| {
        fds.push(fd);
        FdIndex(fds.len() as u32 - 1)
    };
    let vsock_index = add(vsock_theirs);
    let console_index = add(console_writer.into());
    let blocks = options
        .disks
        .iter()
        .enumerate()
        .map(|(index, path)| {
            let fd = add(File::open(path)?.into());
            Ok(BlockSlot {
                serial: format!("disk{index}"),
                backing: Some(BlockBacking::whole(fd, true)),
            })
        })
        .collect::<std::io::Result<Vec<_>>>()?;
    let blocks: Vec<_> = blocks
        .into_iter()
        .chain((0..options.slots).map(|index| BlockSlot {
            serial: format!("slot{index}"),
            backing: None,
        }))
        .collect();
    let started_ns = monotonic_ns();
    let pid = spawn(options, &theirs)?;
    drop(theirs);
    let config = VmConfig {
        id: "boot".to_owned(),
        vcpus: options.cpus,
        max_vcpus: options.max_cpus.max(options.cpus),
        memory_mib: options.memory,
        pluggable_memory_mib: options.pluggable,
        kvm: FdIndex(0),
        kernel: FdIndex(1),
        initrd: (options.files.len() == 2).then_some(FdIndex(2)),
        cmdline: options.words.join(" "),
        vsock: Some(vsock_index),
        nets: Vec::new(),
        blocks,
        fs_tag: (!options.shares.is_empty()).then(|| "kata-rs".to_owned()),
        balloon: options.balloon,
        verbose_console: !options.quiet,
        console_log: Some(console_index),
        started_ns,
        jail: options.jail,
    };
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    request(
        &ours,
        1,
        RequestBody::Configure {
            version: CONTROL_VERSION,
            config: Box::new(config),
        },
        &borrowed,
    )?;
    drop(fds);
    for (name, directory) in &options.shares {
        let share = Share {
            name: name.clone(),
            fd: FdIndex(0),
            cache: CachePolicy::Exclusive,
        };
        let root = File::open(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        request(&ours, 6, RequestBody::AddShare(share), &[root.as_fd()])?;
    }
    request(&ours, 2, RequestBody::Boot, &[])?;
    let outcome = watch(options, &ours, &vsock, &mut console, started_ns);
    let mut status = 0;
    // SAFETY: plain wait for a child of this process.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    outcome?;
    println!("process: exit status {}", libc::WEXITSTATUS(status));
    Ok(())
}

/// Shows the console and answers until the VM ends.
fn watch(
    options: &Options,
    control: &OwnedFd,
    vsock: &OwnedFd,
    console: &mut std::io::PipeReader,
    started_ns: u64,
) -> Result<(), Failure> {
    let mut ready_seen = Vec::new();
    let (mut console_open, mut vsock_open) = (true, true);
    loop {
        let vsock_events = if vsock_open {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut ready = vec![
            PollFd::new(control, PollFlags::IN),
            PollFd::new(vsock, vsock_events),
        ];
        if console_open {
            ready.push(PollFd::new(console, PollFlags::IN));
        }
        poll(&mut ready, None)?;
        let [control_ready, vsock_ready] = [0, 1].map(|index| !ready[index].revents().is_empty());
        let console_ready = ready.get(2).is_some_and(|fd| !fd.revents().is_empty());
        if console_ready {
            let mut bytes = [0; 4096];
            let read = console.read(&mut bytes)?;
            console_open = read > 0;
            std::io::stdout().write_all(&bytes[..read])?;
            ready_seen.extend_from_slice(&bytes[..read]);
            if let Some(at) = ready_seen.windows(5).position(|window| window == b"READY") {
                println!("\nREADY after {} us", (monotonic_ns() - started_ns) / 1000);
                ready_seen.drain(..at + 5);
            }
        } else if vsock_ready && vsock_open {
            match channel::receive(vsock)? {
                Received::Message(bytes, fds) => {
                    let open: VsockOpen = serde_json::from_slice(&bytes)?;
                    println!(
                        "vsock: guest connected to port {} after {} us",
                        open.port,
                        (monotonic_ns() - started_ns) / 1000
                    );
                    if open.port == PORT_AGENT && options.exercise {
                        exercise(options, control)?;
                    }
                    if open.port == PORT_AGENT && options.quiet {
                        report(control)?;
                        request(control, 4, RequestBody::Shutdown, &[])?;
                    }
                    drop(fds);
                }
                Received::Closed => vsock_open = false,
            }
        } else if control_ready {
            match channel::receive(control)? {
                Received::Closed => return Err("the VMM is gone without a word".into()),
                Received::Message(bytes, _) => match serde_json::from_slice(&bytes)? {
                    FromVmm::Event(Event::Exited { cause, console }) => {
                        println!(
                            "ended: {cause:?} after {} us",
                            (monotonic_ns() - started_ns) / 1000
                        );
                        if !console_open {
                            println!("console: {console}");
                        }
                        return Ok(());
                    }
                    FromVmm::Event(Event::PluggedMemory { bytes }) => {
                        println!("plugged: {} MiB", bytes >> 20);
                    }
                    FromVmm::Response(response) => println!("unexpected: {response:?}"),
                },
            }
        }
    }
}

/// Pauses and resumes the guest, and takes memory from it.
fn exercise(options: &Options, control: &OwnedFd) -> Result<(), Failure> {
    for _ in 0..100 {
        request(control, 7, RequestBody::Pause, &[])?;
        request(control, 8, RequestBody::Resume, &[])?;
    }
    println!("paused and resumed 100 times");
    if options.balloon {
        report(control)?;
        request(
            control,
            9,
            RequestBody::SetBalloon {
                target_mib: options.memory / 2,
            },
            &[],
        )?;
        std::thread::sleep(std::time::Duration::from_secs(3));
        report(control)?;
        request(control, 10, RequestBody::SetBalloon { target_mib: 0 }, &[])?;
    }
    Ok(())
}

fn report(control: &OwnedFd) -> Result<(), Failure> {
    if let Reply::Timeline(timeline) = request(control, 3, RequestBody::Timeline, &[])? {
        println!("{timeline:?}");
    }
    if let Reply::Metrics(metrics) = request(control, 5, RequestBody::Metrics, &[])? {
        println!(
            "exits {}, resident {} KiB of {} KiB, {:?}",
            metrics.vcpu_exits,
            metrics.guest_resident_bytes >> 10,
            metrics.guest_memory_bytes >> 10,
            metrics.devices
        );
    }
    Ok(())
}

fn request(control: &OwnedFd, id: u64, body: RequestBody, fds: &[BorrowedFd<'_>]) -> Result<Reply, Failure> {
    channel::send(control, &serde_json::to_vec(&Request { id, body })?, fds)?;
    let Received::Message(bytes, _) = channel::receive(control)? else {
        return Err("the VMM is gone".into());
    };
    match serde_json::from_slice(&bytes)? {
        FromVmm::Response(response) => Ok(response.result?),
        FromVmm::Event(event) => Err(format!("{event:?}").into()),
    }
}

/// Starts the VMM in a pid namespace of its own.
fn spawn(options: &Options, control: &OwnedFd) -> Result<i32, Failure> {
    let program = std::ffi::CString::new(options.vmm.as_os_str().as_encoded_bytes())?;
    let arguments = [program.as_ptr(), std::ptr::null()];
    let mut clone: libc::clone_args = unsafe_zeroed();
    clone.flags = if options.jail {
        libc::CLONE_NEWPID as u64
    } else {
        0
    };
    clone.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: a fork; the child only makes async-signal-safe calls on memory prepared before it.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const clone, size_of::<libc::clone_args>()) };
    if pid == 0 {
        // SAFETY: as above.
        unsafe {
            if control.as_raw_fd() == CONTROL_FD {
                libc::fcntl(CONTROL_FD, libc::F_SETFD, 0);
            } else {
                libc::dup2(control.as_raw_fd(), CONTROL_FD);
            }
            libc::execv(program.as_ptr(), arguments.as_ptr());
            libc::_exit(127);
        }
    }
    if pid < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(pid as i32)
}

fn unsafe_zeroed() -> libc::clone_args {
    // SAFETY: plain integers.
    unsafe { std::mem::zeroed() }
}
