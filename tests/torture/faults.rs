//! The harm that is done. Each fault begins, waits and ends; two may be under way at a time.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
};

use crate::client::{Chance, get};
use crate::common::wait_until;
use crate::management::{self, Mood};
use crate::pki;
use crate::site::{OPENVPN, PLAIN, SOCKETS, Site, TLS, WIREGUARD};

/// Returns what it has done, in the words of the report.
type Harm = fn(&Site, &mut Chance) -> String;

pub const FAULTS: [(&str, Harm); 10] = [
    ("wireguard-go stopped", stop_wireguard),
    ("device deleted and made again", delete_device),
    ("OpenVPN processes hang or misbehave", spoil_openvpn),
    ("OpenVPN backlogs full", fill_openvpn),
    ("descriptors used up", use_up_descriptors),
    ("SIGHUP, other certificate", renew),
    ("SIGHUP, broken certificate", break_certificate),
    ("flood of idle connections", flood),
    ("flood of those who never read", never_read),
    ("connections cut", cut),
];

fn wait(chance: &mut Chance, from: u64, to: u64) -> String {
    let milliseconds = from + chance.below(to - from);
    thread::sleep(Duration::from_millis(milliseconds));
    format!("for {milliseconds} ms")
}

pub fn stop_wireguard(site: &Site, chance: &mut Chance) -> String {
    let device = site.device.lock().unwrap();
    let _fault = site.trouble.begin(WIREGUARD);
    device.stop();
    let is_full = chance.below(2) == 0;
    let crowd = if is_full { management::crowd(&device.socket()) } else { Vec::new() };
    let (time, count) = (wait(chance, 100, 5000), crowd.len());
    drop(crowd);
    device.signal(Signal::SIGCONT);
    format!("{time}, {count} waiting in its backlog")
}

fn delete_device(site: &Site, chance: &mut Chance) -> String {
    let mut device = site.device.lock().unwrap();
    let _fault = site.trouble.begin(WIREGUARD);
    site.wiped.store(true, Relaxed);
    device.delete();
    let time = wait(chance, 100, 2000);
    device.create();
    time
}

fn spoil_openvpn(site: &Site, chance: &mut Chance) -> String {
    let moods = [
        Mood::Silent,
        Mood::Slow(1500),
        Mood::CloseAtOnce,
        Mood::Close(0),
        Mood::Close(1),
        Mood::GarbageGreeting,
        Mood::FloodLine,
        Mood::FloodNews,
        Mood::FloodRows,
        Mood::Drip,
        Mood::Password,
        Mood::NoEnd,
    ];
    let processes = site.openvpn.lock().unwrap();
    let _fault = site.trouble.begin(OPENVPN);
    let count = 1 + chance.index(SOCKETS);
    for process in processes.iter().take(count) {
        process.turn(moods[chance.index(moods.len())]);
    }
    let time = wait(chance, 500, 5000);
    processes.iter().for_each(|process| process.turn(Mood::Healthy));
    format!("{count} of them {time}")
}

fn fill_openvpn(site: &Site, chance: &mut Chance) -> String {
    let processes = site.openvpn.lock().unwrap();
    let _fault = site.trouble.begin(OPENVPN);
    let some = &processes[chance.index(SOCKETS)..];
    some.iter().for_each(|process| process.turn(Mood::Silent));
    let crowds: Vec<_> = some.iter().map(|process| management::crowd(&process.path)).collect();
    let time = wait(chance, 500, 5000);
    some.iter().for_each(|process| process.turn(Mood::Healthy));
    drop(crowds);
    format!("{} of them {time}", some.len())
}

fn use_up_descriptors(site: &Site, chance: &mut Chance) -> String {
    let area = [PLAIN, TLS][chance.index(2)];
    // No SIGHUP for a daemon that may end.
    let pki = site.pki.lock().unwrap();
    let _fault = site.trouble.begin(area);
    let left = chance.index(24);
    let hard = site.daemon(area, |daemon| {
        daemon.limit_open_files(&format!("{}:", daemon.open_files() + left));
        getrlimit(Resource::RLIMIT_NOFILE).unwrap().1
    });
    let time = wait(chance, 500, 3000);
    site.daemon(area, |daemon| daemon.limit_open_files(&format!("{hard}:")));
    thread::sleep(Duration::from_millis(500));
    let end = if site.revive(area, &pki) { ", and it ended" } else { "" };
    format!("but {left}, {}, {time}{end}", ["without TLS", "with TLS"][area])
}

