//! `kata-rs`: containers in microVMs by hand, without containerd.
//!
//! This door reads its arguments and translates; containers are made by the `sandbox` crate. Exit status: the
//! container's own for `run` and `exec`; 125 when kata-rs itself failed, 126 when the command cannot be executed, 127
//! when it does not exist (as docker-run(1)).

mod arguments;
mod check;
mod control;
mod error;
mod exec;
mod image;
mod inspect;
mod passwd;
mod relay;
mod run;
mod signals;
mod spec;
mod store;
mod supervise;
mod timeline;

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::{Arguments, Command};
use crate::error::Error;
use crate::store::Store;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let store = Store::new(&arguments.root);
    let result = match arguments.command {
        Command::Run(options) => run::run(&store, options),
        Command::Exec(options) => exec::exec(&store, &options),
        Command::Ps { all, json } => inspect::ps(&store, all, json).map(|()| 0),
        Command::Logs { name, follow } => inspect::logs(&store, &name, follow).map(|()| 0),
        Command::Update(options) => inspect::update(&store, &options).map(|()| 0),
        Command::Kill { name, signal } => inspect::kill(&store, &name, &signal).map(|()| 0),
        Command::Rm { force, names } => inspect::rm(&store, &names, force).map(|()| 0),
        Command::Check { json } => check::check(json),
        Command::Supervise => supervise::detached(&store),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("kata-rs: {}", error.chain());
            ExitCode::from(error.exit_status())
        }
    }
}

/// Runs a future on a runtime of one thread.
fn block_on<T>(future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Host {
            what: "cannot start the event loop",
            source,
        })?
        .block_on(future)
}
