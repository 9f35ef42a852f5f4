//! The program from a shell: flags, exit statuses, addresses, signals, log lines.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{Answer, Daemon};
use nix::sys::signal::{Signal, kill};

const DAEMON: &str = env!("CARGO_BIN_EXE_vpn-daemon");

fn run(arguments: &[&str]) -> Output {
    // A daemon that starts where it should not is ended.
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "20", DAEMON]).args(arguments);
    command.env_remove("CREDENTIALS_DIRECTORY").stdin(Stdio::null());
    command.output().unwrap()
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
fn what_keeps_it_from_starting_is_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let _holder = TcpListener::bind(&taken);
    for (flag, value, status, part) in [
        ("-listen", taken.as_str(), 1, "in use"),
        ("-listen", "192.0.2.1:41194", 1, "assign"),
        ("-listen", "name.invalid:41194", 1, "name.invalid:41194"),
        ("-listen", "41194", 2, "-listen 41194"),
        ("-wg-device", "no/device", 2, "-wg-device no/device"),
        ("-frobnicate", "3", 2, "-frobnicate"),
        ("-json", "3", 2, "-json"),
        ("check", "-frobnicate", 2, "-frobnicate"),
        ("check", "now", 2, "now"),
    ] {
        let output = run(&[flag, value]);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(status), 0), "{output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.starts_with("vpn-daemon: ") && text.contains(part), "{text}");
        assert!(text.lines().count() == 1 && text.ends_with('\n'), "{text}");
        assert!(status == 2 || text.contains(value), "{text}");
    }
}

#[test]
fn every_address_is_ipv4_and_ipv6_on_one_socket() {
    let daemon = Daemon::start(&["-listen", ":0"]);
    for host in ["127.0.0.1", "[::1]"] {
        let address = format!("{host}:{}", daemon.address.port());
        let mut stream = common::connect(address.parse().unwrap());
        stream.write_all(b"GET /i/node HTTP/1.0\r\n\r\n").unwrap();
        assert_eq!(Answer::read(&mut stream, false).unwrap().status, 200, "{host}");
    }
    for address in ["[::1]:0", "localhost:0"] {
        assert_eq!(Daemon::start(&["-listen", address]).get("/i/node").status, 200, "{address}");
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
         timeout -s TERM 2 {DAEMON} -listen :41194 & sleep 1; \
         curl -sS --max-time 5 -o /dev/null -w '%{{http_code}}' http://127.0.0.1:41194/i/node; \
         wait"
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
fn log_lines_have_a_time_stamp_or_the_journals_prefix() {
    let line = Daemon::start(&[]).wait_for_log("listening");
    assert!(line.starts_with("20") && line.contains("Z INFO  listening on http://"), "{line}");
    // The journal is recognised by the device and inode of stderr.
    let mut command = Command::new("sh");
    let script = "export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); exec \"$0\" \"$@\"";
    command.args(["-c", script, DAEMON]);
    let daemon = Daemon::start_as(command, &[], |_| {});
    let line = daemon.wait_for_log("listening");
    assert!(line.starts_with("<6>listening on http://127.0.0.1:"), "{line}");
    // A change is notable, also one that is refused.
    assert_eq!(daemon.post("/w/add_peer", &[]).status, 400);
    let line = daemon.wait_for_log("add_peer");
    assert!(line.starts_with("<5>audit action=add_peer error="), "{line}");
}

#[test]
fn nobody_waits_for_who_reads_the_log() {
    let mut daemon = Daemon::start(&[]);
    daemon.stall_log();
    // Each is a line: more than a pipe holds.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.pid()).unwrap());
    for _ in 0..3000 {
        kill(pid, Signal::SIGHUP).unwrap();
        std::thread::sleep(Duration::from_micros(200));
    }
    assert_eq!(daemon.get("/i/node?include_client_peer_count=yes").status, 200);
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(0));
}
