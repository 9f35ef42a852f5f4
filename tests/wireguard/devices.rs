//! Network namespaces and the WireGuard devices in them, with `wg` as the independent witness.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{DirEntry, File, read_dir, read_to_string};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vpn_daemon::wireguard::{AllowedIp, Peer, PublicKey, WireGuard};

use crate::vm::target_dir;

/// Who implements WireGuard.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Kernel,
    WireguardGo,
    Boringtun,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::WireguardGo => "wireguard_go",
            Self::Boringtun => "boringtun",
        })
    }
}

/// A network namespace without a name; it is gone when this and its users are.
pub struct Namespace(File);

impl Namespace {
    pub fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace needs root");
            command("ip", &["link", "set", "lo", "up"]);
            Self(File::open("/proc/thread-self/ns/net").unwrap())
        };
        std::thread::scope(|scope| scope.spawn(make).join().unwrap())
    }

    /// Runs `f`, and what it starts, in the namespace.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let enter = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
            f()
        };
        std::thread::scope(|scope| scope.spawn(enter).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// The argument of `ip link … netns` for this namespace.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Runs a program that has to succeed; its output.
pub fn command(program: &str, arguments: &[&str]) -> String {
    input(program, arguments, "")
}

/// Runs a program that reads `stdin` and has to succeed; its output.
pub fn input(program: &str, arguments: &[&str], stdin: &str) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}; run tests/install-deps"));
    let mut pipe = child.stdin.take().unwrap();
    // A program that does not read its input may have ended by now.
    let _ = pipe.write_all(stdin.as_bytes());
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{program} {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A peer as `wg show … dump` prints it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    pub public_key: String,
    pub preshared_key: String,
    pub endpoint: String,
    pub allowed_ips: BTreeSet<String>,
    pub last_handshake: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub keepalive: String,
}

/// A WireGuard device in the namespace of the calling thread; dropping it deletes it.
pub struct Device {
    pub name: String,
    pub kind: Kind,
    pub private_key: String,
    pub public_key: PublicKey,
    pub wireguard: WireGuard,
    process: Option<Child>,
}

