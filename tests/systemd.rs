//! What systemd is told, in which order, and the socket that it hands over.

#![allow(clippy::panic, clippy::unwrap_used, clippy::indexing_slicing, clippy::expect_used)]

mod common;

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{DAEMON, Daemon, PATIENCE, TempDir};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::time::{ClockId, clock_gettime};

/// In the place of systemd: the socket that is notified.
struct Manager {
    socket: UnixDatagram,
    name: String,
    _directory: TempDir,
}

impl Manager {
    fn new() -> Self {
        let directory = TempDir::new("notify");
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        Self { socket, name: path.to_str().unwrap().to_owned(), _directory: directory }
    }

    fn start(&self, variables: &[(&str, &str)]) -> Daemon {
        Daemon::start_with(&[], |command| {
            command.env("NOTIFY_SOCKET", &self.name).envs(variables.iter().copied());
        })
    }

    /// What comes within a time.
    fn next_within(&self, time: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(time)).unwrap();
        let mut buffer = [0; 4096];
        match self.socket.recv(&mut buffer) {
            Ok(length) => Some(String::from_utf8(buffer[..length].to_vec()).unwrap()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn next(&self) -> String {
        self.next_within(PATIENCE).expect("a notification")
    }
}

#[test]
fn ready_when_it_answers_reloading_and_stopping() {
    let manager = Manager::new();
    let mut daemon = manager.start(&[]);
    let status = format!(
        "Serving http://{} (no TLS), WireGuard device vd-none, 0 OpenVPN sockets",
        daemon.address
    );
    assert_eq!(manager.next(), format!("READY=1\nSTATUS={status}"));
    assert_eq!(daemon.get("/i/node").status, 200, "the first request is served");

    // The status follows what is there.
    let openvpn = daemon.directory().join("openvpn");
    std::fs::create_dir(&openvpn).unwrap();
    let _socket = UnixDatagram::bind(openvpn.join("default.sock")).unwrap();
    let monotonic = || Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    let before = monotonic().as_micros();
    daemon.signal("HUP");
    let message = manager.next();
    let time = message.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect(&message);
    assert!((before..=monotonic().as_micros()).contains(&time.parse().unwrap()), "{message}");
    let status = status.replace("0 OpenVPN sockets", "1 OpenVPN socket");
    assert_eq!(manager.next(), format!("READY=1\nSTATUS={status}"));

    daemon.signal("TERM");
    assert!(manager.next().starts_with("STOPPING=1\nSTATUS="));
    assert_eq!(daemon.wait().code(), Some(0));
    assert_eq!(manager.next_within(Duration::from_millis(1)), None);
}

/// Nobody there, or no address at all: the daemon serves and says so in the log.
#[test]
fn names_that_nobody_is_told_by() {
    for name in ["/nonexistent/notify", "vsock:2:1"] {
        let daemon = Daemon::start_with(&[], |command| {
            command.env("NOTIFY_SOCKET", name);
        });
        assert_eq!(daemon.get("/i/node").status, 200);
        daemon.wait_for_log("WARN");
    }
}

/// Threads that do not go on, as after a panic or a deadlock: they are stopped as a debugger would.
#[test]
fn a_daemon_with_a_dead_thread_is_not_reported_alive() {
    let manager = Manager::new();
    let daemon = manager.start(&[("WATCHDOG_USEC", "900000")]);
    assert!(manager.next().starts_with("READY=1\n"));
    // Three times as often as systemd looks: the first at once, four never before their time.
    let started = Instant::now();
    (0..5).for_each(|_| assert_eq!(manager.next(), "WATCHDOG=1"));
    assert!(started.elapsed() > Duration::from_millis(4 * 300 - 250), "{:?}", started.elapsed());
    // Those that accept, close what is late, and take requests.
    for name in ["accept", "deadlines", "receive"] {
        let threads = daemon.threads_of(name);
        for thread in &threads {
            ptrace::attach(*thread).unwrap();
            waitpid(*thread, Some(WaitPidFlag::__WALL)).unwrap();
        }
        // What was sent before is not a sign of life now.
        let (end, mut is_told) = (Instant::now() + PATIENCE, true);
        while is_told && Instant::now() < end {
            is_told = manager.next_within(Duration::from_millis(1500)).is_some();
        }
        // Before anything is asserted: a thread that is traced outlives SIGKILL.
        threads.iter().for_each(|thread| ptrace::detach(*thread, None).unwrap());
        assert!(!threads.is_empty() && !is_told, "{name}");
        assert_eq!(manager.next(), "WATCHDOG=1", "{name} goes on");
        assert_eq!(daemon.get("/i/node").status, 200);
    }
    daemon.wait_for_log("the watchdog is not fed: the thread that accepts connections is dead");
}

/// The daemon with `socket` as descriptor 3, as systemd starts it.
fn activated(socket: impl Into<OwnedFd>, variables: &str) -> Command {
    let mut command = Command::new("sh");
    // `exec` keeps the process id, which LISTEN_PID names.
    let script = format!("exec 3<&0 </dev/null; {variables} exec {DAEMON} \"$@\"");
    command.args(["-c", &script, "sh"]).stdin(Stdio::from(socket.into()));
    command.env_remove("CREDENTIALS_DIRECTORY").env_remove("RUST_LOG");
    command
}

const ONE_SOCKET: &str = "LISTEN_FDS=1 LISTEN_PID=$$";

#[test]
fn a_passed_socket_is_used_in_place_of_listen() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let passed = activated(socket.try_clone().unwrap(), ONE_SOCKET);
    // An address that could not be bound shows that it is not.
    let daemon = Daemon::start_as(passed, &["-listen", "192.0.2.1:1"], |_| {});
    assert_eq!(daemon.address, address);
    daemon.wait_for_log("systemd has passed: -listen is not used");
    assert_eq!(daemon.get("/i/node").status, 200);
    let for_another = activated(socket.try_clone().unwrap(), "LISTEN_FDS=1 LISTEN_PID=1");
    assert_ne!(Daemon::start_as(for_another, &[], |_| {}).address, address);
}

#[test]
fn a_passed_socket_that_cannot_be_used_is_named() {
    let directory = TempDir::new("passed");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let unix = UnixListener::bind(directory.path().join("s")).unwrap();
    let datagram = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for (socket, variables, part) in [
        (OwnedFd::from(listener), "LISTEN_FDS=2 LISTEN_PID=$$", "2 sockets"),
        (stream.into(), ONE_SOCKET, "does not listen: the socket unit needs Accept=no"),
        (unix.into(), ONE_SOCKET, "other than a TCP socket"),
        (datagram.into(), ONE_SOCKET, "other than a TCP socket"),
        (file.into(), ONE_SOCKET, "fd 3 is not a socket"),
    ] {
        let Output { status, stderr, .. } = activated(socket, variables).output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.starts_with("vpn-daemon: ") && stderr.contains(part), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

#[test]
fn no_connection_is_lost_between_two_processes() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let start =
        || Daemon::start_as(activated(socket.try_clone().unwrap(), ONE_SOCKET), &[], |_| {});
    let mut daemon = start();
    let stop = AtomicBool::new(false);
    let ask = || {
        while !stop.load(Ordering::Relaxed) {
            assert_eq!(common::call(address, "GET", "/i/node", &[], b"").status, 200);
        }
    };
    std::thread::scope(|scope| {
        (0..3).for_each(|_| drop(scope.spawn(ask)));
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(100));
            daemon.signal("TERM");
            assert_eq!(daemon.wait().code(), Some(0));
            daemon = start();
        }
        stop.store(true, Ordering::Relaxed);
    });
}
