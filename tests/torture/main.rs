//! A portal's load on two daemons while everything around them breaks: `make torture`.
//!
//! Eight clients, four of them over TLS, each with peers and OpenVPN clients of its own, ask one thing
//! after another, each on a new connection. A conductor, driven by the seed, does harm meanwhile. Every
//! answer has to fit what its client knows. At quiet points the device itself is looked at: no
//! acknowledged change may be lost, no refused one applied. Only what was given up may be either: 502,
//! 504, or no answer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, unreachable_pub, missing_docs)]

mod client;
#[path = "../common/mod.rs"]
mod common;
#[path = "../wireguard/devices.rs"]
mod devices;
mod faults;
#[path = "../common/management.rs"]
mod management;
#[path = "../common/pki.rs"]
mod pki;
#[path = "../common/programs.rs"]
mod programs;
mod site;
#[path = "../vm/mod.rs"]
#[allow(dead_code, reason = "only a path is needed")]
mod vm;

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use client::{Chance, Client, Fact, Outcome, get, sync};
use faults::{FAULTS, stop_wireguard};
use programs::Namespace;
use site::{Figures, GRACE, PLAIN, Site, TLS};

const CLIENTS: usize = 8;
/// Between two requests of a client.
const PAUSE: Duration = Duration::from_millis(20);
/// How much memory in KiB, threads and descriptors a daemon may have more in the end: its HTTP server keeps
/// threads for a while. Memory counts from when each fault has had its turn: the C library keeps some of
/// what floods took.
const TOLERANCE: [u64; 3] = [16 << 10, 4, 12];
/// By then a daemon at rest has given back what it took.
const REST: Duration = Duration::from_secs(6);

#[test]
#[ignore = "make torture"]
fn no_acknowledged_change_is_lost_and_no_refused_one_applied() {
    let number = |name| {
        let text = std::env::var(name).unwrap_or_default();
        (!text.is_empty()).then(|| text.parse().expect(name))
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let (seed, seconds) =
        (number("SEED").unwrap_or(now.as_secs()), number("SECONDS").unwrap_or(600));
    println!("\nmake torture SECONDS={seconds} SEED={seed}");
    Namespace::new().enter(|| run(seed, Duration::from_secs(seconds)));
}

fn run(seed: u64, time: Duration) {
    let (site, mut chance) = (Site::new(), Chance(seed));
    let client = |number| {
        let tls = (number % 2 == 1).then(|| Arc::clone(&site.portal));
        Mutex::new(Client::new(number, tls, seed))
    };
    let clients: Vec<_> = (0..CLIENTS).map(client).collect();
    site.fill(&lock(&clients));
    thread::scope(|scope| {
        let _end = End(&site);
        scope.spawn(|| site.probe());
        for client in &clients {
            scope.spawn(|| {
                while !site.over.load(Relaxed) {
                    client.lock().unwrap().step(&site);
                    thread::sleep(PAUSE);
                }
            });
        }
        // What the first requests cost stays.
        thread::sleep(Duration::from_secs(2));
        let at_rest = || {
            let _resting = lock(&clients);
            thread::sleep(REST);
            site.usage()
        };
        let (start, mut once) = (at_rest(), None);
        let (began, mut bag) = (Instant::now(), Vec::new());
        while (began.elapsed() < time || once.is_none()) && !site.has_failed() {
            harm(&site, &mut chance, &mut bag);
            // Here nothing explains a failure any more.
            thread::sleep(GRACE + Duration::from_millis(500 + chance.below(1500)));
            if chance.below(3) > 0 || site.wiped() {
                look(&site, &clients, &mut chance);
            }
            if bag.is_empty() && once.is_none() {
                once = Some(at_rest());
            }
        }
        look(&site, &clients, &mut chance);
        let (once, end) = (once.unwrap_or(start), at_rest());
        println!("KiB, threads, descriptors at the start, after each fault once, and at the end:");
        for daemon in [PLAIN, TLS] {
            let (start, once, end) = (start[daemon], once[daemon], end[daemon]);
            println!("{}: {start:?}, {once:?}, {end:?}", ["without TLS", "with TLS"][daemon]);
            let [memory, threads, files] = TOLERANCE;
            let most = [once[0] + memory, start[1] + threads, start[2] + files];
            if (0..3).any(|i| end[i] > most[i]) {
                site.fail(format!("more than {most:?} in the end: {end:?}"));
            }
        }
    });
    report(&site, seed);
}

/// Ends the clients however the conductor ends.
struct End<'a>(&'a Site);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Relaxed);
    }
}

/// All clients, none of which has a request under way then.
fn lock(clients: &[Mutex<Client>]) -> Vec<MutexGuard<'_, Client>> {
    clients.iter().map(|client| client.lock().unwrap()).collect()
}

