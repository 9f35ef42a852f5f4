//! Log lines on stderr, one an event: with systemd's priority prefix in the journal, else with a
//! time stamp.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use log::{Level, LevelFilter, error, warn};

use crate::{lock, rfc3339};

/// How long [`warn_seldom`] is quiet about what it has just said.
const QUIET: Duration = Duration::from_secs(1);
/// Kinds of warnings that are told apart at a time.
const MAX_KINDS: usize = 64;

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

/// Warns at most once a second for each `kind`. The next line of that kind says how many were left
/// out.
#[allow(dead_code)]
pub(crate) fn warn_seldom(kind: &str, text: impl Display) {
    static THROTTLE: Mutex<Throttle> = Mutex::new(Throttle(BTreeMap::new()));
    let left_out = lock(&THROTTLE).admit(kind, Instant::now());
    match left_out {
        None => {}
        Some(0) => warn!("{text}"),
        Some(more) => warn!("{text} ({more} more like it were left out)"),
    }
}

/// When each kind of warning was logged last, and how many were left out since.
struct Throttle(BTreeMap<String, (Instant, u64)>);

impl Throttle {
    /// `None`: not now. Otherwise, how many were left out since the last one.
    fn admit(&mut self, kind: &str, now: Instant) -> Option<u64> {
        let is_recent = |logged: Instant| now.saturating_duration_since(logged) < QUIET;
        if let Some((logged, left_out)) = self.0.get_mut(kind) {
            if is_recent(*logged) {
                *left_out += 1;
                return None;
            }
            *logged = now;
            return Some(std::mem::take(left_out));
        }
        if self.0.len() >= MAX_KINDS {
            self.0.retain(|_, (logged, _)| is_recent(*logged));
        }
        (self.0.len() < MAX_KINDS).then(|| {
            self.0.insert(kind.to_owned(), (now, 0));
            0
        })
    }
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
    fn the_same_warning_comes_once_a_second() {
        let (mut throttle, now) = (Throttle(BTreeMap::new()), Instant::now());
        let later = now + QUIET;
        let admitted = [now, now, now, later, later].map(|at| throttle.admit("a", at));
        assert_eq!(admitted, [Some(0), None, None, Some(2), None]);
        assert_eq!(throttle.admit("b", now), Some(0));
        for number in 0..10 * MAX_KINDS {
            throttle.admit(&number.to_string(), later);
        }
        assert_eq!(throttle.0.len(), MAX_KINDS);
        assert_eq!(throttle.admit("new", later), None);
        assert_eq!(throttle.admit("new", later + QUIET), Some(0));
    }

    #[test]
    fn priorities_are_those_of_syslog() {
        assert_eq!(
            [Level::Error, Level::Warn, Level::Info, Level::Debug, Level::Trace].map(priority),
            [3, 4, 6, 7, 7]
        );
    }
}
