//! What is asked, and how: requests that must not get through, and all forms of those that do.

use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use super::common::Answer;
use super::{NODE, Site, post};

/// Hidden behind a refused request: must never be answered.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// One of each kind; the others stand beside `head.rs`.
const TABLE: &[(&str, u16, &str)] = &[
    ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked", 400, "Tran"),
    ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", 411, "Transfer-Encoding"),
    ("POST / HTTP/1.1\r\nHost: a", 411, "Content-Length"),
    ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5", 400, "repeated"),
    ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000000000", 413, "64 KiB"),
    ("POST /w/sync_peers HTTP/1.1\r\nHost: a\r\nContent-Length: 33554433", 413, "32 MiB"),
    ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 40", 400, "no body"),
    ("GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n folded: c", 400, "folded"),
    ("GET / HTTP/1.1\nHost: a\n", 400, "LF"),
    ("GET / HTTP/1.1\r\nHost: a\r\nX: \0", 400, "control"),
    ("GET / HTTP/1.1\r\nX: a", 400, "Host"),
    ("GET http://a/ HTTP/1.1\r\nHost: a", 400, "slash"),
    ("GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c", 400, "upgrad"),
    ("\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3}", 400, "control"),
];

#[test]
fn what_two_readers_could_read_differently_is_refused() {
    for site in Site::both(&[]) {
        for (request, status, part) in TABLE {
            let mut connection = site.connect();
            let answer = connection.ask(&format!("{request}\r\n\r\n{SMUGGLED}"));
            assert_eq!(answer.status, *status, "{request:?}: {answer:?}");
            assert!(answer.error().contains(part), "{request:?}: {answer:?}");
            assert_eq!(answer.header("Connection"), Some("close"));
            connection.ends();
        }
        site.serves();
    }
}

#[test]
fn a_refused_head_request_is_answered_without_a_body() {
    for site in Site::both(&[]) {
        for request in
            [NODE.replace("Host", "X : a\r\nHost"), format!("\r\n{NODE}").replace("Host", "X")]
        {
            let mut connection = site.connect();
            let request = request.replace("GET", "HEAD");
            connection.write_all(request.as_bytes()).unwrap();
            connection.flush().unwrap();
            let answer = Answer::read(&mut *connection, true).unwrap();
            assert_eq!(answer.status, 400, "{request:?}");
            assert!(answer.header("Content-Length").unwrap().parse::<u32>().unwrap() > 2);
            connection.ends();
        }
    }
}

#[test]
fn a_refused_request_ends_a_connection_that_served_others() {
    for site in Site::both(&[]) {
        let mut connection = site.connect();
        assert_eq!(connection.ask(NODE).status, 200);
        let requests = format!("{NODE}GET /i/node HTTP/1.1\r\nX : a\r\n\r\n{SMUGGLED}");
        assert_eq!(connection.ask(&requests).status, 200);
        assert_eq!(Answer::read(&mut *connection, false).unwrap().status, 400);
        connection.ends();
    }
}

#[test]
fn heads_and_bodies_at_their_limits() {
    for site in Site::both(&[]) {
        let head = |filler: usize| {
            let start = "GET /i/node HTTP/1.1\r\nHost: localhost\r\nX: ";
            format!("{start}{}\r\n\r\n", "a".repeat(filler - start.len() - 4))
        };
        assert_eq!(site.ask(&head(16 * 1024)).status, 200);
        assert_eq!(site.ask(&head(16 * 1024 + 1)).status, 431);
        let headers = |count: usize| {
            format!(
                "GET /i/node HTTP/1.1\r\nHost: localhost\r\n{}\r\n",
                "X: a\r\n".repeat(count - 1)
            )
        };
        assert_eq!(site.ask(&headers(100)).status, 200);
        assert_eq!(site.ask(&headers(101)).status, 431);
        // A whole body whatever its size; then what it says is wrong.
        let answer = site.ask(&post("/w/add_peer", &"a".repeat(64 * 1024)));
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.error().contains("public_key"));
        assert_eq!(site.ask(&post("/w/add_peer", &"a".repeat(64 * 1024 + 1))).status, 413);
    }
}

#[test]
fn statuses_of_requests_that_get_through() {
    let site = Site::plain(&[]);
    for (request, status, allow) in [
        (NODE.replace("Host", "Origin: https://x.example\r\nHost"), 403, None),
        (NODE.replace("/i/node", "/none"), 404, None),
        (post("/none", "a=b"), 404, None),
        (post("/i/node", ""), 405, Some("GET, HEAD")),
        (NODE.replace("GET", "DELETE"), 405, Some("GET, HEAD")),
        (NODE.replace("GET", "PATCH").replace("/i/node", "/w/peer_list"), 405, Some("GET, HEAD")),
        (NODE.replace("/i/node", "/w/add_peer"), 405, Some("POST")),
        (NODE.replace("/i/node", "/o/disconnect_client"), 405, Some("POST")),
        (post("/w/add_peer", "a=b").replace("x-www-form-urlencoded", "json"), 415, None),
        (post("/w/add_peer", "a=b"), 400, None),
        (NODE.replace("/i/node", "/i/node?include_client_peer_count=maybe"), 400, None),
        (NODE.replace("/i/node", "/w/peer_list"), 502, None),
    ] {
        // These leave the connection usable.
        let mut connection = site.connect();
        let answer = connection.ask(&request);
        assert_eq!(answer.status, status, "{request:?}: {answer:?}");
        assert!(!answer.error().is_empty());
        assert_eq!(answer.header("Allow"), allow, "{request:?}");
        if let Some(methods) = allow {
            let path = request.split(' ').nth(1).unwrap();
            let sentence = format!("{path} takes only {}", methods.replace(", ", " or "));
            assert_eq!(answer.error(), sentence);
        }
        assert_eq!(connection.ask(NODE).status, 200, "after {request:?}");
    }
}

