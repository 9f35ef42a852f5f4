//! The cases that the implementations of WireGuard have in common, and those of processes.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::sys::signal::Signal::SIGCONT;
use serde_json::{Value, json};

use crate::Case;
use crate::common::{Answer, Daemon, wait_until};
use crate::devices::{Device, Kind, Wanted, key, peer};
use crate::programs::{Namespace, command};

/// For every implementation.
pub const COMMON: &[Case] = &[
    ("add, add again, list and remove", add_list_remove),
    ("1,000 and 3,000 allowed IPs", many_allowed_ips),
    ("an allowed IP moves to another peer", allowed_ip_moves),
    ("the device's own key", own_key),
    ("handshake, counters and session", session),
    ("settings of a peer, and no secret is logged", settings),
    ("the device is not there, is deleted and made again", device_made_again),
    ("sync adds, updates and removes", sync_adds_updates_removes),
];

/// For implementations that are a process.
pub const PROCESS: &[Case] = &[
    ("the process hangs", process_hangs),
    ("the process was killed, and another takes its place", process_replaced),
];

/// `count` addresses out of 10.0.0.0/8, from the `first` on.
pub fn block(first: u32, count: u32) -> String {
    let ip = |n| format!("{}/32 ", Ipv4Addr::from(0x0a00_0000 + n));
    (first..first + count).map(ip).collect()
}

fn add_list_remove(kind: Kind) {
    let device = Device::new(kind);
    device.has(&[]);
    let mut peers = Vec::new();
    for (number, ips) in (0..).zip([
        "10.1.0.1/32",
        "fd00:1::1/128",
        "10.1.0.2/32 fd00:1::2/128 10.2.0.0/16 fd00:2::/64",
        "0.0.0.0/0 ::/0",
    ]) {
        // Again with other allowed IPs, and twice with the same.
        for ips in ["10.3.0.1/32 fd00:3::1/128", ips, ips] {
            assert_eq!(device.add(&peer(number, ips)).status, 204);
        }
        peers.push(peer(number, ips));
        device.has(&peers);
    }
    assert_eq!(device.daemon.get("/w/peer_list").json(), json!({"peer_list": []}));
    let removed = device.remove(&key(1));
    let expected = json!({
        "bytes_in": 0, "bytes_out": 0, "ip_net": ["fd00:1::1/128"],
        "last_handshake_time": null, "public_key": key(1),
    });
    assert_eq!((removed.status, removed.json()), (200, expected));
    peers.remove(1);
    device.has(&peers);
    assert_eq!(device.remove(&key(1)).status, 204);
    for (action, fields) in
        [("add", "allowed_ips=fd00:1::1/128"), ("remove", "bytes_in=0 bytes_out=0")]
    {
        device.daemon.wait_for_log(&format!("audit action={action}_peer peer={} {fields}", key(1)));
    }
    // That line has the counters: there is no second one where the answer comes in time.
    assert!(!device.daemon.log().iter().any(|line| line.contains("removed after")));
}

fn many_allowed_ips(kind: Kind) {
    let device = Device::new(kind);
    let other = peer(1, "10.255.0.1/32");
    device.add(&other);
    for count in [1000, 3000] {
        let many = peer(2, &block(0, count));
        assert_eq!(device.add(&many).status, 204);
        device.has(&[other.clone(), many]);
    }
    let removed = device.remove(&key(2)).json();
    assert_eq!(removed["ip_net"].as_array().unwrap().len(), 3000);
    for first in [0, 1] {
        device.sync_until_done(&[other.clone(), peer(2, &block(first, 3000))]);
    }
}

fn allowed_ip_moves(kind: Kind) {
    let device = Device::new(kind);
    let (both, one) = ("10.1.0.1/32 10.1.0.2/32", "10.1.0.1/32");
    device.add(&peer(1, both));
    device.add(&peer(2, "10.1.0.2/32"));
    // boringtun routes to the new peer, but goes on listing the address at the old one.
    let left = if kind == Kind::Boringtun { both } else { one };
    device.has(&[peer(1, left), peer(2, "10.1.0.2/32")]);
}

