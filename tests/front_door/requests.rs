//! What is asked, and how: requests that must not get through, and all forms of those that do.

use std::io::{Read, Write as _};
use std::thread;
use std::time::Duration;

use super::common::Answer;
use super::{Connection as _, NODE, Site, pki, post, with};

/// Hidden behind a refused request: must never be answered.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// One of each kind; the others stand beside `head.rs`.
const TABLE: &[(&str, u16, &str)] = &[
    ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked", 400, "Tran"),
    ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", 411, "Transfer-Encoding"),
    ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5", 400, "repeated"),
    ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000000000", 413, "64 KiB"),
    ("POST /w/sync_peers HTTP/1.1\r\nHost: a\r\nContent-Length: 33554433", 413, "32 MiB"),
    ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 40", 400, "no body"),
    ("GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n folded: c", 400, "folded"),
    ("GET / HTTP/1.1\nHost: a\n", 400, "LF"),
    ("\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3}", 400, "control"),
];

#[test]
fn what_two_readers_could_read_differently_is_refused() {
    for site in Site::both(&[]) {
        for (request, status, part) in TABLE {
            // Those before it are served, and nothing after it.
            let mut connection = site.connect();
            let requests = format!("{NODE}{request}\r\n\r\n{SMUGGLED}");
            assert_eq!(connection.ask(&requests).status, 200);
            let answer = connection.answer();
            assert_eq!(answer.status, *status, "{request:?}: {answer:?}");
            assert!(answer.error().contains(part), "{request:?}: {answer:?}");
            assert_eq!(answer.header("Connection"), Some("close"));
            connection.ends();
        }
        // With HEAD there is no body, however early it is refused.
        for request in [with("X : a", NODE), NODE.replace("Host", "X")] {
            let mut connection = site.connect();
            let answer = connection.ask(&request.replace("GET", "HEAD"));
            assert_eq!(answer.status, 400, "{request:?}");
            assert_ne!(answer.header("Content-Length"), Some("0"));
            connection.ends();
        }
        site.serves();
    }
}

