//! Log lines for containerd: logrus's text format, into the fifo `log` of the bundle, which containerd copies to its
//! own log. Nobody may be reading: a line that cannot be written at once is dropped.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The most that one line may hold: a fifo takes up to 4096 bytes at once or not at all.
const LINE_LIMIT: usize = 4096;

/// Starts logging into the fifo `log` of the bundle. Called once, early in `serve`.
pub fn start(debug: bool, id: &str, bundle: &Path) {
    let path = bundle.join("log");
    let log = Log {
        level: if debug { Level::DEBUG } else { Level::INFO },
        id: id.to_owned(),
        fifo: Fifo { path, file: None }.into(),
    };
    if let Ok(mut fifo) = log.fifo.lock() {
        // containerd's open of the other end waits for this one.
        fifo.open();
    }
    // A second subscriber cannot be, and without one nothing is logged.
    let _ = tracing::subscriber::set_global_default(log);
}

struct Log {
    level: Level,
    id: String,
    fifo: Mutex<Fifo>,
}

struct Fifo {
    path: PathBuf,
    file: Option<File>,
}

impl Fifo {
    fn open(&mut self) -> Option<&mut File> {
        if self.file.is_none() {
            // Fails when nobody has the fifo open for reading; the next line tries again.
            self.file = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(&self.path)
                .ok();
        }
        self.file.as_mut()
    }

    fn write(&mut self, line: &[u8]) {
        // After EPIPE the descriptor stays good: containerd opens the fifo again when it comes back.
        if let Some(file) = self.open() {
            let _ = file.write(line);
        }
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(self.level.into())
    }

    fn event(&self, event: &Event<'_>) {
        let line = format_line(SystemTime::now(), *event.metadata().level(), &self.id, |line| {
            let mut fields = Fields::default();
            event.record(&mut fields);
            fields.finish(line);
        });
        self.fifo
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(line.as_bytes());
    }

    // Spans are not shown.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

fn format_line(time: SystemTime, level: Level, id: &str, body: impl FnOnce(&mut String)) -> String {
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    let mut line = format!("time=\"{}\" level={level}", rfc3339(time));
    body(&mut line);
    let _ = write!(line, " id={} runtime={}", quoted(id), crate::RUNTIME_NAME);
    if line.len() >= LINE_LIMIT {
        let mut end = LINE_LIMIT - 1;
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
    }
    line.push('\n');
    line
}

/// UTC with milliseconds, by the civil calendar: days are counted from 0000-03-01, so that a leap day ends its year.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400 + 719_468, since.as_secs() % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!(
        "{:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        era * 400 + year_of_era + carry,
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    )
}

/// Collects an event's message and the rest of its fields.
#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Fields {
    fn finish(self, line: &mut String) {
        let _ = write!(line, " msg={}{}", quoted(&self.message), self.rest);
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            let _ = write!(self.rest, " {}={}", field.name(), quoted(value));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// A value as logrus writes it: bare when it needs no quotes.
fn quoted(value: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || "-._/@^+".contains(c);
    if !value.is_empty() && value.chars().all(bare) {
        value.to_owned()
    } else {
        format!("{value:?}")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_reads_as_logrus_writes_it() {
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_800_000_000, 5_000_000);
        let line = format_line(time, Level::WARN, "c1", |line| {
            Fields {
                message: "it \"broke\"\n".into(),
                rest: format!(" path={}", quoted("/a/b")),
            }
            .finish(line);
        });
        assert_eq!(
            line,
            "time=\"2027-01-15T08:00:00.005Z\" level=warning msg=\"it \\\"broke\\\"\\n\" path=/a/b id=c1 runtime=io.containerd.kata-rs.v2\n"
        );
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59.000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_709_251_200), "2024-03-01T00:00:00.000Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.000Z");
    }

    #[test]
    fn a_long_line_is_cut_and_stays_one_line() {
        let line = format_line(SystemTime::UNIX_EPOCH, Level::INFO, "c1", |line| {
            line.push_str(&"ä".repeat(5000));
        });
        assert!(line.len() <= LINE_LIMIT);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.ends_with('\n'));
    }

    #[test]
    fn lines_reach_a_reader_that_comes_late_and_absence_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from(0o600),
            0,
        )
        .unwrap();
        let mut fifo = Fifo {
            path: path.clone(),
            file: None,
        };
        fifo.write(b"lost\n");
        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        fifo.write(b"seen\n");
        let mut text = [0; 16];
        let length = reader.read(&mut text).unwrap();
        assert_eq!(&text[..length], b"seen\n");
        drop(reader);
        fifo.write(b"lost too\n");
    }
}
