//! What a conversation is for: listing, disconnecting, probing. Pure: reply lines in, commands
//! out; [`super::management`] carries them.

use super::management::{SocketError, excerpt};
use super::status::{Line, Malformed, Parser, Row};
use super::{Client, Clients, CommonName};

/// What to do after a line.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Read on.
    Wait,
    /// Send this command (without a line end) and read its reply.
    Send(String),
    /// All is said.
    Done,
}

/// One purpose. What it has found out stays in it, also when the conversation fails half-way.
pub(super) trait Dialogue {
    /// OpenVPN has greeted with this text.
    fn greeted(&mut self, greeting: &str) -> Step;
    /// OpenVPN has sent this line of a reply.
    fn reply(&mut self, line: &[u8]) -> Result<Step, SocketError>;
}

const STATUS: &str = "status 3";

/// Lists the clients that have an address.
pub(super) struct List {
    parser: Parser,
    pub(super) clients: Clients,
}

impl List {
    pub(super) fn new() -> Self {
        Self { parser: Parser::new(), clients: Clients::default() }
    }
}

impl Dialogue for List {
    fn greeted(&mut self, _: &str) -> Step {
        Step::Send(STATUS.to_owned())
    }

    fn reply(&mut self, line: &[u8]) -> Result<Step, SocketError> {
        match status_line(&mut self.parser, line)? {
            Line::Client(row) => {
                let Row { common_name, ipv4, ipv6, .. } = row;
                if !(ipv4.is_empty() && ipv6.is_empty()) {
                    self.clients.push(Client { common_name, ipv4, ipv6 });
                }
                Ok(Step::Wait)
            }
            Line::Other => Ok(Step::Wait),
            Line::End => Ok(Step::Done),
        }
    }
}

/// Disconnects all clients of one name.
pub(super) struct Disconnect {
    name: CommonName,
    way: Way,
    pub(super) disconnected: usize,
}

enum Way {
    /// `kill NAME`: at once, all of them.
    ByName,
    /// `status 3` for the ids, then `client-kill ID` for each. OpenVPN tells such a client to
    /// restart and lets go of it 5 s later.
    ById { parser: Parser, ids: Vec<u64>, listed: bool },
}

/// `kill` copies what stands before the first colon into 128 bytes and reads on after them as
/// if there had been a colon (`man_kill` in `manage.c`).
const MAX_KILL_BYTES: usize = 127;

impl Disconnect {
    pub(super) fn new(name: &CommonName) -> Self {
        let text = name.as_str();
        // `kill` reads a colon as part of an address, even in quotes. U+FFFD may stand for
        // bytes that we were shown but cannot write.
        let by_id =
            text.contains([':', char::REPLACEMENT_CHARACTER]) || text.len() > MAX_KILL_BYTES;
        Self {
            name: name.clone(),
            way: if by_id {
                Way::ById { parser: Parser::with_ids(), ids: Vec::new(), listed: false }
            } else {
                Way::ByName
            },
            disconnected: 0,
        }
    }
}

impl Dialogue for Disconnect {
    fn greeted(&mut self, _: &str) -> Step {
        Step::Send(match self.way {
            Way::ByName => format!("kill {}", quoted(self.name.as_str())),
            Way::ById { .. } => STATUS.to_owned(),
        })
    }

    fn reply(&mut self, line: &[u8]) -> Result<Step, SocketError> {
        match &mut self.way {
            Way::ByName => {
                self.disconnected = killed(line)?;
                return Ok(Step::Done);
            }
            Way::ById { parser, ids, listed: listed @ false } => match status_line(parser, line)? {
                Line::Client(row) if row.common_name == self.name.as_str() => {
                    let no_id = Malformed("a client without an id");
                    ids.push(row.client_id.ok_or(no_id)?);
                    return Ok(Step::Wait);
                }
                Line::Client(_) | Line::Other => return Ok(Step::Wait),
                Line::End => *listed = true,
            },
            Way::ById { .. } => match line {
                _ if line.starts_with(b"SUCCESS:") => self.disconnected += 1,
                // It has gone since the list was made.
                b"ERROR: client-kill command failed" => {}
                _ => return Err(unexpected(line)),
            },
        }
        match &mut self.way {
            Way::ById { ids, .. } => {
                Ok(ids.pop().map_or(Step::Done, |id| Step::Send(format!("client-kill {id}"))))
            }
            Way::ByName => Ok(Step::Done),
        }
    }
}

