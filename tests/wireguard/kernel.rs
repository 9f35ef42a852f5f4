//! The cases of the kernel alone: its dumps come in pieces, and other programs may disturb them.

use std::fmt::Write;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use vpn_daemon::wireguard::{AllowedIp, Error, PublicKey, WireGuard};
use wireguard_uapi::WgSocket;
use wireguard_uapi::linux::set::{self, WgPeerF};

use crate::cases::{block, ips, key, texts};
use crate::devices::{Device, Kind, command, input, soon, unused_name};
use crate::{Case, say};

pub const CASES: &[Case] = &[
    ("peer counts around the dump's message boundaries", peer_counts),
    ("0 to 60 allowed IPs around the message boundaries", allowed_ip_counts),
    ("10,000 peers", ten_thousand_peers),
    ("dumps while peers are removed and added", dumps_while_peers_change),
    ("dumps while allowed IPs change", dumps_while_allowed_ips_change),
    ("without CAP_NET_ADMIN", without_capability),
    ("an interface that is not WireGuard", not_wireguard),
];

/// The value of `ROLE` for a process without capabilities.
pub const UNPRIVILEGED: &str = "unprivileged";

type Peers = Vec<(PublicKey, Vec<AllowedIp>)>;

fn peer_counts(kind: Kind) {
    // The first message takes 17 of them, the second 155.
    for count in (1..=1).chain(15..=25).chain(165..=180).chain([330, 500]) {
        let device = Device::new(kind);
        let peer = |number| {
            let address = format!("fd00::{number:x}/128");
            (key(number), [block(number, 1), ips(&[&address])].concat())
        };
        device.load((0..count).map(peer).collect());
        assert_eq!(device.check(), count as usize);
    }
}

fn allowed_ip_counts(kind: Kind) {
    let device = Device::new(kind);
    device.load((0..=60).map(|n| (key(n), block(n * 100, n))).collect());
    assert_eq!(device.check(), 61);
}

fn ten_thousand_peers(kind: Kind) {
    let device = Device::new(kind);
    device.load((0..10_000).map(|n| (key(n), block(n, 1))).collect());
    assert_eq!(device.check(), 10_000);
    device.add(&key(10_000), &ips(&["fd00::1/128"]));
    assert_eq!(device.remove(&key(5000)).unwrap().allowed_ips, block(5000, 1));
    assert_eq!(device.check(), 10_000);
}

/// The kernel ends a dump early when the peer that it stands at goes away. Peers that stay are
/// mixed with peers that go, half of them at a time; and so on for 20 s.
fn dumps_while_peers_change(kind: Kind) {
    let device = Device::new(kind);
    let end = Instant::now() + Duration::from_secs(20);
    let mut dumps = Dumps::default();
    let mut round = 0;
    while Instant::now() < end {
        let (mut all, mut staying) = (Peers::new(), Peers::new());
        for n in 0..200 {
            all.push((key(n), block(n, 1)));
            staying
                .push((key(1000 + n), block(100_000 + n * 200, if n % 40 == 0 { 200 } else { 2 })));
            all.extend(staying.last().cloned());
        }
        device.load(all);
        round += 1;
        dumps.watch(&device.wireguard, &staying, || {
            let mut other = WgSocket::connect().unwrap();
            for half in 0..2 {
                std::thread::sleep(Duration::from_millis(30 + 17 * (round % 10)));
                let going: Vec<PublicKey> = (0..100).map(|n| key(2 * n + half)).collect();
                let remove = |key| set::Peer::from_public_key(key).flags(vec![WgPeerF::RemoveMe]);
                let peers = going.iter().map(|key| remove(key.as_bytes())).collect();
                other.set_device(set::Device::from_ifname(&device.name).peers(peers)).unwrap();
                let newcomer = key(10_000 + half).to_string();
                device.wg(&["peer", &newcomer, "allowed-ips", "10.200.0.1/32"]);
            }
        });
    }
    dumps.judge();
}

