//! Its directory, its signals, its end.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use super::common::{Answer, Daemon, TempDir};
use super::{CONNECTIONS, Connection, NODE, Site, hang, limit_open_files, names};

#[test]
fn the_inner_socket_is_private_and_goes_with_the_daemon() {
    let mut daemon = Daemon::start(&[]);
    let before = names(daemon.directory());
    let [inner] = &before[..] else { panic!("one directory, not {before:?}") };
    let inner = daemon.directory().join(inner);
    assert_eq!(inner.metadata().unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(names(&inner), ["http.sock"]);
    assert!(inner.join("http.sock").metadata().unwrap().file_type().is_socket());
    assert_eq!(daemon.get("/i/node").status, 200);
    let sockets = std::fs::read_to_string(format!("/proc/{}/net/unix", daemon.pid())).unwrap();
    // Abstract names would show as @…, among those of the whole machine: ours would hold our path
    // or be held by us.
    let own: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
        .unwrap()
        .filter_map(|entry| {
            std::fs::read_link(entry.ok()?.path()).ok()?.into_os_string().into_string().ok()
        })
        .filter_map(|target| Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    for line in sockets.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.get(6).is_some_and(|inode| own.iter().any(|own| own == inode)) {
            assert!(fields.get(7).is_none_or(|path| !path.starts_with('@')), "abstract: {line}");
        }
    }
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
        let mut command = Command::new(env!("CARGO_BIN_EXE_vpn-daemon"));
        command.args(["-listen", "127.0.0.1:0"]).env_remove("CREDENTIALS_DIRECTORY");
        command.env("RUNTIME_DIRECTORY", directory.path());
        limit_open_files(&mut command, &format!("{files}:{files}"));
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
    for mut site in Site::both(&[]) {
        let _openvpn = hang(&site.daemon);
        let mut idle = site.connect();
        assert_eq!(idle.ask(NODE).status, 200);
        let mut busy = site.connect();
        busy.write_all(CONNECTIONS.as_bytes()).unwrap();
        busy.flush().unwrap();
        // It is with the backend once that has a connection.
        thread::sleep(Duration::from_millis(500));
        let address = site.daemon.address;
        site.daemon.signal("TERM");
        site.daemon.wait_for_log("stopping");
        // rustls reports an end without close_notify as an error.
        idle.ends();
        let answer = Answer::read(&mut *busy, false).unwrap();
        assert_eq!(answer.status, 504, "{answer:?}");
        assert_eq!(answer.header("Connection"), Some("close"));
        busy.ends();
        drop(busy);
        assert_eq!(site.daemon.wait().code(), Some(0));
        assert!(TcpStream::connect(address).is_err());
    }
}

#[test]
fn the_end_waits_for_nobody_who_has_not_asked() {
    let mut daemon = Daemon::start(&[]);
    let silent = daemon.connect();
    let mut half = daemon.connect();
    half.write_all(&NODE.as_bytes()[..20]).unwrap();
    let mut closing = daemon.connect();
    assert_eq!(closing.ask(&NODE.replace("Host", "Connection: close\r\nHost")).status, 200);
    daemon.signal("INT");
    assert_eq!(daemon.wait().code(), Some(0));
    drop((silent, half, closing));
}

/// Whoever is still queued then waits for the next process, or is told by a reset.
#[test]
fn out_of_descriptors_it_ends_all_the_same() {
    let mut daemon = Daemon::start(&[]);
    let arguments = ["--pid", &daemon.pid().to_string(), "-n3:"];
    assert!(Command::new("prlimit").args(arguments).status().unwrap().success());
    let queued: Vec<_> = (0..4).map(|_| daemon.connect()).collect();
    daemon.wait_for_log("cannot accept a connection");
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(0));
    // It says so once a second while it waits for descriptors.
    let log = daemon.log();
    let tries = log.iter().skip_while(|line| !line.contains("SIGTERM: stopping"));
    assert!(tries.filter(|line| line.contains("cannot accept")).count() < 4, "{log:#?}");
    assert_eq!(names(daemon.directory()), [""; 0]);
    drop(queued);
}

/// When tiny_http runs out of descriptors it may stop accepting, with an error or a panic. The
/// daemon has to end then, so that it is started again, or else it has to go on serving.
#[test]
fn a_daemon_without_its_http_server_ends() {
    let mut ended = 0;
    for spare in 1..=4 {
        let mut daemon = Daemon::start(&[]);
        let pid = daemon.pid().to_string();
        let limit_open_files = |files: usize| {
            // The soft limit alone.
            let arguments = ["--pid", &pid, &format!("-n{files}:")];
            assert!(Command::new("prlimit").args(arguments).status().unwrap().success());
        };
        let mut connections: Vec<_> = (0..8).map(|_| daemon.connect()).collect();
        for connection in &mut connections {
            connection.write_all(b"GET /i/node HTTP/1.1\r\n").unwrap();
        }
        thread::sleep(Duration::from_millis(300));
        limit_open_files(daemon.open_files() + spare);
        for connection in &mut connections {
            // Who is served and who is dropped is left to chance.
            let _ = connection.write_all(b"Host: localhost\r\n\r\n");
        }
        for connection in &mut connections {
            let _ = Answer::read(connection, false);
        }
        limit_open_files(1024);
        let serves = TcpStream::connect(daemon.address).is_ok_and(|mut stream| {
            let asked = stream.write_all(NODE.as_bytes());
            asked.is_ok() && Answer::read(&mut stream, false).is_ok_and(|one| one.status == 200)
        });
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
        let directory = site.daemon.directory().join("openvpn");
        std::fs::create_dir(&directory).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(directory.join("one.sock")).unwrap();
        let openvpn = thread::spawn(move || {
            use std::io::{BufRead, BufReader};
            let (stream, _) = socket.accept().unwrap();
            (&stream).write_all(b">INFO:OpenVPN Management Interface Version 5\r\n").unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            assert!(line.starts_with("kill "), "{line:?}");
            let found = "SUCCESS: common name 'x' found, 1 client(s) killed\r\n";
            (&stream).write_all(found.as_bytes()).unwrap();
        });
        let forged = "X-Vpn-Daemon-Client: 192.0.2.66:666\r\nx-vpn-daemon-client-name: mallory\r\n\
                      X-Forwarded-For: 192.0.2.66\r\nForwarded: for=192.0.2.66\r\n";
        let request = super::post("/o/disconnect_client", "common_name=x");
        let mut connection = site.connect();
        let own = connection.socket().local_addr().unwrap();
        assert_eq!(connection.ask(&request.replace("Host", &format!("{forged}Host"))).status, 204);
        openvpn.join().unwrap();
        let line = site.daemon.wait_for_log("audit ");
        let name = if site.client.is_some() { "portal" } else { "" };
        let who = format!(" asked_by={name:?} address={own} result=204 ms=");
        assert!(line.contains(&who), "{line}");
        let log = site.daemon.log().concat();
        assert!(!log.contains("mallory") && !log.contains("192.0.2.66"), "{log}");
    }
}
