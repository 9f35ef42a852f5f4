//! `GET /metrics` as promtool, a real Prometheus and a reader see it; the audit lines of changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
#[path = "common/management.rs"]
mod management;
#[path = "common/pki.rs"]
mod pki;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Daemon, PATIENCE, TempDir};
use management::{Directory, FakeClient, FakeOpenVpn, Mood};
use pki::{CLIENT, Pki, Profile, SERVER_NAME};

const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

/// A userspace device with one peer until it removes one; of that it has 100 bytes more in every list.
struct Device(String, PathBuf);

impl Device {
    fn new(name: &str) -> Self {
        std::fs::create_dir_all("/var/run/wireguard").unwrap();
        let name = format!("{name}{}", std::process::id());
        let path = PathBuf::from(format!("/var/run/wireguard/{name}.sock"));
        Self(name, path)
    }

    fn serve(&self) {
        let listener = UnixListener::bind(&self.1).unwrap();
        let (mut bytes, mut there) = (0, true);
        let key = |number| format!("{number:02}").repeat(32);
        thread::spawn(move || {
            for mut stream in listener.incoming().map(Result::unwrap) {
                let mut request = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut request) {
                    let request = String::from_utf8_lossy(&request[..count]);
                    there &= !request.contains("remove=true");
                    let mut answer = format!("private_key={}\n", key(2));
                    if there {
                        bytes += if request.starts_with("get=1") { 100 } else { 0 };
                        answer += &format!("public_key={}\nrx_bytes={bytes}\n", key(1));
                    }
                    answer.retain(|_| request.starts_with("get=1"));
                    let _ = stream.write_all((answer + "errno=0\n\n").as_bytes());
                }
            }
        });
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.1);
    }
}

fn daemon(device: &Device, directory: &Directory) -> Daemon {
    Daemon::start(&["-wg-device", &device.0, "-openvpn-dir", directory.path().to_str().unwrap()])
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

/// The names of a line's fields, as whoever knows quotes and what `\` stands before reads them.
fn field_names(line: &str) -> Vec<String> {
    let line = line.replace(r"\\", "").replace("\\\"", "");
    let unquoted: String = line.split('"').step_by(2).collect();
    unquoted.split(' ').map(|field| field.split_once('=').unwrap().0.to_owned()).collect()
}

#[test]
fn promtool_finds_no_fault() {
    let (device, directory) = (Device::new("vdp"), Directory::new());
    device.serve();
    let client = FakeClient::new("c", "10.0.0.1", "", 1);
    let _odd = FakeOpenVpn::start(directory.join("a \"b\"\\\n.sock"), Mood::Healthy, vec![client]);
    let stale = directory.join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let daemon = daemon(&device, &directory);
    assert_eq!(daemon.get("/nothing").status, 404);
    let answer = daemon.get("/metrics?x=y");
    let media_type = Some("text/plain; version=0.0.4; charset=utf-8");
    assert_eq!((answer.status, answer.header("Content-Type")), (200, media_type));
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.spawn().expect("promtool; run tests/install-deps");
    promtool.stdin.take().unwrap().write_all(answer.body.as_bytes()).unwrap();
    let said = promtool.wait_with_output().unwrap();
    assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
    // The first list is where the totals begin.
    let expected = r#"requests_total{call="other",status="404"} 1
           connections 1
           connections_limit 256
           wireguard_up 1
           wireguard_peers 1
           wireguard_peers_online 0
           wireguard_received_bytes_total 100
           wireguard_sent_bytes_total 0
           openvpn_up{socket="stale.sock"} 0
           openvpn_up{socket="a \"b\"\\\n.sock"} 1
           openvpn_clients{socket="a \"b\"\\\n.sock"} 1"#;
    let text = has(&daemon, expected);
    assert!(!text.contains("10.0.0.1") && !text.contains(KEY), "{text}");
    // Sockets that are gone leave; the bytes of peers that are gone stay.
    std::fs::remove_file(stale).unwrap();
    assert_eq!(daemon.post("/w/remove_peer", &[("public_key", KEY)]).status, 200);
    assert!(!has(&daemon, "wireguard_received_bytes_total 200").contains("stale"));

    assert_eq!(daemon.call("HEAD", "/metrics", &[], b"").header("Content-Type"), media_type);
    let answer = daemon.post("/metrics", &[]);
    assert_eq!((answer.status, answer.header("Allow")), (405, Some("GET, HEAD")));
    let off = Daemon::start(&["-metrics=no"]);
    assert_eq!((off.get("/metrics").status, off.post("/metrics", &[]).status), (404, 404));
}

#[test]
fn a_real_prometheus_scrapes_over_tls() {
    let (pki, directory) = (Pki::usual(), TempDir::new("prometheus"));
    let daemon = daemon_with_tls(&pki);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = directory.path().join("prometheus.yml");
    let yaml = format!(
        "scrape_configs: [{{job_name: vpn, scheme: https, scrape_interval: 1s, scrape_timeout: 1s, \
         tls_config: {{ca_file: {0}/ca.crt, cert_file: {0}/portal.crt, key_file: {0}/portal.key, \
         server_name: {SERVER_NAME}}}, static_configs: [{{targets: ['{1}']}}]}}]",
        pki.path("").display(),
        daemon.address
    );
    std::fs::write(&config, yaml).unwrap();
    let mut prometheus = Command::new("prometheus");
    prometheus.arg(format!("--config.file={}", config.display()));
    prometheus.arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()));
    prometheus.arg(format!("--web.listen-address={free}")).stderr(Stdio::null());
    let mut prometheus = prometheus.spawn().expect("prometheus; run tests/install-deps");
    let holds = |query: &str| {
        let (url, query) = (format!("http://{free}/api/v1/query"), format!("query={query}"));
        let curl = ["-s", "--noproxy", "*", "-G", "--data-urlencode", &query, &url];
        let output = Command::new("curl").args(curl).output().unwrap();
        String::from_utf8_lossy(&output.stdout).contains("\"metric\"")
    };
    let _ = pki.curl(daemon.address.port(), None, &[]);
    let queries = [
        "up == 1",
        "vpn_daemon_wireguard_up == 0",
        "vpn_daemon_certificate_remaining_seconds{certificate='ca'} > 14 * 86400",
        "vpn_daemon_tls_handshakes_failed_total{reason='NoCertificatesPresented'} == 1",
        "histogram_quantile(0.5, vpn_daemon_request_duration_seconds_bucket) < 3",
    ];
    let end = Instant::now() + PATIENCE;
    let failed = queries.into_iter().find(|query| {
        while !holds(query) && Instant::now() < end {
            thread::sleep(Duration::from_millis(100));
        }
        !holds(query)
    });
    prometheus.kill().unwrap();
    prometheus.wait().unwrap();
    assert_eq!(failed, None);
}