/// Only waits for the greeting and keeps its text.
#[derive(Default)]
pub(super) struct Probe {
    pub(super) version: String,
}

impl Dialogue for Probe {
    fn greeted(&mut self, greeting: &str) -> Step {
        let version = greeting.split(" -- ").next().unwrap_or(greeting);
        version.clone_into(&mut self.version);
        Step::Done
    }

    fn reply(&mut self, line: &[u8]) -> Result<Step, SocketError> {
        Err(unexpected(line))
    }
}

fn status_line<'a>(parser: &'a mut Parser, line: &'a [u8]) -> Result<Line<'a>, SocketError> {
    if line.starts_with(b"ERROR:") {
        return Err(unexpected(line));
    }
    Ok(parser.line(line)?)
}

/// How many clients a reply to `kill` speaks of.
fn killed(line: &[u8]) -> Result<usize, SocketError> {
    let text = String::from_utf8_lossy(line);
    if text.starts_with("ERROR: common name '") && text.ends_with("' not found") {
        return Ok(0);
    }
    text.strip_prefix("SUCCESS: common name '")
        .and_then(|rest| rest.strip_suffix(" client(s) killed"))
        .and_then(|rest| rest.rsplit_once("' found, "))
        .and_then(|(_, count)| count.parse().ok())
        .ok_or_else(|| unexpected(line))
}

/// The error for a line that is neither what was asked for nor a known refusal.
fn unexpected(line: &[u8]) -> SocketError {
    match line.strip_prefix(b"ERROR:") {
        Some(reason) => SocketError::Refused(excerpt(reason)),
        None => SocketError::NotUnderstood(format!("the line \"{}\"", excerpt(line))),
    }
}

/// One parameter for OpenVPN's `parse_line` (`options_parse.c`).
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        if matches!(c, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disconnect(name: &str) -> Disconnect {
        Disconnect::new(&name.parse().unwrap())
    }

    #[test]
    fn kill_quotes_its_parameter() {
        for (name, command) in [
            ("a", r#"kill "a""#),
            ("a b", r#"kill "a b""#),
            (r#"say "hi""#, r#"kill "say \"hi\"""#),
            (r"back\slash\", r#"kill "back\\slash\\""#),
            ("it's; # no", r#"kill "it's; # no""#),
            ("Zoë", r#"kill "Zoë""#),
        ] {
            assert_eq!(disconnect(name).greeted(""), Step::Send(command.to_owned()));
        }
    }

    #[test]
    fn names_that_kill_would_not_find_go_by_id() {
        let (fits, too_long) = ("é".repeat(63), "é".repeat(64));
        for (name, by_id) in
            [("a:b", true), (":", true), ("Zo\u{fffd}", true), (&too_long, true), (&fits, false)]
        {
            let asks = disconnect(name).greeted("") == Step::Send("status 3".to_owned());
            assert_eq!(asks, by_id, "{name}");
        }
    }

    #[test]
    fn client_kill_goes_through_the_ids() {
        let mut dialogue = disconnect("a:b");
        for line in [
            "HEADER\tCLIENT_LIST\tCommon Name\tVirtual Address\tClient ID",
            "CLIENT_LIST\ta:b\t\t5",
            "CLIENT_LIST\ta\t\t6",
            "CLIENT_LIST\ta:b\t10.0.0.1\t7",
        ] {
            assert_eq!(dialogue.reply(line.as_bytes()).unwrap(), Step::Wait);
        }
        let steps =
            ["END", "SUCCESS: client-kill command succeeded", "ERROR: client-kill command failed"]
                .map(|line| dialogue.reply(line.as_bytes()).unwrap());
        let send = |id: u8| Step::Send(format!("client-kill {id}"));
        assert_eq!(steps, [send(7), send(5), Step::Done]);
        assert_eq!(dialogue.disconnected, 1);
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
            ("ERROR: kill parse", None),
            ("ERROR: The 'kill' command is not supported by the current daemon mode", None),
            ("SUCCESS: common name 'a' found, many client(s) killed", None),
            ("SUCCESS: 1 client(s) at address 127.0.0.1:5 killed", None),
            ("END", None),
            ("", None),
        ] {
            assert_eq!(killed(line.as_bytes()).ok(), count, "{line}");
        }
    }
}
