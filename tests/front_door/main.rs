//! The front door of the real daemon: hostile heads, floods, deadlines and TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod attack;
#[path = "../common/mod.rs"]
mod common;
mod life;
mod limits;
#[path = "../common/management.rs"]
mod management;
#[path = "../common/pki.rs"]
mod pki;
mod requests;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::ClientConfig;

use common::{Answer, Daemon};
use pki::{Pki, Tunnel};

/// A connection to the daemon, plain or TLS.
trait Connection: Read + Write + Send {
    fn socket(&self) -> &TcpStream;

    /// Says all that it will ever say.
    fn half_close(&mut self) {
        self.socket().shutdown(Shutdown::Write).unwrap();
    }

    fn send(&mut self, text: &str) {
        self.try_send(text).unwrap();
    }

    /// For times when the daemon may cut a connection.
    fn try_send(&mut self, text: &str) -> io::Result<()> {
        self.write_all(text.as_bytes()).and_then(|()| self.flush())
    }

    fn answer(&mut self) -> Answer {
        Answer::read(self, false).unwrap()
    }

    fn ask(&mut self, request: &str) -> Answer {
        self.try_ask(request).unwrap()
    }

    fn try_ask(&mut self, request: &str) -> io::Result<Answer> {
        self.try_send(request)?;
        Answer::read(self, request.starts_with("HEAD "))
    }

    /// Nothing more comes, and the daemon has not cut the connection: rustls reports an end without
    /// close_notify as an error.
    fn ends(&mut self) {
        let mut rest = Vec::new();
        self.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
    }
}

impl Connection for TcpStream {
    fn socket(&self) -> &TcpStream {
        self
    }
}

impl Connection for Tunnel {
    fn socket(&self) -> &TcpStream {
        &self.sock
    }

    fn half_close(&mut self) {
        self.conn.send_close_notify();
        self.flush().unwrap();
        self.sock.shutdown(Shutdown::Write).unwrap();
    }
}

/// A daemon and the way to speak to it.
struct Site {
    daemon: Daemon,
    tls: Option<(Pki, Arc<ClientConfig>)>,
}

impl Site {
    fn plain(arguments: &[&str]) -> Self {
        Self { daemon: Daemon::start(arguments), tls: None }
    }

    fn tls(arguments: &[&str]) -> Self {
        let pki = Pki::usual();
        let client = pki.client("portal", "portal");
        Self { daemon: pki.daemon(arguments), tls: Some((pki, client)) }
    }

    fn both(arguments: &[&str]) -> [Self; 2] {
        [Self::plain(arguments), Self::tls(arguments)]
    }

    /// With this `SOFT:HARD` limit of open files; what is left out is as for the test.
    fn limited(limit: &str, arguments: &[&str]) -> Self {
        let wrapper = ["prlimit", &format!("--nofile={limit}")];
        Self { daemon: Daemon::start_by(&wrapper, arguments), tls: None }
    }

    /// After the handshake, if there is one.
    fn connect(&self) -> Box<dyn Connection> {
        self.try_connect().unwrap()
    }

    fn try_connect(&self) -> io::Result<Box<dyn Connection>> {
        Ok(match &self.tls {
            None => Box::new(self.daemon.connect()),
            Some((_, client)) => Box::new(pki::connect(client, self.daemon.connect())?),
        })
    }

    /// On a connection of its own.
    fn ask(&self, request: &str) -> Answer {
        self.connect().ask(request)
    }

    /// The status alone.
    fn try_ask(&self, request: &str) -> io::Result<u16> {
        Ok(self.try_connect()?.try_ask(request)?.status)
    }

    fn serves(&self) {
        let answer = self.ask(NODE);
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    /// An OpenVPN process that hangs: every call that asks it is under way for 2.5 s.
    fn hang(&self) -> UnixListener {
        let directory = self.daemon.directory().join("openvpn");
        std::fs::create_dir(&directory).unwrap();
        UnixListener::bind(directory.join("hangs.sock")).unwrap()
    }
}

const NODE: &str = "GET /i/node HTTP/1.1\r\nHost: localhost\r\n\r\n";
const CONNECTIONS: &str = "GET /o/connection_list HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// That request with one more header.
fn with(header: &str, request: &str) -> String {
    request.replace("Host: ", &format!("{header}\r\nHost: "))
}

fn post(target: &str, body: &str) -> String {
    format!(
        "POST {target} HTTP/1.1\r\nHost: localhost\r\n\
         Content-Type: application/x-www-form-urlencoded\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Lets the test process hold a flood open.
fn raise_own_open_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard >= 8192, "the tests need a hard limit of 8192 open files, not {hard}");
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65536), hard).unwrap();
}

/// What lies in a directory, by name.
fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}
