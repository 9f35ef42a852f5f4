//! One client of the portal: what it asks, and what it knows by the answers.

use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::common::Answer;
use crate::devices::{self, key};
use crate::pki;
use crate::site::{OPENVPN, SOCKETS, Site, WIREGUARD, socket_name};

pub const PEERS: u32 = 24;
const NAMES: usize = 16;

/// Every request is answered within this, from its last byte on; and all that a portal waits.
const ANSWER_TIME: Duration = Duration::from_secs(3);
const PORTAL_TIME: Duration = Duration::from_secs(4);

/// Numbers by chance, the same for the same seed (splitmix64).
pub struct Chance(pub u64);

impl Chance {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    pub fn index(&mut self, limit: usize) -> usize {
        self.below(limit as u64).try_into().unwrap()
    }
}

/// What is known of one thing. In doubt it may be the other as well, and is left alone until somebody
/// has looked: what has been given up may still happen, after what was asked later.
pub struct Fact<T> {
    pub is: T,
    pub doubt: Option<T>,
}

impl<T> Fact<T> {
    pub fn sure(is: T) -> Self {
        Self { is, doubt: None }
    }

    fn learn(&mut self, after: T, outcome: &Outcome) {
        match outcome {
            Outcome::Done(_) => self.is = after,
            Outcome::Refused => {}
            Outcome::Unknown => self.doubt = Some(after),
        }
    }
}

pub enum Outcome {
    Done(Answer),
    /// Nothing may have changed.
    Refused,
    Unknown,
}

pub struct Client {
    pub number: usize,
    tls: Option<Arc<ClientConfig>>,
    pub chance: Chance,
    /// The version of each peer's allowed IPs; `None` where there is no such peer.
    pub peers: Vec<Fact<Option<u64>>>,
    /// Whether the OpenVPN clients of each name are connected.
    pub names: Vec<Fact<bool>>,
}

impl Client {
    pub fn new(number: usize, tls: Option<Arc<ClientConfig>>, seed: u64) -> Self {
        let chance = Chance(seed.wrapping_add(1 + number as u64));
        let peers = (0..PEERS).map(|_| Fact::sure(None)).collect();
        let names = (0..NAMES).map(|_| Fact::sure(true)).collect();
        Self { number, tls, chance, peers, names }
    }

    pub fn key(&self, peer: usize) -> String {
        key(u32::try_from(self.number * 1000 + peer).unwrap())
    }

    /// Allowed IPs that no other version of any peer has.
    pub fn ips(&self, peer: usize, version: u64) -> Vec<String> {
        let (client, peer) = (self.number + 1, peer + 1);
        vec![
            format!("10.{client}.{peer}.{version}/32"),
            format!("fd00:{client:x}::{peer:x}:{version:x}/128"),
        ]
    }

    pub fn version(&mut self) -> u64 {
        1 + self.chance.below(250)
    }

    /// Some of the names are not those that OpenVPN's `kill` takes as they are.
    pub fn name(&self, name: usize) -> String {
        let (client, mark) = (self.number, [" ", ":", "\"", "-"][name % 4]);
        format!("client {client}{mark}{name}")
    }

    /// Names and the sockets at which they are connected: each at one or two.
    pub fn connections(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let first = self.number * NAMES;
        let sockets = move |name| [first + name, first + name + 5].into_iter().take(1 + name % 2);
        (0..NAMES).flat_map(move |name| sockets(name).map(move |socket| (name, socket % SOCKETS)))
    }

    /// Where the daemon is that this client asks.
    pub fn door(&self) -> usize {
        usize::from(self.tls.is_some())
    }

    /// Asks for one thing.
    pub fn step(&mut self, site: &Site) {
        let peer = self.chance.index(self.peers.len());
        let name = self.chance.index(self.names.len());
        match self.chance.below(100) {
            0..30 => self.add(site, peer),
            30..50 => self.remove(site, peer),
            50..62 => self.list(site),
            62..74 => self.list_connections(site),
            74..80 => self.disconnect(site, name),
            80..90 => {
                let counts = ["", "?include_client_peer_count=yes"][name % 2];
                self.ask(site, &get(&format!("/i/node{counts}")), &[200]);
            }
            _ => self.ask_in_vain(site, peer, name),
        }
    }

    fn add(&mut self, site: &Site, peer: usize) {
        if self.peers[peer].doubt.is_none() {
            let version = self.version();
            let request = self.addition(peer, version, "");
            let outcome = self.ask(site, &request, &[204]);
            self.peers[peer].learn(Some(version), &outcome);
        }
    }

    fn addition(&self, peer: usize, version: u64, header: &str) -> String {
        let ips = self.ips(peer, version);
        let form = [("public_key", &*self.key(peer)), ("ip_net", &ips[0]), ("ip_net", &ips[1])];
        post("/w/add_peer", header, &form)
    }

