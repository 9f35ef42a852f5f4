//! Owns the question whether a request head is safe to pass on: bytes in, verdict out.
//!
//! The HTTP library behind is lenient and fragile (it reads lines without limit, takes the first
//! of two lengths, and aborts on a huge one). It therefore never sees what a client sent, only
//! [`Head::rewritten`]: a head made anew from the parts that were understood here. The grammar is
//! RFC 9112's without its leniencies; where two readers could disagree, the head is refused.

use std::fmt::Write;

/// Most bytes of a request head, its blank line included.
pub const MAX_HEAD: usize = 16 * 1024;
/// Most header lines of a request head.
pub const MAX_HEADERS: usize = 100;
/// Most bytes of a body, except of [`SYNC_PEERS`].
pub const MAX_FORM: u64 = 64 * 1024;
/// Most bytes of the body of a POST to [`SYNC_PEERS`].
pub const MAX_SYNC: u64 = 32 * 1024 * 1024;
/// The one call with a large body.
pub const SYNC_PEERS: &str = "/w/sync_peers";
/// Header that tells the handlers the client's address. Only the front door sets it: of a
/// client's headers, none but those of `Fields::take` that push to `passed` goes through.
pub const CLIENT_ADDRESS: &str = "X-Vpn-Daemon-Client";
/// Header that tells the handlers the common name of the client's certificate; see
/// [`CLIENT_ADDRESS`].
pub const CLIENT_NAME: &str = "X-Vpn-Daemon-Client-Name";

/// What [`check`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing wrong so far; more bytes are needed.
    Incomplete,
    /// A whole head that is safe to pass on as [`Head::rewritten`].
    Complete(Head),
    /// Answer with this, then close the connection: where the next request would begin is unknown.
    Refused(Refusal),
}

/// Why a head is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// 400, 411, 413 or 431.
    pub status: u16,
    /// The sentence for `{"error": …}`.
    pub reason: &'static str,
}

/// A request head that was understood completely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the head in the buffer, with its blank line and an empty line ahead of it. The
    /// body begins here.
    pub length: usize,
    /// The method as sent; methods that no call has are for the handlers to refuse.
    pub method: String,
    /// Path and query as sent, not decoded; begins with `/`.
    pub target: String,
    /// Bytes of the body, within the call's limit; 0 where there is none.
    pub content_length: u64,
    /// Whether the client wants to send another request after this one.
    pub keep_alive: bool,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub expect_continue: bool,
    /// Whether the client speaks HTTP/1.0, which knows neither chunked answers nor 100.
    pub http10: bool,
    /// Whether the method is HEAD, whose answer has a length but no body.
    pub is_head: bool,
    lines: String,
}

impl Head {
    /// The head to pass on: request line, the few headers that handlers read, `extra`, blank line.
    ///
    /// It keeps the client's HTTP version (so that the answer is framed in a way the client
    /// knows) and always asks for the connection to be kept. Values in `extra` are made safe:
    /// what is not printable ASCII, and `%`, is percent-encoded. Names must be header names.
    #[must_use]
    pub fn rewritten(&self, extra: &[(&str, &str)]) -> Vec<u8> {
        let mut head = self.lines.clone();
        for (name, value) in extra {
            head.push_str(name);
            head.push_str(": ");
            for byte in value.bytes() {
                match byte {
                    b' '..=b'~' if byte != b'%' => head.push(char::from(byte)),
                    // Writing to a string cannot fail.
                    _ => drop(write!(head, "%{byte:02X}")),
                }
            }
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        head.into_bytes()
    }
}

/// Judges `buffer`, what has arrived so far of a connection from the first byte of a request.
///
/// More bytes never change a verdict other than [`Verdict::Incomplete`].
#[must_use]
pub fn check(buffer: &[u8]) -> Verdict {
    Checker::default().check(buffer)
}

/// [`check`] for a head that arrives in pieces: every byte is looked at once.
#[derive(Debug, Default)]
pub struct Checker {
    scanned: usize,
    line_start: usize,
    after_cr: bool,
    request: Option<RequestLine>,
    fields: Fields,
}

impl Checker {
    /// Judges `buffer`, which begins with what the calls before were given.
    ///
    /// After [`Verdict::Complete`] the checker is new again, for a buffer that begins with the
    /// next request.
    pub fn check(&mut self, buffer: &[u8]) -> Verdict {
        let window = buffer.get(..MAX_HEAD).unwrap_or(buffer);
        match self.advance(window) {
            Ok(Some(head)) => {
                *self = Self::default();
                Verdict::Complete(head)
            }
            Ok(None) if window.len() < MAX_HEAD => Verdict::Incomplete,
            Ok(None) => Verdict::Refused(refusal(431, "the request head is over 16 KiB")),
            Err(why) => Verdict::Refused(why),
        }
    }

