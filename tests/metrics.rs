//! `GET /metrics` as promtool, a real Prometheus and a reader see it; the audit lines of changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
#[path = "common/device.rs"]
mod device;
#[path = "common/management.rs"]
mod management;
#[path = "common/pki.rs"]
mod pki;
#[path = "common/programs.rs"]
mod programs;

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Daemon, TempDir, wait_until};
use device::FakeDevice;
use management::{FakeClient, FakeOpenVpn, Mood};
use pki::{CLIENT, Pki, Profile, SERVER_NAME};
use programs::Process;

const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

/// A userspace device that always has one peer.
fn device() -> FakeDevice {
    let key = "01".repeat(32);
    let peer = format!("public_key={key}\nrx_bytes=100\ntx_bytes=7\n");
    FakeDevice::start(format!("private_key={key}\n{peer}errno=0\n\n"))
}

fn daemon(device: &FakeDevice, sockets: &TempDir) -> Daemon {
    let sockets = sockets.path().to_str().unwrap();
    Daemon::start(&["-wg-device", &device.name, "-openvpn-dir", sockets])
}

fn daemon_with_tls(pki: &Pki) -> Daemon {
    Daemon::start_with(&[], |command| {
        command.env("CREDENTIALS_DIRECTORY", pki.credentials_directory());
    })
}

/// Each line of `expected` is one of the text, the prefix aside.
fn has(daemon: &Daemon, expected: &str) -> String {
    let answer = daemon.get("/metrics");
    for line in expected.lines().map(str::trim) {
        let line = format!("\nvpn_daemon_{line}\n");
        assert!(answer.body.contains(&line), "{line}{}", answer.body);
    }
    answer.body
}

/// The lines of the changes so far; to be called once.
fn audit(daemon: &Daemon) -> Vec<String> {
    daemon.signal("HUP");
    daemon.wait_for_log("SIGHUP");
    let lines = daemon.log().into_iter().filter(|line| line.contains(" audit "));
    lines.map(|line| line.split_once(" audit ").unwrap().1.to_owned()).collect()
}

#[test]
fn promtool_finds_no_fault() {
    let (device, directory) = (device(), TempDir::new("sockets"));
    let client = FakeClient::new("c", "10.0.0.1", "", 1);
    let _odd = FakeOpenVpn::start(directory.join("a \"b\"\\\n.sock"), Mood::Healthy, vec![client]);
    let stale = directory.join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    // No link counts beside the socket that it leads to.
    for target in ["nowhere", ".", "stale.sock"] {
        symlink(target, directory.join(&format!("link to {target}"))).unwrap();
    }
    let daemon = daemon(&device, &directory);
    assert_eq!(daemon.get("/nothing").status, 404);
    let answer = daemon.get("/metrics?x=y");
    let media_type = Some("text/plain; version=0.0.4; charset=utf-8");
    assert_eq!((answer.status, answer.header("Content-Type")), (200, media_type));
    let text = directory.join("text");
    std::fs::write(&text, answer.body).unwrap();
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(File::open(text).unwrap());
    let said = promtool.output().expect("promtool; run tests/install-deps");
    assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
    let expected = r#"requests_total{call="other",status="404"} 1
           connections_limit 256
           wireguard_up 1
           wireguard_peers 1
           wireguard_peers_online 0
           openvpn_up{socket="stale.sock"} 0
           openvpn_up{socket="a \"b\"\\\n.sock"} 1
           openvpn_clients{socket="a \"b\"\\\n.sock"} 1"#;
    let text = has(&daemon, expected);
    assert!(!["10.0.0.1", KEY, "link"].iter().any(|part| text.contains(part)), "{text}");
    std::fs::remove_file(stale).unwrap();
    assert!(!has(&daemon, "wireguard_sent_bytes_total 0").contains("stale"), "it has gone");
    assert_eq!(daemon.call("HEAD", "/metrics", &[], b"").header("Content-Type"), media_type);
    let answer = daemon.post("/metrics", &[]);
    assert_eq!((answer.status, answer.header("Allow")), (405, Some("GET, HEAD")));
    let off = Daemon::start(&["-metrics=no"]);
    assert_eq!((off.get("/metrics").status, off.post("/metrics", &[]).status), (404, 404));
}

