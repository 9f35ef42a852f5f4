//! Is this request head safe to pass on? Bytes in, verdict out.
//!
//! The HTTP library behind is lenient and fragile (it reads lines without limit, takes the first
//! of two lengths, and aborts on a huge one). It therefore never sees what a client sent, only
//! [`Head::rewritten`]: a head made anew from the parts that were understood here. The grammar is
//! RFC 9112's without its leniencies; where two readers could disagree, the head is refused.

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
/// Header with the number of the connection that waits for the answer. Only the front door sets it:
/// a client's headers go no further than [`check`], but for those that it writes anew.
pub const CONNECTION: &str = "X-Vpn-Daemon-Connection";
/// Header that tells the handlers who asks, fit for a log; see [`CONNECTION`].
pub const CALLER: &str = "X-Vpn-Daemon-Caller";
/// Header that tells the handlers to answer 403 with this sentence; see [`CONNECTION`].
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
    /// knows) and always asks for the connection to be kept. Values in `extra` are made safe: they
    /// are encoded as in a form. Names must be header names.
    #[must_use]
    pub fn rewritten(&self, extra: &[(&str, &str)]) -> Vec<u8> {
        let mut head = self.lines.clone();
        for (name, value) in extra {
            let value: String = form_urlencoded::byte_serialize(value.as_bytes()).collect();
            head.push_str(&format!("{name}: {value}\r\n"));
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
    for end in seen..window.len() {
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
    let has_host = head.http10 || head.host.is_some();
    ensure(has_host, "the header Host is missing, which HTTP/1.1 requires")?;
    if seen.content_length.is_some() {
        head.lines.push_str(&format!("Content-Length: {}\r\n", head.content_length));
    }
    if head.http10 {
        head.lines.push_str("Connection: keep-alive\r\n");
    }
    head.keep_alive = !seen.close && (head.keep_alive || !head.http10);
    // RFC 9110, 10.1.1: to be ignored from an HTTP/1.0 client, and without a body.
    head.expect_continue &= !head.http10 && head.content_length > 0;
    Ok(head)
}

fn request_line(line: &str) -> Result<Head, Refusal> {
    let parts: Vec<_> = line.split(' ').collect();
    let [method, target, version] = parts[..] else { return Err(bad(NOT_A_REQUEST_LINE)) };
    ensure(is_token(method), "the method of the request line is not a token")?;
    ensure(target.starts_with('/'), "the target of the request line does not begin with a slash")?;
    let is_plain = target.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
    ensure(is_plain, "the target of the request line contains a character that it may not")?;
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
}

fn field(head: &mut Head, seen: &mut Seen, line: &str) -> Result<(), Refusal> {
    let is_folded = line.starts_with([' ', '\t']);
    ensure(!is_folded, "a header line begins with white space (folded headers are refused)")?;
    let (name, value) =
        line.split_once(':').ok_or(bad("a header line does not contain a colon"))?;
    let is_joined = !name.ends_with([' ', '\t']);
    ensure(is_joined, "a header has white space between its name and the colon")?;
    ensure(is_token(name), "the name of a header is not a token")?;
    let value = value.trim_matches([' ', '\t']);
    match name.to_ascii_lowercase().as_str() {
        "host" => {
            // RFC 3986, 3.2.2 and 3.2.3: a host with an optional port.
            let fits = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%:[]".contains(&b);
            ensure(value.bytes().all(fits), "the header Host is not a host name or address")?;
            ensure(head.host.replace(value.to_owned()).is_none(), "the header Host is repeated")?;
            head.lines.push_str(&format!("Host: {value}\r\n"));
        }
        "content-type" => {
            ensure(!seen.content_type, "the header Content-Type is repeated")?;
            seen.content_type = true;
            head.lines.push_str(&format!("Content-Type: {value}\r\n"));
        }
        "content-length" => {
            ensure(seen.content_length.is_none(), "the header Content-Length is repeated")?;
            // `parse` alone would take a plus sign.
            let is_plain = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
            ensure(is_plain, "the header Content-Length is not a plain decimal number")?;
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
            head.expect_continue = value.eq_ignore_ascii_case("100-continue");
            ensure(head.expect_continue, "the header Expect is not 100-continue")?;
        }
        "upgrade" => return Err(bad(UPGRADE)),
        "connection" => {
            for option in value.split(',').map(|option| option.trim_matches([' ', '\t'])) {
                ensure(!option.eq_ignore_ascii_case("upgrade"), UPGRADE)?;
                seen.close |= option.eq_ignore_ascii_case("close");
                head.keep_alive |= option.eq_ignore_ascii_case("keep-alive");
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

fn ensure(holds: bool, reason: &'static str) -> Result<(), Refusal> {
    if holds { Ok(()) } else { Err(bad(reason)) }
}

fn refusal(status: u16, reason: &'static str) -> Refusal {
    Refusal { status, reason }
}

/// RFC 9110, 5.6.2.
fn is_token(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(fits)
}

/// Proof that what passes here is read by tiny_http as the same single request, and that what two
/// readers could read in two ways is refused.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::head;

    use crate::oracle::Oracle;

    /// A POST whose headers end with `headers`.
    fn post(headers: &str) -> String {
        format!("POST /w/add_peer HTTP/1.1\r\nHost: node\r\n{headers}\r\n\r\n")
    }

    /// A GET whose headers end with `headers`.
    fn get(headers: &str) -> String {
        format!("GET /i/node HTTP/1.1\r\nHost: node\r\n{headers}\r\n\r\n")
    }

    fn passed(oracle: &Oracle, request: &[u8]) -> Head {
        match oracle.judge(request) {
            Ok(Some(head)) => head,
            other => panic!("{:?}: {other:?}", String::from_utf8_lossy(request)),
        }
    }

    fn refused(oracle: &Oracle, request: &[u8], status: u16, word: &str) {
        match oracle.judge(request) {
            Err(refusal) if refusal.status == status && refusal.reason.contains(word) => {}
            other => panic!("{:?}: {other:?}", String::from_utf8_lossy(request)),
        }
    }

    #[test]
    fn the_portals_requests_pass() {
        let oracle = Oracle::new();
        let request = "POST /w/add_peer HTTP/1.1\r\nHost: vpn.example.org:41194\r\nAccept: */*\r\n\
            Content-Length: 16\r\nContent-Type: application/x-www-form-urlencoded\r\n\
            Expect: 100-continue\r\n\r\nip_net=10.0.0.1%";
        let head = passed(&oracle, request.as_bytes());
        assert_eq!(head.length, request.len() - 16);
        assert_eq!((head.method.as_str(), head.target.as_str()), ("POST", "/w/add_peer"));
        assert_eq!(head.content_length, 16);
        assert!(head.keep_alive && head.expect_continue && !head.http10);
        assert_eq!(
            String::from_utf8(head.rewritten(&[(head::CALLER, "192.0.2.1")])).unwrap(),
            "POST /w/add_peer HTTP/1.1\r\nHost: vpn.example.org:41194\r\n\
             Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 16\r\n\
             X-Vpn-Daemon-Caller: 192.0.2.1\r\n\r\n"
        );

        let head = passed(&oracle, b"GET /i/node?include_client_peer_count=yes HTTP/1.0\r\n\r\n");
        assert_eq!(head.target, "/i/node?include_client_peer_count=yes");
        assert!(!head.keep_alive && !head.expect_continue && head.http10);
        assert_eq!(
            head.rewritten(&[]),
            b"GET /i/node?include_client_peer_count=yes HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        );
    }

    #[test]
    fn well_formed_requests_pass() {
        let oracle = Oracle::new();
        for request in [
            get("Accept: */*"),
            get("Content-Length: 0"),
            get("Host_: a\r\nX-Empty:\r\nX-Spaces: \t a \t b \t "),
            get("Origin: null\r\nOrigin: https://example.org"),
            get("Transfer_Encoding: chunked\r\nTE: chunked\r\nTrailer: Host"),
            get("Connection: host, te\r\nKeep-Alive: 5\r\nProxy-Connection: upgrade"),
            "\r\nGET / HTTP/1.1\r\nHost:\r\n\r\n".into(),
            "GET //..%2f%00?a=b&c=[\"|]^`{}\\ HTTP/1.1\r\nhOST: [fd00::1]:41194\r\n\r\n".into(),
            "HEAD /i/node HTTP/1.0\r\nHost: node\r\n\r\n".into(),
            "OPTIONS / HTTP/1.1\r\nHost: a\r\n\r\n".into(),
            "CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n".into(),
            "b!~ew / HTTP/1.1\r\nHost: a\r\n\r\n".into(),
            "PUT /w/add_peer HTTP/1.1\r\nHost: a\r\n\r\n".into(),
            "DELETE / HTTP/1.1\r\nHost: a\r\nContent-Length: 1025\r\n\r\n".into(),
            post("Content-Length: 0"),
            post("Content-Length: 1024"),
            post("Content-Length: 1025"),
            post("content-LENGTH:\t00065536 \t"),
            post("Content-Length: 2\r\nContent_Length: 3\r\nContent-Length-: 4"),
            post("Expect: 100-CONTINUE\r\nContent-Length: 5000"),
            "POST /w/sync_peers HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n".into(),
            "POST /w/sync_peers?dry_run=yes HTTP/1.0\r\nContent-Length: 33554432\r\n\r\n".into(),
        ] {
            assert_eq!(passed(&oracle, request.as_bytes()).length, request.len());
        }
    }

    #[test]
    fn a_body_that_can_be_read_in_two_ways_is_refused() {
        let oracle = Oracle::new();
        for (headers, status, word) in [
            ("Content-Length: 5\r\nTransfer-Encoding: chunked", 400, "Transfer-Encoding"),
            ("Transfer-Encoding: chunked\r\nContent-Length: 5", 400, "Transfer-Encoding"),
            ("Transfer-Encoding: chunked", 411, "Transfer-Encoding"),
            ("tRANSFER-eNCODING: xchunked", 411, "Transfer-Encoding"),
            ("Transfer-Encoding:\tidentity", 411, "Transfer-Encoding"),
            ("Transfer-Encoding:", 411, "Transfer-Encoding"),
            ("Content-Length: 5\r\nContent-Length: 5", 400, "repeated"),
            ("Content-Length: 5\r\nContent-Length: 6", 400, "repeated"),
            ("Content-Length: 5\r\nContent-Length:", 400, "repeated"),
            ("Content-Length: +5", 400, "Content-Length"),
            ("Content-Length: -5", 400, "Content-Length"),
            ("Content-Length: 0x5", 400, "Content-Length"),
            ("Content-Length: 5,5", 400, "Content-Length"),
            ("Content-Length:  5 5", 400, "Content-Length"),
            ("Content-Length: 5\t5", 400, "Content-Length"),
            ("Content-Length: 5.0", 400, "Content-Length"),
            ("Content-Length: 5e1", 400, "Content-Length"),
            ("Content-Length: \"5\"", 400, "Content-Length"),
            ("Content-Length:", 400, "plain decimal"),
            ("Content-Length: 18446744073709551616", 413, "64 KiB"),
            ("Content-Length: 99999999999999999999999999999999999999999999999999", 413, "64 KiB"),
            ("Content-Length: 18446744073709551616, 5", 400, "Content-Length"),
            ("Content-Length: 18446744073709551616\r\nContent-Length: 5", 400, "repeated"),
            ("Content-Length: 5\r\nContent-Length: 18446744073709551616", 400, "repeated"),
            (
                "Transfer-Encoding: chunked\r\nContent-Length: 18446744073709551616",
                400,
                "Transfer-Encoding",
            ),
            ("Content-Length: 18446744073709551615", 413, "64 KiB"),
            ("Content-Length: 100000000000000", 413, "64 KiB"),
            ("Content-Length: 65537", 413, "64 KiB"),
            ("Content_Length: 5", 411, "Content-Length is missing"),
            ("X: y", 411, "Content-Length is missing"),
        ] {
            refused(&oracle, post(headers).as_bytes(), status, word);
        }
        refused(&oracle, get("Content-Length: 5").as_bytes(), 400, "no body");
        refused(&oracle, get("Content-Length: 18446744073709551616").as_bytes(), 400, "no body");
        refused(&oracle, get("Transfer-Encoding: chunked").as_bytes(), 400, "Transfer-Encoding");
    }

    #[test]
    fn a_header_line_that_can_be_read_in_two_ways_is_refused() {
        let oracle = Oracle::new();
        for (headers, word) in [
            ("Content-Length : 5", "white space"),
            ("Content-Length\t: 5", "white space"),
            (" Content-Length: 5", "white space"),
            ("\tContent-Length: 5", "white space"),
            ("Content-Length: 5\r\n 0", "folded"),
            ("X: y\r\n\tTransfer-Encoding: chunked", "folded"),
            ("X: y\r\n \r\nContent-Length: 5", "folded"),
            ("Content-Length: 5\nX: y", "LF"),
            ("X: y\n\nGET /", "LF"),
            ("X: y\rContent-Length: 5", "CR"),
            ("X: y\r\r\nContent-Length: 5", "CR"),
            ("X: \0", "control"),
            ("Content-Length: 5\0", "control"),
            ("X: \x0b", "control"),
            ("X: \x7f", "control"),
            ("X: \u{85}", "ASCII"),
            ("Content-Length\u{a0}: 5", "ASCII"),
            ("X y: 5", "token"),
            ("X\"y: 5", "token"),
            (": 5", "token"),
            ("X", "colon"),
            ("Host: node", "Host"),
            ("Content-Type: a/b\r\nContent-type: a/b", "Content-Type"),
            ("Expect: 200-ok", "Expect"),
            ("Expect:", "Expect"),
            ("Upgrade: h2c", "upgrading"),
            ("Connection: close, UPGRADE", "upgrading"),
            ("Connection: \t,\tupgrade\t,", "upgrading"),
        ] {
            refused(&oracle, post(headers).as_bytes(), 400, word);
        }
    }

    #[test]
    fn only_sync_peers_has_a_large_body() {
        let oracle = Oracle::new();
        let sync = "POST /w/sync_peers HTTP/1.1\r\nHost: a\r\nContent-Length: 33554433\r\n\r\n";
        refused(&oracle, sync.as_bytes(), 413, "32 MiB");
        let sync = sync.replace("33554433", "18446744073709551616");
        refused(&oracle, sync.as_bytes(), 413, "32 MiB");
        for other in [
            "PUT /w/sync_peers",
            "POST /w/sync_peers/",
            "POST /W/sync_peers",
            "POST /?/w/sync_peers",
        ] {
            let request = format!("{other} HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n");
            refused(&oracle, request.as_bytes(), 413, "64 KiB");
        }
    }

    #[test]
    fn malformed_request_lines_and_hosts_are_refused() {
        let oracle = Oracle::new();
        for (line, word) in [
            ("GET /", "request line"),
            ("GET  / HTTP/1.1", "request line"),
            ("GET / HTTP/1.1 ", "request line"),
            (" GET / HTTP/1.1", "request line"),
            ("GET / / HTTP/1.1", "request line"),
            ("GET\t/ HTTP/1.1", "request line"),
            ("GET /\tHTTP/1.1", "request line"),
            ("G(T / HTTP/1.1", "method"),
            ("GET /a\tb HTTP/1.1", "target"),
            ("GET /a#b HTTP/1.1", "target"),
            ("GET http://node/ HTTP/1.1", "slash"),
            ("GET i/node HTTP/1.1", "slash"),
            ("OPTIONS * HTTP/1.1", "slash"),
            ("CONNECT node:1 HTTP/1.1", "slash"),
            ("GET / HTTP/0.9", "version"),
            ("GET / HTTP/1.2", "version"),
            ("GET / HTTP/01.1", "version"),
            ("GET / HTTP/2.0", "version"),
            ("GET / http/1.1", "version"),
            ("PRI * HTTP/2.0", "slash"),
        ] {
            let request = format!("{line}\r\nHost: node\r\n\r\n");
            refused(&oracle, request.as_bytes(), 400, word);
        }
        refused(&oracle, b"GET / HTTP/1.1\r\n\r\n", 400, "Host");
        refused(&oracle, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "Host");
        refused(&oracle, b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "Host");
        refused(&oracle, b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", 400, "Host");
        refused(&oracle, b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "request line");
    }

    #[test]
    fn what_cannot_become_a_request_is_refused_at_once() {
        let oracle = Oracle::new();
        refused(&oracle, b"\x16", 400, "control"); // TLS on a plain port
        refused(&oracle, b"\n", 400, "LF");
        refused(&oracle, b"\rG", 400, "CR");
        refused(&oracle, b"GET /\xff", 400, "ASCII");
        for start in ["", "\r", "\r\n", "GET", "GET / HTTP/1.1\r\nHost: a\r\n\r"] {
            assert_eq!(oracle.judge(start.as_bytes()), Ok(None));
        }
    }

    #[test]
    fn a_head_has_at_most_16_kib_and_100_headers() {
        let oracle = Oracle::new();
        let frame = get("X: ").len();
        let largest = get(&format!("X: {}", "a".repeat(MAX_HEAD - frame)));
        assert_eq!(passed(&oracle, largest.as_bytes()).length, MAX_HEAD);
        let larger = get(&format!("X: {}", "a".repeat(MAX_HEAD - frame + 1)));
        refused(&oracle, larger.as_bytes(), 431, "16 KiB");
        for endless in ["a", "GET / HTTP/1.1\r\nX: ", "GET / HTTP/1.1\r\n"] {
            let mut buffer = endless.as_bytes().to_vec();
            buffer.resize(MAX_HEAD - 1, b'a');
            assert_eq!(oracle.judge(&buffer), Ok(None));
            buffer.push(b'a');
            refused(&oracle, &buffer, 431, "16 KiB");
            buffer.extend_from_slice(b"\0 and 1 MiB more".repeat(1 << 16).as_slice());
            assert_eq!(head::check(&buffer, 0).unwrap_err().status, 431);
        }

        let most = "X: y\r\n".repeat(MAX_HEADERS - 1);
        passed(&oracle, get(most.trim_end()).as_bytes());
        refused(&oracle, get(&(most + "X: y")).as_bytes(), 431, "100 headers");
    }

    #[test]
    fn the_head_ends_where_the_body_or_the_next_request_begins() {
        let oracle = Oracle::new();
        let first = get("Accept: */*");
        assert_eq!(passed(&oracle, first.repeat(2).as_bytes()).length, first.len());
        let hidden = post("Content-Length: 40");
        let both = format!("{hidden}{}", get("X: hidden in the body"));
        assert_eq!(passed(&oracle, both.as_bytes()).length, hidden.len());
    }

    #[test]
    fn the_client_decides_whether_the_connection_is_kept() {
        for (version, headers, kept) in [
            ("1.1", "", true),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "Connection: x\r\nconnection: keep-alive ,\tCLOSE\r\n", false),
            ("1.1", "Connection: closed\r\n", true),
            ("1.0", "", false),
            ("1.0", "Connection: Keep-Alive\r\n", true),
            ("1.0", "Connection: close, keep-alive\r\n", false),
        ] {
            let request = format!("GET / HTTP/{version}\r\nHost: a\r\n{headers}\r\n");
            let head = head::check(request.as_bytes(), 0).unwrap().unwrap();
            assert_eq!(head.keep_alive, kept, "{request}");
        }
    }

    #[test]
    fn only_who_has_a_body_to_send_waits_for_100() {
        for (version, headers, waits) in [
            ("1.1", "Expect: 100-continue\r\nContent-Length: 1", true),
            ("1.1", "Expect: 100-continue\r\nContent-Length: 0", false),
            ("1.1", "Content-Length: 1", false),
            ("1.0", "Expect: 100-continue\r\nContent-Length: 1", false),
        ] {
            let request = post(headers).replace("1.1", version);
            let head = head::check(request.as_bytes(), 0).unwrap().unwrap();
            assert_eq!(head.expect_continue, waits, "{request}");
        }
    }

    #[test]
    fn browser_pages_are_told_from_programs() {
        let oracle = Oracle::new();
        for (header, name) in [
            ("Origin: null", Some("Origin")),
            ("origin:", Some("Origin")),
            ("SEC-fetch-site: same-origin", Some("Sec-Fetch-Site")),
            ("Sec-Fetch-Site:", Some("Sec-Fetch-Site")),
            ("Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate", None),
            ("X-Vpn-Daemon-Forbidden: forged", None),
        ] {
            let forbidden = passed(&oracle, get(header).as_bytes()).forbidden;
            assert_eq!(forbidden.is_some(), name.is_some(), "{header}");
            assert!(forbidden.unwrap_or_default().contains(name.unwrap_or_default()), "{header}");
        }
    }

    #[test]
    fn only_the_front_door_says_who_the_client_is() {
        let oracle = Oracle::new();
        let head = passed(
            &oracle,
            get("X-Vpn-Daemon-Caller: forged\r\nx-vpn-daemon-CALLER: forged\r\n\
                 X_Vpn_Daemon_Caller: forged\r\nX-Vpn-Daemon-Connection: 1")
            .as_bytes(),
        );
        // The oracle compares what tiny_http sees; this is for the reader.
        assert!(!String::from_utf8(head.rewritten(&[])).unwrap().contains("Daemon"));
        let name = head.rewritten(&[(head::CALLER, "a\r\nContent-Length: 5\r\n\r\n% \0é")]);
        assert!(
            name.ends_with(b"-Caller: a%0D%0AContent-Length%3A+5%0D%0A%0D%0A%25+%00%C3%A9\r\n\r\n")
        );
    }

    /// What the fuzzer begins with, and what it found.
    #[test]
    fn the_fuzzers_seeds_agree() {
        let oracle = Oracle::new();
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/head");
        let files: Vec<_> = std::fs::read_dir(seeds).unwrap().collect();
        assert!(!files.is_empty());
        for file in files {
            let _ = oracle.judge(&std::fs::read(file.unwrap().path()).unwrap());
        }
    }
}
