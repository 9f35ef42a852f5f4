//! The daemon's inner directory, its signals, its end, and whom it names in the log.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use super::common::{Answer, DAEMON, Daemon, TempDir};
use super::{CONNECTIONS, Connection, NODE, Site, names, post, with};

#[test]
fn the_inner_socket_is_private_and_goes_with_the_daemon() {
    let mut daemon = Daemon::start(&[]);
    let before = names(daemon.directory());
    let [inner] = &before[..] else { panic!("one directory, not {before:?}") };
    let inner = daemon.directory().join(inner);
    assert_eq!(inner.metadata().unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(names(&inner), ["http.sock"]);
    assert_eq!(daemon.get("/i/node").status, 200);
    // Nor does it listen elsewhere, as on an abstract name, which anybody may connect to.
    let output = Command::new("ss").args(["-Hlxp"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (pid, path) = (format!("pid={},", daemon.pid()), inner.join("http.sock"));
    let listening: Vec<_> = text.lines().filter(|line| line.contains(&pid)).collect();
    assert!(listening.len() == 1 && listening[0].contains(path.to_str().unwrap()), "{text}");
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    assert!(!inner.exists());
    assert_eq!(names(daemon.directory()), [""; 0]);
}

/// With so few descriptors the start fails, at one step after another.
#[test]
fn a_start_that_fails_leaves_nothing() {
    let mut failed = 0;
    for files in 3..=10 {
        let directory = TempDir::new("start");
        let mut command = Command::new("prlimit");
        command.args([&format!("--nofile={files}:{files}"), DAEMON, "-listen", "127.0.0.1:0"]);
        command.env_remove("CREDENTIALS_DIRECTORY").env("RUNTIME_DIRECTORY", directory.path());
        let mut daemon = command.stderr(Stdio::piped()).spawn().unwrap();
        for line in BufReader::new(daemon.stderr.take().unwrap()).lines() {
            if line.unwrap().contains("listening on") {
                signal::kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM).unwrap();
            }
        }
        failed += u32::from(daemon.wait().unwrap().code() == Some(1));
        assert_eq!(names(directory.path()), [""; 0], "{files}");
    }
    assert!(failed >= 3, "{failed}");
}

#[test]
fn what_is_under_way_is_answered_before_the_end() {
    for (mut site, signal) in Site::both(&[]).into_iter().zip(["TERM", "INT"]) {
        let _openvpn = site.hang();
        let [mut idle, mut busy, mut half] = [(); 3].map(|()| site.connect());
        assert_eq!(idle.ask(NODE).status, 200);
        busy.send(CONNECTIONS);
        // Nobody waits for these.
        half.send(&NODE[..20]);
        let _silent = site.daemon.connect();
        // It is with the backend once that has a connection.
        thread::sleep(Duration::from_millis(500));
        let (address, started) = (site.daemon.address, Instant::now());
        site.daemon.signal(signal);
        site.daemon.wait_for_log("stopping");
        idle.ends();
        let answer = busy.answer();
        assert_eq!((answer.status, answer.header("Connection")), (504, Some("close")));
        busy.ends();
        drop(busy);
        assert_eq!(site.daemon.wait().code(), Some(0));
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
        assert!(TcpStream::connect(address).is_err());
        assert_eq!(names(site.daemon.directory()), ["openvpn"]);
    }
}

/// When tiny_http runs out of descriptors it may stop accepting, with an error or a panic. The
/// daemon has to end then, so that it is started again, or else it has to go on serving.
#[test]
fn a_daemon_without_its_http_server_ends() {
    let mut ended = 0;
    for spare in 1..=4 {
        let mut daemon = Daemon::start(&[]);
        let mut connections = [(); 8].map(|()| daemon.connect());
        connections.iter_mut().for_each(|one| one.send("GET /i/node HTTP/1.1\r\n"));
        thread::sleep(Duration::from_millis(300));
        daemon.limit_open_files(&format!("{}:", daemon.open_files() + spare));
        // Who is served and who is dropped is left to chance.
        for connection in &mut connections {
            let _ = connection.try_send("Host: localhost\r\n\r\n");
        }
        for connection in &mut connections {
            let _ = Answer::read(connection, false);
        }
        daemon.limit_open_files("1024:");
        let serves = TcpStream::connect(daemon.address)
            .and_then(|mut stream| stream.try_ask(NODE))
            .is_ok_and(|answer| answer.status == 200);
        if !serves {
            daemon.wait_for_log("the HTTP server has given up");
            assert_eq!(daemon.wait().code(), Some(1), "{spare}");
            assert_eq!(names(daemon.directory()), [""; 0], "{spare}");
            ended += 1;
        }
    }
    assert!(ended > 0, "the descriptors were never short");
}

/// The log names who asked, by what the front door knows; what the client says does not count.
#[test]
fn forged_names_are_not_believed() {
    for site in Site::both(&[]) {
        let forged = "X-Vpn-Daemon-Caller: mallory\r\nx-vpn-daemon-connection: 0\r\n\
                      X-Forwarded-For: 192.0.2.66\r\nForwarded: for=192.0.2.66";
        let mut connection = site.connect();
        let own = connection.socket().local_addr().unwrap();
        let request = with(forged, &post("/o/disconnect_client", "common_name=x"));
        assert_eq!(connection.ask(&request).status, 204);
        let line = site.daemon.wait_for_log("audit ");
        let name = if site.tls.is_some() { "portal" } else { "" };
        let who = format!(" asked_by={name:?} address={own} result=204 ms=");
        assert!(line.contains(&who), "{line}");
        let log = site.daemon.log().concat();
        assert!(!log.contains("mallory") && !log.contains("192.0.2.66"), "{log}");
    }
}
