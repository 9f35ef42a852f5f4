//! Log lines on stderr, one an event: with systemd's priority prefix in the journal, else with a
//! time stamp.
//!
//! A thread of its own writes them, so that nobody waits for whoever reads them.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Condvar, LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use log::{Level, LevelFilter, Metadata, error, warn};

use crate::{lock, rfc3339};

/// The target of lines that say who changed what.
pub(crate) const AUDIT: &str = "vpn_daemon::audit";

/// How long a line of [`AUDIT`], and with it the answer to its request, waits for room in the queue;
/// then it is left out like any other. The end of the process waits as long for the last lines.
const PATIENCE: Duration = Duration::from_millis(300);
/// Bytes of lines that wait to be written.
const MAX_WAITING: usize = 256 * 1024;
/// How long [`warn_seldom`] is quiet about what it has just said.
const QUIET: Duration = Duration::from_secs(1);
/// Most kinds of warnings that are remembered; of further kinds nothing is logged meanwhile.
const MAX_KINDS: usize = 64;

/// Starts logging at the level of `RUST_LOG` (default: info).
///
/// A panic is logged as one line, too: it ends one request, not the daemon.
///
/// # Errors
/// There is no thread to write with.
pub(crate) fn start() -> io::Result<()> {
    let journal = stderr_is_the_journal();
    let writer = thread::Builder::new().name("log".to_owned()).stack_size(64 * 1024);
    writer.spawn(move || QUEUE.write_to(io::stderr(), journal))?;
    // env_logger picks the lines; they go to the queue and not to its own target.
    env_logger::Builder::new()
        .filter_level(LevelFilter::Info)
        .parse_default_env()
        .target(env_logger::Target::Pipe(Box::new(io::sink())))
        .format(move |_, record| {
            let patience = if record.target() == AUDIT { PATIENCE } else { Duration::ZERO };
            QUEUE.push(&line(journal, record.metadata(), &record.args().to_string()), patience);
            Ok(())
        })
        .init();
    std::panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        let name = thread.name().unwrap_or("without a name");
        error!("internal error in thread {name}: {panic}");
    }));
    Ok(())
}

/// Waits a moment until everything is written, and these last words as they are.
pub(crate) fn finish(last_words: &str) {
    QUEUE.push(last_words, Duration::ZERO);
    let lines = lock(&QUEUE.lines);
    drop(QUEUE.changed.wait_timeout_while(lines, PATIENCE, |lines| lines.unwritten));
}

static QUEUE: LazyLock<Queue> = LazyLock::new(Queue::default);

/// Lines that wait to be written.
#[derive(Default)]
struct Queue {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Default)]
struct Lines {
    text: String,
    /// Lines that there was no room for.
    left_out: u64,
    /// Whether there are lines, waiting or being written.
    unwritten: bool,
}

impl Queue {
    fn push(&self, line: &str, patience: Duration) {
        let is_full = |lines: &mut Lines| lines.text.len() + line.len() > MAX_WAITING;
        let lines = self.changed.wait_timeout_while(lock(&self.lines), patience, is_full);
        let (mut lines, _) = lines.unwrap_or_else(PoisonError::into_inner);
        match is_full(&mut lines) {
            true => lines.left_out += 1,
            false => lines.text.push_str(line),
        }
        lines.unwritten = true;
        self.changed.notify_all();
    }

    fn write_to(&self, mut out: impl Write, journal: bool) {
        loop {
            let mut lines = lock(&self.lines);
            lines.unwritten = !lines.text.is_empty() || lines.left_out > 0;
            self.changed.notify_all();
            let lines = self.changed.wait_while(lines, |lines| !lines.unwritten);
            let mut lines = lines.unwrap_or_else(PoisonError::into_inner);
            let Lines { mut text, left_out, .. } = std::mem::take(&mut *lines);
            lines.unwritten = true;
            drop(lines);
            self.changed.notify_all();
            if left_out > 0 {
                let sentence = format!("{left_out} log lines were left out: nobody took them");
                let warning = Metadata::builder().level(Level::Warn).build();
                text.push_str(&line(journal, &warning, &sentence));
            }
            // Nobody is left to tell when stderr is closed.
            let _ = out.write_all(text.as_bytes());
        }
    }
}

/// Warns at most once a second for each `kind`. The next line of that kind says how many were left
/// out.
pub(crate) fn warn_seldom(kind: &str, text: impl Display) {
    static LOGGED: Mutex<Logged> = Mutex::new(Logged::new());
    match admit(&mut lock(&LOGGED), kind, Instant::now()) {
        None => {}
        Some(0) => warn!("{text}"),
        Some(more) => warn!("{text} ({more} more like it were left out)"),
    }
}

/// When each kind of warning was logged last, and how many were left out since.
type Logged = BTreeMap<String, (Instant, u64)>;

