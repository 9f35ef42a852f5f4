//! WireGuard: a userspace device on the host; the kernel's in a virtual machine, where this
//! executable runs once more and prints its rows.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::Daemon;
use crate::row::{Row, Unit, seconds, turns};
use crate::vm::{Initramfs, Kernel, Machine, which};
use crate::{Process, Say, get};

/// The variable that is set in the machine.
pub const GUEST: &str = "GUEST";
/// What a line of the guest begins with that holds a row, in JSON.
const ROW: &str = "row ";
const ROUNDS: usize = 7;
/// Peers that a round adds one by one.
const ADDITIONS: usize = 50;

pub fn measure(say: Say) {
    let [device, empty] = [10_000, 0].map(|peers| Device::new(peers, true));
    say(add("add_peer, new connections, wireguard-go", &device, &empty));
    drop((device, empty));

    let kernel = Kernel::find();
    let executable = std::env::current_exe().unwrap();
    let command = format!("ip link set lo up && {GUEST}=yes {}", executable.display());
    let mut initramfs = Initramfs::new(&kernel, &["wireguard"], &command);
    initramfs.program(&executable);
    initramfs.program(Path::new(env!("CARGO_BIN_EXE_vpn-daemon")));
    ["wg", "ip"].iter().for_each(|program| initramfs.program(&which(program)));
    let image = initramfs.write();
    // Emulation on a busy machine is slow: this bounds a hang, it is no measure.
    let machine = Machine::boot_counting(&kernel, &image, 2048, Duration::from_secs(3600));
    let mut console = String::new();
    let status = machine.wait(|line| match line.strip_prefix(ROW) {
        Some(row) => say(serde_json::from_str(row).unwrap()),
        None => console += &format!("{line}\n"),
    });
    assert!(status == Some(0), "failed in the machine:\n{console}");
}

/// What runs in the machine.
pub fn measure_in_guest() {
    let say = |row: Row| println!("{ROW}{}", serde_json::to_string(&row).unwrap());
    for peers in [1_000, 10_000, 50_000] {
        let device = Device::new(peers, false);
        say(list(&device));
        if peers == 10_000 {
            sync(&device).into_iter().for_each(say);
            say(add("add_peer, new connections", &device, &Device::new(0, false)));
            say(remove(&device));
        }
    }
    memory(&Device::new(100_000, false)).into_iter().for_each(say);
}

fn list(device: &Device) -> Row {
    assert_eq!(device.list().matches("\"public_key\"").count(), device.peers.len());
    let rounds = turns(ROUNDS, || seconds(|| device.list()), || seconds(|| device.dump()));
    let amount = device.peers.len();
    Row::new(Unit::Time, "peer list", amount, "wg show wg0 dump", 1.1, rounds)
}

/// All peers onto an empty device, and once more.
fn sync(device: &Device) -> [Row; 2] {
    let (json, conf, amount) = (device.json(), device.conf(), device.peers.len());
    let json_type = ["Content-Type: application/json"];
    let sync = || {
        let answer = device.daemon.call("POST", "/w/sync_peers", &json_type, json.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.body);
    };
    let emptied = |work: &dyn Fn()| {
        device.setconf("");
        seconds(work)
    };
    let rounds = turns(ROUNDS, || emptied(&sync), || emptied(&|| device.setconf(&conf)));
    let work = "sync_peers, empty device";
    let all = Row::new(Unit::Time, work, amount, "wg setconf", 2.5, rounds);
    let rounds = turns(ROUNDS, || seconds(sync), || seconds(|| device.list()));
    let work = "sync_peers, nothing to change";
    [all, Row::new(Unit::Time, work, amount, "the peer list", 1.3, rounds)]
}

/// One by one on new connections, beside the same on an empty device.
fn add(work: &str, device: &Device, empty: &Device) -> Row {
    let peers: Vec<Peer> = (1_000_000..1_000_000 + ADDITIONS).map(peer).collect();
    // Seconds for one addition; the device is left as it was.
    let add_all = |device: &Device| {
        let time = seconds(|| {
            for [key, four, six] in &peers {
                let form = [("public_key", &**key), ("ip_net", four), ("ip_net", six)];
                assert_eq!(device.daemon.post("/w/add_peer", &form).status, 204);
            }
        });
        device.remove(&peers);
        time / peers.len() as f64
    };
    let rounds = turns(ROUNDS, || add_all(device), || add_all(empty));
    Row::new(Unit::Time, work, device.peers.len(), "the same, empty device", 1.2, rounds)
}

