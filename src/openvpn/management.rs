//! One conversation with one management socket: connecting, greeting, commands, replies, and
//! why it failed. Nothing here waits; [`super::fanout`] does.
//!
//! Protocol: `doc/management-notes.txt` and `manage.c` of OpenVPN. One command at a time, since
//! OpenVPN throws away what it has not sent yet when it reads more. Lines that begin with `>`
//! are news and may stand anywhere. There is no need to say good-bye.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use memchr::memchr_iter;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::commands::{Dialogue, Step};
use super::status::Malformed;

/// Longest line. OpenVPN's rows are below 512 bytes, its log lines (news) below 2 KiB or so.
const MAX_LINE: usize = 8 * 1024;

/// Most bytes of one conversation: 4,096 clients, which is four times OpenVPN's default limit,
/// at 170 bytes for each row and two routes of 120 bytes each.
const MAX_RECEIVED: usize = 2 * 1024 * 1024;

/// Most characters of a process' own words in an error.
const MAX_EXCERPT: usize = 200;

/// Why a conversation failed: completes the sentence "OpenVPN management socket `socket` …".
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SocketError {
    /// Time was up. `budget` is how long the whole call had.
    NoAnswer {
        /// How long the whole call had.
        budget: Duration,
        /// What it was waiting for.
        stage: Stage,
    },
    /// Nobody listens: a stale file, or it went away just now. Its process has no clients.
    NotThere,
    /// The daemon may not connect.
    Permission,
    /// The process wants a management password first, which the daemon does not have.
    Password,
    /// The process closed the connection.
    Closed(Stage),
    /// The reply is none; what it held.
    NotUnderstood(String),
    /// A line or the whole reply is longer than any real one; its limit in bytes.
    TooLong {
        /// What was too long.
        what: &'static str,
        /// Its limit in KiB.
        limit: usize,
    },
    /// The process answered `ERROR:`; its reason.
    Refused(String),
    /// The path has this many bytes; a Unix socket address holds 107.
    PathTooLong(usize),
    /// There are more sockets than the daemon asks at once, which is this many.
    TooMany(usize),
    /// The operating system refused; what was to be done and why it was not.
    System(&'static str, Errno),
}

/// Where a conversation stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Other requests of this daemon are being served at this socket.
    Turn,
    /// Two others wait at the socket already.
    Connect,
    /// Connected, not greeted yet.
    Greeting,
    /// A command has been sent.
    Reply,
}

/// Connects; `None` when too many others wait at the socket, which nothing but time tells.
pub(super) fn connect_to(path: &Path) -> Result<Option<UnixStream>, SocketError> {
    let address = UnixAddr::new(path).map_err(|error| match error {
        Errno::ENAMETOOLONG => SocketError::PathTooLong(path.as_os_str().len()),
        error => SocketError::System("could not be addressed", error),
    })?;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .map_err(|error| SocketError::System("could not be opened", error))?;
    match connect(stream.as_raw_fd(), &address) {
        Ok(()) => Ok(Some(UnixStream::from(stream))),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Err(SocketError::NotThere),
        Err(Errno::EACCES | Errno::EPERM) => Err(SocketError::Permission),
        Err(error) => Err(SocketError::System("could not be connected to", error)),
    }
}

/// What has been said so far. Bytes in, commands out; [`Conversation::pump`] moves both.
pub(super) struct Conversation<D> {
    pub(super) dialogue: D,
    greeted: bool,
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
    received: usize,
    outgoing: Vec<u8>,
}

impl<D: Dialogue> Conversation<D> {
    pub(super) fn new(dialogue: D) -> Self {
        Self { dialogue, greeted: false, partial: Vec::new(), received: 0, outgoing: Vec::new() }
    }

    /// What a connected process is to send next.
    pub(super) fn stage(&self) -> Stage {
        if self.greeted { Stage::Reply } else { Stage::Greeting }
    }

