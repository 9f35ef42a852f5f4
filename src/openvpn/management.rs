//! One conversation with one management socket, from top to bottom: connecting, greeting, command,
//! reply. Every function ends by its deadline, and its error completes "OpenVPN management socket
//! `socket` …"; of a time-out it says what was waited for.
//!
//! Protocol: `doc/management-notes.txt` and `manage.c` of OpenVPN. One command at a time, since
//! OpenVPN throws away what it has not sent yet when it reads more. Lines that begin with `>`
//! are news and may stand anywhere. There is no need to say good-bye.

use std::borrow::Cow;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::status::Report;
use super::{Client, CommonName};
use crate::unix::Stream;

/// Longest line. OpenVPN's rows are below 512 bytes, its log lines (news) below 2 KiB or so.
const MAX_LINE: usize = 8 * 1024;

/// Most bytes of one conversation: 4,096 clients, which is four times OpenVPN's default limit,
/// at 170 bytes for each row and two routes of 120 bytes each.
const MAX_RECEIVED: usize = 2 * 1024 * 1024;

/// Most characters of a process' own words in an error.
const MAX_EXCERPT: usize = 200;

/// Without a greeting for this long, a second connection knocks.
///
/// An OpenVPN server on TCP (up to 2.6; on any protocol in 2.7) that finds a connection in its
/// backlog dead accepts the next one and forgets to watch it, since nothing has changed for
/// `man_persist_state` (`manage.c`): it greets only when yet another connection comes. Callers
/// that gave up on a hanging process leave such dead ones.
const KNOCK_AFTER: Duration = Duration::from_millis(200);

/// `kill` copies what stands before the first colon into 128 bytes and reads on after them as
/// if there had been a colon (`man_kill` in `manage.c`).
const MAX_KILL_BYTES: usize = 127;

/// Calls `each` for every client that has an address. A failure may come after some of them.
pub fn list(socket: &Path, deadline: Instant, mut each: impl FnMut(&Client)) -> io::Result<()> {
    let mut conversation = Conversation::open(socket, deadline)?;
    conversation.status(|client| {
        if !(client.ipv4.is_empty() && client.ipv6.is_empty()) {
            each(client);
        }
    })?;
    conversation.close();
    Ok(())
}

/// Disconnects all clients of that name. `disconnected` counts them as they go, also when this
/// fails half-way.
pub fn disconnect(
    socket: &Path,
    name: &CommonName,
    deadline: Instant,
    disconnected: &AtomicUsize,
) -> io::Result<()> {
    let mut conversation = Conversation::open(socket, deadline)?;
    let name = name.as_str();
    // `kill` reads a colon as part of an address, even in quotes. U+FFFD may stand for bytes that
    // we were shown but cannot write.
    if !name.contains([':', char::REPLACEMENT_CHARACTER]) && name.len() <= MAX_KILL_BYTES {
        let reply = conversation.ask(&format!("kill {}", quoted(name)))?;
        let count = killed(&reply).ok_or_else(|| unexpected(&reply))?;
        disconnected.store(count, Relaxed);
    } else {
        let mut ids = Vec::new();
        conversation.status(|client| {
            if client.common_name == name {
                ids.push(client.id);
            }
        })?;
        let ids: Option<Vec<u64>> = ids.into_iter().collect();
        // OpenVPN tells such a client to restart and lets go of it some seconds later.
        for id in ids.ok_or_else(|| not_understood("a client without an id"))? {
            let reply = conversation.ask(&format!("client-kill {id}"))?;
            if reply.starts_with("SUCCESS:") {
                disconnected.fetch_add(1, Relaxed);
            } else if reply != "ERROR: client-kill command failed" {
                return Err(unexpected(&reply));
            } // else it has gone since the list was made.
        }
    }
    conversation.close();
    Ok(())
}

/// The version of the management interface, as the process words it. Says nothing itself.
pub(crate) fn probe(socket: &Path, deadline: Instant) -> io::Result<String> {
    let conversation = Conversation::open(socket, deadline)?;
    let greeting = conversation.greeting.clone().unwrap_or_default();
    conversation.close();
    Ok(excerpt(greeting.split(" -- ").next().unwrap_or_default()))
}

struct Conversation {
    stream: BufReader<Stream>,
    /// The last line, or the beginning of one whose end has not come yet.
    line: Vec<u8>,
    received: usize,
    /// What stands behind `>INFO:` in the first such line.
    greeting: Option<String>,
    knock: Option<Stream>,
}

