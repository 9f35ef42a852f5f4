//! The cases of the kernel alone: its dumps come in pieces, and other programs may disturb them.

use std::fs::{create_dir_all, remove_dir_all};
use std::ops::Range;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use wireguard_uapi::WgSocket;
use wireguard_uapi::linux::set::{self, WgPeerF};

use crate::cases::{assert_fails, block};
use crate::common::Daemon;
use crate::devices::{Device, Kind, Wanted, key, listed, peer, wanted};
use crate::{Case, say};

pub const CASES: &[Case] = &[
    ("peers and allowed IPs around the dump's message boundaries", message_boundaries),
    ("10,000 peers", ten_thousand_peers),
    ("dumps while peers are removed and added", dumps_while_peers_change),
    ("dumps while allowed IPs change", dumps_while_allowed_ips_change),
    ("without CAP_NET_ADMIN", without_capability),
    ("an interface that is not WireGuard", not_wireguard),
];

fn message_boundaries(kind: Kind) {
    let device = Device::new(kind);
    // The first message takes 17 of them, the second 155.
    for count in (1..=1).chain(15..=25).chain(165..=180).chain([330, 500]) {
        let peer = |n| peer(n, &format!("{} fd00::{n:x}/128", block(n, 1)));
        device.load(&(0..count).map(peer).collect::<Vec<_>>());
        assert_eq!(device.check().len(), count as usize);
    }
    device.load(&(0..=60).map(|n| peer(n, &block(n * 100, n))).collect::<Vec<_>>());
    assert_eq!(device.check().len(), 61);
}

fn ten_thousand_peers(kind: Kind) {
    let device = Device::new(kind);
    let peers =
        |numbers: Range<u32>| -> Vec<Wanted> { numbers.map(|n| peer(n, &block(n, 1))).collect() };
    device.load(&peers(0..10_000));
    assert_eq!(device.add(&peer(10_000, "fd00::1/128")).status, 204);
    let removed = device.remove(&key(5000));
    // Where the machine is slow, it may have gone after a 504.
    if removed.status != 204 {
        assert_eq!(removed.json()["ip_net"], json!(["10.0.19.136/32"]));
    }
    assert_eq!(device.check().len(), 10_000);
    // Removing many takes longer than one call may: the same call again does the rest.
    let cuts = device.sync_until_done(&peers(5000..15_000));
    say(&format!("Kernel: 5,000 removals and 5,000 additions needed {cuts} calls more than one"));
}

/// The kernel ends a dump early when the peer that it stands at goes away. Peers that stay are
/// mixed with peers that go, half of them at a time; and so on for 20 s.
fn dumps_while_peers_change(kind: Kind) {
    let device = Device::new(kind);
    let end = Instant::now() + Duration::from_secs(20);
    let mut dumps = Dumps::default();
    let mut round = 0;
    while Instant::now() < end {
        let (mut all, mut staying) = (Vec::new(), Vec::new());
        for n in 0..200 {
            all.push(peer(n, &block(n, 1)));
            let many = if n % 40 == 0 { 200 } else { 2 };
            staying.push(peer(1000 + n, &block(100_000 + n * 200, many)));
            all.extend(staying.last().cloned());
        }
        device.load(&all);
        round += 1;
        dumps.watch(&device, &staying, || {
            let mut other = WgSocket::connect().unwrap();
            for half in 0..2 {
                std::thread::sleep(Duration::from_millis(30 + 17 * (round % 10)));
                let going: Vec<[u8; 32]> = (0..100).map(|n| bytes(&key(2 * n + half))).collect();
                let remove = |key| set::Peer::from_public_key(key).flags(vec![WgPeerF::RemoveMe]);
                let peers = going.iter().map(remove).collect();
                other.set_device(set::Device::from_ifname(&device.name).peers(peers)).unwrap();
                device.wg(&["peer", &key(10_000 + half), "allowed-ips", "10.200.0.1/32"], "");
            }
        });
    }
    dumps.judge();
}

/// The kernel leaves out the rest of a peer's allowed IPs when any allowed IP has changed.
fn dumps_while_allowed_ips_change(kind: Kind) {
    let device = Device::new(kind);
    let staying: Vec<Wanted> = (0..20).map(|n| peer(n, &block(n * 200, 150))).collect();
    device.load(&staying);
    let end = Instant::now() + Duration::from_secs(10);
    let mut dumps = Dumps::default();
    dumps.watch(&device, &staying, || {
        let mut other = WgSocket::connect().unwrap();
        let (changing, addresses) = (bytes(&key(1000)), ["10.200.0.1", "10.200.0.2"]);
        for round in (0..).take_while(|_| Instant::now() < end) {
            let ipaddr = addresses[round % 2].parse().unwrap();
            let peer = set::Peer::from_public_key(&changing)
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

fn bytes(key: &str) -> [u8; 32] {
    STANDARD.decode(key).unwrap().try_into().unwrap()
}

/// Counts dumps that came back whole, short of a peer or an allowed IP, or not at all.
#[derive(Default, Debug)]
struct Dumps {
    whole: u32,
    short: u32,
    failed: u32,
}

impl Dumps {
    /// Reads the peers again and again while `disturb` runs: none of the staying peers, and none
    /// of their allowed IPs, may ever be missing.
    fn watch(&mut self, device: &Device, staying: &[Wanted], disturb: impl Fn() + Send) {
        let staying = wanted(staying);
        std::thread::scope(|scope| {
            let disturber = scope.spawn(disturb);
            while !disturber.is_finished() {
                let asked = Instant::now();
                let answer = device.daemon.get("/w/peer_list?show_all=yes");
                if answer.status != 200 {
                    let why = answer.error();
                    assert!(why.contains("in time") || why.contains("keeps changing"), "{why}");
                    // The pauses between its tries alone are longer.
                    assert!(asked.elapsed().as_millis() >= 800, "gave up at once: {why}");
                    self.failed += 1;
                    continue;
                }
                let listed = listed(&answer);
                let is_there = |(key, peer): (&String, &Value)| {
                    listed.get(key).is_some_and(|listed| listed["ip_net"] == peer["ip_net"])
                };
                let is_whole = staying.iter().all(is_there);
                *(if is_whole { &mut self.whole } else { &mut self.short }) += 1;
            }
        });
    }

    /// Most dumps have to come back in time, however disturbed.
    fn judge(&self) {
        say(&format!("Kernel: disturbed {self:?}"));
        assert!(self.short == 0 && self.whole > self.failed, "{self:?}");
    }
}

fn without_capability(kind: Kind) {
    let device = Device::new(kind);
    let directory = format!("/tmp/{}", device.name);
    create_dir_all(&directory).unwrap();
    chown(&directory, Some(65534), Some(65534)).unwrap();
    let daemon = Daemon::start_with(&["-wg-device", &device.name], |command| {
        // Leaves root's capabilities behind.
        command.env("RUNTIME_DIRECTORY", &directory).uid(65534);
    });
    assert_fails(&device.name, &daemon, 502, "CAP_NET_ADMIN");
    drop(daemon);
    remove_dir_all(&directory).unwrap();
}

fn not_wireguard(_: Kind) {
    assert_fails("lo", &Daemon::start(&["-wg-device", "lo"]), 502, "is not a WireGuard device");
}
