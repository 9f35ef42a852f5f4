//! WireGuard: a userspace device on the host; the kernel's in a virtual machine, where this
//! executable runs once more and prints its rows.

use std::time::Duration;

use serde_json::json;

use crate::devices::{self, Device, Kind, Wanted, config};
use crate::programs::{Namespace, command, input};
use crate::row::{Row, Unit, seconds, turns};
use crate::{Say, get, vm};

/// What a line of the guest begins with that holds a row, in JSON.
const ROW: &str = "row ";
const ROUNDS: usize = 7;
/// Peers that a round adds one by one.
const ADDITIONS: u32 = 50;

pub fn measure(say: Say) {
    say(Namespace::new().enter(|| {
        let [full, empty] = [10_000, 0].map(|count| Full::new(Kind::WireguardGo, count));
        add("add_peer, new connections, wireguard-go", &full, &empty)
    }));
    vm::run_inside(vm::COUNTING, ["", ""], |line| {
        if let Some(row) = line.strip_prefix(ROW) {
            say(serde_json::from_str(row).unwrap());
        }
    });
}

/// What runs in the machine.
pub fn measure_in_guest() {
    let say = |row: Row| println!("{ROW}{}", serde_json::to_string(&row).unwrap());
    let full = |count| Full::new(Kind::Kernel, count);
    for count in [1_000, 10_000, 50_000] {
        let full = full(count);
        say(full.list());
        if count == 10_000 {
            full.sync().into_iter().for_each(say);
            say(add("add_peer, new connections", &full, &Full::new(Kind::Kernel, 0)));
            say(full.remove());
        }
    }
    full(100_000).memory().into_iter().for_each(say);
}

/// A peer with two allowed IPs.
fn peer(number: u32) -> Wanted {
    let [_, a, b, c] = number.to_be_bytes();
    devices::peer(number, &format!("10.{a}.{b}.{c}/32 fd00::{a:x}:{b:x}:{c:x}/128"))
}

/// A device full of peers. A kernel's goes with its machine.
struct Full {
    device: Device,
    peers: Vec<Wanted>,
}

impl Full {
    fn new(kind: Kind, count: u32) -> Self {
        let full = Self { device: Device::new(kind), peers: (0..count).map(peer).collect() };
        match kind {
            // Without a private key: it would work out a secret for each peer, which hides all else.
            Kind::Kernel => full.setconf(&config(&full.peers)),
            _ => full.device.load(&full.peers),
        }
        full
    }

    fn setconf(&self, peers: &str) {
        let config = format!("[Interface]\n{peers}");
        input("wg", &["setconf", &self.device.name, "/dev/stdin"], &config);
    }

    /// Removes peers; the start of `wg` is a part of what it costs.
    fn remove_by_wg(&self, peers: &[Wanted]) {
        let peers = peers.iter().flat_map(|(key, _)| ["peer", key, "remove"]);
        command("wg", &["set", &self.device.name].into_iter().chain(peers).collect::<Vec<_>>());
    }

    fn get(&self) -> String {
        get(&self.device.daemon, "/w/peer_list?show_all=yes")
    }

    fn row(&self, work: &str, floor: &str, limit: f64, rounds: Vec<(f64, f64)>) -> Row {
        Row::new(Unit::Time, work, self.peers.len(), floor, limit, rounds)
    }

    fn list(&self) -> Row {
        assert_eq!(self.get().matches("\"public_key\"").count(), self.peers.len());
        let rounds = turns(ROUNDS, || seconds(|| self.get()), || seconds(|| self.device.dump()));
        self.row("peer list", "wg show wg0 dump", 1.1, rounds)
    }

    /// All peers onto an empty device, and once more.
    fn sync(&self) -> [Row; 2] {
        let peer = |(key, ips): &Wanted| json!({"public_key": key, "ip_net": ips});
        let peers: Vec<_> = self.peers.iter().map(peer).collect();
        let (body, config) = (json!({"peer_list": peers}).to_string(), config(&self.peers));
        let media_type = ["Content-Type: application/json"];
        let sync = || {
            let daemon = &self.device.daemon;
            let answer = daemon.call("POST", "/w/sync_peers", &media_type, body.as_bytes());
            assert_eq!(answer.status, 200, "{}", answer.body);
        };
        let emptied = |work: &dyn Fn()| {
            self.setconf("");
            seconds(work)
        };
        let all = turns(ROUNDS, || emptied(&sync), || emptied(&|| self.setconf(&config)));
        let nothing = turns(ROUNDS, || seconds(sync), || seconds(|| self.get()));
        [
            self.row("sync_peers, empty device", "wg setconf", 2.5, all),
            self.row("sync_peers, nothing to change", "the peer list", 1.3, nothing),
        ]
    }

    fn remove(&self) -> Row {
        let (mut first, mut last) = (self.peers.iter(), self.peers.rchunks(1));
        let by_daemon = || {
            let (key, _) = first.next().unwrap();
            seconds(|| assert_eq!(self.device.remove(key).status, 200))
        };
        let by_wg = || {
            seconds(|| {
                self.device.dump();
                self.remove_by_wg(last.next().unwrap());
            })
        };
        let rounds = turns(ROUNDS, by_daemon, by_wg);
        self.row("remove_peer", "wg show wg0 dump, wg set remove", 0.5, rounds)
    }

    /// The daemon's resident size: the peak while it lists all peers, and afterwards.
    fn memory(&self) -> [Row; 2] {
        self.get();
        std::thread::sleep(Duration::from_secs(5));
        [("at its peak", "VmHWM", 100.0), ("5 s later", "VmRSS", 25.0)].map(
            |(when, field, limit)| {
                let work = format!("peer list: memory {when}");
                let rounds = vec![(self.device.daemon.status(field) as f64 / 1024.0, 1.0)];
                Row::new(Unit::Size, &work, self.peers.len(), "", limit, rounds)
            },
        )
    }
}

/// One by one on new connections, beside the same on an empty device.
fn add(work: &str, full: &Full, empty: &Full) -> Row {
    let peers: Vec<Wanted> = (1_000_000..1_000_000 + ADDITIONS).map(peer).collect();
    // Seconds for one addition; the device is left as it was.
    let add_all = |full: &Full| {
        let time = seconds(|| {
            for peer in &peers {
                assert_eq!(full.device.add(peer).status, 204);
            }
        });
        full.remove_by_wg(&peers);
        time / peers.len() as f64
    };
    let rounds = turns(ROUNDS, || add_all(full), || add_all(empty));
    full.row(work, "the same, empty device", 1.2, rounds)
}
