//! Is this request head safe to pass on? Bytes in, verdict out.
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
pub const MAX_FORM: usize = 64 * 1024;
/// Most bytes of the body of a POST to [`SYNC_PEERS`].
pub const MAX_SYNC: usize = 32 * 1024 * 1024;
/// The one call with a large body.
pub const SYNC_PEERS: &str = "/w/sync_peers";
/// Header that tells the handlers the client's address. Only the front door sets it: a client's
/// headers go no further than [`check`], but for those that it writes anew.
pub const CLIENT_ADDRESS: &str = "X-Vpn-Daemon-Client";
/// Header that tells the handlers the common name of the client's certificate; see
/// [`CLIENT_ADDRESS`].
pub const CLIENT_NAME: &str = "X-Vpn-Daemon-Client-Name";
/// Header that tells the handlers to answer 403 with this sentence; see [`CLIENT_ADDRESS`].
pub const FORBIDDEN: &str = "X-Vpn-Daemon-Forbidden";

/// Answer with this, then close the connection: where the next request would begin is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// 400, 411, 413 or 431.
    pub status: u16,
    /// The sentence for `{"error": …}`.
    pub reason: &'static str,
}

/// A request head that was understood completely.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the head in the buffer, with its blank line and an empty line ahead of it. The
    /// body begins here.
    pub length: usize,
    /// The method as sent; methods that no call has are for the handlers to refuse.
    pub method: String,
    /// Path and query as sent, not decoded; begins with `/`.
    pub target: String,
    /// The header `Host`.
    pub host: Option<String>,
    /// Bytes of the body, within the call's limit; 0 where there is none.
    pub content_length: usize,
    /// Whether the client wants to send another request after this one.
    pub keep_alive: bool,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub expect_continue: bool,
    /// Whether the client speaks HTTP/1.0, which knows neither chunked answers nor 100.
    pub http10: bool,
    /// Why nothing is to be done for it: a browser page is asking. Fit for a 403.
    pub forbidden: Option<&'static str>,
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

/// Judges `buffer`, what has arrived so far of a connection from the first byte of a request;
/// `seen` bytes of it have been found to be no whole head before. `None`: more bytes are needed.
///
/// # Errors
/// A head that cannot be passed on. More bytes do not change that, nor a head that can.
pub fn check(buffer: &[u8], seen: usize) -> Result<Option<Head>, Refusal> {
    let window = &buffer[..buffer.len().min(MAX_HEAD)];
    // The last bytes once more: a line, or the head, may end in them.
    for end in seen.saturating_sub(3)..window.len() {
        match (window[end], end.checked_sub(1).map(|before| window[before])) {
            (b'\n', Some(b'\r')) if window[..end].ends_with(b"\r\n\r") => {
                // All of it is ASCII.
                let text = str::from_utf8(&window[..end - 1]).map_err(|_| bad(NOT_ASCII))?;
                return parse(text, end + 1).map(Some);
            }
            (b'\n', Some(b'\r')) => {}
            (b'\n', _) => return Err(bad("a line of the request head ends in LF without CR")),
            (_, Some(b'\r')) => return Err(bad("the request head contains a CR without LF")),
            (b'\r' | b'\t' | b' '..=b'~', _) => {}
            (0x80.., _) => return Err(bad(NOT_ASCII)),
            _ => return Err(bad("the request head contains a control character")),
        }
    }
    match window.len() {
        MAX_HEAD => Err(refusal(431, "the request head is over 16 KiB")),
        _ => Ok(None),
    }
}

/// Reads `text`, lines of printable ASCII and tabs, each with its CRLF.
fn parse(text: &str, length: usize) -> Result<Head, Refusal> {
    // RFC 9112, 2.2: one empty line ahead of a request is to be ignored (old clients send it after
    // a body).
    let text = text.strip_prefix("\r\n").unwrap_or(text);
    let (line, fields) = text.split_once("\r\n").ok_or(bad(NOT_A_REQUEST_LINE))?;
    let mut head = request_line(line)?;
    head.length = length;
    let mut seen = Seen::default();
    for (number, line) in fields.split_terminator("\r\n").enumerate() {
        if number >= MAX_HEADERS {
            return Err(refusal(431, "the request has over 100 headers"));
        }
        field(&mut head, &mut seen, line)?;
    }
    head.content_length = body_length(&head, &seen)?;
    if !head.http10 && head.host.is_none() {
        return Err(bad("the header Host is missing, which HTTP/1.1 requires"));
    }
    if seen.content_length.is_some() {
        // Writing to a string cannot fail.
        let _ = write!(head.lines, "Content-Length: {}\r\n", head.content_length);
    }
    if head.http10 {
        head.lines.push_str("Connection: keep-alive\r\n");
    }
    head.keep_alive = !seen.close && (seen.keep_alive || !head.http10);
    // RFC 9110, 10.1.1: to be ignored from an HTTP/1.0 client, and without a body.
    head.expect_continue = seen.expect && !head.http10 && head.content_length > 0;
    Ok(head)
}

