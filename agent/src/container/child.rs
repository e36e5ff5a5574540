//! What the child of clone3 does until it is the container's program.
//!
//! The child is a copy of one thread of a process with several, so nothing here may allocate, lock or panic: every
//! string, table and descriptor was made before the clone, as a list of [`Step`]s. The child runs the steps in
//! order and tells the agent the number of the one that failed; the agent, which holds the same list, says what
//! it was.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, fchown, fstat, mknodat, open, statat,
    symlinkat,
};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{Resource, Rlimit};
use rustix::thread::ThreadNameSpaceType;

use super::capabilities::Sets;
use super::mount::{self, FileSystem, Propagation};
use super::target::{self, Kind};
use super::{exec, seccomp, syscall, terminal};

/// One thing the child does.
#[derive(Debug)]
pub enum Step {
    /// setsid(2).
    Session,
    /// A session keyring of its own, or joining the container's (keyctl(2)).
    Keyring(CString),
    /// Writes a file of the agent's /proc: sysctls, oom_score_adj.
    Write {
        path: CString,
        data: Vec<u8>,
        member: String,
    },
    /// sethostname(2).
    Hostname(Vec<u8>),
    /// setdomainname(2).
    Domainname(Vec<u8>),
    /// Joins namespaces of the container's init.
    Join {
        init: Inherited,
        types: ThreadNameSpaceType,
    },
    /// A cgroup namespace whose root is the container's cgroup: the child is in it already.
    CgroupNamespace,
    /// Makes a directory the root, and leaves the guest's own tree behind.
    Root(CString),
    /// Puts a mount where it belongs.
    Mount {
        tree: Tree,
        target: CString,
        kind: Kind,
        propagation: Vec<Propagation>,
    },
    /// A device node.
    Device(Device),
    /// A symbolic link, unless something has that name.
    Link {
        content: &'static CStr,
        path: &'static CStr,
    },
    /// Hides a path.
    Mask { path: CString, cover: FileSystem },
    /// Makes a path read-only.
    ReadOnly(CString),
    /// Makes the root's mount read-only.
    ReadOnlyRoot,
    /// How mount events of the root travel.
    RootPropagation(Propagation),
    /// Makes the working directory.
    MakeDirectory(CString),
    /// A pseudo-terminal becomes standard I/O and the controlling terminal.
    Terminal(Terminal),
    /// Descriptors become standard I/O, owned by the user.
    Stdio { fds: [Inherited; 3], uid: u32 },
    /// setrlimit(2).
    Limit { resource: Resource, limit: Rlimit },
    /// personality(2).
    Personality(u32),
    /// umask(2).
    Umask(u32),
    /// prctl(2), PR_SET_NO_NEW_PRIVS.
    NoNewPrivileges,
    /// Installs a filter of system calls.
    Seccomp(seccomp::Filter),
    /// Takes the user's ids and capabilities.
    User(User),
    /// chdir(2).
    WorkingDirectory(CString),
}

/// A descriptor that the child inherits and the agent gives up once the child has been made.
#[derive(Debug)]
pub struct Inherited(Option<OwnedFd>);

impl From<OwnedFd> for Inherited {
    fn from(fd: OwnedFd) -> Self {
        Self(Some(fd))
    }
}

impl Inherited {
    fn get(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.0.as_ref().map(AsFd::as_fd).ok_or(Errno::BADF)
    }
}

/// A mount that has a place yet to be found.
#[derive(Debug)]
pub enum Tree {
    /// Made by the agent.
    Detached(Inherited),
    /// To be made by the child, since it depends on namespaces.
    New(FileSystem),
}

/// A device node.
#[derive(Debug)]
pub struct Device {
    /// Its directory.
    pub directory: CString,
    /// Its name there.
    pub name: CString,
    /// What it is.
    pub file_type: FileType,
    /// Permission bits.
    pub mode: u32,
    /// makedev(3).
    pub number: u64,
    pub uid: u32,
    pub gid: u32,
}

