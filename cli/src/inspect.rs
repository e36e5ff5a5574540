//! `ps`, `logs`, `update`, `kill` and `rm`: what is known of containers, and how they go.

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::arguments::UpdateOptions;
use crate::control::{Connection, Reply, Request};
use crate::error::Error;
use crate::store::{Home, Record, State, Store};
use crate::{block_on, signals, spec};

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    record: &'a Record,
    state: State,
}

/// Lists containers.
pub fn ps(store: &Store, all: bool, json: bool) -> Result<(), Error> {
    let homes = store.all();
    let rows: Vec<Row<'_>> = homes
        .iter()
        .map(|home| Row {
            record: &home.record,
            state: home.record.state(),
        })
        .filter(|row| all || matches!(row.state, State::Running | State::Creating))
        .collect();
    let text = if json {
        serde_json::to_string(&rows).map_err(|error| Error::host("cannot write the list")(error.into()))?
            + "\n"
    } else {
        table(&rows)
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(Error::host("cannot write to standard output"))
}

fn table(rows: &[Row<'_>]) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let mut lines = vec![["NAME", "STATUS", "PID", "AGE", "IMAGE", "COMMAND"].map(str::to_owned)];
    for row in rows {
        let status = match (row.state, row.record.status) {
            (State::Exited, Some(status)) => format!("exited ({status})"),
            (state, _) => format!("{state:?}").to_lowercase(),
        };
        let image = row.record.image.rsplit('/').next().unwrap_or_default();
        lines.push([
            row.record.name.clone(),
            status,
            row.record
                .pid
                .map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            age(now.saturating_sub(row.record.created)),
            printable(image),
            printable(&row.record.command.join(" ")),
        ]);
    }
    let mut widths = [0; 5];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    lines
        .iter()
        .map(|line| {
            let cells: String = line
                .iter()
                .zip(widths)
                .map(|(cell, width)| format!("{cell:width$}  "))
                .collect();
            format!("{cells}{}\n", line[5])
        })
        .collect()
}

/// Control characters could drive the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .take(60)
        .collect()
}

fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// Prints a detached container's output.
pub fn logs(store: &Store, name: &str, follow: bool) -> Result<(), Error> {
    let home = store.find(name)?;
    let mut log = match File::open(home.log()) {
        Ok(log) => log,
        // A container in the foreground keeps no log.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::file("cannot read", home.log())(error)),
    };
    let mut copy =
        || io::copy(&mut log, &mut io::stdout()).map_err(Error::host("cannot write to standard output"));
    loop {
        // Asked before copying, so that what is written until the exit is still copied.
        let running = follow
            && store
                .find(name)
                .is_ok_and(|home| home.record.state() == State::Running);
        copy()?;
        if !running {
            return Ok(());
        }
        // A person watches; nothing waits for this.
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Signals a container's first process.
pub fn kill(store: &Store, name: &str, signal: &str) -> Result<(), Error> {
    let signal = signals::parse(signal)?;
    send_signal(&store.find(name)?, signal)
}

/// Changes a container's limits.
pub fn update(store: &Store, options: &UpdateOptions) -> Result<(), Error> {
    let resources = spec::resources(options.cpus, options.memory);
    ask(&store.find(&options.name)?, &Request::Update(resources))
}

fn send_signal(home: &Home, signal: u32) -> Result<(), Error> {
    ask(home, &Request::Signal(signal))
}

/// Asks the process that holds a container for something.
fn ask(home: &Home, request: &Request) -> Result<(), Error> {
    let name = &home.record.name;
    if home.record.state() != State::Running {
        return Err(Error::NotRunning(name.clone()));
    }
    block_on(async {
        let connection = Connection::connect(&home.socket()).map_err(|_| Error::NotRunning(name.clone()))?;
        let failed = "cannot reach the container's holder";
        connection.send(request, &[]).await.map_err(Error::host(failed))?;
        match connection.receive::<Reply>().await.map_err(Error::host(failed))? {
            Some((Reply::Failed { message, status }, _)) => Err(Error::Reported { message, status }),
            Some(_) => Ok(()),
            None => Err(Error::NotRunning(name.clone())),
        }
    })
}

/// Removes containers; running ones only with `force`.
pub fn rm(store: &Store, names: &[String], force: bool) -> Result<(), Error> {
    for name in names {
        let home = store.find(name)?;
        match home.record.state() {
            State::Exited | State::Lost => home.remove(),
            State::Running | State::Creating if !force => return Err(Error::Running(name.clone())),
            State::Running | State::Creating => {
                match send_signal(&home, libc::SIGKILL.unsigned_abs()) {
                    // One that has just ended is what was wanted; its holder says so, or is gone.
                    Ok(()) | Err(Error::NotRunning(_) | Error::Reported { .. }) => {}
                    Err(error) => return Err(error),
                }
                wait_for_holder(&home)?;
                // With --rm its holder has removed it already.
                if let Ok(home) = store.find(name) {
                    home.remove();
                }
            }
        }
        println!("{name}");
    }
    Ok(())
}

/// Waits until the holder has cleaned up and exited.
fn wait_for_holder(home: &Home) -> Result<(), Error> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
    let holder = home.record.holder;
    let failed =
        |errno: rustix::io::Errno| Error::host("cannot wait for the container's holder")(errno.into());
    let Some(pid) = i32::try_from(holder.pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    // The number may have been given to another process before the descriptor was opened.
    if !holder.alive() {
        return Ok(());
    }
    let limit = Timespec {
        tv_sec: 15,
        tv_nsec: 0,
    };
    if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).map_err(failed)? == 0 {
        // It does not come to an end: its VM goes with it.
        pidfd_send_signal(&pidfd, Signal::KILL).map_err(failed)?;
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Holder;

    #[test]
    fn the_table_lines_up_and_hides_control_characters() {
        let record = Record {
            name: "a".into(),
            image: "/images/busybox.tar".into(),
            command: vec!["sh\u{1b}[2J".into()],
            created: 0,
            holder: Holder { pid: 1, started: 0 },
            pid: Some(42),
            status: Some(7),
        };
        let text = table(&[Row {
            record: &record,
            state: State::Exited,
        }]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].find("PID"), lines[1].find("42"));
        assert!(lines[1].contains("exited (7)") && lines[1].contains("busybox.tar"));
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn ages_are_short() {
        assert_eq!(
            [age(5), age(65), age(7200), age(200_000)],
            ["5s", "1m", "2h", "2d"]
        );
    }
}
