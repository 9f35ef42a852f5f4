//! What attackers do without a certificate, with a revoked one, and by way of a browser.

use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
use rustls::{ClientConnection, StreamOwned};

use super::common::{Answer, Daemon, PATIENCE};
use super::management::{FakeClient, FakeOpenVpn, Mood};
use super::pki::{self, CLIENT, Pki, Profile, SERVER_NAME};
use super::{CONNECTIONS, Connection, NODE, Site, raise_own_open_files};

/// An OpenVPN process with so many clients that a list of them fills every buffer on its way.
fn crowded_openvpn(daemon: &Daemon) -> FakeOpenVpn {
    let directory = daemon.directory().join("openvpn");
    fs::create_dir(&directory).unwrap();
    let client = |id| FakeClient::new(&"x".repeat(60), "10.0.0.1", "fd00::1", id);
    let clients = (0..2_000).map(client).collect();
    FakeOpenVpn::start(directory.join("crowded.sock"), Mood::Healthy, clients)
}

/// Asks and asks, never reads an answer, and comes back when it is cut.
fn be_deaf(site: &Site, request: &str, over: &AtomicBool) {
    let requests = request.repeat(100);
    while !over.load(Ordering::Relaxed) {
        let Ok(mut connection) = site.try_connect() else { continue };
        connection.socket().set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        while !over.load(Ordering::Relaxed) && connection.try_send(&requests).is_ok() {}
    }
}

#[test]
fn clients_that_do_not_take_their_answers_keep_nobody_out() {
    for site in Site::both(&["-max-connections", "8"]) {
        let _openvpn = crowded_openvpn(&site.daemon);
        for request in [NODE, CONNECTIONS] {
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                for _ in 0..24 {
                    scope.spawn(|| be_deaf(&site, request, &over));
                }
                thread::sleep(Duration::from_secs(1));
                let newcomers: Vec<_> = (0..10).map(|_| site.try_ask(NODE)).collect();
                over.store(true, Ordering::Relaxed);
                // A machine that is busy with other things may be too slow for some of them.
                let served = newcomers.iter().filter(|answer| matches!(answer, Ok(200))).count();
                let told = newcomers.iter().all(|answer| matches!(answer, Ok(200 | 503)));
                assert!(served > 5 && told, "{request:?}: {newcomers:?}");
            });
        }
    }
}

/// A connection that is being made, from another address of this host.
fn open_from(source: Ipv4Addr, to: SocketAddr) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(source, 0))).unwrap();
    let SocketAddr::V4(to) = to else { panic!("{to} is IPv6") };
    // It is on its way.
    let _ = connect(fd.as_raw_fd(), &SockaddrIn::from(to));
    fd
}

/// Opens 4,000 connections a second and says nothing on them.
fn flood(source: Ipv4Addr, to: SocketAddr, over: &AtomicBool) {
    let mut open = VecDeque::new();
    let (start, mut opened) = (Instant::now(), 0);
    while !over.load(Ordering::Relaxed) {
        while opened < start.elapsed().as_millis() * 4 {
            open.push_back(open_from(source, to));
            opened += 1;
        }
        open.drain(..open.len().saturating_sub(2000));
        thread::sleep(Duration::from_millis(1));
    }
}

/// Asks over TLS from 200 ms away: each step of the handshake takes its time.
fn ask_from_far(site: &Site, source: Ipv4Addr) -> std::io::Result<u16> {
    let way = || thread::sleep(Duration::from_millis(200));
    let mut stream = TcpStream::from(open_from(source, site.daemon.address));
    way();
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (_, client) = site.tls.as_ref().unwrap();
    let name = SERVER_NAME.try_into().unwrap();
    let mut tls = ClientConnection::new(Arc::clone(client), name).unwrap();
    while tls.is_handshaking() {
        tls.write_tls(&mut stream)?;
        way();
        tls.read_tls(&mut stream)?;
        tls.process_new_packets().map_err(std::io::Error::other)?;
    }
    let mut tunnel = StreamOwned::new(tls, stream);
    tunnel.write_all(NODE.as_bytes())?;
    tunnel.flush()?;
    way();
    Ok(Answer::read(&mut tunnel, false)?.status)
}

#[test]
fn a_flood_from_one_address_evicts_nobody_of_another() {
    raise_own_open_files();
    let site = Site::tls(&[]);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| flood(Ipv4Addr::new(127, 0, 0, 2), site.daemon.address, &over));
        let ask = || [(); 4].map(|()| ask_from_far(&site, Ipv4Addr::new(127, 0, 0, 3)));
        let portals: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        let answers: Vec<_> =
            portals.into_iter().flat_map(|portal| portal.join().unwrap()).collect();
        over.store(true, Ordering::Relaxed);
        assert!(answers.iter().all(|answer| matches!(answer, Ok(200))), "{answers:?}");
    });
}

