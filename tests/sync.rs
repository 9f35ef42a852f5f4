//! `POST /w/sync_peers` over real HTTP: what is refused, and what a long body may cost. How devices
//! take it is told by the cases of `tests/wireguard`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::{Answer, Daemon, PATIENCE};

const JSON: &str = "Content-Type: application/json";
const KEY: &str = "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=";

fn post(daemon: &Daemon, query: &str, body: &str) -> Answer {
    daemon.call("POST", &format!("/w/sync_peers{query}"), &[JSON], body.as_bytes())
}

#[test]
fn refusals() {
    let daemon = Daemon::start(&[]);
    let form = ["Content-Type: application/x-www-form-urlencoded"];
    let answer = daemon.call("POST", "/w/sync_peers", &form, b"peer_list=");
    assert_eq!((answer.status, answer.error().contains("application/json")), (415, true));
    assert_eq!(daemon.call("POST", "/w/sync_peers", &[], b"{}").status, 415);
    let answer = daemon.get("/w/sync_peers");
    assert_eq!((answer.status, answer.header("Allow")), (405, Some("POST")));
    for (query, body, part) in [
        ("", "", "EOF"),
        ("", "{}", "missing field `peer_list`"),
        ("?dry_run=maybe", r#"{"peer_list":[]}"#, "`dry_run` must be `yes` or `no`"),
        ("?dry_run=yes&dry_run=yes", r#"{"peer_list":[]}"#, "`dry_run` must not be repeated"),
        (
            "",
            r#"{"peer_list":[{"public_key":"short","ip_net":[]}]}"#,
            "`public_key` must be 32 bytes",
        ),
        ("?dry_run=yes", r#"{"peer_list":[{"ip_net":[]}]}"#, "missing field `public_key`"),
    ] {
        let answer = post(&daemon, query, body);
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.error().contains(part), "{answer:?}");
    }
    // A list that is good comes as far as the device, which does not exist.
    let charset = ["Content-Type: application/json; charset=utf-8"];
    let list = format!(r#"{{"peer_list":[{{"public_key":"{KEY}","ip_net":["10.0.0.1/32"]}}]}}"#);
    let answer = daemon.call("POST", "/w/sync_peers", &charset, list.as_bytes());
    assert_eq!(answer.status, 502);
    assert!(answer.error().contains("does not exist"), "{answer:?}");
    assert!(answer.error().ends_with("nothing was changed"), "{answer:?}");
}

/// As many peers, or whatever `item` makes, as 32 MiB hold.
fn longest(item: impl Fn(u32) -> String) -> String {
    let mut body = r#"{"peer_list":["#.to_owned();
    for number in 0.. {
        let item = item(number);
        if body.len() + item.len() + 3 > 32 << 20 {
            break;
        }
        body += if number == 0 { "" } else { "," };
        body += &item;
    }
    body + "]}"
}

fn key(number: u32) -> String {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    STANDARD.encode(bytes)
}

#[test]
fn the_longest_bodies_cost_less_than_four_times_their_length() {
    let short_ips = |number: u32| {
        let ips: Vec<_> = (0..4000)
            .map(|n| format!("\"{}.{}.0.0/16\"", n % 256, (number * 16 + n / 256) % 256))
            .collect();
        format!(r#"{{"public_key":"{}","ip_net":[{}]}}"#, key(number), ips.join(","))
    };
    let bodies = [
        longest(|n| {
            let [_, b, c, d] = n.to_be_bytes();
            format!(r#"{{"public_key":"{}","ip_net":["10.{b}.{c}.{d}/32"]}}"#, key(n))
        }),
        longest(|n| format!(r#"{{"public_key":"{}","ip_net":[]}}"#, key(n))),
        longest(short_ips),
        format!(r#"{{"peer_list":[{{"x":{}"#, "[".repeat((32 << 20) - 30)),
        format!(r#"{{"peer_list":[{{"public_key":"{}"}}]}}"#, "A".repeat((32 << 20) - 40)),
        format!(r#"{{"peer_list":[],"{}":1}}"#, "k".repeat((32 << 20) - 30)),
        format!(r#"{{"peer_list":"{}"}}"#, "s".repeat((32 << 20) - 30)),
    ];
    for (number, body) in bodies.iter().enumerate() {
        let daemon = Daemon::start(&[]);
        let before = daemon.status("VmRSS");
        let answer = post(&daemon, "", body);
        // A build for tests may take longer than a call may.
        assert!([400, 502, 504].contains(&answer.status), "{answer:?}");
        assert!(answer.body.len() < 1000);
        let cost = daemon.status("VmHWM") - before;
        assert!(cost < 4 * 32 * 1024, "body {number}: {cost} KiB");
        // The next request finds the daemon as it was.
        assert_eq!(post(&daemon, "", "{}").status, 400);
    }
}

#[test]
fn a_body_that_stays_away_keeps_nobody_waiting() {
    let daemon = Daemon::start(&[]);
    let head = format!(
        "POST /w/sync_peers HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nContent-Length: 33554432\r\n\r\n"
    );
    let begun: Vec<_> = (0..40)
        .map(|_| {
            let mut stream = daemon.connect();
            stream.write_all(head.as_bytes()).unwrap();
            stream.write_all(r#"{"peer_list":["#.as_bytes()).unwrap();
            stream.write_all(&b" ".repeat(100_000)).unwrap();
            stream
        })
        .collect();
    let answer = post(&daemon, "", r#"{"peer_list":[]}"#);
    assert_eq!(answer.status, 502, "{answer:?}");
    assert!(answer.error().contains("does not exist"));
    drop(begun);
}

/// A userspace device that has peers and nothing else: it answers every request with them.
struct FakeDevice {
    name: String,
    socket: PathBuf,
}

impl FakeDevice {
    fn start(peers: u32) -> Self {
        let mut answer = String::new();
        for number in 0..peers {
            let [a, b, c, d] = number.to_be_bytes();
            let key = number.to_le_bytes().map(|byte| format!("{byte:02x}")).concat();
            writeln!(answer, "public_key={key}{:0>56}\nallowed_ip=10.{b}.{c}.{d}/32", a).unwrap();
            writeln!(answer, "allowed_ip=fd00::{:x}:{:x}/128", number >> 16, number & 0xffff)
                .unwrap();
        }
        answer += "errno=0\n\n";
        let name = format!("vd{}", std::process::id());
        std::fs::create_dir_all("/var/run/wireguard").unwrap();
        let socket = PathBuf::from(format!("/var/run/wireguard/{name}.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                stream.read_exact(&mut [0; b"get=1\n\n".len()]).unwrap();
                // A caller that cannot wait goes away.
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Self { name, socket }
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[test]
fn a_hundred_thousand_peers_are_listed_in_bounded_memory() {
    const PEERS: usize = 100_000;
    let device = FakeDevice::start(u32::try_from(PEERS).unwrap());
    let daemon = Daemon::start(&["-wg-device", &device.name]);
    let list = || {
        // A build for tests on a busy machine may miss the deadline.
        let answers = (0..30).map(|_| daemon.get("/w/peer_list?show_all=yes"));
        answers.into_iter().find(|answer| answer.status == 200).expect("an answer in time")
    };
    for _ in 0..4 {
        let answer = list();
        assert_eq!(answer.body.matches("\"public_key\":").count(), PEERS);
    }
    let body = list().body;
    let nothing = format!(r#"{{"added":[],"updated":[],"removed":[],"unchanged":{PEERS}}}"#);
    let synced = (0..30).map(|_| post(&daemon, "", &body)).find(|answer| answer.status == 200);
    assert_eq!(synced.unwrap().body, nothing);
    let peak = daemon.status("VmHWM");
    assert!(peak < 100 * 1024, "at the peak {peak} KiB");
    // The answer is freed after it is sent.
    let mut idle = daemon.status("VmRSS");
    let end = Instant::now() + PATIENCE;
    while idle >= 25 * 1024 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
        idle = daemon.status("VmRSS");
    }
    println!("{PEERS} peers: {peak} KiB at the peak, {idle} KiB afterwards");
    assert!(idle < 25 * 1024, "afterwards {idle} KiB");
}
