//! WireGuard devices, each with a daemon, and with `wg` as the independent witness.

#![allow(dead_code, reason = "the bench uses a part of it")]

use std::collections::BTreeMap;
use std::fs::{DirEntry, read_dir, read_to_string};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::common::{Answer, Daemon, wait_until};
use crate::programs::{Process, command, input};
use crate::vm::target_dir;

/// Who implements WireGuard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Kernel,
    WireguardGo,
    Boringtun,
}

/// A peer that is to be: its key and its allowed IPs.
pub type Wanted = (String, Vec<String>);

/// A WireGuard device in the namespace of the calling thread, and its daemon; dropping it deletes it.
pub struct Device {
    pub name: String,
    pub kind: Kind,
    pub private_key: String,
    pub public_key: String,
    pub daemon: Daemon,
    process: Option<Process>,
}

impl Device {
    pub fn new(kind: Kind) -> Self {
        Self::with(kind, &[])
    }

    /// The daemon has these arguments besides.
    pub fn with(kind: Kind, arguments: &[&str]) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("t{}x{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let private_key = command("wg", &["genkey"]).trim().to_owned();
        let public_key = input("wg", &["pubkey"], &private_key).trim().to_owned();
        let daemon = Daemon::start(&[&["-wg-device", &name], arguments].concat());
        let mut device = Self { name, kind, private_key, public_key, daemon, process: None };
        device.create();
        device
    }

    /// Makes the interface, which does not exist, with the device's private key.
    pub fn create(&mut self) {
        let name = self.name.as_str();
        let userspace = match self.kind {
            Kind::Kernel => {
                command("ip", &["link", "add", name, "type", "wireguard"]);
                None
            }
            Kind::WireguardGo => Some(PathBuf::from("wireguard-go")),
            Kind::Boringtun => Some(target_dir().join("boringtun/bin/boringtun-cli")),
        };
        self.process = userspace.map(|program| {
            let mut command = Command::new(program);
            // boringtun: do not become the user of `sudo`.
            command.args(["-f", name]).env("WG_SUDO", "true");
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let process = Process::start(&mut command);
            // `wg` deletes a socket on which nobody listens yet.
            wait_until("its socket", || UnixStream::connect(self.socket()).is_ok());
            process
        });
        self.wg(&["private-key", "/dev/stdin"], &self.private_key);
        command("ip", &["link", "set", name, "up"]);
    }

    /// Deletes the interface; a killed process leaves its socket behind.
    pub fn delete(&mut self) {
        if self.process.take().is_none() {
            command("ip", &["link", "delete", &self.name]);
        }
    }

