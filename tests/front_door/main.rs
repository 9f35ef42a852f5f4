//! The front door of the real daemon: hostile heads, floods, deadlines and TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod attack;
#[path = "../common/mod.rs"]
mod common;
mod https;
mod life;
mod limits;
#[path = "../common/pki.rs"]
mod pki;
mod requests;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use common::{Answer, Daemon};
use pki::{Pki, SERVER_NAME};

/// A connection to the daemon, plain or TLS.
trait Connection: Read + Write + Send {
    fn socket(&self) -> &TcpStream;

    /// Says all that it will ever say.
    fn half_close(&mut self) {
        self.socket().shutdown(Shutdown::Write).unwrap();
    }

    fn ask(&mut self, request: &str) -> Answer {
        self.write_all(request.as_bytes()).unwrap();
        self.flush().unwrap();
        Answer::read(self, request.starts_with("HEAD ")).unwrap()
    }

    /// Nothing more comes, and the daemon has not cut the connection.
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
    client: Option<Arc<ClientConfig>>,
    _pki: Option<Pki>,
}

impl Site {
    fn plain(arguments: &[&str]) -> Self {
        Self { daemon: Daemon::start(arguments), client: None, _pki: None }
    }

    fn tls(arguments: &[&str]) -> Self {
        let pki = Pki::usual();
        let daemon = start_tls(&pki, arguments);
        Self { daemon, client: Some(client(&pki, "portal")), _pki: Some(pki) }
    }

    fn both(arguments: &[&str]) -> [Self; 2] {
        [Self::plain(arguments), Self::tls(arguments)]
    }

    /// After the handshake, if there is one.
    fn connect(&self) -> Box<dyn Connection> {
        self.try_connect().unwrap()
    }

    fn try_connect(&self) -> std::io::Result<Box<dyn Connection>> {
        Ok(match &self.client {
            None => Box::new(self.daemon.connect()),
            Some(client) => Box::new(shake_hands(client, self.daemon.connect())?),
        })
    }

    /// On a connection of its own.
    fn ask(&self, request: &str) -> Answer {
        self.connect().ask(request)
    }

    /// For times when the daemon may cut a connection.
    fn try_ask(&self, request: &str) -> std::io::Result<Answer> {
        let mut connection = self.try_connect()?;
        connection.write_all(request.as_bytes())?;
        connection.flush()?;
        Answer::read(&mut *connection, false)
    }

    fn serves(&self) {
        let answer = self.ask(NODE);
        assert_eq!(answer.status, 200, "{answer:?}");
    }
}

fn start_tls(pki: &Pki, arguments: &[&str]) -> Daemon {
    Daemon::start_with(arguments, |command| {
        command.env("CREDENTIALS_DIRECTORY", pki.credentials_directory());
    })
}

/// A TLS client that trusts `ca.crt` and has the certificate and key of this name.
fn client(pki: &Pki, name: &str) -> Arc<ClientConfig> {
    let certificates = |file: &str| {
        let certificates = CertificateDer::pem_file_iter(pki.path(file)).unwrap();
        certificates.map(Result::unwrap).collect::<Vec<_>>()
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates("ca.crt"));
    let provider = rustls::crypto::ring::default_provider();
    let builder = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let key = PrivateKeyDer::from_pem_file(pki.path(&format!("{name}.key"))).unwrap();
    let chain = certificates(&format!("{name}.crt"));
    Arc::new(builder.with_client_auth_cert(chain, key).unwrap())
}

type Tunnel = StreamOwned<ClientConnection, TcpStream>;

fn shake_hands(client: &Arc<ClientConfig>, mut stream: TcpStream) -> std::io::Result<Tunnel> {
    let name = SERVER_NAME.try_into().unwrap();
    let mut connection = ClientConnection::new(Arc::clone(client), name).unwrap();
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    // The client's certificate is in the last flight.
    while connection.wants_write() {
        connection.complete_io(&mut stream)?;
    }
    Ok(StreamOwned::new(connection, stream))
}

const NODE: &str = "GET /i/node HTTP/1.1\r\nHost: localhost\r\n\r\n";
const CONNECTIONS: &str = "GET /o/connection_list HTTP/1.1\r\nHost: localhost\r\n\r\n";

fn post(target: &str, body: &str) -> String {
    format!(
        "POST {target} HTTP/1.1\r\nHost: localhost\r\n\
         Content-Type: application/x-www-form-urlencoded\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// An OpenVPN process that hangs: every call that asks it is under way for 2.5 s.
fn hang(daemon: &Daemon) -> UnixListener {
    let directory = daemon.directory().join("openvpn");
    std::fs::create_dir(&directory).unwrap();
    UnixListener::bind(directory.join("hangs.sock")).unwrap()
}

/// Makes `command` run with this `soft:hard` limit of open files; without a number, the one of the
/// test stays.
fn limit_open_files(command: &mut Command, limit: &str) {
    let mut limited = Command::new("prlimit");
    limited.arg(format!("--nofile={limit}")).arg(command.get_program());
    limited.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    *command = limited;
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
