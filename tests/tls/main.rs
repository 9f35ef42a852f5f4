//! Real TLS over loopback: `openssl` makes the certificates, `curl` and `openssl s_client` connect.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod clients;
mod files;
#[path = "../common/pki.rs"]
mod pki;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use pki::{CA, CLIENT, Pki, SERVER};
use rustls::{ServerConnection, StreamOwned};
use vpn_daemon::tls::{ClientName, Reason, Refusal, Tls};

/// The end of every handshake: the client's name, or why it was refused.
type Outcome = Result<Option<String>, Refusal>;

/// Accepts until the test process ends; each connection is answered `hello NAME` per request.
struct Server {
    tls: Arc<Tls>,
    port: u16,
    outcomes: Receiver<Outcome>,
}

impl Server {
    fn start(pki: &Pki) -> Self {
        let tls = Tls::open(&pki.credentials_directory()).unwrap_or_else(|error| panic!("{error}"));
        let tls = Arc::new(tls);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, outcomes) = channel();
        let accepting = tls.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (tls, sender) = (accepting.clone(), sender.clone());
                thread::spawn(move || serve(stream.unwrap(), &tls, &sender));
            }
        });
        Self { tls, port, outcomes }
    }

    fn outcome(&self) -> Outcome {
        self.outcomes.recv_timeout(Duration::from_secs(30)).unwrap()
    }

    fn accepts(&self, pki: &Pki, client: &str) {
        let body = pki.curl(self.port, Some(client), &[]);
        let outcome = self.outcome();
        assert!(outcome.is_ok(), "{client}: {outcome:?}");
        assert!(body.is_some_and(|body| body.starts_with("hello ")), "{client}");
    }

    fn refuses(&self, pki: &Pki, client: Option<&str>, reason: Reason) -> Refusal {
        let body = pki.curl(self.port, client, &[]);
        assert_eq!(body, None, "{client:?}");
        let refusal = self.outcome().expect_err(client.unwrap_or("no certificate"));
        assert_eq!(refusal.reason, reason, "{client:?}: {refusal}");
        refusal
    }
}

fn serve(stream: TcpStream, tls: &Tls, outcomes: &Sender<Outcome>) {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut stream = StreamOwned::new(ServerConnection::new(tls.config()).unwrap(), stream);
    while stream.conn.is_handshaking() {
        if let Err(error) = stream.conn.complete_io(&mut stream.sock) {
            let _ = outcomes.send(Err(Refusal::from(&error)));
            return;
        }
    }
    let name = ClientName::of(&stream.conn.peer_certificates().unwrap()[0]);
    let name = name.map(|name| name.to_string());
    let _ = outcomes.send(Ok(name.clone()));
    let body = format!("hello {}\n", name.unwrap_or_default());
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut head = Vec::new();
    let mut byte = [0];
    while matches!(stream.read(&mut byte), Ok(1)) {
        head.push(byte[0]);
        if head.ends_with(b"\r\n\r\n") {
            head.clear();
            stream.write_all(answer.as_bytes()).unwrap();
        }
    }
}

/// Puts the issuer's certificate behind the client's own.
fn bundle(pki: &Pki, client: &str, issuer: &str) {
    let file = format!("{client}.crt");
    fs::write(pki.path(&file), pki.read(&file) + &pki.read(&format!("{issuer}.crt"))).unwrap();
}

/// One connection of `openssl s_client` as `portal` that sends one request: what it printed.
fn s_client(pki: &Pki, port: u16, arguments: &[&str]) -> (String, bool) {
    let mut child = Command::new("openssl")
        .args(["s_client", "-connect", &format!("127.0.0.1:{port}"), "-CAfile", "ca.crt"])
        .args(["-cert", "portal.crt", "-key", "portal.key", "-verify_return_error"])
        .args(arguments)
        .current_dir(pki)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"GET / HTTP/1.1\n\nQ\n").unwrap();
    let output = child.wait_with_output().unwrap();
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success())
}