fn own_key(kind: Kind) {
    let device = Device::new(kind);
    let before = [peer(1, "10.1.0.1/32")];
    let own = (device.public_key.clone(), vec!["10.1.0.2/32".to_owned()]);
    device.add(&before[0]);
    for answer in [device.add(&own), device.sync("", &[before[0].clone(), own])] {
        // wireguard-go does not tell its key, and ignores such a peer in silence.
        if kind == Kind::WireguardGo {
            assert!([200, 204].contains(&answer.status), "{answer:?}");
        } else {
            assert_eq!(answer.status, 400);
            let sentence = answer.error();
            assert!(sentence.contains(&device.name) && sentence.contains(&device.public_key));
        }
        device.has(&before);
    }
}

/// Two devices of one kind, each the other's peer, with a session.
struct Tunnel {
    server: Device,
    client: Device,
    client_namespace: Namespace,
}

impl Tunnel {
    const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));
    const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 2));

    /// The client is the server's only peer, added by the daemon.
    fn new(kind: Kind) -> Self {
        let (server, client) = (Device::new(kind), Device::new(kind));
        let client_namespace = Namespace::new();
        command("ip", &["address", "add", "10.99.0.1/24", "dev", &server.name]);
        server.wg(&["listen-port", "51820"], "");
        let peer = ["peer", &server.public_key, "endpoint", "127.0.0.1:51820"];
        client.wg(&[&peer[..], &["allowed-ips", "10.99.0.1/32"]].concat(), "");
        // What it encrypts still leaves from the namespace that it was made in.
        command("ip", &["link", "set", &client.name, "netns", &client_namespace.path()]);
        client_namespace.enter(|| {
            command("ip", &["address", "add", "10.99.0.2/24", "dev", &client.name]);
            command("ip", &["link", "set", &client.name, "up"]);
        });
        server.add(&(client.public_key.clone(), vec!["10.99.0.2/32".to_owned()]));
        Self { server, client, client_namespace }
    }

    /// Sends `bytes`, less than a socket's buffer holds, from the client to the server; the peer then.
    fn send(&self, bytes: usize) -> Value {
        let receiver = UdpSocket::bind((Self::SERVER, 0)).unwrap();
        receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let address = receiver.local_addr().unwrap();
        let sender = self.client_namespace.enter(|| UdpSocket::bind((Self::CLIENT, 0)).unwrap());
        let mut buffer = [0; 1000];
        // The first datagrams may be lost while the two sides meet.
        wait_until("a datagram through the tunnel", || {
            sender.send_to(&buffer, address).unwrap();
            receiver.recv(&mut [0; 1000]).is_ok()
        });
        for _ in 1..bytes / buffer.len() {
            sender.send_to(&buffer, address).unwrap();
            receiver.recv(&mut buffer).unwrap();
        }
        let seen = || self.server.seen();
        wait_until("quiet counters", || seen() == seen());
        self.server.check().remove(&self.client.public_key).unwrap()
    }
}

fn session(kind: Kind) {
    let tunnel = Tunnel::new(kind);
    let (server, client) = (&tunnel.server, &tunnel.client.public_key);
    assert_eq!(server.listed()[client]["last_handshake_time"], Value::Null);
    let mut before = tunnel.send(50_000);
    assert!(before["bytes_in"].as_u64() >= Some(50_000), "{before}");
    assert!(before["bytes_out"].as_u64() < Some(10_000), "{before}");
    // Online, so its handshake is recent.
    assert_eq!(server.daemon.get("/w/peer_list").json()["peer_list"][0], before);
    let node = server.daemon.get("/i/node?include_client_peer_count=yes").json();
    assert_eq!(node["w_peer_count"], 1);
    // boringtun forgets a session when the allowed IPs change.
    if kind != Kind::Boringtun {
        let endpoint = server.row(client)[2].clone();
        let ips = ["10.99.0.2/32", "fd00::2/128"].map(str::to_owned);
        before["ip_net"] = json!(ips);
        assert_eq!(server.add(&(client.clone(), ips.into())).status, 204);
        assert_eq!((&server.check()[client], &server.row(client)[2]), (&before, &endpoint));
        let later = tunnel.send(20_000);
        assert_eq!(later["last_handshake_time"], before["last_handshake_time"]);
        assert!(later["bytes_in"].as_u64() >= before["bytes_in"].as_u64().map(|n| n + 20_000));
        before = later;
    }
    assert_eq!(server.remove(client).json(), before, "with its final counters");
    server.has(&[]);
}

