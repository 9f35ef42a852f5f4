//! The program from a shell: flags, exit statuses, addresses, signals.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use common::{Answer, Daemon, PATIENCE, TempDir};

fn run(arguments: &[&str]) -> Output {
    // A daemon that starts where it should not is ended.
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "20", env!("CARGO_BIN_EXE_vpn-daemon")]).args(arguments);
    command.env_remove("CREDENTIALS_DIRECTORY").stdin(Stdio::null());
    command.output().unwrap()
}

fn one_line_on_stderr(output: &Output) -> &str {
    let text = std::str::from_utf8(&output.stderr).unwrap();
    assert!(text.starts_with("vpn-daemon: ") && text.ends_with('\n'), "{text:?}");
    assert_eq!(text.lines().count(), 1, "{text:?}");
    assert!(output.stdout.is_empty());
    text
}

#[test]
fn version_and_help_go_to_stdout() {
    for flag in ["-version", "--version"] {
        let output = run(&[flag]);
        assert!(output.status.success() && output.stderr.is_empty());
        let version = concat!("vpn-daemon ", env!("CARGO_PKG_VERSION"), "\n");
        assert_eq!(output.stdout, version.as_bytes());
    }
    for flag in ["-help", "--help", "-h"] {
        let output = run(&[flag]);
        assert!(output.status.success() && output.stderr.is_empty());
        let text = String::from_utf8(output.stdout).unwrap();
        for flag in ["-listen", "-wg-device", "-openvpn-dir", "-allow-host", "-max-connections"] {
            assert!(text.contains(flag), "{flag}: {text}");
        }
    }
}

#[test]
fn what_is_unknown_is_named() {
    for (arguments, part) in [
        (&["-frobnicate"][..], "-frobnicate"),
        (&["--frobnicate=3"], "-frobnicate"),
        (&["start"], "\"start\""),
        (&["-listen", "41194"], "-listen 41194"),
        (&["-wg-device", "no/device"], "-wg-device"),
        (&["-wg-device", "a-name-that-is-too-long"], "-wg-device"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(one_line_on_stderr(&output).contains(part), "{arguments:?}: {output:?}");
    }
}

#[test]
fn an_address_in_use_or_not_ours_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let _holder = TcpListener::bind(&taken);
    for (address, part) in [
        (taken.as_str(), "in use"),
        ("192.0.2.1:41194", "assign"),
        ("name.invalid:41194", "name.invalid:41194"),
    ] {
        let output = run(&["-listen", address]);
        assert_eq!(output.status.code(), Some(1), "{address}: {output:?}");
        let text = one_line_on_stderr(&output);
        assert!(text.contains(address) && text.contains(part), "{text}");
    }
}

#[test]
fn every_address_is_ipv4_and_ipv6_on_one_socket() {
    let daemon = Daemon::start_with(&["-listen", ":0"], |_| {});
    let port = daemon.address.port();
    for host in ["127.0.0.1", "[::1]"] {
        let mut stream = common::connect(format!("{host}:{port}").parse().unwrap());
        stream.write_all(b"GET /i/node HTTP/1.0\r\n\r\n").unwrap();
        assert_eq!(Answer::read(&mut stream, false).unwrap().status, 200, "{host}");
    }
}

#[test]
fn one_address_alone() {
    for address in ["[::1]:0", "localhost:0"] {
        let daemon = Daemon::start(&["-listen", address]);
        assert_eq!(daemon.get("/i/node").status, 200, "{address}");
    }
}

#[test]
fn every_address_without_ipv6_is_ipv4() {
    // A kernel without IPv6 refuses the socket; seccomp or a boot parameter would do it, and so
    // does a namespace in which the address family cannot be used for want of any address.
    let mut command = Command::new("unshare");
    command.args(["--net", "--", "sh", "-c"]);
    command.arg(format!(
        "ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; \
         timeout -s TERM 2 {} -listen :41194 & sleep 1; \
         curl -sS --max-time 5 -o /dev/null -w '%{{http_code}}' http://127.0.0.1:41194/i/node; \
         wait",
        env!("CARGO_BIN_EXE_vpn-daemon")
    ));
    let output = command.output().unwrap();
    assert_eq!(output.stdout, b"200", "{output:?}");
}

#[test]
fn signals_end_it_with_status_0_and_nothing_stays() {
    for signal in ["TERM", "INT"] {
        let mut daemon = Daemon::start(&[]);
        let runtime = daemon.directory().to_owned();
        assert_eq!(daemon.get("/i/node").status, 200);
        assert_eq!(std::fs::read_dir(&runtime).unwrap().count(), 1, "the inner socket's");
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0));
        assert_eq!(std::fs::read_dir(&runtime).unwrap().count(), 0);
    }
}

#[test]
fn a_request_that_arrives_as_it_stops_is_answered() {
    let mut daemon = Daemon::start(&[]);
    let mut half_way = daemon.connect();
    half_way.write_all(b"GET /i/node HTTP/1.1\r\nHost: ").unwrap();
    // Its place is taken once a later request has been answered.
    assert_eq!(daemon.get("/i/node").status, 200);
    daemon.signal("TERM");
    // Refused connections tell that it has begun to stop.
    while std::net::TcpStream::connect(daemon.address).is_ok() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    half_way.write_all(b"localhost\r\n\r\n").unwrap();
    let answer = Answer::read(&mut half_way, false).unwrap();
    assert_eq!((answer.status, answer.header("Connection")), (200, Some("close")));
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn log_lines_have_a_time_stamp_or_the_journals_prefix() {
    let daemon = Daemon::start(&[]);
    let line = daemon.wait_for_log("listening");
    assert!(line.starts_with("20") && line.contains("Z INFO "), "{line}");

    // The journal is recognised by the device and inode of stderr: a file stands in for it.
    let directory = TempDir::new("journal");
    let path = directory.path().join("stderr");
    let file = std::fs::File::create(&path).unwrap();
    let metadata = std::os::unix::fs::MetadataExt::dev(&file.metadata().unwrap());
    let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
    let mut child = Command::new(env!("CARGO_BIN_EXE_vpn-daemon"))
        .args(["-listen", "127.0.0.1:0"])
        .env("JOURNAL_STREAM", format!("{metadata}:{inode}"))
        .env("RUNTIME_DIRECTORY", directory.path())
        .env_remove("CREDENTIALS_DIRECTORY")
        .stderr(file)
        .spawn()
        .unwrap();
    let end = std::time::Instant::now() + PATIENCE;
    let mut text = String::new();
    while !text.ends_with('\n') && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(10));
        text = std::fs::read_to_string(&path).unwrap();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(text.starts_with("<6>listening on http://127.0.0.1:"), "{text:?}");
}

#[test]
fn nobody_waits_for_who_reads_the_log() {
    let mut daemon = Daemon::start(&[]);
    daemon.stall_log();
    // Each is a line: more than a pipe holds.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.pid()).unwrap());
    for _ in 0..3000 {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    assert_eq!(daemon.get("/i/node?include_client_peer_count=yes").status, 200);
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(0));
}
