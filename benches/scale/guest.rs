//! The measurements on the kernel's WireGuard: this part runs inside the virtual machine and
//! prints a line for each figure.

use std::fmt::Write as _;
use std::io::{BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{Answer, Daemon, connect};
use crate::measure::{Turns, seconds};

/// The value of `ROLE` in the machine.
pub const ROLE: &str = "guest";

/// What a line with a figure begins with; then, separated by tabs: work, peers, seconds of the
/// daemon, seconds of the floor, ratio; or memory, peers, KiB before, at the peak, afterwards.
pub const FIGURE: &str = "figure";
pub const LIST: &str = "list";
pub const SYNC: &str = "sync";
pub const UNCHANGED: &str = "unchanged";
pub const ADD: &str = "add";
pub const REMOVE: &str = "remove";
pub const MEMORY: &str = "memory";

/// The clock counts instructions: rounds differ little.
const ROUNDS: usize = 3;

/// Numbers of peers that are compared.
pub const SIZES: [usize; 3] = [1_000, 10_000, 50_000];

/// Requests of a round that adds peers one by one.
const ADDITIONS: usize = 100;

pub fn measure() {
    run("ip", &["link", "set", "lo", "up"]);
    for size in SIZES {
        let device = Device::new(size);
        list(&device);
        sync(&device);
        remove(&device);
        add(&device);
    }
    memory();
}

fn list(device: &Device) {
    let daemon = device.daemon();
    let check = get(&daemon, "/w/peer_list?show_all=yes");
    assert_eq!(check.body.matches("\"public_key\"").count(), device.peers.len());
    let turns = Turns::take(
        ROUNDS,
        || seconds(|| drop(get(&daemon, "/w/peer_list?show_all=yes"))),
        || seconds(|| drop(dump(device))),
    );
    say(LIST, device.peers.len(), &turns);
}

/// All peers onto an empty device, and once more.
fn sync(device: &Device) {
    let daemon = device.daemon();
    let (all, conf) = (device.json(), device.conf());
    let turns = Turns::take(
        ROUNDS,
        || {
            device.empty();
            seconds(|| device.sync(&daemon, &all))
        },
        || {
            device.empty();
            seconds(|| device.setconf(&conf))
        },
    );
    say(SYNC, device.peers.len(), &turns);
    let turns = Turns::take(
        ROUNDS,
        || seconds(|| device.sync(&daemon, &all)),
        || seconds(|| drop(get(&daemon, "/w/peer_list?show_all=yes"))),
    );
    say(UNCHANGED, device.peers.len(), &turns);
}

/// One by one on new connections, beside the same on an empty device.
fn add(device: &Device) {
    let empty = Device::new(0);
    let (daemon, floor) = (device.daemon(), empty.daemon());
    let newcomers: Vec<Peer> = (0..ADDITIONS).map(|n| Peer::number(1_000_000 + n)).collect();
    let turns = Turns::take(
        ROUNDS,
        || add_all(&daemon, device, &newcomers),
        || add_all(&floor, &empty, &newcomers),
    );
    say(ADD, device.peers.len(), &turns);
}

/// Seconds for one addition, on the average; the device is left as it was.
fn add_all(daemon: &Daemon, device: &Device, peers: &[Peer]) -> f64 {
    let time = seconds(|| {
        for peer in peers {
            let form = format!(
                "public_key={}&ip_net={}&ip_net={}",
                peer.key.replace('+', "%2B"),
                peer.ips[0],
                peer.ips[1]
            );
            assert_eq!(post(daemon, "/w/add_peer", FORM, &form).status, 204);
        }
    });
    for peer in peers {
        device.remove(peer);
    }
    time / peers.len() as f64
}

fn remove(device: &Device) {
    let daemon = device.daemon();
    let mut peers = device.peers.iter();
    let mut others = device.peers.iter().rev();
    let turns = Turns::take(
        ROUNDS,
        || {
            let form = format!("public_key={}", peers.next().unwrap().key.replace('+', "%2B"));
            seconds(|| assert_eq!(post(&daemon, "/w/remove_peer", FORM, &form).status, 200))
        },
        || {
            seconds(|| {
                dump(device);
                device.remove(others.next().unwrap());
            })
        },
    );
    say(REMOVE, device.peers.len(), &turns);
}

/// The daemon's resident size: the peak while it lists 100,000 peers, and afterwards.
fn memory() {
    let device = Device::new(100_000);
    let daemon = device.daemon();
    let before = daemon.status("VmRSS");
    let answer = get(&daemon, "/w/peer_list?show_all=yes");
    assert_eq!(answer.status, 200, "{}", answer.body);
    std::thread::sleep(Duration::from_secs(2));
    let (peak, after) = (daemon.status("VmHWM"), daemon.status("VmRSS"));
    println!("{FIGURE}\t{MEMORY}\t{}\t{before}\t{peak}\t{after}", device.peers.len());
}

fn say(work: &str, peers: usize, turns: &Turns) {
    let (daemon, floor, ratio) = (turns.daemon(), turns.floor(), turns.ratio());
    println!("{FIGURE}\t{work}\t{peers}\t{daemon}\t{floor}\t{ratio}");
}

const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";

fn get(daemon: &Daemon, target: &str) -> Answer {
    request(daemon, &format!("GET {target} HTTP/1.1\r\nHost: node\r\n\r\n"))
}

fn post(daemon: &Daemon, target: &str, media_type: &str, body: &str) -> Answer {
    let length = body.len();
    let request_text = format!(
        "POST {target} HTTP/1.1\r\nHost: node\r\nContent-Type: {media_type}\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    request(daemon, &request_text)
}

/// A request on a connection of its own, as the portal makes them.
fn request(daemon: &Daemon, text: &str) -> Answer {
    let mut stream = connect(daemon.address);
    stream.write_all(text.as_bytes()).unwrap();
    Answer::read(&mut BufReader::new(stream), false).unwrap()
}

/// What `wg` prints; its start is a part of what it costs.
fn dump(device: &Device) -> Vec<u8> {
    let output = Command::new("wg").args(["show", &device.name, "dump"]).output().unwrap();
    assert!(output.status.success());
    output.stdout
}

struct Peer {
    key: String,
    ips: [String; 2],
}

impl Peer {
    fn number(number: usize) -> Self {
        let mut state = number as u64;
        let mut key = [0; 32];
        for part in key.chunks_mut(8) {
            // splitmix64: keys that look as random as real ones
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            part.copy_from_slice(&(word ^ (word >> 31)).to_le_bytes());
        }
        let [_, a, b, c] = (number as u32).to_be_bytes();
        let (high, low) = (number >> 16, number & 0xffff);
        Self {
            key: vpn_daemon::wireguard::PublicKey::from(key).to_string(),
            ips: [format!("10.{a}.{b}.{c}/32"), format!("fd00::{high:x}:{low:x}/128")],
        }
    }
}

/// A device of the kernel's with that many peers; dropping it deletes it.
struct Device {
    name: String,
    peers: Vec<Peer>,
}

impl Device {
    fn new(peers: usize) -> Self {
        let device =
            Self { name: format!("wg{peers}"), peers: (0..peers).map(Peer::number).collect() };
        run("ip", &["link", "add", &device.name, "type", "wireguard"]);
        device.setconf(&device.conf());
        device
    }

    fn empty(&self) {
        self.setconf("");
    }

    /// The peers as `wg setconf` takes them.
    fn conf(&self) -> String {
        let mut lines = String::new();
        for peer in &self.peers {
            let [four, six] = &peer.ips;
            writeln!(lines, "[Peer]\nPublicKey = {}\nAllowedIPs = {four}, {six}", peer.key)
                .unwrap();
        }
        lines
    }

    fn setconf(&self, peers: &str) {
        let mut child = Command::new("wg")
            .args(["setconf", &self.name, "/dev/stdin"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        write!(stdin, "[Interface]\n{peers}").unwrap();
        drop(stdin);
        assert!(child.wait().unwrap().success());
    }

    /// The peers as the body of a sync.
    fn json(&self) -> String {
        let peer = |peer: &Peer| {
            let [four, six] = &peer.ips;
            format!(r#"{{"public_key":"{}","ip_net":["{four}","{six}"]}}"#, peer.key)
        };
        let peers: Vec<_> = self.peers.iter().map(peer).collect();
        format!(r#"{{"peer_list":[{}]}}"#, peers.join(","))
    }

    fn sync(&self, daemon: &Daemon, body: &str) {
        let answer = post(daemon, "/w/sync_peers", JSON, body);
        assert_eq!(answer.status, 200, "{} peers: {}", self.peers.len(), answer.body);
    }

    fn remove(&self, peer: &Peer) {
        run("wg", &["set", &self.name, "peer", &peer.key, "remove"]);
    }

    fn daemon(&self) -> Daemon {
        Daemon::start(&["-wg-device", &self.name])
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        run("ip", &["link", "delete", &self.name]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {} failed", arguments.join(" "));
}