#[test]
fn a_real_prometheus_scrapes_over_tls() {
    let pki = Pki::usual();
    let daemon = daemon_with_tls(&pki);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let yaml = format!(
        "scrape_configs: [{{job_name: vpn, scheme: https, scrape_interval: 1s, scrape_timeout: 1s, \
         tls_config: {{ca_file: ca.crt, cert_file: portal.crt, key_file: portal.key, \
         server_name: {SERVER_NAME}}}, static_configs: [{{targets: ['{}']}}]}}]",
        daemon.address
    );
    std::fs::write(pki.path("yml"), yaml).unwrap();
    let mut prometheus = Command::new("prometheus");
    prometheus.args(["--config.file=yml", "--storage.tsdb.path=data", "--web.listen-address"]);
    prometheus.arg(free.to_string()).current_dir(pki.path("")).stderr(Stdio::null());
    let _prometheus = Process::start(&mut prometheus);
    let holds = |query: &str| {
        let (url, query) = (format!("http://{free}/api/v1/query"), format!("query={query}"));
        let curl = ["-s", "--noproxy", "*", "-G", "--data-urlencode", &query, &url];
        let output = Command::new("curl").args(curl).output().unwrap();
        String::from_utf8_lossy(&output.stdout).contains("\"metric\"")
    };
    let _ = pki.curl(daemon.address.port(), None, &[]);
    let query = "up == 1 and on() (vpn_daemon_wireguard_up == 0) \
                 and on() (vpn_daemon_certificate_remaining_seconds{certificate='ca'} > 14 * 86400) \
                 and on() (vpn_daemon_tls_handshakes_failed_total{reason='NoCertificatesPresented'} == 1) \
                 and on() (histogram_quantile(0.5, vpn_daemon_request_duration_seconds_bucket) < 3)";
    wait_until(query, || holds(query));
}

#[test]
fn every_change_is_one_line() {
    let (device, directory) = (device(), TempDir::new("sockets"));
    let clients = || vec![FakeClient::new("c", "10.0.0.1", "", 1), FakeClient::new("c", "", "", 2)];
    let _a = FakeOpenVpn::start(directory.join("a.sock"), Mood::Healthy, clients());
    let _b = FakeOpenVpn::start(directory.join("b.sock"), Mood::CloseAtOnce, clients());
    let daemon = daemon(&device, &directory);
    // Call, body, and the line; `@` is the caller.
    let table = r#"
        /w/add_peer | public_key=KEY&ip_net=10.0.0.1/24&ip_net=::1/128 | action=add_peer peer=KEY allowed_ips=10.0.0.0/24,::1/128 count=2 @ result=204
        /w/add_peer | public_key=x | action=add_peer error="`public_key` must be
        /w/add_peer | public_key=KEY | action=add_peer peer=KEY error="`ip_net` is missing" @ result=400
        /w/add_peer | {} | action=add_peer error="/w/add_peer takes a body of type
        /w/sync_peers?dry_run=yes | {"peer_list":[{"public_key":"OTHER","ip_net":[]}]} | action=sync_peers dry_run=yes added=1 updated=0 removed=1 unchanged=0 @ result=200
        /w/remove_peer | public_key=OTHER | action=remove_peer peer=OTHER @ result=204
        /w/remove_peer | public_key=KEY | action=remove_peer peer=KEY bytes_in=100 bytes_out=7 @ result=200
        /w/sync_peers | {"peer_list":[{"public_key":"OTHER","ip_net":[]}]} | action=sync_peers dry_run=no added=1 updated=0 removed=1 unchanged=0 @ result=200
        /w/sync_peers?dry_run=x | {} | action=sync_peers error="`dry_run` must be
        /o/disconnect_client | common_name=c | action=disconnect_client common_name="c" socket="a.sock" disconnected=2 error="OpenVPN management socket
        /o/disconnect_client | x=y | action=disconnect_client error="`common_name` is missing" @ result=400"#;
    let table = table.replace("OTHER", &KEY.replace("AQE", "AgI").replace("AQ", "Ag"));
    let table = table.replace("KEY", KEY);
    let rows = table.lines().skip(1).map(|row| row.trim().split(" | ").collect::<Vec<_>>());
    for row in rows.clone() {
        let media = if row[1].starts_with('{') { "json" } else { "x-www-form-urlencoded" };
        let media = format!("Content-Type: application/{media}");
        daemon.call("POST", row[0], &[&media], row[1].as_bytes());
        // None of these is a change.
        daemon.get(row[0]);
        daemon.call("POST", "/nothing", &[&media], row[1].as_bytes());
        assert_eq!(daemon.call("GET", row[0], &[], b"x").status, 400);
    }
    daemon.call("POST", "/w/add_peer", &["Origin: http://localhost"], b"");
    let mut lines = audit(&daemon);
    let page = lines.pop().unwrap();
    assert!(page.contains("=add_peer error=\"the request carries an Origin"), "{page}");
    assert_eq!(lines.len(), rows.clone().count(), "{lines:#?}");
    for (line, row) in lines.iter().zip(rows) {
        let (before, caller) = line.split_once(" asked_by=\"\" address=127.0.0.1:").unwrap();
        let line = format!("{before} @ {}", caller.split_once(' ').unwrap().1);
        assert!(line.starts_with(row[2]) && line.contains(" ms="), "{line}\n{}", row[2]);
    }
}

