//! What `GET /metrics` tells Prometheus: counters as they grow, all else as it is when it asks.
//!
//! Format: <https://prometheus.io/docs/instrumenting/exposition_formats>. Peers and clients are
//! people and never stand in a label; every label has few values.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use crate::wireguard::Peer;
use crate::{lock, node, routes};

/// What comes before every name.
const PREFIX: &str = "vpn_daemon_";
/// The call that requests for unknown paths count as, and those that the front door refuses.
pub(crate) const OTHER: &str = "other";
/// The one histogram, and its buckets in seconds.
const DURATION: &str = "request_duration_seconds";
const BUCKETS: [&str; 8] = ["0.005", "0.025", "0.1", "0.5", "1", "2.5", "5", "+Inf"];

/// Names and what they mean. Those in `_total` are counters, the others gauges.
const FAMILIES: &str = include_str!("metrics.txt");

type Labels<'a> = [(&'static str, &'a str)];

/// Values by name and labels.
type Samples = BTreeMap<(&'static str, Vec<(&'static str, String)>), f64>;

/// How many answers of a call took at most the time of each bucket, and the sum of all their times.
type Durations = ([f64; BUCKETS.len()], f64);

static SAMPLES: Mutex<Samples> = Mutex::new(Samples::new());
static DURATIONS: Mutex<BTreeMap<String, Durations>> = Mutex::new(BTreeMap::new());
/// Bytes received from the peers that are there, and sent to them, as of the last list.
static LISTED: Mutex<Option<[f64; 2]>> = Mutex::new(None);

/// Adds to a value; a counter only grows.
pub(crate) fn add(name: &'static str, labels: &Labels, amount: f64) {
    *lock(&SAMPLES).entry(key(name, labels)).or_default() += amount;
}

/// Replaces a value.
pub(crate) fn set(name: &'static str, labels: &Labels, value: f64) {
    lock(&SAMPLES).insert(key(name, labels), value);
}

