//! Owns the proof that what `head.rs` passes is read by tiny_http as the same single request, and
//! that what two readers could read in two ways is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use vpn_daemon::front::head::{self, Head, MAX_HEAD, MAX_HEADERS};

mod oracle;
use oracle::Oracle;

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
        String::from_utf8(head.rewritten(&[(head::CLIENT_ADDRESS, "192.0.2.1")])).unwrap(),
        "POST /w/add_peer HTTP/1.1\r\nHost: vpn.example.org:41194\r\n\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 16\r\n\
         X-Vpn-Daemon-Client: 192.0.2.1\r\n\r\n"
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
fn what_can_be_read_in_two_ways_is_refused() {
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
        ("Content_Length: 5", 411, "Content-Length"),
        ("X: y", 411, "Content-Length"),
        ("Content-Length : 5", 400, "white space"),
        ("Content-Length\t: 5", 400, "white space"),
        (" Content-Length: 5", 400, "white space"),
        ("\tContent-Length: 5", 400, "white space"),
        ("Content-Length: 5\r\n 0", 400, "folded"),
        ("X: y\r\n\tTransfer-Encoding: chunked", 400, "folded"),
        ("X: y\r\n \r\nContent-Length: 5", 400, "folded"),
        ("Content-Length: 5\nX: y", 400, "LF"),
        ("X: y\n\nGET /", 400, "LF"),
        ("X: y\rContent-Length: 5", 400, "CR"),
        ("X: y\r\r\nContent-Length: 5", 400, "CR"),
        ("X: \0", 400, "control"),
        ("Content-Length: 5\0", 400, "control"),
        ("X: \x0b", 400, "control"),
        ("X: \x7f", 400, "control"),
        ("X: \u{85}", 400, "ASCII"),
        ("Content-Length\u{a0}: 5", 400, "ASCII"),
        ("X y: 5", 400, "token"),
        ("X\"y: 5", 400, "token"),
        (": 5", 400, "token"),
        ("X", 400, "colon"),
        ("Host: node", 400, "Host"),
        ("Content-Type: a/b\r\nContent-type: a/b", 400, "Content-Type"),
        ("Expect: 200-ok", 400, "Expect"),
        ("Expect:", 400, "Expect"),
        ("Upgrade: h2c", 400, "upgrading"),
        ("Connection: close, UPGRADE", 400, "upgrading"),
        ("Connection: \t,\tupgrade\t,", 400, "upgrading"),
    ] {
        refused(&oracle, post(headers).as_bytes(), status, word);
    }
    refused(&oracle, get("Content-Length: 5").as_bytes(), 400, "no body");
    refused(&oracle, get("Content-Length: 18446744073709551616").as_bytes(), 400, "no body");
    refused(&oracle, get("Transfer-Encoding: chunked").as_bytes(), 400, "Transfer-Encoding");
    let sync = "POST /w/sync_peers HTTP/1.1\r\nHost: a\r\nContent-Length: 33554433\r\n\r\n";
    refused(&oracle, sync.as_bytes(), 413, "32 MiB");
    let sync = sync.replace("33554433", "18446744073709551616");
    refused(&oracle, sync.as_bytes(), 413, "32 MiB");
    for other in
        ["PUT /w/sync_peers", "POST /w/sync_peers/", "POST /W/sync_peers", "POST /?/w/sync_peers"]
    {
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
        get("X-Vpn-Daemon-Client: forged\r\nx-vpn-daemon-client-NAME: forged\r\n\
             X_Vpn_Daemon_Client: forged\r\nX-Vpn-Daemon-Client-Name: forged")
        .as_bytes(),
    );
    // The oracle compares what tiny_http sees; this is for the reader.
    assert!(!String::from_utf8(head.rewritten(&[])).unwrap().contains("forged"));
    let name = head.rewritten(&[(head::CLIENT_NAME, "a\r\nContent-Length: 5\r\n\r\n% \0é")]);
    assert!(name.ends_with(b"-Name: a%0D%0AContent-Length: 5%0D%0A%0D%0A%25 %00%C3%A9\r\n\r\n"));
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