    /// Reads once into `scratch`, then sends the command that this led to. Whether all is said.
    pub(super) fn pump(
        &mut self,
        stream: &mut UnixStream,
        scratch: &mut [u8],
    ) -> Result<bool, SocketError> {
        let received = match stream.read(scratch) {
            Ok(0) => return Err(SocketError::Closed(self.stage())),
            Ok(length) => scratch.get(..length).unwrap_or_default(),
            Err(error) => {
                return match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(false),
                    ErrorKind::ConnectionReset => Err(SocketError::Closed(self.stage())),
                    _ => Err(system("could not be read", &error)),
                };
            }
        };
        if self.feed(received)? {
            return Ok(true);
        }
        let outgoing = std::mem::take(&mut self.outgoing);
        // An empty socket buffer holds any command: there is no waiting for one that is full.
        stream.write_all(&outgoing).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => SocketError::Closed(self.stage()),
            _ => system("could not be written", &error),
        })?;
        Ok(false)
    }

    /// Takes in what was received. Whether all is said.
    fn feed(&mut self, bytes: &[u8]) -> Result<bool, SocketError> {
        self.received += bytes.len();
        let mut start = 0;
        for end in memchr_iter(b'\n', bytes) {
            let line = bytes.get(start..end).unwrap_or_default();
            start = end + 1;
            let step = if self.partial.is_empty() {
                self.line(line)?
            } else {
                self.partial.extend_from_slice(line);
                let line = std::mem::take(&mut self.partial);
                self.line(&line)?
            };
            match step {
                Step::Wait => {}
                Step::Send(command) => {
                    self.outgoing.extend_from_slice(command.as_bytes());
                    self.outgoing.push(b'\n');
                }
                Step::Done => return Ok(true),
            }
        }
        self.partial.extend_from_slice(bytes.get(start..).unwrap_or_default());
        if !self.greeted && self.partial.starts_with(PASSWORD) {
            return Err(SocketError::Password);
        }
        within("a line", self.partial.len(), MAX_LINE)?;
        within("a reply", self.received, MAX_RECEIVED)?;
        Ok(false)
    }

    fn line(&mut self, line: &[u8]) -> Result<Step, SocketError> {
        within("a line", line.len(), MAX_LINE)?;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Some(greeting) = line.strip_prefix(b">INFO:")
            && !self.greeted
        {
            self.greeted = true;
            Ok(self.dialogue.greeted(&excerpt(greeting)))
        } else if line.starts_with(b">") {
            Ok(Step::Wait)
        } else if self.greeted {
            self.dialogue.reply(line)
        } else if line.starts_with(PASSWORD) {
            Err(SocketError::Password)
        } else {
            let line = excerpt(line);
            Err(SocketError::NotUnderstood(format!("\"{line}\" for a greeting")))
        }
    }
}

/// Comes in place of the greeting, without a line end.
const PASSWORD: &[u8] = b"ENTER PASSWORD:";

fn within(what: &'static str, length: usize, limit: usize) -> Result<(), SocketError> {
    if length <= limit {
        return Ok(());
    }
    let limit = limit / 1024;
    Err(SocketError::TooLong { what, limit })
}

fn system(what: &'static str, error: &std::io::Error) -> SocketError {
    let errno = error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
    SocketError::System(what, errno)
}

/// A process' own words, fit for a log line.
pub(super) fn excerpt(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .trim()
        .chars()
        .take(MAX_EXCERPT)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

impl From<Malformed> for SocketError {
    fn from(Malformed(what): Malformed) -> Self {
        Self::NotUnderstood(what.to_owned())
    }
}

impl SocketError {
    /// Whether time was up (as opposed to an answer that is none).
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::NoAnswer { .. })
    }
}

impl fmt::Display for Stage {
    /// Completes "it did not answer: …".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Turn => "other requests of this daemon were waiting for it",
            Self::Connect => "too many others wait for it, or the process hangs",
            Self::Greeting => "another program holds it, or the process hangs",
            Self::Reply => "the process did not finish its reply",
        })
    }
}

