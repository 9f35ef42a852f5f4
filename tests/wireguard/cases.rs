//! The cases that the implementations of WireGuard have in common.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use vpn_daemon::wireguard::{AllowedIp, PublicKey, WireGuard};

use crate::Case;
use crate::common::Daemon;
use crate::devices::{Device, Kind, Namespace, command, soon, unused_name, wait_for};

/// For every implementation.
pub const COMMON: &[Case] = &[
    ("a new device has no peers", no_peers),
    ("add and list", add_and_list),
    ("remove", remove),
    ("an unknown peer cannot be removed", remove_unknown),
    ("adding again replaces the allowed IPs", add_again),
    ("preshared key and keepalive survive", preshared_key_survives),
    ("1,000 and 3,000 allowed IPs", many_allowed_ips),
    ("an allowed IP moves to another peer", allowed_ip_moves),
    ("the device's own key is refused", own_key),
    ("handshake and counters", handshake_and_counters),
    ("no secret is printed", no_secret_is_printed),
    ("a device that does not exist", no_device),
    ("the device is deleted and made again", device_made_again),
    ("over HTTP", over_http),
];

/// Not for boringtun: it has to forget a peer and its session to change it.
pub const SESSION: &[Case] = &[("adding again keeps the session", session_survives)];

/// For implementations that are a process.
pub const PROCESS: &[Case] =
    &[("the process hangs", process_hangs), ("the process was killed", process_killed)];

/// The public key of a peer that only has to exist.
pub fn key(number: u32) -> PublicKey {
    let mut bytes = [7; 32];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes.into()
}

/// Allowed IPs from their texts.
pub fn ips(texts: &[&str]) -> Vec<AllowedIp> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// `count` addresses out of 10.0.0.0/8, from the `first` on.
pub fn block(first: u32, count: u32) -> Vec<AllowedIp> {
    let address = |number| Ipv4Addr::from(0x0a00_0000 + number);
    (first..first + count).map(|n| format!("{}/32", address(n)).parse().unwrap()).collect()
}

/// As `wg` prints them.
pub fn texts(allowed_ips: &[AllowedIp]) -> BTreeSet<String> {
    allowed_ips.iter().map(ToString::to_string).collect()
}

fn no_peers(kind: Kind) {
    assert_eq!(Device::new(kind).check(), 0);
}

fn add_and_list(kind: Kind) {
    let device = Device::new(kind);
    let lists: [&[&str]; 4] = [
        &["10.1.0.1/32"],
        &["fd00:1::1/128"],
        &["10.1.0.2/32", "fd00:1::2/128", "10.2.0.0/16", "fd00:2::/64"],
        &["0.0.0.0/0", "::/0"],
    ];
    for (number, list) in (0..).zip(lists) {
        device.add(&key(number), &ips(list));
        let row = device.row(&key(number)).unwrap();
        assert_eq!(row.allowed_ips, texts(&ips(list)));
        assert_eq!((row.preshared_key.as_str(), row.endpoint.as_str()), ("(none)", "(none)"));
        let peer = device.peer(&key(number));
        assert_eq!((peer.last_handshake, peer.rx_bytes, peer.tx_bytes), (None, 0, 0));
    }
    assert_eq!(device.check(), lists.len());
}

fn remove(kind: Kind) {
    let device = Device::new(kind);
    device.add(&key(1), &ips(&["10.1.0.1/32", "fd00:1::1/128"]));
    device.add(&key(2), &ips(&["10.1.0.2/32"]));
    let removed = device.remove(&key(1)).expect("the peer was there");
    assert_eq!(removed.public_key, key(1));
    assert_eq!(texts(&removed.allowed_ips), texts(&ips(&["10.1.0.1/32", "fd00:1::1/128"])));
    assert_eq!(device.row(&key(1)), None);
    assert_eq!(device.check(), 1);
    assert_eq!(device.remove(&key(1)), None);
}

fn remove_unknown(kind: Kind) {
    let device = Device::new(kind);
    assert_eq!(device.remove(&key(1)), None);
    device.add(&key(2), &ips(&["10.1.0.2/32"]));
    assert_eq!(device.remove(&key(1)), None);
    assert_eq!(device.check(), 1);
}