fn settings(kind: Kind) {
    let mut device = Device::new(kind);
    device.daemon = Daemon::start_with(&["-wg-device", &device.name], |command| {
        command.env("RUST_LOG", "trace");
    });
    let preshared_key = command("wg", &["genpsk"]).trim().to_owned();
    let key = key(1);
    let settings = ["peer", &*key, "persistent-keepalive", "25", "endpoint", "127.0.0.1:9"];
    let secret = ["preshared-key", "/dev/stdin"];
    device.wg(&[&settings[..], &secret].concat(), &preshared_key);
    let before = device.row(&key);
    // What is so already is left alone; boringtun forgets the settings when the allowed IPs change.
    device.sync_until_done(&[peer(1, "")]);
    assert_eq!(device.row(&key), before);
    device.add(&peer(1, "10.1.0.1/32"));
    let (row, kept) = (device.row(&key), kind != Kind::Boringtun);
    assert_eq!([1, 2, 7].map(|field| row[field] == before[field]), [kept; 3], "{row:?}");
    device.add(&(device.public_key.clone(), vec!["10.1.0.1/32".to_owned()]));
    assert_eq!(device.remove(&key).status, 200);
    let log = device.daemon.log().join("\n");
    for secret in [&preshared_key, &device.private_key] {
        // As base64, in hexadecimal, and as a list of numbers.
        let bytes = STANDARD.decode(secret).unwrap();
        let hexadecimal: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let list = format!("{bytes:?}");
        for form in [secret, &hexadecimal, list.trim_matches(['[', ']'])] {
            assert!(!log.contains(form), "a secret was logged, as {form}");
        }
    }
}

/// Every call fails and says these words.
pub fn assert_fails(device: &str, daemon: &Daemon, status: u16, words: &str) {
    let form = [("public_key", &*key(1)), ("ip_net", "10.1.0.1/32")];
    let answers = [
        daemon.get("/w/peer_list"),
        daemon.post("/w/add_peer", &form),
        daemon.post("/w/remove_peer", &form[..1]),
        daemon.call(
            "POST",
            "/w/sync_peers",
            &["Content-Type: application/json"],
            br#"{"peer_list":[]}"#,
        ),
    ];
    for answer in answers {
        let sentence = answer.error();
        assert_eq!(answer.status, status, "{sentence}");
        assert!(sentence.contains(words) && sentence.contains(device), "{sentence}");
    }
}

fn device_made_again(kind: Kind) {
    let mut device = Device::new(kind);
    for round in 0..3 {
        let peer = peer(round, "10.1.0.1/32");
        assert_eq!(device.add(&peer).status, 204);
        device.has(&[peer]);
        device.delete();
        let _ = std::fs::remove_file(device.socket());
        assert_fails(&device.name, &device.daemon, 502, "does not exist: create it");
        device.create();
        device.has(&[]);
    }
}