impl Device {
    pub fn new(kind: Kind) -> Self {
        let private_key = command("wg", &["genkey"]);
        let public_key = input("wg", &["pubkey"], &private_key).trim().parse().unwrap();
        let name = unused_name();
        let wireguard = WireGuard::new(name.parse().unwrap());
        let private_key = private_key.trim().to_owned();
        let mut device = Self { name, kind, private_key, public_key, wireguard, process: None };
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
            let process = Command::new(&program)
                .args(["-f", name])
                .env("WG_SUDO", "true") // boringtun: do not become the user of `sudo`
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap_or_else(|e| panic!("{}: {e}; run tests/install-deps", program.display()));
            wait_for(&format!("{} and its socket", program.display()), || self.socket().exists());
            process
        });
        self.wg_input(&["private-key", "/dev/stdin"], &self.private_key);
        command("ip", &["link", "set", name, "up"]);
    }

    /// Deletes the interface.
    pub fn delete(&mut self) {
        match self.process.take() {
            None => drop(command("ip", &["link", "delete", &self.name])),
            Some(mut process) => {
                process.kill().unwrap();
                process.wait().unwrap();
                // A killed process leaves its socket behind.
                let _ = std::fs::remove_file(self.socket());
            }
        }
    }

    /// Stops the userspace implementation, as a process that hangs.
    pub fn stop(&self) {
        let id = self.signal(Signal::SIGSTOP);
        let stopped = |task: std::io::Result<DirEntry>| {
            read_to_string(task.unwrap().path().join("stat")).unwrap().contains(") T ")
        };
        // Threads that run on another CPU go on for a moment.
        wait_for("the process to stop", || {
            read_dir(format!("/proc/{id}/task")).unwrap().all(stopped)
        });
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) -> u32 {
        let id = self.process.as_ref().unwrap().id();
        kill(Pid::from_raw(id.try_into().unwrap()), signal).unwrap();
        id
    }

    /// Where a userspace implementation listens.
    pub fn socket(&self) -> PathBuf {
        format!("/var/run/wireguard/{}.sock", self.name).into()
    }

    /// `wg set DEVICE …`
    pub fn wg(&self, arguments: &[&str]) {
        self.wg_input(arguments, "");
    }

    /// `wg set DEVICE …` that reads a key from its standard input.
    pub fn wg_input(&self, arguments: &[&str], stdin: &str) {
        input("wg", &[&["set", &self.name], arguments].concat(), stdin);
    }

    /// All peers as `wg` sees them, in order of the public key.
    pub fn dump(&self) -> Vec<Row> {
        let dump = command("wg", &["show", &self.name, "dump"]);
        let mut rows: Vec<Row> = dump.lines().skip(1).map(row).collect();
        rows.sort_by(|a, b| a.public_key.cmp(&b.public_key));
        rows
    }

    /// The peer of this key as `wg` sees it.
    pub fn row(&self, key: &PublicKey) -> Option<Row> {
        self.dump().into_iter().find(|row| row.public_key == key.to_string())
    }

    /// All peers as the backend sees them, in order of the public key.
    pub fn peers(&self) -> Vec<Peer<'static>> {
        let peers = self.wireguard.peers(soon()).unwrap_or_else(|e| panic!("{e}"));
        let mut peers: Vec<_> = peers.iter().map(Peer::into_owned).collect();
        peers.sort_by_key(|peer| peer.public_key.to_string());
        peers
    }

    /// The peer of this key as the backend sees it.
    pub fn peer(&self, key: &PublicKey) -> Peer<'static> {
        self.peers().into_iter().find(|peer| peer.public_key == *key).expect("the peer is there")
    }

    pub fn add(&self, key: &PublicKey, allowed_ips: &[AllowedIp]) {
        self.wireguard.add_peer(key, allowed_ips, soon()).unwrap_or_else(|e| panic!("{e}"));
    }

    pub fn remove(&self, key: &PublicKey) -> Option<Peer<'static>> {
        self.wireguard.remove_peer(key, soon()).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Asserts that the backend and `wg` see the same; how many peers they see.
    pub fn check(&self) -> usize {
        let (peers, rows) = (self.peers(), self.dump());
        assert_eq!(peers.len(), rows.len(), "number of peers");
        for (peer, row) in peers.iter().zip(&rows) {
            let allowed_ips: BTreeSet<String> =
                peer.allowed_ips.iter().map(ToString::to_string).collect();
            assert_eq!(allowed_ips.len(), peer.allowed_ips.len(), "an allowed IP twice");
            assert_eq!(
                (peer.public_key.to_string(), allowed_ips, peer.rx_bytes, peer.tx_bytes),
                (row.public_key.clone(), row.allowed_ips.clone(), row.rx_bytes, row.tx_bytes)
            );
            // boringtun tells how long ago the handshake was where `wg` expects the time.
            if self.kind != Kind::Boringtun {
                let last_handshake = peer.last_handshake.map_or(0, |time| {
                    time.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
                });
                assert_eq!(last_handshake, row.last_handshake, "last handshake");
            }
        }
        peers.len()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.process.is_some() {
            self.delete();
        }
        // A device of the kernel ends with its namespace.
    }
}

/// One line of `wg show … dump` after the first.
fn row(line: &str) -> Row {
    let fields: Vec<&str> = line.split('\t').collect();
    let [key, preshared_key, endpoint, allowed_ips, last_handshake, rx, tx, keepalive] = fields[..]
    else {
        panic!("wg printed {} fields", fields.len())
    };
    Row {
        public_key: key.to_owned(),
        preshared_key: preshared_key.to_owned(),
        endpoint: endpoint.to_owned(),
        allowed_ips: match allowed_ips {
            "(none)" => BTreeSet::new(),
            list => list.split(',').map(str::to_owned).collect(),
        },
        last_handshake: last_handshake.parse().unwrap(),
        rx_bytes: rx.parse().unwrap(),
        tx_bytes: tx.parse().unwrap(),
        keepalive: keepalive.to_owned(),
    }
}

/// An interface name that nobody else uses.
pub fn unused_name() -> String {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    format!("t{}x{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// A deadline that no working device misses, emulated or not.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Waits until `done`; panics after a time that is only there to end a hang.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = soon();
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
