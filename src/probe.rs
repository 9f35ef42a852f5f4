//! Asks a daemon for `/i/node`, as its portal does.

use std::io::{self, Read, Write};

/// Any answer to `/i/node` is far shorter.
const MAX_ANSWER: u64 = 16 * 1024;

const REQUEST: &[u8] = b"GET /i/node HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// What somebody answers who speaks plain HTTP, or something else; a failure of the stream ends it.
///
/// # Errors
/// The first byte does not come.
pub(crate) fn ask(mut stream: impl Read + Write) -> io::Result<String> {
    stream.write_all(REQUEST)?;
    let mut answer = Vec::new();
    match stream.take(MAX_ANSWER).read_to_end(&mut answer) {
        Err(error) if answer.is_empty() => Err(error),
        _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
    }
}

/// The body of an answer that is 200.
pub(crate) fn body(answer: &str) -> Option<&str> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let is_good = head.starts_with("HTTP/1.") && head.split(' ').nth(1) == Some("200");
    is_good.then_some(body)
}