fn sync_adds_updates_removes(kind: Kind) {
    let device = Device::new(kind);
    // Each with a dry run before, which tells the same and changes nothing, and again after it.
    let sync = |peers: &[Wanted]| {
        let (before, dry) = (device.seen(), device.sync("?dry_run=yes", peers));
        assert_eq!(device.seen(), before);
        let answer = device.sync("?dry_run=no", peers);
        let counts = |answer: &Answer| {
            ["added", "updated", "removed"]
                .map(|list| answer.json()[list].as_array().unwrap().len())
        };
        assert_eq!((answer.status, counts(&answer)), (200, counts(&dry)));
        device.has(peers);
        let unchanged = peers.len();
        let nothing = json!({"added": [], "updated": [], "removed": [], "unchanged": unchanged});
        assert_eq!(device.sync("", peers).json(), nothing);
        answer.json()
    };
    let first = [
        peer(1, "10.1.0.1/32 fd00::1/128"),
        peer(2, "10.1.0.2/32"),
        peer(3, ""),
        peer(4, "10.1.0.4/32"),
    ];
    let synced = sync(&first);
    assert_eq!(synced["added"], json!([key(1), key(2), key(3), key(4)]));
    let gone = device.listed().remove(&key(4));
    let second = [
        peer(5, "10.1.0.4/32"),
        peer(3, "10.1.0.3/32"),
        peer(2, ""),
        peer(1, "fd00::1/128 10.1.0.1/32"),
    ];
    let expected = json!({
        "added": [key(5)], "updated": [key(3), key(2)], "removed": [gone.unwrap()], "unchanged": 1,
    });
    assert_eq!(sync(&second), expected);
    assert_eq!(sync(&[])["removed"].as_array().unwrap().len(), 4);
    for line in [
        format!("peer {} on {}: removed after 0 bytes in", key(4), device.name),
        "audit action=sync_peers dry_run=no added=1 updated=2 removed=1 unchanged=1".to_owned(),
    ] {
        device.daemon.wait_for_log(&line);
    }
    // Each order of three allowed IPs over three peers, one after another.
    let ips = ["10.1.0.1/32", "10.1.0.2/32", "10.1.0.0/24"];
    for [a, b, c] in [[0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 2, 1], [1, 2, 0], [2, 0, 1]] {
        device.sync_until_done(&[peer(0, ips[a]), peer(1, ips[b]), peer(2, ips[c])]);
    }
    // The list as the daemon itself gives it.
    device.sync_until_done(&first);
    let list = device.daemon.get("/w/peer_list?show_all=yes").body;
    let header = ["Content-Type: application/json"];
    let answer = device.daemon.call("POST", "/w/sync_peers", &header, list.as_bytes());
    assert_eq!(answer.json()["unchanged"], 4);
}

fn process_hangs(kind: Kind) {
    let device = Device::new(kind);
    let peers = |numbers: std::ops::Range<u32>, shift| -> Vec<Wanted> {
        numbers.map(|n| peer(n, &block((n + shift) * 2, 2))).collect()
    };
    device.sync_until_done(&peers(0..2000, 0));
    device.stop();
    assert_fails(&device.name, &device.daemon, 504, "did not answer in time");
    // A third goes, a third comes, and what stays takes the allowed IPs of its neighbours. The process
    // goes on for a moment now and then, so that the deadline cuts the sync off anywhere.
    let goal = peers(700..2700, 1);
    std::thread::scope(|scope| {
        let syncing = scope.spawn(|| device.sync("", &goal));
        while !syncing.is_finished() {
            std::thread::sleep(Duration::from_millis(200));
            device.signal(SIGCONT);
            std::thread::sleep(Duration::from_millis(20));
            device.stop();
        }
    });
    device.signal(SIGCONT);
    device.sync_until_done(&goal);
}

fn process_replaced(kind: Kind) {
    let mut device = Device::new(kind);
    device.add(&peer(1, "10.1.0.1/32"));
    device.delete();
    assert_fails("/var/run/wireguard/", &device.daemon, 502, "");
    std::fs::remove_file(device.socket()).unwrap();
    device.kind = if kind == Kind::Boringtun { Kind::WireguardGo } else { Kind::Boringtun };
    device.create();
    for ip in ["10.1.0.1/32", "10.1.0.2/32", "10.1.0.3/32"] {
        assert_eq!(device.add(&peer(1, ip)).status, 204);
        device.has(&[peer(1, ip)]);
    }
}