    fn advance(&mut self, window: &[u8]) -> Result<Option<Head>, Refusal> {
        while let Some(&byte) = window.get(self.scanned) {
            match byte {
                b'\n' if self.after_cr => {
                    let line = window.get(self.line_start..self.scanned - 1);
                    // The bytes were found to be ASCII below.
                    let line = str::from_utf8(line.unwrap_or_default());
                    let line = line.map_err(|_| bad(NOT_ASCII))?;
                    match &self.request {
                        Some(request) if line.is_empty() => return self.finish(request).map(Some),
                        Some(_) => self.fields.take(line)?,
                        // RFC 9112, 2.2: one empty line ahead of a request is to be ignored (old
                        // clients send it after a body).
                        None if line.is_empty() && self.line_start == 0 => {}
                        None => self.request = Some(RequestLine::parse(line)?),
                    }
                    self.line_start = self.scanned + 1;
                }
                b'\n' => return Err(bad("a line of the request head ends in LF without CR")),
                _ if self.after_cr => {
                    return Err(bad("the request head contains a CR without LF"));
                }
                b'\r' | b'\t' | b' '..=b'~' => {}
                0x80.. => return Err(bad(NOT_ASCII)),
                _ => return Err(bad("the request head contains a control character")),
            }
            self.after_cr = byte == b'\r';
            self.scanned += 1;
        }
        Ok(None)
    }

    fn finish(&self, request: &RequestLine) -> Result<Head, Refusal> {
        let (fields, http10) = (&self.fields, request.http10);
        let content_length = self.body_length(request)?;
        if !http10 && !fields.host {
            return Err(bad("the header Host is missing, which HTTP/1.1 requires"));
        }
        let mut lines = format!("{}\r\n{}", request.line, fields.passed);
        if fields.content_length.is_some() {
            lines.push_str(&format!("Content-Length: {content_length}\r\n"));
        }
        if http10 {
            lines.push_str("Connection: keep-alive\r\n");
        }
        Ok(Head {
            length: self.scanned + 1,
            method: request.method.clone(),
            target: request.target.clone(),
            content_length,
            keep_alive: !fields.close && (fields.keep_alive || !http10),
            // RFC 9110, 10.1.1: to be ignored from an HTTP/1.0 client, and without a body.
            expect_continue: fields.expect && !http10 && content_length > 0,
            http10,
            is_head: request.method == "HEAD",
            lines,
        })
    }

    fn body_length(&self, request: &RequestLine) -> Result<u64, Refusal> {
        let method = request.method.as_str();
        let path = request.target.split('?').next();
        let (limit, over) = if method == "POST" && path == Some(SYNC_PEERS) {
            (MAX_SYNC, "the body is over 32 MiB")
        } else {
            (MAX_FORM, "the body is over 64 KiB")
        };
        match (method, self.fields.content_length) {
            // With a length besides it is an attempt at smuggling, not a client to be taught.
            ("POST", None) if self.fields.transfer_encoding => Err(refusal(411, CHUNKED)),
            _ if self.fields.transfer_encoding => Err(bad(CHUNKED)),
            ("POST", None) => Err(refusal(411, "the header Content-Length is missing")),
            ("GET" | "HEAD", Some(1..)) => Err(bad(UNEXPECTED_BODY)),
            (_, Some(length)) if length > limit => Err(refusal(413, over)),
            (_, length) => Ok(length.unwrap_or(0)),
        }
    }
}

#[derive(Debug)]
struct RequestLine {
    line: String,
    method: String,
    target: String,
    http10: bool,
}

impl RequestLine {
    fn parse(line: &str) -> Result<Self, Refusal> {
        let mut parts = line.split(' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad(NOT_A_REQUEST_LINE));
        };
        if !is_token(method) {
            return Err(bad("the method of the request line is not a token"));
        }
        if !target.starts_with('/') {
            return Err(bad("the target of the request line does not begin with a slash"));
        }
        if !target.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
            return Err(bad("the target of the request line contains a character that it may not"));
        }
        let http10 = match version {
            "HTTP/1.0" => true,
            "HTTP/1.1" => false,
            _ => {
                return Err(bad("the version of the request line is not HTTP/1.0 or HTTP/1.1"));
            }
        };
        Ok(Self {
            line: line.to_owned(),
            method: method.to_owned(),
            target: target.to_owned(),
            http10,
        })
    }
}