    fn remove(&mut self, site: &Site, peer: usize) {
        if self.peers[peer].doubt.is_some() {
            return;
        }
        let (key, before) = (self.key(peer), self.peers[peer].is);
        let request = post("/w/remove_peer", "", &[("public_key", &key)]);
        let outcome = self.ask(site, &request, &[200, 204]);
        if let Outcome::Done(answer) = &outcome {
            let removed = (answer.status == 200).then(|| answer.json());
            let told = removed.as_ref().map(|peer| (text(&peer["public_key"]), ips(peer)));
            let known = before.map(|version| (key, self.ips(peer, version)));
            if told != known && !site.wiped() {
                site.fail(format!("removing {known:?} was answered with {told:?}"));
            }
        }
        self.peers[peer].learn(None, &outcome);
    }

    /// The peers that are known are listed as they are known.
    fn list(&mut self, site: &Site) {
        let request = get("/w/peer_list?show_all=yes");
        if let Outcome::Done(answer) = self.ask(site, &request, &[200])
            && !site.wiped()
        {
            let listed = devices::listed(&answer);
            for (peer, fact) in self.peers.iter().enumerate().filter(|(_, f)| f.doubt.is_none()) {
                let key = self.key(peer);
                let here = listed.get(&key).map(|peer| &peer["ip_net"]);
                let known = fact.is.map(|version| json!(self.ips(peer, version)));
                if here != known.as_ref() {
                    site.fail(format!("{key} is listed as {here:?}, not {known:?}"));
                }
            }
        }
    }

    /// The OpenVPN clients that are known to be connected are listed, unless their socket has failed.
    fn list_connections(&mut self, site: &Site) {
        let began = Instant::now();
        let request = get("/o/connection_list");
        let Outcome::Done(answer) = self.ask(site, &request, &[200]) else { return };
        let answer = answer.json();
        let all = |field: &str| answer[field].as_array().cloned().unwrap_or_default();
        let failed: Vec<_> = all("failed").iter().map(|failed| text(&failed["socket"])).collect();
        if !failed.is_empty() && !site.trouble.explains(&[OPENVPN, self.door()], began) {
            site.fail(format!("without a fault: {}", answer["failed"]));
        }
        let list = all("connection_list");
        let listed: Vec<_> =
            list.iter().map(|c| (text(&c["common_name"]), text(&c["ip_four"]))).collect();
        for (name, socket) in self.connections() {
            let (row, fact) = ((self.name(name), address(socket)), &self.names[name]);
            let is_told = fact.doubt.is_none() && !failed.contains(&socket_name(socket));
            if is_told && listed.contains(&row) != fact.is {
                site.fail(format!("{row:?} is connected: {}; listed: {}", fact.is, !fact.is));
            }
        }
    }

    fn disconnect(&mut self, site: &Site, name: usize) {
        if self.names[name].doubt.is_none() {
            let request = post("/o/disconnect_client", "", &[("common_name", &self.name(name))]);
            let outcome = self.ask(site, &request, &[204]);
            self.names[name].learn(false, &outcome);
        }
    }