impl Conversation {
    /// Connects and waits until it is being served.
    fn open(socket: &Path, deadline: Instant) -> io::Result<Self> {
        let stream = Stream::connect(socket, deadline).map_err(refused)?;
        let mut conversation = Self {
            stream: BufReader::new(stream),
            line: Vec::new(),
            received: 0,
            greeting: None,
            knock: None,
        };
        while conversation.greeting.is_none() {
            let overdue = deadline.min(Instant::now() + KNOCK_AFTER);
            conversation.stream.get_mut().deadline = overdue;
            match conversation.next_line() {
                Ok(line) => match line.strip_prefix(">INFO:") {
                    Some(greeting) => conversation.greeting = Some(greeting.to_owned()),
                    None if line.starts_with('>') => {}
                    None => {
                        let line = excerpt(&line);
                        return Err(not_understood(&format!("\"{line}\" for a greeting")));
                    }
                },
                Err(error) if error.kind() == ErrorKind::TimedOut && overdue < deadline => {
                    if conversation.knock.is_none() {
                        let at_once = Instant::now() + Duration::from_millis(1);
                        // A full backlog: others are knocking.
                        conversation.knock = Stream::connect(socket, at_once).ok();
                    }
                }
                Err(error) => return Err(error),
            }
        }
        conversation.stream.get_mut().deadline = deadline;
        Ok(conversation)
    }

    fn send(&mut self, command: &str) -> io::Result<()> {
        let written = self.stream.get_mut().write_all(format!("{command}\n").as_bytes());
        written.map_err(|error| self.explained(error))
    }

    /// The first line of the reply to a command.
    fn ask(&mut self, command: &str) -> io::Result<Cow<'_, str>> {
        self.send(command)?;
        self.next_line()
    }

    /// Calls `each` for every client that has a name.
    fn status(&mut self, mut each: impl FnMut(&Client)) -> io::Result<()> {
        let mut report = Report::default();
        self.send("status 3")?;
        loop {
            let line = self.next_line()?;
            if line.starts_with("ERROR:") {
                return Err(unexpected(&line));
            }
            report.line(&line).map_err(not_understood)?.iter().for_each(&mut each);
            if report.is_complete {
                return Ok(());
            }
        }
    }

    /// The next line without its end; no news once greeted. After a time-out it may be called again.
    /// U+FFFD stands for what is not UTF-8.
    fn next_line(&mut self) -> io::Result<Cow<'_, str>> {
        let greeted = self.greeting.is_some();
        loop {
            if self.line.ends_with(b"\n") {
                self.line.clear();
            }
            let begun = self.line.len();
            let room = (MAX_LINE + 1).saturating_sub(begun) as u64;
            let read = self.stream.by_ref().take(room).read_until(b'\n', &mut self.line);
            self.received += self.line.len() - begun;
            // This comes in place of the greeting, without a line end.
            if !greeted && self.line.starts_with(b"ENTER PASSWORD:") {
                return Err(io::Error::other(
                    "asked for a password; remove the password file from the `management` line of \
                     its OpenVPN configuration",
                ));
            }
            read.map_err(|error| self.explained(error))?;
            within("a line", self.line.len(), MAX_LINE)?;
            within("a reply", self.received, MAX_RECEIVED)?;
            if !self.line.ends_with(b"\n") {
                return Err(self.explained(ErrorKind::UnexpectedEof.into()));
            }
            if !(greeted && self.line.starts_with(b">")) {
                break;
            }
        }
        let line = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        // `from_utf8_lossy` alone looks at each byte.
        Ok(str::from_utf8(line).map_or_else(|_| String::from_utf8_lossy(line), Cow::Borrowed))
    }

    fn explained(&self, error: io::Error) -> io::Error {
        let greeted = self.greeting.is_some();
        let sentence = match error.kind() {
            ErrorKind::TimedOut if greeted => "the process did not finish its reply",
            ErrorKind::TimedOut => "another program holds it, or the process hangs",
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                match greeted {
                    true => "closed the connection in the middle of its reply",
                    false => "closed the connection before its greeting",
                }
            }
            _ => return io::Error::other(format!("could not be talked to: {error}")),
        };
        io::Error::new(error.kind(), sentence)
    }

    /// Hangs up. The process has yet to take the connection that knocked: left dead in its
    /// backlog, that would be the next caller's trouble.
    fn close(self) {
        let deadline = self.stream.get_ref().deadline;
        drop(self.stream);
        if let Some(mut knock) = self.knock {
            knock.deadline = deadline.min(Instant::now() + KNOCK_AFTER);
            let _ = knock.read(&mut [0]);
        }
    }
}