/// The kernel leaves out the rest of a peer's allowed IPs when any allowed IP has changed.
fn dumps_while_allowed_ips_change(kind: Kind) {
    let device = Device::new(kind);
    let staying: Peers = (0..20).map(|n| (key(n), block(n * 200, 150))).collect();
    device.load(staying.clone());
    let end = Instant::now() + Duration::from_secs(10);
    let mut dumps = Dumps::default();
    dumps.watch(&device.wireguard, &staying, || {
        let mut other = WgSocket::connect().unwrap();
        let (changing, addresses) = (key(1000), ["10.200.0.1", "10.200.0.2"]);
        for round in (0..).take_while(|_| Instant::now() < end) {
            let ipaddr = addresses[round % 2].parse().unwrap();
            let peer = set::Peer::from_public_key(changing.as_bytes())
                .flags(vec![WgPeerF::ReplaceAllowedIps])
                .allowed_ips(vec![set::AllowedIp::from_ipaddr(&ipaddr)]);
            other.set_device(set::Device::from_ifname(&device.name).peers(vec![peer])).unwrap();
            // Bursts hit every dump that they meet, pauses let some through.
            if round % 60 == 0 {
                std::thread::sleep(Duration::from_millis(300));
            }
        }
    });
    dumps.judge();
}

/// Counts dumps that came back whole, short of a peer or an allowed IP, or not at all.
#[derive(Default)]
struct Dumps {
    whole: u32,
    short: u32,
    failed: u32,
}

impl Dumps {
    /// Reads the peers again and again while `disturb` runs: none of the staying peers, and none
    /// of their allowed IPs, may ever be missing.
    fn watch(&mut self, wireguard: &WireGuard, staying: &Peers, disturb: impl Fn() + Send) {
        std::thread::scope(|scope| {
            let disturber = scope.spawn(disturb);
            while !disturber.is_finished() {
                let deadline = Instant::now() + Duration::from_millis(2500);
                let peers = match wireguard.peers(deadline) {
                    Ok(peers) => peers,
                    Err(Error::Timeout(_) | Error::Disturbed(_)) => {
                        self.failed += 1;
                        continue;
                    }
                    Err(error) => panic!("{error}"),
                };
                let is_whole = staying.iter().all(|(key, allowed_ips)| {
                    let peer = peers.iter().find(|peer| peer.public_key == *key);
                    peer.is_some_and(|peer| texts(&peer.allowed_ips) == texts(allowed_ips))
                });
                *(if is_whole { &mut self.whole } else { &mut self.short }) += 1;
            }
        });
    }

    /// Most dumps have to come back in time, however disturbed.
    fn judge(&self) {
        let Self { whole, short, failed } = self;
        say(&format!(
            "kernel: of the disturbed dumps, {whole} whole, {short} short, {failed} failed"
        ));
        assert_eq!(*short, 0, "short dumps");
        assert!(self.whole > self.failed, "too few dumps came back");
    }
}

fn without_capability(kind: Kind) {
    let device = Device::new(kind);
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kernel"])
        .env("ROLE", UNPRIVILEGED)
        .env("DEVICE", &device.name)
        .uid(65534) // leaves root's capabilities behind
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && output.contains("1 passed"), "{output}");
}

/// What the process without capabilities does.
pub fn unprivileged() {
    let wireguard = WireGuard::new(std::env::var("DEVICE").unwrap().parse().unwrap());
    let errors = [
        wireguard.peers(soon()).unwrap_err(),
        wireguard.add_peer(&key(1), &ips(&["10.1.0.1/32"]), soon()).unwrap_err(),
        wireguard.remove_peer(&key(1), soon()).unwrap_err(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("CAP_NET_ADMIN") && text.contains(wireguard.device()), "{text}");
    }
}

fn not_wireguard(_: Kind) {
    let name = unused_name();
    command("ip", &["link", "add", &name, "type", "veth"]);
    let error = WireGuard::new(name.parse().unwrap()).peers(soon()).unwrap_err().to_string();
    assert!(error.contains(&name) && error.contains("not a WireGuard device"), "{error}");
}

impl Device {
    /// Makes these the device's only peers, with `wg setconf`.
    fn load(&self, peers: Peers) {
        let mut config = format!("[Interface]\nPrivateKey = {}\n", self.private_key);
        for (key, allowed_ips) in peers {
            writeln!(config, "[Peer]\nPublicKey = {key}").unwrap();
            let list: Vec<String> = allowed_ips.iter().map(ToString::to_string).collect();
            if !list.is_empty() {
                writeln!(config, "AllowedIPs = {}", list.join(", ")).unwrap();
            }
        }
        input("wg", &["setconf", &self.name, "/dev/stdin"], &config);
    }
}