fn add_again(kind: Kind) {
    let device = Device::new(kind);
    for list in [&["10.1.0.1/32", "10.1.0.2/32"][..], &["10.1.0.2/32", "fd00::2/128"]] {
        // The second time, nothing changes.
        for _ in 0..2 {
            device.add(&key(1), &ips(list));
            assert_eq!(device.row(&key(1)).unwrap().allowed_ips, texts(&ips(list)));
            assert_eq!(device.check(), 1);
        }
    }
}

fn many_allowed_ips(kind: Kind) {
    let device = Device::new(kind);
    device.add(&key(1), &ips(&["10.255.0.1/32"]));
    for count in [1000, 3000] {
        device.add(&key(2), &block(0, count));
        assert_eq!(device.row(&key(2)).unwrap().allowed_ips, texts(&block(0, count)));
        assert_eq!(device.check(), 2);
    }
    assert_eq!(device.remove(&key(2)).unwrap().allowed_ips.len(), 3000);
}

fn allowed_ip_moves(kind: Kind) {
    let device = Device::new(kind);
    device.add(&key(1), &ips(&["10.1.0.1/32", "10.1.0.2/32"]));
    device.add(&key(2), &ips(&["10.1.0.2/32"]));
    assert_eq!(device.row(&key(2)).unwrap().allowed_ips, texts(&ips(&["10.1.0.2/32"])));
    // boringtun routes to the new peer, but goes on listing the address at the old one.
    if kind != Kind::Boringtun {
        assert_eq!(device.row(&key(1)).unwrap().allowed_ips, texts(&ips(&["10.1.0.1/32"])));
    }
    assert_eq!(device.check(), 2);
}

fn own_key(kind: Kind) {
    let device = Device::new(kind);
    let ip = ips(&["10.1.0.1/32"]);
    let error = device.wireguard.add_peer(&device.public_key, &ip, soon()).unwrap_err();
    assert!(error.to_string().contains(&device.name), "{error}");
    assert_eq!(device.check(), 0);
}

fn preshared_key_survives(kind: Kind) {
    let device = Device::new(kind);
    let preshared_key = command("wg", &["genpsk"]);
    let name = key(1).to_string();
    let arguments = ["peer", &name, "persistent-keepalive", "25", "endpoint", "127.0.0.1:9"];
    device.wg_input(&[&arguments[..], &["preshared-key", "/dev/stdin"]].concat(), &preshared_key);
    device.add(&key(1), &ips(&["10.1.0.1/32"]));
    let row = device.row(&key(1)).unwrap();
    assert_eq!(row.allowed_ips, texts(&ips(&["10.1.0.1/32"])));
    assert_eq!(row.preshared_key, preshared_key.trim());
    assert_eq!((row.keepalive.as_str(), row.endpoint.as_str()), ("25", "127.0.0.1:9"));
}

/// Two devices of one kind in two namespaces, each the other's peer, with a session.
struct Tunnel {
    server: Device,
    client: Device,
    client_namespace: Namespace,
}

impl Tunnel {
    const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));
    const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 2));

    /// The server is in the caller's namespace; the client is its only peer, added by the backend.
    fn new(kind: Kind) -> Self {
        let client_namespace = Namespace::new();
        let server = Device::new(kind);
        let (here, there) = (unused_name(), unused_name());
        let netns = client_namespace.path();
        command(
            "ip",
            &["link", "add", &here, "type", "veth", "peer", "name", &there, "netns", &netns],
        );
        command("ip", &["address", "add", "192.0.2.1/24", "dev", &here]);
        command("ip", &["link", "set", &here, "up"]);
        command("ip", &["address", "add", "10.99.0.1/24", "dev", &server.name]);
        server.wg(&["listen-port", "51820"]);
        let server_key = server.public_key.to_string();
        let client = client_namespace.enter(|| {
            command("ip", &["address", "add", "192.0.2.2/24", "dev", &there]);
            command("ip", &["link", "set", &there, "up"]);
            let client = Device::new(kind);
            command("ip", &["address", "add", "10.99.0.2/24", "dev", &client.name]);
            let peer = ["peer", &server_key, "endpoint", "192.0.2.1:51820"];
            client.wg(&[&peer[..], &["allowed-ips", "10.99.0.1/32"]].concat());
            client
        });
        server.add(&client.public_key, &ips(&["10.99.0.2/32"]));
        Self { server, client, client_namespace }
    }

    /// Sends `bytes`, less than a socket's buffer holds, from the client to the server.
    fn send(&self, bytes: usize) {
        let receiver = UdpSocket::bind((Self::SERVER, 0)).unwrap();
        receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let address = receiver.local_addr().unwrap();
        let sender = self.client_namespace.enter(|| UdpSocket::bind((Self::CLIENT, 0)).unwrap());
        let mut buffer = [0; 1000];
        // The first datagrams may be lost while the two sides meet.
        wait_for("a datagram through the tunnel", || {
            sender.send_to(&buffer, address).unwrap();
            receiver.recv(&mut [0; 1000]).is_ok()
        });
        for _ in 1..bytes / buffer.len() {
            sender.send_to(&buffer, address).unwrap();
            receiver.recv(&mut buffer).unwrap();
        }
    }
}

