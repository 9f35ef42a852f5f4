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
use std::io::{Read, Write};
use std::net::Shutdown;
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
        Self { daemon: pki.daemon(&[]), pki }
    }

    /// What the daemon has logged while `action` ran, up to the line with `text`. A kind of warning
    /// comes once a second: the action is repeated until it shows.
    fn logs(&self, text: &str, action: impl Fn()) -> String {
        common::wait_for(&format!("a line with {text:?}"), || {
            let seen = self.daemon.log().len();
            action();
            thread::sleep(Duration::from_millis(100));
            self.daemon.log().into_iter().skip(seen).find(|line| line.contains(text))
        })
    }

    /// Reads the files again; the log line that says how that went.
    fn reload(&self) -> String {
        let lines = || self.daemon.log().into_iter().filter(|line| line.contains("SIGHUP: "));
        let seen = lines().count();
        self.daemon.signal("HUP");
        common::wait_for("a reload", || lines().nth(seen))
    }

    /// Puts other files in force.
    fn uses(&self, authorities: &[&str], chain: &[&str]) {
        self.pki.credentials(authorities, chain);
        let line = self.reload();
        assert!(line.contains("new connections use the credentials as they are now"), "{line}");
    }

    fn curl(&self, client: Option<&str>, arguments: &[&str]) -> bool {
        self.pki.curl(self.daemon.address.port(), client, arguments)
    }

    fn accepts(&self, client: &str) {
        assert!(self.curl(Some(client), &[]), "{client}");
    }

    fn refuses(&self, client: Option<&str>, arguments: &[&str], sentence: &str) {
        let line = self.logs(sentence, || assert!(!self.curl(client, arguments), "{sentence}"));
        assert!(line.contains("refused handshake of 127.0.0.1:"), "{line}");
    }
}

/// One connection of `openssl s_client` as `portal` that sends one request: what it printed.
fn s_client(site: &Site, arguments: &str) -> String {
    let mut child = Command::new("openssl")
        .args(["s_client", "-connect", &site.daemon.address.to_string(), "-CAfile", "ca.crt"])
        .args(["-cert", "portal.crt", "-key", "portal.key", "-verify_return_error", "-ign_eof"])
        .args(arguments.split(' '))
        .current_dir(site.pki.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let request = b"GET /i/node HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
    child.stdin.take().unwrap().write_all(request).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn only_tls_1_3_reaches_a_handshake() {
    let site = Site::start(Pki::usual());
    site.refuses(Some("portal"), &["--tls-max", "1.2"], "the client does not speak TLS 1.3");
    // A client that does not trust the server says so.
    let other = Pki::usual();
    fs::copy(other.path("ca.crt"), site.pki.path("other.crt")).unwrap();
    let sentence = "received fatal alert: UnknownCA";
    site.refuses(Some("portal"), &["--cacert", "other.crt"], sentence);

    for (bytes, sentence) in [
        (&b"GET / HTTP/1.1\r\nHost: node1\r\n\r\n"[..], "the client does not speak TLS"),
        (&[0; 64], "the client does not speak TLS"),
        (b"\x16\x03\x01", "unexpected end of file"),
        (b"", "unexpected end of file"),
    ] {
        site.logs(sentence, || {
            let (mut stream, mut alert) = (site.daemon.connect(), Vec::new());
            stream.write_all(bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            // RFC 8446, 6: a record of type 21 with a fatal (2) alert.
            stream.read_to_end(&mut alert).unwrap();
            assert!(bytes.len() < 5 || (alert[0], alert[5]) == (21, 2), "{alert:?}");
        });
    }

    // Any server name, none, and any application protocol.
    for arguments in
        ["-noservername", "-servername other.example", "-alpn h2,http/1.1", "-groups P-256"]
    {
        let printed = s_client(&site, arguments);
        assert!(printed.contains("node_uptime"), "{arguments}: {printed}");
        assert!(printed.contains("No client certificate CA names sent"), "{printed}");
    }
}

#[test]
fn sessions_are_not_resumed() {
    let site = Site::start(Pki::usual());
    // Without a ticket there is nothing to resume.
    let printed = s_client(&site, "-sess_out session.pem");
    assert!(printed.contains("New, TLSv1.3") && printed.contains("node_uptime"), "{printed}");
    assert!(!printed.contains("New Session Ticket"), "{printed}");
    assert!(!site.pki.path("session.pem").exists());
}