fn request_line(line: &str) -> Result<Head, Refusal> {
    let parts: Vec<_> = line.split(' ').collect();
    let [method, target, version] = parts[..] else { return Err(bad(NOT_A_REQUEST_LINE)) };
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
        _ => return Err(bad("the version of the request line is not HTTP/1.0 or HTTP/1.1")),
    };
    let (method, target) = (method.to_owned(), target.to_owned());
    Ok(Head { method, target, http10, lines: format!("{line}\r\n"), ..Head::default() })
}

/// What the header lines said so far, beside what stands in the [`Head`].
#[derive(Default)]
struct Seen {
    content_type: bool,
    content_length: Option<usize>,
    transfer_encoding: bool,
    close: bool,
    keep_alive: bool,
    expect: bool,
}

fn field(head: &mut Head, seen: &mut Seen, line: &str) -> Result<(), Refusal> {
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
            if head.host.replace(value.to_owned()).is_some() {
                return Err(bad("the header Host is repeated"));
            }
            head.lines.push_str(&format!("Host: {value}\r\n"));
        }
        "content-type" => {
            if std::mem::replace(&mut seen.content_type, true) {
                return Err(bad("the header Content-Type is repeated"));
            }
            head.lines.push_str(&format!("Content-Type: {value}\r\n"));
        }
        "content-length" => {
            if seen.content_length.is_some() {
                return Err(bad("the header Content-Length is repeated"));
            }
            // `parse` alone would take a plus sign.
            if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(bad("the header Content-Length is not a plain decimal number"));
            }
            // Of digits alone, only one that is too large cannot be read: over every limit.
            seen.content_length = Some(value.parse().unwrap_or(usize::MAX));
        }
        "transfer-encoding" => seen.transfer_encoding = true,
        "origin" => head.forbidden = Some(ORIGIN),
        // Fetch Metadata: `none` is an address that a user has typed.
        "sec-fetch-site" if !value.eq_ignore_ascii_case("none") => {
            head.forbidden = Some(FETCH_SITE);
        }
        "expect" => {
            if !value.eq_ignore_ascii_case("100-continue") {
                return Err(bad("the header Expect is not 100-continue"));
            }
            seen.expect = true;
        }
        "upgrade" => return Err(bad(UPGRADE)),
        "connection" => {
            for option in value.split(',').map(|option| option.trim_matches([' ', '\t'])) {
                if option.eq_ignore_ascii_case("upgrade") {
                    return Err(bad(UPGRADE));
                }
                seen.close |= option.eq_ignore_ascii_case("close");
                seen.keep_alive |= option.eq_ignore_ascii_case("keep-alive");
            }
        }
        _ => {}
    }
    Ok(())
}

fn body_length(head: &Head, seen: &Seen) -> Result<usize, Refusal> {
    let method = head.method.as_str();
    let path = head.target.split('?').next();
    let (limit, over) = if method == "POST" && path == Some(SYNC_PEERS) {
        (MAX_SYNC, "the body is over 32 MiB")
    } else {
        (MAX_FORM, "the body is over 64 KiB")
    };
    match (method, seen.content_length) {
        // With a length besides it is an attempt at smuggling, not a client to be taught.
        ("POST", None) if seen.transfer_encoding => Err(refusal(411, CHUNKED)),
        _ if seen.transfer_encoding => Err(bad(CHUNKED)),
        ("POST", None) => Err(refusal(411, "the header Content-Length is missing")),
        ("GET" | "HEAD", Some(1..)) => Err(bad(UNEXPECTED_BODY)),
        (_, Some(length)) if length > limit => Err(refusal(413, over)),
        (_, length) => Ok(length.unwrap_or(0)),
    }
}

const NOT_ASCII: &str = "the request head contains a character that is not ASCII";
const NOT_A_REQUEST_LINE: &str =
    "the request line is not a method, a target and a version with one space between them";
const CHUNKED: &str =
    "the header Transfer-Encoding is not taken; a body needs Content-Length instead";
const UNEXPECTED_BODY: &str = "a GET or HEAD request takes no body: Content-Length must be 0";
const UPGRADE: &str = "upgrading the connection to another protocol is not possible";
const ORIGIN: &str = "the request carries an Origin header: this API is not for browser pages";
const FETCH_SITE: &str = "the request carries a Sec-Fetch-Site header other than none: this API is \
                          not for browser pages";

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