fn handshake_and_counters(kind: Kind) {
    let tunnel = Tunnel::new(kind);
    let (server, client) = (&tunnel.server, &tunnel.client.public_key);
    assert_eq!(server.peer(client).last_handshake, None);
    tunnel.send(50_000);
    wait_for("quiet counters", || server.dump() == server.dump());
    server.check();
    let peer = server.peer(client);
    let age = SystemTime::now().duration_since(peer.last_handshake.expect("a session"));
    // The kernel gives the handshake's time in whole seconds or finer, never ahead of the clock.
    assert!(age.unwrap_or_default() < Duration::from_secs(120), "{:?}", peer.last_handshake);
    assert!(peer.rx_bytes >= 50_000, "received {} bytes", peer.rx_bytes);
    assert!(peer.tx_bytes < 10_000, "sent {} bytes", peer.tx_bytes);
    let removed = server.remove(client).expect("the peer was there");
    assert_eq!((removed.rx_bytes, removed.tx_bytes), (peer.rx_bytes, peer.tx_bytes));
    assert_eq!(removed.public_key, *client);
    assert!(removed.last_handshake.is_some());
    assert_eq!(server.check(), 0);
}

fn session_survives(kind: Kind) {
    let tunnel = Tunnel::new(kind);
    let (server, client) = (&tunnel.server, &tunnel.client.public_key);
    tunnel.send(20_000);
    wait_for("quiet counters", || server.dump() == server.dump());
    let before = server.row(client).unwrap();
    server.add(client, &ips(&["10.99.0.2/32", "fd00::2/128"]));
    let mut after = server.row(client).unwrap();
    assert_eq!(after.allowed_ips, texts(&ips(&["10.99.0.2/32", "fd00::2/128"])));
    after.allowed_ips.clone_from(&before.allowed_ips);
    assert_eq!(after, before, "endpoint, handshake and counters stay");
    tunnel.send(20_000);
    let later = server.row(client).unwrap();
    assert_eq!(later.last_handshake, before.last_handshake, "no second handshake");
    assert!(later.rx_bytes >= before.rx_bytes + 20_000);
    server.check();
}

fn no_secret_is_printed(kind: Kind) {
    let device = Device::new(kind);
    let preshared_key = command("wg", &["genpsk"]);
    let preshared_key = preshared_key.trim();
    let name = key(1).to_string();
    device.wg_input(&["peer", &name, "preshared-key", "/dev/stdin"], preshared_key);
    device.add(&key(1), &ips(&["10.1.0.1/32"]));
    let mut printed = format!("{:?}", device.peers());
    let ip = ips(&["10.1.0.2/32"]);
    let own = device.wireguard.add_peer(&device.public_key, &ip, soon()).unwrap_err();
    let late = device.wireguard.peers(Instant::now()).err();
    printed += &format!("{own} {own:?} {late:?} {:?}", device.remove(&key(1)));
    printed += &crate::logged();
    assert_no_secret(&device, preshared_key, &printed);
}

/// Neither the device's private key nor the preshared key is in the text.
fn assert_no_secret(device: &Device, preshared_key: &str, text: &str) {
    for secret in [&device.private_key, preshared_key] {
        for form in forms(secret) {
            assert!(!text.contains(&form), "a secret was printed, as {form}");
        }
    }
}