#[test]
fn every_change_is_one_line() {
    let (device, directory) = (Device::new("vda"), Directory::new());
    device.serve();
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
        /w/remove_peer | public_key=KEY | action=remove_peer peer=KEY bytes_in=400 bytes_out=0 @ result=200
        /w/sync_peers | {"peer_list":[{"public_key":"OTHER","ip_net":[]}]} | action=sync_peers dry_run=no added=1 updated=0 removed=0 unchanged=0 @ result=200
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
        daemon.call("POST", row[0], &[&media, "Origin: http://localhost"], b"");
        daemon.call("POST", "/nothing", &[&media], row[1].as_bytes());
        assert_eq!(daemon.call("GET", row[0], &[], b"x").status, 400);
    }
    let lines = audit(&daemon);
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
    let turning = "\u{200e}\u{200f}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\
                   \u{2069}\u{61c}\u{2028}\u{2029}\u{feff}\u{ad}\u{e0001}\u{fff9}";
    for line in plain.log().iter().chain(&tls.log()) {
        assert!(!line.contains(|c: char| c.is_control() || turning.contains(c)), "{line:?}");
    }
    for line in lines.iter().chain(&last) {
        let names = field_names(line);
        assert!(names[0] == "action" && ["common_name", "error"].contains(&&*names[1]), "{line}");
        assert_eq!(names[2..], ["asked_by", "address", "result", "ms"], "{line}");
    }
}

#[test]
fn counters_add_up() {
    let daemon = Daemon::start(&[]);
    let calls = [
        ("GET", "/i/node", "X: y", 200, "/i/node"),
        ("GET", "/w/peer_list", "X: y", 502, "/w/peer_list"),
        ("POST", "/w/add_peer", "Content-Type: text/plain", 415, "/w/add_peer"),
        ("GET", "/i/node/../x", "X: y", 404, "other"),
        ("POST", "/w/x", "Origin: x", 403, "other"),
        ("GET", "/i/node", "X: \u{1}", 400, "other"),
        ("GET", "/metrics", "X: y", 200, "/metrics"),
    ];
    let client = || {
        for (method, path, header, status, _) in calls.repeat(25) {
            assert_eq!(daemon.call(method, path, &[header], b"").status, status);
        }
    };
    thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(client))));
    let expected = calls.map(|(_, _, _, status, call)| {
        format!("requests_total{{call=\"{call}\",status=\"{status}\"}} 200\n")
    });
    let expected = expected.concat()
        + "request_duration_seconds_count{call=\"/w/add_peer\"} 200
           request_duration_seconds_bucket{call=\"/metrics\",le=\"+Inf\"} 200";
    let text = has(&daemon, &expected);
    assert_eq!(text.matches("\nvpn_daemon_requests_total{").count(), 7, "{text}");
    assert_eq!(audit(&daemon).len(), 200);
}

#[test]
fn a_scrape_while_everything_hangs() {
    let (device, directory) = (Device::new("vdh"), Directory::new());
    let _device = FakeOpenVpn::start(device.1.clone(), Mood::Silent, vec![]);
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
