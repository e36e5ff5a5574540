//! The program of a process: where it is looked for, its arguments and its environment.
//!
//! [`Program::new`] prepares everything in the agent; the rest allocates nothing, since it runs in the child.

use std::ffi::{CStr, CString, NulError, c_char};
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, accessat, open, statat};
use rustix::io::Errno;

use super::spec::{self, SpecError};
use super::syscall;

/// Longest line of /etc/passwd that is looked at.
const LINE: usize = 1024;
const HOME: &[u8] = b"HOME=";

/// What a process executes.
#[derive(Debug)]
pub struct Program {
    /// As it was asked for.
    name: String,
    /// Where it may be, in order.
    candidates: Vec<CString>,
    arguments: Table,
    environment: Table,
    /// The user whose home directory is to become HOME.
    home_of: Option<u32>,
}

impl Program {
    /// Prepares a process's arguments and environment.
    ///
    /// # Errors
    /// [`SpecError::Invalid`] for no arguments or zero bytes.
    pub fn new(process: &spec::Process) -> Result<Self, SpecError> {
        let name = process
            .args
            .first()
            .filter(|name| !name.is_empty())
            .ok_or_else(|| SpecError::invalid("process.args", "is empty: name the program to execute"))?;
        let strings = |member: &str, strings: &[String]| {
            strings
                .iter()
                .enumerate()
                .map(|(index, string)| {
                    CString::new(string.as_str()).map_err(|_: NulError| {
                        SpecError::invalid(format!("process.{member}[{index}]"), "contains a zero byte")
                    })
                })
                .collect::<Result<Vec<_>, _>>()
        };
        let arguments = strings("args", &process.args)?;
        let environment = strings("env", &process.env)?;
        let value = |key: &str| {
            // As for getenv(3), the first entry counts.
            process.env.iter().find_map(|entry| entry.strip_prefix(key))
        };
        let candidates = if name.contains('/') {
            vec![arguments[0].clone()]
        } else {
            value("PATH=")
                .unwrap_or_default()
                .split(':')
                // Only absolute directories: the working directory is no place to find programs by accident.
                .filter(|directory| directory.starts_with('/'))
                .filter_map(|directory| CString::new(format!("{directory}/{name}")).ok())
                .collect()
        };
        Ok(Self {
            name: name.clone(),
            candidates,
            home_of: value("HOME=")
                .is_none_or(str::is_empty)
                .then_some(process.user.uid),
            arguments: Table::new(arguments),
            environment: Table::new(environment),
        })
    }

    /// The first candidate that the process may execute.
    ///
    /// # Errors
    /// ENOENT when there is none in the search path; for a name with a slash whatever is wrong with that file.
    pub fn find(&self) -> Result<&CStr, Errno> {
        for candidate in &self.candidates {
            match check_executable(candidate) {
                Err(errno) if self.name.contains('/') => return Err(errno),
                Err(_) => {}
                Ok(()) => return Ok(candidate),
            }
        }
        Err(Errno::NOENT)
    }

    /// Adds HOME when the environment has none: the user's directory in the container's /etc/passwd, or "/".
    pub fn complete_environment(&self, home: &mut Home) {
        if let (Some(uid), Some(slot)) = (self.home_of, self.environment.spare()) {
            home.look_up(uid);
            slot.store(home.entry.as_mut_ptr().cast(), Ordering::Relaxed);
        }
    }

    /// Becomes the program; returns only an error.
    #[must_use]
    pub fn execute(&self, path: &CStr) -> Errno {
        syscall::execve(path, &self.arguments.pointers, &self.environment.pointers)
    }

    /// Says what an error of [`Program::find`] or [`Program::execute`] means, in the words that callers of OCI
    /// runtimes look for.
    #[must_use]
    pub fn explain(&self, errno: Errno, while_executing: bool) -> String {
        let name = &self.name;
        let why = describe(errno);
        if while_executing {
            format!("exec {name}: {why}")
        } else if !name.contains('/') {
            format!("exec: {name:?}: executable file not found in $PATH")
        } else if errno == Errno::NOENT {
            format!("exec: {name:?}: stat {name}: {why}")
        } else {
            format!("exec: {name:?}: {why}")
        }
    }
}

/// An error as strerror(3) says it, without the number, in lower case as Go programs print it.
fn describe(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    chars
        .next()
        .map(|first| first.to_lowercase().chain(chars).collect())
        .unwrap_or_default()
}