fn remove(device: &Device) -> Row {
    let (mut first, mut last) = (device.peers.iter(), device.peers.rchunks(1));
    let by_daemon = || {
        let form = [("public_key", &*first.next().unwrap()[0])];
        seconds(|| assert_eq!(device.daemon.post("/w/remove_peer", &form).status, 200))
    };
    let by_wg = || {
        seconds(|| {
            device.dump();
            device.remove(last.next().unwrap());
        })
    };
    let (rounds, amount) = (turns(ROUNDS, by_daemon, by_wg), device.peers.len());
    Row::new(Unit::Time, "remove_peer", amount, "wg show wg0 dump, wg set remove", 0.5, rounds)
}

/// The daemon's resident size: the peak while it lists all peers, and afterwards.
fn memory(device: &Device) -> [Row; 2] {
    device.list();
    std::thread::sleep(Duration::from_secs(5));
    [("at its peak", "VmHWM", 100.0), ("5 s later", "VmRSS", 25.0)].map(|(when, field, limit)| {
        let rounds = vec![(device.daemon.status(field) as f64 / 1024.0, 1.0)];
        let work = format!("peer list: memory {when}");
        Row::new(Unit::Size, &work, device.peers.len(), "", limit, rounds)
    })
}

/// A key, which is of digits that a form takes as they are, and two allowed IPs.
type Peer = [String; 3];

fn peer(number: usize) -> Peer {
    // In no order.
    let key = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let [_, a, b, c] = (number as u32).to_be_bytes();
    let (four, six) = (format!("10.{a}.{b}.{c}/32"), format!("fd00::{a:x}:{b:x}:{c:x}/128"));
    [format!("{key:021}{key:021}A="), four, six]
}

/// A device with that many peers, and a daemon for it. A kernel's device goes with its machine.
struct Device {
    name: String,
    peers: Vec<Peer>,
    daemon: Daemon,
    /// Of a userspace device, which has no interface in this network namespace.
    _process: Option<Process>,
}

impl Device {
    fn new(peers: usize, is_userspace: bool) -> Self {
        let name = format!("wg{peers}-{}", std::process::id());
        let process = is_userspace.then(|| {
            let socket = format!("/var/run/wireguard/{name}.sock");
            let mut command = Command::new("unshare");
            command.args(["--net", "wireguard-go", "-f", &name]);
            Process::start(&mut command, || UnixStream::connect(&socket).is_ok())
        });
        if !is_userspace {
            run("ip", &["link", "add", &name, "type", "wireguard"], "");
        }
        let daemon = Daemon::start(&["-wg-device", &name]);
        let peers = (0..peers).map(peer).collect();
        let device = Self { name, peers, daemon, _process: process };
        device.setconf(&device.conf());
        // The kernel's has none: it would work out a secret for each peer, which hides all else.
        if is_userspace {
            run("wg", &["set", &device.name, "private-key", "/dev/stdin"], &peer(0)[0]);
        }
        device
    }

    /// The peers as `wg setconf` takes them.
    fn conf(&self) -> String {
        let peer = |[key, four, six]: &Peer| {
            format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {four}, {six}\n")
        };
        self.peers.iter().map(peer).collect()
    }

    /// The peers as the body of a sync.
    fn json(&self) -> String {
        let peer = |[key, four, six]: &Peer| {
            format!(r#"{{"public_key":"{key}","ip_net":["{four}","{six}"]}}"#)
        };
        let peers: Vec<_> = self.peers.iter().map(peer).collect();
        format!(r#"{{"peer_list":[{}]}}"#, peers.join(","))
    }

    fn list(&self) -> String {
        get(&self.daemon, "/w/peer_list?show_all=yes")
    }

    /// The start of `wg` is a part of what it costs.
    fn dump(&self) {
        run("wg", &["show", &self.name, "dump"], "");
    }

    fn setconf(&self, peers: &str) {
        run("wg", &["setconf", &self.name, "/dev/stdin"], &format!("[Interface]\n{peers}"));
    }

    fn remove(&self, peers: &[Peer]) {
        let peers = peers.iter().flat_map(|peer| ["peer", &peer[0], "remove"]);
        run("wg", &["set", &self.name].into_iter().chain(peers).collect::<Vec<_>>(), "");
    }
}

/// Runs a program, which has to succeed, and reads what it says.
fn run(program: &str, arguments: &[&str], input: &str) {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait_with_output().unwrap().status.success(), "{command:?} failed");
}