impl fmt::Display for SocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAnswer { budget, .. } => {
                write!(f, "did not answer within {:.1} s", budget.as_secs_f64())
            }
            Self::NotThere => f.write_str("is stale: no process listens on it"),
            Self::Permission => f.write_str(
                "may not be used by the daemon: permission denied; run the daemon in the group \
                 of the directory, and give that group the right to enter it (mode 0750)",
            ),
            Self::Password => f.write_str(
                "asked for a password; remove the password file from the `management` line of \
                 its OpenVPN configuration",
            ),
            Self::Closed(Stage::Reply) => {
                f.write_str("closed the connection in the middle of its reply")
            }
            Self::Closed(_) => f.write_str("closed the connection before its greeting"),
            Self::NotUnderstood(what) => write!(f, "sent a reply that was not understood: {what}"),
            Self::TooLong { what, limit } => write!(f, "sent {what} of more than {limit} KiB"),
            Self::Refused(reason) => write!(f, "refused the command: {reason}"),
            Self::PathTooLong(length) => write!(
                f,
                "has a path of {length} bytes, and a Unix socket address holds 107; use a \
                 directory with a shorter path"
            ),
            Self::TooMany(limit) => {
                write!(f, "was not asked: the directory has more than {limit} sockets")
            }
            Self::System(what, error) => write!(f, "{what}: {}", error.desc()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openvpn::commands::List;

    /// A whole conversation, cut into pieces of every size: its list, or its error.
    fn talk(received: &[u8]) -> Result<Option<usize>, SocketError> {
        let whole = pieces(received, received.len());
        for size in [1, 2, 3, 7, 100] {
            assert_eq!(pieces(received, size), whole, "in pieces of {size}");
        }
        whole
    }

    fn pieces(received: &[u8], size: usize) -> Result<Option<usize>, SocketError> {
        let mut conversation = Conversation::new(List::new());
        for piece in received.chunks(size) {
            if conversation.feed(piece)? {
                return Ok(Some(conversation.dialogue.clients.len()));
            }
        }
        Ok(None)
    }

    const REPORT: &str = ">INFO:OpenVPN Management Interface Version 5\r\n\
        HEADER\tCLIENT_LIST\tCommon Name\tVirtual Address\r\n\
        CLIENT_LIST\tEND\t10.0.0.1\r\n";

    #[test]
    fn conversations() {
        assert_eq!(talk(format!("{REPORT}END\r\n").as_bytes()), Ok(Some(1)));
        assert_eq!(talk(format!("{REPORT}END\n").as_bytes()), Ok(Some(1)));
        assert_eq!(
            talk(format!("{REPORT}>LOG:1,I,x\r\n>INFO:END\r\nEND\r\n").as_bytes()),
            Ok(Some(1))
        );
        assert_eq!(talk(format!(">HOLD:x\r\n{REPORT}END\r\n").as_bytes()), Ok(Some(1)));
        for open in ["", "END\r", "END", ">END\r\n"] {
            assert_eq!(talk(format!("{REPORT}{open}").as_bytes()), Ok(None), "{open}");
        }
        assert_eq!(talk(b"ENTER PASSWORD:"), Err(SocketError::Password));
        assert_eq!(talk(b"ENTER PASSWORD:\r\n"), Err(SocketError::Password));
        let error = talk(format!("{REPORT}ERROR: \x07no\r\n").as_bytes());
        assert_eq!(error, Err(SocketError::Refused("\u{fffd}no".to_owned())));
        assert!(matches!(talk(b"\r\n"), Err(SocketError::NotUnderstood(_))));
    }

    #[test]
    fn lines_and_replies_are_bounded() {
        let line = format!(">{}", "x".repeat(MAX_LINE));
        let too_long = |what, limit: usize| Err(SocketError::TooLong { what, limit: limit / 1024 });
        assert_eq!(talk(line.as_bytes()), too_long("a line", MAX_LINE));
        let news = ">x\r\n".repeat(MAX_RECEIVED / 4 + 1);
        assert_eq!(pieces(news.as_bytes(), 4096), too_long("a reply", MAX_RECEIVED));
        let most = ">x\r\n".repeat(MAX_RECEIVED / 4);
        assert_eq!(pieces(most.as_bytes(), 4096), Ok(None));
    }

    #[test]
    fn excerpts_are_short_and_harmless() {
        assert_eq!(excerpt(b"  a\x1b[2J\x00\xff "), "a\u{fffd}[2J\u{fffd}\u{fffd}");
        assert_eq!(excerpt(&[b'x'; 9999]).len(), MAX_EXCERPT);
    }
}
