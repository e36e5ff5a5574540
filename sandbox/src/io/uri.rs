//! The addresses by which containerd names standard I/O (containerd, `docs/runtime-v2.md`, "I/O").

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::error::IoError;

/// What an address names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// A fifo; also a file or device, when there is one at a plain path.
    Path(PathBuf),
    /// A file to append to.
    File(PathBuf),
    /// A program that takes the output.
    Program {
        /// The program.
        path: PathBuf,
        /// Its arguments: the query's keys and values in order.
        args: Vec<Vec<u8>>,
        /// Whether it says that it is ready with a byte; otherwise closing the pipe says so too.
        ready_byte: bool,
    },
}

impl Address {
    pub(super) fn parse(text: &str) -> Result<Self, IoError> {
        let refuse = || IoError::Target(text.to_owned());
        let Some((scheme, rest)) = text.split_once("://") else {
            let path = PathBuf::from(text);
            return if path.is_absolute() {
                Ok(Self::Path(path))
            } else {
                Err(refuse())
            };
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = decode(path, false).ok_or_else(refuse)?;
        let path = PathBuf::from(std::ffi::OsString::from_vec(path));
        if !path.is_absolute() {
            return Err(refuse());
        }
        match scheme {
            "fifo" => Ok(Self::Path(path)),
            "file" => Ok(Self::File(path)),
            "binary" | "binary-v2" => Ok(Self::Program {
                path,
                args: arguments(query).ok_or_else(refuse)?,
                ready_byte: scheme == "binary-v2",
            }),
            _ => Err(refuse()),
        }
    }
}

/// `a=b&c` as `a`, `b`, `c`, an empty value left out.
fn arguments(query: &str) -> Option<Vec<Vec<u8>>> {
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        args.push(decode(key, true)?);
        if !value.is_empty() {
            args.push(decode(value, true)?);
        }
    }
    let valid = args.iter().all(|arg| !arg.contains(&0));
    valid.then_some(args)
}

/// Percent-encoding, RFC 3986 section 2.1; in a query `+` is a space too.
fn decode(text: &str, query: bool) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            b'+' if query => b' ',
            other => other,
        });
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(text: &str) -> (PathBuf, Vec<String>, bool) {
        match Address::parse(text).unwrap() {
            Address::Program {
                path,
                args,
                ready_byte,
            } => {
                let args = args.into_iter().map(|arg| String::from_utf8(arg).unwrap());
                (path, args.collect(), ready_byte)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn plain_paths_and_known_schemes_are_read() {
        let path = || PathBuf::from("/run/x/stdout");
        assert_eq!(Address::parse("/run/x/stdout").unwrap(), Address::Path(path()));
        assert_eq!(
            Address::parse("fifo:///run/x/stdout").unwrap(),
            Address::Path(path())
        );
        assert_eq!(
            Address::parse("file:///a%20b").unwrap(),
            Address::File("/a b".into())
        );
    }

    #[test]
    fn a_programs_query_becomes_its_arguments_in_order() {
        let (path, args, ready_byte) =
            program("binary:///bin/logger?_NERDCTL=%2Fvar%2Flib&flag&empty=&a+b=c%3Dd");
        assert_eq!(path, PathBuf::from("/bin/logger"));
        assert_eq!(args, ["_NERDCTL", "/var/lib", "flag", "empty", "a b", "c=d"]);
        assert!(!ready_byte);
        assert!(program("binary-v2:///bin/logger").2);
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for text in [
            "stdout",
            "relative/path",
            "",
            "http://host/x",
            "file://relative",
            "binary:///x?a=%zz",
            "file:///x%4",
            "binary:///x?a=%00",
            "ttrpc+unix:///run/x",
        ] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
