//! Log lines on stderr, one an event: with systemd's priority prefix in the journal, else with a
//! time stamp.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::SystemTime;

use log::{Level, LevelFilter, error};

use crate::rfc3339;

/// Starts logging at the level of `RUST_LOG` (default: info).
///
/// A panic is logged as one line, too: it ends one request, not the daemon.
pub fn start() {
    let journal = stderr_is_the_journal();
    env_logger::Builder::new()
        .filter_level(LevelFilter::Info)
        .parse_default_env()
        .format(move |out, record| {
            let text = one_line(&record.args().to_string());
            if journal {
                writeln!(out, "<{}>{text}", priority(record.level()))
            } else {
                let now = rfc3339::format(SystemTime::now());
                writeln!(out, "{now} {:<5} {text}", record.level())
            }
        })
        .init();
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("without a name");
        error!("internal error in thread {name}: {panic}");
    }));
}

/// Whether stderr is the stream that `JOURNAL_STREAM` names by device and inode (systemd.exec(5)).
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    nix::sys::stat::fstat(io::stderr().as_fd())
        .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// The syslog priority that journald reads from the prefix `<N>` (sd-daemon(3)).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// Text from outside cannot start a log line of its own or steer a terminal.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_event_is_one_line() {
        assert_eq!(one_line("peer wg0 é ☃"), "peer wg0 é ☃");
        assert_eq!(one_line("a\nb\r\tc\u{1b}[31m\0\u{85}"), "a\\nb\\r\\tc\\u{1b}[31m\\u{0}\\u{85}");
    }

    #[test]
    fn priorities_are_those_of_syslog() {
        assert_eq!(
            [Level::Error, Level::Warn, Level::Info, Level::Debug, Level::Trace].map(priority),
            [3, 4, 6, 7, 7]
        );
    }
}
