//! `exec`: a process in a container that another process holds.

use std::os::fd::AsFd;

use sandbox::StdioTarget;
use tokio::signal::unix::{SignalKind, signal};

use crate::arguments::ExecOptions;
use crate::control::{Connection, Reply, Request};
use crate::error::Error;
use crate::relay::{self, Relay};
use crate::store::{State, Store};
use crate::{block_on, signals};

/// Runs the process and returns its exit status.
pub fn exec(store: &Store, options: &ExecOptions) -> Result<u8, Error> {
    let home = store.find(&options.name)?;
    if home.record.state() != State::Running {
        return Err(Error::NotRunning(options.name.clone()));
    }
    let (relay, stdio) = Relay::start(options.interactive, options.tty)?;
    let request = Request::Exec {
        command: options.command.clone(),
        environment: options
            .environment
            .iter()
            .filter_map(|setting| value_of(setting))
            .collect(),
        user: options.user.clone(),
        workdir: options.workdir.clone(),
        interactive: options.interactive,
        terminal: options.tty,
    };
    let result = block_on(async {
        let connection =
            Connection::connect(&home.socket()).map_err(|_| Error::NotRunning(options.name.clone()))?;
        let targets = [stdio.stdin, stdio.stdout, stdio.stderr];
        let fds: Vec<_> = targets
            .iter()
            .filter_map(|target| match target {
                StdioTarget::Fd(fd) => Some(fd.as_fd()),
                StdioTarget::Null | StdioTarget::Uri(_) => None,
            })
            .collect();
        connection
            .send(&request, &fds)
            .await
            .map_err(Error::host("cannot reach the container's holder"))?;
        // The holder has its own copies: output ends when it closes them.
        drop(fds);
        drop(targets);
        if options.tty {
            resize(&connection).await;
        }
        converse(&connection, options.tty).await
    });
    relay.finish();
    result
}

fn value_of(setting: &str) -> Option<String> {
    if setting.contains('=') {
        return Some(setting.to_owned());
    }
    std::env::var(setting)
        .ok()
        .map(|value| format!("{setting}={value}"))
}

async fn resize(connection: &Connection) {
    if let Some((rows, columns)) = relay::window_size() {
        // A holder that is gone is noticed by the next receive.
        let _ = connection.send(&Request::Resize(rows, columns), &[]).await;
    }
}

async fn converse(connection: &Connection, terminal: bool) -> Result<u8, Error> {
    let forward = async |number: i32| {
        let Ok(mut signals) = signal(SignalKind::from_raw(number)) else {
            return;
        };
        while signals.recv().await.is_some() {
            let _ = connection
                .send(&Request::Signal(number.unsigned_abs()), &[])
                .await;
        }
    };
    let window = async {
        let Ok(mut signals) = signal(SignalKind::window_change()) else {
            return;
        };
        while terminal && signals.recv().await.is_some() {
            resize(connection).await;
        }
    };
    let forwarding =
        futures::future::join(futures::future::join_all(signals::FORWARDED.map(forward)), window);
    let listening = async {
        loop {
            let message = connection
                .receive::<Reply>()
                .await
                .map_err(Error::host("cannot hear from the container's holder"))?;
            match message {
                Some((Reply::Exited(status), _)) => return Ok(status),
                Some((Reply::Failed { message, status }, _)) => {
                    return Err(Error::Reported { message, status });
                }
                Some((Reply::Started | Reply::Done, _)) => {}
                None => {
                    let message = "the container ended while the process ran".to_owned();
                    return Err(Error::Reported { message, status: 137 });
                }
            }
        }
    };
    let forwarding = async {
        forwarding.await;
        std::future::pending::<Result<u8, Error>>().await
    };
    tokio::select! {
        result = listening => result,
        never = forwarding => never,
    }
}