/// How a terminal is set up.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    /// 0 for the kernel's default.
    pub rows: u16,
    pub columns: u16,
    pub uid: u32,
    /// Whether it becomes /dev/console too.
    pub console: bool,
}

/// Ids and capabilities of the program.
#[derive(Debug)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<Gid>,
    pub capabilities: Sets,
}

/// Everything the child needs.
#[derive(Debug)]
pub struct Plan {
    /// Before the agent is told that the process is created.
    pub steps: Vec<Step>,
    /// What is executed.
    pub program: exec::Program,
    /// Filter that is installed last, when no new privileges are possible anyway.
    pub last_filter: Option<seccomp::Filter>,
}

impl Plan {
    /// Closes the agent's copies of what the child inherits: the ends of pipes must be the child's alone.
    pub fn give_up_descriptors(&mut self) {
        for step in &mut self.steps {
            match step {
                Step::Join { init: fd, .. }
                | Step::Mount {
                    tree: Tree::Detached(fd),
                    ..
                } => fd.0 = None,
                Step::Stdio { fds, .. } => fds.iter_mut().for_each(|fd| fd.0 = None),
                _ => {}
            }
        }
    }
}

/// The child's end of the conversation with the agent: a SOCK_SEQPACKET socket. The child writes [`Message`]s; one
/// byte from the agent opens the gate before the execution, end of file means that the process is not wanted.
#[derive(Debug)]
pub struct Channel(pub OwnedFd);

/// What the child tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Everything is done but the execution. The number is the terminal's master descriptor, or -1.
    Ready { terminal: i32 },
    /// A step failed.
    Failed { stage: Stage, errno: Errno },
}

/// Where the child was when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In the step of this number.
    Step(u32),
    /// Looking for the executable.
    Lookup,
    /// Installing the last filter.
    LastFilter,
    /// In execve(2).
    Execute,
}

impl Message {
    /// Length of an encoded message.
    pub const SIZE: usize = 12;

    /// Three numbers in the machine's order: the peer is a copy of the same program.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let (kind, first, second) = match self {
            Self::Ready { terminal } => (0, 0, terminal),
            Self::Failed { stage, errno } => {
                let (kind, index) = match stage {
                    Stage::Step(index) => (1, index),
                    Stage::Lookup => (2, 0),
                    Stage::LastFilter => (3, 0),
                    Stage::Execute => (4, 0),
                };
                (kind, index, errno.raw_os_error())
            }
        };
        let mut bytes = [0; Self::SIZE];
        bytes[..4].copy_from_slice(&u32::to_ne_bytes(kind));
        bytes[4..8].copy_from_slice(&u32::to_ne_bytes(first));
        bytes[8..].copy_from_slice(&i32::to_ne_bytes(second));
        bytes
    }

    /// None for anything the child does not send.
    #[must_use]
    pub fn decode(bytes: [u8; Self::SIZE]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        let (kind, first) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
        let second = i32::from_ne_bytes([i, j, k, l]);
        let stage = match kind {
            0 => return Some(Self::Ready { terminal: second }),
            1 => Stage::Step(first),
            2 => Stage::Lookup,
            3 => Stage::LastFilter,
            4 => Stage::Execute,
            _ => return None,
        };
        Some(Self::Failed {
            stage,
            errno: Errno::from_raw_os_error(second),
        })
    }
}

/// Runs the plan and ends in the program, or in a message and exit.
pub fn run(plan: &Plan, channel: &Channel) -> ! {
    let failure = become_program(plan, channel);
    let _ = rustix::io::write(&channel.0, &failure.encode());
    syscall::exit(1)
}