/// Why there is no connection.
fn refused(error: io::Error) -> io::Error {
    let sentence = match error.kind() {
        ErrorKind::TimedOut => "too many others wait for it, or the process hangs",
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => "is stale: no process listens on it",
        ErrorKind::PermissionDenied => {
            "may not be used by the daemon: permission denied; run the daemon in the group of the \
             directory, and give that group the right to enter it (mode 0750)"
        }
        ErrorKind::InvalidFilename => {
            "has a path of more than the 107 bytes that a Unix socket address holds; use a \
             directory with a shorter path"
        }
        _ => return io::Error::other(format!("could not be connected to: {error}")),
    };
    io::Error::new(error.kind(), sentence)
}

fn within(what: &str, length: usize, limit: usize) -> io::Result<()> {
    if length <= limit {
        return Ok(());
    }
    Err(io::Error::other(format!("sent {what} of more than {} KiB", limit / 1024)))
}

fn not_understood(what: &str) -> io::Error {
    io::Error::other(format!("sent a reply that was not understood: {what}"))
}

/// The error for a line that is neither what was asked for nor a known refusal.
fn unexpected(line: &str) -> io::Error {
    match line.strip_prefix("ERROR:") {
        Some(reason) => io::Error::other(format!("refused the command: {}", excerpt(reason))),
        None => not_understood(&format!("the line \"{}\"", excerpt(line))),
    }
}