#[test]
fn answers_fit_the_form_of_the_request() {
    for site in Site::both(&[]) {
        let mut connection = site.connect();
        let answer = connection.ask(&NODE.replace("GET", "HEAD"));
        assert_eq!((answer.status, answer.body.as_str()), (200, ""));
        assert_eq!(answer.header("Content-Type"), Some("application/json"));
        assert!(answer.header("Content-Length").unwrap().parse::<u32>().unwrap() > 2);
        // No client is connected, and there is nobody to ask.
        let answer = connection.ask(&post("/o/disconnect_client", "common_name=x"));
        assert_eq!(answer.status, 204);
        assert_eq!(answer.header("Content-Length"), None, "RFC 9110, 8.6");
        assert_eq!(answer.header("Server"), Some("vpn-daemon"));
        assert_eq!(answer.header("Connection"), None);
        // Several at once are answered in their order.
        let many = [
            NODE,
            &post("/o/disconnect_client", "common_name=x"),
            &NODE.replace("/i/node", "/none"),
            "\r\n",
            &NODE.replace("GET", "HEAD"),
            &NODE.replace("Host", "Connection: close\r\nHost"),
            SMUGGLED,
        ];
        connection.write_all(many.concat().as_bytes()).unwrap();
        connection.flush().unwrap();
        for (status, is_head) in
            [(200, false), (204, false), (404, false), (200, true), (200, false)]
        {
            assert_eq!(Answer::read(&mut *connection, is_head).unwrap().status, status);
        }
        connection.ends();
    }
}

#[test]
fn http_1_0_closes_unless_it_asks_to_keep() {
    for site in Site::both(&[]) {
        let mut connection = site.connect();
        let answer = connection.ask("GET /i/node HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("Connection"), Some("keep-alive"));
        let answer = connection.ask("GET /i/node HTTP/1.0\r\n\r\n");
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("Connection"), Some("close"));
        connection.ends();
    }
}

#[test]
fn a_client_that_has_said_all_gets_its_answer() {
    for site in Site::both(&[]) {
        for request in [NODE.to_owned(), post("/o/disconnect_client", "common_name=x")] {
            let mut connection = site.connect();
            connection.write_all(request.as_bytes()).unwrap();
            connection.flush().unwrap();
            connection.half_close();
            let answer = Answer::read(&mut *connection, false).unwrap();
            assert!([200, 204].contains(&answer.status), "{answer:?}");
            connection.ends();
        }
    }
}

#[test]
fn who_waits_for_100_gets_it_before_the_body_is_read() {
    for site in Site::both(&[]) {
        let body = format!("common_name=x&padding={}", "a".repeat(2000));
        let request = post("/o/disconnect_client", &body);
        let (head, _) = request.split_at(request.len() - body.len());
        let head = head.replace("Host", "Expect: 100-Continue\r\nHost");
        let mut connection = site.connect();
        assert_eq!(connection.ask(&head).status, 100);
        assert_eq!(connection.ask(&body).status, 204);
        // Refused at once, without the body.
        let mut connection = site.connect();
        let head = "POST /w/add_peer HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\
                    Content-Length: 70000\r\n\r\n";
        assert_eq!(connection.ask(head).status, 413);
        connection.ends();
    }
}

#[test]
fn a_request_in_single_bytes_is_understood_and_delays_nobody() {
    for site in Site::both(&[]) {
        let mut slow: Vec<_> = (0..3).map(|_| site.connect()).collect();
        let request = post("/o/disconnect_client", "common_name=x");
        for byte in request.as_bytes() {
            for connection in &mut slow {
                connection.write_all(&[*byte]).unwrap();
                connection.flush().unwrap();
            }
            thread::sleep(Duration::from_millis(2));
        }
        for connection in &mut slow {
            assert_eq!(Answer::read(&mut **connection, false).unwrap().status, 204);
        }
    }
}

/// Clients that leave in the middle of everything, and others beside them who must never see
/// an answer that was not meant for them.
#[test]
fn nobody_gets_the_answer_of_another() {
    for site in Site::both(&[]) {
        thread::scope(|scope| {
            for worker in 0..4 {
                let site = &site;
                scope.spawn(move || {
                    for round in 0..40 {
                        // A path that names its asker: the sentence of the 404 repeats it.
                        let mine = format!("/none/{worker}/{round}");
                        let request = NODE.replace("/i/node", &mine);
                        let mut connection = site.connect();
                        let answer = connection.ask(&request);
                        assert!(answer.error().ends_with(&mine), "{answer:?}");
                        let long = post(&mine, &"a".repeat(3000));
                        let cut = (round * 83) % long.len();
                        connection.write_all(&long.as_bytes()[..cut]).unwrap();
                        connection.write_all(b"").unwrap();
                        connection.flush().unwrap();
                    }
                    for round in 0..40 {
                        // Asks and leaves without an answer, or with a part of it.
                        let mut connection = site.connect();
                        let large = format!("{NODE}{NODE}{}", NODE.replace("GET", "HEAD"));
                        connection.write_all(large.as_bytes()).unwrap();
                        connection.flush().unwrap();
                        let mut part = vec![0; round];
                        connection.read_exact(&mut part).unwrap();
                    }
                });
            }
        });
        site.serves();
    }
}
