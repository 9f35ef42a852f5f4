//! What is tortured: one device, 16 OpenVPN processes, a daemon without and one with TLS; and what is
//! noted about it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use crate::client::{Client, address};
use crate::common::{Daemon, TempDir};
use crate::devices::{Device, Kind};
use crate::management::{FakeClient, FakeOpenVpn, Mood};
use crate::pki::{Pki, SERVER};

pub const SOCKETS: usize = 16;

// What a fault may explain a failure of: requests of one daemon, or of one kind.
pub const PLAIN: usize = 0;
pub const TLS: usize = 1;
pub const WIREGUARD: usize = 2;
pub const OPENVPN: usize = 3;

/// After a fault, what began while it lasted may still be in the way for as long as a request takes.
pub const GRACE: Duration = Duration::from_secs(3);

pub struct Site {
    pub device: Mutex<Device>,
    tls: Mutex<Daemon>,
    /// Of the daemon without and the one with TLS.
    pub addresses: [SocketAddr; 2],
    pub portal: Arc<ClientConfig>,
    pub pki: Mutex<Pki>,
    pub openvpn: Mutex<Vec<FakeOpenVpn>>,
    pub trouble: Trouble,
    /// The device was deleted, and what had been acknowledged with it.
    pub wiped: AtomicBool,
    /// How many of a hundred requests are broken off.
    pub cuts: AtomicU64,
    /// Milliseconds that this machine took from somebody who wanted next to nothing of it.
    pub lost: AtomicU64,
    pub over: AtomicBool,
    pub figures: Mutex<Figures>,
    started: Instant,
    sockets: TempDir,
}

#[derive(Default)]
pub struct Figures {
    pub outcomes: BTreeMap<String, u64>,
    pub faults: BTreeMap<&'static str, u64>,
    pub slowest: (Duration, String),
    pub failures: Vec<String>,
}

impl Site {
    pub fn new() -> Self {
        let pki = Pki::usual();
        pki.issue("server2", "ca", SERVER);
        let sockets = TempDir::new("sockets");
        let process = |socket| {
            FakeOpenVpn::start(sockets.join(&socket_name(socket)), Mood::Healthy, Vec::new())
        };
        let openvpn = (0..SOCKETS).map(process).collect();
        let device = Device::with(Kind::WireguardGo, &directory(&sockets));
        let tls = start(TLS, "127.0.0.1:0", &device.name, &sockets, &pki);
        Self {
            addresses: [device.daemon.address, tls.address],
            device: Mutex::new(device),
            tls: Mutex::new(tls),
            portal: pki.client("portal", "portal"),
            pki: Mutex::new(pki),
            openvpn: Mutex::new(openvpn),
            trouble: Trouble::default(),
            wiped: AtomicBool::new(false),
            cuts: AtomicU64::new(5),
            lost: AtomicU64::new(0),
            over: AtomicBool::new(false),
            figures: Mutex::default(),
            started: Instant::now(),
            sockets,
        }
    }

    pub fn say(&self, line: &str) {
        println!("{:7.1} s  {line}", self.started.elapsed().as_secs_f32());
    }

    pub fn fail(&self, why: String) {
        let mut figures = self.figures.lock().unwrap();
        // The first ones say what it was.
        if figures.failures.len() < 10 {
            self.say(&format!("FAILED: {why}"));
            figures.failures.push(why);
        }
    }

    pub fn has_failed(&self) -> bool {
        !self.figures.lock().unwrap().failures.is_empty()
    }

    pub fn count(&self, outcome: &str, time: Duration, line: &str) {
        let mut figures = self.figures.lock().unwrap();
        *figures.outcomes.entry(outcome.to_owned()).or_default() += 1;
        if time > figures.slowest.0 {
            figures.slowest = (time, format!("{line}: {outcome}"));
        }
    }

    pub fn wiped(&self) -> bool {
        self.wiped.load(Relaxed)
    }