/// `None`: not now. Otherwise, how many were left out since the last one.
fn admit(kinds: &mut Logged, kind: &str, now: Instant) -> Option<u64> {
    let is_recent = |logged: &Instant| now.saturating_duration_since(*logged) < QUIET;
    match kinds.get_mut(kind) {
        Some((logged, left_out)) if is_recent(logged) => {
            *left_out += 1;
            None
        }
        Some(known) => Some(std::mem::replace(known, (now, 0)).1),
        None => {
            if kinds.len() >= MAX_KINDS {
                kinds.retain(|_, (logged, _)| is_recent(logged));
            }
            (kinds.len() < MAX_KINDS).then(|| kinds.insert(kind.to_owned(), (now, 0)))?;
            Some(0)
        }
    }
}

/// Whether stderr is the stream that `JOURNAL_STREAM` names by device and inode (systemd.exec(5)).
fn stderr_is_the_journal() -> bool {
    let stat = nix::sys::stat::fstat(io::stderr().as_fd());
    let stderr = stat.map(|stat| format!("{}:{}", stat.st_dev, stat.st_ino));
    std::env::var("JOURNAL_STREAM").is_ok_and(|stream| stderr == Ok(stream))
}

fn line(journal: bool, of: &Metadata, text: &str) -> String {
    let text = one_line(text);
    match journal {
        true => format!("<{}>{text}\n", priority(of)),
        false => format!("{} {:<5} {text}\n", rfc3339::format(SystemTime::now()), of.level()),
    }
}

/// The syslog priority that journald reads from the prefix `<N>` (sd-daemon(3)).
fn priority(of: &Metadata) -> u8 {
    match of.level() {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info if of.target() == AUDIT => 5,
        Level::Info => 6,
        _ => 7,
    }
}

/// Text from outside cannot start a log line of its own or steer a terminal.
pub(crate) fn one_line(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn one_event_is_one_line() {
        assert_eq!(one_line("peer wg0 é ☃"), "peer wg0 é ☃");
        assert_eq!(one_line("a\nb\r\tc\u{1b}[31m\0\u{85}"), "a\\nb\\r\\tc\\u{1b}[31m\\u{0}\\u{85}");
    }

    #[test]
    fn what_nobody_takes_is_left_out_and_counted() {
        struct Reader(mpsc::Receiver<()>, mpsc::Sender<String>);
        impl Write for Reader {
            fn write(&mut self, text: &[u8]) -> io::Result<usize> {
                self.0.recv().map_err(io::Error::other)?;
                self.1
                    .send(String::from_utf8_lossy(text).into_owned())
                    .map_err(io::Error::other)?;
                Ok(text.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (take, taken) = (mpsc::channel(), mpsc::channel());
        let reader = Reader(take.1, taken.0);
        let queue: &Queue = Box::leak(Box::default());
        thread::spawn(|| queue.write_to(reader, true));
        queue.push("first\n", Duration::ZERO);
        while !lock(&queue.lines).text.is_empty() {
            thread::yield_now();
        }
        let line = "x".repeat(1023) + "\n";
        for _ in 0..MAX_WAITING / line.len() + 7 {
            queue.push(&line, Duration::ZERO);
        }
        // One that may wait is there in the end.
        let waits = thread::spawn(move || queue.push("audit\n", Duration::from_secs(60)));
        take.0.send(()).unwrap();
        assert_eq!(taken.1.recv().unwrap(), "first\n");
        waits.join().unwrap();
        (0..2).for_each(|_| take.0.send(()).unwrap());
        let text = taken.1.recv().unwrap();
        assert_eq!(text.matches(&line).count(), MAX_WAITING / line.len());
        assert!(text.ends_with("\n<4>7 log lines were left out: nobody took them\n"));
        assert_eq!(taken.1.recv().unwrap(), "audit\n");
    }

    #[test]
    fn the_same_warning_comes_once_a_second() {
        let (mut throttle, now) = (Logged::new(), Instant::now());
        let later = now + QUIET;
        let admitted = [now, now, now, later, later].map(|at| admit(&mut throttle, "a", at));
        assert_eq!(admitted, [Some(0), None, None, Some(2), None]);
        assert_eq!(admit(&mut throttle, "b", now), Some(0));
        for number in 0..10 * MAX_KINDS {
            admit(&mut throttle, &number.to_string(), later);
        }
        assert_eq!(throttle.len(), MAX_KINDS);
        assert_eq!(admit(&mut throttle, "new", later), None);
        assert_eq!(admit(&mut throttle, "new", later + QUIET), Some(0));
    }

    #[test]
    fn priorities_are_those_of_syslog() {
        let levels = [Level::Error, Level::Warn, Level::Info, Level::Debug, Level::Trace];
        let of = |target| {
            levels.map(|level| priority(&Metadata::builder().level(level).target(target).build()))
        };
        assert_eq!((of("vpn_daemon"), of(AUDIT)), ([3, 4, 6, 7, 7], [3, 4, 5, 7, 7]));
    }
}
