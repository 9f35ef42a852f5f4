//! TLS of the real daemon: `openssl` makes the certificates, `curl` and `openssl s_client` connect.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod clients;
#[path = "../common/mod.rs"]
mod common;
mod effort;
mod files;
#[path = "../common/pki.rs"]
mod pki;

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::Daemon;
use pki::Pki;

/// A daemon with the credentials of a PKI.
struct Site {
    pki: Pki,
    daemon: Daemon,
}

impl Site {
    fn start(pki: Pki) -> Self {
        let daemon = Daemon::start_with(&[], |command| {
            command.env("CREDENTIALS_DIRECTORY", pki.credentials_directory());
        });
        Self { pki, daemon }
    }

    fn port(&self) -> u16 {
        self.daemon.address.port()
    }

    /// What the daemon has logged while `action` ran, up to the line with `text`. A kind of warning
    /// comes once a second: the action is repeated until it shows.
    fn logs(&self, text: &str, action: impl Fn()) -> String {
        for _ in 0..20 {
            let seen = self.daemon.log().len();
            action();
            for _ in 0..10 {
                let log = self.daemon.log();
                if let Some(line) = log[seen..].iter().find(|line| line.contains(text)) {
                    return line.clone();
                }
                thread::sleep(Duration::from_millis(30));
            }
        }
        panic!("no line with {text:?}");
    }

    /// Reads the files again; the log line that says how that went.
    fn reload(&self) -> String {
        let lines = || self.daemon.log().into_iter().filter(|line| line.contains("SIGHUP: "));
        let seen = lines().count();
        self.daemon.signal("HUP");
        (0..1000)
            .find_map(|_| {
                thread::sleep(Duration::from_millis(20));
                lines().nth(seen)
            })
            .unwrap()
    }

    fn accepts(&self, client: &str) {
        assert!(self.pki.curl(self.port(), Some(client), &[]).is_some(), "{client}");
    }

    fn refuses(&self, client: Option<&str>, sentence: &str) {
        self.refuses_curl(client, &[], sentence);
    }

    fn refuses_curl(&self, client: Option<&str>, arguments: &[&str], sentence: &str) {
        let line = self.logs(sentence, || {
            let answer = self.pki.curl(self.port(), client, arguments);
            assert_eq!(answer, None, "{client:?} {arguments:?}");
        });
        assert!(line.contains("refused handshake of 127.0.0.1:"), "{line}");
    }
}

/// One connection of `openssl s_client` as `portal` that sends one request: what it printed.
fn s_client(site: &Site, arguments: &[&str]) -> (String, bool) {
    let mut child = Command::new("openssl")
        .args(["s_client", "-connect", &site.daemon.address.to_string(), "-CAfile", "ca.crt"])
        .args(["-cert", "portal.crt", "-key", "portal.key", "-verify_return_error"])
        .args(arguments)
        .current_dir(&site.pki)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let request = b"GET /i/node HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
    child.stdin.take().unwrap().write_all(request).unwrap();
    let output = child.wait_with_output().unwrap();
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success())
}

#[test]
fn only_tls_1_3_reaches_a_handshake() {
    let site = Site::start(Pki::usual());
    let tls_1_2 = ["--tls-max", "1.2"];
    site.refuses_curl(Some("portal"), &tls_1_2, "the client does not speak TLS 1.3");
    // A client that does not trust the server says so.
    let other = Pki::usual();
    fs::copy(other.path("ca.crt"), site.pki.path("other.crt")).unwrap();
    let distrust = ["--cacert", "other.crt"];
    site.refuses_curl(Some("portal"), &distrust, "received fatal alert: UnknownCA");

    for (bytes, sentence) in [
        (&b"GET / HTTP/1.1\r\nHost: node1\r\n\r\n"[..], "the client does not speak TLS"),
        (&[0; 64], "the client does not speak TLS"),
        (b"\x16\x03\x01", "unexpected end of file"),
        (b"", "unexpected end of file"),
    ] {
        site.logs(sentence, || {
            let mut stream = TcpStream::connect(site.daemon.address).unwrap();
            stream.write_all(bytes).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        });
    }

    // Any server name, none, and any application protocol.
    for arguments in [
        &["-noservername"][..],
        &["-servername", "other.example"],
        &["-alpn", "h2"],
        &["-alpn", "h2,http/1.1"],
        &["-groups", "P-256"],
    ] {
        let (printed, success) = s_client(&site, &[&["-ign_eof"], arguments].concat());
        assert!(success && printed.contains("node_uptime"), "{arguments:?}: {printed}");
    }
}

#[test]
fn sessions_are_not_resumed() {
    let site = Site::start(Pki::usual());
    let (printed, _) = s_client(&site, &["-ign_eof", "-sess_out", "session.pem"]);
    assert!(printed.contains("New, TLSv1.3"), "{printed}");
    assert!(!printed.contains("New Session Ticket"), "{printed}");
    if site.pki.path("session.pem").exists() {
        let (printed, _) = s_client(&site, &["-ign_eof", "-sess_in", "session.pem"]);
        assert!(printed.contains("New, TLSv1.3"), "{printed}");
        assert!(!printed.contains("Reused"), "{printed}");
    }
}

#[test]
fn whatever_file_is_broken_the_ones_before_stay_in_force() {
    let site = Site::start(Pki::usual());
    for file in ["ca.crt", "server.crt", "server.key", "ca.crl"] {
        let path = site.pki.credential(file);
        let good = fs::read(&path).ok();
        fs::write(&path, "broken").unwrap();
        let line = site.reload();
        assert!(line.contains(&format!("stay in force: {} ", path.display())), "{line}");
        site.accepts("portal");
        match good {
            Some(good) => fs::write(path, good).unwrap(),
            None => fs::remove_file(path).unwrap(),
        }
    }
    site.reload();
    site.accepts("portal");
}