#[test]
fn only_tls_1_3_reaches_a_handshake() {
    let pki = Pki::usual();
    let server = Server::start(&pki);
    assert_eq!(pki.curl(server.port, Some("portal"), &["--tls-max", "1.2"]), None);
    assert_eq!(server.outcome().unwrap_err().reason, Reason::OldProtocol);

    // A client that does not trust the server says so.
    let other = Pki::usual();
    fs::copy(other.path("ca.crt"), pki.path("other.crt")).unwrap();
    assert_eq!(pki.curl_trusting("other.crt", server.port, Some("portal"), &[]), None);
    let refusal = server.outcome().unwrap_err();
    assert_eq!(refusal.reason, Reason::ServerRefused);
    assert!(refusal.to_string().ends_with("(alert UnknownCA)"), "{refusal}");

    for (bytes, reason) in [
        (&b"GET / HTTP/1.1\r\nHost: node1\r\n\r\n"[..], Reason::NotTls),
        (&[0; 64], Reason::NotTls),
        (b"\x16\x03\x01", Reason::Closed),
        (b"", Reason::Closed),
    ] {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let refusal = server.outcome().unwrap_err();
        assert_eq!(refusal.reason, reason, "{bytes:?}: {refusal}");
    }

    // Any server name, none, and any application protocol.
    for arguments in [
        &["-noservername"][..],
        &["-servername", "other.example"],
        &["-alpn", "h2"],
        &["-alpn", "h2,http/1.1"],
        &["-groups", "P-256"],
    ] {
        let (_, success) = s_client(&pki, server.port, arguments);
        assert!(success, "{arguments:?}");
        assert!(server.outcome().is_ok(), "{arguments:?}");
    }
}

#[test]
fn sessions_are_not_resumed() {
    let pki = Pki::usual();
    let server = Server::start(&pki);
    let (printed, _) = s_client(&pki, server.port, &["-sess_out", "session.pem"]);
    assert!(printed.contains("New, TLSv1.3"), "{printed}");
    assert!(!printed.contains("New Session Ticket"), "{printed}");
    if pki.path("session.pem").exists() {
        let (printed, _) = s_client(&pki, server.port, &["-sess_in", "session.pem"]);
        assert!(printed.contains("New, TLSv1.3"), "{printed}");
        assert!(!printed.contains("Reused"), "{printed}");
    }
}

#[test]
fn reload() {
    let pki = Pki::usual();
    let server = Server::start(&pki);
    let mut old = Command::new("openssl")
        .args(["s_client", "-quiet", "-connect", &format!("127.0.0.1:{}", server.port)])
        .args(["-CAfile", "ca.crt", "-cert", "portal.crt", "-key", "portal.key"])
        .current_dir(&pki)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut requests = old.stdin.take().unwrap();
    let mut answers = old.stdout.take().unwrap();
    let mut ask = || {
        requests.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"hello portal\n") {
            answers.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
    };
    ask();
    assert!(server.outcome().is_ok());

    // Everything is new: the CA, the server, the client.
    pki.authority("new", None, CA);
    pki.issue("node", "new", SERVER);
    pki.issue("client", "new", CLIENT);
    pki.credentials(&["new.crt"], &["node.crt"], "node.key");
    server.tls.reload().unwrap();
    let body = pki.curl_trusting("new.crt", server.port, Some("client"), &[]);
    assert_eq!(body.as_deref(), Some("hello client\n"));
    assert!(server.outcome().is_ok());
    assert_eq!(pki.curl_trusting("new.crt", server.port, Some("portal"), &[]), None);
    assert_eq!(server.outcome().unwrap_err().reason, Reason::UnknownIssuer);
    ask();

    // Whatever file is broken, the ones before stay in force.
    for file in ["ca.crt", "server.crt", "server.key", "ca.crl"] {
        let good = fs::read(pki.credential(file)).ok();
        fs::write(pki.credential(file), "broken").unwrap();
        let sentence = server.tls.reload().unwrap_err().to_string();
        assert!(sentence.starts_with(pki.credential(file).to_str().unwrap()), "{sentence}");
        let body = pki.curl_trusting("new.crt", server.port, Some("client"), &[]);
        assert_eq!(body.as_deref(), Some("hello client\n"), "{file}");
        assert!(server.outcome().is_ok());
        match good {
            Some(good) => fs::write(pki.credential(file), good).unwrap(),
            None => fs::remove_file(pki.credential(file)).unwrap(),
        }
    }
    server.tls.reload().unwrap();
    ask();
    drop(requests);
    old.kill().unwrap();
    old.wait().unwrap();
}