/// Signals SIGHUP and waits for the line in the log that says how it went.
fn hang_up(site: &Site, area: usize, text: &str) {
    site.daemon(area, |daemon| {
        let seen = daemon.log().len();
        daemon.signal("HUP");
        wait_until(text, || daemon.log()[seen..].iter().any(|line| line.contains(text)));
    });
}

fn renew(site: &Site, chance: &mut Chance) -> String {
    let pki = site.pki.lock().unwrap();
    // Whoever has just been let in by the old one is not answered.
    let _fault = site.trouble.begin(TLS);
    for server in ["server2", "server"] {
        pki.credentials(&["ca"], &[server]);
        hang_up(site, TLS, "SIGHUP: new connections use");
        wait(chance, 100, 500);
    }
    hang_up(site, PLAIN, "SIGHUP: no credentials");
    "twice".to_owned()
}

/// Nobody is to notice.
fn break_certificate(site: &Site, chance: &mut Chance) -> String {
    let pki = site.pki.lock().unwrap();
    let file = ["ca.crt", "server.crt", "server.key"][chance.index(3)];
    let good = fs::read(pki.credential(file)).unwrap();
    let left = chance.index(good.len() - 30);
    fs::write(pki.credential(file), &good[..left]).unwrap();
    hang_up(site, TLS, "SIGHUP: the old credentials stay in force");
    let time = wait(chance, 100, 2000);
    fs::write(pki.credential(file), good).unwrap();
    format!("{file} of {left} bytes, {time}")
}

/// A connection from an address that no client has.
fn stranger(daemon: SocketAddr) -> Option<TcpStream> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let stream = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    // So that the kernel keeps next to nothing of what it does not read.
    setsockopt(&stream, sockopt::RcvBuf, &4096).unwrap();
    setsockopt(&stream, sockopt::TcpMaxSeg, &536).unwrap();
    bind(stream.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 66, 0)).unwrap();
    let SocketAddr::V4(daemon) = daemon else { panic!("{daemon}") };
    let address = SockaddrIn::from(SocketAddrV4::new(*daemon.ip(), daemon.port()));
    connect(stream.as_raw_fd(), &address).ok()?;
    let stream = TcpStream::from(stream);
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    Some(stream)
}

/// Nobody else is to notice: neither of this nor of the next ones.
fn flood(site: &Site, chance: &mut Chance) -> String {
    let strangers = |count| (0..count).flat_map(|_| site.addresses.map(stranger));
    let crowd: Vec<_> = strangers(400 + chance.index(300)).collect();
    format!("{} of them {}", crowd.len(), wait(chance, 500, 4000))
}

fn never_read(site: &Site, chance: &mut Chance) -> String {
    let requests = get("/w/peer_list?show_all=yes").replace("Connection: close\r\n", "").repeat(5);
    let mut crowd = Vec::new();
    for _ in 0..60 + chance.index(60) {
        let [plain, tls] = site.addresses.map(stranger);
        // Whoever has been shut out by now is none of them.
        crowd.extend(plain.and_then(|mut s| s.write_all(requests.as_bytes()).ok().map(|()| s)));
        let tunnel = tls.and_then(|stream| pki::connect(&site.portal, stream).ok());
        crowd.extend(tunnel.and_then(|mut tunnel| {
            tunnel.write_all(requests.as_bytes()).and_then(|()| tunnel.flush()).ok()?;
            Some(tunnel.sock)
        }));
    }
    format!("{} of them {}", crowd.len(), wait(chance, 500, 4000))
}

fn cut(site: &Site, chance: &mut Chance) -> String {
    let before = site.cuts.swap(60, Relaxed);
    let time = wait(chance, 1000, 5000);
    site.cuts.store(before, Relaxed);
    format!("60 of 100 {time}")
}