/// Returns only when something failed.
fn become_program(plan: &Plan, channel: &Channel) -> Message {
    let fail = |stage| move |errno| Message::Failed { stage, errno };
    let mut terminal = None;
    syscall::default_signals();
    rustix::process::umask(Mode::empty());
    for (index, step) in (0..).zip(&plan.steps) {
        if let Err(errno) = perform(step, &mut terminal) {
            return fail(Stage::Step(index))(errno);
        }
    }
    let mut home = exec::Home::new();
    let executable = match plan.program.find() {
        Ok(executable) => executable,
        Err(errno) => return fail(Stage::Lookup)(errno),
    };
    let terminal = terminal.as_ref().map_or(-1, AsRawFd::as_raw_fd);
    // A created process may wait for long: it must not hold other processes' ends of pipes and sockets open.
    syscall::close_all_but(channel.0.as_raw_fd(), terminal);
    let ready = Message::Ready { terminal };
    if rustix::io::write(&channel.0, &ready.encode()).is_err() || !gate_opened(channel) {
        syscall::exit(1);
    }
    if let Some(filter) = &plan.last_filter
        && let Err(errno) = filter.install()
    {
        return fail(Stage::LastFilter)(errno);
    }
    plan.program.complete_environment(&mut home);
    fail(Stage::Execute)(plan.program.execute(executable))
}

/// Waits for the agent's word; false when the agent has let the process go.
fn gate_opened(channel: &Channel) -> bool {
    let mut byte = [0];
    loop {
        match rustix::io::read(&channel.0, &mut byte) {
            Err(Errno::INTR) => {}
            result => return result == Ok(1),
        }
    }
}

fn perform(step: &Step, terminal: &mut Option<OwnedFd>) -> Result<(), Errno> {
    match step {
        Step::Session => rustix::process::setsid().map(drop),
        Step::Keyring(name) => syscall::join_session_keyring(name),
        Step::Write { path, data, .. } => write_file(path, data),
        Step::Hostname(name) => rustix::system::sethostname(name),
        Step::Domainname(name) => rustix::system::setdomainname(name),
        Step::Join { init, types } => rustix::thread::move_into_thread_name_spaces(init.get()?, *types),
        Step::CgroupNamespace => syscall::unshare(libc::CLONE_NEWCGROUP),
        Step::Root(path) => enter_root(path),
        Step::Mount {
            tree,
            target,
            kind,
            propagation,
        } => put_mount(tree, target, *kind, propagation),
        Step::Device(device) => make_device(device),
        Step::Link { content, path } => match symlinkat(*content, CWD, *path) {
            Err(Errno::EXIST) => Ok(()),
            result => result,
        },
        Step::Mask { path, cover } => mask(path, cover),
        Step::ReadOnly(path) => make_read_only(path),
        Step::ReadOnlyRoot => {
            mount::set_attributes(open_root()?.as_fd(), mount::Attributes::READ_ONLY, false)
        }
        Step::RootPropagation(propagation) => mount::set_propagation(open_root()?.as_fd(), *propagation),
        Step::MakeDirectory(path) => {
            target::open_or_create(open_root()?.as_fd(), path, Kind::Directory).map(drop)
        }
        Step::Terminal(settings) => {
            *terminal = Some(terminal::set_up(settings)?);
            Ok(())
        }
        Step::Stdio { fds, uid } => connect_stdio(fds, *uid),
        Step::Limit { resource, limit } => rustix::process::setrlimit(*resource, *limit),
        Step::Personality(domain) => syscall::personality(*domain),
        Step::Umask(mask) => {
            rustix::process::umask(Mode::from_raw_mode(*mask));
            Ok(())
        }
        Step::NoNewPrivileges => rustix::thread::set_no_new_privs(true),
        Step::Seccomp(filter) => filter.install(),
        Step::User(user) => become_user(user),
        Step::WorkingDirectory(path) => rustix::process::chdir(path.as_c_str()),
    }
}

fn write_file(path: &CStr, data: &[u8]) -> Result<(), Errno> {
    let file = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, data).map(drop)
}