fn key(name: &'static str, labels: &Labels) -> (&'static str, Vec<(&'static str, String)>) {
    (name, labels.iter().map(|(label, value)| (*label, (*value).to_owned())).collect())
}

/// The daemon starts, to serve so many connections at a time.
pub(crate) fn start(limit: usize) {
    set("start_time_seconds", &[], seconds(SystemTime::now()));
    set("connections_limit", &[], limit as f64);
    set("wireguard_lists_restarted_total", &[], 0.0);
}

/// Counts an answer.
pub(crate) fn answered(call: &str, status: u16, time: Duration) {
    add("requests_total", &[("call", call), ("status", &status.to_string())], 1.0);
    let (mut durations, time) = (lock(&DURATIONS), time.as_secs_f64());
    let (counts, sum) = durations.entry(call.to_owned()).or_default();
    let fits =
        counts.iter_mut().zip(BUCKETS).filter(|(_, le)| le.parse().is_ok_and(|le| time <= le));
    fits.for_each(|(count, _)| *count += 1.0);
    *sum += time;
}

/// Takes in a list of the device; to be called in the order in which the device gave its lists. The
/// totals grow by what the counters of its peers have grown by.
pub(crate) fn listed(peers: &[Peer], started: Instant) {
    let sum = |bytes: fn(&Peer) -> u64| peers.iter().map(|peer| bytes(peer) as f64).sum();
    let sums = [sum(|peer| peer.rx_bytes), sum(|peer| peer.tx_bytes)];
    let before = lock(&LISTED).replace(sums).unwrap_or(sums);
    add("wireguard_received_bytes_total", &[], (sums[0] - before[0]).max(0.0));
    add("wireguard_sent_bytes_total", &[], (sums[1] - before[1]).max(0.0));
    set("wireguard_list_seconds", &[], started.elapsed().as_secs_f64());
}

/// A peer was removed, and its counters with it.
pub(crate) fn removed(peer: &Peer) {
    if let Some([received, sent]) = lock(&LISTED).as_mut() {
        *received -= peer.rx_bytes as f64;
        *sent -= peer.tx_bytes as f64;
    }
}

/// Forgets the sockets that are not among these.
pub(crate) fn keep_sockets(sockets: &HashSet<String>) {
    let is_there = |(name, value): &(&str, String)| *name != "socket" || sockets.contains(value);
    lock(&SAMPLES).retain(|(_, labels), _| labels.iter().all(is_there));
}

/// The answer to `GET /metrics`. Both backends are asked at once, until the deadline.
pub(crate) fn text(node: &routes::Node, deadline: Instant) -> String {
    let (openvpn, peers) = routes::both(node, deadline, |deadline| node.openvpn.lists(deadline));
    let (now, mut samples) = (SystemTime::now(), lock(&SAMPLES).clone());
    let mut set = |name, labels: &Labels, value: f64| {
        samples.insert(key(name, labels), value);
    };
    set("build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name));
        value.and_then(|value| value.split_whitespace().next()?.parse().ok()).unwrap_or(f64::NAN)
    };
    set("resident_memory_bytes", &[], field("VmRSS:") * 1024.0);
    set("threads", &[], field("Threads:"));
    // Without the one that reads.
    let open_fds = fs::read_dir("/proc/self/fd").map_or(f64::NAN, |open| open.count() as f64 - 1.0);
    set("open_fds", &[], open_fds);
    if let Some((server, ca)) = node.tls.as_ref().map(|tls| tls.expire()) {
        for (certificate, end) in [("server", server), ("ca", ca)] {
            let left = seconds(end) - seconds(now);
            set("certificate_remaining_seconds", &[("certificate", certificate)], left);
        }
    }
    set("wireguard_up", &[], f64::from(peers.is_some()));
    if let Some(peers) = peers {
        let online = peers.iter().filter(|peer| routes::is_online(peer, now)).count();
        set("wireguard_peers", &[], peers.len() as f64);
        set("wireguard_peers_online", &[], online as f64);
    }
    set("openvpn_directory_up", &[], f64::from(openvpn.is_some()));
    let (answers, failed) = openvpn.unwrap_or_default();
    let failed = failed.into_iter().map(|failure| (failure.socket, None));
    for (socket, clients) in answers.into_iter().chain(failed) {
        set("openvpn_up", &[("socket", &socket)], f64::from(clients.is_some()));
        if let Some(clients) = clients {
            set("openvpn_clients", &[("socket", &socket)], clients.count as f64);
        }
    }
    for (minutes, load) in ["1", "5", "15"].into_iter().zip(node::load_average()) {
        set("node_load_average", &[("minutes", minutes)], f64::from(load) / 100.0);
    }
    set("node_uptime_seconds", &[], node::uptime() as f64);
    set("maintenance_mode", &[], f64::from(node::maintenance_mode()));
    written(&samples, &lock(&DURATIONS).clone())
}

fn written(samples: &Samples, durations: &BTreeMap<String, Durations>) -> String {
    let mut text = String::new();
    for family in FAMILIES.lines() {
        let (name, help) = family.split_once(' ').unwrap_or_default();
        let kind = match name {
            DURATION => "histogram",
            name if name.ends_with("_total") => "counter",
            _ => "gauge",
        };
        text += &format!("# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} {kind}\n");
        for ((_, labels), value) in samples.iter().filter(|((of, _), _)| *of == name) {
            text += &sample(name, labels, *value);
        }
        for (call, (counts, sum)) in durations.iter().filter(|_| name == DURATION) {
            for (le, count) in BUCKETS.iter().zip(counts) {
                let labels = [("call", call.as_str()), ("le", *le)];
                text += &sample(&format!("{name}_bucket"), &labels, *count);
            }
            text += &sample(&format!("{name}_sum"), &[("call", call)], *sum);
            text += &sample(&format!("{name}_count"), &[("call", call)], counts[counts.len() - 1]);
        }
    }
    text
}

fn sample(name: &str, labels: &[(&str, impl ToString)], value: f64) -> String {
    let label = |(name, value): &(&str, _)| {
        let value = ToString::to_string(value).replace('\\', r"\\").replace('"', r#"\""#);
        format!("{name}=\"{}\"", value.replace('\n', r"\n"))
    };
    let labels = match labels {
        [] => String::new(),
        labels => format!("{{{}}}", labels.iter().map(label).collect::<Vec<_>>().join(",")),
    };
    format!("{PREFIX}{name}{labels} {value}\n")
}

/// Since 1970.
fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(key: u8, received: u64) -> Peer {
        let (allowed_ips, last_handshake) = (vec![], None);
        let public_key = [key; 32].into();
        Peer { public_key, allowed_ips, last_handshake, rx_bytes: received, tx_bytes: 0 }
    }

    /// The first list is where they begin; a peer that goes leaves its bytes.
    #[test]
    fn totals_never_go_down() {
        let total = || lock(&SAMPLES)[&("wireguard_received_bytes_total", vec![])];
        for (list, expected) in [
            (&[peer(1, 1000)][..], 0.0),
            (&[peer(1, 1100), peer(2, 10)], 110.0),
            (&[peer(2, 20)], 110.0),
            (&[peer(2, 25)], 115.0),
        ] {
            listed(list, Instant::now());
            assert_eq!(total(), expected);
        }
        // It is known what it had received in the end.
        removed(&peer(2, 30));
        listed(&[], Instant::now());
        assert_eq!(total(), 120.0);
    }

    #[test]
    fn labels_and_buckets() {
        let text = sample("x", &[("a", "q\"\\\n"), ("b", "é")], 0.5);
        assert_eq!(text, "vpn_daemon_x{a=\"q\\\"\\\\\\n\",b=\"é\"} 0.5\n");
        assert_eq!(sample("x", &[("", ""); 0], 1e20), "vpn_daemon_x 100000000000000000000\n");
        for milliseconds in [5, 6, 3000, 9000] {
            answered("/test", 200, Duration::from_millis(milliseconds));
        }
        let text = written(&Samples::new(), &lock(&DURATIONS).clone());
        let lines = text.lines().filter(|line| line.contains("{call=\"/test\""));
        let values: Vec<_> = lines.map(|line| line.split_once("} ").unwrap().1).collect();
        assert_eq!(values, ["1", "2", "2", "2", "2", "2", "3", "4", "12.011", "4"]);
    }
}