/// How a key may look in print: base64, hexadecimal, a list of numbers.
fn forms(secret: &str) -> [String; 3] {
    let bytes = *secret.parse::<PublicKey>().unwrap().as_bytes();
    let list = format!("{bytes:?}");
    [
        secret.to_owned(),
        bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        list.trim_matches(['[', ']']).to_owned(),
    ]
}

/// Every call fails and says these words.
fn assert_fails(wireguard: &WireGuard, words: &[&str]) {
    let errors = [
        wireguard.peers(soon()).unwrap_err(),
        wireguard.add_peer(&key(1), &ips(&["10.1.0.1/32"]), soon()).unwrap_err(),
        wireguard.remove_peer(&key(1), soon()).unwrap_err(),
    ];
    for error in errors {
        for word in words {
            assert!(error.to_string().contains(word), "not about {word}: {error}");
        }
        assert!(!error.is_timeout(), "{error}");
    }
}

fn no_device(_: Kind) {
    let name = unused_name();
    assert_fails(&WireGuard::new(name.parse().unwrap()), &[&name, "does not exist"]);
}

fn device_made_again(kind: Kind) {
    let mut device = Device::new(kind);
    for round in 0..3 {
        device.add(&key(round), &ips(&["10.1.0.1/32"]));
        assert_eq!(device.check(), 1);
        device.delete();
        assert_fails(&device.wireguard, &[&device.name, "does not exist"]);
        device.create();
        assert_eq!(device.check(), 0);
    }
}

fn process_hangs(kind: Kind) {
    let device = Device::new(kind);
    device.add(&key(1), &ips(&["10.1.0.1/32"]));
    device.stop();
    let deadline = || Instant::now() + Duration::from_millis(300);
    let ip = ips(&["10.1.0.2/32"]);
    let errors = [
        device.wireguard.peers(deadline()).unwrap_err(),
        device.wireguard.add_peer(&key(2), &ip, deadline()).unwrap_err(),
        device.wireguard.remove_peer(&key(1), deadline()).unwrap_err(),
    ];
    device.resume();
    for error in errors {
        assert!(error.is_timeout() && error.to_string().contains(&device.name), "{error}");
    }
    device.peers();
}

fn process_killed(kind: Kind) {
    let mut device = Device::new(kind);
    let socket = device.socket();
    let stale = socket.with_extension("stale");
    std::fs::rename(&socket, &stale).unwrap();
    device.delete();
    std::fs::rename(&stale, &socket).unwrap();
    assert_fails(&device.wireguard, &[&device.name]);
    std::fs::remove_file(&socket).unwrap();
}

/// The portal's way: the daemon beside the device.
fn over_http(kind: Kind) {
    let device = Device::new(kind);
    let daemon = Daemon::start_with(&["-wg-device", &device.name], |command| {
        command.env("RUST_LOG", "trace");
    });
    let preshared_key = command("wg", &["genpsk"]);
    let name = key(1).to_string();
    device.wg_input(&["peer", &name, "preshared-key", "/dev/stdin"], &preshared_key);
    let form = [("public_key", &*name), ("ip_net", "10.1.0.1/32"), ("ip_net", "fd00::1/128")];
    assert_eq!(daemon.post("/w/add_peer", &form).status, 204);
    let listed = texts(&ips(&["10.1.0.1/32", "fd00::1/128"]));
    assert_eq!(device.row(&key(1)).unwrap().allowed_ips, listed);
    let list = daemon.get("/w/peer_list?show_all=yes").json();
    let peer = &list["peer_list"][0];
    assert_eq!((&peer["public_key"], &peer["bytes_in"]), (&json!(name), &json!(0)));
    assert_eq!(peer["ip_net"].as_array().unwrap().len(), 2);
    assert_eq!(daemon.get("/w/peer_list").json(), json!({"peer_list": []}));
    let node = daemon.get("/i/node?include_client_peer_count=yes").json();
    assert_eq!(node["w_peer_count"], 0);
    let removed = daemon.post("/w/remove_peer", &form[..1]);
    assert_eq!((removed.status, &removed.json()), (200, peer));
    assert_eq!(daemon.post("/w/remove_peer", &form[..1]).status, 204);
    assert_eq!(device.dump(), []);
    assert_no_secret(&device, preshared_key.trim(), &daemon.log().join("\n"));
}
