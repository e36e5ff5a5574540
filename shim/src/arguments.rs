//! The command line, in the dialect of Go's `flag` package that containerd and CRI-O speak: one or two dashes,
//! `-name value` or `-name=value`, booleans without a value, the action last.

use std::ffi::OsString;
use std::path::PathBuf;

/// Why the command line was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgumentsError {
    /// A word that is not UTF-8.
    #[error("argument {0:?} is not UTF-8")]
    NotUtf8(OsString),
    /// A flag this program does not have.
    #[error(
        "unknown flag -{0}; known flags: -namespace -address -publish-binary -id -bundle -debug -info -v -version"
    )]
    UnknownFlag(String),
    /// A flag at the end that needs a value.
    #[error("flag -{0} needs a value")]
    MissingValue(String),
    /// A boolean flag with a value that is no boolean.
    #[error("flag -{flag}: {value:?} is not a boolean")]
    NotBoolean {
        /// The flag.
        flag: String,
        /// Its value.
        value: String,
    },
    /// No action, or one that does not exist.
    #[error(
        "unknown action {0:?}; this program is run by containerd or CRI-O with the action start or delete, or with -info or -version"
    )]
    UnknownAction(String),
    /// A flag the action cannot do without.
    #[error("the flag -{0} must not be empty")]
    Required(&'static str),
    /// An id that would leave the directory it names.
    #[error("the id {0:?} is not valid: it must not contain '/' or a control character, nor be '.' or '..'")]
    Id(String),
}

/// What to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Make or find the shim for a container and print its address.
    Start,
    /// Clean up after a shim that is gone.
    Delete,
    /// Be the shim. Only `start` asks for it.
    Serve,
    /// Print what this runtime can do.
    Info,
    /// Print the version.
    #[default]
    Version,
}

/// The parsed command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's gRPC socket; empty under CRI-O.
    pub address: String,
    /// The container.
    pub id: String,
    /// The bundle directory; `None` for the working directory.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
}

impl Arguments {
    /// Reads the words after the program's name.
    pub fn parse(words: impl Iterator<Item = OsString>) -> Result<Self, ArgumentsError> {
        let mut words = words.map(|word| word.into_string().map_err(ArgumentsError::NotUtf8));
        let mut parsed = Self::default();
        let (mut info, mut version) = (false, false);
        let mut action = String::new();
        while let Some(word) = words.next() {
            let word = word?;
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                action = word;
                break;
            };
            let (flag, inline) = match flag.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_owned())),
                None => (flag, None),
            };
            match flag {
                "debug" => parsed.debug = boolean(flag, inline.as_deref())?,
                "info" => info = boolean(flag, inline.as_deref())?,
                "v" | "version" => version = boolean(flag, inline.as_deref())?,
                "namespace" | "address" | "publish-binary" | "id" | "bundle" | "socket" | "debug-socket" => {
                    let value = match inline {
                        Some(value) => value,
                        None => words
                            .next()
                            .ok_or_else(|| ArgumentsError::MissingValue(flag.to_owned()))??,
                    };
                    match flag {
                        "namespace" => parsed.namespace = value,
                        "address" => parsed.address = value,
                        "id" => parsed.id = value,
                        "bundle" => {
                            parsed.bundle = Some(PathBuf::from(value)).filter(|p| !p.as_os_str().is_empty());
                        }
                        // Events go over the ttrpc connection, sockets are named by `start`: accepted, not used.
                        _ => {}
                    }
                }
                _ => return Err(ArgumentsError::UnknownFlag(flag.to_owned())),
            }
        }
        parsed.action = match action.as_str() {
            _ if version => Action::Version,
            _ if info => Action::Info,
            "start" => Action::Start,
            "delete" => Action::Delete,
            "serve" => Action::Serve,
            _ => return Err(ArgumentsError::UnknownAction(action)),
        };
        if matches!(parsed.action, Action::Start | Action::Delete | Action::Serve) {
            parsed.check()?;
        }
        Ok(parsed)
    }

    fn check(&self) -> Result<(), ArgumentsError> {
        if self.namespace.is_empty() {
            return Err(ArgumentsError::Required("namespace"));
        }
        if self.id.is_empty() {
            return Err(ArgumentsError::Required("id"));
        }
        if self.id.contains(|c: char| c == '/' || c.is_control()) || matches!(self.id.as_str(), "." | "..") {
            return Err(ArgumentsError::Id(self.id.clone()));
        }
        Ok(())
    }
}

/// The values that Go's `strconv.ParseBool` takes.
fn boolean(flag: &str, value: Option<&str>) -> Result<bool, ArgumentsError> {
    match value {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(ArgumentsError::NotBoolean {
            flag: flag.to_owned(),
            value: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, ArgumentsError> {
        Arguments::parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn containerds_start_line() {
        let parsed = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        assert_eq!(
            parsed,
            Arguments {
                action: Action::Start,
                namespace: "k8s.io".into(),
                address: "/run/c.sock".into(),
                id: "c1".into(),
                bundle: None,
                debug: true,
            }
        );
    }

    #[test]
    fn crios_empty_address_and_the_delete_line() {
        let words = [
            "--namespace=default",
            "-address",
            "",
            "-id",
            "c1",
            "-bundle",
            "/b",
            "delete",
        ];
        let parsed = Arguments::parse(words.iter().map(OsString::from)).unwrap();
        assert_eq!(parsed.action, Action::Delete);
        assert_eq!(parsed.address, "");
        assert_eq!(parsed.bundle, Some(PathBuf::from("/b")));
    }

    #[test]
    fn info_and_version_need_nothing_else() {
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("--version=true").unwrap().action, Action::Version);
    }

    #[test]
    fn bad_lines_name_their_fault() {
        assert_eq!(
            parse("-frob start"),
            Err(ArgumentsError::UnknownFlag("frob".into()))
        );
        assert_eq!(
            parse("-namespace n -id"),
            Err(ArgumentsError::MissingValue("id".into()))
        );
        assert_eq!(
            parse("-namespace n -id i stop"),
            Err(ArgumentsError::UnknownAction("stop".into()))
        );
        assert_eq!(parse("-id i start"), Err(ArgumentsError::Required("namespace")));
        assert_eq!(parse("-namespace n start"), Err(ArgumentsError::Required("id")));
        assert_eq!(
            parse("-namespace n -id ../x start"),
            Err(ArgumentsError::Id("../x".into()))
        );
        assert!(matches!(
            parse("-debug=perhaps start"),
            Err(ArgumentsError::NotBoolean { .. })
        ));
    }
}