/// What the header lines said so far.
#[derive(Debug, Default)]
struct Fields {
    count: usize,
    passed: String,
    host: bool,
    content_type: bool,
    content_length: Option<u64>,
    transfer_encoding: bool,
    close: bool,
    keep_alive: bool,
    expect: bool,
}

impl Fields {
    fn take(&mut self, line: &str) -> Result<(), Refusal> {
        self.count += 1;
        if self.count > MAX_HEADERS {
            return Err(refusal(431, "the request has over 100 headers"));
        }
        if line.starts_with([' ', '\t']) {
            return Err(bad("a header line begins with white space (folded headers are refused)"));
        }
        let (name, value) =
            line.split_once(':').ok_or(bad("a header line does not contain a colon"))?;
        if name.ends_with([' ', '\t']) {
            return Err(bad("a header has white space between its name and the colon"));
        }
        if !is_token(name) {
            return Err(bad("the name of a header is not a token"));
        }
        let value = value.trim_matches([' ', '\t']);

        match name.to_ascii_lowercase().as_str() {
            "host" => {
                if !value.bytes().all(is_host_byte) {
                    return Err(bad("the header Host is not a host name or address"));
                }
                if std::mem::replace(&mut self.host, true) {
                    return Err(bad("the header Host is repeated"));
                }
                self.pass("Host", value);
            }
            "content-type" => {
                if std::mem::replace(&mut self.content_type, true) {
                    return Err(bad("the header Content-Type is repeated"));
                }
                self.pass("Content-Type", value);
            }
            "origin" => self.pass("Origin", value),
            "content-length" => {
                if self.content_length.is_some() {
                    return Err(bad("the header Content-Length is repeated"));
                }
                // `parse` alone would take a plus sign.
                if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(bad("the header Content-Length is not a plain decimal number"));
                }
                // Of digits alone, only one that is too large cannot be read: over every limit.
                self.content_length = Some(value.parse().unwrap_or(u64::MAX));
            }
            "transfer-encoding" => self.transfer_encoding = true,
            "expect" => {
                if !value.eq_ignore_ascii_case("100-continue") {
                    return Err(bad("the header Expect is not 100-continue"));
                }
                self.expect = true;
            }
            "upgrade" => return Err(bad(UPGRADE)),
            "connection" => {
                for option in value.split(',').map(|option| option.trim_matches([' ', '\t'])) {
                    if option.eq_ignore_ascii_case("upgrade") {
                        return Err(bad(UPGRADE));
                    }
                    self.close |= option.eq_ignore_ascii_case("close");
                    self.keep_alive |= option.eq_ignore_ascii_case("keep-alive");
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn pass(&mut self, name: &str, value: &str) {
        self.passed.push_str(&format!("{name}: {value}\r\n"));
    }
}

const NOT_ASCII: &str = "the request head contains a character that is not ASCII";
const NOT_A_REQUEST_LINE: &str =
    "the request line is not a method, a target and a version with one space between them";
const CHUNKED: &str =
    "the header Transfer-Encoding is not taken; a body needs Content-Length instead";
const UNEXPECTED_BODY: &str = "a GET or HEAD request takes no body: Content-Length must be 0";
const UPGRADE: &str = "upgrading the connection to another protocol is not possible";

fn bad(reason: &'static str) -> Refusal {
    refusal(400, reason)
}

fn refusal(status: u16, reason: &'static str) -> Refusal {
    Refusal { status, reason }
}

/// RFC 9110, 5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

/// RFC 3986, 3.2.2 and 3.2.3: a host with an optional port.
fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%:[]".contains(&byte)
}
