//! The command line: what can be said, and how it is written. No behaviour.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Run containers, each in a KVM microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "kata-rs", version, about)]
pub struct Arguments {
    /// Where images and containers are kept.
    #[arg(long, default_value = "/var/lib/kata-rs", value_name = "DIRECTORY")]
    pub root: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new container.
    Run(RunOptions),
    /// Run a command in a running container.
    Exec(ExecOptions),
    /// List containers.
    Ps {
        /// Exited ones too.
        #[arg(short, long)]
        all: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print what a detached container has written.
    Logs {
        /// The container.
        name: String,
        /// Go on until the container exits.
        #[arg(short, long)]
        follow: bool,
    },
    /// Change what a running container may use; its VM grows and shrinks with it.
    Update(UpdateOptions),
    /// Send a signal to a container's first process.
    Kill {
        /// The container.
        name: String,
        /// Name or number.
        #[arg(default_value = "TERM")]
        signal: String,
    },
    /// Remove containers.
    Rm {
        /// Kill those that run.
        #[arg(short, long)]
        force: bool,
        /// The containers.
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Find out whether this host can run microVMs, and what to do if not.
    Check {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Holds a detached container; started by `run --detach`.
    #[command(hide = true)]
    Supervise,
}

#[derive(Debug, Args)]
pub struct RunOptions {
    /// Keep standard input open and pass it on.
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the container a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Remove the container when it has exited.
    #[arg(long)]
    pub rm: bool,
    /// Return when the container runs, and print its name.
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub detach: bool,
    /// Name of the container; made up when absent.
    #[arg(long)]
    pub name: Option<String>,
    /// CPUs the container may use; the VM gets as many, rounded up.
    #[arg(long, value_parser = parse_cpus)]
    pub cpus: Option<f64>,
    /// Memory the container may use, with a suffix k, m or g.
    #[arg(short, long, value_parser = parse_size)]
    pub memory: Option<u64>,
    /// Show a host directory or file in the container.
    #[arg(short, long = "volume", value_name = "HOST:CONTAINER[:ro]", value_parser = parse_volume)]
    pub volumes: Vec<Volume>,
    /// Set an environment variable; without a value, pass the caller's on.
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub environment: Vec<String>,
    /// User, and group, by name or number.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Working directory in the container.
    #[arg(short, long)]
    pub workdir: Option<String>,
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print when each stage of the start was reached, on standard error at the end.
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub timeline: Option<TimelineFormat>,
    /// An OCI image layout, an OCI or docker archive (tar), or a directory that is a root file system.
    pub image: PathBuf,
    /// Command instead of the image's own.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ExecOptions {
    /// Keep standard input open and pass it on.
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the process a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Set an environment variable; without a value, pass the caller's on.
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub environment: Vec<String>,
    /// User, and group, by name or number.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Working directory in the container.
    #[arg(short, long)]
    pub workdir: Option<String>,
    /// The container.
    pub name: String,
    /// The command.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct UpdateOptions {
    /// CPUs the container may use.
    #[arg(long, value_parser = parse_cpus, required_unless_present = "memory")]
    pub cpus: Option<f64>,
    /// Memory the container may use, with a suffix k, m or g.
    #[arg(short, long, value_parser = parse_size)]
    pub memory: Option<u64>,
    /// The container.
    pub name: String,
}

/// How a timeline is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
pub enum TimelineFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// A host path shown in a container.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Volume {
    /// On the host, absolute.
    pub source: String,
    /// In the container, absolute.
    pub target: String,
    /// Whether the container may only read.
    pub read_only: bool,
}

fn parse_cpus(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(cpus) if cpus.is_finite() && (0.01..=1024.0).contains(&cpus) => Ok(cpus),
        _ => Err("give a number of CPUs such as 2 or 0.5".to_owned()),
    }
}

/// Reads `64m`, `1g`, `1048576`: bytes with a binary suffix.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        other => return Err(format!("\"{other}\" is not a unit: use k, m or g")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("\"{digits}\" is not a whole number"))?;
    match number.checked_mul(1 << shift) {
        Some(bytes) if bytes >= 4 << 20 => Ok(bytes),
        Some(_) => Err("a container needs at least 4m".to_owned()),
        None => Err("that is more than there can be".to_owned()),
    }
}

fn parse_volume(text: &str) -> Result<Volume, String> {
    let mut parts = text.split(':');
    let (Some(source), Some(target), mode, None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("write HOST:CONTAINER or HOST:CONTAINER:ro".to_owned());
    };
    let read_only = match mode {
        None | Some("rw") => false,
        Some("ro") => true,
        Some(other) => return Err(format!("\"{other}\" is neither ro nor rw")),
    };
    if !target.starts_with('/') {
        return Err(format!(
            "the path in the container must be absolute, not \"{target}\""
        ));
    }
    let source = std::path::absolute(source).map_err(|error| format!("{source}: {error}"))?;
    let source = source.to_str().ok_or("the host path is not UTF-8")?.to_owned();
    Ok(Volume {
        source,
        target: target.to_owned(),
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn options_end_at_the_image_and_the_command_keeps_its_own() {
        let arguments =
            Arguments::try_parse_from(["kata-rs", "run", "--rm", "-it", "image", "ls", "-l", "--all"])
                .unwrap();
        let Command::Run(options) = arguments.command else {
            panic!("not run")
        };
        assert!(options.rm && options.interactive && options.tty);
        assert_eq!(options.command, ["ls", "-l", "--all"]);
    }

    #[test]
    fn an_update_changes_something() {
        let parse = |words: &[&str]| Arguments::try_parse_from([&["kata-rs", "update"], words].concat());
        assert!(parse(&["web"]).is_err());
        let Ok(Command::Update(options)) = parse(&["-m", "64m", "web"]).map(|arguments| arguments.command)
        else {
            panic!("not understood")
        };
        assert_eq!((options.cpus, options.memory), (None, Some(64 << 20)));
        assert!(parse(&["--cpus", "2", "--memory", "1g", "web"]).is_ok());
    }

    #[test]
    fn sizes_have_binary_suffixes_and_a_floor() {
        assert_eq!(parse_size("64m"), Ok(64 << 20));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size("8388608"), Ok(8 << 20));
        assert!(parse_size("1k").is_err() && parse_size("12q").is_err() && parse_size("").is_err());
        assert!(parse_size("99999999999g").is_err());
    }

    #[test]
    fn volumes_name_what_is_wrong_with_them() {
        assert_eq!(
            parse_volume("/a:/b:ro"),
            Ok(Volume {
                source: "/a".into(),
                target: "/b".into(),
                read_only: true
            })
        );
        assert!(parse_volume("/a").unwrap_err().contains("HOST:CONTAINER"));
        assert!(parse_volume("/a:b").unwrap_err().contains("absolute"));
        assert!(parse_volume("/a:/b:rx").unwrap_err().contains("rx"));
    }
}
