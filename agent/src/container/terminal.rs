//! A container's pseudo-terminal, made in the child from the container's own devpts.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Gid, Mode, OFlags, Uid, fchown, open};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::child::{Terminal, open_path};
use super::target::Kind;
use super::{mount, syscall};

/// Makes the terminal, its slave standard I/O and controlling terminal, and gives the master.
///
/// Allocates nothing.
///
/// # Errors
/// Those of the calls; ENOENT when the container has no /dev/pts.
pub fn set_up(settings: &Terminal) -> Result<OwnedFd, Errno> {
    let master = open(
        c"/dev/pts/ptmx",
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    if settings.uid != 0 {
        fchown(&slave, Some(Uid::from_raw(settings.uid)), None::<Gid>)?;
    }
    resize(&master, settings.rows, settings.columns)?;
    if settings.console {
        let console = open_path(c"/dev/console", Kind::File)?;
        let tree = mount::clone_tree(slave.as_fd(), c"", &mount::NO_OPTIONS)?;
        mount::attach(tree.as_fd(), console.as_fd(), &[])?;
    }
    rustix::process::ioctl_tiocsctty(&slave)?;
    syscall::dup_to_stdio([slave.as_fd(), slave.as_fd(), slave.as_fd()])?;
    Ok(master)
}

/// Sets a terminal's window size; 0 by 0 leaves it.
///
/// # Errors
/// Those of tty_ioctl(4), TIOCSWINSZ.
pub fn resize(terminal: &OwnedFd, rows: u16, columns: u16) -> Result<(), Errno> {
    if (rows, columns) == (0, 0) {
        return Ok(());
    }
    tcsetwinsize(
        terminal,
        Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )
}
