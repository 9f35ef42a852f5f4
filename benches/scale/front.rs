//! The front door: requests and TLS handshakes a second, beside `tiny_http` without it and beside
//! `openssl s_server`.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use tiny_http::{Header, Response, Server};

use crate::ROLE;
use crate::common::{Daemon, TempDir, connect};
use crate::measure::Turns;
use crate::pki::Pki;
use crate::table::Table;
use crate::vm::which;

/// The value of `ROLE` for `tiny_http` without the front door.
pub const ALONE: &str = "tiny_http";

const ROUNDS: usize = 7;
/// Seconds of one measurement.
const SECONDS: &str = "2";

pub fn measure(_: &Path) -> Vec<Table> {
    let (daemon, alone) = (Daemon::start(&[]), Alone::start());
    let mut rows = Vec::new();
    for (work, headers, limit) in [
        ("keep-alive", &[][..], Some(1.0 / 0.6)),
        ("a new connection each", &["-H", "Connection: close"], None),
    ] {
        let turns =
            Turns::take(ROUNDS, || wrk(daemon.address, headers), || wrk(alone.address, headers));
        rows.push(row(work, "tiny_http alone", &turns, limit));
    }
    let pki = Pki::usual();
    let tls = Daemon::start_with(&[], |command| {
        command.env("CREDENTIALS_DIRECTORY", pki.credentials_directory());
    });
    let server = OpensslServer::start(&pki);
    let turns =
        Turns::take(ROUNDS, || handshakes(tls.address, &pki), || handshakes(server.address, &pki));
    // A client of TLS 1.3 is done before it hears whether its certificate is taken.
    let complaints: Vec<_> =
        tls.log().into_iter().filter(|line| !line.contains(" INFO ")).collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
    rows.push(row("full TLS 1.3 handshakes", "openssl s_server", &turns, None));
    vec![Table {
        title: "The front door: `GET /i/node`",
        columns: &["work", "the daemon", "floor", "which is", "share of the floor", "at least"],
        rows,
    }]
}

/// Rates: the more the better, so the ratio is turned round.
fn row(work: &str, floor: &str, turns: &Turns, limit: Option<f64>) -> Vec<String> {
    let share = turns.ratio();
    let under = limit.is_some_and(|limit| share < 1.0 / limit);
    vec![
        work.to_owned(),
        format!("{:.0}/s", turns.daemon()),
        format!("{:.0}/s", turns.floor()),
        floor.to_owned(),
        format!("{:.0} %{}", share * 100.0, if under { " (under)" } else { "" }),
        limit.map_or("–".to_owned(), |limit| format!("{:.0} %", 100.0 / limit)),
    ]
}

/// Requests a second over 8 connections.
fn wrk(address: SocketAddr, headers: &[&str]) -> f64 {
    let output = Command::new(which("wrk"))
        .args(["-t1", "-c8", "-d", SECONDS])
        .args(headers)
        .arg(format!("http://{address}/i/node"))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("Non-2xx"), "{text}");
    number_after(&text, "Requests/sec:")
}

fn number_after(text: &str, label: &str) -> f64 {
    let (_, rest) = text.split_once(label).unwrap_or_else(|| panic!("no {label} in {text}"));
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

/// Full handshakes a second with a client certificate, one after another.
fn handshakes(address: SocketAddr, pki: &Pki) -> f64 {
    let output = Command::new(which("openssl"))
        .args(["s_time", "-new", "-tls1_3", "-time", SECONDS])
        .args(["-connect", &address.to_string()])
        .arg("-CAfile")
        .arg(pki.path("ca.crt"))
        .arg("-cert")
        .arg(pki.path("portal.crt"))
        .arg("-key")
        .arg(pki.path("portal.key"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // "1234 connections in 3 real seconds, 0 bytes read per connection"
    let line = text.lines().find(|line| line.contains("real seconds"));
    let line = line.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    let mut numbers = line.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
    let (connections, seconds) = (numbers.next().unwrap(), numbers.next().unwrap());
    connections / seconds
}

/// `tiny_http` on a TCP port of its own with the daemon's answers and nothing in front.
struct Alone {
    process: Child,
    address: SocketAddr,
}

impl Alone {
    fn start() -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, ALONE)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { process, address: line.trim().parse().unwrap() }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process of [`Alone`]: an answer as long as the daemon's.
pub fn serve_alone() {
    const BODY: &str = r#"{"cpu_count":2,"load_average":[0.55,0.76,0.75],"maintenance_mode":false,"node_uptime":3828,"rel_load_average":[27,38,37],"v":"0.1.0"}"#;
    let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
    println!("{}", server.server_addr());
    let receive = move || {
        while let Ok(http) = server.recv() {
            let mut response = Response::from_data(BODY);
            for (name, value) in [("Server", "vpn-daemon"), ("Content-Type", "application/json")] {
                response.add_header(Header::from_bytes(name, value).unwrap());
            }
            let _ = http.respond(response);
        }
    };
    let other = receive.clone();
    std::thread::spawn(other);
    receive();
}

/// `openssl s_server` with the same certificates and the same demands.
struct OpensslServer {
    process: Child,
    address: SocketAddr,
    _directory: TempDir,
}

impl OpensslServer {
    fn start(pki: &Pki) -> Self {
        // It takes no port 0: one that was free a moment ago.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let directory = TempDir::new("s_server");
        let process = Command::new(which("openssl"))
            .args(["s_server", "-quiet", "-tls1_3", "-Verify", "1", "-verify_return_error"])
            .args(["-accept", &address.to_string()])
            .arg("-CAfile")
            .arg(pki.path("ca.crt"))
            .arg("-cert")
            .arg(pki.path("server.crt"))
            .arg("-key")
            .arg(pki.path("server.key"))
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { process, address, _directory: directory };
        for _ in 0..500 {
            if std::net::TcpStream::connect(address).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        drop(connect(address));
        server
    }
}

impl Drop for OpensslServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
