//! The front door: requests a second beside `tiny_http` alone, TLS handshakes a second beside
//! `openssl s_server`; and what the daemon weighs.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tiny_http::{Header, Response, Server};

use crate::common::{Answer, Daemon, connect, wait_until};
use crate::pki::Pki;
use crate::programs::Process;
use crate::row::{Row, Unit, turns};
use crate::{Say, get};

const ROUNDS: usize = 7;
const SECONDS: u64 = 2; // of one measurement

pub fn measure(say: Say) {
    let size = |work, bytes, limit| {
        Row::new(Unit::Size, work, 0, "", limit, vec![(bytes as f64 / 1024.0 / 1024.0, 1.0)])
    };
    let program = std::fs::metadata(env!("CARGO_BIN_EXE_vpn-daemon")).unwrap();
    say(size("release binary", program.len(), 3.0));
    let daemon = Daemon::start(&[]);
    let answer = get(&daemon, "/i/node");
    say(size("idle: resident memory", daemon.status("VmRSS") * 1024, 5.0));

    let alone = serve_alone(answer);
    for (work, connections, keep_alive) in [
        ("node, keep-alive", 8, true),
        ("node, new connections", 4, false),
        ("node, new connections", 64, false),
    ] {
        let rate = |address| requests(address, connections, keep_alive);
        let rounds = turns(ROUNDS, || rate(daemon.address), || rate(alone));
        say(Row::new(Unit::Rate, work, connections, "tiny_http alone", 0.7, rounds));
    }

    let pki = Pki::usual();
    let tls = Daemon::start_with(&[], |command| {
        command.env("CREDENTIALS_DIRECTORY", pki.credentials_directory());
    });
    let (_process, server) = openssl_server(&pki);
    let rounds = turns(ROUNDS, || handshakes(tls.address, &pki), || handshakes(server, &pki));
    // A client of TLS 1.3 is done before it hears whether its certificate is taken.
    let log = tls.log();
    assert!(log.iter().all(|line| line.contains(" INFO ")), "{log:#?}");
    say(Row::new(Unit::Rate, "TLS 1.3 handshakes", 1, "openssl s_server", 1.3, rounds));
}

/// Requests a second by that many clients at the same time.
fn requests(address: SocketAddr, clients: usize, keep_alive: bool) -> f64 {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let request =
        format!("GET /i/node HTTP/1.1\r\nHost: {address}\r\nConnection: {connection}\r\n\r\n");
    let end = Instant::now() + Duration::from_secs(SECONDS);
    let client = || {
        let mut stream = BufReader::new(connect(address));
        let mut count = 0_u32;
        while Instant::now() < end {
            stream.get_mut().write_all(request.as_bytes()).unwrap();
            assert_eq!(Answer::read(&mut stream, false).unwrap().status, 200);
            if !keep_alive {
                stream = BufReader::new(connect(address));
            }
            count += 1;
        }
        count
    };
    let count: u32 = thread::scope(|scope| {
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    f64::from(count) / SECONDS as f64
}

/// Full handshakes a second, one after another.
fn handshakes(address: SocketAddr, pki: &Pki) -> f64 {
    let start = Instant::now();
    let options = "s_time -new -tls1_3 -CAfile ca.crt -cert portal.crt -key portal.key";
    let output = Command::new("openssl")
        .args(options.split(' '))
        .args(["-time", &SECONDS.to_string(), "-connect", &address.to_string()])
        .current_dir(pki.path(""))
        .output()
        .unwrap();
    let elapsed = start.elapsed().as_secs_f64();
    let text = String::from_utf8_lossy(&output.stdout);
    // "1234 connections in 3 real seconds, 0 bytes read per connection": rounded seconds.
    let line = text.lines().find(|line| line.contains("real seconds"));
    let line = line.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / elapsed
}

/// `tiny_http` with nothing in front, two threads, and the daemon's answer at hand.
fn serve_alone(body: String) -> SocketAddr {
    let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
    let address = server.server_addr().to_ip().unwrap();
    for _ in 0..2 {
        let (server, body) = (Arc::clone(&server), body.clone());
        thread::spawn(move || {
            for request in server.incoming_requests() {
                let header = |name, value| Header::from_bytes(name, value).unwrap();
                let response = Response::from_string(body.as_str())
                    .with_header(header("Server", "vpn-daemon"))
                    .with_header(header("Content-Type", "application/json"));
                let _ = request.respond(response);
            }
        });
    }
    address
}

/// `openssl s_server` with the same certificates and the same demands.
fn openssl_server(pki: &Pki) -> (Process, SocketAddr) {
    // It takes no port 0: one that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let options = "s_server -quiet -tls1_3 -Verify 1 -verify_return_error -CAfile ca.crt \
                   -cert server.crt -key server.key -accept";
    let mut command = Command::new("openssl");
    command.args(options.split(' ')).arg(address.to_string()).current_dir(pki.path(""));
    command.stdin(Stdio::piped()); // it ends where its input does
    let server = Process::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    wait_until("openssl listens", || TcpStream::connect(address).is_ok());
    (server, address)
}
