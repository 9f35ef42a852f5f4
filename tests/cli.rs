//! The program from a shell: flags, exit statuses, addresses, signals, log lines.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::net::TcpListener;
use std::process::{Command, Output};
use std::time::Duration;

use common::{DAEMON, Daemon};
use nix::sys::signal::{Signal, kill};

fn run(credentials: Option<&str>, arguments: &str) -> Output {
    // A daemon that starts where it should not is ended.
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "20", DAEMON]).args(arguments.split(' '));
    command.env_remove("CREDENTIALS_DIRECTORY");
    command.envs(credentials.map(|path| ("CREDENTIALS_DIRECTORY", path))).output().unwrap()
}

#[test]
fn version_and_help_go_to_stdout() {
    let version = concat!("vpn-daemon ", env!("CARGO_PKG_VERSION"), "\n");
    for (flag, parts) in [
        ("--version", &[version][..]),
        ("-h", &["-listen", "-wg-device", "-openvpn-dir", "-allow-host", "-max-connections"]),
    ] {
        let output = run(None, flag);
        assert!(output.status.success() && output.stderr.is_empty());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
}

#[test]
fn what_keeps_it_from_starting_is_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("-listen {}", taken.local_addr().unwrap());
    let local = "-listen 127.0.0.1:0";
    for (credentials, arguments, status, part) in [
        (None, taken.as_str(), 1, "in use"),
        (None, "-listen 192.0.2.1:41194", 1, "192.0.2.1:41194: Cannot assign"),
        (None, "-listen name.invalid:41194", 1, "name.invalid:41194"),
        (None, "-listen 41194", 2, "-listen 41194"),
        (None, "-wg-device no/device", 2, "-wg-device no/device"),
        (None, "-frobnicate 3", 2, "-frobnicate"),
        (None, "check now", 2, "now"),
        (Some("/nowhere"), local, 1, "/nowhere/ca.crt does not exist: put it there"),
        // Set but empty: never plain HTTP.
        (Some(""), local, 1, "CREDENTIALS_DIRECTORY is empty: set it to the directory with"),
    ] {
        let output = run(credentials, arguments);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(status), 0), "{output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.starts_with("vpn-daemon: ") && text.contains(part), "{text}");
        assert!(text.lines().count() == 1 && text.ends_with('\n'), "{text}");
    }
}

#[test]
fn every_address_is_ipv4_and_ipv6_on_one_socket() {
    let daemon = Daemon::start(&["-listen", ":0"]);
    for host in ["127.0.0.1", "[::1]"] {
        let address = format!("{host}:{}", daemon.address.port());
        let answer = common::call(address.parse().unwrap(), "GET", "/i/node", &[], b"");
        assert_eq!(answer.status, 200, "{host}");
    }
    for address in ["[::1]:0", "localhost:0"] {
        assert_eq!(Daemon::start(&["-listen", address]).get("/i/node").status, 200, "{address}");
    }
}

#[test]
fn every_address_without_ipv6_is_ipv4() {
    // A kernel without IPv6 refuses the socket; seccomp or a boot parameter would do it, and so
    // does a namespace in which the address family cannot be used for want of any address.
    let script = "ip link set lo up; echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6;
         exec \"$0\" \"$@\"";
    let wrapper = ["unshare", "--net", "--", "sh", "-c", script];
    let daemon = Daemon::start_by(&wrapper, &["-listen", ":0"]);
    let network = format!("--net=/proc/{}/ns/net", daemon.pid());
    let url = format!("http://127.0.0.1:{}/i/node", daemon.address.port());
    let curl = [&network, "curl", "--silent", "--fail", "--max-time", "20", &url];
    assert!(Command::new("nsenter").args(curl).output().unwrap().status.success());
}

#[test]
fn log_lines_have_a_time_stamp_or_the_journals_prefix() {
    let line = Daemon::start(&[]).wait_for_log("listening");
    assert!(line.starts_with("20") && line.contains("Z INFO  listening on http://"), "{line}");
    // The journal is recognised by the device and inode of stderr.
    let script = "export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); exec \"$0\" \"$@\"";
    let daemon = Daemon::start_by(&["sh", "-c", script], &[]);
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