    /// Stops the userspace implementation, as a process that hangs.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.process.as_ref().unwrap().0.id());
        let stopped = |task: std::io::Result<DirEntry>| {
            read_to_string(task.unwrap().path().join("stat")).unwrap().contains(") T ")
        };
        // Threads that run on another CPU go on for a moment.
        wait_until("the process stops", || read_dir(&tasks).unwrap().all(stopped));
    }

    /// Sends a signal to the userspace implementation.
    pub fn signal(&self, signal: Signal) {
        let id = self.process.as_ref().unwrap().0.id().try_into().unwrap();
        kill(Pid::from_raw(id), signal).unwrap();
    }

    /// Where a userspace implementation listens.
    pub fn socket(&self) -> PathBuf {
        format!("/var/run/wireguard/{}.sock", self.name).into()
    }

    /// `wg set DEVICE …`, which may read a key from `stdin`.
    pub fn wg(&self, arguments: &[&str], stdin: &str) {
        input("wg", &[&["set", &self.name], arguments].concat(), stdin);
    }

    /// Makes these the device's only peers, with `wg setconf`.
    pub fn load(&self, peers: &[Wanted]) {
        let config = format!("[Interface]\nPrivateKey = {}\n{}", self.private_key, config(peers));
        input("wg", &["setconf", &self.name, "/dev/stdin"], &config);
    }

    /// What `wg show` knows: a line for the device, and one for each peer.
    pub fn dump(&self) -> String {
        command("wg", &["show", &self.name, "dump"])
    }

    /// The peer as `wg show … dump` prints it.
    pub fn row(&self, key: &str) -> Vec<String> {
        let dump = self.dump();
        let row = dump.lines().find(|line| line.starts_with(key)).expect("the peer is there");
        row.split('\t').map(str::to_owned).collect()
    }

    /// All peers as `wg` sees them, in the words of the API.
    pub fn seen(&self) -> Peers {
        by_key(self.dump().lines().skip(1).map(|line| {
            let fields: Vec<&str> = line.split('\t').collect();
            let [key, _, _, allowed_ips, seen, rx, tx, _] = fields[..] else { panic!("{line}") };
            let time = || command("date", &["-u", "-d", &format!("@{seen}"), "+%FT%TZ"]);
            json!({
                "bytes_in": rx.parse::<u64>().unwrap(),
                "bytes_out": tx.parse::<u64>().unwrap(),
                "ip_net": allowed_ips.split(',').filter(|ip| *ip != "(none)").collect::<Vec<_>>(),
                "last_handshake_time": (seen != "0").then(|| time().trim().to_owned()),
                "public_key": key,
            })
        }))
    }

    /// All peers as the daemon sees them. An emulated machine may need some time.
    pub fn listed(&self) -> Peers {
        let mut answers = (0..10).map(|_| self.daemon.get("/w/peer_list?show_all=yes"));
        listed(&answers.find(|answer| answer.status != 504).expect("an answer in time"))
    }

    /// Asserts that the daemon and `wg` see the same; what they see.
    pub fn check(&self) -> Peers {
        let (listed, mut seen) = (self.listed(), self.seen());
        if self.kind == Kind::Boringtun {
            // It tells how long ago the handshake was where `wg` expects the time.
            for (peer, other) in seen.values_mut().zip(listed.values()) {
                peer["last_handshake_time"] = other["last_handshake_time"].clone();
            }
        }
        assert_eq!(listed, seen);
        listed
    }

    /// Asserts that the device has these peers and no others.
    pub fn has(&self, peers: &[Wanted]) {
        let ips = |peers: Peers| peers.into_values().map(|peer| peer["ip_net"].clone());
        let (seen, wanted) = (self.check(), wanted(peers));
        assert!(seen.keys().eq(wanted.keys()), "{seen:?}");
        assert!(ips(seen).eq(ips(wanted)), "the allowed IPs are others");
    }

    /// An emulated machine may need some time.
    pub fn add(&self, (key, allowed_ips): &Wanted) -> Answer {
        // As short as can be: a form has at most 64 KiB.
        let ips: String = allowed_ips.iter().map(|ip| format!("&ip_net={ip}")).collect();
        let form = format!("public_key={}{ips}", key.replace('+', "%2B"));
        let header = "Content-Type: application/x-www-form-urlencoded";
        let add = || self.daemon.call("POST", "/w/add_peer", &[header], form.as_bytes());
        (0..10).map(|_| add()).find(|answer| answer.status != 504).expect("an answer in time")
    }

    /// An emulated machine may need some time: then the peer may be gone at the second request.
    pub fn remove(&self, key: &str) -> Answer {
        let remove = || self.daemon.post("/w/remove_peer", &[("public_key", key)]);
        (0..10).map(|_| remove()).find(|answer| answer.status != 504).expect("an answer in time")
    }

    pub fn sync(&self, query: &str, peers: &[Wanted]) -> Answer {
        // Other fields are ignored.
        let peers =
            peers.iter().map(|(key, ips)| json!({"public_key": key, "ip_net": ips, "x": 1}));
        let body = json!({"peer_list": peers.collect::<Vec<_>>()}).to_string();
        let target = format!("/w/sync_peers{query}");
        self.daemon.call("POST", &target, &["Content-Type: application/json"], body.as_bytes())
    }

    /// Asks until it is done; how often it was cut off by its deadline.
    pub fn sync_until_done(&self, peers: &[Wanted]) -> u32 {
        let mut left = usize::MAX;
        for cuts in 0..100 {
            let answer = self.sync("", peers);
            if answer.status == 200 {
                self.has(peers);
                return cuts;
            }
            assert_eq!(answer.status, 504, "{answer:?}");
            // "…; 7 of 1000 changes are known to be applied…"
            let sentence = answer.error();
            let words: Vec<_> = sentence.split(' ').collect();
            if let Some(at) = words.windows(2).position(|pair| pair == ["changes", "are"]) {
                let number = |at: usize| words[at].parse::<usize>().unwrap();
                let (done, all) = (number(at - 3), number(at - 1));
                assert!(done <= all && all <= left, "{sentence}, and {left} were left");
                left = all - done;
            }
        }
        panic!("no end");
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A device of the kernel ends with its namespace.
        let _ = std::fs::remove_file(self.socket());
    }
}

/// Peers as `wg setconf` takes them.
pub fn config(peers: &[Wanted]) -> String {
    let peer = |(key, ips): &Wanted| {
        let ips = ips.iter().map(|ip| format!("AllowedIPs = {ip}\n"));
        format!("[Peer]\nPublicKey = {key}\n{}", ips.collect::<String>())
    };
    peers.iter().map(peer).collect()
}

/// Peers in the words of the API, by public key, with their allowed IPs in order.
pub type Peers = BTreeMap<String, Value>;

fn by_key(peers: impl Iterator<Item = Value>) -> Peers {
    let by_key = |mut peer: Value| {
        let ips = peer["ip_net"].as_array_mut().unwrap();
        ips.sort_by_key(|ip| ip.as_str().unwrap().to_owned());
        (peer["public_key"].as_str().unwrap().to_owned(), peer)
    };
    peers.map(by_key).collect()
}

pub fn wanted(peers: &[Wanted]) -> Peers {
    by_key(peers.iter().map(|(key, ips)| json!({"public_key": key, "ip_net": ips})))
}

/// The answer to `GET /w/peer_list`.
pub fn listed(answer: &Answer) -> Peers {
    assert_eq!(answer.status, 200, "{answer:?}");
    by_key(answer.json()["peer_list"].as_array().unwrap().iter().cloned())
}

/// A peer with these allowed IPs.
pub fn peer(number: u32, allowed_ips: &str) -> Wanted {
    (key(number), allowed_ips.split_whitespace().map(str::to_owned).collect())
}

/// The public key of a peer that only has to exist.
pub fn key(number: u32) -> String {
    let mut bytes = [7; 32];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    STANDARD.encode(bytes)
}