/// A process' own words, fit for a log line.
fn excerpt(text: &str) -> String {
    let text = text.trim().chars().take(MAX_EXCERPT);
    text.map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// How many clients a reply to `kill` speaks of.
fn killed(reply: &str) -> Option<usize> {
    if reply.starts_with("ERROR: common name '") && reply.ends_with("' not found") {
        return Some(0);
    }
    let found = reply.strip_prefix("SUCCESS: common name '")?.strip_suffix(" client(s) killed")?;
    found.rsplit_once("' found, ")?.1.parse().ok()
}

/// One parameter for OpenVPN's `parse_line` (`options_parse.c`).
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::thread;

    fn bind(purpose: &str) -> (PathBuf, UnixListener) {
        let name = format!("{purpose}-{}-{:?}", std::process::id(), thread::current().id());
        let path = std::env::temp_dir().join(name);
        (path.clone(), UnixListener::bind(path).unwrap())
    }

    /// What comes of it when the process sends this in pieces of that size, then nothing more.
    fn talk<T>(
        received: &[u8],
        size: usize,
        ask: impl FnOnce(&Path, Instant) -> io::Result<T>,
    ) -> Result<T, String> {
        let (path, listener) = bind("talk");
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut stream = listener.accept().unwrap().0;
                let _ = received.chunks(size).try_for_each(|piece| stream.write_all(piece));
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            });
            let result = ask(&path, Instant::now() + Duration::from_secs(60));
            std::fs::remove_file(&path).unwrap();
            result.map_err(|error| error.to_string())
        })
    }

    #[test]
    fn conversations() {
        let greeting = ">INFO:OpenVPN Management Interface Version 5\r\n";
        let report = "HEADER\tCLIENT_LIST\tCommon Name\tVirtual Address\r\n\
            CLIENT_LIST\tEND\t10.0.0.1\r\nCLIENT_LIST\tno address\t\r\n";
        let closed = Err("closed the connection in the middle of its reply");
        let password = Err("asked for a password");
        for (received, expected) in [
            (format!("{greeting}{report}END\r\n"), Ok(1)),
            (format!("{greeting}{report}END\n"), Ok(1)),
            (format!(">HOLD:x\r\n{greeting}{report}>INFO:END\r\nEND\r\n>LOG:"), Ok(1)),
            (format!("{greeting}{report}"), closed),
            (format!("{greeting}{report}END\r"), closed),
            (format!("{greeting}{report}>END\r\n"), closed),
            (greeting.to_owned(), closed),
            (">INFO:".to_owned(), Err("closed the connection before its greeting")),
            (
                format!("{greeting}{report}ERROR: \x07no\r\n"),
                Err("refused the command: \u{fffd}no"),
            ),
            ("ENTER PASSWORD:".to_owned(), password),
            (format!("ENTER PASSWORD:\r\n{greeting}"), password),
            ("\r\n".to_owned(), Err("sent a reply that was not understood: \"\" for a greeting")),
            (format!("{greeting}\r\n"), Err("sent a reply that was not understood: a line that")),
            (format!("{greeting}>{}", "x".repeat(MAX_LINE)), Err("sent a line of more than 8 KiB")),
        ] {
            for size in [1, 2, 7, 100, 100_000] {
                let mut count = 0;
                let list = |path: &_, deadline| list(path, deadline, |_| count += 1);
                let result = talk(received.as_bytes(), size, list);
                match (result.map(|()| count), expected) {
                    (Err(error), Err(sentence)) => assert!(error.starts_with(sentence), "{error}"),
                    (result, expected) => assert_eq!(result.ok(), expected.ok(), "{received:?}"),
                }
            }
        }
    }

    #[test]
    fn clients_whose_name_cannot_be_killed() {
        let report = "HEADER\tCLIENT_LIST\tCommon Name\tVirtual Address\tClient ID\r\n\
            CLIENT_LIST\ta:b\t10.0.0.1\t1\r\nCLIENT_LIST\ta:b\t\t2\r\nCLIENT_LIST\tb\t\t3\r\nEND";
        let [done, gone] = ["SUCCESS: killed", "ERROR: client-kill command failed"];
        for (replies, count, expected) in [
            ([done, done], 2, Ok(())),
            ([gone, done], 1, Ok(())),
            ([done, "ERROR: not now"], 1, Err("refused the command: not now".to_owned())),
            ([done, ""], 1, Err("sent a reply that was not understood: the line \"\"".to_owned())),
        ] {
            let received = [">INFO:", report, replies[0], replies[1], ""].join("\r\n");
            let killed = AtomicUsize::new(0);
            let name = "a:b".parse().unwrap();
            let ask = |path: &_, deadline| disconnect(path, &name, deadline, &killed);
            assert_eq!(talk(received.as_bytes(), 100_000, ask), expected);
            assert_eq!(killed.into_inner(), count, "{replies:?}");
        }
    }

    #[test]
    fn a_time_out_says_what_was_waited_for() {
        let (path, listener) = bind("time-out");
        let why = || {
            let deadline = Instant::now() + Duration::from_secs(1);
            list(&path, deadline, |_| {}).unwrap_err().to_string()
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut stream = listener.accept().unwrap().0;
                stream.write_all(b">INFO:\n").unwrap();
                stream.read_to_end(&mut Vec::new()).unwrap();
            });
            assert_eq!(why(), "the process did not finish its reply");
        });
        assert_eq!(why(), "another program holds it, or the process hangs");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn the_connection_that_knocked_is_not_left_dead_in_the_backlog() {
        let (path, listener) = bind("knock");
        thread::scope(|scope| {
            let process = scope.spawn(|| {
                let [mut first, second] = [(); 2].map(|()| listener.accept().unwrap().0);
                first.write_all(b">INFO:\nSUCCESS: common name 'a' found, 1 client(s) killed\n")?;
                first.read_to_end(&mut Vec::new()).map(|_| second)
            });
            let (begun, name) = (Instant::now(), "a".parse().unwrap());
            let deadline = begun + Duration::from_secs(60);
            disconnect(&path, &name, deadline, &AtomicUsize::new(0)).unwrap();
            // It knocked after this long, and gave the process as much time to take that.
            assert!(begun.elapsed() >= 2 * KNOCK_AFTER);
            process.join().unwrap().unwrap();
        });
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn parameters_are_quoted() {
        for (name, parameter) in [
            ("a b", r#""a b""#),
            (r#"say "hi""#, r#""say \"hi\"""#),
            (r"back\slash\", r#""back\\slash\\""#),
            ("it's; # no", r#""it's; # no""#),
        ] {
            assert_eq!(quoted(name), parameter);
        }
    }

    #[test]
    fn replies_to_kill() {
        for (line, count) in [
            ("SUCCESS: common name 'a' found, 1 client(s) killed", Some(1)),
            (
                "SUCCESS: common name '' found, 9 client(s) killed' found, 12 client(s) killed",
                Some(12),
            ),
            ("ERROR: common name 'a' not found", Some(0)),
            ("ERROR: common name ' 'x' not found' not found", Some(0)),
            ("ERROR: common name 'a' is odd", None),
            ("ERROR: command 'kill' not found", None),
            ("ERROR: kill parse", None),
            ("ERROR: The 'kill' command is not supported by the current daemon mode", None),
            ("SUCCESS: common name 'a' found, many client(s) killed", None),
            ("SUCCESS: 1 client(s) at address 127.0.0.1:5 killed", None),
            ("END", None),
            ("", None),
        ] {
            assert_eq!(killed(line), count, "{line}");
        }
    }

    #[test]
    fn excerpts_are_short_and_harmless() {
        assert_eq!(excerpt("  a\x1b[2J\0\u{fffd} "), "a\u{fffd}[2J\u{fffd}\u{fffd}");
        assert_eq!(excerpt(&"x".repeat(9999)).len(), MAX_EXCERPT);
    }
}
