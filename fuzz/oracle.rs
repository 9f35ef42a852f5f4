//! Owns the oracle of `head.rs`: what it passes, the real tiny_http reads as the same request.

use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tiny_http::{Request, Response, Server};
use vpn_daemon::front::head::{self, Head, Refusal};

/// Whoever waits longer hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longer bodies are cut off here: the pair must stand that as well, and a test stays quick.
const MOST_SENT: usize = head::MAX_FORM;
const NEXT: &[u8] = b"GET /next HTTP/1.1\r\nHost: next\r\n\r\n";
const EXTRA: [(&str, &str); 2] =
    [(head::CONNECTION, "192.0.2.1:5"), (head::CALLER, "100 %\r\nX: ü")];
const EXTRA_READ: [(&str, &str); 2] =
    [(head::CONNECTION, "192.0.2.1%3A5"), (head::CALLER, "100+%25%0D%0AX%3A+%C3%BC")];

/// A tiny_http server as the daemon has one, on a Unix socket that leaves no file behind.
pub(crate) struct Oracle {
    // Dropping it would panic: it expects a socket with a path.
    server: ManuallyDrop<Server>,
    address: SocketAddr,
}

impl Oracle {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("vpn-daemon-head-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let server = ManuallyDrop::new(Server::from_listener(listener, None).unwrap());
        Self { server, address }
    }

    /// Judges `buffer` at once and in pieces, and sends to tiny_http what is passed. Panics where
    /// anything disagrees; returns the verdict.
    pub(crate) fn judge(&self, buffer: &[u8]) -> Result<Option<Head>, Refusal> {
        let verdict = head::check(buffer, 0);
        assert_eq!(in_pieces(buffer), verdict, "byte by byte");
        match &verdict {
            Ok(None) => assert!(buffer.len() < head::MAX_HEAD),
            Err(refusal) => {
                assert!([400, 411, 413, 431].contains(&refusal.status), "{refusal:?}");
            }
            Ok(Some(head)) => {
                assert!(head.length <= head::MAX_HEAD);
                let (sent, rest) = buffer.split_at(head.length);
                assert_eq!(head::check(sent, 0), verdict, "without what follows");
                assert_eq!(head::check(&sent[..sent.len() - 1], 0), Ok(None));
                self.exchange(head, sent, rest);
            }
        }
        verdict
    }

    fn exchange(&self, head: &Head, sent: &[u8], rest: &[u8]) {
        let mut body = rest.to_vec();
        body.resize(head.content_length.min(MOST_SENT), b'\n');
        let whole = body.len() == head.content_length;

        let mut message = head.rewritten(&EXTRA);
        message.extend_from_slice(&body);
        if whole {
            message.extend_from_slice(NEXT);
        }
        let mut stream = UnixStream::connect_addr(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&message).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();

        let mut request = self.next();
        assert_eq!(request.method().as_str(), head.method);
        assert_eq!(request.url(), head.target);
        assert_eq!(request.http_version(), &tiny_http::HTTPVersion(1, u8::from(!head.http10)));
        assert_eq!(request.body_length().unwrap_or(0), head.content_length);
        let headers: Vec<_> = request
            .headers()
            .iter()
            .map(|header| (header.field.to_string(), header.value.to_string()))
            .collect();
        assert_eq!(headers, expected_headers(head, sent));
        let mut read = Vec::new();
        request.as_reader().read_to_end(&mut read).unwrap();
        assert_eq!(read, body);
        request.respond(Response::empty(204)).unwrap();
        if whole {
            let next = self.next();
            assert_eq!((next.method().as_str(), next.url()), ("GET", "/next"));
            assert_eq!(next.headers().len(), 1);
            next.respond(Response::empty(204)).unwrap();
        }

        // It ends only when tiny_http is done with the connection.
        let mut answers = String::new();
        stream.read_to_string(&mut answers).unwrap();
        assert_eq!(answers.matches(" 204 No Content\r\n").count(), 1 + usize::from(whole));
        assert_eq!(answers.matches("HTTP/1.").count(), 1 + usize::from(whole), "{answers}");
        assert!(self.server.try_recv().unwrap().is_none(), "a request nobody sent");
    }

    fn next(&self) -> Request {
        self.server.recv_timeout(PATIENCE).unwrap().expect("tiny_http gave no request")
    }
}

/// The verdict on `buffer` as it arrives byte by byte, which the first final one decides.
fn in_pieces(buffer: &[u8]) -> Result<Option<Head>, Refusal> {
    let verdicts = (0..=buffer.len()).map(|end| head::check(&buffer[..end], end.saturating_sub(1)));
    verdicts.into_iter().find(|verdict| *verdict != Ok(None)).unwrap_or(Ok(None))
}

/// The headers that handlers must see, read from what was sent in another way than `head.rs` does.
fn expected_headers(head: &Head, sent: &[u8]) -> Vec<(String, String)> {
    let sent = std::str::from_utf8(sent).unwrap();
    let fields = sent.trim_start().lines().skip(1).filter_map(|line| line.split_once(':'));
    let mut headers = Vec::new();
    let mut length = None;
    for (name, value) in fields {
        let value = value.trim().to_owned();
        match name.to_lowercase().as_str() {
            "host" => headers.push(("Host".to_owned(), value)),
            "content-type" => headers.push(("Content-Type".to_owned(), value)),
            "content-length" => {
                length = Some(("Content-Length".to_owned(), head.content_length.to_string()));
                assert_eq!(value.trim_start_matches('0').parse().unwrap_or(0), head.content_length);
            }
            _ => {}
        }
    }
    headers.extend(length);
    if head.http10 {
        headers.push(("Connection".to_owned(), "keep-alive".to_owned()));
    }
    headers.extend(EXTRA_READ.map(|(name, value)| (name.to_owned(), value.to_owned())));
    headers
}