#[test]
fn a_reload_ends_the_connections_of_before() {
    let site = Site::tls(&[]);
    let _openvpn = site.hang();
    let (pki, _) = site.tls.as_ref().unwrap();
    let [mut idle, mut busy, mut half, mut new, mut same] = [(); 5].map(|()| site.connect());
    for connection in [&mut idle, &mut busy, &mut half] {
        assert_eq!(connection.ask(NODE).status, 200);
    }
    half.send(&NODE[..20]);
    busy.send(&format!("{CONNECTIONS}{NODE}"));
    thread::sleep(Duration::from_millis(500));
    // The same files again are nothing new: who has shaken hands is served.
    site.daemon.signal("HUP");
    site.daemon.wait_for_log("SIGHUP: ");
    assert_eq!(same.ask(NODE).status, 200);
    pki.revoke("ca", &[], "20990101000000Z");
    fs::copy(pki.path("ca.crl"), pki.credential("ca.crl")).unwrap();
    site.daemon.signal("HUP");
    idle.ends();
    same.ends();
    // Neither what was half said nor what was not asked yet is answered.
    half.send(&NODE[20..]);
    half.ends();
    new.send(NODE);
    new.ends();
    let answer = busy.answer();
    assert_eq!((answer.status, answer.header("Connection")), (504, Some("close")));
    busy.ends();
    let metrics = site.ask(&NODE.replace("/i/node", "/metrics")).body;
    assert!(metrics.contains("connections_evicted_total{reason=\"reload\"} 2\n"), "{metrics}");
}

#[test]
fn a_certificate_that_expires_ends_its_connection() {
    let pki = Pki::usual();
    let date = Command::new("date").args(["-u", "-d", "4 seconds", "+%Y%m%d%H%M%SZ"]).output();
    let not_after = String::from_utf8(date.unwrap().stdout).unwrap();
    pki.issue("brief", "ca", Profile { not_after: not_after.trim(), ..CLIENT });
    let (daemon, client) = (pki.daemon(&[]), pki.client("brief", "brief"));
    let [mut idle, mut eager] = [(); 2].map(|()| pki::connect(&client, daemon.connect()).unwrap());
    let start = Instant::now();
    assert_eq!(idle.ask(NODE).status, 200);
    while eager.try_ask(NODE).is_ok_and(|answer| answer.header("Connection").is_none()) {
        assert!(start.elapsed() < Duration::from_secs(10), "it is still served");
        thread::sleep(Duration::from_millis(50));
    }
    assert!(eager.try_ask(NODE).is_err());
    idle.ends();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn browser_pages_get_nothing() {
    let [plain, tls] = Site::both(&["-allow-host", "proxy", "-allow-host", "VPN.example.org"]);
    let every = Daemon::start(&["-listen", ":0"]);
    let get = |headers: &str| format!("GET /i/node HTTP/1.1\r\n{headers}\r\n\r\n");
    for (headers, on_loopback, elsewhere) in [
        ("Host: localhost", 200, 200),
        ("Host: LOCALHOST:41194", 200, 200),
        ("Host: 127.9.9.9:1", 200, 200),
        ("Host: [::1]:80", 200, 200),
        ("Host: vpn.Example.org:8080", 200, 200),
        ("Host: localhost\r\nSec-Fetch-Site: none", 200, 200),
        ("Host: node1.example.org", 403, 200),
        ("Host: localhost.example.org", 403, 200),
        ("Host: [::2]:80", 403, 200),
        ("Host:", 403, 200),
        ("Host: localhost\r\nOrigin: null", 403, 403),
        ("Host: localhost\r\nSec-Fetch-Site: cross-site", 403, 403),
    ] {
        for (site, status) in [(&plain, on_loopback), (&tls, elsewhere)] {
            let answer = site.ask(&get(headers));
            assert_eq!(answer.status, status, "{headers:?}: {answer:?}");
        }
    }
    let sentence = plain.ask(&get("Host: evil.example")).error();
    assert!(sentence.contains("Host") && sentence.contains("-allow-host"), "{sentence}");
    let sentence = tls.ask(&get("Host: a\r\nSec-Fetch-Site: same-site")).error();
    assert!(sentence.contains("Sec-Fetch-Site"), "{sentence}");
    // What counts is the address that the connection came in by.
    let mut local = TcpStream::connect(("127.0.0.1", every.address.port())).unwrap();
    assert_eq!(local.ask(&get("Host: evil.example")).status, 403);
    // Old clients need not say whom they ask.
    assert_eq!(plain.ask("GET /i/node HTTP/1.0\r\n\r\n").status, 200);
}

#[test]
fn the_accept_queue_is_as_long_as_the_system_allows() {
    let longest = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    for arguments in [&[][..], &["-listen", "localhost:0"], &["-listen", ":0"]] {
        let daemon = Daemon::start(arguments);
        let filter = format!("sport = :{}", daemon.address.port());
        let output = Command::new("ss").args(["-Hltn", &filter]).output().unwrap();
        let line = String::from_utf8(output.stdout).unwrap();
        let length: u32 = line.split_whitespace().nth(2).unwrap().parse().unwrap();
        assert_eq!(length, longest.trim().parse::<u32>().unwrap().min(4096), "{line}");
    }
}