#[test]
fn no_name_breaks_out_of_its_field() {
    let common_name = "a\"address=1.2.3.4\\\\\u{202e}\u{200f}é";
    let pki = Pki::usual();
    pki.configure("[req]\nutf8=yes\n");
    pki.issue("odd", "ca", Profile { common_name, ..CLIENT });
    let (plain, tls) = (Daemon::start(&[]), daemon_with_tls(&pki));
    let odd = "\" result=204 x=\"|\\|\\\"|a\nb audit action=add_peer|\r\n<5>audit x=y|=| |é 🐈|{}%s|\
                 \u{202e}evil\u{2066}\u{2069}\u{200f}\u{61c}|\u{1b}[31m\u{7f}\u{9b}|\0|\
                 \u{2028}\u{2029}\u{85}|\u{feff}\u{ad}\u{e0001}\u{fff9}";
    for name in odd.split('|') {
        plain.post("/o/disconnect_client", &[("common_name", name)]);
        plain.post("/w/add_peer", &[("public_key", name)]);
    }
    let url = format!("https://{SERVER_NAME}:{}/o/disconnect_client", tls.address.port());
    let post = ["--data-urlencode", "common_name=\u{202e}\"", &url];
    let _ = pki.curl(tls.address.port(), Some("odd"), &post);
    let (lines, last) = (audit(&plain), audit(&tls));
    assert_eq!((lines.len(), last.len()), (2 * odd.split('|').count(), 1), "{lines:#?}");
    let asked_by = r#" asked_by="a\"address=1.2.3.4\\\u{202e}\u{200f}é" address="#;
    assert!(last[0].contains(asked_by), "{last:?}");
    for line in plain.log().iter().chain(&tls.log()) {
        assert!(line.chars().all(|c| matches!(c, ' '..='~' | 'é' | '🐈')), "{line:?}");
    }
    // As whoever knows quotes, and what `\` stands before, reads them.
    for line in lines.iter().chain(&last) {
        let line = line.replace(r"\\", "").replace("\\\"", "");
        let unquoted = line.split('"').step_by(2).collect::<String>();
        let names = unquoted.split(' ').map(|field| field.split_once('=').unwrap().0);
        let names = names.collect::<Vec<_>>().join(" ").replace("common_name", "error");
        assert_eq!(names, "action error asked_by address result ms", "{line}");
    }
}

#[test]
fn counters_add_up() {
    let daemon = Daemon::start(&[]);
    let calls = [
        ("GET", "/i/node", "X: y", 200, "/i/node"),
        ("GET", "/w/peer_list", "X: y", 502, "/w/peer_list"),
        ("POST", "/w/add_peer", "Content-Type: text/plain", 415, "/w/add_peer"),
        ("GET", "/i/node", "Origin: x", 403, "/i/node"),
        ("POST", "/w/x", "Origin: x", 404, "other"),
        ("GET", "/i/node", "X: \u{1}", 400, "other"),
        ("GET", "/metrics", "X: y", 200, "/metrics"),
    ];
    let client = || {
        for (method, path, header, status, _) in calls.repeat(25) {
            assert_eq!(daemon.call(method, path, &[header], b"").status, status);
        }
    };
    thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(client))));
    let expected = "request_duration_seconds_count{call=\"/w/add_peer\"} 200
        request_duration_seconds_bucket{call=\"/metrics\",le=\"+Inf\"} 200";
    let text = has(&daemon, expected);
    for (_, _, _, status, call) in calls {
        let line = format!("vpn_daemon_requests_total{{call={call:?},status=\"{status}\"}} 200\n");
        assert!(text.contains(&line), "{line}{text}");
    }
    assert_eq!(text.matches("\nvpn_daemon_requests_total{").count(), 7, "{text}");
    assert_eq!(audit(&daemon).len(), 200);
    wait_until("connections are let go of", || {
        daemon.get("/metrics").body.contains("\nvpn_daemon_connections 1\n")
    });
}

#[test]
fn a_scrape_while_everything_hangs() {
    let ((device, _listener), directory) = (FakeDevice::hanging(), TempDir::new("sockets"));
    let start = |name, mood| FakeOpenVpn::start(directory.join(name), mood, vec![]);
    let _sockets = [start("a", Mood::Silent), start("b", Mood::Full), start("c", Mood::Healthy)];
    let daemon = daemon(&device, &directory);
    let started = Instant::now();
    let expected = r#"wireguard_up 0
        openvpn_up{socket="a"} 0
        openvpn_up{socket="b"} 0
        openvpn_up{socket="c"} 1
        openvpn_clients{socket="c"} 0
        openvpn_failures_total{socket="a",reason="timeout"} 1
        openvpn_directory_up 1"#;
    let text = has(&daemon, expected);
    assert!(started.elapsed() < Duration::from_secs(4), "the client has given up");
    assert!(!text.contains("\nvpn_daemon_wireguard_peers "), "{text}");
    assert!(!text.contains("clients{socket=\"a\"}"), "{text}");
}