/// Two faults at a time, until each has had its turn.
fn harm(site: &Site, chance: &mut Chance, bag: &mut Vec<usize>) {
    thread::scope(|scope| {
        for _ in 0..2 {
            if bag.is_empty() {
                let only = std::env::var("FAULT").unwrap_or_default();
                bag.extend((0..FAULTS.len()).filter(|fault| FAULTS[*fault].0.contains(&only)));
            }
            let (name, harm) = FAULTS[bag.swap_remove(chance.index(bag.len()))];
            let mut chance = Chance(chance.below(u64::MAX));
            scope.spawn(move || {
                site.say(&format!("{name} …"));
                let done = harm(site, &mut chance);
                site.say(&format!("… {name}: {done}"));
                *site.figures.lock().unwrap().faults.entry(name).or_default() += 1;
            });
        }
    });
}

/// Nobody asks, and nothing is broken: compares what is known with what is, and syncs.
fn look(site: &Site, clients: &[Mutex<Client>], chance: &mut Chance) {
    let mut clients = lock(clients);
    // What was cut off has come to its end by then.
    thread::sleep(Duration::from_secs(1));
    for client in [0, 1] {
        clients[client].ask(site, &get("/w/peer_list"), &[200]);
    }
    if !site.wiped() {
        compare(site, &mut clients);
    }
    let processes = site.openvpn.lock().unwrap();
    let connected: Vec<_> = processes.iter().map(|process| process.names()).collect();
    drop(processes);
    for client in &clients {
        for (name, socket) in client.connections() {
            let (fact, name) = (&client.names[name], client.name(name));
            if fact.doubt.is_none() && connected[socket].contains(&name) != fact.is {
                site.fail(format!("socket {socket}: {name:?} is to be connected: {}", fact.is));
            }
        }
    }
    for client in &mut clients {
        client.names.iter_mut().for_each(|fact| *fact = Fact::sure(true));
    }
    site.fill(&clients);
    sync_all(site, &mut clients, chance);
}

/// Compares the device with what is known; what was in doubt is known then.
fn compare(site: &Site, clients: &mut [MutexGuard<Client>]) {
    let mut seen = site.device.lock().unwrap().seen();
    for client in clients {
        for peer in 0..client.peers.len() {
            let here = seen.remove(&client.key(peer)).map(|peer| peer["ip_net"].clone());
            let fits = |version: &Option<u64>| here == version.map(|v| json!(client.ips(peer, v)));
            let Fact { is, doubt } = client.peers[peer];
            match [Some(is), doubt].into_iter().flatten().find(fits) {
                Some(version) => client.peers[peer] = Fact::sure(version),
                None => site.fail(format!(
                    "peer {peer} of client {}, {}: version {is:?} is known, in doubt {doubt:?}; \
                     the device has {here:?}",
                    client.number,
                    client.key(peer)
                )),
            }
        }
    }
    if !seen.is_empty() {
        site.fail(format!("peers that nobody has added: {seen:?}"));
    }
}

/// Syncs that are to change nothing, then one to what each client shall have. wireguard-go may hang
/// meanwhile: the portal asks again.
fn sync_all(site: &Site, clients: &mut [MutexGuard<Client>], chance: &mut Chance) {
    let asking = chance.index(CLIENTS);
    // A device that was made again gets what was known.
    let wiped = site.wiped.swap(false, Relaxed);
    let mut versions = Vec::new();
    let mut list = Vec::new();
    for client in clients.iter_mut() {
        for peer in 0..client.peers.len() {
            let other = Some(client.version()).filter(|version| *version > 99);
            let version = if wiped { client.peers[peer].is } else { other };
            list.extend(version.map(|version| {
                json!({"public_key": client.key(peer), "ip_net": client.ips(peer, version)})
            }));
            versions.push(version);
        }
    }
    let list = json!({ "peer_list": list }).to_string();
    if !wiped {
        let request = sync("", &list);
        drop(clients[asking].send(site, &request[..request.len() - 1]));
        clients[asking].ask(site, &sync("?dry_run=yes", &list), &[200]);
        compare(site, clients);
    }
    thread::scope(|scope| {
        if chance.below(3) == 0 {
            let mut chance = Chance(chance.below(u64::MAX));
            scope.spawn(move || {
                let time = stop_wireguard(site, &mut chance);
                site.say(&format!("a sync met wireguard-go stopped {time}"));
            });
        }
        let request = sync("", &list);
        let mut ask = || clients[asking].ask(site, &request, &[200]);
        if !(0..10).any(|_| matches!(ask(), Outcome::Done(_))) {
            site.fail("a sync never succeeds".to_owned());
        }
    });
    let facts = clients.iter_mut().flat_map(|client| &mut client.peers);
    facts.zip(versions).for_each(|(fact, version)| *fact = Fact::sure(version));
    // What the process found when it went on is applied as well by then.
    thread::sleep(Duration::from_millis(300));
    compare(site, clients);
    site.say(&format!("all is as it is known; KiB, threads, descriptors: {:?}", site.usage()));
}

fn report(site: &Site, seed: u64) {
    let Figures { outcomes, faults, slowest, failures } = &*site.figures.lock().unwrap();
    println!("requests by status: {outcomes:?}");
    println!("slowest: {:.2?}, {}", slowest.0, slowest.1);
    println!("faults: {faults:#?}");
    println!("the probe lost {} ms", site.lost.load(Relaxed));
    assert!(failures.is_empty(), "SEED={seed}: {failures:#?}");
}