fn check_executable(path: &CStr) -> Result<(), Errno> {
    let found = statat(CWD, path, AtFlags::empty())?;
    if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

/// Strings and the table of pointers to them that execve wants: the pointers, one spare place, null.
#[derive(Debug)]
struct Table {
    pointers: Vec<AtomicPtr<c_char>>,
    /// Owns what the pointers point to.
    _strings: Vec<CString>,
}

impl Table {
    fn new(strings: Vec<CString>) -> Self {
        let null = || AtomicPtr::new(std::ptr::null_mut());
        let pointers = strings
            .iter()
            .map(|string| AtomicPtr::new(string.as_ptr().cast_mut()))
            .chain([null(), null()])
            .collect();
        Self {
            pointers,
            _strings: strings,
        }
    }

    fn spare(&self) -> Option<&AtomicPtr<c_char>> {
        self.pointers
            .len()
            .checked_sub(2)
            .and_then(|index| self.pointers.get(index))
    }
}

/// Room for an environment entry that is only known in the child.
#[derive(Debug)]
pub struct Home {
    /// `HOME=...`, ending in zero.
    entry: [u8; LINE],
}

impl Home {
    /// An empty entry.
    #[must_use]
    pub const fn new() -> Self {
        Self { entry: [0; LINE] }
    }

    fn look_up(&mut self, uid: u32) {
        self.set(b"/");
        let Ok(file) = open(c"/etc/passwd", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else {
            return;
        };
        let mut lines = Lines::new();
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = rustix::io::read(&file, &mut buffer) {
            for byte in &buffer[..length] {
                if let Some(line) = lines.add(*byte)
                    && let Some(directory) = home_in_line(line, uid)
                {
                    self.set(directory);
                    return;
                }
            }
        }
        if let Some(directory) = lines.add(b'\n').and_then(|line| home_in_line(line, uid)) {
            self.set(directory);
        }
    }

    /// The caller keeps to lines shorter than the entry.
    fn set(&mut self, directory: &[u8]) {
        self.entry = [0; LINE];
        let length = directory.len().min(LINE - HOME.len() - 1);
        self.entry[..HOME.len()].copy_from_slice(HOME);
        self.entry[HOME.len()..HOME.len() + length].copy_from_slice(&directory[..length]);
    }
}

/// Cuts bytes into lines; one that is too long is passed over.
struct Lines {
    line: [u8; LINE],
    length: usize,
}

impl Lines {
    const fn new() -> Self {
        Self {
            line: [0; LINE],
            length: 0,
        }
    }

    fn add(&mut self, byte: u8) -> Option<&[u8]> {
        if byte == b'\n' {
            let length = std::mem::take(&mut self.length);
            return self.line.get(..length);
        }
        if let Some(place) = self.line.get_mut(self.length) {
            *place = byte;
        }
        self.length += 1;
        None
    }
}

/// passwd(5): name:password:UID:GID:GECOS:directory:shell.
fn home_in_line(line: &[u8], uid: u32) -> Option<&[u8]> {
    let mut fields = line.split(|byte| *byte == b':');
    let number = fields.nth(2)?;
    let directory = fields.nth(2)?;
    (std::str::from_utf8(number).ok()?.parse() == Ok(uid) && directory.first() == Some(&b'/'))
        .then_some(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(args: &[&str], env: &[&str]) -> spec::Process {
        spec::Process {
            args: args.iter().map(ToString::to_string).collect(),
            env: env.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_bare_name_is_looked_for_in_the_absolute_directories_of_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display();
        std::fs::create_dir(directory.path().join("sh")).unwrap();
        let program = Program::new(&process(
            &["sh"],
            &[&format!("PATH=.::/nowhere:{path}:/bin"), "PATH=/no"],
        ))
        .unwrap();
        assert_eq!(program.candidates.len(), 3);
        // The directory of that name is passed over.
        assert_eq!(program.find().unwrap(), c"/bin/sh");
        let program = Program::new(&process(&["no-such-program"], &["PATH=/bin"])).unwrap();
        assert_eq!(
            program.explain(program.find().unwrap_err(), false),
            "exec: \"no-such-program\": executable file not found in $PATH"
        );
        let program = Program::new(&process(&["sh"], &[])).unwrap();
        assert_eq!(program.find(), Err(Errno::NOENT));
    }

    #[test]
    fn a_name_with_a_slash_is_that_file() {
        let explain = |name: &str| {
            let program = Program::new(&process(&[name], &[])).unwrap();
            program.explain(program.find().unwrap_err(), false)
        };
        assert_eq!(
            explain("/no/sh"),
            "exec: \"/no/sh\": stat /no/sh: no such file or directory"
        );
        assert_eq!(explain("/etc"), "exec: \"/etc\": is a directory");
        assert_eq!(explain("/etc/passwd"), "exec: \"/etc/passwd\": permission denied");
        let program = Program::new(&process(&["/bin/x"], &[])).unwrap();
        assert_eq!(
            program.explain(Errno::NOEXEC, true),
            "exec /bin/x: exec format error"
        );
    }

    #[test]
    fn arguments_without_a_program_or_with_zero_bytes_are_refused() {
        assert!(Program::new(&process(&[], &[])).is_err());
        assert!(Program::new(&process(&[""], &[])).is_err());
        let error = Program::new(&process(&["sh", "a\0b"], &[]))
            .unwrap_err()
            .to_string();
        assert_eq!(error, "process.args[1]: contains a zero byte");
    }

    #[test]
    fn home_comes_from_the_user_data_base() {
        assert_eq!(
            home_in_line(b"root:x:0:0:root:/root:/bin/sh", 0),
            Some(&b"/root"[..])
        );
        assert_eq!(home_in_line(b"root:x:0:0:root:/root:/bin/sh", 1), None);
        assert_eq!(home_in_line(b"bad:x:0", 0), None);
        let mut lines = Lines::new();
        let text = [&[b'x'; 2000][..], b"\na:x:7:7::/home/a:\n"].concat();
        let found: Vec<Vec<u8>> = text
            .iter()
            .filter_map(|byte| lines.add(*byte).map(<[u8]>::to_vec))
            .collect();
        assert_eq!(found, [b"a:x:7:7::/home/a:".to_vec()]);
        assert!(
            Program::new(&process(&["sh"], &["HOME=/x"]))
                .unwrap()
                .home_of
                .is_none()
        );
    }
}