    /// Something that is to be refused, of a peer or client that a mistake would change.
    fn ask_in_vain(&mut self, site: &Site, peer: usize, name: usize) {
        let (key, name, version) = (self.key(peer), self.name(name), self.version());
        let add = self.addition(peer, version, "");
        let ips = self.ips(peer, version);
        let (key, ip, name) =
            (("public_key", &*key), ("ip_net", &*ips[0]), ("common_name", &*name));
        let origin = "Origin: https://evil.example\r\n";
        let twice = json!({"public_key": key.1, "ip_net": [ip.1]});
        let twice = json!({"peer_list": [twice, twice]}).to_string();
        let bad = [
            (post("/w/add_peer", "", &[key, ip, ("ip_net", "10.0.0.1")]), 400),
            (post("/w/add_peer", "", &[key]), 400),
            (post("/w/add_peer", "", &[key, key, ip]), 400),
            (self.addition(peer, version, origin), 403),
            (add.replace("/w/add_peer", "/w/add_peers"), 404),
            (add.replace("POST", "PUT"), 405),
            (add.replace("x-www-form-urlencoded", "json"), 415),
            (post("/w/add_peer", "", &[key, ip, ("x", &"x".repeat(70_000))]), 413),
            (post("/w/remove_peer", "", &[key, key]), 400),
            (post("/w/remove_peer", origin, &[key]), 403),
            (post("/w/remove_peer", "", &[]), 400),
            (post("/o/disconnect_client", origin, &[name]), 403),
            (post("/o/disconnect_client", "", &[name, name]), 400),
            (sync("", "[]"), 400),
            (sync("", &twice), 400),
            (sync("?dry_run=maybe", r#"{"peer_list":[]}"#), 400),
        ];
        let (request, status) = &bad[self.chance.index(bad.len())];
        self.ask(site, request, &[*status]);
    }

    /// One request on a connection of its own. An answer that is late or neither expected nor explained
    /// by a fault is a failure.
    pub fn ask(&mut self, site: &Site, request: &str, expected: &[u16]) -> Outcome {
        let is_cut = self.chance.below(100) < site.cuts.load(Relaxed);
        if is_cut && self.chance.below(2) == 0 {
            site.count("cut in the request", Duration::ZERO, "");
            let part = self.chance.index(request.len());
            // It fails when the daemon is faster.
            let _ = self.send(site, &request[..part]);
            return Outcome::Refused;
        }
        let (began, lost) = (Instant::now(), site.lost.load(Relaxed));
        let mut asked = began;
        let mut exchange = || {
            let mut stream = self.send(site, request)?;
            asked = Instant::now();
            if is_cut {
                stream.read_exact(&mut vec![0; self.chance.index(40)])?;
                return Err(io::ErrorKind::Interrupted.into());
            }
            Answer::read(&mut BufReader::new(stream), false)
        };
        let result = exchange();
        let (time, whole) = (asked.elapsed(), began.elapsed());
        if is_cut {
            site.count("cut in the answer", Duration::ZERO, "");
            return Outcome::Unknown;
        }
        let line = format!("client {}: {}", self.number, request.lines().next().unwrap());
        // What is to be refused is refused without a look at what may be broken.
        let fault = match request.split(['/', '?']).nth(1) {
            Some("w") if expected[0] < 400 => WIREGUARD,
            Some("o") if expected[0] < 400 => OPENVPN,
            _ => self.door(),
        };
        let door = site.trouble.explains(&[self.door()], began);
        let explained = door || site.trouble.explains(&[fault], began);
        let outcome = result.as_ref().map_or("none".to_owned(), |answer| answer.status.to_string());
        site.count(&outcome, time, &line);
        if (time > ANSWER_TIME || whole > PORTAL_TIME) && !door {
            // A probe that is late itself has yet to say so.
            std::thread::sleep(Duration::from_secs(1));
            let lost = Duration::from_millis(site.lost.load(Relaxed) - lost);
            if time > ANSWER_TIME + lost || whole > PORTAL_TIME + lost {
                site.fail(format!(
                    "{line}: after {time:.2?}, with its connection {whole:.2?}; the probe lost {lost:.2?}"
                ));
            }
        }
        match result {
            Ok(answer) if expected.contains(&answer.status) => Outcome::Done(answer),
            Ok(answer) if answer.status == 503 && explained => Outcome::Refused,
            Ok(answer) if answer.status >= 500 && explained => Outcome::Unknown,
            Err(_) if door => Outcome::Unknown,
            unexplained => {
                site.fail(format!("{line}: nothing explains {unexplained:?} after {whole:.1?}"));
                Outcome::Unknown
            }
        }
    }

    /// Sends a request, or what there is of it.
    pub fn send(&self, site: &Site, request: &str) -> io::Result<Box<dyn Read>> {
        let mut stream = TcpStream::connect_timeout(&site.addresses[self.door()], PORTAL_TIME)?;
        stream.set_read_timeout(Some(2 * PORTAL_TIME))?;
        stream.set_write_timeout(Some(PORTAL_TIME))?;
        let Some(client) = &self.tls else {
            stream.write_all(request.as_bytes())?;
            return Ok(Box::new(stream));
        };
        let mut tunnel = pki::connect(client, stream)?;
        tunnel.write_all(request.as_bytes())?;
        tunnel.flush()?;
        Ok(Box::new(tunnel))
    }
}

/// Of the clients of one process.
pub fn address(socket: usize) -> String {
    format!("10.66.{socket}.2")
}

pub fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
}

fn post(target: &str, header: &str, parameters: &[(&str, &str)]) -> String {
    let form = form_urlencoded::Serializer::new(String::new()).extend_pairs(parameters).finish();
    body(target, header, "x-www-form-urlencoded", &form)
}

pub fn sync(query: &str, list: &str) -> String {
    body(&format!("/w/sync_peers{query}"), "", "json", list)
}

fn body(target: &str, header: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {target} HTTP/1.1\r\nHost: localhost\r\n{header}Content-Type: application/{kind}\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// In the order in which [`Client::ips`] has them.
fn ips(peer: &Value) -> Vec<String> {
    let mut ips: Vec<_> = peer["ip_net"].as_array().unwrap().iter().map(text).collect();
    ips.sort();
    ips
}
