//! `kata-rs-image`: builds the guest image from the agent binary, and says what is in one.
//!
//! Here lives the command line only. `build` knows what an image holds, `image` the formats it can have (`cpio`,
//! `erofs`), `manifest` how it describes itself.

mod build;
mod cpio;
mod elf;
mod erofs;
mod image;
mod inspect;
mod manifest;
mod output;
mod tree;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use build::{Addition, BuildError};
use image::{Format, ImageError};
use output::OutputError;

#[derive(Parser)]
#[command(
    name = "kata-rs-image",
    version,
    about = "Builds and inspects the guest image of kata-rs"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make the guest image from the agent binary: no root, no network, same inputs give the same bytes.
    Build {
        /// The statically linked agent, which becomes /init.
        #[arg(long, value_name = "FILE")]
        agent: PathBuf,
        /// Where the image goes; replaced in one step.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// How the image is laid out.
        #[arg(long, value_enum, default_value_t = Format::Initramfs)]
        format: Format,
        /// Also put a file into the image (mode 0755 if it is executable, else 0644). May be repeated.
        #[arg(long, value_name = "HOSTPATH:GUESTPATH[:MODE]")]
        add: Vec<Addition>,
    },
    /// List what is in an image and check it against its manifest.
    Inspect {
        /// The image.
        file: PathBuf,
        /// Machine-readable output.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("cannot make the image: {0}")]
    Encode(ImageError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {source}", path.display())]
    Image { path: PathBuf, source: ImageError },
    #[error("cannot print: {0}")]
    Print(io::Error),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Build {
            agent,
            output,
            format,
            add,
        } => build(&agent, &output, format, &add),
        Command::Inspect { file, json } => inspect(&file, json),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kata-rs-image: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build(agent: &Path, output: &Path, format: Format, additions: &[Addition]) -> Result<(), Error> {
    let tree = build::assemble(agent, additions)?;
    let bytes = image::encode(&tree, format).map_err(Error::Encode)?;
    output::write(output, &bytes)?;
    eprintln!(
        "kata-rs-image: {} is {format}, {} bytes, sha256 {}",
        output.display(),
        bytes.len(),
        manifest::sha256_hex(&bytes)
    );
    Ok(())
}

fn inspect(path: &Path, json: bool) -> Result<(), Error> {
    let bytes = fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    let report = inspect::Report::of(&bytes).map_err(|source| Error::Image {
        path: path.to_owned(),
        source,
    })?;
    let text = if json {
        // Plain structs of strings and numbers always have a JSON form.
        serde_json::to_string_pretty(&report).expect("a report is plain data") + "\n"
    } else {
        report.to_text()
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        // The reader has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::Print),
    }
}