fn open_root() -> Result<OwnedFd, Errno> {
    open(
        c"/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn enter_root(path: &CStr) -> Result<(), Errno> {
    // What happens below here must not travel to the agent's tree, and pivot_root(2) refuses shared mounts.
    mount_change(
        c"/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )?;
    let root = open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::process::fchdir(&root)?;
    // With both arguments the same the old root lies over the new one, where it is then detached (pivot_root(2)).
    rustix::process::pivot_root(c".", c".")?;
    unmount(c".", UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")
}

fn put_mount(tree: &Tree, target: &CStr, kind: Kind, propagation: &[Propagation]) -> Result<(), Errno> {
    let target = target::open_or_create(open_root()?.as_fd(), target, kind)?;
    match tree {
        Tree::Detached(tree) => mount::attach(tree.get()?, target.as_fd(), propagation),
        Tree::New(file_system) => {
            let tree = file_system.make().map_err(|error| error.errno)?;
            mount::attach(tree.as_fd(), target.as_fd(), propagation)
        }
    }
}

fn make_device(device: &Device) -> Result<(), Errno> {
    let directory = target::open_or_create(open_root()?.as_fd(), &device.directory, Kind::Directory)?;
    let name = device.name.as_c_str();
    let mode = Mode::from_raw_mode(device.mode);
    match mknodat(&directory, name, device.file_type, mode, device.number) {
        Err(Errno::EXIST) => {
            let found = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(found.st_mode) != device.file_type || found.st_rdev != device.number {
                return Err(Errno::EXIST);
            }
            chmodat(&directory, name, mode, AtFlags::empty())?;
        }
        result => result?,
    }
    if (device.uid, device.gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        chownat(&directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// Covers a file with /dev/null and a directory with an empty one. What does not exist needs no cover.
fn mask(path: &CStr, cover: &FileSystem) -> Result<(), Errno> {
    let target = match target::open(open_root()?.as_fd(), path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result?,
    };
    let tree = if FileType::from_raw_mode(fstat(&target)?.st_mode) == FileType::Directory {
        cover.make().map_err(|error| error.errno)?
    } else {
        mount::clone_tree(CWD, c"/dev/null", &mount::NO_OPTIONS)?
    };
    mount::attach(tree.as_fd(), target.as_fd(), &[])
}

fn make_read_only(path: &CStr) -> Result<(), Errno> {
    let target = match target::open(open_root()?.as_fd(), path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result?,
    };
    let tree = mount::clone_tree(target.as_fd(), c"", &mount::READ_ONLY_TREE)?;
    mount::attach(tree.as_fd(), target.as_fd(), &[])
}

fn connect_stdio([stdin, stdout, stderr]: &[Inherited; 3], uid: u32) -> Result<(), Errno> {
    let fds = [stdin.get()?, stdout.get()?, stderr.get()?];
    for fd in fds {
        own(fd, uid)?;
    }
    syscall::dup_to_stdio(fds)
}

/// Lets the user open /dev/stdout anew. A device such as /dev/null belongs to nobody in particular.
fn own(fd: BorrowedFd<'_>, uid: u32) -> Result<(), Errno> {
    if uid == 0 || FileType::from_raw_mode(fstat(fd)?.st_mode) == FileType::CharacterDevice {
        return Ok(());
    }
    fchown(fd, Some(Uid::from_raw(uid)), None)
}

fn become_user(user: &User) -> Result<(), Errno> {
    user.capabilities.apply_bounding()?;
    // Capabilities survive the change of user until they are set below.
    rustix::thread::set_keep_capabilities(true)?;
    rustix::thread::set_thread_groups(&user.additional_gids)?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    rustix::thread::set_keep_capabilities(false)?;
    user.capabilities.apply()
}

/// A file or directory below the root, for steps that lie in other files.
pub(super) fn open_path(path: &CStr, kind: Kind) -> Result<OwnedFd, Errno> {
    target::open_or_create(open_root()?.as_fd(), path, kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_socket() {
        for message in [
            Message::Ready { terminal: -1 },
            Message::Ready { terminal: 7 },
            Message::Failed {
                stage: Stage::Step(19),
                errno: Errno::ACCESS,
            },
            Message::Failed {
                stage: Stage::Execute,
                errno: Errno::NOENT,
            },
        ] {
            assert_eq!(Message::decode(message.encode()), Some(message));
        }
        assert_eq!(Message::decode([9; Message::SIZE]), None);
    }
}