    /// Connects the OpenVPN clients of every name.
    pub fn fill(&self, clients: &[MutexGuard<Client>]) {
        let mut connected = vec![Vec::new(); SOCKETS];
        for client in clients {
            for (name, socket) in client.connections() {
                let (id, address) = (client.number * 100 + name, address(socket));
                connected[socket].push(FakeClient::new(
                    &client.name(name),
                    &address,
                    "",
                    id as u64,
                ));
            }
        }
        let processes = self.openvpn.lock().unwrap();
        processes.iter().zip(connected).for_each(|(process, clients)| process.restart(clients));
    }

    /// Resident memory in KiB, threads and descriptors of both daemons.
    pub fn usage(&self) -> [[u64; 3]; 2] {
        let of = |daemon: &Daemon| {
            [daemon.status("RssAnon"), daemon.status("Threads"), daemon.open_files() as u64]
        };
        [PLAIN, TLS].map(|area| self.daemon(area, |daemon| of(daemon)))
    }

    /// Does something with one of the daemons.
    pub fn daemon<T>(&self, area: usize, act: impl FnOnce(&mut Daemon) -> T) -> T {
        match area {
            PLAIN => act(&mut self.device.lock().unwrap().daemon),
            _ => act(&mut self.tls.lock().unwrap()),
        }
    }

    /// The daemon ends when its HTTP server finds no descriptor: starts it again, as systemd does.
    pub fn revive(&self, area: usize, pki: &Pki) -> bool {
        let name = self.device.lock().unwrap().name.clone();
        self.daemon(area, |daemon| {
            let has_ended =
                daemon.log().iter().any(|line| line.contains("HTTP server does not go"));
            if has_ended {
                daemon.wait();
                let address = self.addresses[area].to_string();
                *daemon = start(area, &address, &name, &self.sockets, pki);
            }
            has_ended
        })
    }

    /// The control: sleeps for 10 ms, then sends a byte to another thread and back, five times: as often
    /// a request is handed on.
    pub fn probe(&self) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut echo = listener.accept().unwrap().0;
        thread::spawn(move || {
            let mut byte = [0];
            while echo.read_exact(&mut byte).is_ok() && echo.write_all(&byte).is_ok() {}
        });
        while !self.over.load(Relaxed) {
            let began = Instant::now();
            thread::sleep(Duration::from_millis(10));
            for _ in 0..5 {
                stream.write_all(b"x").unwrap();
                stream.read_exact(&mut [0]).unwrap();
            }
            let lost = began.elapsed().saturating_sub(Duration::from_millis(20));
            self.lost.fetch_add(lost.as_millis().try_into().unwrap(), Relaxed);
        }
    }
}

fn directory(sockets: &TempDir) -> [&str; 2] {
    ["-openvpn-dir", sockets.path().to_str().unwrap()]
}

fn start(area: usize, address: &str, device: &str, sockets: &TempDir, pki: &Pki) -> Daemon {
    let arguments = [&["-listen", address, "-wg-device", device], &directory(sockets)[..]].concat();
    if area == TLS { pki.daemon(&arguments) } else { Daemon::start(&arguments) }
}

pub fn socket_name(socket: usize) -> String {
    format!("{socket:02}.sock")
}

/// What faults may explain, and since and until when.
#[derive(Default)]
pub struct Trouble([Mutex<(usize, Option<Instant>)>; 4]);

/// While it is there, a fault is under way.
pub struct Fault<'a>(&'a Mutex<(usize, Option<Instant>)>);

impl Trouble {
    pub fn begin(&self, area: usize) -> Fault<'_> {
        self.0[area].lock().unwrap().0 += 1;
        Fault(&self.0[area])
    }

    /// Whether there has been a fault in one of the areas since `began`, or it had only just ended.
    pub fn explains(&self, areas: &[usize], began: Instant) -> bool {
        areas.iter().any(|area| {
            let (under_way, ended) = *self.0[*area].lock().unwrap();
            under_way > 0 || ended.is_some_and(|ended| ended + GRACE >= began)
        })
    }
}

impl Drop for Fault<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock().unwrap();
        *state = (state.0 - 1, Some(Instant::now()));
    }
}