#[test]
fn heads_bodies_and_answers_at_their_limits() {
    for site in Site::both(&[]) {
        let filled = |length| with(&format!("X: {}", "a".repeat(length)), NODE);
        let room = 16 * 1024 - filled(0).len();
        assert_eq!(site.ask(&filled(room)).status, 200);
        assert_eq!(site.ask(&filled(room + 1)).status, 431);
        // A whole body whatever its size; then what it says is wrong.
        let mut connection = site.connect();
        for length in [16_000, 16_384, 64 * 1024] {
            let answer = connection.ask(&post("/w/add_peer", &"a".repeat(length)));
            assert_eq!(answer.status, 400, "{answer:?}");
            assert!(answer.error().contains("public_key"));
        }
        let target = format!("/{}", "x".repeat(16_300));
        let answer = connection.ask(&NODE.replace("/i/node", &target));
        assert!(answer.status == 404 && answer.error().ends_with(&target));
        assert_eq!(connection.ask(&post("/w/add_peer", &"a".repeat(64 * 1024 + 1))).status, 413);
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
        let disconnect = post("/o/disconnect_client", "common_name=x");
        let answer = connection.ask(&disconnect);
        assert_eq!(answer.status, 204);
        assert_eq!(answer.header("Content-Length"), None, "RFC 9110, 8.6");
        assert_eq!(answer.header("Server"), Some("vpn-daemon"));
        assert_eq!(answer.header("Connection"), None);
        // HTTP/1.0 closes unless it asks to keep.
        let answer = connection.ask("GET /i/node HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!((answer.status, answer.header("Connection")), (200, Some("keep-alive")));
        let answer = connection.ask("GET /i/node HTTP/1.0\r\n\r\n");
        assert_eq!((answer.status, answer.header("Connection")), (200, Some("close")));
        connection.ends();
        // Several at once are answered in their order.
        let mut connection = site.connect();
        let not_found = NODE.replace("/i/node", "/none");
        let (head, last) = (NODE.replace("GET", "HEAD"), with("Connection: close", NODE));
        let all = [NODE, &disconnect, &not_found, "\r\n", &head, &last, SMUGGLED].concat();
        connection.send(&all);
        for (status, is_head) in
            [(200, false), (204, false), (404, false), (200, true), (200, false)]
        {
            assert_eq!(Answer::read(&mut *connection, is_head).unwrap().status, status);
        }
        connection.ends();
        // A client that has said all gets its answer.
        for request in [NODE, &disconnect] {
            let mut connection = site.connect();
            connection.send(request);
            connection.half_close();
            assert!([200, 204].contains(&connection.answer().status), "{request:?}");
            connection.ends();
        }
    }
}

/// Nothing more comes from the network, since rustls has it already.
#[test]
fn what_comes_with_a_request_over_tls_is_not_waited_for() {
    let site = Site::tls(&[]);
    let start = "GET /i/node HTTP/1.1\r\nHost: localhost\r\nX: ";
    let padding = "a".repeat(16 * 1024 - start.len() - 4);
    let mut connection = site.connect();
    connection.send(&format!("{start}{padding}\r\n\r\n{NODE}"));
    assert_eq!([(); 2].map(|()| connection.answer().status), [200; 2]);
    let (_, client) = site.tls.as_ref().unwrap();
    let mut tunnel = pki::connect(client, site.daemon.connect()).unwrap();
    tunnel.conn.writer().write_all(NODE.as_bytes()).unwrap();
    tunnel.conn.send_close_notify();
    tunnel.flush().unwrap();
    assert_eq!(tunnel.answer().status, 200);
    tunnel.ends();
}

#[test]
fn who_waits_for_100_gets_it_before_the_body_is_read() {
    for site in Site::both(&[]) {
        let body = format!("common_name=x&padding={}", "a".repeat(2000));
        let request = with("Expect: 100-Continue", &post("/o/disconnect_client", &body));
        let mut connection = site.connect();
        assert_eq!(connection.ask(request.strip_suffix(&body).unwrap()).status, 100);
        assert_eq!(connection.ask(&body).status, 204);
        // Refused at once, without the body.
        let head = with("Expect: 100-continue\r\nContent-Length: 70000", NODE);
        assert_eq!(connection.ask(&head.replace("GET", "POST")).status, 413);
        connection.ends();
    }
}

#[test]
fn a_request_in_single_bytes_is_understood_and_delays_nobody() {
    for site in Site::both(&[]) {
        let mut slow = [(); 3].map(|()| site.connect());
        for character in post("/o/disconnect_client", "common_name=x").chars() {
            slow.iter_mut().for_each(|connection| connection.send(&character.to_string()));
            thread::sleep(Duration::from_millis(2));
        }
        for mut connection in slow {
            assert_eq!(connection.answer().status, 204);
        }
    }
}

/// Clients that leave in the middle of everything, and others beside them who must never see
/// an answer that was not meant for them.
#[test]
fn nobody_gets_the_answer_of_another() {
    for site in Site::both(&[]) {
        let come_and_go = |worker: usize| {
            for round in 0..40 {
                // A path that names its asker: the sentence of the 404 repeats it.
                let mine = format!("/none/{worker}/{round}");
                let mut connection = site.connect();
                let answer = connection.ask(&NODE.replace("/i/node", &mine));
                assert!(answer.error().ends_with(&mine), "{answer:?}");
                let long = post(&mine, &"a".repeat(3000));
                connection.send(&long[..(round * 83) % long.len()]);
            }
            for round in 0..40 {
                // Asks and leaves without an answer, or with a part of it.
                let mut connection = site.connect();
                connection.send(&[NODE, NODE, &NODE.replace("GET", "HEAD")].concat());
                connection.read_exact(&mut vec![0; round]).unwrap();
            }
        };
        thread::scope(|scope| {
            for worker in 0..4 {
                scope.spawn(move || come_and_go(worker));
            }
        });
        site.serves();
    }
}
